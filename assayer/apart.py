"""One question to a process of its own: the caller imports nothing for it, inherits no thread of it, and waits no longer than it wants to.

The answer comes over a pipe of its own, so nothing that is printed is taken for it; and it counts from the moment at which it is there,
whatever the process has left running: a thread, a process that holds its pipes open, what it wanted to do at its exit.
"""

import atexit
import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from assayer.files import printable
from assayer.refs import PACKAGE_PARENT

__all__ = ["answer", "ask"]

# Seconds after its time in which a process ends by itself, when nobody is there any more to end it.
GRACE = 10
# Seconds that it has for its end once it has answered, and once it was killed: what hangs in its disk cannot be waited for.
_END = 3.0
# Seconds between two looks whether it lives.
_STEP = 0.1
# Bytes kept of what it complains.
_TAIL = 1 << 16


def ask(module: str, question: Mapping[str, Any], timeout: float) -> Any:
    """What ``module``, run as ``__main__`` in a process of its own, answers to a question of plain JSON.

    The process leads a session of its own, out of reach of the caller's signals; with it ends whatever it has begun there.

    Args:
        module: calls ``answer``.
        question: not on the command line, which every user of the host may read.
        timeout: seconds without a sign of life.

    Raises:
        TimeoutError: there was none in time.
        ChildProcessError: it ended without an answer; the text is the last line of what it complained.
        OSError: it cannot be asked.
    """
    # The alarm outlives the exec: without a parent it ends whatever hangs, in whatever library.
    alarm = int(timeout) + GRACE
    code = f"import runpy, signal; signal.alarm({alarm}); runpy.run_module({module!r}, run_name='__main__')"
    ours, theirs = os.pipe()
    with open(ours, "rb", buffering=0) as pipe:
        try:
            with tempfile.TemporaryFile() as stdin:
                stdin.write(json.dumps(question).encode())
                stdin.seek(0)
                process = subprocess.Popen(
                    [sys.executable, "-c", code, str(theirs), str(alarm)],
                    stdin=stdin,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    cwd=PACKAGE_PARENT,
                    pass_fds=[theirs],
                    # By this W&B would use the process that the caller's W&B has: a run that a killed child leaves open stays open.
                    env={name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"},
                    start_new_session=True,
                )
        finally:
            os.close(theirs)
        patience = 0.0
        try:
            told = _listen(process, pipe, timeout)
            patience = _END
            return told
        finally:
            _end(process, patience)


def _listen(process: "subprocess.Popen[bytes]", pipe: Any, timeout: float) -> Any:
    """The answer, as soon as its line is there. The end of a pipe is not waited for: somebody else may hold it."""
    deadline = time.monotonic() + timeout
    said, complaints = b"", b""
    with selectors.DefaultSelector() as selector:
        for stream in filter(None, (pipe, process.stderr)):
            selector.register(stream, selectors.EVENT_READ)
        while True:
            # Asked first: what is read after its end is its last word.
            has_ended = _has_ended(process)
            ready = selector.select(0 if has_ended else _STEP)
            for key, _ in ready:
                data = os.read(key.fd, _TAIL)
                if not data:
                    selector.unregister(key.fileobj)
                elif key.fileobj is pipe:
                    *lines, said = (said + data).split(b"\n")
                    deadline = time.monotonic() + timeout
                    for line in map(json.loads, lines):
                        if "answer" in line:
                            return line["answer"]
                else:
                    complaints = (complaints + data)[-_TAIL:]
            if has_ended and not ready:
                raise ChildProcessError(_last_line(complaints) or f"it ended with code {process.wait()}")
            if time.monotonic() > deadline:
                raise TimeoutError


def _last_line(complaints: bytes) -> str:
    lines = complaints.decode(errors="replace").strip().splitlines()
    return printable(lines[-1]) if lines else ""


def _has_ended(process: "subprocess.Popen[bytes]") -> bool:
    """True once it has ended. It is not reaped: its group's number stays taken, and a signal meets nobody else."""
    return process.returncode is not None or os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _end(process: "subprocess.Popen[bytes]", patience: float) -> None:
    """Ends the process, and whatever it has left in its session, after so many seconds at most."""
    deadline = time.monotonic() + patience
    while not _has_ended(process) and time.monotonic() < deadline:
        time.sleep(0.01)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_END)
    if process.stderr:
        process.stderr.close()


def answer(respond: Callable[[Any, Callable[[], None]], Any]) -> NoReturn:
    """Ends this process, which ``ask`` has begun, as soon as ``respond`` has answered the question; no thread is waited for.

    ``respond`` is given the question and a function that gives a sign of life.
    """
    pipe, alarm = map(int, sys.argv[1:3])
    os.set_inheritable(pipe, False)

    def say(line: Mapping[str, Any]) -> None:
        # Whoever has asked may be gone; what was begun for it is brought to its end.
        with contextlib.suppress(OSError), open(pipe, "wb", closefd=False) as file:
            file.write(json.dumps(line).encode() + b"\n")

    def alive() -> None:
        signal.alarm(alarm)
        say({})

    code = 1
    try:
        say({"answer": respond(json.loads(sys.stdin.read()), alive)})
        code = 0
        # Whoever keeps something back until the exit has its time, too.
        atexit._run_exitfuncs()
    except BaseException:
        # SystemExit, too: it is a complaint like any other.
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stderr.flush()
        os._exit(code)
