"""A house of its own for every test: state, temporary directory, Redis and processes; whatever it leaves behind fails the test."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from assayer.queues import Connection
from assayer.queues.connect import connect
from assayer.queues.embedded import Server

# A shell that runs the tests in the background may have them ignore Ctrl-C, and every process that they start would with them.
signal.signal(signal.SIGINT, signal.default_int_handler)

REPOSITORY = Path(__file__).resolve().parent.parent

EVALUATOR = """
import array
import zipfile

def mean(checkpoint_path):
    # Of the one tensor of a checkpoint that House.save wrote: a file of this archive.
    with zipfile.ZipFile(checkpoint_path) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("/data/0")]
        values = array.array("f", archive.read(name))
    return {"mean": sum(values) / len(values)}
"""


class House:
    """One user's machine, as far as assayer can see: a state directory, a temporary directory, an environment."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.state = root / "xdg" / "assayer"
        self.runs = root / "runs"
        self.runs.mkdir()
        (root / "tmp").mkdir()
        dropped = {"ASSAYER_REDIS_URL", "CUDA_VISIBLE_DEVICES", "RANK", "WORLD_SIZE"}
        self.environment = {name: value for name, value in os.environ.items() if name not in dropped}
        self.environment |= {"XDG_STATE_HOME": str(root / "xdg"), "TMPDIR": str(root / "tmp"), "COLUMNS": "200", "OMP_NUM_THREADS": "1"}
        self.evaluator = self.file("evaluator.py", EVALUATOR)

    def file(self, name: str, text: str) -> Path:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    def save(self, name: str, value: float = 1.0) -> Path:
        """A checkpoint as ``torch.save`` writes it, below the directory of runs."""
        path = self.runs / name
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"w": torch.full((8, 8), float(value))}, path)
        return path

    def command(self, *words: object, check: bool = True, timeout: float = 90, **more: Any) -> "subprocess.CompletedProcess[str]":
        """Runs ``python -m assayer <words>`` to its end."""
        command = [sys.executable, "-m", "assayer", *map(str, words)]
        more.setdefault("cwd", REPOSITORY)
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            env=self.environment | more.pop("env", {}),
            timeout=timeout,
            stdin=subprocess.DEVNULL,
            **more,
        )
        if check and done.returncode:
            raise AssertionError(f"{words} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}\n{self.log()}")
        return done

    @contextlib.contextmanager
    def running(self, *words: object, **more: Any) -> "Iterator[subprocess.Popen[str]]":
        """Runs ``python -m assayer <words>`` while the block runs; ended by Ctrl-C when the block has not ended it."""
        command = [sys.executable, "-m", "assayer", *map(str, words)]
        more.setdefault("cwd", REPOSITORY)
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=self.environment, stdin=subprocess.DEVNULL, **more
        ) as process:
            try:
                yield process
            finally:
                if process.poll() is None:
                    process.send_signal(signal.SIGINT)
                process.wait(60)

    def watch(self, *words: object, evaluator: str | None = None, **more: Any) -> "subprocess.CompletedProcess[str]":
        """A detached watch of the directory of runs with the usual evaluator, looking every second."""
        flags = ["--directory", self.runs, "--evaluator", evaluator or f"{self.evaluator}:mean", "--polling_interval", 1, "--detach"]
        return self.command("watch", *flags, *words, **more)

    def once(self, *words: object, evaluator: str | None = None, **more: Any) -> "subprocess.CompletedProcess[str]":
        """Evaluates what is there and returns."""
        flags = ["--directory", self.runs, "--evaluator", evaluator or f"{self.evaluator}:mean", "--polling_interval", 1, "--once"]
        return self.command("watch", *flags, *words, **more)

    def shutdown(self, *words: object) -> "subprocess.CompletedProcess[str]":
        return self.command("shutdown", *words)

    def status(self) -> dict[str, Any]:
        told: dict[str, Any] = json.loads(self.command("status", "--json", check=False).stdout)
        return told

    def record(self, name: str, evaluator: str = "mean") -> dict[str, Any] | None:
        path = self.runs / Path(name).parent / "evals" / evaluator / f"{Path(name).name}.json"
        return json.loads(path.read_text()) if path.exists() else None

    def records(self) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {}
        for folder, below, names in os.walk(self.runs):
            # What is held comes and goes.
            below[:] = [name for name in below if name != ".hold"]
            if Path(folder).parent.name == "evals":
                found |= {name: json.loads(Path(folder, name).read_text()) for name in names if name.endswith(".json")}
        return found

    def connection(self) -> Connection:
        return connect(f"unix://{self.server.socket}")

    @property
    def server(self) -> Server:
        """The embedded server of this house; while it runs, its socket is found where the commands have put it."""
        return Server(self.state)

    def log(self) -> str:
        return "\n".join(path.read_text() for path in self.state.glob("workers/*/*/log"))

    def processes(self) -> dict[int, str]:
        """Every process with this house's environment, by pid, with its command line."""
        mark = f"XDG_STATE_HOME={self.root / 'xdg'}".encode()
        found = {}
        for name in os.listdir("/proc"):
            if name.isdigit() and int(name) != os.getpid():
                with contextlib.suppress(OSError):
                    if mark in Path("/proc", name, "environ").read_bytes().split(b"\0"):
                        found[int(name)] = Path("/proc", name, "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        # The server writes its title over its environment.
        pid = Server(self.state).pid()
        return found | ({pid: "valkey-server"} if pid else {})

    def workers(self, kind: str) -> list[int]:
        """The pids of the worker processes of this kind (watch or eval) that have registered."""
        return [int(w["pid"]) for w in self.status()["workers"] if w["queue"] == {"watch": "watch", "eval": "evaluation"}[kind]]

    def end(self) -> None:
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def until(condition: Callable[[], Any], seconds: float = 30.0, what: str = "") -> Any:
    """The condition's first true value; fails when there is none in time."""
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds} s: {what or condition}")
        time.sleep(0.05)


def _removed(root: Path) -> bool:
    shutil.rmtree(root, ignore_errors=True)
    return not root.exists()


@pytest.fixture
def house() -> Iterator[House]:
    """A house that must be empty of processes at the test's end."""
    # A socket's path has at most 107 bytes: pytest's own directories are too deep.
    root = Path(tempfile.mkdtemp(prefix="assayer-test-"))
    house = House(root)
    try:
        yield house
        if house.processes():
            house.command("shutdown", "--now", check=False)
        left = {pid: line for pid, line in house.processes().items() if line}
        assert not left, f"left behind: {left}\n{house.log()}"
    finally:
        house.end()
        until(lambda: _removed(root))


@pytest.fixture
def without_torch(house: House) -> None:
    """The house's processes find no torch, whose import is most of what a worker's start costs: for scenes about anything else."""
    house.file("site/torch.py", "raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')\n")
    house.environment["PYTHONPATH"] = str(house.root / "site")


@pytest.fixture
def connection() -> Iterator[Connection]:
    """A real Redis of this test's own, on a unix socket."""
    root = Path(tempfile.mkdtemp(prefix="assayer-test-"))
    before, tempfile.tempdir = tempfile.tempdir, str(root)
    server = Server(root / "state")
    try:
        server.start()
        opened = connect(f"unix://{server.socket}")
        yield opened
        opened.close()
    finally:
        server.stop(work_left=False)
        tempfile.tempdir = before
        shutil.rmtree(root, ignore_errors=True)
