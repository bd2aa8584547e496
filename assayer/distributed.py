"""The processes of one evaluation, as a launcher such as torchrun starts them: which of them this one is, and what they tell each other."""

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

__all__ = ["Ranks", "joined", "rank_of_process"]

# How long a rank waits for the others; when one dies the launcher ends them all.
_PATIENCE = timedelta(days=30)


def rank_of_process() -> tuple[int, int]:
    """This process's rank and the number of ranks, as ``RANK`` and ``WORLD_SIZE`` say; one process alone is 0 of 1."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


@dataclass(frozen=True)
class Ranks:
    """This process among those of its evaluation; ``group`` is torch's, None where it is alone. All ranks make the same calls."""

    rank: int = 0
    world_size: int = 1
    group: Any = None

    def gather(self, value: Any) -> list[Any]:
        """What every rank gave, by rank, on rank 0; an empty list on the others."""
        if self.world_size == 1:
            return [value]
        import torch.distributed as dist

        found: list[Any] | None = [None] * self.world_size if self.rank == 0 else None
        dist.gather_object(value, found, dst=0, group=self.group)
        return found or []

    def summed(self, values: Mapping[str, float]) -> dict[str, float]:
        """The sums of these values over all ranks, as float64 (whole numbers below 2^53 stay exact); one process alone has its own back."""
        if self.world_size == 1:
            return dict(values)
        import torch
        import torch.distributed as dist

        tensor = torch.tensor(list(values.values()), dtype=torch.float64)
        dist.all_reduce(tensor, group=self.group)
        return dict(zip(values, tensor.tolist(), strict=True))

    def wait(self) -> None:
        """Returns when every rank has come here."""
        if self.world_size > 1:
            import torch.distributed as dist

            dist.barrier(group=self.group)


@contextlib.contextmanager
def joined() -> Iterator[Ranks]:
    """The processes that the environment tells of, joined by gloo while the block runs: only results travel, so it serves on GPUs too.

    Where a process group is there already, it stays.
    """
    rank, world_size = rank_of_process()
    if world_size == 1:
        yield Ranks()
        return
    import torch.distributed as dist

    ours = not dist.is_initialized()
    if ours:
        dist.init_process_group("gloo", rank=rank, world_size=world_size, timeout=_PATIENCE)
    group = dist.group.WORLD if ours else dist.new_group(backend="gloo", timeout=_PATIENCE)
    try:
        yield Ranks(rank, world_size, group)
    finally:
        dist.destroy_process_group(group)
