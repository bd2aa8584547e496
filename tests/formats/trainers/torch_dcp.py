"""What torch.distributed.checkpoint itself writes: state dicts, async, rank-local metadata, safetensors shards, every placement."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict, get_state_dict
from torch.distributed.checkpoint.state_dict_saver import async_save, save
from torch.distributed.checkpoint.stateful import Stateful

from trainers import Sample, llama, save_expected
from trainers.placements import Cases


class AppState(Stateful):
    """The wrapper of PyTorch's DCP recipe (pytorch.org/tutorials/recipes/distributed_checkpoint_recipe.html)."""

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer = model, optimizer

    def state_dict(self) -> dict[str, Any]:
        model, optim = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optim": optim}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        raise NotImplementedError


def expected_on_first(root: Path, name: str, tensors: dict[str, torch.Tensor]) -> Path:
    """Rank 0 writes what is expected; every rank knows where."""
    path = root / "expected" / f"{name}.safetensors"
    return save_expected(root, name, tensors) if dist.get_rank() == 0 else path


def state_dicts(root: Path) -> list[Sample]:
    """One FSDP2 Llama, mixed bfloat16 and float32, in every form that torch has of saving it."""
    model = llama.model()
    expected = expected_on_first(root, "llama", llama.weights(model))
    optimizer = llama.optimizer(llama.shard(model))
    state: dict[str, Any] = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer), "step": 100}
    samples = []

    def sample(name: str, path: Path, form: str = "dcp", step: int | None = None) -> Path:
        samples.append(Sample(name, path, expected, form, step=step))
        return path

    save(state, checkpoint_id=sample("dcp_model_optimizer", root / "dcp_model_optimizer" / "step_100", step=100))
    save({"app": AppState(model, optimizer)}, checkpoint_id=sample("dcp_app_state", root / "dcp_app_state" / "step_200", step=200))
    save(state["model"], checkpoint_id=sample("dcp_flat", root / "dcp_flat" / "300", step=300))
    save(
        state,
        checkpoint_id=sample("dcp_rank_local", root / "dcp_rank_local" / "step_500", "dcp_rank_local", 500),
        use_collectives=False,
    )
    pending: Any = async_save(
        state, checkpoint_id=sample("dcp_async", root / "dcp_async" / "step_400", step=400), process_group=dist.new_group(backend="gloo")
    )
    pending.result()
    names = list(state["model"])
    for name, form, settings in (
        ("dcp_safetensors", "dcp_safetensors", {}),
        ("dcp_safetensors_two", "dcp_safetensors", {"fqn_to_index_mapping": {key: 1 + at % 2 for at, key in enumerate(names)}}),
        ("dcp_safetensors_consolidated", "hf_dir", {"enable_consolidation": True}),
    ):
        path = sample(name, root / name / "step-600", form, 600)
        save(state["model"], storage_writer=HuggingFaceStorageWriter(str(path), save_distributed=True, **settings))
    return samples


def tied(root: Path) -> list[Sample]:
    """Tied weights: DCP stores the shared tensor under both names."""
    model = llama.model(1, tied=True)
    expected = expected_on_first(root, "dcp_tied", llama.weights(model))
    path = root / "dcp_tied" / "step_7"
    save({"model": get_model_state_dict(llama.shard(model))}, checkpoint_id=path)
    return [Sample("dcp_tied", path, expected, "dcp", step=7)]


def wrapped(root: Path) -> list[Sample]:
    """Names as ``state_dict()`` has them under torch.compile, DistributedDataParallel and activation checkpoints that strip nothing."""
    weights = llama.weights(llama.model(8))
    expected = expected_on_first(root, "dcp_wrapped", weights)
    model = llama.shard(llama.model(8))
    state = {}
    for name, value in get_model_state_dict(model).items():
        for number in range(2):
            name = name.replace(f"layers.{number}.", f"layers.{number}._checkpoint_wrapped_module.")
        state[f"module._orig_mod.{name}"] = value
    path = root / "dcp_wrapped" / "step_8"
    save({"model": state}, checkpoint_id=path)
    return [Sample("dcp_wrapped", path, expected, "dcp", step=8, real=False)]


def placements(root: Path) -> list[Sample]:
    """Every placement and dtype: by DCP, at the top and in a container, and as one torch.save file a rank."""
    cases = Cases()
    nested, more = cases.nested()
    flat = expected_on_first(root, "placements", cases.expected)
    deep = expected_on_first(root, "placements_nested", {**cases.expected, **more})
    top, container, local = (root / name / "step_1" for name in ("placements_top", "placements_model", "placements_rank_local"))
    save({**cases.state}, checkpoint_id=top)
    save({"model": {**cases.state, **nested}, "epoch": 2}, checkpoint_id=container)
    save({"model": {**cases.state}}, checkpoint_id=local, use_collectives=False)
    ranks = root / "placements_ranks" / "global_step_1"
    ranks.mkdir(parents=True, exist_ok=True)
    torch.save(cases.state, ranks / f"model_world_size_{dist.get_world_size()}_rank_{dist.get_rank()}.pt")
    return [
        Sample("placements_top", top, flat, "dcp", step=1),
        Sample("placements_model", container, deep, "dcp", step=1),
        Sample("placements_rank_local", local, flat, "dcp_rank_local", step=1),
        Sample("placements_ranks", ranks, flat, "rank_files", step=1),
    ]


WRITERS: tuple[Callable[[Path], list[Sample]], ...] = (state_dicts, tied, wrapped, placements)
