"""The flags of ``python -m assayer.worker``: eval workers by hand, here, in the foreground."""

import logging
import os
import signal
import sys

import click

from assayer import cli
from assayer.errors import UsageError
from assayer.files import locked, printable
from assayer.plan import state_directory
from assayer.queues.connect import open_target, target
from assayer.worker.environ import gpu_uuids, parse_gpus, visible_gpus
from assayer.worker.launch import Crew, Slot, eval_slots, gpu_slots
from assayer.worker.supervise import Supervisor, retire_redis

__all__ = ["main"]

# What a scheduler can be told to send ahead of time. SIGINT means warm, SIGALRM keeps time limits, SIGKILL and SIGSTOP nobody can heed.
REQUEUE_SIGNALS = ("HUP", "QUIT", "TERM", "USR1", "USR2", "XCPU")


@cli.command("worker")
@click.option(
    "--num_workers", type=click.IntRange(min=1), metavar="N", help="Workers to run.  [default: one a visible GPU, one without GPU]"
)
@click.option("--gpus", metavar="LIST", help="GPUs to use: ids, UUIDs or MIG names, separated by commas.  [default: the visible ones]")
@click.option("--gpus_per_eval", type=click.IntRange(min=1), default=1, metavar="N", help="GPUs that each evaluation sees.")
@click.option(
    "--requeue_signal",
    metavar="NAME",
    help="A signal that does what SIGTERM does, such as USR1 for Slurm's --signal=B:USR1@60: running evaluations go back to the queue.",
)
@cli.redis_options
def main(
    num_workers: int | None,
    gpus: str | None,
    gpus_per_eval: int,
    requeue_signal: str | None,
    redis_url: str | None,
    redis_host: str | None,
    redis_port: int | None,
    watch_queue_name: str,
    eval_queue_name: str,
) -> None:
    """Runs eval workers in the foreground, here or on any machine that sees the Redis and the files.

    Ctrl-C ends them after the running evaluation, a second Ctrl-C at once. SIGTERM, as a preemption sends it, ends them within 20 s, with
    exit code 0. An interrupted evaluation goes back to the front of the queue, and no attempt of it is counted.
    """
    requeue_signals = _requeue_signals(requeue_signal)
    state = state_directory()
    chosen = target(redis_url, redis_host, redis_port, state)
    slots = _slots(num_workers, gpus, gpus_per_eval, eval_queue_name, chosen.name)
    open_target(chosen, state).close()
    crew = Crew(state, chosen)
    free = [slot for slot in slots if not crew.is_held(slot)]
    for slot in slots:
        if slot not in free:
            click.echo(f"{slot.label}: a worker stands there already", err=True)
    if not free:
        raise UsageError("every slot has its worker; free one, or name other GPUs with --gpus")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    supervisor = Supervisor(crew, lambda: free, daemon=False, say=lambda line: click.echo(line, err=True), requeue_signals=requeue_signals)
    supervisor.run()
    if supervisor.redis_answers and not crew.is_supervised():
        with locked(crew.gate):
            retire_redis(crew)


def _requeue_signals(name: str | None) -> tuple[int, ...]:
    """SIGTERM, and the signal of this name.

    Raises:
        UsageError: no signal of this name can be heeded.
    """
    short = (name or "TERM").upper().removeprefix("SIG")
    if short not in REQUEUE_SIGNALS:
        raise UsageError(f"--requeue_signal {printable(str(name))} must be one of {', '.join(REQUEUE_SIGNALS)}, with or without SIG")
    return tuple(sorted({int(signal.SIGTERM), int(signal.Signals[f"SIG{short}"])}))


def _slots(count: int | None, gpus: str | None, each: int, queue: str, redis: str) -> list[Slot]:
    """The slots that these flags ask for.

    Raises:
        UsageError: the flags contradict each other, or there are too few GPUs.
    """
    if gpus is None:
        if 1 < each > len(visible_gpus(os.environ)):
            raise UsageError(f"fewer than {each} GPUs are visible here (--gpus_per_eval): name them with --gpus, such as --gpus 0,1,2,3")
        return eval_slots(queue, count, redis, os.environ, each)
    names = parse_gpus(gpus)
    if len(names) % each or not names:
        raise UsageError(f"--gpus {gpus} names {len(names)} GPUs, which cannot be shared out {each} to each evaluation (--gpus_per_eval)")
    known = gpu_uuids()
    for name in names:
        if known and name.isdigit() and name not in known:
            raise UsageError(f"there is no GPU {name} on this machine; nvidia-smi -L lists {', '.join(known)}")
    if not known:
        click.echo("assayer: warning: nvidia-smi lists no GPU on this machine; the workers see what CUDA makes of --gpus", err=True)
    slots = gpu_slots(queue, names, each)
    if count is not None and count > len(slots):
        raise UsageError(f"--num_workers {count} needs {count * each} GPUs, --gpus names {len(names)}")
    return slots[:count]
