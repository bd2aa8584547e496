"""Seen from outside: rq-dashboard and ``rq info`` show both queues and readable jobs."""

import json
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from conftest import House, until

pytestmark = pytest.mark.usefixtures("without_torch")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def test_rq_dashboard_and_rq_info_show_queues_and_jobs(house: House) -> None:
    house.watch("--num_eval_workers", 0)
    house.save("checkpoint-500.pt")
    until(lambda: house.status()["queues"]["evaluation"]["queued"] == 1)
    url = f"unix://{house.server.socket}"
    info = subprocess.run(
        [sys.executable, "-m", "rq.cli", "info", "-u", url, "-R"], capture_output=True, text=True, env=house.environment, check=True
    ).stdout
    assert "evaluation" in info
    assert "watch" in info
    port = free_port()
    with subprocess.Popen(
        [Path(sys.executable).parent / "rq-dashboard", "-b", "127.0.0.1", "-p", str(port), "-u", url, "-j"],
        env=house.environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as dashboard:
        try:

            def page(path: str) -> str:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
                    return str(answer.read().decode())

            def is_up() -> bool:
                try:
                    return bool(page("/0/view/queues"))
                except OSError:
                    return False

            until(is_up)
            queues = {q["name"]: q for q in json.loads(page("/0/data/queues.json"))["queues"]}
            assert queues["evaluation"]["count"] == 1
            (job,) = json.loads(page("/0/data/jobs/evaluation/queued/8/asc/1.json"))["jobs"]
            assert job["description"] == "evaluate checkpoint-500.pt with mean"
            assert "evaluate checkpoint-500.pt with mean" in page(f"/0/data/job/{job['id']}.json")
        finally:
            dashboard.terminate()
            dashboard.wait(20)
