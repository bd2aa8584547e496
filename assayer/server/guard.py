"""What stands before every request: the token, where a browser may come from, and how large a body may be."""

import asyncio
import contextlib
import hmac
import re
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from assayer.files import printable
from assayer.protocol import dump
from assayer.server.access import is_loopback

__all__ = ["BODY_MAX", "Guard", "TooLarge"]

# Bytes of a request's body: what is asked for is kept for a week.
BODY_MAX = 64 << 10
# Bytes of a larger one that are read before it is refused, and the seconds that this may take.
AWAY_MAX = 16 << 20
AWAY_TIMEOUT = 5.0


class Guard:
    """Lets a request through to the application, or answers it."""

    def __init__(self, app: ASGIApp, token: str | None) -> None:
        self.app = app
        self._token = token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        refusal = self._refusal(headers)
        if refusal is not None:
            status, text = refusal
            if status == 413:
                await _read_away(receive)
            await _answer(send, status, text)
            return
        await self.app(scope, _limited(receive), send)

    def _refusal(self, headers: dict[str, str]) -> tuple[int, str] | None:
        host = headers.get("host", "")
        if self._token is not None:
            given = headers.get("authorization", "")
            kind, _, word = given.partition(" ")
            if kind.lower() != "bearer" or not hmac.compare_digest(word.strip().encode("latin-1"), self._token.encode()):
                return 401, "this server wants its token: Authorization: Bearer <token>"
        elif not is_loopback(re.sub(r":\d*$", "", host)):
            # A page of elsewhere whose name leads here sends its own name.
            return 403, f"the host {printable(host)[:100]!r} is not served here; ask for localhost"
        origin = headers.get("origin")
        if origin is not None and _netloc(origin) != host:
            return 403, "requests from another site's pages are not answered"
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > BODY_MAX:
            return 413, f"the body is larger than {BODY_MAX} bytes"
        return None


def _netloc(origin: str) -> str | None:
    """The host and port of an Origin header; None for none."""
    try:
        return urlsplit(origin).netloc or None
    except ValueError:
        return None


class TooLarge(Exception):
    """A body grew past its limit while it was read."""


def _limited(receive: Receive) -> Receive:
    taken = 0

    async def limited() -> Message:
        nonlocal taken
        message = await receive()
        taken += len(message.get("body", b""))
        if taken > BODY_MAX:
            raise TooLarge
        return message

    return limited


async def _read_away(receive: Receive) -> None:
    """Reads what a client still sends, up to a limit: while it writes it would not see the answer."""
    taken = 0
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(AWAY_TIMEOUT):
            while taken < AWAY_MAX:
                message = await receive()
                taken += len(message.get("body", b""))
                if not message.get("more_body", False):
                    return


async def _answer(send: Send, status: int, text: str) -> None:
    body = dump({"detail": text})
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if status == 413:
        # What is still to come is not read.
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
