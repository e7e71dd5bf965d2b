"""A hub of models on a free port of this machine, as much of its API as an upload and a download of a repository take.

Weights (.safetensors) go as git-lfs objects, everything else within the commit, as at the real one.
"""

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import unquote, urlsplit


class Hub(ThreadingHTTPServer):
    """`repositories`: files by name, by repository; `tokens`: those that requests came with; `refuse`: repositories that nobody may
    write to."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.objects: dict[str, bytes] = {}
        self.tokens: set[str] = set()
        self.refuse: set[str] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def commit(self, name: str) -> str:
        files = self.repositories[name]
        return hashlib.sha1(b"".join(key.encode() + files[key] for key in sorted(files))).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_):
        """Silent."""

    def answer(self, body: bytes | dict | list, status: int = 200, **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def body(self) -> bytes:
        """What was sent, in one piece or in chunks."""
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def words(self) -> list[str]:
        if token := self.headers.get("Authorization"):
            self.server.tokens.add(token.removeprefix("Bearer "))
        return unquote(urlsplit(self.path).path).strip("/").split("/")

    def do_POST(self):
        hub, words, body = self.server, self.words(), self.body()
        if words[-1] == "batch":
            name = "/".join(words[:2]).removesuffix(".git")
            objects = [
                {**one, "actions": {"upload": {"href": f"{hub.url}/objects/{one['oid']}"}}}
                for one in json.loads(body)["objects"]
            ]
            return self.answer({"transfer": "basic", "objects": objects})
        if words[:3] == ["api", "repos", "create"]:
            given = json.loads(body)
            name = f"{given.get('organization') or 'me'}/{given['name']}"
            if name in hub.refuse:
                return self.answer({"error": "You are not allowed to write there"}, 403)
            exists = hub.repositories.setdefault(name, {})
            return self.answer({"url": f"{hub.url}/{name}"}, 409 if exists else 200)
        name = "/".join(words[2:4])
        if words[4:5] == ["preupload"]:
            files = [file["path"] for file in json.loads(body)["files"]]
            modes = [
                {"path": f, "uploadMode": "lfs" if f.endswith(".safetensors") else "regular", "shouldIgnore": False}
                for f in files
            ]
            return self.answer({"files": modes})
        if words[4:5] == ["commit"]:
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    hub.repositories[name][value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    hub.repositories[name][value["path"]] = hub.objects[value["oid"]]
            return self.answer({"commitOid": hub.commit(name), "commitUrl": f"{hub.url}/{name}/commit/main"})
        return self.answer({}, 200 if words[-1] == "validate-yaml" else 404)

    def do_PUT(self):
        data = self.body()
        self.server.objects[self.words()[-1]] = data
        self.answer({}, 200 if hashlib.sha256(data).hexdigest() == self.words()[-1] else 400)

    def do_GET(self):
        hub, words = self.server, self.words()
        name = "/".join(words[2:4] if words[0] == "api" else words[:2])
        if name not in hub.repositories:
            return self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        files, commit = hub.repositories[name], hub.commit(name)
        if words[0] == "api" and "tree" in words:
            return self.answer([{"type": "file", "path": f, "size": len(d), "oid": _oid(d)} for f, d in files.items()])
        if words[0] == "api":
            siblings = [{"rfilename": file} for file in files]
            return self.answer({"id": name, "modelId": name, "sha": commit, "siblings": siblings, "private": False})
        data = files.get("/".join(words[4:]))
        if data is None:
            return self.answer({}, 404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        return self.answer(data, ETag=f'"{_oid(data)}"', X_Repo_Commit=commit)

    do_HEAD = do_GET  # noqa: N815


def _oid(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@contextmanager
def serving_hub(monkeypatch, place) -> Iterator[Hub]:
    """A hub, to which huggingface_hub is pointed as by HF_ENDPOINT; its caches are in the folder `place`."""
    from diffusers.utils import dynamic_modules_utils
    from huggingface_hub import constants, hf_api

    hub = Hub()
    thread = Thread(target=hub.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    for name, value in {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": template,
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_CACHE": str(place / "cache"),
        "HF_HOME": str(place),
        "HF_TOKEN_PATH": str(place / "token"),
    }.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(hf_api.api, "endpoint", hub.url)  # read at the import
    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(place / "modules"))
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
