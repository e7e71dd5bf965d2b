"""Who gets in beyond loopback: names, pages, tokens."""

import http.client
import json

import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from distill.live.client import Client
from distill.live.operations.access import Access, cookie, read_token
from distill.live.server import Options
from teachers.errors import UserError
from tests.support.live.serving import a_puppet, serving

TOKEN = "a-token-of-24-characters"


@pytest.fixture(scope="module")
def guarded():
    options = Options(access=Access(token=TOKEN, names=("avatar.example",)))
    with serving(a_puppet(), options=options) as (address, engine):
        yield address, engine


def ask(address: str, path: str, method: str = "GET", **headers: str):
    """(status, headers, first line of the body)"""
    connection = http.client.HTTPConnection(address, timeout=5)
    connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
    answer = connection.getresponse()
    body = answer.read().decode("utf-8", "replace")
    connection.close()
    return answer.status, answer.headers, body


def test_a_refused_client_is_told_in_one_line_and_not_logged_as_an_error(guarded, caplog):
    address, _ = guarded
    with pytest.raises(UserError, match=r"refuses this client \(.*401\); a token goes into additional_headers"):
        Client(f"ws://{address}/live")
    with pytest.raises(UserError, match="403"):
        Client(
            f"ws://{address}/live",
            additional_headers={"Authorization": f"Bearer {TOKEN}", "Origin": "http://evil.example"},
        )
    assert ask(address, "/health")[0] == 200
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_without_the_token_nothing_is_shown_but_the_health(guarded):
    address, engine = guarded
    for path in ("/", "/metrics", "/portraits/0.png", "/nowhere"):
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Cookie": "avatar_distill=wrong"}):
            status, _, body = ask(address, path, **headers)
            assert (status, body) == (401, "a token is required: open the address with ?token=..\n")
    for wrong in ({}, {"Authorization": f"Bearer {TOKEN}x"}):
        with pytest.raises(InvalidStatus) as refused:
            connect(f"ws://{address}/live", additional_headers=wrong)
        assert refused.value.response.status_code == 401
    assert ask(address, "/health")[0] == 200
    assert json.loads(ask(address, "/health")[2]) == {"status": "ok"}
    assert not engine.viewers


def test_the_token_lets_in_as_header_query_and_cookie(guarded):
    address, _ = guarded
    bearer = {"Authorization": f"Bearer {TOKEN}"}
    assert ask(address, "/metrics", **bearer)[0] == 200
    status, headers, _ = ask(address, f"/?token={TOKEN}")
    assert status == 303
    assert headers["Location"] == "/"
    given = headers["Set-Cookie"]
    assert "HttpOnly" in given
    assert "samesite=lax" in given.lower()
    kept = {"Cookie": given.partition(";")[0]}
    status, _, body = ask(address, "/", **kept)
    assert status == 200
    assert "<canvas" in body
    for words in ({"additional_headers": bearer}, {"additional_headers": kept}, {}):
        query = "" if words else f"?token={TOKEN}"
        with connect(f"ws://{address}/live{query}", **words) as page:
            assert json.loads(page.recv())["type"] == "hello"


def test_names_and_pages_of_others_are_refused_before_the_token_is_read(guarded):
    address, _ = guarded
    bearer = {"Authorization": f"Bearer {TOKEN}"}
    assert ask(address, "/", Host="evil.example", **bearer)[0] == 403
    assert ask(address, "/health", Host="evil.example")[0] == 403
    assert ask(address, "/", Origin="https://evil.example", **bearer)[0] == 403
    assert ask(address, "/", Host="avatar.example", Origin="https://avatar.example", **bearer)[0] == 200
    assert ask(address, "/", Host="avatar.example", Origin="https://avatar.example.evil", **bearer)[0] == 403
    status, headers, _ = ask(
        address, f"/?token={TOKEN}", Host="avatar.example", X_Forwarded_Proto="https", X_Forwarded_For="192.0.2.7"
    )
    assert status == 303
    assert "secure" in headers["Set-Cookie"].lower(), "a proxy speaks TLS, so the cookie stays there"


def test_what_is_refused_is_counted(guarded):
    address, _ = guarded
    ask(address, "/")
    text = ask(address, "/metrics", Authorization=f"Bearer {TOKEN}")[2]
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert int(values['distill_refused_total{reason="token"}']) > 0
    assert 'distill_refused_total{reason="host"}' in values


def test_beyond_loopback_a_token_or_a_word_is_needed(tmp_path):
    for host in ("0.0.0.0", "::", "192.0.2.1", "avatar.example"):
        with pytest.raises(UserError, match=f"--host {host}: .*--token auto.*--insecure"):
            Access(host=host)
        assert not Access(host=host, insecure=True).loopback
        assert Access(host=host, token=TOKEN).token == TOKEN
        assert TOKEN not in repr(Access(host=host, token=TOKEN))
    for host in ("127.0.0.1", "localhost", "::1", "127.8.8.8"):
        assert Access(host=host).loopback
    for short in ("", "short", "x" * 15, "with spaces in it, many", "ü" * 20):
        with pytest.raises(UserError, match="--token"):
            Access(token=short)
    made = {read_token("auto") for _ in range(3)}
    assert len(made) == 3
    assert all(len(token or "") >= 32 for token in made)
    (tmp_path / "token").write_text(TOKEN + "\n")
    assert read_token(f"@{tmp_path / 'token'}") == TOKEN
    assert read_token(TOKEN) == TOKEN
    with pytest.raises(UserError, match="cannot be read"):
        read_token(f"@{tmp_path / 'none'}")


@pytest.mark.parametrize(
    ("host", "own", "others"),
    [
        ("127.0.0.1", ("127.0.0.1:80", "localhost", "[::1]:9", "PROXY.example"), ("192.0.2.1", "evil.example", "")),
        ("0.0.0.0", ("192.0.2.1:80", "[2001:db8::1]:80", "localhost", "proxy.example:1"), ("evil.example:80", "")),
        ("me.example", ("me.example:80", "ME.example", "192.0.2.1"), ("evil.example", "me.example.evil")),
    ],
)
def test_a_page_that_came_by_another_name_is_not_served(host, own, others):
    access = Access(host=host, insecure=True, names=("proxy.example",))
    assert all(access.named(name) for name in own)
    assert not any(access.named(name) for name in others)


def test_cookies_are_read_among_others():
    assert cookie(f"a=b; avatar_distill={TOKEN}; c") == TOKEN
    assert cookie("") == cookie("avatar_distil=x") == ""
