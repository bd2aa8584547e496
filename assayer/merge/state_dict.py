"""``load_state_dict``: a checkpoint of any format as a mapping of tensors, each read when it is asked for, without a merged file."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from assayer.merge.names import Target
from assayer.merge.reader import Assembly, Source, boxes
from assayer.merge.run import Options, find_checkpoint, prepare

if TYPE_CHECKING:
    import torch

__all__ = ["StateDict", "load_state_dict"]

# Bytes that are put together in one go.
_ROOM = 16 << 20


class StateDict(Mapping[str, "torch.Tensor"]):
    """The tensors of a checkpoint by name, on the CPU, in the dtypes they were saved in; CRC32s are checked as they are read."""

    def __init__(self, targets: list[Target], source: Source) -> None:
        self._targets = {target.name: target for target in targets}
        self._source = source

    def __getitem__(self, name: str) -> "torch.Tensor":
        import torch

        tensor = self._targets[name].source
        data = bytearray(tensor.nbytes)
        view, place = memoryview(data), 0
        if data:
            assembly = Assembly(self._source, tensor)
            for begin, sizes in boxes(tensor.shape, tensor.dtype.size, _ROOM):
                part = assembly.box(begin, sizes).tobytes()
                view[place : place + len(part)] = part
                place += len(part)
            assembly.finish()
        dtype = getattr(torch, tensor.dtype.torch)
        flat = torch.frombuffer(data, dtype=torch.uint8).view(dtype) if data else torch.empty(0, dtype=dtype)
        return flat.reshape(tensor.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._targets)

    def __len__(self) -> int:
        return len(self._targets)


def load_state_dict(checkpoint_path: str | os.PathLike[str], weights: str = "regular") -> StateDict:
    """The model's tensors of a checkpoint in any known format, by name; each is read from its shards when it is asked for.

    Args:
        checkpoint_path: of a checkpoint, or a directory of checkpoints, whose newest whole one is taken.
        weights: ``regular`` or ``ema``.

    Raises:
        CheckpointError: it is not whole, damaged, or holds no such weights.
    """
    found = find_checkpoint(Path(checkpoint_path))
    plan = prepare(found, Options(checkpoint_type=weights))
    return StateDict(plan.wanted, Source(found.listing, [target.source for target in plan.wanted]))
