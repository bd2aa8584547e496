"""``python -m savers``: saves when it is told to, by the trainers' own savers, in processes that may be killed.

A line on standard input is an order (``Order`` as JSON); the answer is the processes' group, and when all of them have ended their status.
torch is imported once; the ranks of a save are forked from there.
"""

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from trainers import save_expected

# 48 MB: a save takes some tenths of a second.
ROWS, COLUMNS, TENSORS = 2048, 1024, 6


@dataclass(frozen=True)
class Order:
    """``saver`` by its function's name; ``seed`` tells the values."""

    saver: str
    path: str
    seed: int
    ranks: int = 1


def values(seed: int) -> dict[str, torch.Tensor]:
    """Six tensors, others with every seed."""
    first = torch.arange(ROWS * COLUMNS, dtype=torch.float32).reshape(ROWS, COLUMNS)
    return {f"layers.{at}.weight": first + 1000.0 * seed + at for at in range(TENSORS)}


def expected(order: Order) -> dict[str, torch.Tensor]:
    """The tensors that a save is to hold."""
    from safetensors.torch import load_file

    written = expected_file(order)
    return load_file(written) if written.exists() else values(order.seed)


def expected_file(order: Order) -> Path:
    return Path(order.path).parent / "expected" / f"{order.seed}.safetensors"


def sharded(seed: int) -> dict[str, Any]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    local = {name: value.chunk(dist.get_world_size())[dist.get_rank()].clone() for name, value in values(seed).items()}
    return {name: DTensor.from_local(value, mesh, [Shard(0)], run_check=False) for name, value in local.items()}


def dcp(order: Order) -> None:
    from torch.distributed.checkpoint.state_dict_saver import save

    save({"model": sharded(order.seed)}, checkpoint_id=order.path)


def dcp_async(order: Order) -> None:
    from torch.distributed.checkpoint.state_dict_saver import async_save

    pending: Any = async_save({"model": sharded(order.seed)}, checkpoint_id=order.path)
    pending.result()


def dcp_rank_local(order: Order) -> None:
    from torch.distributed.checkpoint.state_dict_saver import save

    save({"model": sharded(order.seed)}, checkpoint_id=order.path, use_collectives=False)


def rank_files(order: Order) -> None:
    """LMMs-Engine's order: the ranks write when they come to it, the first one its config before the others have begun."""
    folder = Path(order.path) / "pytorch_model_fsdp_0"
    folder.mkdir(parents=True, exist_ok=True)
    state = sharded(order.seed)
    dist.barrier()
    time.sleep(0.15 * dist.get_rank())
    torch.save(state, folder / f"model_world_size_{dist.get_world_size()}_rank_{dist.get_rank()}.pt")
    if dist.get_rank() == 0:
        (Path(order.path) / "config.json").write_text("{}")


def single_file(order: Order) -> None:
    torch.save(values(order.seed), order.path)


def lightning_file(order: Order) -> None:
    from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

    state = {"state_dict": values(order.seed), "epoch": 1, "global_step": order.seed}
    TorchCheckpointIO().save_checkpoint(state, order.path)


def accelerate(order: Order) -> None:
    from accelerate import Accelerator  # type: ignore[import-untyped]

    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList(torch.nn.Linear(1, 1, bias=False) for _ in range(TENSORS))
    for layer, value in zip(model.layers, values(order.seed).values(), strict=True):
        layer.weight = torch.nn.Parameter(value)
    accelerator = Accelerator(cpu=True)
    prepared = accelerator.prepare(model)
    accelerator.prepare(torch.optim.SGD(prepared.parameters(), lr=0.1))
    accelerator.save_state(order.path)


def accelerate_fsdp(order: Order) -> None:
    from accelerate import Accelerator
    from trainers import fsdp

    fsdp.reset()
    accelerator = Accelerator(cpu=True)
    fsdp.use_fsdp(accelerator, 2, "SHARDED_STATE_DICT")
    _, _, weights = fsdp.prepared(accelerator, order.seed)
    _remember(order, weights)
    accelerator.save_state(order.path)


def deepspeed_2(order: Order) -> None:
    _deepspeed(order, 2)


def deepspeed_3(order: Order) -> None:
    _deepspeed(order, 3)


def _deepspeed(order: Order, stage: int) -> None:
    """DeepSpeed's files in its order, with time between them: the model's, the optimizer's, then ``latest``."""
    from trainers import zero

    save: Any = torch.save

    def slow(*given: Any) -> None:
        save(*given)
        time.sleep(0.02)

    torch.save = slow  # type: ignore[assignment]
    path = Path(order.path)
    _remember(order, zero.expected(zero.model()))
    if stage == 3:
        zero.zero_3(path, 30)
    else:
        zero.zero_1_2(path, stage, 30)
    (path.parent / "latest").write_text(path.name)


def _remember(order: Order, weights: dict[str, torch.Tensor]) -> None:
    if not dist.is_initialized() or dist.get_rank() == 0:
        save_expected(Path(order.path).parent, str(order.seed), weights)


SAVERS: dict[str, Callable[[Order], None]] = {
    made.__name__: made
    for made in (
        dcp,
        dcp_async,
        dcp_rank_local,
        rank_files,
        single_file,
        lightning_file,
        accelerate,
        accelerate_fsdp,
        deepspeed_2,
        deepspeed_3,
    )
}
# Those that every rank takes part in, through torch's own process group.
COLLECTIVE = ("dcp", "dcp_async", "dcp_rank_local", "rank_files", "accelerate_fsdp")
# What is imported before the first rank is forked.
IMPORTS = {
    "lightning_file": "lightning.fabric.plugins.io.torch_io",
    "accelerate": "accelerate",
    "accelerate_fsdp": "trainers.fsdp",
    **dict.fromkeys(("deepspeed_2", "deepspeed_3"), "trainers.zero"),
    **dict.fromkeys(("dcp", "dcp_async", "dcp_rank_local"), "torch.distributed.checkpoint.state_dict_saver"),
}


def _rank(order: Order, rank: int, store: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(order.ranks), "LOCAL_WORLD_SIZE": str(order.ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    if order.saver in COLLECTIVE:
        dist.init_process_group("cpu:gloo", init_method=f"file://{store}", rank=rank, world_size=order.ranks)
    else:
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
            del os.environ[name]
    SAVERS[order.saver](order)
    if order.saver in COLLECTIVE:
        dist.barrier()


def _carry_out(order: Order) -> None:
    if order.saver in IMPORTS:
        __import__(IMPORTS[order.saver])
    with tempfile.TemporaryDirectory() as folder:
        children: list[int] = []
        for rank in range(order.ranks):
            child = os.fork()
            if not child:
                os.setpgid(0, children[0] if children else 0)
                status = 1
                try:
                    _rank(order, rank, f"{folder}/store")
                    status = 0
                except BaseException:
                    traceback.print_exc()
                finally:
                    sys.stderr.flush()
                    os._exit(status)  # gloo's teardown may abort after a good save
            with suppress(OSError):
                os.setpgid(child, children[0] if children else child)
            children.append(child)
        print(children[0], flush=True)
        ended = [os.waitpid(child, 0)[1] for child in children]
        print(max(map(abs, ended)), flush=True)


class Savers:
    """The process that saves, seen from the tests."""

    def __init__(self, log: Path) -> None:
        settings = {"PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        self._log = log
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-W", "ignore", "-m", "savers"],
                env={**os.environ, **settings},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                bufsize=0,
            )

    @contextmanager
    def saving(self, order: Order) -> "Iterator[Save]":
        """One save, from its first moment on; the block's end waits for its end."""
        assert self._process.stdin
        self._process.stdin.write(json.dumps(asdict(order)).encode() + b"\n")
        save = Save(self._process, self._log)
        try:
            yield save
        finally:
            while not save.ended(1.0):
                pass

    def save(self, order: Order) -> None:
        """Saves to the end."""
        with self.saving(order) as save:
            pass
        assert save.status == 0, self._log.read_text()

    def close(self) -> None:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.close()
        self._process.wait(30)
        self._process.stdout.close()


class Save:
    """A save that is under way."""

    def __init__(self, process: "subprocess.Popen[bytes]", log: Path) -> None:
        assert process.stdout
        self._lines, self._log = process.stdout, log
        self.status: int | None = None
        self._group = int(self._line())

    def _line(self) -> bytes:
        line = self._lines.readline()
        if not line:
            raise RuntimeError(f"the savers' process died:\n{self._log.read_text()[-4000:]}")
        return line

    def ended(self, wait: float = 0.0) -> bool:
        """True when all ranks have ended; ``status`` is 0 when they ended well."""
        if self.status is None and select.select([self._lines], [], [], wait)[0]:
            self.status = int(self._line())
        return self.status is not None

    def kill(self) -> None:
        """Ends all ranks at once, without notice."""
        with suppress(ProcessLookupError):
            os.killpg(self._group, signal.SIGKILL)


if __name__ == "__main__":
    while given := sys.stdin.readline():
        _carry_out(Order(**json.loads(given)))
