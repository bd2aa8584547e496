"""The faults: each is one act on a running house, which says what it did, or None where there was nothing to do it to."""

import contextlib
import errno
import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import redis
from conftest import House
from fake_trainer import Run, busy
from redis.backoff import NoBackoff
from redis.retry import Retry

from assayer.files import read_json

__all__ = ["INJURIES", "Scene", "Undo", "mount", "unmount"]

ROLES = ("watch worker", "scheduler", "eval worker", "work horse", "evaluator", "supervisor", "redis", "foreground")


@dataclass
class Undo:
    """What takes a fault back, and when (monotonic seconds)."""

    at: float
    name: str
    act: Callable[[], None]


@dataclass
class Scene:
    """The house under trial, as the faults see it."""

    house: House
    runs: list[Run]
    chance: Random
    longest: float
    disk: Path | None
    results: list[Path]
    foreground: "subprocess.Popen[bytes] | None" = None
    undos: list[Undo] = field(default_factory=list)
    stopped: set[int] = field(default_factory=set)

    def later(self, name: str, act: Callable[[], None], share: float = 1.0) -> float:
        """Takes the fault back after a random time; returns how long that is."""
        seconds = self.chance.uniform(0.2, max(0.3, self.longest * share))
        self.undos.append(Undo(time.monotonic() + seconds, name, act))
        return seconds

    def undo(self, everything: bool = False) -> list[str]:
        """Takes back what is due, or all of it; returns the names."""
        due = [u for u in self.undos if everything or u.at <= time.monotonic()]
        for undo in due:
            self.undos.remove(undo)
            undo.act()
        return [undo.name for undo in due]

    def pids(self, role: str) -> list[int]:
        """The processes of a role that live now, in no order that matters."""
        if role == "foreground":
            return [self.foreground.pid] if self.foreground and self.foreground.poll() is None else []
        if role == "redis":
            pid = self.house.server.pid()
            return [pid] if pid else []
        if role == "supervisor":
            return [pid for pid, line in self.house.processes().items() if "assayer.worker.supervise" in line and _lives(pid)]
        below = _children()
        watch, evals = self._workers("watch"), self._workers("evaluation")
        if role in ("watch worker", "eval worker"):
            return watch if role == "watch worker" else evals
        if role == "scheduler":
            return [child for pid in watch for child in below.get(pid, [])]
        horses = [child for pid in evals for child in below.get(pid, [])]
        return horses if role == "work horse" else [child for pid in horses for child in below.get(pid, [])]

    def _workers(self, queue: str) -> list[int]:
        facts = [read_json(path) or {} for path in self.house.state.glob("workers/*/slots/*.json")]
        pids = [int(f["pid"]) for f in facts if f.get("queue") == queue]
        return [pid for pid in pids if _lives(pid) and b"assayer.worker.process" in _command_line(pid)]

    def connection(self) -> "redis.Redis":
        """One try, short: the server may be stopped or gone."""
        return redis.Redis(unix_socket_path=str(self.house.server.socket), socket_timeout=1, retry=Retry(NoBackoff(), 0))


def _stat(pid: int) -> list[str]:
    """The fields of /proc/<pid>/stat behind the name: state, parent, ...; empty when it is gone."""
    with contextlib.suppress(OSError):
        return Path("/proc", str(pid), "stat").read_bytes().rpartition(b")")[2].decode().split()
    return []


def _lives(pid: int) -> bool:
    fields = _stat(pid)
    return bool(fields) and fields[0] not in "ZX"


def _command_line(pid: int) -> bytes:
    with contextlib.suppress(OSError):
        return Path("/proc", str(pid), "cmdline").read_bytes()
    return b""


def _children() -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            fields = _stat(int(name))
            if fields and fields[0] not in "ZX":
                found.setdefault(int(fields[1]), []).append(int(name))
    return found


def _kill(role: str) -> Callable[[Scene], str | None]:
    def kill(scene: Scene) -> str | None:
        pids = scene.pids(role)
        if not pids:
            return None
        pid = scene.chance.choice(sorted(pids))
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        return f"pid {pid}"

    return kill


def _stop(role: str) -> Callable[[Scene], str | None]:
    def stop(scene: Scene) -> str | None:
        pids = sorted(set(scene.pids(role)) - scene.stopped)
        if not pids:
            return None
        pid = scene.chance.choice(pids)
        began = _stat(pid)[19:20]
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
        scene.stopped.add(pid)

        def go_on() -> None:
            scene.stopped.discard(pid)
            # The number may be another process's by now.
            if began and _stat(pid)[19:20] == began:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)

        return f"pid {pid} for {scene.later(f'{role} {pid} goes on', go_on):.1f} s"

    return stop


def _kill_at_record(scene: Scene) -> str | None:
    """Killed in the very milliseconds in which a record is written, or has just been and nobody knows yet."""
    role = scene.chance.choice(("eval worker", "work horse", "redis", "watch worker", "supervisor"))
    folders = [path for folder in scene.results for path in (*folder.glob("look"), *folder.glob("*/look"))]
    pids = sorted({pid for one in (role, "work horse") for pid in scene.pids(one)}) if role != "redis" else scene.pids(role)
    if not pids:
        return None
    before = _names(folders)
    deadline = time.monotonic() + 2
    while not (new := _names(folders) - before):
        if time.monotonic() > deadline:
            return None
        time.sleep(0.0003)
    if role == "work horse":
        time.sleep(scene.chance.uniform(0, 0.004))
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return f"{role}, pids {pids}, at {sorted(new)[0]}"


def _names(folders: list[Path]) -> set[str]:
    found: set[str] = set()
    for folder in folders:
        with contextlib.suppress(OSError):
            found.update(name for name in os.listdir(folder) if ".json" in name)
    return found


def _kill_all(scene: Scene) -> str | None:
    """Everything at once, as when a machine's memory is gone; only the foreground command stays, which is to bring it all back."""
    if not scene.pids("foreground") or scene.foreground is None or scene.foreground.pid in scene.stopped:
        return None
    pids = [pid for pid in scene.house.processes() if pid != scene.foreground.pid]
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return f"{len(pids)} processes"


def _drop_connections(scene: Scene) -> str | None:
    if not scene.pids("redis"):
        return None
    try:
        with scene.connection() as connection:
            return f"{connection.execute_command('CLIENT', 'KILL', 'TYPE', 'normal')} connections"
    except (redis.RedisError, OSError):
        return None


def _flush(scene: Scene) -> str | None:
    if not scene.pids("redis"):
        return None
    try:
        with scene.connection() as connection:
            keys = connection.dbsize()
            connection.flushdb()
            return f"{keys} keys"
    except (redis.RedisError, OSError):
        return None


def _fill_disk(scene: Scene) -> str | None:
    filler = scene.disk / "filler" if scene.disk else None
    if filler is None or filler.exists():
        return None
    size = 0
    with filler.open("wb", buffering=0) as file:
        for block in (1 << 20, 4096, 1):
            with contextlib.suppress(OSError):
                while True:
                    size += file.write(b"\0" * block)
    return f"{size} bytes for {scene.later('disk freed', lambda: filler.unlink(missing_ok=True)):.1f} s"


def _take_away(scene: Scene) -> str | None:
    """The experiment's directory is gone, as when its file system is unmounted; its trainer waits for it."""
    run = scene.chance.choice(scene.runs)
    held = contextlib.ExitStack()
    if not held.enter_context(busy(run.lock)):
        held.close()
        return None
    os.rename(run.folder, f"{run.folder}.away")

    def bring_back() -> None:
        try:
            os.rename(f"{run.folder}.away", run.folder)
        except OSError as error:
            # Somebody made the directory anew in its place.
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            raise AssertionError(f"{run.folder} was made anew while it was away: {sorted(os.listdir(run.folder))}") from None
        finally:
            held.close()

    return f"{os.path.basename(run.folder)} for {scene.later(f'{os.path.basename(run.folder)} is back', bring_back, 0.7):.1f} s"


# Every fault by its name. The trainer adds its own: it rewrites and deletes.
INJURIES: dict[str, Callable[[Scene], str | None]] = {
    **{f"kill {role}": _kill(role) for role in ROLES},
    **{f"stop {role}": _stop(role) for role in ROLES},
    "kill at a record": _kill_at_record,
    "kill everything": _kill_all,
    "drop connections": _drop_connections,
    "flush redis": _flush,
    "fill disk": _fill_disk,
    "directory away": _take_away,
}


def mount(folder: Path, size: str) -> str | None:
    """Mounts a small file system in memory there; None when that was done, else why not."""
    if os.getuid() != 0:
        return "only root may mount one"
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True, text=True)
    return None if done.returncode == 0 else done.stderr.strip() or f"mount ended with code {done.returncode}"


def unmount(folder: Path) -> None:
    subprocess.run(["umount", "-l", str(folder)], check=True, capture_output=True)
