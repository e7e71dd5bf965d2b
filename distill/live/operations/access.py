"""Who may ask for anything: names of this server, pages of this server, whoever has the token."""

import hmac
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qsl

from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from distill.live.operations.addresses import LOOPBACK, host_name, is_address, is_loopback
from teachers.errors import UserError

COOKIE = "avatar_distill"
LEAST_TOKEN = 16  # characters
OPEN_PATHS = ("/health",)


@dataclass(frozen=True, kw_only=True)
class Access:
    """`host` is the address that is bound, `names` more host names that are answered (a reverse proxy's). `token`: what everybody
    must have; none on loopback, or where `insecure` says so."""

    host: str = "127.0.0.1"
    token: str | None = field(default=None, repr=False)
    names: Sequence[str] = ()
    insecure: bool = False

    def __post_init__(self):
        if self.token is not None and (len(self.token) < LEAST_TOKEN or not self.token.isascii() or " " in self.token):
            raise UserError(f"--token: give {LEAST_TOKEN} characters or more, ASCII without spaces, or --token auto")
        if not self.loopback and self.token is None and not self.insecure:
            raise UserError(
                f"--host {self.host}: whoever reaches it could animate any face; give --token auto, or a token of your own, or "
                "--insecure"
            )

    @property
    def loopback(self) -> bool:
        """Whether this machine alone reaches the address."""
        return is_loopback(self.host)

    def named(self, host: str) -> bool:
        """Whether a Host header names this server: a given name, on loopback its names, elsewhere the bound one and any address (a
        page of another site that gets here by DNS has a name)."""
        name = host_name(host)
        if name in LOOPBACK or name in {one.lower() for one in self.names}:
            return True
        return not self.loopback and (name == self.host.lower() or is_address(name))


def read_token(word: str | None) -> str | None:
    """The token of an option: `auto` makes one, @FILE reads it, anything else is it. UserError for a file that cannot be read."""
    if word == "auto":
        return secrets.token_urlsafe(24)
    if word is None or not word.startswith("@"):
        return word
    try:
        return Path(word[1:]).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--token {word}: cannot be read ({error}); name a text file with the token") from error


class Guard:
    """Middleware that lets through what `access` does, everything else is refused in one line. `refused` counts by reason.

    A token comes as `Authorization: Bearer`, as a cookie, or in the query `?token=`; a page that is asked for so gets the cookie.
    """

    def __init__(self, app: ASGIApp, access: Access, refused: dict[str, int]):
        self.app, self.access, self.refused = app, access, refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = self._answer(scope) if scope["type"] in ("http", "websocket") else None
        await (answer or self.app)(scope, receive, send)

    def _answer(self, scope: Scope) -> Response | None:
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        host, origin = headers.get(b"host", ""), headers.get(b"origin")
        if not self.access.named(host):
            return self._refuse("host", "this address is not served", 403)
        if origin is not None and origin.partition("://")[2].lower() != host.lower():
            return self._refuse("origin", "pages of other sites are refused", 403)
        if self.access.token is None or scope["path"] in OPEN_PATHS:
            return None
        query = dict(parse_qsl(scope["query_string"].decode("latin-1"))).get("token")
        bearer = headers.get(b"authorization", "").removeprefix("Bearer ")
        given = (query or "", bearer, cookie(headers.get(b"cookie", "")))
        if not any(hmac.compare_digest(one.encode(), self.access.token.encode()) for one in given):
            return self._refuse("token", "a token is required: open the address with ?token=..", 401)
        if query is not None and scope["type"] == "http" and scope["path"] == "/":
            return self._enter(scope["scheme"] == "https")
        return None

    def _refuse(self, reason: str, line: str, status: int) -> Response:
        self.refused[reason] = self.refused.get(reason, 0) + 1
        return PlainTextResponse(line + "\n", status)

    def _enter(self, encrypted: bool) -> Response:
        """The page without the token in its address, which histories keep; the cookie has it."""
        answer = RedirectResponse("/", 303, headers={"Referrer-Policy": "no-referrer", "Cache-Control": "no-store"})
        assert self.access.token is not None
        answer.set_cookie(COOKIE, self.access.token, httponly=True, samesite="lax", secure=encrypted)
        return answer


def cookie(header: str) -> str:
    """The token in a Cookie header; empty where there is none."""
    pairs = (part.strip().partition("=") for part in header.split(";"))
    return next((value for name, _, value in pairs if name == COOKIE), "")
