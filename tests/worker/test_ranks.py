"""Several processes for one evaluation: they meet, whatever ends one of them is told, and nothing of them stays."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY, House, until

from assayer.errors import EvaluatorError
from assayer.files import private_folder
from assayer.worker import ranks

EVALUATORS = """
import json, os, sys, time
from pathlib import Path

RANK, WORLD_SIZE = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))

def meeting(path):
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    value = torch.tensor([10.0**dist.get_rank()])
    dist.all_reduce(value)
    print(f"rank {dist.get_rank()} of {path}")
    return {"sum": value.item(), "ranks": dist.get_world_size()} if dist.get_rank() == 0 else {"sum": -1, "sum": "of nobody"}

def accelerated(path):
    import torch
    from accelerate import Accelerator

    accelerator = Accelerator()
    gathered = accelerator.gather(torch.tensor([accelerator.process_index + 1.0], device=accelerator.device))
    known = {name: os.environ.get(name) for name in ("MASTER_PORT", "NODE_RANK", "PET_STANDALONE", "ACCELERATE_USE_DEEPSPEED")}
    Path(path, f"environment-{RANK}").write_text(json.dumps(known))
    return {"sum": gathered.sum().item(), "ranks": accelerator.num_processes, "full": accelerator.mixed_precision == "no"}

def wait_for(path, *names):
    while not all(Path(path, name).exists() for name in names):
        time.sleep(0.01)

def second_ends(path, how):
    Path(path, f"here-{RANK}-{os.getpid()}").touch()
    if RANK == 1:
        exec(how)
    time.sleep(1000)

def second_fails(path, how):
    if RANK == 1:
        exec(how)
    time.sleep(1000)

def waits(path, here):
    Path(here, f"here-{RANK}-{os.getpid()}").touch()
    wait_for(here, "go")
    return {"ranks": WORLD_SIZE}

def follows(path):
    # The first is missed by the second at once, long before it has been waited for.
    if RANK == 0:
        Path(path, "gone").touch()
        os._exit(7)
    wait_for(path, "gone")
    raise ConnectionError("the peer has gone")

def counted(path, progress):
    state, first = {"seen": []}, None
    for number in progress.items(range(10), state, every=2):
        if first is None:
            first = len(state["seen"])
            Path(path, f"first-{RANK}").write_text(str(first))
        state["seen"].append(number)
        if first == 0 and number == 6 - RANK * 3:
            Path(path, f"there-{RANK}").touch()
            wait_for(path, "there-0", "there-1")
            os.kill(os.getpid(), 9)
    return {"items": len(state["seen"]), "sum": sum(state["seen"])}
"""

LAUNCH = """
import json, os, sys
from pathlib import Path
from assayer import refs
from assayer.worker import child
from assayer.worker.call import Call
from assayer.worker.ranks import launch

def main(folder, function, arguments, launcher, processes):
    reference = refs.parse(f"{folder}/evaluators.py:{function}", Path(folder))
    places = {"output": f"{folder}/files", "samples": f"{folder}/samples", "progress": f"{folder}/progress"}
    call = Call(reference, function, arguments, folder, folder, "a" * 32, 5, "regular", None, **places)
    ending = child.run(lambda: launch(call, launcher, processes, call.point(processes)).to_json(), Path(folder, "output"), 60, "heading")
    print(json.dumps([ending.value, ending.cause, ending.message, ending.traceback, child.descendants(os.getpid())]))

main(*json.loads(sys.argv[1]))
"""


class Launch:
    """One launch, with the process that waits for it: the caller reaps everything below itself, which is not for a test's own process."""

    def __init__(
        self,
        folder: Path,
        function: str,
        launcher: str = "torchrun",
        environment: dict[str, str] | None = None,
        processes: int = 2,
        **arguments: Any,
    ) -> None:
        self.folder = folder
        (folder / "evaluators.py").write_text(EVALUATORS)
        (folder / "tmp").mkdir(exist_ok=True)
        question = json.dumps([str(folder), function, arguments, launcher, processes])
        self.process = subprocess.Popen(
            [sys.executable, "-c", LAUNCH, question],
            stdout=subprocess.PIPE,
            text=True,
            cwd=REPOSITORY,
            env={**os.environ, "TMPDIR": str(folder / "tmp"), "OMP_NUM_THREADS": "1", **(environment or {})},
        )

    def end(self) -> "Launch":
        told, _ = self.process.communicate(timeout=90)
        assert self.process.returncode == 0
        self.value, self.cause, self.message, self.traceback, left = json.loads(told)
        assert left == [], "processes were left"
        assert self.left_in_tmp() == []
        return self

    def left_in_tmp(self) -> list[str]:
        return [path.name for path in (self.folder / "tmp").glob("*/*") if path.name != "lock"]

    @property
    def output(self) -> str:
        return (self.folder / "output").read_text()

    def pids(self) -> list[int]:
        return [int(path.name.split("-")[2]) for path in self.folder.glob("here-*-*")]


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except FileNotFoundError:
        return True


def test_ranks_meet_whatever_launcher_is_around_and_the_outcome_is_that_of_rank_0(tmp_path: Path) -> None:
    outer = {"RANK": "3", "WORLD_SIZE": "8", "MASTER_ADDR": "n1", "MASTER_PORT": "1", "PET_NNODES": "4", "PET_RDZV_ENDPOINT": "n1:1"}
    done = Launch(tmp_path, "meeting", environment=outer).end()
    assert done.cause is None, done.output
    assert done.value == {"metrics": {"sum": 11.0, "ranks": 2}, "notes": [], "details": {}}
    assert {f"rank {rank} of {tmp_path}" for rank in (0, 1)} <= set(done.output.splitlines())


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_two_launches_at_once_do_not_meet_each_other(tmp_path: Path, launcher: str) -> None:
    folders = [tmp_path / name for name in "ab"]
    for folder in folders:
        folder.mkdir()
    both = [Launch(folder, "meeting", launcher) for folder in folders]
    for done in both:
        assert done.end().value["metrics"] == {"sum": 11.0, "ranks": 2}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_one_process_is_a_rank_too(tmp_path: Path, launcher: str) -> None:
    done = Launch(tmp_path, "meeting", launcher, processes=1).end()
    assert done.value["metrics"] == {"sum": 1.0, "ranks": 1}, done.output


def test_accelerate_starts_as_many_as_asked_for_and_not_what_the_users_own_file_says(tmp_path: Path) -> None:
    (tmp_path / "hf" / "accelerate").mkdir(parents=True)
    own = {"compute_environment": "LOCAL_MACHINE", "distributed_type": "DEEPSPEED", "num_machines": 3, "num_processes": 24}
    own |= {"machine_rank": 2, "main_process_ip": "n1", "main_process_port": 1, "mixed_precision": "fp8", "use_cpu": False, "debug": True}
    for name in ("default_config.yaml", "default_config.json"):
        (tmp_path / "hf" / "accelerate" / name).write_text(json.dumps(own))
    environment = {"HF_HOME": str(tmp_path / "hf"), "ACCELERATE_USE_DEEPSPEED": "true", "NODE_RANK": "2", "MASTER_PORT": "1"}
    done = Launch(tmp_path, "accelerated", "accelerate", environment).end()
    assert done.cause is None, done.output
    assert done.value["metrics"] == {"sum": 3.0, "ranks": 2, "full": 1}
    seen = [json.loads((tmp_path / f"environment-{rank}").read_text()) for rank in (0, 1)]
    assert seen[0] == seen[1]
    assert seen[0].pop("MASTER_PORT") != "1"
    assert set(seen[0].values()) == {None}


@pytest.mark.parametrize(
    ("how", "cause", "message"),
    [
        ("raise ValueError('no\\nway')", "exception", "ValueError: no way"),
        pytest.param("os.kill(os.getpid(), 9)", "signal", "the evaluation was ended by signal SIGKILL", marks=pytest.mark.slow),
        pytest.param("sys.exit(3)", "exit", "the evaluator called sys.exit(3)", marks=pytest.mark.slow),
    ],
)
def test_a_rank_that_ends_badly_ends_the_others_and_is_named_with_its_reason(tmp_path: Path, how: str, cause: str, message: str) -> None:
    done = Launch(tmp_path, "second_ends", how=how).end()
    assert (done.cause, done.message) == (cause, f"rank 1 of 2: {message}")
    assert (done.traceback is None) is (cause == "signal")
    assert all(is_gone(pid) for pid in done.pids())


@pytest.mark.slow
def test_a_peer_that_misses_a_rank_is_not_the_reason(tmp_path: Path) -> None:
    done = Launch(tmp_path, "follows").end()
    assert done.message == "rank 0 of 2: the evaluation ended its process with code 7 before it returned"


def test_whoever_is_killed_above_them_no_rank_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    running = Launch(tmp_path, "second_ends", how="")
    pids = until(lambda: len(running.pids()) == 2 and running.pids())
    running.process.send_signal(signal.SIGKILL)
    running.process.communicate()
    until(lambda: all(is_gone(pid) for pid in pids))
    (left,) = running.left_in_tmp()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    with private_folder("ranks") as first, private_folder("ranks") as second:
        assert sorted(running.left_in_tmp()) == sorted([first.name, second.name]), f"{left} is removed by the next launch"
    assert running.left_in_tmp() == []


def test_ranks_that_were_killed_at_different_points_go_on_from_the_one_that_all_have(tmp_path: Path) -> None:
    killed = Launch(tmp_path, "counted").end()
    assert killed.message.endswith("the evaluation was ended by signal SIGKILL")
    done = Launch(tmp_path, "counted").end()
    assert done.cause is None, done.output
    assert done.value["metrics"] == {"items": 10, "sum": 45}
    taken_up = [(tmp_path / f"first-{rank}").read_text() for rank in (0, 1)]
    assert taken_up == ["2", "2"], "rank 0 had saved six items, rank 1 two"


def test_a_launcher_that_is_not_installed_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "find_spec", lambda name: None)
    with pytest.raises(EvaluatorError, match=r"--launcher accelerate needs accelerate, .* pip install 'assayer\[accelerate\]'"):
        ranks.refuse_missing("accelerate")


@pytest.mark.slow
def test_a_watch_with_a_launcher_has_one_record_of_all_ranks(house: House) -> None:
    evaluators = house.file("evaluators.py", EVALUATORS)
    house.save("model_step1.pt")
    several = ["--launcher", "torchrun", "--gpus_per_eval", 2, "--retries", 0]
    house.once(*several, evaluator=f"{evaluators}:meeting")
    written = house.record("model_step1.pt", "meeting")
    assert written is not None and written["metrics"] == {"sum": 11.0, "ranks": 2}
    house.once(*several, "-E", "how=raise ValueError('no')", check=False, evaluator=f"failing={evaluators}:second_fails")
    failed = house.record("model_step1.pt", "failing")
    assert failed is not None and failed["error"]["message"] == "rank 1 of 2: ValueError: no"
    assert "ValueError: no" in failed["error"]["traceback"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_worker_that_is_ended_takes_its_ranks_along_and_they_are_started_anew(house: House, number: int) -> None:
    evaluators = house.file("evaluators.py", EVALUATORS)
    house.save("model_step1.pt")
    house.watch(
        *("--launcher", "torchrun", "--gpus_per_eval", 2, "--eval_existing", "-E", f"here={house.root}"), evaluator=f"{evaluators}:waits"
    )

    def ranks_here() -> list[int]:
        return [int(path.name.split("-")[2]) for path in house.root.glob("here-*-*")]

    first = until(lambda: len(ranks_here()) == 2 and ranks_here())
    (worker,) = house.workers("eval")
    os.kill(worker, number)
    until(lambda: all(is_gone(pid) for pid in first))
    (house.root / "go").touch()
    until(lambda: house.record("model_step1.pt", "waits"))
    assert len(ranks_here()) == 4
