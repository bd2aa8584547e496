"""N workers, one a GPU slot: which are wanted on this host, which stand, and how the missing ones are started.

Workers belong to the host: commands raise the number that is wanted, and one supervisor (``supervise``) keeps as many. A slot is a lock
file that the worker's own process holds, so that no second worker ever stands on a GPU, whoever started the first.
"""

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from assayer.errors import StateError
from assayer.files import digest, is_locked, lock_file, locked, private_directory, read_json, try_lock, write_json
from assayer.plan import PlanStore, host_name
from assayer.queues.connect import Target
from assayer.queues.recover import WORKER_PREFIX
from assayer.refs import PACKAGE_PARENT
from assayer.session import servers
from assayer.worker.environ import evaluation_environment, gpu_uuids, visible_gpus

__all__ = ["ORDERS", "Crew", "Slot", "Started", "cpu_slots", "eval_slots", "gpu_slots", "revive_supervisor", "start_worker", "watch_slots"]

# The environment variable that carries a worker process's orders; a command line would show the Redis URL's password to everybody.
ORDERS = "ASSAYER_WORKER"


@dataclass(frozen=True)
class Slot:
    """One place for one worker. ``key`` names its lock; ``gpus`` are the GPUs it sees, None: no choice is made for it."""

    kind: str
    queue: str
    key: str
    gpus: tuple[str, ...] | None = None

    @property
    def label(self) -> str:
        return f"gpu{'+'.join(self.gpus)}" if self.gpus else self.kind

    @property
    def locks(self) -> list[str]:
        """The names of the locks that a worker of this slot holds: one a GPU."""
        return [f"gpu-{gpu}" for gpu in self.key.removeprefix("gpu-").split("+")] if self.gpus else [self.key]

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Slot":
        return cls(**{**value, "gpus": None if value["gpus"] is None else tuple(value["gpus"])})


def watch_slots(queue: str, count: int, redis: str) -> list[Slot]:
    """Slots for ``count`` watch workers of this queue on the Redis of this name."""
    return [Slot("watch", queue, f"watch-{digest(redis, queue)[:8]}-{i}") for i in range(count)]


def cpu_slots(queue: str, count: int, redis: str) -> list[Slot]:
    """Slots for ``count`` eval workers for which no GPU is chosen."""
    return [Slot("eval", queue, f"cpu-{digest(redis, queue)[:8]}-{i}") for i in range(count)]


def gpu_slots(queue: str, gpus: tuple[str, ...], each: int = 1) -> list[Slot]:
    """One slot for every ``each`` GPUs; GPUs that are left over have none. A GPU has one key, by id or by UUID."""
    uuids = gpu_uuids() if any(gpu.isdigit() for gpu in gpus) else {}
    groups = [gpus[i : i + each] for i in range(0, len(gpus) - each + 1, each)]
    return [Slot("eval", queue, "gpu-" + "+".join(uuids.get(g, g) for g in group).replace("/", "_"), group) for group in groups]


def eval_slots(queue: str, count: int | None, redis: str, environment: Mapping[str, str], each: int = 1) -> list[Slot]:
    """Slots for ``count`` eval workers (None: as many as there are visible GPUs for, one without GPU; 0: none) of ``each`` GPUs."""
    gpus = visible_gpus(environment)
    if not gpus:
        return cpu_slots(queue, 1 if count is None else count, redis)
    return gpu_slots(queue, gpus, each)[:count]


class Crew:
    """The workers of this host on one Redis: what is wanted is a file, what stands are locks."""

    def __init__(self, state: Path, target: Target) -> None:
        self.state = state
        self.target = target
        host = private_directory(private_directory(state / "workers") / host_name())
        self.slots_folder = private_directory(host / "slots")
        self.folder = private_directory(host / digest(target.name)[:16])
        self.supervisor_lock = self.folder / "supervisor.lock"
        self.gate = self.folder / "gate"
        self._wanted = self.folder / "wanted.json"

    @classmethod
    def of(cls, folder: Path) -> "Crew":
        """The crew whose files lie in ``folder``."""
        wanted = read_json(folder / "wanted.json")
        if not wanted:
            raise StateError(f"{folder} holds no wanted.json; start the watch again")
        return cls(Path(wanted["state"]), Target(wanted["url"], wanted["embedded"]))

    def wanted(self) -> list[Slot]:
        """The slots that commands have asked for."""
        return [Slot.from_json(slot) for slot in self._orders().get("slots", [])]

    def order_to_stop(self) -> str | None:
        """``warm`` (after the running evaluation) or ``now`` when the workers are to end; else None."""
        stop = self._orders().get("stop")
        return str(stop) if stop else None

    def want(self, slots: list[Slot]) -> list[Slot]:
        """Raises what is wanted by these slots, and returns those that were missing. Starts the supervisor where none runs."""
        with locked(self.gate):
            present = [] if self.order_to_stop() else self.wanted()
            missing = [slot for slot in slots if slot.key not in {p.key for p in present}]
            self._write([*present, *missing], None)
        self.start_supervisor()
        return missing

    def stop(self, how: str, keep_redis: bool = False) -> None:
        """Tells the supervisor to end the workers, ``warm`` or ``now``, and then itself; with ``keep_redis`` the caller ends the server.

        Of two orders, such as a shutdown's and that of the command whose watch it ended, the stronger one holds.
        """
        with locked(self.gate):
            self._write(self.wanted(), "now" if self.order_to_stop() == "now" else how, keep_redis or self.keeps_redis())
        if self.is_staffed():
            # Workers whose supervisor was killed have nobody else who would end them.
            self.start_supervisor()

    def is_staffed(self) -> bool:
        """True while the supervisor, or a worker that it should look after, lives."""
        return self.is_supervised() or any(self.is_ours(slot) for slot in self.wanted())

    def is_ours(self, slot: Slot) -> bool:
        """True while a worker stands in this slot that a supervisor of this crew's started as a daemon; one by hand has its own master."""
        facts = self.facts(slot)
        ours = facts.get("daemon") and facts.get("redis") == self.target.name and facts.get("queue") == slot.queue
        return bool(ours) and self.is_held(slot)

    def facts(self, slot: Slot) -> dict[str, Any]:
        """What is written of the worker that stands, or stood last, in this slot."""
        return read_json(self.slots_folder / f"{slot.locks[0]}.json") or {}

    def note_orderly(self, slot: Slot) -> None:
        """Notes that the last worker of this slot was told to leave, so that what it held counts for no lost worker when it comes back."""
        for name in slot.locks:
            path = self.slots_folder / f"{name}.json"
            write_json(path, {**(read_json(path) or {}), "orderly": True}, 0o600)

    def conflicts(self, slots: list[Slot]) -> list[str]:
        """A sentence for each slot in which no such worker can stand: it serves another queue or Redis, or has a GPU of another slot."""
        wanted = self.wanted()
        queues = {slot.key: slot.queue for slot in wanted}
        found = []
        for slot in slots:
            facts = self.facts(slot)
            if queues.get(slot.key, slot.queue) != slot.queue:
                found.append(f"{slot.label} already serves the queue {queues[slot.key]}: no worker for {slot.queue} stands there")
            elif self.is_held(slot) and facts.get("redis", self.target.name) != self.target.name:
                found.append(f"{slot.label} already serves {facts['redis']}: no worker for {self.target.name} stands there")
            else:
                other = next((w for w in wanted if w.key != slot.key and not set(w.locks).isdisjoint(slot.locks)), None)
                if other:
                    found.append(
                        f"{slot.label} shares a GPU with {other.label}, a worker's slot of {len(other.gpus or ())}: one of the two cannot "
                        "start, and evaluations see the GPUs of the other; python -m assayer.shutdown ends the workers that stand"
                    )
        return found

    def keeps_redis(self) -> bool:
        """True when whoever gave the order to stop still needs the embedded server."""
        return bool(self._orders().get("keep_redis"))

    def drop(self, queues: set[str], how: str) -> set[str]:
        """Wants no workers any more on those of these queues that no watch uses, and returns their names; ``how``: warm or now."""
        with locked(self.gate):
            plans = list(PlanStore(self.state).active(self.target.name))
            used = {queue for plan in plans for queue in (plan.watch_queue, plan.eval_queue)}
            free = queues - used - {str(server["queue"]) for server in servers(self.state, self.target.name)}
            self._write([slot for slot in self.wanted() if slot.queue not in free], self.order_to_stop(), drop=how)
        return free

    def order_to_drop(self) -> str:
        """How the workers that are no longer wanted are to end."""
        return str(self._orders().get("drop") or "warm")

    def release_redis(self) -> None:
        """Takes the word back that the embedded server is still needed: the shutdown that gave it was broken off."""
        with locked(self.gate):
            self._write(self.wanted(), self.order_to_stop())

    def dismiss(self) -> None:
        """Forgets what was wanted: the supervisor has ended the workers. Called with the gate held."""
        self._write([], None)

    def is_supervised(self) -> bool:
        return is_locked(self.supervisor_lock)

    def start_supervisor(self) -> None:
        """Starts the supervisor as a daemon where none runs."""
        if self.is_supervised():
            return
        command = [sys.executable, "-m", "assayer.worker.supervise", str(self.folder)]
        done = subprocess.run(command, cwd=PACKAGE_PARENT, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
        if done.returncode:
            raise StateError(f"the supervisor of the workers did not start: {done.stderr.strip().splitlines()[-1:]}")

    def is_held(self, slot: Slot) -> bool:
        """True while a worker process, or an evaluation of its, lives in this slot."""
        return any(is_locked(self.slots_folder / f"{name}.lock") for name in slot.locks)

    def has_plans(self) -> bool:
        """True while a watch, or a server that stands on this host, needs these workers."""
        return bool(servers(self.state, self.target.name)) or any(True for _ in PlanStore(self.state).active(self.target.name))

    def _orders(self) -> dict[str, Any]:
        return read_json(self._wanted) or {}

    def _write(self, slots: list[Slot], stop: str | None, keep_redis: bool = False, drop: str = "warm") -> None:
        value = {"state": str(self.state), "url": self.target.url, "embedded": self.target.embedded, "drop": drop}
        value |= {"stop": stop, "keep_redis": keep_redis}
        write_json(self._wanted, {**value, "slots": [asdict(slot) for slot in slots]}, 0o600)


def revive_supervisor(folder: Path) -> None:
    """Starts the supervisor again when it has died while its workers live; a worker calls this now and then."""
    with contextlib.suppress(StateError, OSError):
        crew = Crew.of(folder)
        if not crew.order_to_stop() and crew.has_plans():
            crew.start_supervisor()


@dataclass(frozen=True)
class Started:
    """What came of starting a worker: its process (None: the slot is taken), what its slot says now, and what it said before."""

    process: "subprocess.Popen[bytes] | None"
    facts: dict[str, Any]
    before: dict[str, Any]


def start_worker(crew: Crew, slot: Slot, daemon: bool, output: int | None, requeue_signals: tuple[int, ...] = (signal.SIGTERM,)) -> Started:
    """Starts the worker of a slot, unless one stands there.

    Args:
        crew: whose worker it is.
        slot: where.
        daemon: it outlives its supervisor; else it ends, after its evaluation, when that does.
        output: descriptor for its standard output and error; None: this process's own.
        requeue_signals: each of them makes it give its evaluation back and end.
    """
    facts = [crew.slots_folder / f"{name}.json" for name in slot.locks]
    with contextlib.ExitStack() as stack:
        descriptors = []
        for path in facts:
            descriptor = lock_file(path.with_suffix(".lock"))
            stack.callback(os.close, descriptor)
            descriptors.append(descriptor)
            if not try_lock(descriptor, path):
                return Started(None, read_json(path) or {}, {})
        before = read_json(facts[0]) or {}
        name = f"{WORKER_PREFIX}{host_name()}-{slot.label}-{secrets.token_hex(3)}".replace("/", "_")
        orders = {
            "slot": asdict(slot),
            "name": name,
            "url": crew.target.url,
            "locks": descriptors,
            "parent": 0 if daemon else os.getpid(),
            "supervisor": str(crew.folder) if daemon else "",
            "requeue_signals": [int(number) for number in requeue_signals],
        }
        process = subprocess.Popen(
            [sys.executable, "-m", "assayer.worker.process"],
            cwd=PACKAGE_PARENT,
            env={**evaluation_environment(os.environ, slot.gpus if slot.kind == "eval" else ()), ORDERS: json.dumps(orders)},
            pass_fds=descriptors,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        said = {"name": name, "pid": process.pid, "queue": slot.queue, "redis": crew.target.name, "daemon": daemon}
        for path in facts:
            write_json(path, said, 0o600)
        return Started(process, said, before)
