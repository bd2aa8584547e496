"""``python -m trainers.gloo ROOT WORLD_SIZE``: every sample that takes more than one rank, in one run.

torch, transformers and accelerate are imported once; the ranks are forked from there. A rank ends without Python's teardown, since gloo's
may abort after a good save.
"""

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from trainers import Sample, fsdp, native, rank_files, save_samples, torch_dcp

WRITERS: tuple[Callable[[Path], list[Sample]], ...] = (*torch_dcp.WRITERS, *rank_files.WRITERS, *fsdp.WRITERS, *native.WRITERS)


def run_rank(root: Path, rank: int, world: int) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{root}/.store", rank=rank, world_size=world)
    samples = []
    for write in WRITERS:
        began = time.perf_counter()
        samples += write(root)
        dist.barrier()
        if rank == 0 and "TIMES" in os.environ:
            print(f"{write.__name__:24} {time.perf_counter() - began:6.2f} s", file=sys.stderr)
    if rank == 0:
        save_samples(root, samples)
    dist.barrier()


def fork_ranks(root: Path, world: int) -> bool:
    """True when every rank ended well; the first that did not ends the others."""
    ranks = set()
    for rank in range(world):
        child = os.fork()
        if not child:
            status = 1
            try:
                run_rank(root, rank, world)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(status)
        ranks.add(child)
    good = True
    while ranks:
        child, status = os.wait()
        ranks.discard(child)
        if status and good:
            good = False
            print(f"a rank ended with {os.waitstatus_to_exitcode(status)}", file=sys.stderr)
            for other in ranks:
                os.kill(other, signal.SIGKILL)
    (root / ".store").unlink(missing_ok=True)
    return good


if __name__ == "__main__":
    sys.exit(0 if fork_ranks(Path(sys.argv[1]).absolute(), int(sys.argv[2])) else 1)
