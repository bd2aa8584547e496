"""Tensors in every placement and dtype that a sharded checkpoint can hold, made without any model."""

import zlib
from collections import OrderedDict
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import Placement

DTYPES = (
    *(torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64),
    *(torch.bool, torch.uint8, torch.uint16, torch.int8, torch.int16, torch.int32, torch.int64),
)


def full(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor whose values follow from its name: the same on every rank."""
    random = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    if dtype.is_floating_point or dtype.is_complex:
        return torch.randn(shape, generator=random, dtype=torch.complex64 if dtype.is_complex else torch.float64).to(dtype)
    return torch.randint(0, 2 if dtype is torch.bool else 100, shape, generator=random).to(dtype)


def place(tensor: Tensor, mesh: DeviceMesh, *placements: Placement) -> DTensor:
    """Every rank takes its own part; nothing is sent."""
    return distribute_tensor(tensor, mesh, placements, src_data_rank=None)


class Cases:
    """What each rank holds (``state``) and what all of it together is (``expected``), under the same names."""

    def __init__(self) -> None:
        self.state: dict[str, Tensor] = {}
        self.expected: dict[str, Tensor] = {}
        world = dist.get_world_size()
        self.line = init_device_mesh("cpu", (world,))
        self.wide = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("dp", "tp"))
        self.tall = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard"))
        self.crossed = DeviceMesh("cpu", torch.arange(world).view(2, -1).t())  # ranks in another order than they are counted
        self.part = DeviceMesh("cpu", list(range(1, world, 2)))  # half of the ranks hold nothing
        self._one_dimension()
        self._two_dimensions()
        self._strides()
        self._dtypes()

    def add(self, name: str, tensor: Tensor, mesh: DeviceMesh | None = None, *placements: Placement) -> None:
        self.expected[name] = tensor
        self.state[name] = place(tensor, mesh, *placements) if mesh else tensor

    def _one_dimension(self) -> None:
        row, column, replica = Shard(0), Shard(1), Replicate()
        for name, shape, placement in (
            *(("row", (8, 6), row), ("row.uneven", (7, 5), row), ("row.one", (1, 5), row), ("row.none", (0, 4), row)),
            *(("column", (6, 8), column), ("column.uneven", (5, 7), column), ("column.one", (3, 1), column)),
            *(("cube.middle", (3, 6, 5), column), ("cube.last", (3, 4, 7), Shard(2)), ("vector", (11,), row)),
            *(("replicated", (4, 3), replica), ("replicated.scalar", (), replica)),
        ):
            self.add(f"one.{name}", full(name, *shape), self.line, placement)
        self.add("one.part", full("part", 5, 4), self.part, row)
        self.add("one.part_replicated", full("part_replicated", 3), self.part, replica)
        self.add("plain", full("plain", 4, 5))
        self.add("plain.scalar", full("plain.scalar"))
        self.add("plain.none", full("plain.none", 0, 3))

    def _two_dimensions(self) -> None:
        row, column, replica = Shard(0), Shard(1), Replicate()
        for label, mesh in (("wide", self.wide), ("tall", self.tall), ("crossed", self.crossed)):
            for name, shape, placements in (
                *(("row_column", (7, 9), (row, column)), ("column_row", (7, 9), (column, row)), ("row_row", (11, 3), (row, row))),
                *(("hsdp", (9, 4), (replica, row)), ("hsdp_column", (4, 9), (replica, column)), ("tp_only", (6, 5), (row, replica))),
                *(("replicated", (3, 3), (replica, replica)), ("cube", (5, 3, 7), (Shard(2), row))),
                *(("column_column", (3, 11), (column, column)), ("scalar", (), (replica, replica))),
            ):
                self.add(f"two.{label}.{name}", full(f"{label}.{name}", *shape), mesh, *placements)
        # FSDP over tensor parallelism: the first mesh dimension cuts what the second has cut before (_StridedShard). What has no
        # tensor parallelism lies on a mesh of the first dimension alone: another one on each rank of the second.
        module = nn.Sequential(OrderedDict(up=nn.Linear(6, 10), down=nn.Linear(10, 6), norm=nn.LayerNorm(7)))
        for name, parameter in module.named_parameters():
            self.expected[f"two.strided.{name}"] = parameter.data = full(f"strided.{name}", *parameter.shape)
        parallelize_module(module, self.wide["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        fully_shard(module, mesh=self.wide["dp"])
        self.state |= {f"two.strided.{name}": parameter.detach() for name, parameter in module.named_parameters()}

    def _strides(self) -> None:
        self.add("stride.transposed", full("transposed", 5, 8).t())
        self.add("stride.expanded", full("expanded", 1, 5).expand(4, 5))
        self.add("stride.view", full("view", 100, 8)[10:14])
        self.add("stride.steps", full("steps", 9, 8)[::2, 1::3])
        self.add("stride.channels_last", full("channels_last", 2, 3, 4, 5).to(memory_format=torch.channels_last))
        rank, world = dist.get_rank(), dist.get_world_size()
        whole = full("transposed_shard", 2 * world, 3)
        local = whole[2 * rank : 2 * rank + 2].t().contiguous().t()
        self.expected["stride.transposed_shard"] = whole
        self.state["stride.transposed_shard"] = DTensor.from_local(local, self.line, [Shard(0)], run_check=False)
        tied = full("tied", 9, 4)
        self.add("tied.first", tied, self.line, Shard(0))
        self.expected["tied.second"], self.state["tied.second"] = tied, self.state["tied.first"]
        self.add("tied.plain_first", tied)
        self.add("tied.plain_second", tied)

    def _dtypes(self) -> None:
        for dtype in DTYPES:
            name = f"dtype.{str(dtype).removeprefix('torch.')}"
            self.add(f"{name}.row", full(name, 5, 3, dtype=dtype), self.line, Shard(0))
            self.add(f"{name}.column", full(name, 3, 5, dtype=dtype), self.line, Shard(1))
            self.add(f"{name}.plain", full(name, 2, 3, dtype=dtype))

    def nested(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """A state dict that is not flat, with leaves that are no tensors; and its tensors under their flat names."""
        first, second, third, fourth = (full(f"nested.{index}", 5, 2) for index in range(4))
        state = {
            "deep": {"a": {"b": place(first, self.line, Shard(0))}, "list": [second, place(third, self.line, Shard(0)), {"c": fourth}]},
            "dotted.name.weight": place(first, self.line, Shard(1)),
            "model.weight": second,
            "note": "text",
            "count": 3,
            "nothing": None,
            "empty": {},
        }
        tensors = {"deep.a.b": first, "deep.list.0": second, "deep.list.1": third, "deep.list.2.c": fourth}
        return state, {**tensors, "dotted.name.weight": first, "model.weight": second}
