"""DeepSpeed checkpoints of ZeRO 1, 2 and 3, as three ranks leave them; DeepSpeed is not installed.

Files, keys, flat groups and paddings are those of DeepSpeed 0.19.8 (runtime/engine.py, runtime/zero/stage_1_and_2.py, stage3.py), compared
with what it wrote itself for the same model; utils/zero_to_fp32.py reads them. The full weights are known beforehand: float32 masters,
of which ``module`` holds the bfloat16; one frozen layer, which has no master; buffers; a tied head.
"""

import json
import math
from collections import OrderedDict
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trainers import Sample, llama, save_expected
from trainers.pretend import pretend

WORLD = 3
FROZEN = "model.layers.0.input_layernorm.weight"


class ZeroStageEnum(int, Enum):
    """deepspeed.runtime.zero.config.ZeroStageEnum."""

    disabled = 0
    optimizer_states = 1
    gradients = 2
    weights = 3


class LossScaler:
    """deepspeed.runtime.fp16.loss_scaler.LossScaler."""

    def __init__(self) -> None:
        self.cur_scale, self.dynamic = 1.0, False


@dataclass
class fragment_address:
    """deepspeed.utils.tensor_fragment.fragment_address."""

    numel: int
    start: int


def model() -> Any:
    """A tied Llama with sizes that no world divides, buffers, and a frozen parameter."""
    made = llama.model(200, tied=True, mixed=False)
    made.model.layers[0].add_module("score", nn.Linear(5, 3))
    made.register_buffer("scale", torch.linspace(0, 1, 3))
    made.register_buffer("count", torch.tensor(5))
    made.get_parameter(FROZEN).requires_grad_(False)
    return made


def param_groups(made: nn.Module) -> list[dict[str, Tensor]]:
    """What decays and what does not, as trainers group parameters; tied weights once."""
    trained = {name: value.detach() for name, value in made.named_parameters() if value.requires_grad}
    return [{name: value for name, value in trained.items() if (value.dim() > 1) is decays} for decays in (True, False)]


def expected(made: nn.Module) -> dict[str, Tensor]:
    weights = llama.weights(made)
    return {**weights, FROZEN: weights[FROZEN].bfloat16()}


def about(made: nn.Module, step: int, stage: int) -> dict[str, Any]:
    """What every model_states file tells beside its ``module``."""
    frozen = OrderedDict({FROZEN: made.get_parameter(FROZEN).shape}) if stage > 1 else None
    groups = param_groups(made)
    return {
        "buffer_names": ["scale", "count"],
        "optimizer": None,
        "param_shapes": [OrderedDict((name, value.shape) for name, value in group.items()) for group in groups],
        "frozen_param_shapes": frozen,
        "shared_params": {"lm_head.weight": "model.embed_tokens.weight"},
        "frozen_param_fragments": None,
        **dict.fromkeys(("lr_scheduler", "data_sampler", "random_ltd")),
        "skipped_steps": 0,
        "global_steps": step,
        "global_samples": step * WORLD,
        "dp_world_size": WORLD,
        "mp_world_size": 1,
        "checkpoint_parallel_dimensions": {"pp_degree": 1, "tp_degree": 1},
        "ds_config": {"zero_optimization": {"stage": stage}, "bf16": {"enabled": True}},
        "ds_version": "0.19.8",
    }


def adam(groups: list[Tensor]) -> dict[str, Any]:
    moments = [{"step": torch.tensor(1.0), "exp_avg": torch.zeros_like(flat), "exp_avg_sq": torch.zeros_like(flat)} for flat in groups]
    return {"state": dict(enumerate(moments)), "param_groups": [{"lr": 0.0, "params": [at]} for at in range(len(groups))]}


def save_optimizer(folder: Path, rank: int, state: dict[str, Any], stage: int) -> None:
    scaler = {"loss_scaler": LossScaler(), "dynamic_loss_scale": False, "overflow": False}
    whole = {"optimizer_state_dict": {**scaler, **state, "zero_stage": ZeroStageEnum(stage)}}
    with (
        pretend("deepspeed.runtime.fp16.loss_scaler", LossScaler),
        pretend("deepspeed.runtime.zero.config", ZeroStageEnum),
        pretend("deepspeed.utils.tensor_fragment", fragment_address),
    ):
        config = {"zero_optimization": {"stage": stage}, "bf16": {"enabled": True}}
        torch.save({**whole, "ds_config": config, "ds_version": "0.19.8"}, folder / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")


def flattened(group: dict[str, Tensor], align: int) -> tuple[Tensor, list[int], dict[str, int]]:
    """One flat tensor, padded so that ranks get equal parts; the padding after each parameter; and where each begins."""
    pieces: list[Tensor] = []
    paddings: list[int] = []
    starts, offset = {}, 0
    for name, value in group.items():
        starts[name] = offset
        offset += value.numel()
        last = len(paddings) == len(group) - 1
        paddings.append(0 if last else -offset % align)
        pieces += [value.flatten(), torch.zeros(paddings[-1])]
        offset += paddings[-1]
    return torch.cat([*pieces, torch.zeros(-offset % (2 * WORLD))]), paddings, starts


def zero_1_2(folder: Path, stage: int, step: int, *, align: int = 1, old: bool = False) -> dict[str, Tensor]:
    """Stages 1 and 2: a rank holds a part of each flat group; ``module`` is whole, and its tensors are views of the flat groups.

    ``align`` is DeepSpeed's ``parameter_alignment`` in elements; ``old`` leaves out the key that came with it.
    """
    folder.mkdir(parents=True)
    made = model()
    groups = [flattened(group, align) for group in param_groups(made)]
    views = {
        name: flat.bfloat16()[start : start + made.get_parameter(name).numel()].view(made.get_parameter(name).shape)
        for flat, _, starts in groups
        for name, start in starts.items()
    }
    module: OrderedDict[str, Tensor] = OrderedDict()
    for name, value in made.state_dict().items():
        kept = value.clone() if name in ("scale", "count") else value.bfloat16()
        module[name] = views.get("model.embed_tokens.weight" if name == "lm_head.weight" else name, kept)
    state = about(made, step, stage)
    if stage == 2:
        state["frozen_param_fragments"] = OrderedDict({FROZEN: made.get_parameter(FROZEN).detach().bfloat16()})
    torch.save({"module": module, **state}, folder / "mp_rank_00_model_states.pt")
    for rank in range(WORLD):
        parts, paddings, slices = [], [], []
        for flat, _, starts in groups:
            size = len(flat) // WORLD
            used = list(starts)[-1]
            padding = len(flat) - starts[used] - made.get_parameter(used).numel() if rank == WORLD - 1 else 0
            # The last rank's padding is cut off, but its storage still holds it.
            parts.append(flat[rank * size : (rank + 1) * size].clone()[: size - padding])
            paddings.append(padding)
            slices.append(OrderedDict(_slices(made, starts, rank * size, size)))
        optimizer: dict[str, Any] = {
            "clip_grad": 0.0,
            "base_optimizer_state": adam(parts),
            "single_partition_of_fp32_groups": parts,
            "group_paddings": paddings,
            "param_alignment_paddings": [inner for _, inner, _ in groups],
            "partition_count": [WORLD] * len(groups),
            "ds_version": "0.19.8",
            "param_slice_mappings": slices,
        }
        if old:
            del optimizer["param_alignment_paddings"]
            optimizer["ds_version"] = "0.16.4"
        save_optimizer(folder, rank, optimizer, stage)
    return expected(made)


def _slices(made: nn.Module, starts: dict[str, int], begin: int, size: int) -> list[tuple[str, fragment_address]]:
    found = []
    for name, start in starts.items():
        low, high = max(start, begin), min(start + made.get_parameter(name).numel(), begin + size)
        if low < high:
            found.append((name, fragment_address(high - low, low - begin)))
    return found


def zero_3(folder: Path, step: int) -> dict[str, Tensor]:
    """Stage 3: every parameter is cut into equal parts, the last one padded; a rank's parts lie one after another in flat sub-groups."""
    folder.mkdir(parents=True)
    made = model()
    decays, rest = param_groups(made)
    names = list(decays)
    groups = [{name: decays[name] for name in names[:5]}, {name: decays[name] for name in names[5:]}, rest]
    for rank in range(WORLD):
        state = {**about(made, step, 3), "shared_params": about(made, step, 3)["shared_params"] if rank == 0 else {}}
        state["frozen_param_fragments"] = OrderedDict({FROZEN: part(made.get_parameter(FROZEN).detach().bfloat16(), rank)})
        module = OrderedDict(
            (name, value.clone() if name in ("scale", "count") else torch.empty(0, dtype=torch.bfloat16))
            for name, value in made.state_dict().items()
        )
        torch.save({"module": module, **state}, folder / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
        flats = []
        for at, group in enumerate(groups):
            flats.append(torch.cat([part(value, rank) for value in group.values()]).requires_grad_())
            flats[-1].ds_id = f"{at}_{len(group)}"  # type: ignore[attr-defined]
        save_optimizer(folder, rank, {"partition_count": WORLD, "optimizer_state_dict": adam(flats), "fp32_flat_groups": flats}, 3)
    return expected(made)


def part(value: Tensor, rank: int) -> Tensor:
    size = math.ceil(value.numel() / WORLD)
    padded = torch.cat([value.flatten(), torch.zeros(size * WORLD - value.numel(), dtype=value.dtype)])
    return padded[rank * size : (rank + 1) * size].clone()


def deepspeed(root: Path) -> list[Sample]:
    """Each stage by DeepSpeed's own tag, stage 3 inside a checkpoint of the Hugging Face Trainer, stage 2 inside one of accelerate."""
    samples = []
    for name, path, tag, step in (
        ("deepspeed_zero1", root / "deepspeed_zero1" / "global_step10", "global_step10", 10),
        ("deepspeed_zero2", root / "deepspeed_zero2" / "global_step20", "global_step20", 20),
        ("deepspeed_zero3", root / "deepspeed_zero3" / "global_step30", "global_step30", 30),
        ("deepspeed_zero3_hf", root / "deepspeed_zero3_hf" / "checkpoint-40", "global_step41", 40),
        ("deepspeed_zero2_accelerate", root / "deepspeed_zero2_accelerate" / "step_50", "pytorch_model", 50),
    ):
        top = path.parent if path.name == tag else path
        if "zero3" in name:
            full = zero_3(top / tag, step)
        else:
            full = zero_1_2(top / tag, int(name[14]), step, align=8 if name == "deepspeed_zero2" else 1, old=name == "deepspeed_zero1")
        (top / "zero_to_fp32.py").write_text("# DeepSpeed puts its own script here.\n")
        (top / "latest").write_text(tag)
        if name.endswith("hf"):
            llama.config(tied=True).save_pretrained(path)
            (path / "trainer_state.json").write_text(json.dumps({"global_step": step, "epoch": 0.5}))
        if name.endswith("accelerate"):
            for rank in range(WORLD):
                torch.save({"step": 0}, path / f"random_states_{rank}.pkl")
        epoch = 0.5 if name.endswith("hf") else None
        samples.append(Sample(name, path, save_expected(root, name, full), "deepspeed", step=step, epoch=epoch, real=False))
    return samples
