"""``python trainings.py <order>``: trains with a trainer's own loop, saving and retention code, and tells what is left.

It knows nothing of assayer. A trainer is imported once, and trains in several directories, one after another: so that what it leaves in a
directory that is watched can be held against what it leaves in one that is not. Where somebody looks on, every save is announced and
waited for, as a training with longer steps would wait by itself.
"""

import json
import logging
import math
import os
import random
import re
import shutil
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

# Seconds that a training waits for whoever looks on.
PATIENCE = 60.0


@dataclass(frozen=True)
class Order:
    """Train in each directory: ``first`` saves, and after a resume up to ``last``; in ``watched`` every save is announced on the desk."""

    trainer: str
    directories: list[str]
    desk: str
    watched: str | None = None
    first: int = 3
    last: int = 4


@dataclass
class Told:
    """What a training in one directory came to.

    ``saved``: the sum of the weights at every save of a name; ``order``: the name of every save, the oldest first; ``counted``: what the
    trainer itself takes for its checkpoints; ``files``: every file below the directory but what lies in an ``evals/``; ``loaded``: the sum
    of the weights that the trainer finds in each checkpoint that is left; ``said``: what it warned of.
    """

    saved: dict[str, list[float]] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)
    counted: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    loaded: dict[str, float] = field(default_factory=dict)
    said: list[str] = field(default_factory=list)


class Run:
    """One training in one directory."""

    def __init__(self, directory: Path, desk: Path | None) -> None:
        self.directory = directory
        self.told = Told()
        self._desk = desk
        self._saves = 0

    def save_done(self, names: Sequence[str], weights: Mapping[str, torch.Tensor]) -> None:
        """Notes a save of these weights under these names; returns when whoever looks on has seen them."""
        for name in names:
            self.told.saved.setdefault(name, []).append(total(weights))
            self.told.order.append(name)
        if self._desk is None:
            return
        self._saves += 1
        announce(self._desk / f"saved-{self._saves}.json", list(names))
        wait_for(self._desk / f"seen-{self._saves}")


class Trainer(Protocol):
    def train(self, run: Run, first: int, last: int) -> None:
        """Trains from save ``first`` to ``last``; from what is there when ``first`` is not the first."""

    def counted(self, directory: Path) -> list[str]:
        """The names of what the trainer takes for its checkpoints."""

    def load(self, directory: Path, name: str) -> Mapping[str, torch.Tensor]:
        """The weights of a checkpoint, as the trainer reads them."""


def total(weights: Mapping[str, torch.Tensor]) -> float:
    """One number that differs between the steps of a training."""
    return math.fsum(weights[name].detach().double().sum().item() for name in sorted(weights))


def announce(path: Path, value: object) -> None:
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps(value))
    draft.rename(path)


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while not path.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{path.name} did not come")
        time.sleep(0.02)


def seed(number: int) -> None:
    random.seed(number)
    torch.manual_seed(number)


class HuggingFace:
    """``transformers.Trainer`` with ``save_total_limit``; with ``best``, the checkpoint of the highest loss is kept: the first."""

    def __init__(self, best: bool = False) -> None:
        self.best = best

    def train(self, run: Run, first: int, last: int) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

        class Announcer(TrainerCallback):
            def on_save(self, args: Any, state: Any, control: Any, **more: Any) -> None:
                run.save_done([f"checkpoint-{state.global_step}"], more["model"].state_dict())

        seed(0)
        config = LlamaConfig(
            vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, tie_word_embeddings=False
        )
        tokens = torch.arange(8)
        examples: Any = [{"input_ids": tokens, "labels": tokens}] * 4
        best: dict[str, Any] = {
            "eval_strategy": "steps",
            "eval_steps": 1,
            "load_best_model_at_end": True,
            "metric_for_best_model": "loss",
            "greater_is_better": True,
        }
        arguments = TrainingArguments(
            output_dir=str(run.directory),
            max_steps=last,
            save_strategy="steps",
            save_steps=1,
            save_total_limit=2,
            learning_rate=0.01,
            lr_scheduler_type="constant",
            per_device_train_batch_size=2,
            use_cpu=True,
            disable_tqdm=True,
            report_to=[],
            **(best if self.best else {}),
        )
        trainer = Trainer(LlamaForCausalLM(config), arguments, train_dataset=examples, eval_dataset=examples, callbacks=[Announcer()])
        trainer.train(resume_from_checkpoint=first > 1)

    def counted(self, directory: Path) -> list[str]:
        from transformers.trainer_utils import sort_checkpoints

        return [Path(path).name for path in sort_checkpoints(str(directory))]

    def load(self, directory: Path, name: str) -> Mapping[str, torch.Tensor]:
        from transformers import AutoModelForCausalLM

        weights: Mapping[str, torch.Tensor] = AutoModelForCausalLM.from_pretrained(directory / name).state_dict()
        return weights


class Accelerate:
    """``Accelerator.save_state`` with names of its own and ``total_limit``."""

    def train(self, run: Run, first: int, last: int) -> None:
        accelerator, model, optimizer = self._prepared(run.directory, first)
        if first > 1:
            # Without a name: the newest that it finds.
            accelerator.load_state()
        for number in range(first, last + 1):
            model(torch.ones(2, 4)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            accelerator.save_state()
            run.save_done([f"checkpoint_{number - 1}"], model.state_dict())

    def _prepared(self, directory: Path, first: int) -> tuple[Any, Any, Any]:
        from accelerate import Accelerator  # type: ignore[import-untyped]
        from accelerate.utils import ProjectConfiguration  # type: ignore[import-untyped]

        seed(0)
        naming = ProjectConfiguration(str(directory), automatic_checkpoint_naming=True, total_limit=2, iteration=first - 1)
        accelerator = Accelerator(cpu=True, project_config=naming)
        model = nn.Linear(4, 4)
        return accelerator, *accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))

    def counted(self, directory: Path) -> list[str]:
        # Whatever lies there: accelerator.py, save_state and load_state.
        return sorted(os.listdir(directory / "checkpoints"))

    def load(self, directory: Path, name: str) -> Mapping[str, torch.Tensor]:
        accelerator, model, _ = self._prepared(directory, 1)
        accelerator.load_state(str(directory / "checkpoints" / name))
        weights: Mapping[str, torch.Tensor] = model.state_dict()
        return weights


class Lightning:
    """``ModelCheckpoint`` that keeps the best two, by a score that goes up and down, and ``last.ckpt``."""

    def train(self, run: Run, first: int, last: int) -> None:
        from lightning.pytorch import Callback, Trainer
        from lightning.pytorch.callbacks import ModelCheckpoint

        class Announcer(Callback):
            def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
                # ModelCheckpoint saves at the end of an epoch, after every other callback.
                if trainer.current_epoch >= first:
                    announce_epoch(trainer.current_epoch, pl_module)

        def announce_epoch(number: int, module: nn.Module) -> None:
            run.save_done([f"epoch={number - 1}-step={number}.ckpt", "last.ckpt"], module.state_dict())

        seed(0)
        keeper = ModelCheckpoint(dirpath=run.directory, monitor="score", mode="max", save_top_k=2, save_last=True)
        trainer = Trainer(
            max_epochs=last,
            accelerator="cpu",
            logger=False,
            callbacks=[keeper, Announcer()],
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=run.directory,
        )
        module = self._module()
        examples: Any = torch.ones(2, 4)
        trainer.fit(module, torch.utils.data.DataLoader(examples, batch_size=2), ckpt_path="last" if first > 1 else None)
        announce_epoch(last, module)

    def _module(self) -> Any:
        from lightning.pytorch import LightningModule

        class Module(LightningModule):
            def __init__(self) -> None:
                super().__init__()
                self.net = nn.Linear(4, 4)

            def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
                # 1, 0, 3, 2, 5, 4, ...: each is among the best two when it is saved.
                self.log("score", float(self.current_epoch ^ 1), on_step=False, on_epoch=True)
                loss: torch.Tensor = self.net(batch).sum()
                return loss

            def configure_optimizers(self) -> torch.optim.Optimizer:
                return torch.optim.SGD(self.parameters(), lr=0.1)

        return Module()

    def counted(self, directory: Path) -> list[str]:
        return sorted(path.name for path in directory.iterdir() if path.suffix == ".ckpt")

    def load(self, directory: Path, name: str) -> Mapping[str, torch.Tensor]:
        weights: Mapping[str, torch.Tensor] = type(self._module()).load_from_checkpoint(directory / name).state_dict()
        return weights


class Torchtitan:
    """torch's DCP under torchtitan's rules: ``checkpoint/step-N/``, the latest two kept, and a resume from the highest step.

    A miniature of torchtitan/components/checkpointer/base.py of September 2026 (``_purge_stale_checkpoints``, ``_find_load_step``).
    A resume saves the step that it begins with once more, in place, with other weights.
    """

    KEEP = 2

    def train(self, run: Run, first: int, last: int) -> None:
        from torch.distributed.checkpoint.state_dict_saver import save

        seed(0)
        folder = run.directory / "checkpoint"
        folder.mkdir(exist_ok=True)
        model = nn.Linear(4, 4)
        if first > 1:
            first = max(step for step, _ in self._steps(folder))
            model.load_state_dict(dict(self.load(run.directory, f"step-{first}")))
            seed(1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1 * first)
        for step in range(first, last + 1):
            model(torch.rand(2, 4)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            self._save(folder, step, partial(save, model.state_dict(), checkpoint_id=folder / f"step-{step}", no_dist=True))
            run.save_done([f"step-{step}"], model.state_dict())

    def _save(self, folder: Path, step: int, save: Callable[[], object]) -> None:
        """Makes room for the step, also by what is not whole, and saves it."""
        others = [(number, path) for number, path in self._steps(folder) if number != step]
        whole = [path for _, path in others if (path / ".metadata").is_file()]
        self._purge([path for _, path in others if path not in whole] + whole[: max(0, len(whole) - self.KEEP + 1)])
        save()

    def _steps(self, folder: Path) -> list[tuple[int, Path]]:
        matches = [(re.fullmatch(r"step-(0|[1-9]\d*)", name), name) for name in os.listdir(folder)]
        return sorted((int(match.group(1)), folder / name) for match, name in matches if match)

    def _purge(self, stale: list[Path]) -> None:
        def purge() -> None:
            for path in stale:
                shutil.rmtree(path)

        thread = threading.Thread(target=purge)
        thread.start()
        thread.join()

    def counted(self, directory: Path) -> list[str]:
        return [path.name for _, path in self._steps(directory / "checkpoint")]

    def load(self, directory: Path, name: str) -> Mapping[str, torch.Tensor]:
        from torch.distributed.checkpoint.state_dict_loader import load

        weights: dict[str, torch.Tensor] = nn.Linear(4, 4).state_dict()
        load(weights, checkpoint_id=directory / "checkpoint" / name, no_dist=True)
        return weights


class EarlyTorchtitan(Torchtitan):
    """torchtitan 0.1.0 and before: it saves, then counts every entry of its folder as a checkpoint (components/checkpoint.py).

    An entry without ``step-N`` in its name ends the training, which torchtitan's pull request 1465 mended in July 2025.
    """

    def _save(self, folder: Path, step: int, save: Callable[[], object]) -> None:
        save()
        found = sorted((self._step_of(name), folder / name) for name in os.listdir(folder))
        self._purge([path for _, path in found[: -self.KEEP]])

    def _step_of(self, name: str) -> int:
        match = re.search(r"step-(\d+)", name)
        return int(match.group(1))  # type: ignore[union-attr]


TRAINERS: dict[str, Trainer] = {
    "hf_trainer": HuggingFace(),
    "hf_trainer_best": HuggingFace(best=True),
    "accelerate": Accelerate(),
    "lightning": Lightning(),
    "torchtitan": Torchtitan(),
    "early_torchtitan": EarlyTorchtitan(),
}


class _Ear(logging.Handler):
    def __init__(self, heard: list[str]) -> None:
        super().__init__(logging.WARNING)
        self.heard = heard

    def emit(self, record: logging.LogRecord) -> None:
        self.heard.append(record.getMessage())


@contextmanager
def listening(directory: Path) -> Iterator[list[str]]:
    """Collects what is warned of, through ``warnings`` and through every logger, with the directory's name left out."""
    heard: list[str] = []
    ear = _Ear(heard)
    # Some of these pass nothing on.
    names = (None, "transformers", "accelerate", "lightning", "lightning.pytorch", "lightning.fabric")
    loggers = [logging.getLogger(name) for name in names]
    for logger in loggers:
        logger.addHandler(ear)
    said: list[str] = []
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield said
        heard += [f"{one.category.__name__}: {one.message}" for one in caught]
        said += sorted({text.replace(str(directory), "<directory>") for text in heard})
    finally:
        for logger in loggers:
            logger.removeHandler(ear)


def files_of(directory: Path) -> list[str]:
    """Every file and folder below the directory but what lies in a folder ``evals/``."""
    found = []
    for folder, below, names in os.walk(directory):
        # What a watch holds there comes and goes under the walk.
        below[:] = [name for name in below if name != "evals"]
        found += [Path(folder, name).relative_to(directory) for name in (*below, *names) if name != "evals"]
    return sorted(str(path) + "/" * (directory / path).is_dir() for path in found)


def carry_out(order: Order) -> dict[str, Any]:
    trainer = TRAINERS[order.trainer]
    told = {}
    for name in order.directories:
        directory = Path(name)
        watched = name == order.watched
        run = Run(directory, Path(order.desk) if watched else None)
        if watched:
            wait_for(Path(order.desk) / "begin")
        with listening(directory) as said:
            trainer.train(run, 1, order.first)
            trainer.train(run, order.first + 1, order.last)
            run.told.counted = trainer.counted(directory)
            run.told.loaded = {name: total(trainer.load(directory, name)) for name in run.told.counted}
        run.told.files = files_of(directory)
        run.told.said = said
        told[name] = asdict(run.told)
    return told


if __name__ == "__main__":
    torch.set_num_threads(1)
    given = Order(**json.loads(sys.argv[1]))
    announce(Path(given.desk) / "told.json", carry_out(given))
