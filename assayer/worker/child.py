"""A stranger's function in a process of its own: it may crash, hang, flood its output or leave processes behind, and all of that ends.

The caller becomes the reaper of everything below it (PR_SET_CHILD_SUBREAPER), so that a process which left for a session of its own is
still found and ended. On systems other than Linux these bonds are missing, and only the child itself is ended.
"""

import contextlib
import ctypes
import errno
import json
import math
import os
import select
import signal
import stat
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from assayer.errors import AssayerError

__all__ = [
    "GIVEN_UP",
    "EndedBadly",
    "Ending",
    "become_reaper",
    "descendants",
    "die_with_parent",
    "end_descendants",
    "give_up_on",
    "run",
    "stop",
]

# Bytes of an evaluator's output that are kept: so much from its start, so much from its end.
LOG_HEAD = 8 << 20
LOG_TAIL = 1 << 20
# Seconds between the polite signal and the hard one, and the same where the whole worker has to be gone soon.
GRACE = 5.0
GIVING_UP_GRACE = 4.0
# Seconds for which a bad ending waits to see whether this process is told to give up as well: where a scheduler signals every process of a
# job, the evaluator may be the first to die. The longer one where that is what the ending looks like.
SETTLE = 0.5
SETTLE_LONG = 3.0
# How a process ends that gave its evaluation up: as a shell names an end by SIGTERM.
GIVEN_UP = 128 + signal.SIGTERM
# Characters of a traceback that a record keeps, from its end.
TRACEBACK_MAX = 4000

# Descriptors of the worker's own that no child may carry on, such as the lock of its slot.
kept_from_children: list[int] = []

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


@dataclass(frozen=True)
class Ending:
    """How a child ended: ``cause`` is None when it returned ``value``, else a short name, with ``message`` (one line) and a traceback."""

    value: Any = None
    cause: str | None = None
    message: str = ""
    traceback: str | None = None


class EndedBadly(Exception):
    """What a function raises that has itself learned how an evaluation ended elsewhere: ``run`` returns this very ending."""

    def __init__(self, ending: Ending) -> None:
        super().__init__(ending.message)
        self.ending = ending


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


def die_with_parent(parent: int, sig: int = signal.SIGKILL) -> None:
    """Asks the kernel to send ``sig`` to this process when its parent ends; ends at once when ``parent`` is gone already."""
    _prctl(_PR_SET_PDEATHSIG, sig)
    if os.getppid() != parent:
        os._exit(1)


class _GivingUp:
    """Whether this process is to give its evaluation up, and the child that it would have to end."""

    def __init__(self) -> None:
        self.signals: tuple[int, ...] = ()
        self.ordered = False
        self.child = 0
        # The child was ended by ``stop``: no sign of anything else.
        self.stopped = False


_giving_up = _GivingUp()


def give_up_on(signals: tuple[int, ...]) -> None:
    """From now on each of these signals makes this process give up the evaluation that runs, and exit with ``GIVEN_UP``.

    An evaluator that has returned by then, or does within the grace, is not given up: its outcome is delivered.
    """
    _giving_up.signals = signals
    for number in signals:
        signal.signal(number, _on_give_up)


def _on_give_up(number: int, frame: Any) -> None:
    _giving_up.ordered = True
    pid = _giving_up.child
    if pid:
        # It may have been waited for in this very moment.
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(pid, signal.SIGTERM)
            if not _exits_within(pid, GIVING_UP_GRACE):
                os.kill(pid, signal.SIGKILL)


def stop() -> None:
    """Ends the child that runs, if one does, politely first; called by another thread than the one that waits for it in ``run``."""
    pid = _giving_up.child
    if pid:
        _giving_up.stopped = True
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(pid, signal.SIGTERM)
            if not _exits_within(pid, GRACE):
                os.kill(pid, signal.SIGKILL)


def _give_up_if_ordered() -> None:
    if _giving_up.ordered:
        os._exit(GIVEN_UP)


def _settle(status: int | None) -> None:
    """Waits whether a bad ending was the first sign of an order to give up; returns when it was not."""
    if not _giving_up.signals:
        return
    deaths = {*_giving_up.signals, signal.SIGTERM}
    looks = status is not None and (os.WTERMSIG(status) in deaths if os.WIFSIGNALED(status) else os.WEXITSTATUS(status) == GIVEN_UP)
    deadline = time.monotonic() + (SETTLE_LONG if looks else SETTLE)
    while not _giving_up.ordered and time.monotonic() < deadline:
        time.sleep(0.02)
    _give_up_if_ordered()


def become_reaper(on: bool = True) -> None:
    """From now on (or, with False, no longer), orphans among this process's descendants become its children."""
    _prctl(_PR_SET_CHILD_SUBREAPER, int(on))


def descendants(root: int) -> list[int]:
    """The processes below ``root``, as /proc shows them; zombies are left out."""
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc") if sys.platform == "linux" else []:
        if name.isdigit():
            with contextlib.suppress(OSError):
                # The command's name stands in brackets and may hold anything.
                fields = Path("/proc", name, "stat").read_bytes().rpartition(b")")[2].split()
                if fields[0] not in (b"Z", b"X"):
                    children.setdefault(int(fields[1]), []).append(int(name))
    found, todo = [], [root]
    while todo:
        below = children.get(todo.pop(), [])
        found += below
        todo += below
    return found


def end_descendants(spare: frozenset[int] = frozenset()) -> int:
    """Kills every process below this one, except ``spare`` and what is below those; returns how many there were."""
    ended: set[int] = set()
    deadline = time.monotonic() + GRACE
    while time.monotonic() < deadline:
        kept = {pid for root in spare for pid in [root, *descendants(root)]}
        found = [pid for pid in descendants(os.getpid()) if pid not in kept]
        for pid in found:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        ended.update(found)
        if not spare:
            _reap()
        if not found:
            break
        time.sleep(0.01)
    return len(ended)


def _reap() -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def run(function: Callable[[], Any], log: Path | None, timeout: float = math.inf, heading: str = "") -> Ending:
    """Calls ``function`` in a forked child and returns how that ended; when it returns, no process below the caller is left.

    Args:
        function: what to call; its value must be JSON.
        log: takes the child's standard output and error, appended, the middle left out past 9 MiB; None: they go where this process's go.
        timeout: seconds after which the child is ended.
        heading: first line of this run in the log.

    Raises:
        OSError: the log cannot be written.
    """
    _give_up_if_ordered()
    become_reaper()
    _giving_up.stopped = False
    killed_before = _oom_kills()
    with _open_log(log) if log else contextlib.nullcontext() as file:
        if file:
            file.write(f"--- {heading}\n".encode(errors="replace"))
            file.flush()
        answer = os.memfd_create("answer") if hasattr(os, "memfd_create") else _unnamed_file()
        read_end, write_end = os.pipe() if file else (None, None)
        sys.stdout.flush()
        sys.stderr.flush()
        parent = os.getpid()
        # An order to give up waits until this process knows its child, and the child is itself.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _giving_up.signals)
        pid = os.fork()
        if pid == 0:
            _child(function, answer, write_end, parent)
        _giving_up.child = pid
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        reader = None
        if write_end is not None:
            os.close(write_end)
            reader = threading.Thread(target=_copy, args=(read_end, file), daemon=True)
            reader.start()
        try:
            status = _wait(pid, timeout)
        finally:
            _giving_up.child = 0
            end_descendants()
        if reader:
            reader.join(GRACE)
        os.lseek(answer, 0, os.SEEK_SET)
        with os.fdopen(answer, "rb") as stored:
            text = stored.read()
    if status is None:
        ending = Ending(cause="timeout", message=f"did not end within {timeout:g} s")
    else:
        ending = _ending(status, text, _oom_kills() > killed_before)
    if ending.cause is not None and not _giving_up.stopped:
        _settle(status)
    return ending


def _open_log(path: Path) -> BinaryIO:
    """A log, opened to append to it; what lies there under its name and is no file of ours is neither followed nor waited for."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    descriptor = os.open(path, flags, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    os.set_blocking(descriptor, True)
    return os.fdopen(descriptor, "ab")


def _unnamed_file() -> int:
    import tempfile

    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _wait(pid: int, timeout: float) -> int | None:
    """The child's wait status, or None when its time ran out; it is gone in either case."""
    if _exits_within(pid, timeout):
        return os.waitpid(pid, 0)[1]
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
        if not _exits_within(pid, GRACE):
            os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def _exits_within(pid: int, timeout: float) -> bool:
    deadline = time.monotonic() + timeout
    if hasattr(os, "pidfd_open"):
        with contextlib.suppress(OSError):
            descriptor = os.pidfd_open(pid)
            try:
                poll = select.poll()
                poll.register(descriptor, select.POLLIN)
                # poll counts in milliseconds, in a 32-bit number.
                while (left := deadline - time.monotonic()) > 0:
                    if poll.poll(min(left, 3600) * 1000):
                        return True
                return False
            finally:
                os.close(descriptor)
    while time.monotonic() < deadline:
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return True
        time.sleep(0.05)
    return False


def _child(function: Callable[[], Any], answer: int, output: int | None, parent: int) -> None:
    """The child's whole life; never returns."""
    code = 1
    try:
        die_with_parent(parent)
        for sig in (signal.SIGALRM, signal.SIGTERM, signal.SIGPIPE, *_giving_up.signals):
            signal.signal(sig, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _giving_up.signals)
        signal.alarm(0)
        # Where memory runs out the kernel takes this process, never a training run beside it.
        with contextlib.suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text("1000")
        for descriptor in kept_from_children:
            with contextlib.suppress(OSError):
                os.close(descriptor)
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        if output is not None:
            os.dup2(output, 1)
            os.dup2(output, 2)
            os.close(output)
        sys.stdin = open(0, closefd=False)
        sys.stdout = open(1, "w", buffering=1, errors="backslashreplace", closefd=False)
        sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)
        me = os.getpid()
        try:
            told = {"value": function()}
            answered = json.dumps(told)
        except SystemExit as error:
            told = _told("exit", f"the evaluator called sys.exit({error.code!r})", error)
        except AssayerError as error:
            told = {"cause": "evaluator", "message": str(error)}
        except EndedBadly as error:
            told = asdict(error.ending)
        except BaseException as error:
            name = type(error).__name__
            out_of_memory = isinstance(error, MemoryError) or "OutOfMemory" in name
            told = _told("out of memory" if out_of_memory else "exception", f"{name}: {error}" if str(error) else name, error)
        if "cause" in told:
            answered = json.dumps(told)
            # The evaluator may have closed its own standard error.
            with contextlib.suppress(OSError, ValueError, AttributeError):
                print(told.get("traceback") or told["message"], file=sys.stderr)
        # An evaluator that forked and let its own child return must not answer twice.
        if os.getpid() == me:
            os.write(answer, answered.encode())
            code = 0
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
    finally:
        os._exit(code)


def _told(cause: str, message: str, error: BaseException) -> dict[str, Any]:
    text = "".join(traceback.format_exception(error))
    return {"cause": cause, "message": " ".join(message.split())[:1000], "traceback": text[-TRACEBACK_MAX:]}


def _ending(status: int, text: bytes, memory_ran_out: bool) -> Ending:
    try:
        return Ending(**json.loads(text))
    except (ValueError, TypeError):
        pass
    if os.WIFSIGNALED(status):
        name = signal.Signals(os.WTERMSIG(status)).name if os.WTERMSIG(status) in set(signal.Signals) else str(os.WTERMSIG(status))
        if memory_ran_out and os.WTERMSIG(status) == signal.SIGKILL:
            return Ending(cause="out of memory", message="the kernel ended the evaluation because memory ran out")
        return Ending(cause="signal", message=f"the evaluation was ended by signal {name}")
    return Ending(
        cause="exit", message=f"the evaluation ended its process with code {os.waitstatus_to_exitcode(status)} before it returned"
    )


def _oom_kills() -> int:
    """How often the kernel has ended a process for memory: in this control group where it counts, else on this machine."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/vmstat").read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0


def _copy(source: int, target: Any) -> None:
    """Copies the child's output to the log until its last writer is gone; past the limit only the end is kept."""
    written, dropped = 0, 0
    tail: deque[bytes] = deque()
    with os.fdopen(source, "rb", buffering=0) as stream:
        while chunk := stream.read(65536):
            with contextlib.suppress(OSError, ValueError):
                if written < LOG_HEAD:
                    target.write(chunk)
                    target.flush()
                    written += len(chunk)
                    continue
            tail.append(chunk)
            while sum(map(len, tail)) - len(tail[0]) > LOG_TAIL:
                dropped += len(tail.popleft())
    with contextlib.suppress(OSError, ValueError):
        if dropped:
            target.write(f"\n--- {dropped} bytes of output are left out here\n".encode())
        target.write(b"".join(tail))
        target.flush()
