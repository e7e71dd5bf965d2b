"""examples/serve/Containerfile without a container engine: what it copies and installs is there, its command is one of `distill`,
and its health check tells a server that answers from one that does not, whatever proxy the environment names."""

import http.server
import json
import os
import re
import shutil
import ssl
import subprocess
import sys
import threading
import tomllib
from pathlib import Path

import pytest

from distill.cli import parse
from distill.live.operations.access import Access
from tests.support.processes import ROOT

LINES = re.sub(r"\\\n\s*", "", (ROOT / "examples" / "serve" / "Containerfile").read_text(encoding="utf-8")).splitlines()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def instructions(name: str) -> list[str]:
    return [line.removeprefix(f"{name} ") for line in LINES if line.startswith(f"{name} ")]


def test_it_copies_what_the_wheel_is_made_of_and_nothing_else():
    copied = [word for line in instructions("COPY") for word in line.split()[:-1]]
    assert all((ROOT / word).exists() for word in copied)
    project = PROJECT["project"]
    packages = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    assert sorted(copied) == sorted(["pyproject.toml", project["readme"], *project["license-files"], *packages])


def test_its_extras_are_the_projects():
    (installed,) = re.findall(r"'\.\[(.*)\]'", "\n".join(instructions("RUN")))
    assert set(installed.split(",")) <= set(PROJECT["project"]["optional-dependencies"])


def test_its_command_is_one_of_distill_and_options_may_follow():
    (line,) = instructions("ENTRYPOINT")
    program, *words = json.loads(line)
    assert program in PROJECT["project"]["scripts"]
    args = parse(words)
    assert (args.student, args.port) == (Path("/student"), int(*instructions("EXPOSE")))
    assert Access(host=args.host, token="x" * 16).loopback is False
    behind = parse([*words, "--host", "127.0.0.1", "--allow-host", "avatar.example"])
    assert (behind.host, behind.allow_host, behind.token) == ("127.0.0.1", ["avatar.example"], "@/token")


def test_the_documented_runs_give_options_of_distill():
    text = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    runs = re.findall(r"^podman run .* avatar-distill (.*)$", text, re.M)
    assert len(runs) == 2
    for options in runs:
        parse([*json.loads(*instructions("ENTRYPOINT"))[1:], *options.split()])


class Health(http.server.BaseHTTPRequestHandler):
    status = 200

    def do_GET(self):
        self.send_response(self.status if self.path == "/health" else 404)
        self.end_headers()

    def log_message(self, *_):
        pass


def close(server: http.server.ThreadingHTTPServer) -> None:
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("status", "tls", "healthy"), [(200, False, True), (200, True, True), (503, False, False), (None, False, False)]
)
@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed: no certificate")
def test_its_health_check(tmp_path, status, tls, healthy):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Answer", (Health,), {"status": status}))
    if tls:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
        words = ["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=avatar.test"]
        subprocess.run(["openssl", *words, "-keyout", key, "-out", certificate], check=True, capture_output=True)
        context.load_cert_chain(certificate, key)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    if status is None:
        close(server)
    (line,) = instructions("HEALTHCHECK")
    command = line.partition(" CMD ")[2]
    assert "8800" in command
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    environment = {**os.environ, "PATH": path, "http_proxy": "http://127.0.0.1:1", "https_proxy": "http://127.0.0.1:1"}
    done = subprocess.run(
        ["sh", "-c", command.replace("8800", str(server.server_port))], env=environment, check=False, timeout=60
    )
    assert (done.returncode == 0) == healthy
    if status is not None:
        close(server)
