"""From a URL, or none, to a Redis that answers, or a sentence why not. Every connection of assayer's is made here."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit, urlunsplit

import redis
from redis.backoff import ExponentialWithJitterBackoff
from redis.retry import Retry

from assayer.cli import URL_VARIABLE
from assayer.errors import RedisError, UsageError
from assayer.files import printable
from assayer.plan import host_name
from assayer.queues import Connection, embedded

__all__ = ["WORKER_RETRIES", "Target", "connect", "connect_async", "target", "without_password"]

# redis-py itself gives up after about 4 s, and a worker that is busy then loses its result; these last about two minutes. A command that
# a person waits for says after about a second that nothing answers.
WORKER_RETRIES = 60
COMMAND_RETRIES = 4

SCHEMES = ("redis", "rediss", "unix")


@dataclass(frozen=True)
class Target:
    """Which Redis is meant: its URL (with password), and whether it is our own embedded server."""

    url: str
    embedded: bool

    @property
    def name(self) -> str:
        """What identifies this Redis in plans and messages; never holds a password."""
        return f"embedded on {host_name()}" if self.embedded else without_password(self.url)


def without_password(url: str) -> str:
    """The URL without user and password, for logs and messages; of one that is not well formed, nothing that could be a part of them."""
    if _is_ambiguous(url):
        return "***"
    parts = urlsplit(url)
    if parts.scheme == "unix":
        return f"unix://{parts.path}"
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment=""))


def _is_ambiguous(url: str) -> bool:
    """True where it cannot be told which part is the password: an ``@`` behind a ``/``, ``?`` or ``#`` that was not percent-encoded."""
    if "@" not in url:
        return False
    try:
        parts = urlsplit(url)
    except ValueError:
        return True
    own_path = parts.scheme == "unix" and (not parts.netloc or "@" in parts.netloc)
    return parts.scheme not in SCHEMES or "@" in parts.query + parts.fragment or ("@" in parts.path and not own_path)


def _without_secrets(text: str, url: str) -> str:
    """An error's text without the URL, the user and the password that it may hold, however they are spelled."""
    text = text.replace(url, without_password(url))
    if _is_ambiguous(url):
        return text
    parts = urlsplit(url)
    given = [parts.password or "", *parse_qs(parts.query).get("password", []), *parse_qs(parts.query).get("ssl_password", [])]
    for secret in sorted({*given, *map(unquote, given), *map(repr, map(unquote, given))} - {"", "''"}, key=len, reverse=True):
        text = text.replace(secret, "***")
    for user in {parts.username or "", unquote(parts.username or "")} - {""}:
        text = re.sub(rf"(?<!\w){re.escape(user)}(?!\w)", "***", text)
    return text


def target(url: str | None, host: str | None, port: int | None, state: Path) -> Target:
    """Which Redis these flags mean: ``--redis_url``, or host and port, else ``ASSAYER_REDIS_URL``, else the embedded server.

    Raises:
        UsageError: the URL has another scheme than redis, rediss or unix, or both forms are given.
    """
    if url and (host or port):
        raise UsageError("give either --redis_url or --redis_host and --redis_port")
    if host or port:
        shown = host or "localhost"
        url = f"redis://{f'[{shown}]' if ':' in shown else shown}:{port or 6379}/0"
    url = url or os.environ.get(URL_VARIABLE) or None
    if url is None:
        return Target(f"unix://{embedded.Server(state).socket}", embedded=True)
    if _is_ambiguous(url):
        raise UsageError(
            "the Redis URL cannot be taken apart: it must be redis://user:password@host:port/db, rediss://... or unix:///path, "
            "with %40, %2F, %3F, %23 and %5B for @, /, ?, # and [ in the user and the password"
        )
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018  # raises for a port that is no number
    except ValueError as error:
        told = "its port is not a number" if "@" in url else str(error)
        raise UsageError(f"the Redis URL is not a URL: {told}") from None
    if parts.scheme not in SCHEMES or not (parts.path if parts.scheme == "unix" else parts.hostname):
        raise UsageError(f"the Redis URL {printable(without_password(url))} must be redis://host:port/db, rediss://... or unix:///path")
    return Target(url, embedded=False)


def connect(url: str, patience: float = 5.0, retries: int = COMMAND_RETRIES, answer: float | None = None) -> Connection:
    """A connection to the Redis at ``url`` that has answered once.

    Args:
        url: redis://, rediss:// or unix://.
        patience: seconds to wait for the first answer.
        retries: how often a command is tried again later on; ``WORKER_RETRIES`` outlast an outage of more than a minute.
        answer: seconds that one command may wait for its answer later on; None: as long as it takes.

    Raises:
        RedisError: nothing answers there, or not as a Redis does.
    """
    try:
        first = redis.Redis.from_url(url, socket_connect_timeout=patience, socket_timeout=patience, retry=Retry(_backoff(), 0))
        with first:
            first.ping()
    except redis.AuthenticationError:
        raise RedisError(
            f"the Redis at {printable(without_password(url))} wants another user or password: "
            f"{URL_VARIABLE}=redis://USER:PASSWORD@host:port/0"
        ) from None
    except (redis.RedisError, OSError, ValueError, TypeError) as error:
        # A URL can hold a password, an error's text the URL. (A TypeError tells of an option that redis-py does not know.)
        reason = printable(" ".join(_without_secrets(str(error), url).split()))
        raise RedisError(
            f"no Redis answers at {printable(without_password(url))} ({reason}); check --redis_url or {URL_VARIABLE}"
        ) from None
    limits = {} if answer is None else {"socket_timeout": answer, "socket_connect_timeout": answer}
    return redis.Redis.from_url(url, retry=Retry(_backoff(), retries), health_check_interval=30, **limits)


def connect_async(url: str, answer: float, connections: int = 4) -> Connection:
    """A client for an event loop, to a Redis that has answered ``connect``.

    Args:
        url: as for ``connect``.
        answer: seconds that each of its commands may wait.
        connections: how many it has; who finds none free waits, since a crowd that opens one each would only be slower.
    """
    import redis.asyncio
    from redis.asyncio.retry import Retry as AsyncRetry

    pool = redis.asyncio.BlockingConnectionPool.from_url(
        url,
        max_connections=connections,
        timeout=answer,
        retry=AsyncRetry(_backoff(), COMMAND_RETRIES),
        health_check_interval=30,
        socket_timeout=answer,
        socket_connect_timeout=answer,
    )
    return redis.asyncio.Redis(connection_pool=pool)


def _backoff() -> ExponentialWithJitterBackoff:
    return ExponentialWithJitterBackoff(base=0.1, cap=3)


def open_target(chosen: Target, state: Path) -> Connection:
    """A connection to the chosen Redis; the embedded server is started when it does not run.

    Raises:
        RedisError: it does not answer or cannot be started.
    """
    if chosen.embedded:
        embedded.Server(state).start()
    return connect(chosen.url)


def open_running(chosen: Target, state: Path) -> Connection | None:
    """As ``open_target``, but None when the embedded server does not run and has no work that would make starting it worth while."""
    if chosen.embedded:
        server = embedded.Server(state)
        if not server.is_running() and not server.has_work():
            return None
    return open_target(chosen, state)
