"""One of the processes of an evaluation, as torchrun or accelerate starts it: ``python -m assayer.worker.rank ORDERS``.

The evaluator runs in a child of this process, so that a rank which is killed leaves word of that, too.
"""

import mmap
import os
import struct
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from assayer.files import read_json, write_json
from assayer.worker import child
from assayer.worker.call import Call, make
from assayer.worker.ranks import FROM_ENVIRONMENT, word_of


def main() -> None:
    """Makes the call that the orders tell, and leaves word of how it ended, and when."""
    # The launcher started this process in a session of its own, out of reach of whoever ends the launcher.
    child.die_with_parent(os.getppid())
    orders = read_json(Path(sys.argv[1]))
    if orders is None:
        # Whoever gave them has gone meanwhile.
        sys.exit(1)
    for name in [name for name in os.environ if name.startswith(FROM_ENVIRONMENT)]:
        del os.environ[name]
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    call = Call.from_json(orders["call"])
    moment = _Moment()

    def evaluate() -> dict[str, Any]:
        try:
            if orders["launcher"] == "accelerate":
                _settle_for_cpu()
            return make(call, rank, world_size, orders["point"]).to_json()
        except BaseException:
            # Before its peers can miss it.
            moment.note()
            raise

    ending = child.run(evaluate, None)
    moment.note()
    write_json(word_of(Path(sys.argv[1]).parent, rank), {"moment": moment.seconds, "ending": asdict(ending)}, 0o600)
    sys.exit(0 if ending.cause is None else 1)


def _settle_for_cpu() -> None:
    """Where there is no device, each rank would take itself for alone: accelerate must be told that the CPU is meant."""
    import torch

    devices = torch.accelerator if hasattr(torch, "accelerator") else torch.cuda
    if not devices.is_available():
        os.environ["ACCELERATE_USE_CPU"] = "true"


class _Moment:
    """When the evaluator ended, noted first by its own process where that comes to it, in seconds of the machine's monotonic clock."""

    def __init__(self) -> None:
        self._shared = mmap.mmap(-1, 8)

    def note(self) -> None:
        if not self.seconds:
            self._shared[:] = struct.pack("d", time.monotonic())

    @property
    def seconds(self) -> float:
        return float(struct.unpack("d", self._shared[:])[0])


if __name__ == "__main__":
    main()
