"""DCP directories of trainers with their own layouts: KempnerForge, torchtitan, OLMo-core, optimus-dl, Lightning.

The trainers are not installed. torch's DCP writes their shards, called as they call it; what lies beside is made by their sources, which
every function names.
"""

import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh

from trainers import Sample, llama, names
from trainers.pretend import pretend
from trainers.rank_files import rng_state
from trainers.torch_dcp import expected_on_first


def link(path: Path, target: str) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.symlink_to(target)
    temporary.rename(path)


def kempnerforge(root: Path) -> list[Sample]:
    """As CheckpointManager.save of KempnerForge (kempnerforge/checkpoint/manager.py) does it: whole, in pipeline stages, and imported.

    Each stage saves through its own process group into ppN/, under the names and layer numbers of the whole model; train_state.pt and
    metadata.json follow in step_N/. An import (scripts/convert_checkpoint.py, hf-to-dcp) has neither.
    """
    samples = []
    for name, step, stages, trained in (
        *(("kempnerforge", 80, 1, True), ("kempnerforge_pp", 90, 2, True), ("kempnerforge_import", 0, 1, False)),
    ):
        hf = llama.weights(llama.model(80 + stages))
        weights = names.renamed(hf, names.KEMPNERFORGE)
        expected, expected_hf = expected_on_first(root, name, weights), expected_on_first(root, f"{name}_hf", hf)
        run = root / name
        path = run / f"step_{step}"
        if stages == 1:
            _save_stage(weights, path, optimizer=trained)
        else:
            mesh = init_device_mesh("cpu", (stages, dist.get_world_size() // stages), mesh_dim_names=("pp", "dp"))
            stage = mesh.get_local_rank("pp")
            last = ("layers.1.", "norm.", "output_head.")
            part = {key: value for key, value in weights.items() if key.startswith(last) is (stage == 1)}
            _save_stage(part, path / f"pp{stage}", mesh=mesh["dp"])
        tokens = 512 * step if trained else None
        if trained and dist.get_rank() == 0:
            extra = {"scheduler": {"last_epoch": step}, "phase_idx": 0, "wandb_run_id": None}
            torch.save({"step": step, "tokens_seen": tokens, "rng": rng_state(), **extra}, path / "train_state.pt")
            (path / "metadata.json").write_text(json.dumps({"step": step, "tokens_seen": tokens}, indent=2))
            link(run / "latest", path.name)
        dist.barrier()
        # What was imported carries no mark of KempnerForge's: it is a distributed checkpoint like any other.
        form = "kempnerforge" if trained else "dcp"
        samples.append(Sample(name, path, expected, form, step=step, tokens=tokens, expected_hf=expected_hf, real=False))
    return samples


def _save_stage(weights: dict[str, torch.Tensor], path: Path, *, mesh: Any = None, optimizer: bool = True) -> None:
    model = names.shard(names.tree(weights), mesh=mesh)
    state: dict[str, Any] = {"model": get_model_state_dict(model)}
    if optimizer:
        state["optimizer"] = get_optimizer_state_dict(model, llama.optimizer(model))
    path.mkdir(parents=True, exist_ok=True)
    save(state, checkpoint_id=str(path), process_group=mesh.get_group() if mesh else None)


def torchtitan(root: Path) -> list[Sample]:
    """As CheckpointManager.save of torchtitan 0.3.0 (components/checkpointer/dcp.py) does it: the model's names flat, beside the rest.

    Three of them: a step of training; the last step, which is the model alone in float32; and a step under the names before 0.3.
    """
    samples = []
    for name, step, table, whole in (
        ("torchtitan", 110, names.TORCHTITAN, True),
        ("torchtitan_last", 120, names.TORCHTITAN, False),
        ("torchtitan_old", 130, names.TORCHTITAN_OLD, True),
    ):
        hf = llama.weights(llama.model(step))
        if not whole:
            hf = {key: value.float() for key, value in hf.items()}
        weights = names.renamed(hf, table, rotary_pairs=True)
        expected, expected_hf = expected_on_first(root, name, weights), expected_on_first(root, f"{name}_hf", hf)
        model = names.shard(names.tree(weights))
        state: dict[str, Any] = get_model_state_dict(model)
        if whole:
            options = StateDictOptions(flatten_optimizer_state_dict=True)
            state["optimizer"] = get_optimizer_state_dict(model, llama.optimizer(model), options=options)
            state["lr_scheduler"] = {"last_epoch": step}
            state["dataloader"] = {f"dp_rank_{dist.get_rank()}": pickle.dumps({"at": step}), "world_size": dist.get_world_size()}
            old = {"step": torch.tensor(step, dtype=torch.int32)}
            state["train_state"] = old if table is names.TORCHTITAN_OLD else {"step": step, "ntokens_seen": 64 * step}
        path = root / name / "checkpoint" / f"step-{step}"
        save(state, checkpoint_id=str(path))
        samples.append(Sample(name, path, expected, "torchtitan", step=step, expected_hf=expected_hf, real=False))
    return samples


@dataclass
class _StorageInfo:
    """olmo_core.distributed.checkpoint.filesystem._StorageInfo."""

    relative_path: str
    offset: int
    length: int


def olmo_core(root: Path) -> list[Sample]:
    """As Checkpointer.save of OLMo-core 3.0 (train/checkpoint.py) does it: train/, model_and_optim/ with its own class, .metadata.json.

    Its files come from tempfile, and so only their owner may read them; config.json is its ConfigSaverCallback's, after all others.
    """
    hf = llama.weights(llama.model(140))
    weights = names.renamed(hf, names.OLMO_CORE)
    expected, expected_hf = expected_on_first(root, "olmo_core", weights), expected_on_first(root, "olmo_core_hf", hf)
    path = root / "olmo_core" / "step140"
    folder = path / "model_and_optim"
    for each in (path / "train", folder):
        each.mkdir(parents=True, exist_ok=True)
    rank, world = dist.get_rank(), dist.get_world_size()
    train = {
        "global_step": 140,
        "global_train_tokens_seen": 140 * 256,
        "max_steps": 1000,
        "epoch": 1,
        "world_size": world,
        "rng": rng_state(),
    }
    torch.save({**train, "data_loader": {}, "callbacks": {}}, path / "train" / f"rank{rank}.pt")
    model = names.shard(names.tree(weights))
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    save(
        {"model": get_model_state_dict(model), "optim": get_optimizer_state_dict(model, llama.optimizer(model), options=options)},
        storage_writer=FileSystemWriter(folder, thread_count=2),
        planner=DefaultSavePlanner(dedup_save_to_lowest_rank=True),
    )
    if rank == 0:
        _olmo_metadata(folder)
        (path / ".metadata.json").write_text(json.dumps({"ephemeral": False, "version": "3.0.0"}))
        for file in [*folder.iterdir(), path / ".metadata.json"]:
            file.chmod(0o600)
        (path / "config.json").write_text(json.dumps({"model": {"d_model": 16, "n_layers": 2, "vocab_size": 61}, "trainer": {}}))
    dist.barrier()
    return [Sample("olmo_core", path, expected, "olmo_core", step=140, tokens=140 * 256, expected_hf=expected_hf, real=False)]


def _olmo_metadata(folder: Path) -> None:
    """Write torch's .metadata again as RemoteFileSystemWriter.finish does (olmo_core/distributed/checkpoint/filesystem.py)."""
    metadata: Any = FileSystemReader(folder).read_metadata()
    with pretend("olmo_core.distributed.checkpoint.filesystem", _StorageInfo):
        places = {index: _StorageInfo(at.relative_path, at.offset, at.length) for index, at in metadata.storage_data.items()}
        metadata.storage_data = places
        metadata.storage_meta.checkpoint_id, metadata.version = str(folder), None
        (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def optimus_dl(root: Path) -> list[Sample]:
    """As CheckpointManager.save_checkpoint of optimus-dl 0.2.6 (modules/checkpoint/checkpoint_manager.py) does it: .tmp, rename, links."""
    hf = llama.weights(llama.model(150))
    weights = names.renamed(hf, names.OPTIMUS_DL, rotary_pairs=True)
    expected, expected_hf = expected_on_first(root, "optimus_dl", weights), expected_on_first(root, "optimus_dl_hf", hf)
    run, step, rank = root / "optimus_dl", 150, dist.get_rank()
    checkpoint, metadata = run / f"checkpoint_{step:09d}", run / f"metadata_{step:09d}.pt"
    mine = run / f"per_rank_metadata_{rank}_{step:09d}.pt"
    before = {path: path.with_name(f"{path.name}.{step}.tmp") for path in (checkpoint, metadata, mine)}
    model = names.shard(names.tree(weights))
    optimizer = get_optimizer_state_dict(model, llama.optimizer(model))
    save({"model": get_model_state_dict(model), "optimizer": optimizer}, storage_writer=FileSystemWriter(before[checkpoint]))
    if rank == 0:
        torch.save({"iteration": step, "config": None, "world_size": dist.get_world_size(), "lr_scheduler": {}}, before[metadata])
    torch.save({"iteration": step, "data_loaders": {}, "metrics": {}}, before[mine])
    dist.barrier()
    for path in [mine, *([metadata, checkpoint] if rank == 0 else [])]:
        before[path].rename(path)
    (run / f"per_rank_metadata_{rank}_latest.pt").symlink_to(mine.name)
    if rank == 0:
        (run / "metadata_latest.pt").symlink_to(metadata.name)
        (run / "checkpoint_latest").symlink_to(checkpoint.name)
    dist.barrier()
    return [Sample("optimus_dl", checkpoint, expected, "optimus_dl", step=step, expected_hf=expected_hf, real=False)]


def lightning(root: Path) -> list[Sample]:
    """As FSDPStrategy and ModelParallelStrategy.save_checkpoint of Lightning 2.6 (pytorch/strategies/) do it: a directory called .ckpt.

    The container is ``model`` under the one and ``state_dict`` under the other; in it, names begin with the LightningModule's attribute.
    """
    samples = []
    for name, container, epoch, step in (("lightning_fsdp", "model", 1, 160), ("lightning_model_parallel", "state_dict", 2, 170)):
        weights = llama.weights(llama.model(step))
        expected = expected_on_first(root, name, weights)
        model = names.shard(names.tree({f"network.{key}": value for key, value in weights.items()}))
        path = root / name / f"epoch={epoch}-step={step}.ckpt"
        path.mkdir(parents=True, exist_ok=True)
        optimizer = get_optimizer_state_dict(model, llama.optimizer(model))
        save({container: get_model_state_dict(model), "optimizer_0": optimizer}, checkpoint_id=path)
        if dist.get_rank() == 0:
            about = {"epoch": epoch, "global_step": step, "pytorch-lightning_version": "2.6.6", "loops": {}, "callbacks": {}}
            torch.save({**about, "lr_schedulers": []}, path / "meta.pt")
        dist.barrier()
        samples.append(Sample(name, path, expected, "lightning_dir", step=step, epoch=float(epoch), real=False))
    return samples


WRITERS: tuple[Callable[[Path], list[Sample]], ...] = (kempnerforge, torchtitan, olmo_core, optimus_dl, lightning)
