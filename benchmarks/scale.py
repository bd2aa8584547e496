"""What watching costs: many directories, one large tree, what was evaluated long ago; beside a queue whose jobs sleep their interval out.

Run by ``scripts/bench scale``. Everything is real: the commands, the embedded Redis, one watch worker, files that torch.save wrote. Jobs
wait in the queue for no eval worker: what is measured is the time from "the file is whole" to "its evaluation is queued".
"""

import argparse
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from rq import Queue, SimpleWorker
from rq.job import Job
from rq.serializers import JSONSerializer

from assayer.queues import Connection
from assayer.queues.connect import connect
from assayer.queues.embedded import Server

EVALUATOR = "def never(checkpoint_path):\n    return {'m': 0}\n"
INTERVAL = 5


class Bench:
    """A state directory and directories of checkpoints of this run's own."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "evals.py").write_text(EVALUATOR)
        os.environ |= {"XDG_STATE_HOME": str(root / "state"), "TMPDIR": str(root), "OMP_NUM_THREADS": "1"}
        os.environ.pop("ASSAYER_REDIS_URL", None)
        torch.save({"w": torch.zeros(64)}, root / "model.pt")
        self.model = (root / "model.pt").read_bytes()

    def assayer(self, *words: object) -> None:
        subprocess.run([sys.executable, "-m", "assayer", *map(str, words)], check=True, capture_output=True)

    def watch(self, directories: list[Path], one_command_each: bool = False) -> None:
        flags = ["--evaluator", f"{self.root}/evals.py:never", "--polling_interval", INTERVAL, "--num_eval_workers", 0, "--detach"]
        if not one_command_each:
            self.assayer("watch", *flags, *[word for path in directories for word in ("--directory", path)])
            return
        from assayer.watch.command import main

        for path in directories:
            # A command a directory; the interpreter's start is spared them.
            child = os.fork()
            if child == 0:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
                code = main([*map(str, flags), "--directory", str(path)], standalone_mode=False)
                os._exit(int(code or 0))
            if os.waitpid(child, 0)[1]:
                raise SystemExit(f"the watch of {path} was not accepted")

    def shutdown(self) -> None:
        self.assayer("shutdown", "--now")

    def connection(self) -> Connection:
        return connect(f"unix://{Server(self.root / 'state' / 'assayer').socket}")

    def fill(self, directory: Path, count: int) -> None:
        directory.mkdir(parents=True)
        for step in range(count):
            (directory / f"model_step{step}.pt").write_bytes(self.model)

    def save(self, path: Path, value: float) -> float:
        """Saves a checkpoint under another name, renames it into place, and returns the moment when it was whole."""
        torch.save({"w": torch.full((64,), value)}, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").rename(path)
        return time.time()


def watch_worker(connection: Connection) -> int:
    keys = connection.smembers("rq:workers:watch")
    return int(connection.hget(keys.pop(), "pid"))


def cpu_seconds(pid: int) -> float:
    """Processor time of a process and of its children that live (the scheduler)."""
    total = 0.0
    for one in [pid, *map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]:
        fields = Path(f"/proc/{one}/stat").read_bytes().rpartition(b")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def resident(pid: int) -> float:
    """Resident memory of a process in MiB."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 2**20


def idle(connection: Connection, seconds: float) -> dict[str, float]:
    """While nothing changes: processor time (part of a core), Redis bytes and commands a second, memory in MiB."""
    pid = watch_worker(connection)
    before, bytes_before, calls_before, began = cpu_seconds(pid), *traffic(connection), time.monotonic()
    time.sleep(seconds)
    took = time.monotonic() - began
    nbytes, calls = traffic(connection)
    return {
        "cpu": (cpu_seconds(pid) - before) / took,
        "bytes": (nbytes - bytes_before) / took,
        "calls": (calls - calls_before) / took,
        "memory": resident(pid),
    }


def traffic(connection: Connection) -> tuple[int, int]:
    told = connection.info("stats")
    return told["total_net_input_bytes"] + told["total_net_output_bytes"], told["total_commands_processed"]


def settle(connection: Connection, count: int, seconds: float = 600) -> None:
    """Waits until every one of so many watches has been looked at twice."""
    began = time.time()
    deadline = began + seconds
    while True:
        looked = [float(moment) for moment in connection.hvals("assayer:watch:last")]
        if len(looked) >= count and min(looked) > began + INTERVAL:
            return
        if time.time() > deadline:
            raise SystemExit(f"{count - sum(m > began for m in looked)} of {count} watches were not looked at within {seconds} s")
        time.sleep(0.5)


def latencies(
    connection: Connection, save: Callable[[int], tuple[Path, float]], count: int, over: float, patience: float = 60
) -> list[float]:
    """Seconds from "whole" to "queued" of files that appear at random moments within ``over`` seconds."""
    chance = random.Random(0)
    whole: dict[str, float] = {}
    moments = sorted(chance.uniform(0, over) for _ in range(count))
    began = time.monotonic()
    for i, moment in enumerate(moments):
        time.sleep(max(0.0, began + moment - time.monotonic()))
        path, when = save(i)
        whole[str(path)] = when
    found: dict[str, float] = {}
    deadline = time.monotonic() + patience
    while len(found) < count and time.monotonic() < deadline:
        for job in queued(connection):
            name = str(job.kwargs["checkpoint"])
            if name in whole and job.enqueued_at:
                found[name] = job.enqueued_at.timestamp() - whole[name]
        time.sleep(0.5)
    if len(found) < count:
        raise SystemExit(f"{count - len(found)} checkpoints were not queued")
    return list(found.values())


def queued(connection: Connection) -> Iterator[Job]:
    ids = Queue("evaluation", connection=connection, serializer=JSONSerializer).get_job_ids()
    return (job for job in Job.fetch_many(ids, connection=connection, serializer=JSONSerializer) if job)


def told(values: list[float]) -> str:
    ordered = sorted(values)
    return (
        f"p50 {statistics.median(ordered):.2f} s, p99 {ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]:.2f} s (n = {len(ordered)})"
    )


def many_directories(bench: Bench, count: int, one_command_each: bool, label: str) -> None:
    """One watch worker and ``count`` directories of 20 checkpoints."""
    runs = [bench.root / label / f"run{i}" for i in range(count)]
    for run in runs:
        bench.fill(run, 20)
    began = time.monotonic()
    bench.watch(runs, one_command_each)
    given = time.monotonic() - began
    connection = bench.connection()
    settle(connection, count)
    quiet = idle(connection, 60)
    chance = random.Random(1)

    def save(i: int) -> tuple[Path, float]:
        path = chance.choice(runs) / f"model_step{1000 + i}.pt"
        return path, bench.save(path, i + 1.0)

    delays = latencies(connection, save, 200, 60)
    print(f"{label}: the command took {given:.1f} s; whole -> queued {told(delays)}")
    print(f"    while nothing changes: {quiet['cpu']:.1%} of a core, {quiet['calls']:.0f} Redis commands and", end=" ")
    print(f"{quiet['bytes'] / 1024:.0f} KiB a second, {quiet['memory']:.0f} MiB of memory", flush=True)
    bench.shutdown()


def one_tree(bench: Bench, experiments: int) -> None:
    """One watched root with many experiment directories of 20 checkpoints."""
    root = bench.root / "tree"
    for i in range(experiments):
        bench.fill(root / f"experiment{i}", 20)
    began = time.monotonic()
    bench.watch([root])
    given = time.monotonic() - began
    connection = bench.connection()
    settle(connection, 1, 1800)
    time.sleep(3 * INTERVAL)
    ticks = []
    for _ in range(20):
        generation = connection.hget("assayer:watch:chain", "generation")
        while connection.hget("assayer:watch:chain", "generation") == generation:
            time.sleep(0.002)
        due = float(connection.hget("assayer:watch:chain", "begun"))
        ticks.append(time.time() - due)
    quiet = idle(connection, 30)
    print(f"one root of {experiments} directories: the command took {given:.0f} s; a tick p50 {statistics.median(ticks):.2f} s,", end=" ")
    print(f"longest {max(ticks):.2f} s; {quiet['cpu']:.1%} of a core, {quiet['memory']:.0f} MiB", flush=True)
    bench.shutdown()


def evaluated_before(bench: Bench, counts: tuple[int, ...]) -> None:
    """A hundred directories with more and more evaluated checkpoints: what a look costs does not grow."""
    for count in counts:
        runs = [bench.root / f"evaluated{count}" / f"run{i}" for i in range(100)]
        for run in runs:
            bench.fill(run, count)
        bench.watch(runs)
        connection = bench.connection()
        settle(connection, len(runs))
        quiet = idle(connection, 30)
        print(f"100 directories, {count} settled checkpoints in each: {quiet['calls']:.0f} Redis commands and", end=" ")
        print(f"{quiet['bytes'] / 1024:.1f} KiB a second, {quiet['memory']:.0f} MiB of memory, {quiet['cpu']:.1%} of a core", flush=True)
        bench.shutdown()


def sleeper(directory: str, known: list[str], interval: float, limit: float) -> None:
    """The job of the other design: it lists, queues what is new, sleeps out its interval in the worker, and queues itself again."""
    from rq import get_current_job

    job = get_current_job()
    assert job is not None
    present = sorted(os.listdir(directory))
    for name in present:
        if name not in known and name.endswith(".pt"):
            path = os.path.join(directory, name)
            Queue("evaluation", connection=job.connection, serializer=JSONSerializer).enqueue("os.getpid", kwargs={"checkpoint": path})
    time.sleep(interval)
    if time.time() < limit:
        queue = Queue(job.origin, connection=job.connection, serializer=JSONSerializer)
        queue.enqueue("scale.sleeper", directory, present, interval, limit, job_timeout=3600)


def side_by_side(bench: Bench, count: int, saves: int) -> None:
    """The same directories, once with jobs that sleep in one worker and once with ours, at the same time."""
    sleeping = [bench.root / "sleeping" / f"run{i}" for i in range(count)]
    ours = [bench.root / "ours" / f"run{i}" for i in range(count)]
    for run in (*sleeping, *ours):
        bench.fill(run, 5)
    bench.watch(ours)
    connection = bench.connection()
    settle(connection, count)
    over = 2.0 * count * INTERVAL
    queue = Queue("sleepers", connection=connection, serializer=JSONSerializer)
    sys.modules.setdefault("scale", sys.modules["__main__"])
    for run in sleeping:
        arguments = [str(run), sorted(os.listdir(run)), INTERVAL, time.time() + 3 * over]
        queue.enqueue("scale.sleeper", *arguments, job_timeout=3600)
    worker = os.fork()
    if worker == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        SimpleWorker(["sleepers"], connection=bench.connection(), serializer=JSONSerializer).work(burst=True, logging_level="ERROR")
        os._exit(0)
    chance = random.Random(2)
    delays: dict[str, list[float]] = {}

    def measure(label: str, runs: list[Path]) -> None:
        def save(i: int) -> tuple[Path, float]:
            path = chance.choice(runs) / f"model_step{1000 + i}.pt"
            return path, bench.save(path, i + 1.0)

        delays[label] = latencies(bench.connection(), save, saves, over, patience=2 * count * INTERVAL)

    threads = [threading.Thread(target=measure, args=pair) for pair in (("jobs that sleep", sleeping), ("assayer", ours))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    os.kill(worker, 9)
    os.waitpid(worker, 0)
    for label, values in delays.items():
        print(f"{count} directories, one worker, {label}: whole -> queued {told(values)}", flush=True)
    queue.empty()
    bench.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directories", type=int, default=1000, help="directories of the first part (default 1000)")
    parser.add_argument("--experiments", type=int, default=10000, help="directories below one root (default 10000)")
    parser.add_argument("--sleepers", type=int, default=20, help="directories of the comparison (default 20)")
    parser.add_argument("--parts", default="one,each,tree,evaluated,sleepers", help="which parts to run, by comma")
    given = parser.parse_args()
    print(f"{os.cpu_count()} cores, Python {platform.python_version()}, interval {INTERVAL} s", flush=True)
    parts: dict[str, Callable[[Bench], None]] = {
        "one": lambda bench: many_directories(bench, given.directories, False, f"{given.directories} directories in one command"),
        "each": lambda bench: many_directories(bench, given.directories, True, f"{given.directories} directories in a command each"),
        "tree": lambda bench: one_tree(bench, given.experiments),
        "evaluated": lambda bench: evaluated_before(bench, (10, 100, 400)),
        "sleepers": lambda bench: side_by_side(bench, given.sleepers, 40),
    }
    for name in given.parts.split(","):
        with tempfile.TemporaryDirectory(prefix="assayer-bench-") as root:
            bench = Bench(Path(root))
            try:
                parts[name](bench)
            finally:
                bench.shutdown()


if __name__ == "__main__":
    main()
