"""examples/trainer: what its parts give, and its run, in which rotation deletes what still waits."""

import contextlib
import importlib
import importlib.util
import json
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPOSITORY, House, until

EXAMPLE = REPOSITORY / "examples" / "trainer"

needs_tensorboard = pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="needs tensorboard")


@contextlib.contextmanager
def on_path(*folders: Path) -> Iterator[None]:
    """These folders' modules can be imported, and are forgotten afterwards: other examples have modules of the same names."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [path.stem for folder in folders for path in folder.glob("*.py")]:
            patch.delitem(sys.modules, name, raising=False)
        before = set(sys.modules)
        for folder in folders:
            patch.syspath_prepend(str(folder))
        yield
        for name in set(sys.modules) - before:
            file = getattr(sys.modules[name], "__file__", None)
            if file and Path(file).parent in folders:
                del sys.modules[name]


def parts_of(folder: Path, *names: str) -> list[Any]:
    with on_path(folder):
        return [importlib.import_module(name) for name in names]


def test_the_tasks_texts_are_none_that_the_trainer_sees() -> None:
    (text,) = parts_of(EXAMPLE, "text")
    seen = {tuple(row) for row in text.windows(text.manual(held_out=False)).tolist()}
    for name in ("manual", "code"):
        rows = text.task(name)
        assert rows.shape[1] == text.LENGTH and len(rows) > 100
        assert not seen & {tuple(row) for row in rows.tolist()}
    with pytest.raises(ValueError, match="'mmlu' is not known; there are: manual, code"):
        text.task("mmlu")


def test_a_model_that_knows_nothing_needs_eight_bits_a_byte(tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    evaluator, train = parts_of(EXAMPLE, "eval", "train")
    model = LlamaForCausalLM(train.CONFIG)
    torch.nn.init.zeros_(model.lm_head.weight)
    model.save_pretrained(tmp_path / "held")
    details: dict[str, Any] = {}
    threads = torch.get_num_threads()
    try:
        told = evaluator.score(str(tmp_path / "held"), tasks=["code"], original_path=str(tmp_path / "gone"), details=details)
    finally:
        torch.set_num_threads(threads)
    # The first of equals counts as foretold: byte 0, which no text has.
    assert told == {"code": {"loss": pytest.approx(math.log(256)), "bits_per_byte": pytest.approx(8.0), "accuracy": 0.0}}
    assert details == {"rotated_away": True}


@needs_tensorboard
@pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*is deprecated")
def test_the_evaluations_stand_beside_the_loss_in_one_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train, curves = parts_of(EXAMPLE, "train", "curves")
    threads = torch.get_num_threads()
    with on_path(REPOSITORY / "tests" / "client"):
        server = importlib.import_module("protocol_server").EvaluationServer
    words = ["--output", str(tmp_path / "out"), "--steps", "30", "--save_every", "10"]
    try:
        with server(at_once={"code": {"bits_per_byte,none": 2.5, "loss,none": 1.7}}) as one:
            train.main([*words, "--server", one.url])
            asked = [job.request for job in one.jobs.values()]
    finally:
        torch.set_num_threads(threads)
    assert [(request.model, list(request.tasks)) for request in asked] == [("bytes", ["manual", "code"])] * 3
    found = curves.curves(tmp_path / "out")
    assert found["eval/code/bits_per_byte"] == {10: 2.5, 20: 2.5, 30: 2.5}
    assert list(found["train/loss"]) == [10, 20, 30]
    assert [line.split(" | ")[::2] for line in curves.table(found).splitlines()] == [
        ["| step", "eval/code/bits_per_byte |"],
        ["| ---", "--- |"],
        *([f"| {step}", "2.500 |"] for step in (10, 20, 30)),
    ]

    with pytest.raises(SystemExit):
        train.main(words)
    assert "holds the checkpoints of an earlier run" in capsys.readouterr().err


def commands() -> list[str]:
    """The commands of the README's first block."""
    block = (EXAMPLE / "README.md").read_text().split("```sh\n")[1].split("```")[0]
    return [line.partition("#")[0].strip().removesuffix("&").strip() for line in block.splitlines()]


@needs_tensorboard
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_checkpoints_that_rotation_deleted_are_evaluated_all_the_same(house: House) -> None:
    server, *_ = commands()
    out = house.root / "out"
    words = [*server.removeprefix("python -m assayer.").split(), "--port", "0", "--num_eval_workers", "0"]
    words = [str(out / "done") if word == "examples/trainer/checkpoints/done" else word for word in words]
    with house.running(*words) as serving:
        assert serving.stdout is not None
        url = re.search(r"http://\S+", serving.stdout.readline())
        assert url
        train = [sys.executable, str(EXAMPLE / "train.py"), "--output", str(out), "--server", url[0]]
        train += ["--steps", "160", "--save_every", "40"]
        environment = house.environment | {"PYTHONPATH": str(REPOSITORY)}
        with subprocess.Popen(train, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as training:
            try:
                # Nobody evaluates, until all but two are deleted.
                until(lambda: (out / "checkpoint-160" / "trainer_state.json").exists() and not (out / "checkpoint-80").exists(), 120)
                with house.running("worker", "--num_workers", 1):
                    told, _ = training.communicate(timeout=120)
                assert training.returncode == 0, told
            finally:
                training.kill()
        assert serving.poll() is None
        (out / "done").touch()
        assert serving.wait(30) == 0
        house.command("shutdown")
    records = {r["step"]: r for r in (json.loads(path.read_text()) for path in (out / "evals" / "bytes").glob("*.json"))}
    rotated = {step: r["details"]["rotated_away"] for step, r in sorted(records.items())}
    assert rotated == {40: True, 80: True, 120: False, 160: False}
    (curves,) = parts_of(EXAMPLE, "curves")
    found = curves.curves(out)
    assert list(found["train/loss"]) == list(range(10, 161, 10))
    for name in ("eval/manual/bits_per_byte", "eval/code/bits_per_byte"):
        assert found[name] == {step: pytest.approx(r["metrics"][f"{name.removeprefix('eval/')},none"]) for step, r in records.items()}
    assert found["eval/manual/loss"][160] < found["eval/manual/loss"][40] < math.log(256)
