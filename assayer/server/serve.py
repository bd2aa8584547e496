"""The server's process: listens, answers, cares for what jobs have left, and ends within a second when it is told to."""

import asyncio
import contextlib
import gc
import json
import logging
import os
import resource
import signal
import socket
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import redis
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from assayer.errors import AssayerError, ProtocolError, StateError
from assayer.files import printable
from assayer.queues.stop import stop_orders
from assayer.server.app import application
from assayer.server.desk import Desk
from assayer.server.merging import Merger
from assayer.server.tasks import Tasks

__all__ = ["BY_SHUTDOWN", "Until", "bind", "leave", "serve"]

logger = logging.getLogger(__name__)

# Seconds: that a client may take for its first request's headers, that an idle connection is kept, between two sweeps, between two
# looks whether workers and Redis are cared for, between two whether a shutdown was ordered, and between two whether the end has come.
HEADERS_TIMEOUT = 20
KEEP_ALIVE = 75
SWEEP = 15.0
CARE = 2.0
LOOK = 0.5
END_LOOK = 1.0
FOREVER = 1e9
# Seconds that requests in hand may take when the server is told to end, and threads that ask Redis side by side.
LEAVE = 0.4
QUICK = 8

BY_SHUTDOWN = "by assayer.shutdown"


class _Impatient(H11Protocol):
    """Closes a connection on which a request's headers, the first or any later one's, have not come in time.

    So a slow client takes no place for ever.
    """

    _patience: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._is_asked():
            self._stop_waiting()
        elif self._patience is None:
            # The first bytes of a further request: from here on uvicorn's own time for idle connections does not count.
            self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        # A timer that waits would keep all that belongs to the connection.
        self._stop_waiting()
        super().connection_lost(exc)

    def _is_asked(self) -> bool:
        """True while a request is answered."""
        cycle: Any = self.cycle
        return cycle is not None and not cycle.response_complete

    def _wait(self) -> None:
        self._patience = self.loop.call_later(HEADERS_TIMEOUT, self._close_if_silent)

    def _stop_waiting(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None

    def _close_if_silent(self) -> None:
        self._patience = None
        if not self._is_asked() and not self.transport.is_closing():
            self.transport.close()


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        StateError: the port is taken, or the address is not this machine's.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(1024)
        return listening
    except OSError as error:
        reason = error.strerror or error
        raise StateError(f"cannot listen on {printable(host)}:{port} ({reason}); give another --host or --port") from None


@dataclass(frozen=True)
class Until:
    """When a server ends by itself: after so many seconds without a job that waits or runs; once this file exists, after the last one."""

    idle: float | None = None
    file: str | None = None


def serve(
    desk: Desk,
    listening: socket.socket,
    token: str | None,
    state: Path,
    ready: Callable[[], None],
    care: Callable[[], None],
    queues: list[str],
    until: Until,
) -> str | None:
    """Answers until it is told to end, or ends by itself; why, where no signal has told so.

    Args:
        desk: does the work.
        listening: the socket.
        token: what every client must know; None: none.
        state: the user's state directory.
        ready: called once requests are answered.
        care: called every few seconds; starts again what was killed.
        queues: whose order to stop is heeded.
        until: when it ends by itself.
    """
    with contextlib.suppress(ValueError, OSError):
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    loop = asyncio.new_event_loop()
    # What asks Redis alone; what touches files, which may hang, has threads of its own.
    loop.set_default_executor(ThreadPoolExecutor(QUICK))
    try:
        return loop.run_until_complete(_serve(desk, listening, token, state, ready, care, queues, until))
    finally:
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()


def leave() -> None:
    """Ends the process at once where a thread still waits for a disk that does not answer; Python itself would wait for it."""
    if any(thread is not threading.main_thread() and not thread.daemon for thread in threading.enumerate()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


async def _serve(
    desk: Desk,
    listening: socket.socket,
    token: str | None,
    state: Path,
    ready: Callable[[], None],
    care: Callable[[], None],
    queues: list[str],
    until: Until,
) -> str | None:
    loop = asyncio.get_running_loop()
    tasks = Tasks(state, desk.rules.include_path)
    app = application(desk, Merger(desk.rules.roots, desk.rules.merging), tasks, token)
    server = uvicorn.Server(_config(app))
    ended = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            loop.add_signal_handler(number, ended.set)
    # uvicorn's own handlers would raise the signal again behind the end.
    running = asyncio.create_task(server._serve([listening]))
    beside = [asyncio.create_task(_sweep(desk)), asyncio.create_task(_care(care)), asyncio.create_task(_ask(tasks))]
    while not server.started and not running.done():
        await asyncio.sleep(0.01)
    # What was imported is never garbage: to look through it again and again would stop all answers for a while.
    gc.collect()
    gc.freeze()
    if server.started:
        ready()
    by_itself = [asyncio.create_task(_ordered(desk, queues)), asyncio.create_task(_over(desk, until))]
    by_signal = asyncio.create_task(ended.wait())
    await asyncio.wait([by_signal, running, *by_itself], return_when=asyncio.FIRST_COMPLETED)
    why = next((task.result() for task in by_itself if task.done()), None)
    server.should_exit = True
    for task in (*beside, *by_itself, by_signal):
        task.cancel()
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(asyncio.shield(running), LEAVE)
    return why


def _config(app: ASGIApp) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=_Impatient,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE,
        backlog=1024,
    )


async def _sweep(desk: Desk) -> None:
    while True:
        try:
            await asyncio.to_thread(desk.sweep)
        except (redis.RedisError, OSError, json.JSONDecodeError) as error:
            logger.warning("what jobs have left is looked for again later: %s", error)
        await asyncio.sleep(SWEEP)


async def _ask(tasks: Tasks) -> None:
    """So that the first client who asks for the names need not wait."""
    try:
        await tasks.names()
    except ProtocolError as error:
        logger.warning("%s", error)


async def _care(care: Callable[[], None]) -> None:
    while True:
        try:
            await asyncio.to_thread(care)
        except (AssayerError, OSError) as error:
            logger.warning("%s", error)
        await asyncio.sleep(CARE)


async def _ordered(desk: Desk, queues: list[str]) -> str:
    """Returns as soon as a shutdown, here or on another host, has told all that serve these queues to end."""
    before = None
    while True:
        with contextlib.suppress(redis.RedisError):
            now = await asyncio.to_thread(stop_orders, desk.connection, queues)
            if before is not None and now > before:
                return BY_SHUTDOWN
            before = now
        await asyncio.sleep(LOOK)


async def _over(desk: Desk, until: Until) -> str:
    """Returns when the server's end has come by itself, and why; never where nothing says when."""
    loop = asyncio.get_running_loop()
    quiet = 0
    # One that an earlier training has left says nothing of this one.
    left = _made(until.file)
    since = loop.time()
    while True:
        await asyncio.sleep(END_LOOK if until != Until() else FOREVER)
        try:
            busy = await asyncio.to_thread(desk.is_busy)
        except redis.RedisError:
            continue
        # For a moment, a job that a worker takes is neither here nor there.
        quiet = 0 if busy else quiet + 1
        since = loop.time() if busy else since
        if quiet < 2:
            continue
        made = await asyncio.to_thread(_made, until.file)
        if made is not None and made != left:
            return f"{printable(str(until.file))} exists, and nothing waits"
        if until.idle is not None and loop.time() - since >= until.idle:
            return f"nothing has waited or run for {until.idle:g} s"


def _made(path: str | None) -> int | None:
    """When a file was made, or touched; None where there is none."""
    try:
        return None if path is None else os.stat(path).st_mtime_ns
    except OSError:
        return None
