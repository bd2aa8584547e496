"""A server process of a test's own, and a client of a few lines that shows status and body of every answer."""

import contextlib
import http.client
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from conftest import REPOSITORY, House, until

from assayer.files import write_json, write_whole
from assayer.server.tasks import Tasks

EVALUATORS = '''
import os, time

def mine(path, tasks, model_args=None):
    """One number a task; what it was called with stands in the other numbers."""
    merged = path is not None and os.path.exists(os.path.join(path, "model.safetensors"))
    return {task: {"acc": 0.25 * (i + 1), "has_path": int(path is not None), "merged": int(merged), "args": len(model_args)}
            for i, task in enumerate(tasks)}

def flat(path, tasks, num_fewshot=None, gen_kwargs=None, progress=None):
    return {"acc": 0.5, "shots": num_fewshot or 0, "nan": float("nan"), "has_progress": int(progress is not None)}

def mean(path, tasks):
    from safetensors.torch import load_file
    tensors = load_file(os.path.join(path, "model.safetensors"))
    return {tasks[0]: {"sum": float(sum(t.double().sum() for t in tensors.values())), "tensors": len(tensors)}}

def slow(path, tasks, progress):
    """Waits until a file is there whose name is the task's, and tells how often it was begun as far as its progress knows."""
    attempts = (progress.resume() or 0) + 1
    progress.save(attempts)
    open(tasks[0] + ".begun", "a").write("x")
    while not os.path.exists(tasks[0]):
        time.sleep(0.05)
    open(tasks[0] + ".attempts", "w").write(str(attempts))
    return {"slow": {"m": 1}}

def blocks(path, tasks, output_dir):
    """Where its record belongs lies a folder."""
    os.mkdir(output_dir.removesuffix(".files") + ".json")
    open(tasks[0], "a").write("x")
    return {"m": 1}

def fails(path, tasks):
    raise RuntimeError("no such luck\\nin two lines")
'''
NAMES = ("mine", "flat", "mean", "slow", "blocks", "fails")


class Server:
    """One server process; ``tell`` asks it over HTTP."""

    def __init__(self, house: House, port: int, process: "subprocess.Popen[str]") -> None:
        self.house = house
        self.port = port
        self.process = process
        self.headers: dict[str, str] = {}

    def tell(self, method: str, path: str, body: object = None, **headers: str) -> tuple[int, Any]:
        """Status and JSON body of one request."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        sent = {"Content-Type": "application/json", **self.headers, **{k.replace("_", "-"): v for k, v in headers.items()}}
        data = body if isinstance(body, bytes) else None if body is None else json.dumps(body).encode()
        try:
            connection.request(method, path, data, sent)
            answer = connection.getresponse()
            text = answer.read()
            self.answered = answer.headers
            return answer.status, json.loads(text) if text else None
        finally:
            connection.close()

    def get(self, path: str) -> Any:
        status, told = self.tell("GET", path)
        assert status == 200, told
        return told

    def submit(self, model: str, tasks: list[str], **fields: Any) -> str:
        """The id of a job that is taken in."""
        status, told = self.tell("POST", "/evaluate", {"model": model, "tasks": tasks, **fields})
        assert status == 200, told
        return str(told["job_id"])

    def wait(self, job: str, seconds: float = 60) -> dict[str, Any]:
        """The job once it has ended."""

        def ended() -> Any:
            told = self.get(f"/jobs/{job}")
            return told if told["status"] in ("completed", "failed", "cancelled") else None

        found: dict[str, Any] = until(ended, seconds, what=job)
        return found

    def until_running(self, job: str) -> None:
        until(lambda: self.get(f"/jobs/{job}")["status"] == "running")


def save_ranks(path: Path) -> Path:
    """A checkpoint as LMMs-Engine lays it out, of one rank: sixteen ones."""
    (path / "pytorch_model_fsdp_0").mkdir(parents=True)
    torch.save({"w": torch.ones(4, 4)}, path / "pytorch_model_fsdp_0" / "model_world_size_1_rank_0.pt")
    (path / "config.json").write_text("{}")
    return path


@contextlib.contextmanager
def served(house: House, *words: object, port: int = 0, workers: int = 2) -> Iterator[Server]:
    """A server with the evaluators above, its port and its process; ended by Ctrl-C when the block has not ended it."""
    source = house.root / "served.py"
    if not source.exists():
        write_whole(source, EVALUATORS.encode())
    names = Tasks(house.state, None).path
    if not names.exists():
        # What takes lm-eval ten seconds to tell is told here.
        names.parent.mkdir(parents=True, exist_ok=True)
        write_json(names, ["a_task"])
    flags: list[object] = ["server", "--port", port, "--num_eval_workers", workers]
    for name in NAMES:
        flags += ["--model", f"{name}={source}:{name}"]
    log = (house.root / "server.log").open("a")
    command = [sys.executable, "-m", "assayer", *map(str, flags), *map(str, words)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=log, text=True, env=house.environment, stdin=subprocess.DEVNULL, cwd=REPOSITORY
    ) as process:
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            assert line.startswith("serving http://"), (house.root / "server.log").read_text()
            yield Server(house, int(line.split()[1].rpartition(":")[2]), process)
        finally:
            if process.poll() is None:
                process.send_signal(2)
            process.wait(30)
            log.close()


@contextlib.contextmanager
def a_house() -> Iterator[House]:
    """A house for the tests of a whole module."""
    with tempfile.TemporaryDirectory(prefix="assayer-test-", ignore_cleanup_errors=True) as root:
        house = House(Path(root))
        try:
            yield house
            house.command("shutdown", "--now", check=False)
            left = {pid: line for pid, line in house.processes().items() if line}
            assert not left, f"left behind: {left}\n{house.log()}"
        finally:
            house.end()
