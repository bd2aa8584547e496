"""What watches publish in Redis: their plans, what they saw of each checkpoint, and when they look again.

Redis is only told; the plans are on disk (``plan.py``), and done is what has a record (``record.py``).
"""

import contextlib
import json
import logging
import time
from typing import Any

from assayer.plan import Plan
from assayer.queues import Connection

__all__ = ["Board"]

logger = logging.getLogger(__name__)

# Seconds that the last sight of a watch stays readable after it has ended.
KEEP = 86400


class Board:
    """The keys of all watches on one watch queue, below ``assayer:<queue>:``."""

    def __init__(self, connection: Connection, queue: str) -> None:
        self.connection = connection
        self.queue = queue
        self._prefix = f"assayer:{queue}:"
        self._ids = f"{self._prefix}plans"
        self._ended = f"{self._prefix}ended"

    def plan_key(self, plan_id: str) -> str:
        return f"{self._prefix}plan:{plan_id}"

    def sight_key(self, plan_id: str) -> str:
        return f"{self._prefix}sight:{plan_id}"

    def tick_key(self, plan_id: str) -> str:
        return f"{self._prefix}tick:{plan_id}"

    def put(self, plan: Plan) -> None:
        """Publishes a plan; the next tick serves it at once."""
        with self.connection.pipeline() as pipe:
            pipe.set(self.plan_key(plan.id), json.dumps(plan.to_json()))
            pipe.sadd(self._ids, plan.id)
            pipe.hdel(self._ended, plan.id)
            pipe.hdel(self.tick_key(plan.id), "last", "problem")
            pipe.hset(self.tick_key(plan.id), mapping={"next": 0, "active_at": time.time(), "given": repr(plan.given)})
            pipe.persist(self.sight_key(plan.id))
            pipe.execute()

    def plans(self) -> list[Plan]:
        """The plans that run, by directory and evaluator."""
        ids = sorted(i.decode() for i in self.connection.smembers(self._ids))
        if not ids:
            return []
        found = self.connection.mget([self.plan_key(i) for i in ids])
        plans = []
        for plan_id, text in zip(ids, found, strict=True):
            if text:
                try:
                    plans.append(Plan.from_json(json.loads(text)))
                except (TypeError, KeyError, ValueError, AttributeError):
                    logger.warning("plan %s on queue %s is of another version of assayer; it is passed over", plan_id, self.queue)
        return sorted(plans, key=lambda plan: (plan.directory, plan.evaluator.name))

    def has(self, plan_id: str) -> bool:
        return bool(self.connection.exists(self.plan_key(plan_id)))

    def remove(self, plan: Plan) -> bool:
        """Takes a plan off; True when it was there. A tick that is serving it notices before it queues another evaluation."""
        with self.connection.pipeline() as pipe:
            pipe.delete(self.plan_key(plan.id))
            pipe.srem(self._ids, plan.id)
            pipe.hset(self._ended, plan.id, repr(plan.given))
            pipe.expire(self._ended, KEEP)
            pipe.expire(self.sight_key(plan.id), KEEP)
            pipe.expire(self.tick_key(plan.id), KEEP)
            return bool(pipe.execute()[0])

    def ended(self, plan: Plan) -> bool:
        """True when this very plan was taken off, so that it is not missing by a loss of data."""
        given = self.connection.hget(self._ended, plan.id)
        return given is not None and float(given) >= plan.given

    def sights(self, plan_id: str) -> dict[str, dict[str, Any]]:
        """What the last tick saw: for each path its name, state, reason, step, job and, once it is done, its record's main fields."""
        found = self.connection.hgetall(self.sight_key(plan_id))
        return {path.decode("utf-8", "surrogateescape"): json.loads(text) for path, text in found.items()}

    def publish(self, plan_id: str, changed: dict[str, dict[str, Any]], gone: list[str]) -> None:
        """Brings the sights of a watch up to date; paths in ``gone`` are taken out."""
        key = self.sight_key(plan_id)
        with self.connection.pipeline() as pipe:
            if changed:
                pipe.hset(key, mapping={_field(path): json.dumps(sight) for path, sight in changed.items()})
            if gone:
                pipe.hdel(key, *[_field(path) for path in gone])
            if changed or gone:
                pipe.execute()

    def tick(self, plan_id: str) -> dict[str, Any]:
        """When a watch looked last, when it looks next, and what hinders it: ``last``, ``next``, ``problem``, ``active_at``."""
        found = {k.decode(): v.decode("utf-8", "replace") for k, v in self.connection.hgetall(self.tick_key(plan_id)).items()}
        return {
            **{name: float(found[name]) for name in ("last", "next", "active_at") if name in found},
            "problem": found.get("problem", ""),
        }

    def note_tick(self, plan_id: str, **values: object) -> None:
        with self.connection.pipeline() as pipe:
            pipe.hset(self.tick_key(plan_id), mapping={name: str(value) for name, value in values.items()})
            # A tick that was overtaken by a shutdown leaves nothing behind for ever.
            pipe.expire(self.tick_key(plan_id), 30 * KEEP)
            pipe.execute()

    def is_current(self, plan: Plan) -> bool:
        """False when the watch was stopped or given anew since ``plan`` was read."""
        given = self.connection.hget(self.tick_key(plan.id), "given")
        return self.has(plan.id) and given is not None and float(given) == plan.given

    def due(self, plans: list[Plan], now: float) -> list[Plan]:
        """The plans whose next look has come."""
        with self.connection.pipeline(transaction=False) as pipe:
            for plan in plans:
                pipe.hget(self.tick_key(plan.id), "next")
            moments = pipe.execute()
        return [plan for plan, moment in zip(plans, moments, strict=True) if float(moment or 0) <= now]

    def next_due(self, plans: list[Plan]) -> float:
        """When the earliest of these plans is to be served, in seconds since the epoch."""
        with self.connection.pipeline(transaction=False) as pipe:
            for plan in plans:
                pipe.hget(self.tick_key(plan.id), "next")
            return min((float(moment or 0) for moment in pipe.execute()), default=time.time())


def queues_with_watches(connection: Connection) -> list[str]:
    """Names of the watch queues on this Redis that have a plan."""
    found = []
    for key in connection.scan_iter("assayer:*:plans", count=1000):
        with contextlib.suppress(UnicodeDecodeError):
            found.append(key.decode().removeprefix("assayer:").removesuffix(":plans"))
    return sorted(found)


def _field(path: str) -> bytes:
    return path.encode("utf-8", "surrogateescape")
