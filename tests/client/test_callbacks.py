"""Evaluations inside real trainings: points stand on the training's own curves, at their checkpoints' steps."""

import copy
import importlib.util
import logging
import math
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import until
from protocol_server import EvaluationServer

from assayer.client import AsyncEvaluation
from assayer.client.callback import attach_to_trainer, from_trainer_args, lightning_callback, step_end, train_end
from assayer.client.courier import Patience
from assayer.errors import UsageError
from assayer.protocol import JobStatus

has_tensorboard = importlib.util.find_spec("tensorboard") is not None
needs_tensorboard = pytest.mark.skipif(not has_tensorboard, reason="needs tensorboard")

GOOD = {"t": {"acc,none": 0.5}}

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*is deprecated"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


@pytest.fixture
def server() -> Iterator[EvaluationServer]:
    with EvaluationServer(at_once=GOOD) as server:
        yield server


def config(server: EvaluationServer) -> dict[str, Any]:
    return {"server_url": server.url, "model": "m", "tasks": ["t"], "poll_interval": 0.02}


def evaluation_of(run: Path, server: EvaluationServer, **more: Any) -> AsyncEvaluation:
    return AsyncEvaluation(config(server), run, patience=Patience(first=0.01, most=0.05), **more)


def submitted(server: EvaluationServer) -> list[str]:
    return [Path((job.request.model_args or {})["model"]).name for job in server.jobs.values()]


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows of a folder: each curve with its points."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found: dict[str, list[tuple[int, float]]] = {}
    # A later event file of the run may begin at an earlier step than the one before ended: no restart of the training is in that.
    for file in sorted(folder.rglob("events.out.tfevents.*")):
        events = EventAccumulator(str(file), purge_orphaned_data=False).Reload()
        for name in events.Tags()["scalars"]:
            found.setdefault(name, []).extend((event.step, event.value) for event in events.Scalars(name))
    return {name: sorted(points) for name, points in found.items()}


class Line(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.line = torch.nn.Linear(2, 1)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        out = self.line(x)
        return {"loss": ((out - labels) ** 2).mean(), "logits": out}


def transformers_trainer(run: Path, **arguments: Any) -> Any:
    import transformers

    data = [{"x": torch.rand(2), "labels": torch.rand(1)} for _ in range(16)]
    given: dict[str, Any] = {"max_steps": 10, "save_steps": 2, "logging_steps": 1, "report_to": [], **arguments}
    args = transformers.TrainingArguments(
        str(run), use_cpu=True, per_device_train_batch_size=4, disable_tqdm=True, save_total_limit=2, **given
    )
    return transformers.Trainer(model=Line(), args=args, train_dataset=data)


def logged(trainer: Any) -> list[tuple[int, str, float]]:
    """Checkpoint's step, name and value of all evaluations in the trainer's own history."""
    entries = [entry for entry in trainer.state.log_history if "global_step" in entry]
    return sorted((e["global_step"], name, value) for e in entries for name, value in e.items() if name.startswith("eval"))


@needs_tensorboard
def test_points_stand_in_the_trainers_own_tensorboard_run(tmp_path: Path, server: EvaluationServer) -> None:
    trainer = transformers_trainer(tmp_path, report_to=["tensorboard"])
    attach_to_trainer(trainer, evaluation_of(tmp_path, server, weights=("regular", "ema")), finish_timeout=30)
    trainer.train()
    found = scalars(tmp_path / "runs")
    assert found["eval/t/acc"] == [(step, 0.5) for step in (2, 4, 6, 8, 10)]
    assert found["eval_ema/t/acc"] == found["eval/t/acc"]
    assert [step for step, _ in found["train/loss"]] == list(range(1, 11))


@pytest.mark.parametrize(
    ("more", "arguments", "steps"),
    [
        pytest.param({}, {}, [2, 4, 6, 8, 10], marks=pytest.mark.slow),
        ({"eval_strategy": "steps", "eval_steps": 4}, {}, [4, 8]),
        # Four steps an epoch; the last epoch is half done.
        ({"eval_strategy": "epoch"}, {"save_strategy": "epoch"}, [4, 8]),
        pytest.param({"eval_strategy": "epoch"}, {"save_steps": 3}, [6, 9], marks=pytest.mark.slow),
        pytest.param({"eval_strategy": "no"}, {}, [], marks=pytest.mark.slow),
    ],
)
def test_the_trainers_checkpoints_are_evaluated_as_the_strategy_says(
    tmp_path: Path, server: EvaluationServer, more: dict[str, Any], arguments: dict[str, Any], steps: list[int]
) -> None:
    trainer = transformers_trainer(tmp_path, **arguments)
    attach_to_trainer(trainer, evaluation_of(tmp_path, server), finish_timeout=30, **more)
    trainer.train()
    assert logged(trainer) == [(step, "eval/t/acc", 0.5) for step in steps]


def test_a_trainer_that_is_resumed_goes_on_collecting(tmp_path: Path, server: EvaluationServer, caplog: pytest.LogCaptureFixture) -> None:
    server.at_once = None
    first = transformers_trainer(tmp_path, max_steps=4)
    attach_to_trainer(first, evaluation_of(tmp_path, server), finish_timeout=0.2)
    with caplog.at_level(logging.WARNING):
        first.train()
    assert logged(first) == []
    assert "2 evaluations are still out" in caplog.text

    server.end(JobStatus.COMPLETED, GOOD)
    server.at_once = {"t": {"acc,none": 0.75}}
    second = transformers_trainer(tmp_path, max_steps=6)
    attach_to_trainer(second, evaluation_of(tmp_path, server), finish_timeout=30)
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert logged(second) == [(2, "eval/t/acc", 0.5), (4, "eval/t/acc", 0.5), (6, "eval/t/acc", 0.75)]


def test_a_logger_that_fails_does_not_end_the_training(tmp_path: Path, server: EvaluationServer, caplog: pytest.LogCaptureFixture) -> None:
    from transformers import TrainerCallback

    class Failing(TrainerCallback):
        def on_log(self, *_: Any, logs: dict[str, float] | None = None, **__: Any) -> None:
            if "eval/t/acc" in (logs or {}):
                raise OSError("the tracker is away")

    trainer = transformers_trainer(tmp_path, max_steps=2)
    trainer.add_callback(Failing())
    attach_to_trainer(trainer, evaluation_of(tmp_path, server), finish_timeout=30)
    trainer.train()
    assert trainer.state.global_step == 2
    # The numbers stand in the log at least.
    assert "Failing could not log {'eval/t/acc': 0.5, 'global_step': 2}" in caplog.text


def test_a_training_is_as_fast_without_a_server(tmp_path: Path, server: EvaluationServer) -> None:
    # Not a time: not one request was answered, and the training is over.
    server.hang.set()
    trainer = transformers_trainer(tmp_path)
    attach_to_trainer(trainer, evaluation_of(tmp_path, server), finish_timeout=0.1)
    trainer.train()
    assert trainer.state.global_step == 10
    assert len(server.jobs) <= 1
    server.let_go.set()


def lightning_fit(run: Path, callbacks: Callable[[], list[Any]], logger: Any, epochs: int = 3, **more: Any) -> Any:
    import lightning.pytorch as pl

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.line = torch.nn.Linear(2, 1)

        def training_step(self, batch: torch.Tensor, _: int) -> torch.Tensor:
            loss: torch.Tensor = self.line(batch).pow(2).mean()
            self.log("train_loss", loss)
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    data: Any = torch.utils.data.DataLoader(torch.rand(16, 2), batch_size=4)  # type: ignore[arg-type]
    trainer = pl.Trainer(
        default_root_dir=run,
        max_epochs=epochs,
        accelerator="cpu",
        logger=logger,
        log_every_n_steps=1,
        callbacks=callbacks(),
        enable_progress_bar=False,
        enable_model_summary=False,
        **more,
    )
    trainer.fit(Module(), data)
    return trainer


class Kept:
    """What a Lightning logger was given."""

    def __new__(cls) -> Any:
        from lightning.pytorch.loggers import CSVLogger

        class Logger(CSVLogger):
            def __init__(self, folder: str) -> None:
                super().__init__(folder)
                self.kept: list[tuple[int | None, dict[str, float]]] = []

            def log_metrics(self, metrics: Any, step: int | None = None) -> None:
                self.kept.append((step, dict(metrics)))

        return Logger


def evaluated(logger: Any) -> list[tuple[int, float]]:
    return sorted((step, metrics["eval/t/acc"]) for step, metrics in logger.kept if "eval/t/acc" in metrics)


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


def name(step: int) -> str:
    """As Lightning calls the checkpoint of a step, with four steps an epoch."""
    return f"epoch={(step - 1) // 4}-step={step}.ckpt"


@pytest.mark.parametrize(
    ("saving", "more", "names"),
    [
        slow({"every_n_train_steps": 2, "save_top_k": -1}, {}, [name(step) for step in (2, 4, 6, 8, 10, 12)]),
        # last.ckpt is written beside each, and overwritten by the next.
        ({"every_n_train_steps": 4, "save_top_k": -1, "save_last": True}, {}, [name(4), name(8), name(12)]),
        ({"every_n_train_steps": 2, "save_top_k": -1}, {"eval_strategy": "steps", "eval_steps": 5}, [name(6), name(10)]),
        ({"every_n_epochs": 1, "save_top_k": -1}, {"eval_strategy": "epoch"}, [name(4), name(8), name(12)]),
        slow({"every_n_train_steps": 3, "save_top_k": -1}, {"eval_strategy": "epoch"}, [name(6), name(9), name(12)]),
        slow({"save_top_k": 0, "save_last": True}, {}, ["last.ckpt"]),
        slow({"save_top_k": 1}, {"eval_strategy": "no"}, []),
    ],
)  # fmt: skip
def test_what_lightning_saves_is_evaluated_as_the_strategy_says(
    tmp_path: Path, server: EvaluationServer, saving: dict[str, Any], more: dict[str, Any], names: list[str]
) -> None:
    from lightning.pytorch.callbacks import ModelCheckpoint

    logger = Kept()(str(tmp_path))
    evaluation = evaluation_of(tmp_path, server)
    lightning_fit(
        tmp_path, lambda: [lightning_callback(evaluation, finish_timeout=30, **more), ModelCheckpoint(tmp_path, **saving)], logger
    )
    assert submitted(server)[: len(names)] == names
    steps = [int(name.split("=")[-1].removesuffix(".ckpt")) for name in names if "=" in name] or [12] * len(names)
    assert evaluated(logger) == [(step, 0.5) for step in steps]


@needs_tensorboard
def test_points_stand_in_lightnings_own_tensorboard_run(tmp_path: Path, server: EvaluationServer) -> None:
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.loggers import TensorBoardLogger

    saving: dict[str, Any] = {"every_n_train_steps": 4, "save_top_k": 2, "monitor": "train_loss"}
    lightning_fit(
        tmp_path,
        lambda: [lightning_callback(evaluation_of(tmp_path, server), finish_timeout=30), ModelCheckpoint(tmp_path, **saving)],
        TensorBoardLogger(str(tmp_path), "logs"),
    )
    found = scalars(tmp_path / "logs")
    assert found["eval/t/acc"][0] == (4, 0.5)
    assert len(found["train_loss"]) == 12


def test_nothing_is_kept_where_all_of_the_output_directory_is_uploaded(
    tmp_path: Path, server: EvaluationServer, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = transformers_trainer(tmp_path, max_steps=2)
    trainer.args.push_to_hub = True
    evaluation = evaluation_of(tmp_path, server)
    attach_to_trainer(trainer, evaluation, finish_timeout=30)
    trainer.args.push_to_hub = False
    assert "push_to_hub uploads all of" in caplog.text
    trainer.train()
    (job,) = server.jobs.values()
    assert job.request.model_args == {"model": str(tmp_path / "checkpoint-2")}


def test_a_second_training_with_the_same_callback_is_evaluated_too(tmp_path: Path, server: EvaluationServer) -> None:
    trainer = transformers_trainer(tmp_path, max_steps=2)
    attach_to_trainer(trainer, evaluation_of(tmp_path, server), finish_timeout=30)
    trainer.train()
    # Saved anew: the second training is another one.
    (tmp_path / "checkpoint-2").rename(tmp_path / "away-2")
    trainer.train()
    assert len(server.jobs) == 2
    assert [step for step, _, _ in logged(trainer)] == [2]


def test_epochs_of_data_without_a_length_are_counted(tmp_path: Path, server: EvaluationServer) -> None:
    class Endless(torch.utils.data.IterableDataset[dict[str, torch.Tensor]]):
        def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
            return iter([{"x": torch.rand(2), "labels": torch.rand(1)} for _ in range(16)])

    trainer = transformers_trainer(tmp_path, max_steps=12, save_strategy="epoch")
    trainer.train_dataset = Endless()
    attach_to_trainer(trainer, evaluation_of(tmp_path, server), finish_timeout=30, eval_strategy="epoch")
    trainer.train()
    assert [step for step, _, _ in logged(trainer)] == [4, 8, 12]


def test_a_logger_that_fails_keeps_no_point_from_the_next(tmp_path: Path, server: EvaluationServer) -> None:
    from transformers import TrainerCallback

    seen: list[dict[str, float]] = []

    class Failing(TrainerCallback):
        def on_log(self, *_: Any, logs: dict[str, float] | None = None, **__: Any) -> None:
            print((logs or {})["loss"] if "train_runtime" not in (logs or {}) else "")

    class Next(TrainerCallback):
        def on_log(self, *_: Any, logs: dict[str, float] | None = None, **__: Any) -> None:
            seen.extend([logs] if logs and "eval/t/acc" in logs else [])

    trainer = transformers_trainer(tmp_path, max_steps=2)
    trainer.add_callback(Failing())
    trainer.add_callback(Next())
    attach_to_trainer(trainer, evaluation_of(tmp_path, server), finish_timeout=30)
    trainer.train()
    assert seen == [{"eval/t/acc": 0.5, "global_step": 2}]


RANKS = """
import sys, datetime, torch.distributed as dist
from assayer.client import callback

rank, run = int(sys.argv[1]), sys.argv[2]
before = callback._patience(None)
dist.init_process_group("gloo", init_method=f"file://{run}/rendezvous", rank=rank, world_size=2, timeout=datetime.timedelta(seconds=50))
print(before, callback._patience(None), callback._patience(7.0))
dist.barrier()
dist.destroy_process_group()
"""


def test_the_end_of_a_distributed_training_waits_no_longer_than_its_other_ranks_can(tmp_path: Path) -> None:
    ranks = [
        subprocess.Popen([sys.executable, "-c", RANKS, str(rank), str(tmp_path)], stdout=subprocess.PIPE, text=True) for rank in range(2)
    ]
    assert [rank.communicate(timeout=100)[0] for rank in ranks] == ["3600.0 25.0 7.0\n"] * 2


def test_two_evaluations_of_one_lightning_training_both_see_what_is_saved(tmp_path: Path, server: EvaluationServer) -> None:
    from lightning.pytorch.callbacks import ModelCheckpoint

    logger = Kept()(str(tmp_path))
    two = [evaluation_of(tmp_path, server, style=style, name=style) for style in ("slash", "lmms_engine")]
    for _ in range(2):
        lightning_fit(
            tmp_path,
            lambda: [*(lightning_callback(one, finish_timeout=30) for one in two), ModelCheckpoint(tmp_path, every_n_train_steps=4)],
            logger,
        )
        names = {name for _, metrics in logger.kept for name in metrics}
        assert {"eval/t/acc", "eval/t_acc"} <= names
        logger.kept.clear()


def test_a_callback_that_trainings_share_serves_each(tmp_path: Path, server: EvaluationServer) -> None:
    from lightning.pytorch.callbacks import ModelCheckpoint

    shared = lightning_callback(evaluation_of(tmp_path, server), finish_timeout=30)
    for fold in range(2):
        logger = Kept()(str(tmp_path / f"logs{fold}"))
        lightning_fit(tmp_path, lambda fold=fold: [shared, ModelCheckpoint(tmp_path / str(fold), every_n_train_steps=12)], logger)  # type: ignore[misc]
        assert evaluated(logger) == [(12, 0.5)]


def test_what_lightning_saves_for_its_tuner_is_no_checkpoint(tmp_path: Path, server: EvaluationServer) -> None:
    from lightning.pytorch.callbacks import LearningRateFinder, ModelCheckpoint

    logger = Kept()(str(tmp_path))
    callback = lightning_callback(evaluation_of(tmp_path, server), finish_timeout=30)
    finder = LearningRateFinder(num_training_steps=3, update_attr=False)
    lightning_fit(tmp_path, lambda: [callback, finder, ModelCheckpoint(tmp_path, every_n_train_steps=12)], logger)
    assert [step for step, _ in evaluated(logger)] == [12]
    assert len(server.jobs) == 1


def test_a_trial_run_takes_no_points(tmp_path: Path, server: EvaluationServer) -> None:
    server.at_once = None
    evaluation = evaluation_of(tmp_path, server)
    path = tmp_path / "m.ckpt"
    path.write_text("weights")
    evaluation.submit(path, 3)
    until(lambda: server.jobs)
    server.end(JobStatus.COMPLETED, GOOD)
    lightning_fit(tmp_path, lambda: [lightning_callback(evaluation, finish_timeout=30)], False, fast_dev_run=2)
    assert [point.step for point in evaluation.finish(30)] == [3]
    evaluation.close()


def test_the_callback_goes_where_processes_are_spawned(tmp_path: Path, server: EvaluationServer) -> None:
    callback = lightning_callback(evaluation_of(tmp_path, server), "steps", 5, 7.0)
    again = pickle.loads(pickle.dumps(callback))
    assert type(again).__name__ == type(callback).__name__
    assert type(copy.deepcopy(callback)) is not None


def test_a_loop_of_ones_own_submits_and_logs_in_one_line(tmp_path: Path, server: EvaluationServer) -> None:
    curve: list[tuple[int, dict[str, Any]]] = []
    evaluation = evaluation_of(tmp_path, server)
    for step in range(1, 7):
        saved = None
        if step % 2 == 0:
            saved = tmp_path / f"step-{step}"
            saved.mkdir()
            (saved / ".metadata").touch()
        step_end(evaluation, lambda metrics, at: curve.append((at, metrics)), checkpoint=saved, step=step)
    train_end(evaluation, lambda metrics, at: curve.append((at, metrics)), finish_timeout=30)
    assert sorted(curve, key=lambda point: point[0]) == [(step, {"eval/t/acc": 0.5, "global_step": step}) for step in (2, 4, 6)]


def test_lmms_engines_trainer_section_is_taken_as_it_is(tmp_path: Path, server: EvaluationServer) -> None:
    section = {
        "eval_strategy": "steps",
        "eval_steps": 500,
        "save_steps": 500,
        "save_total_limit": 2,
        "output_dir": str(tmp_path),
        "ema_enabled": True,
        "eval_config": config(server),
    }
    evaluation, schedule = from_trainer_args(section)
    assert evaluation is not None
    assert schedule == {"eval_strategy": "steps", "eval_steps": 500}
    (tmp_path / "checkpoint-500").mkdir()
    (tmp_path / "checkpoint-500" / "config.json").touch()
    evaluation.submit(tmp_path / "checkpoint-500", 500)
    names = sorted(name for point in evaluation.finish(30) for name in point.metrics)
    assert names == ["eval/t_acc", "eval_ema/t_acc"]
    evaluation.close()

    for none in ({**section, "eval_strategy": "no"}, {**section, "eval_config": None}, {**section, "eval_strategy": None}):
        assert from_trainer_args(none)[0] is None
    with pytest.raises(UsageError, match="output_dir is missing"):
        from_trainer_args({**section, "output_dir": None})


class Run:
    """W&B's run, as far as points are written to it."""

    def __init__(self) -> None:
        self.axes: dict[str, str] = {}
        self.rows: list[dict[str, Any]] = []

    def define_metric(self, name: str, step_metric: str) -> None:
        self.axes[name] = step_metric

    def log(self, row: dict[str, Any]) -> None:
        self.rows.append(row)


def test_points_for_wandb_and_mlflow_carry_their_step(tmp_path: Path, server: EvaluationServer, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    from types import SimpleNamespace

    from transformers import TrainerCallback

    run, points = Run(), list[tuple[dict[str, float], int]]()
    mlflow = SimpleNamespace(active_run=lambda: True, log_metrics=lambda metrics, step: points.append((metrics, step)))
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(run=run))
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    trainer = transformers_trainer(tmp_path, max_steps=2)
    server.at_once = {"t": {"acc,strict-match": 0.5, "acc,a b(c)": 0.25}}
    for name in ("WandbCallback", "MLflowCallback"):
        trainer.add_callback(type(name, (TrainerCallback,), {}))
    attach_to_trainer(trainer, evaluation_of(tmp_path, server), finish_timeout=30)
    trainer.train()
    names = ["eval/t/acc/strict-match", "eval/t/acc/a b(c)"]
    assert run.rows == [{**dict(zip(names, (0.5, 0.25), strict=True)), "global_step": 2}]
    assert run.axes == dict.fromkeys(names, "global_step")
    assert points == [({"eval/t/acc/strict-match": 0.5, "eval/t/acc/a b_c_": 0.25}, 2)]
    assert all(math.isfinite(value) for metrics, _ in points for value in metrics.values())
    until(lambda: not server.hang.is_set())
