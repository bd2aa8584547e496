"""What accelerate and the Hugging Face Trainer write under FSDP: sharded, full, and one file a rank, by FSDP 1 and 2.

Both refuse FSDP without an accelerator device, but only when they choose the kind of training: here that choice is made for them, and all
that follows, from ``prepare`` to ``save_state`` and ``Trainer._save_checkpoint``, is their own.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator  # type: ignore[import-untyped]
from accelerate.state import AcceleratorState, PartialState  # type: ignore[import-untyped]
from accelerate.utils import (  # type: ignore[import-untyped]
    DistributedType,
    FullyShardedDataParallelPlugin,
    ProjectConfiguration,
    save_fsdp_model,
    save_fsdp_optimizer,
)
from transformers import Trainer, TrainingArguments

from trainers import Sample, llama
from trainers.torch_dcp import expected_on_first


def plugin(version: int, kind: str) -> FullyShardedDataParallelPlugin:
    return FullyShardedDataParallelPlugin(
        fsdp_version=version,
        state_dict_type=kind,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        cpu_ram_efficient_loading=False,
        use_orig_params=version == 1 or None,
    )


def use_fsdp(accelerator: Accelerator, version: int, kind: str) -> None:
    """What AcceleratorState does for a device that is no CPU."""
    PartialState().distributed_type = accelerator.state.distributed_type = DistributedType.FSDP
    PartialState().device = accelerator.state.device = torch.device("cpu")  # FSDP 1 knows no cpu:0
    accelerator.state.fsdp_plugin = plugin(version, kind)


def reset() -> None:
    """A run starts anew: accelerate keeps its state in classes."""
    AcceleratorState._reset_state()
    PartialState._reset_state()


def prepared(accelerator: Accelerator, seed: int, *, tied: bool = False) -> tuple[Any, Any, dict[str, torch.Tensor]]:
    """A float32 Llama and AdamW after a step that changes nothing, wrapped by accelerate; and its weights."""
    model = llama.model(seed, tied=tied, mixed=False)
    weights = llama.weights(model)
    made = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0, foreach=False)
    model, optimizer = accelerator.prepare(model, made)
    model(input_ids=torch.arange(6).reshape(1, 6), labels=torch.arange(6).reshape(1, 6)).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer, weights


def accelerate(root: Path) -> list[Sample]:
    """``Accelerator.save_state`` with automatic naming: checkpoints/checkpoint_0; and ``use_dcp=False``, one file a rank."""
    samples = []
    # FSDP 1 cannot gather a full state dict on a CPU after a step (torch 2.13 ends in a segmentation fault); its file would be as FSDP 2's.
    for at, (version, kind) in enumerate(((2, "SHARDED_STATE_DICT"), (2, "FULL_STATE_DICT"), (1, "SHARDED_STATE_DICT"))):
        name = f"accelerate_fsdp{version}_{kind.partition('_')[0].lower()}"
        reset()
        project = ProjectConfiguration(project_dir=str(root / name), automatic_checkpoint_naming=True)
        accelerator = Accelerator(cpu=True, project_config=project)
        use_fsdp(accelerator, version, kind)
        model, optimizer, weights = prepared(accelerator, 20 + at, tied=at == 0)
        accelerator.save_state()
        expected = expected_on_first(root, name, weights)
        samples.append(Sample(name, root / name / "checkpoints" / "checkpoint_0", expected, "accelerate_fsdp"))
        if kind == "SHARDED_STATE_DICT":  # a rank's file holds DTensors under FSDP 2, under FSDP 1 ShardedTensors
            path = root / f"accelerate_fsdp{version}_ranks" / "checkpoint_3"
            save_fsdp_model(accelerator.state.fsdp_plugin, accelerator, model, str(path), use_dcp=False)
            save_fsdp_optimizer(accelerator.state.fsdp_plugin, accelerator, optimizer, model, str(path), use_dcp=False)
            samples.append(Sample(f"accelerate_fsdp{version}_ranks", path, expected, "accelerate_fsdp"))
        accelerator.wait_for_everyone()
    return samples


def hf_trainer(root: Path) -> list[Sample]:
    """``Trainer._save_checkpoint``: checkpoint-N with accelerate's FSDP files in it and trainer_state.json last."""
    samples = []
    for step, version, kind in ((50, 2, "SHARDED_STATE_DICT"), (60, 2, "FULL_STATE_DICT"), (70, 1, "SHARDED_STATE_DICT")):
        name = f"hf_trainer_fsdp{version}_{kind.partition('_')[0].lower()}"
        reset()
        arguments = TrainingArguments(output_dir=str(root / name), use_cpu=True, report_to=[], save_strategy="steps", save_steps=step)
        trainer = Trainer(model=llama.model(mixed=False), args=arguments)
        use_fsdp(trainer.accelerator, version, kind)
        trainer.is_fsdp_enabled = True
        trainer.model, wrapped, weights = prepared(trainer.accelerator, step)
        trainer.optimizer = wrapped
        trainer.model_wrapped = trainer.model
        trainer.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(wrapped.optimizer, lambda _: 1.0)
        trainer.state.global_step, trainer.state.epoch, trainer.state.num_input_tokens_seen = step, 0.25, 1024 * step
        trainer._save_checkpoint(trainer.model, None)
        expected = expected_on_first(root, name, weights)
        path = root / name / f"checkpoint-{step}"
        form = "hf_dir" if kind == "FULL_STATE_DICT" else "accelerate_fsdp"
        samples.append(Sample(name, path, expected, form, step=step, epoch=0.25, tokens=1024 * step))
        dist.barrier()
    return samples


WRITERS: tuple[Callable[[Path], list[Sample]], ...] = (accelerate, hf_trainer)
