"""``python -m trainers.single ROOT``: every sample that one process writes."""

import sys
import time
import warnings
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator  # type: ignore[import-untyped]
from accelerate.utils import ProjectConfiguration  # type: ignore[import-untyped]

from trainers import Sample, llama, megatron, save_expected, save_samples, zero


def lightning(root: Path) -> list[Sample]:
    """A .ckpt file, and last.ckpt beside it, by Lightning's own Trainer; nothing where Lightning is not installed."""
    if not find_spec("lightning"):
        return []
    pytorch: Any = import_module("lightning.pytorch")

    class Module(pytorch.LightningModule):  # type: ignore[misc]
        def __init__(self, rate: float, betas: tuple[float, float]) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.network = llama.model(210, mixed=False)
            self.register_buffer("seen", torch.tensor(7))

        def training_step(self, batch: torch.Tensor, _: int) -> Any:
            return self.network(input_ids=batch, labels=batch).loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=self.hparams["rate"], weight_decay=0.0)

    run = root / "lightning_file"
    saver = pytorch.callbacks.ModelCheckpoint(dirpath=run, save_last=True, save_top_k=-1)
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pytorch.Trainer(accelerator="cpu", max_epochs=2, callbacks=[saver], **quiet)
    module = Module(0.0, (0.9, 0.999))
    expected = llama.weights(module.network)
    data: Any = torch.arange(24).reshape(6, 4)
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=2))
    path = run / "epoch=1-step=6.ckpt"
    return [Sample("lightning_file", path, save_expected(root, "lightning_file", expected), "lightning_file", step=6, epoch=1.0)]


def accelerate(root: Path) -> list[Sample]:
    """``Accelerator.save_state`` without FSDP: automatic naming, where the number counts saves; tied weights; and the older .bin."""
    samples = []
    for name, tied, settings in (
        ("accelerate", False, {}),
        ("accelerate_tied", True, {}),
        ("accelerate_bin", False, {"safe_serialization": False}),
    ):
        project = ProjectConfiguration(project_dir=str(root / name), automatic_checkpoint_naming=True)
        accelerator = Accelerator(cpu=True, project_config=project)
        made = llama.model(220, tied=tied, mixed=not tied)
        model, _ = accelerator.prepare(made, llama.optimizer(made))
        accelerator.register_for_checkpointing(torch.optim.lr_scheduler.LambdaLR(torch.optim.SGD(model.parameters(), 0.1), lambda _: 1.0))
        for _ in range(2):
            accelerator.save_state(**settings)
        weights = llama.weights(made)
        if tied:
            del weights["lm_head.weight"]  # safetensors holds shared weights once, under the first of their names
        path = root / name / "checkpoints" / "checkpoint_1"
        samples.append(Sample(name, path, save_expected(root, name, weights), "accelerate"))
        accelerator.end_training()
    return samples


WRITERS: tuple[Callable[[Path], list[Sample]], ...] = (lightning, accelerate, zero.deepspeed, megatron.megatron)


def main(root: Path) -> None:
    warnings.simplefilter("ignore")
    samples = []
    for write in WRITERS:
        began = time.perf_counter()
        samples += write(root)
        print(f"{write.__name__:24} {time.perf_counter() - began:6.2f} s", file=sys.stderr)
    save_samples(root, samples)


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())
