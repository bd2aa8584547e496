"""One evaluation here and now: any checkpoint, no Redis, nothing beside it, and the same command goes on where it was killed."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from conftest import REPOSITORY, House, until
from safetensors.torch import save_file

from assayer import evaluate, record
from assayer.errors import AssayerError, CheckpointError, UsageError

EVALUATORS = """
import json, os, time
from pathlib import Path

def mean(path, step, original_path, details, limit=None):
    print("printed by the evaluator")
    os.system("echo printed by a program")
    if os.path.isdir(path):
        from safetensors.numpy import load_file
        weights = load_file(os.path.join(path, "model.safetensors"))["w"]
    else:
        import torch
        weights = torch.load(path, weights_only=True)["w"]
    details["name"] = os.path.basename(path)
    return {"mean": float(weights.mean()), "is_raw": path == original_path, "step": -1, "nan": float("nan")}

def files(path, output_dir, samples_path):
    if samples_path:
        Path(samples_path).write_text("{}\\n")
    Path(output_dir, "own").touch()
    return {"has_samples": samples_path is not None}

def hangs(path, here):
    Path(here).write_text(path)
    time.sleep(1000)

def counts(path, here, progress):
    state, first = {"sum": 0.0}, None
    for number in progress.items(range(20), state, every=2):
        with open(here, "a") as seen:
            seen.write(f"{number} ")
        state["sum"] += number / 7
        if number == 9 and not os.path.exists(f"{here}.again"):
            Path(f"{here}.waits").touch()
            time.sleep(1000)
    return state

def fails(path):
    raise RuntimeError("not\\ntoday")

def nothing(path):
    return {}

def exits(path):
    raise SystemExit("enough")

def overwrites(path, original_path):
    import torch
    torch.save({"w": torch.zeros(8)}, original_path)
    return {"a": 1}

def deletes(path, original_path):
    os.unlink(original_path)
    return {"a": 1}

def ranks(path, how):
    rank = int(os.environ["RANK"])
    if rank == 1 and how == "fails":
        raise ValueError("of the second")
    return {"ranks": int(os.environ["WORLD_SIZE"]), "rank": rank}
"""


class Desk:
    """Where somebody gives the command, with a checkpoint of each kind."""

    def __init__(self, house: House) -> None:
        self.house = house
        self.evaluators = house.file("evaluators.py", EVALUATORS)
        self.here = house.root / "here"

    def dcp(self, name: str = "step_7", value: float = 2.0) -> Path:
        path = self.house.runs / name
        with warnings.catch_warnings():
            # It says that there are no other ranks.
            warnings.simplefilter("ignore")
            dcp.save({"model": {"w": torch.full((8,), value)}}, checkpoint_id=path)
        return path

    def hugging_face(self) -> Path:
        path = self.house.runs / "checkpoint-500"
        path.mkdir()
        save_file({"w": torch.full((8,), 3.0)}, path / "model.safetensors", {"format": "pt"})
        (path / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
        (path / "trainer_state.json").write_text('{"global_step": 500, "epoch": 0.5}')
        return path

    def words(self, checkpoint: Path, evaluator: str, *words: object) -> list[object]:
        return ["evaluate", checkpoint, "--evaluator", f"{self.evaluators}:{evaluator}", *words]

    def evaluate(self, checkpoint: Path, evaluator: str, *words: object, **more: Any) -> "subprocess.CompletedProcess[str]":
        done = self.house.command(*self.words(checkpoint, evaluator, *words), check=False, **more)
        assert self.left() == []
        return done

    @contextlib.contextmanager
    def running(self, checkpoint: Path, evaluator: str, *words: object) -> "Iterator[subprocess.Popen[str]]":
        with self.house.running(*self.words(checkpoint, evaluator, "-E", f"here={self.here}", *words), start_new_session=True) as process:
            yield process

    def left(self) -> list[str]:
        """What is left in scratch, and of unfinished state."""
        scratch = [path for path in (self.house.root / "tmp").rglob("*") if path.is_file() and path.name != "lock"]
        return [str(path) for path in [*scratch, *(self.house.state / "progress").glob("*")]]


@pytest.fixture
def desk(house: House) -> Desk:
    return Desk(house)


def last_line(done: "subprocess.CompletedProcess[str]") -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told


def error_of(done: "subprocess.CompletedProcess[str]") -> str:
    assert done.returncode == 1, done.stderr
    assert done.stdout == ""
    line = done.stderr.splitlines()[-1]
    assert line.startswith("assayer: error: ")
    return line.removeprefix("assayer: error: ")


def everything_in(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in [folder, *folder.rglob("*")]}


def test_a_sharded_checkpoint_is_merged_and_the_last_line_is_json(desk: Desk) -> None:
    checkpoint = desk.dcp()
    (checkpoint / "train_state.pt").touch()
    torch.save({"step": 7}, checkpoint / "train_state.pt")
    (checkpoint / "metadata.json").write_text('{"step": 7, "tokens_seen": 4096}')
    before = everything_in(desk.house.runs)
    # As the console script.
    script = Path(sys.executable).parent / "assayer"
    environment = {**desk.house.environment, "PYTHONPATH": str(REPOSITORY)}
    words = [str(script), *map(str, desk.words(checkpoint, "mean", "-E", "limit=3"))]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=60)
    told = last_line(done)
    assert told == {"step": 7, "tokens_seen": 4096, "mean": 2.0, "is_raw": 0, "nan": None}
    assert "printed" not in done.stdout
    assert "printed by the evaluator\nprinted by a program\n" in done.stderr
    assert "nan is nan" in done.stderr
    assert [line.split() for line in done.stdout.splitlines() if line.startswith("mean")] == [["mean", "2"]]
    assert everything_in(desk.house.runs) == before
    assert desk.left() == []
    assert sorted(os.listdir(desk.house.state)) == ["progress"], "no Redis, no plan, no worker"


def test_what_is_whole_as_it_lies_there_is_handed_over_so(desk: Desk) -> None:
    told = last_line(desk.evaluate(desk.hugging_face(), "mean"))
    assert told == {"step": 500, "mean": 3.0, "is_raw": 1, "nan": None}
    single = desk.house.save("model_step3.pt", 5.0)
    (desk.house.runs / "latest.pt").symlink_to(single)
    assert last_line(desk.evaluate(desk.house.runs / "latest.pt", "mean", "--merge", "never"))["step"] == 3


def refused(desk: Desk, kind: type[AssayerError], *words: object, evaluator: str = "mean") -> str:
    """What the command says before it has begun: nothing of an evaluator is imported by then."""
    with pytest.raises(kind) as caught:
        evaluate.main.main(
            [*map(str, words), "--evaluator", f"{desk.evaluators}:{evaluator}"], prog_name="assayer evaluate", standalone_mode=False
        )
    assert caught.value.exit_code == (1 if kind is CheckpointError else 2)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_no_whole_checkpoint_is_an_error(desk: Desk) -> None:
    runs = desk.house.runs
    assert "No such file or directory" in error_of(desk.evaluate(runs / "none", "mean"))
    (desk.dcp("step_1") / ".metadata").unlink()
    assert "step_1 is not whole: no .metadata yet" in refused(desk, CheckpointError, runs / "step_1")
    cut = desk.house.save("model_step2.pt")
    os.truncate(cut, cut.stat().st_size - 100)
    assert "model_step2.pt is not whole: " in refused(desk, CheckpointError, cut)
    desk.dcp("step_9")
    assert "the newest whole one in it is step_9" in refused(desk, CheckpointError, runs)
    (runs / "notes.txt").write_text("x")
    assert "notes.txt is no checkpoint of a known format" in refused(desk, CheckpointError, runs / "notes.txt")
    assert "step_9 holds no ema weights; give --weights regular" in refused(desk, CheckpointError, runs / "step_9", "--weights", "ema")


def test_words_that_cannot_be_carried_out_are_refused_before_anything_is_done(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = desk.dcp()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "--processes 2 needs --launcher torchrun or accelerate" in refused(desk, UsageError, checkpoint, "--processes", 2)
    assert "give the number of processes" in refused(desk, UsageError, checkpoint, "--launcher", "torchrun")
    assert "none is no directory" in refused(desk, UsageError, checkpoint, "--scratch_dir", desk.house.root / "none")
    assert "is a directory; give a file" in refused(desk, UsageError, checkpoint, "--output", desk.house.runs)
    assert "is no directory that this user may write in" in refused(desk, UsageError, checkpoint, "--output", desk.house.runs / "a" / "b")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert "1 GPU is visible" in refused(desk, UsageError, checkpoint, "--launcher", "torchrun", "--processes", 2)


def test_an_evaluation_that_ends_badly_is_one_line_and_writes_no_record(desk: Desk) -> None:
    checkpoint = desk.house.save("model_step3.pt")
    out = desk.house.root / "out.json"
    assert error_of(desk.evaluate(checkpoint, "fails", "--output", out)) == "fails on model_step3.pt: RuntimeError: not today"
    assert "the evaluator called sys.exit('enough')" in error_of(desk.evaluate(checkpoint, "exits", "--output", out))
    assert "returned an empty mapping" in error_of(desk.evaluate(checkpoint, "nothing", "--output", out))
    assert "changed while they were evaluated" in error_of(desk.evaluate(checkpoint, "overwrites", "--output", out))
    assert not out.exists()
    assert last_line(desk.evaluate(checkpoint, "deletes")) == {"step": 3, "a": 1}


def test_the_output_is_a_record_as_the_queue_writes_it(desk: Desk) -> None:
    checkpoint = desk.dcp()
    out = desk.house.root / "out.json"
    last_line(desk.evaluate(checkpoint, "mean", "--output", "out.json", cwd=desk.house.root, env={"PYTHONPATH": str(REPOSITORY)}))
    written = record.read(out)
    assert written is not None
    assert (written.status, written.metrics["mean"], written.checkpoint, written.step) == ("finished", 2.0, str(checkpoint), 7)
    assert written.evaluator["reference"] == f"{desk.evaluators}:mean"
    assert written.merged is not None and written.merged["from"] == "dcp"
    assert set(written.seconds) == {"merge", "evaluate"}
    assert written.details == {"name": "step_7"}
    assert "nan is nan" in written.notes


def test_an_evaluators_own_files_lie_beside_the_output_or_nowhere(desk: Desk) -> None:
    checkpoint = desk.house.save("model_step3.pt")
    assert last_line(desk.evaluate(checkpoint, "files"))["has_samples"] == 0
    assert last_line(desk.evaluate(checkpoint, "files", "--output", desk.house.root / "out.json"))["has_samples"] == 1
    assert (desk.house.root / "out.samples.jsonl").exists()
    assert (desk.house.root / "out.files" / "own").exists()
    assert os.listdir(desk.house.runs) == ["model_step3.pt"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_whoever_breaks_it_off_nothing_stays(desk: Desk, number: int, code: int) -> None:
    with desk.running(desk.dcp(), "hangs") as process:
        merged = until(lambda: desk.here.exists() and desk.here.read_text())
        assert Path(merged, "model.safetensors").exists()
        # As a terminal does it: every process of the foreground gets it.
        os.killpg(process.pid, number)
        said, _ = process.communicate(timeout=30)
    assert (process.returncode, desk.left()) == (code, [])
    assert "Traceback" not in said
    assert desk.house.processes() == {}


def test_the_same_command_goes_on_where_it_was_killed_and_clears_up_behind_it(desk: Desk) -> None:
    checkpoint = desk.dcp()
    with desk.running(checkpoint, "counts") as process:
        until(Path(f"{desk.here}.waits").exists)
        process.kill()
    until(lambda: desk.house.processes() == {})
    assert any("model.safetensors" in path for path in desk.left()), "kill -9 leaves what the next command removes"
    Path(f"{desk.here}.again").touch()
    done = desk.evaluate(checkpoint, "counts", "-E", f"here={desk.here}")
    assert last_line(done)["sum"] == sum(number / 7 for number in range(20))
    seen = [int(word) for word in desk.here.read_text().split()]
    assert seen == [*range(10), *range(8, 20)], "eight of ten were saved"
    assert "goes on from point 4" in done.stderr


def test_the_same_command_twice_at_once_is_refused(desk: Desk) -> None:
    checkpoint = desk.house.save("model_step3.pt")
    with desk.running(checkpoint, "hangs") as process:
        until(desk.here.exists)
        second = desk.house.command(*desk.words(checkpoint, "hangs", "-E", f"here={desk.here}"), check=False)
        assert "this very evaluation runs already" in error_of(second)
        assert process.poll() is None


def test_what_was_never_taken_up_again_is_forgotten(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = desk.house.state / "progress"
    (folder / "old").mkdir(parents=True)
    (folder / "young").mkdir()
    os.utime(folder / "old", (1.0, 1.0))
    last = desk.house.command(*desk.words(desk.house.save("model_step3.pt"), "files"))
    assert last.returncode == 0
    assert os.listdir(folder) == ["young"]


def test_several_processes_give_one_outcome(desk: Desk) -> None:
    checkpoint = desk.house.save("model_step3.pt")
    several = ["--launcher", "torchrun", "--processes", 2]
    outer = {"RANK": "5", "WORLD_SIZE": "8", "MASTER_PORT": "1"}
    told = last_line(desk.evaluate(checkpoint, "ranks", "-E", "how=well", *several, env=outer))
    assert told == {"step": 3, "ranks": 2, "rank": 0}


@pytest.mark.slow
def test_a_rank_that_fails_is_the_error(desk: Desk) -> None:
    checkpoint = desk.house.save("model_step3.pt")
    several = ["--launcher", "torchrun", "--processes", 2]
    done = desk.evaluate(checkpoint, "ranks", "-E", "how=fails", *several)
    assert error_of(done) == "ranks on model_step3.pt: rank 1 of 2: ValueError: of the second"
