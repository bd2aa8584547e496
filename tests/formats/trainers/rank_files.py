"""One torch.save file a rank with DTensors in it: LMMs-Engine (FSDP2 trainer) and verl."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import torch
import torch.distributed as dist

from trainers import Sample, llama
from trainers.torch_dcp import expected_on_first


def rng_state() -> dict[str, Any]:
    return {"cpu": torch.get_rng_state(), "numpy": numpy.random.get_state(), "random": random.getstate()}


def lmms_engine(root: Path) -> list[Sample]:
    """As ``save_checkpoints`` of lmms_engine 0.1.4 (train/fsdp2/fsdp2_trainer.py) does it, calls in its order; EMA is its ema_utils.py.

    The EMA's directory is made when an average is asked for, and stays empty until there is one.
    """
    return [
        _lmms_engine(root, "lmms_engine", 30),
        _lmms_engine(root, "lmms_engine_ema", 40, enabled=True, ema=True),
        _lmms_engine(root, "lmms_engine_ema_later", 35, enabled=True),
    ]


def _lmms_engine(root: Path, name: str, step: int, *, enabled: bool = False, ema: bool = False) -> Sample:
    model, average = llama.model(2), llama.model(3)
    expected = expected_on_first(root, name, llama.weights(model))
    expected_ema = expected_on_first(root, f"{name}_average", llama.weights(average)) if ema else None
    optimizer = llama.optimizer(llama.shard(model))
    path = root / name / f"checkpoint-{step}"
    ending = f"world_size_{dist.get_world_size()}_rank_{dist.get_rank()}.pt"
    folders = ["pytorch_model_fsdp_0", *(["pytorch_ema_model_fsdp_0"] if enabled else []), "optimizer", "extra_state", "dataloader_state"]
    for folder in folders:
        (path / folder).mkdir(parents=True, exist_ok=True)
    dist.barrier()
    torch.save(model.state_dict(), path / "pytorch_model_fsdp_0" / f"model_{ending}")
    if ema:
        # Parameters (no longer nn.Parameter) replace those of the live model; its buffers stay.
        tracked = {key: parameter.detach().clone() for key, parameter in llama.shard(average).named_parameters()}
        torch.save({**model.state_dict(), **tracked}, path / "pytorch_ema_model_fsdp_0" / f"model_{ending}")
    torch.save(optimizer.state_dict(), path / "optimizer" / f"optimizer_{ending}")
    extra = {"lr_scheduler_state": {"last_epoch": step}, "rng": rng_state(), "total_tokens": 4096 * step, "accumulated_grad_steps": 0}
    torch.save({**extra, "compute_tracker": {}}, path / "extra_state" / f"extra_state_{ending}")
    torch.save({"_num_yielded": step}, path / "dataloader_state" / f"dataloader_state_{ending}")
    if dist.get_rank() == 0:
        (path / "processor_config.json").write_text("{}")
        model.config.save_pretrained(path)
    dist.barrier()
    return Sample(name, path, expected, "rank_files", step=step, tokens=4096 * step, expected_ema=expected_ema, real=False)


def verl(root: Path) -> list[Sample]:
    """As ``FSDPCheckpointManager`` of verl 0.9.1 (utils/checkpoint/fsdp_checkpoint_manager.py) saves it, calls in its order."""
    model = llama.model(4)
    expected = expected_on_first(root, "verl", llama.weights(model))
    optimizer = llama.optimizer(llama.shard(model))
    step = root / "verl" / "global_step_20"
    path = step / "actor"
    path.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    world, ending = dist.get_world_size(), f"world_size_{dist.get_world_size()}_rank_{dist.get_rank()}.pt"
    torch.save(model.state_dict(), path / f"model_{ending}")
    torch.save(optimizer.state_dict(), path / f"optim_{ending}")
    torch.save({"lr_scheduler": {"last_epoch": 20}, "rng": rng_state()}, path / f"extra_state_{ending}")
    if dist.get_rank() == 0:
        model.config.save_pretrained(path / "huggingface")
        (path / "fsdp_config.json").write_text(json.dumps({"FSDP_version": 2, "world_size": world}, indent=4))
    dist.barrier()
    if dist.get_rank() == 0:
        torch.save({}, step / "data.pt")
        (step.parent / "latest_checkpointed_iteration.txt").write_text("20")
    return [Sample("verl", path, expected, "rank_files", step=20, real=False)]


WRITERS: tuple[Callable[[Path], list[Sample]], ...] = (lmms_engine, verl)
