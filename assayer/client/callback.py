"""Asynchronous evaluation in the trainers' own hooks: transformers' Trainer, Lightning, and loops that one writes oneself.

::

    evaluation = AsyncEvaluation(eval_config, output_dir=args.output_dir)

    attach_to_trainer(trainer, evaluation, eval_strategy="steps", eval_steps=500)         # transformers
    Trainer(callbacks=[lightning_callback(evaluation, eval_strategy="epoch")])            # Lightning
    step_end(evaluation, log, checkpoint=path, step=step)                                 # any loop; at its end train_end(evaluation, log)

Points are written by the trainer's own logger into the training's own run, at the checkpoint's step: TensorBoard and MLflow get it as the
step, W&B as the field ``global_step`` (Lightning: ``trainer/global_step``), since its own step cannot go back. At the end of training, what
is out is waited for by the first rank alone, at most ``finish_timeout`` seconds: by default an hour, or, where other ranks may wait for it
in a collective operation, half of the process group's own time-out. This module imports neither library; each function imports the one it
needs.
"""

import copy
import importlib
import logging
import os
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from assayer.client.asynchronous import AsyncEvaluation
from assayer.client.mailbox import Point
from assayer.client.schedule import Schedule
from assayer.errors import UsageError

__all__ = ["FINISH_TIMEOUT", "Log", "attach_to_trainer", "from_trainer_args", "lightning_callback", "step_end", "train_end"]

logger = logging.getLogger(__name__)

# Seconds for which the end of a training waits for what is out, and the time-out of a process group that does not tell its own.
FINISH_TIMEOUT = 3600.0
GROUP_TIMEOUT = 1800.0

# What a loop's logger is called with: the metrics with ``global_step``, and the checkpoint's step.
Log = Callable[[dict[str, Any], int], object]


def step_end(evaluation: AsyncEvaluation, log: Log, checkpoint: str | os.PathLike[str] | None = None, step: int = 0) -> None:
    """For the end of each step of a loop such as torchtitan's: submits what was just saved, and logs what has come. Returns at once.

    Args:
        log: called for each evaluation with its metrics (``global_step`` among them) and the checkpoint's step, such as the ``log`` of
            torchtitan's loggers. W&B drops points of an earlier step than its last: there, ``lambda metrics, step: wandb.log(metrics)``.
        checkpoint: the path just saved; None: nothing was saved.
        step: the step of that checkpoint.
    """
    if checkpoint is not None:
        evaluation.submit(checkpoint, step)
    _log_all(evaluation.poll(), log)


def train_end(evaluation: AsyncEvaluation, log: Log, finish_timeout: float | None = None) -> None:
    """For the end of a loop: waits for what is out, at most so many seconds (default: see above), and logs it."""
    _log_all(evaluation.finish(_patience(finish_timeout)), log)
    evaluation.close()


def _patience(finish_timeout: float | None) -> float:
    """How long the end of this training may wait: other ranks may stand in a collective operation meanwhile, which has a time-out."""
    if finish_timeout is not None:
        return finish_timeout
    distributed: Any = getattr(sys.modules.get("torch"), "distributed", None)
    is_group = distributed is not None and distributed.is_available() and distributed.is_initialized()
    if not is_group or distributed.get_world_size() == 1:
        return FINISH_TIMEOUT
    found = [GROUP_TIMEOUT]
    try:
        # torch has no public question for it.
        group = distributed.distributed_c10d._get_default_group()
        found = [group._get_backend(device).options._timeout.total_seconds() for device in group._device_types] or found
    except (AttributeError, RuntimeError, TypeError):
        logger.debug("the process group does not tell its time-out")
    return min(FINISH_TIMEOUT, *(seconds / 2 for seconds in found))


def _log_all(points: list[Point], log: Log) -> None:
    """Every point, also where the logger fails over one: an evaluation is no reason for a training to end."""
    for point in points:
        try:
            log(point.fields(), point.step)
        except Exception:
            logger.exception("the metrics of %s could not be logged: %s", point.checkpoint, point.metrics)


def from_trainer_args(trainer_args: Mapping[str, Any], **more: Any) -> tuple[AsyncEvaluation | None, dict[str, Any]]:
    """What LMMs-Engine's ``trainer_args`` ask for: the evaluation, and the ``eval_strategy`` and ``eval_steps`` for a callback.

    Where they ask for none (no ``eval_config``; ``eval_strategy`` is not given, or ``no``), it is None. With ``ema_enabled``, both weights
    are evaluated. Names are LMMs-Engine's, unless ``style`` is given.

    Args:
        trainer_args: the section of the YAML.
        more: further arguments of AsyncEvaluation.
    """
    schedule: dict[str, Any] = {"eval_strategy": trainer_args.get("eval_strategy") or "no", "eval_steps": trainer_args.get("eval_steps")}
    config = trainer_args.get("eval_config")
    if config is None or Schedule(**schedule).strategy == "no":
        return None, schedule
    if not trainer_args.get("output_dir"):
        raise UsageError("trainer_args: output_dir is missing; it is where the checkpoints are saved")
    weights = ("regular", "ema") if trainer_args.get("ema_enabled") else ("regular",)
    return AsyncEvaluation(config, trainer_args["output_dir"], **{"weights": weights, "style": "lmms_engine", **more}), schedule


def attach_to_trainer(
    trainer: Any,
    evaluation: AsyncEvaluation,
    eval_strategy: str | None = None,
    eval_steps: int | None = None,
    finish_timeout: float | None = None,
) -> Any:
    """Adds the callback to a transformers ``Trainer``, and returns it.

    It stands first in the trainer's list, so that the last points are written before TensorBoard's and MLflow's own callbacks close their
    writers. A trainer with ``push_to_hub`` would upload what is kept from rotation: there, nothing is kept.

    Args:
        eval_strategy, eval_steps: which checkpoints are evaluated (see ``Schedule``); default: all that are saved.
        finish_timeout: seconds for which the end of training waits; default: see above.
    """
    from transformers import TrainerCallback
    from transformers.trainer_utils import has_length

    schedule = Schedule(eval_strategy, eval_steps)
    if trainer.args.push_to_hub and evaluation.hold:
        logger.warning("push_to_hub uploads all of %s, what is kept there, too: nothing is kept from rotation", trainer.args.output_dir)
        evaluation.hold = 0

    class Evaluation(TrainerCallback):
        """Submits what was saved, logs what came."""

        submitted: tuple[str, int] | None = None
        epochs = 0

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.submitted, self.epochs = None, int(state.epoch or 0)
            schedule.begin(state.global_step, state.epoch)

        def on_epoch_end(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **_: Any) -> None:
            # Before what is saved at the epoch's end; where a data set has no length, the trainer's own count is no count of epochs.
            self.epochs += not has_length(train_dataloader)

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            path = os.path.join(args.output_dir, f"checkpoint-{state.global_step}")
            # The end of an epoch saves the step once more that was saved a moment ago.
            is_new = self.submitted != (path, state.global_step)
            if state.is_world_process_zero and is_new and schedule.takes(state.global_step, max(state.epoch or 0, self.epochs)):
                self.submitted = (path, state.global_step)
                evaluation.submit(path, state.global_step, is_saved=True)
            self.write(evaluation.poll)

        def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.write(evaluation.poll)

        def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.write(lambda: evaluation.finish(_patience(finish_timeout)))
            evaluation.close()

        def write(self, take: Callable[[], list[Point]]) -> None:
            if trainer.state.is_world_process_zero:
                _log_all(take(), lambda fields, step: _log_in_trainer(trainer, self, fields, step))

    callback = Evaluation()
    trainer.callback_handler.callbacks.insert(0, callback)
    return callback


def _log_in_trainer(trainer: Any, own: Any, fields: dict[str, Any], step: int) -> None:
    """What ``Trainer.log`` does, but at the checkpoint's step, and without ``train/`` before names that it does not know."""
    metrics = {name: value for name, value in fields.items() if name != "global_step"}
    trainer.state.log_history.append({**fields, "step": trainer.state.global_step})
    then = copy.copy(trainer.state)
    then.global_step = step
    for callback in trainer.callback_handler.callbacks:
        write = _WRITERS.get(type(callback).__name__)
        if write:
            _try(callback, fields, partial(write, callback, metrics, step))
        elif callback is not own:
            _try(callback, fields, partial(callback.on_log, trainer.args, then, trainer.control, logs=dict(fields), model=trainer.model))


def _try(logger_of_theirs: object, fields: Mapping[str, Any], write: Callable[[], object]) -> None:
    """Has one logger write a point; one that fails keeps it from no other, and never from the training."""
    try:
        write()
    except Exception:
        logger.exception("%s could not log %s", type(logger_of_theirs).__name__, fields)


def _to_tensorboard(callback: Any, metrics: dict[str, float], step: int) -> None:
    if callback.tb_writer is not None:
        for name, value in metrics.items():
            callback.tb_writer.add_scalar(name, value, step)
        callback.tb_writer.flush()


def _to_wandb(_: Any, metrics: dict[str, float], step: int) -> None:
    run = getattr(sys.modules.get("wandb"), "run", None)
    if run is not None:
        # By their own names: the trainer's rule for all metrics ("*") puts them over train/global_step.
        for name in metrics:
            run.define_metric(name, step_metric="global_step")
        run.log({**metrics, "global_step": step})


def _to_mlflow(_: Any, metrics: dict[str, float], step: int) -> None:
    mlflow = sys.modules.get("mlflow")
    if mlflow is not None and mlflow.active_run() is not None:
        mlflow.log_metrics(_mlflow_names(metrics), step=step)


def _mlflow_names(metrics: dict[str, float]) -> dict[str, float]:
    """MLflow refuses what is no letter, digit or one of ``_-. :/``."""
    return {"".join(c if c.isascii() and (c.isalnum() or c in "_-. :/") else "_" for c in name): v for name, v in metrics.items()}


_WRITERS: dict[str, Callable[[Any, dict[str, float], int], None]] = {
    "TensorBoardCallback": _to_tensorboard,
    "WandbCallback": _to_wandb,
    "MLflowCallback": _to_mlflow,
}


def lightning_callback(
    evaluation: AsyncEvaluation,
    eval_strategy: str | None = None,
    eval_steps: int | None = None,
    finish_timeout: float | None = None,
) -> Any:
    """A Lightning ``Callback`` (of ``lightning``, else of ``pytorch_lightning``), for ``Trainer(callbacks=[...])``.

    What is saved is learned from ``Trainer.save_checkpoint``, through which every ModelCheckpoint saves; while it fits, the callback
    stands around it. One checkpoint a step is evaluated: the first, which is ``last.ckpt`` only where no other is saved at that step. What
    Lightning saves for its tuner (hidden files), and all of a ``fast_dev_run``, is left alone.

    Args:
        eval_strategy, eval_steps: which checkpoints are evaluated (see ``Schedule``); default: all that are saved.
        finish_timeout: seconds for which the end of training waits; default: see above.
    """
    try:
        library = importlib.import_module("lightning.pytorch")
    except ModuleNotFoundError:
        library = importlib.import_module("pytorch_lightning")
    schedule = Schedule(eval_strategy, eval_steps)

    class Evaluation(library.Callback):  # type: ignore[misc, name-defined]
        """Submits what was saved, logs what came."""

        submitted = -1
        epochs = 0

        def __reduce__(self) -> tuple[Any, ...]:
            # As when processes are spawned: the class is made anew there.
            return lightning_callback, (evaluation, eval_strategy, eval_steps, finish_timeout)

        def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
            if stage == "fit" and not trainer.fast_dev_run:
                _followers(trainer).append(self)

        def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
            if self in _followers(trainer):
                _followers(trainer).remove(self)

        def saved(self, trainer: Any, path: Any) -> None:
            step = trainer.global_step
            epoch = max(self.epochs, trainer.current_epoch + bool(trainer.is_last_batch))
            is_meant = trainer.is_global_zero and not os.path.basename(path).startswith(".")
            if is_meant and step != self.submitted and schedule.takes(step, epoch):
                self.submitted = step
                evaluation.submit(path, step, is_saved=not _saves_later(trainer))

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            self.submitted, self.epochs = -1, trainer.current_epoch
            schedule.begin(trainer.global_step, trainer.current_epoch)

        def on_train_batch_end(self, trainer: Any, *_: Any, **__: Any) -> None:
            self.write(trainer, evaluation.poll)

        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            # Before every ModelCheckpoint: Lightning keeps those for the end of its list.
            self.epochs = trainer.current_epoch + 1

        def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
            self.write(trainer, lambda: evaluation.finish(_patience(finish_timeout)))
            evaluation.close()

        def write(self, trainer: Any, take: Callable[[], list[Point]]) -> None:
            # A point that is taken counts as logged: where nothing logs, it stays for a training that does.
            if trainer.is_global_zero and not trainer.fast_dev_run and trainer.loggers:
                _log_all(take(), lambda fields, step: _log_in_lightning(trainer, fields, step))

    return Evaluation()


def _followers(trainer: Any) -> list[Any]:
    """The callbacks that are told what this trainer saves, in its own list of them."""
    saving = vars(trainer).get("save_checkpoint")
    if not hasattr(saving, "followers"):
        save = trainer.save_checkpoint
        followers: list[Any] = []

        def save_checkpoint(filepath: Any, *args: Any, **kwargs: Any) -> None:
            save(filepath, *args, **kwargs)
            for each in followers:
                each.saved(trainer, filepath)

        save_checkpoint.followers = followers  # type: ignore[attr-defined]
        trainer.save_checkpoint = saving = save_checkpoint
    found: list[Any] = saving.followers
    return found


def _saves_later(trainer: Any) -> bool:
    """True where a thread of Lightning's writes what training goes on without."""
    return any("Async" in kind.__name__ for kind in type(trainer.strategy.checkpoint_io).__mro__)


def _log_in_lightning(trainer: Any, fields: dict[str, Any], step: int) -> None:
    """Every logger of the trainer gets the metrics at the checkpoint's step; W&B's makes the field ``trainer/global_step`` of it."""
    metrics = {name: value for name, value in fields.items() if name != "global_step"}
    for each in trainer.loggers:
        _try(each, fields, partial(each.log_metrics, metrics, step=step))
