"""What every request passes before anything looks at it: who asks, from which page, and how many bytes.

It is around the API and the page alike.
"""

import base64
import binascii
import hmac
import json
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from faithdiff_jax.errors import InputError
from faithdiff_jax.service.settings import ServiceOptions

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; object-src 'none'; "
    "base-uri 'self'; frame-ancestors 'none'"
)
"""What a browser may load for the page: nothing from elsewhere."""
HEADERS = (
    (b"content-security-policy", POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
)


class TooLarge(InputError):
    """A request of too many bytes."""


class Guard:
    """An ASGI application around another."""

    def __init__(self, app: App, settings: ServiceOptions):
        self._app, self._settings = app, settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or let the application answer."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        headers = {bytes(name).lower(): bytes(value) for name, value in scope["headers"]}
        refusal = self._refusal(headers)
        if refusal is not None:
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
            else:
                await _answer(send, *refusal)
            return
        exchange = _Exchange(receive, send, self._settings.max_bytes)
        try:
            await self._app(scope, exchange.receive, exchange.send)
        except Exception:
            if not exchange.refused:
                raise
        if exchange.refused:
            await _answer(send, 413, self._too_large())

    def _refusal(self, headers: Mapping[bytes, bytes]) -> tuple[int, str] | None:
        """Status and line for a request that nothing else is to see."""
        host = headers.get(b"host", b"").decode("latin-1").lower()
        origin = headers.get(b"origin")
        token = self._settings.token
        if token is None:
            # A page of elsewhere can have its own name lead to this machine; it cannot choose the name it is asked by.
            if self._settings.loopback and _name_of(host) not in LOOPBACK:
                return (
                    403,
                    "host: this service listens to 127.0.0.1 and localhost; give it a token to be reached by others",
                )
        elif not _is_token(headers.get(b"authorization", b""), token):
            return 401, "token: is missing or wrong; send it as Authorization: Bearer TOKEN, or as password"
        if origin is not None and origin.decode("latin-1").lower().partition("://")[2] != host:
            return 403, "origin: a page of another site may not ask"
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length[:20]) > self._settings.max_bytes:
            return 413, self._too_large()
        return None

    def _too_large(self) -> str:
        return f"the request is too large, at most {self._settings.max_bytes:,} bytes are read"


class _Exchange:
    """A request whose bytes are counted as they come, and the answer to it.

    `refused` says that there were too many before an answer began: what the application then says is left out.
    """

    def __init__(self, receive: Receive, send: Send, limit: int):
        self._receive, self._send, self._left = receive, send, limit
        self._begun = False
        self.refused = False

    async def receive(self) -> Message:
        message = await self._receive()
        self._left -= len(message.get("body", b"") or b"")
        if self._left < 0:
            self.refused = not self._begun
            raise TooLarge("the request is too large")
        return message

    async def send(self, message: Message) -> None:
        if self.refused:
            return
        self._begun = True
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", ()), *HEADERS]}
        await self._send(message)


def _is_token(authorization: bytes, token: str) -> bool:
    """Whether a header holds the token, told in a time that does not depend on where it differs."""
    scheme, _, rest = authorization.partition(b" ")
    given = rest.strip()
    if scheme.lower() == b"basic":  # what browsers send; the name does not matter
        try:
            given = base64.b64decode(given, validate=True).partition(b":")[2]
        except binascii.Error:
            return False
    elif scheme.lower() != b"bearer":
        return False
    return hmac.compare_digest(given, token.encode())


def _name_of(host: str) -> str:
    """A host without its port."""
    return host[: host.rfind("]") + 1] if host.startswith("[") else host.partition(":")[0]


async def _answer(send: Send, status: int, line: str) -> None:
    headers = [(b"content-type", b"application/json"), *HEADERS]
    if status == 401:
        headers.append((b"www-authenticate", b'Basic realm="faithdiff", charset="UTF-8"'))
    body = json.dumps({"detail": line}).encode()
    headers.append((b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
