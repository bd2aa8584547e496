"""Several processes of one evaluation, as a launcher such as torchrun starts them: which of them this one is, and sums over all."""

import os
from collections.abc import Mapping
from datetime import timedelta

__all__ = ["rank_of_process", "summed"]

# How long a rank waits for the others; when one dies the launcher ends them all.
_PATIENCE = timedelta(days=1)


def rank_of_process() -> tuple[int, int]:
    """This process's rank and the number of ranks, as ``RANK`` and ``WORLD_SIZE`` say; one process alone is 0 of 1."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def summed(values: Mapping[str, float]) -> dict[str, float]:
    """The sums of these values over all ranks, which all call this; over gloo, as float64 (whole numbers below 2^53 stay exact).

    A process group that is there is used; one that is made for it is ended. One process alone has its own values back.
    """
    rank, world_size = rank_of_process()
    if world_size == 1:
        return dict(values)
    import torch
    import torch.distributed as dist

    ours = not dist.is_initialized()
    if ours:
        dist.init_process_group("gloo", rank=rank, world_size=world_size, timeout=_PATIENCE)
    try:
        group = None if ours else dist.new_group(backend="gloo", timeout=_PATIENCE)
        tensor = torch.tensor(list(values.values()), dtype=torch.float64)
        dist.all_reduce(tensor, group=group)
        return dict(zip(values, tensor.tolist(), strict=True))
    finally:
        if ours:
            dist.destroy_process_group()
