"""Who may ask: an ASGI layer before everything else.

A server on one's own machine can be reached by every web page that one's browser shows: by an address that is made to
resolve to it (so the Host is checked), by scripts and WebSockets of other origins (so the Origin is). The token is what
a server on any other address asks for besides.
"""

from __future__ import annotations

import hmac
import ipaddress
import json
import re
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from onestroke.errors import RecipeError

LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
TOKEN = re.compile(r"[A-Za-z0-9._~-]{16,256}")
PROTOCOL, TOKEN_PROTOCOL = "onestroke", "onestroke.token."  # of the WebSocket: browsers can send no header there
# The page holds no secret, and asks for the token itself; probes come without one.
OPEN_PATHS = frozenset({"/", "/health", "/ready", "/favicon.ico"})
OPEN_FOLDER = "/studio/"
HEADERS = (  # of every answer: nothing but the server's own files runs in its pages, and no other page shows them
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
        b"font-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
)


@dataclass(frozen=True)
class Rules:
    """Names that a request may address the server by, what it must know, and how long it may be."""

    hosts: frozenset[str] = LOCAL_NAMES
    token: str | None = None
    body_bytes: int = 8 * 2**20


def is_local(address: str) -> bool:
    """Whether a server on `address` is reached from this machine alone."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"


def check_token(token: str | None, address: str) -> None:
    """Refuse a token that headers cannot carry, and an open address without one. Raises `RecipeError`."""
    if token is not None and not TOKEN.fullmatch(token):
        raise RecipeError(
            "the token is too short or has characters that a header cannot carry",
            where="--token",
            fix="Take 16 to 256 letters, digits, dots, dashes, underscores or tildes.",
        )
    if token is None and not is_local(address):
        raise RecipeError(
            f"{address} can be reached from other machines",
            where="--host",
            fix="Give a --token of at least 16 characters, or leave --host out to serve this machine alone.",
        )


class Guard:
    """Refuses what comes by another name, from another origin, without the token, or with too long a body."""

    def __init__(self, app: ASGIApp, rules: Rules) -> None:
        self.app, self.rules = app, rules

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        refusal = self._refusal(scope, headers)
        if refusal is not None:
            await _refuse(scope, send, *refusal)
        elif scope["type"] == "websocket":
            await self.app(scope, receive, send)
        else:
            await self._with_short_body(scope, receive, send)

    def _refusal(self, scope: Scope, headers: dict[bytes, str]) -> tuple[int, str] | None:
        host = headers.get(b"host", "")
        if name_of(host) not in self.rules.hosts:
            return 421, f"This server is not {name_of(host)[:80]!r}. Start it with --allow-host to add the name."
        origin = headers.get(b"origin")
        if origin is not None and not same_origin(origin, host):
            return 403, f"Pages of {origin[:80]!r} may not use this server."
        if headers.get(b"sec-fetch-site") == "cross-site" and headers.get(b"sec-fetch-mode") != "navigate":
            return 403, "Pages of other sites may not use this server."
        if not self._knows_token(scope, headers):
            return 401, "Send the server's token as Authorization: Bearer TOKEN."
        if scope["type"] == "http" and _declared_length(headers) > self.rules.body_bytes:
            return 413, f"Send at most {self.rules.body_bytes:,} bytes."
        return None

    def _knows_token(self, scope: Scope, headers: dict[bytes, str]) -> bool:
        path = scope["path"]
        if self.rules.token is None or path in OPEN_PATHS or path.startswith(OPEN_FOLDER):
            return True
        kind, _, given = headers.get(b"authorization", "").partition(" ")
        sent = [given.strip()] if kind.lower() == "bearer" else []
        if scope["type"] == "websocket":
            sent += [p.removeprefix(TOKEN_PROTOCOL) for p in scope["subprotocols"] if p.startswith(TOKEN_PROTOCOL)]
        return any(hmac.compare_digest(token.encode(), self.rules.token.encode()) for token in sent)

    async def _with_short_body(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The app, unless more comes than is allowed; a length need not have been declared."""
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.rules.body_bytes:
                raise HTTPException(413, f"Send at most {self.rules.body_bytes:,} bytes.")  # FastAPI passes these on
            return message

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], *HEADERS]}
            await send(message)

        await self.app(scope, counted, with_headers)


def name_of(host: str) -> str:
    """The name in a Host header, without its port, in lower case; an IPv6 address without brackets."""
    try:
        return (urlsplit(f"//{host}").hostname or "").rstrip(".")
    except ValueError:
        return ""


def same_origin(origin: str, host: str) -> bool:
    """Whether a page of `origin` came from the server that is addressed as `host`."""
    try:
        parts = urlsplit(origin)
    except ValueError:
        return False
    default = {"http": ":80", "https": ":443"}.get(parts.scheme)
    if default is None or not parts.netloc:
        return False
    return parts.netloc.lower().removesuffix(default) == host.lower().removesuffix(default)


def _declared_length(headers: dict[bytes, str]) -> int:
    declared = headers.get(b"content-length", "0")
    return int(declared) if declared.isascii() and declared.isdigit() else 0


async def _refuse(scope: Scope, send: Send, status: int, message: str) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008, "reason": message[:120]})
        return
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": str(status)}
    body = json.dumps({"error": error}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), *HEADERS]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
