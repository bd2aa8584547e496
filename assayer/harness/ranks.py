"""Several processes for one evaluation: each answers a share of the requests, rank 0 gets all answers."""

import contextlib
import datetime
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

__all__ = ["Ranks", "ranks"]


@dataclass(frozen=True)
class Ranks:
    """This process among those of its evaluation."""

    rank: int = 0
    world_size: int = 1

    def gather(self, value: Any) -> list[Any]:
        """What every rank gave, by rank, on rank 0; an empty list on the others."""
        if self.world_size == 1:
            return [value]
        import torch.distributed

        found: list[Any] | None = [None] * self.world_size if self.rank == 0 else None
        torch.distributed.gather_object(value, found, dst=0)
        return found or []

    def wait(self) -> None:
        """Returns when every rank has come here."""
        if self.world_size > 1:
            import torch.distributed

            torch.distributed.barrier()


@contextlib.contextmanager
def ranks() -> Iterator[Ranks]:
    """The processes that the environment tells of (RANK, WORLD_SIZE, as torchrun sets them), joined by gloo while the block runs.

    Only answers travel, so gloo serves on GPUs too. A rank waits for another's answers for as long as the launcher lets it.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        yield Ranks()
        return
    import torch.distributed

    torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(days=30))
    try:
        yield Ranks(torch.distributed.get_rank(), world_size)
    finally:
        torch.distributed.destroy_process_group()
