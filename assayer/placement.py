"""Which box of a tensor a rank holds, from how a DTensor or a ShardedTensor was placed on the device mesh.

Sources: torch/distributed/tensor/placement_types.py (``Shard`` cuts like ``torch.chunk``: as long as the first, the last ones shorter or
empty), _dtensor_spec.py, device_mesh.py; FSDP2 over tensor parallelism marks its dimension ``_StridedShard``: it cut last, although it
stands first in the mesh.
"""

from math import prod
from typing import Any

from assayer.errors import CheckpointError
from assayer.files import printable
from assayer.pickles import Inert, text_of

__all__ = ["Box", "box_of"]

# Parts of a nested size.
_PARTS_MAX = 100
# Offsets and sizes.
Box = tuple[tuple[int, ...], tuple[int, ...]]


def box_of(spec: Inert, shape: tuple[int, ...], name: str) -> Box | None:
    """The box of the tensor that this rank's share is; None when this rank has no part in it.

    Args:
        spec: of a DTensor, or of a ShardedTensor's shard, as its pickle gives it.
        shape: the whole tensor's.
        name: for errors.

    Raises:
        CheckpointError: the placement is one that has no box (a partial sum, interleaved blocks), or is not understood.
    """
    offsets, lengths = spec.field("shard_offsets"), spec.field("shard_sizes")
    if offsets is not None and lengths is not None:
        return tuple(offsets), tuple(lengths)
    mesh = spec.field("mesh")
    if not isinstance(mesh, Inert):
        raise CheckpointError(f"the tensor {printable(name)} has a placement without a mesh")
    sizes, coordinate = _mesh_of(mesh, name)
    if coordinate is None:
        return None
    placements = list(spec.field("placements") or ())
    if len(placements) != len(sizes) or len(coordinate) != len(sizes):
        raise CheckpointError(f"the tensor {printable(name)} has {len(placements)} placements on a mesh of {len(sizes)} dimensions")
    begin, length = [0] * len(shape), list(shape)
    for placement in placements:
        dim = placement.field("dim") if _is_shard(placement) else 0
        if not isinstance(dim, int) or not -len(shape) <= dim < max(1, len(shape)):
            raise CheckpointError(f"the tensor {printable(name)} of shape {list(shape)} is sharded on the dimension {text_of(dim)}")
    for axis in _order(placements, sizes, name):
        dim = placements[axis].field("dim")
        step = -(-length[dim] // sizes[axis])
        first = min(step * coordinate[axis], length[dim])
        begin[dim] += first
        length[dim] = min(step, length[dim] - first)
    return tuple(begin), tuple(length)


def _order(placements: list[Any], sizes: list[int], name: str) -> list[int]:
    """The mesh dimensions that cut the tensor, in the order in which they did."""
    plain, strided = [], []
    for axis, placement in enumerate(placements):
        kind = placement.class_name.rpartition(".")[2] if isinstance(placement, Inert) else "?"
        if kind == "Shard":
            plain.append(axis)
        elif kind == "_StridedShard":
            later = [
                sizes[j]
                for j in range(axis + 1, len(sizes))
                if _is_shard(placements[j]) and placements[j].field("dim") == placement.field("dim")
            ]
            if prod(later) != placement.field("split_factor"):
                raise CheckpointError(f"the tensor {printable(name)} is sharded in interleaved blocks, which are not merged")
            strided.append(axis)
        elif kind != "Replicate":
            raise CheckpointError(f"the tensor {printable(name)} has the placement {printable(kind)}, of which no whole value can be made")
    return plain + strided[::-1]


def _is_shard(placement: Any) -> bool:
    return isinstance(placement, Inert) and placement.class_name.rpartition(".")[2] in ("Shard", "_StridedShard")


def _mesh_of(mesh: Inert, name: str) -> tuple[list[int], list[int] | None]:
    """The mesh's sizes, and this rank's coordinate on it."""
    coordinate = mesh.field("_coordinate_on_dim", "?")
    layout, ranks = mesh.field("_layout"), mesh.field("mesh")
    if isinstance(layout, Inert):
        axes = layout.field("axes")
        if axes is None:
            # 2.9 to 2.12 hold shape and stride themselves, nested where dimensions were flattened.
            shapes = layout.field("shape", layout.args[0] if layout.args else None)
            axes = (shapes,) if isinstance(shapes, int) else shapes
        sizes = [_size(axis.field("shape") if isinstance(axis, Inert) else axis) for axis in axes]
    elif hasattr(ranks, "size"):
        sizes = list(ranks.size)
    else:
        raise CheckpointError(f"the tensor {printable(name)} lies on a device mesh of an unknown form")
    if coordinate == "?":
        raise CheckpointError(f"the tensor {printable(name)} lies on a device mesh that does not say where its rank stands")
    return sizes, None if coordinate is None else list(coordinate)


def _size(shape: Any) -> int:
    """The product of a size that may be nested."""
    todo, product, parts = [shape], 1, 0
    while todo:
        part = todo.pop()
        parts += 1
        if isinstance(part, int):
            product *= part
        elif isinstance(part, tuple | list) and len(part) + len(todo) + parts <= _PARTS_MAX:
            todo += part
        else:
            raise CheckpointError("has a device mesh of impossible form")
    return product
