"""What watches publish in Redis: their plans, what they saw of each checkpoint, and when they look again.

Redis is only told; the plans are on disk (``plan.py``), and done is what has a record (``record.py``). Of what is settled only the last
checkpoints stay in sight, so that neither Redis nor a tick grows with what was evaluated long ago.
"""

import json
import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from assayer.plan import Baseline, Plan
from assayer.queues import Connection

__all__ = ["Board", "Note", "queues_with_watches"]

logger = logging.getLogger(__name__)

# Seconds that the last sight of a watch stays readable after it has ended.
KEEP = 86400
# The names of the watch queues that have, or had, a plan.
_QUEUES = "assayer:watch-queues"


@dataclass(frozen=True)
class Note:
    """What one look at a watch leaves: when the next one is due, its own moment, since when nothing has happened, what hinders it.

    Times in seconds since the epoch; None: as it was.
    """

    plan_id: str
    next: float
    last: float | None = None
    active_at: float | None = None
    problem: str | None = None


class Board:
    """The keys of all watches on one watch queue, below ``assayer:<queue>:``."""

    def __init__(self, connection: Connection, queue: str) -> None:
        self.connection = connection
        self.queue = queue
        self._prefix = f"assayer:{queue}:"
        self._ids = f"{self._prefix}plans"
        self._ended = f"{self._prefix}ended"
        # One hash (or sorted set) for all watches of the queue each, by plan: a tick reads and writes them in one go.
        self._due, self._given = f"{self._prefix}due", f"{self._prefix}given"
        self._last, self._problem, self._active = f"{self._prefix}last", f"{self._prefix}problem", f"{self._prefix}active"
        self._last_word = f"{self._prefix}last-word"
        self._version, self._left_out = f"{self._prefix}version", f"{self._prefix}left-out"

    def plan_key(self, plan_id: str) -> str:
        return f"{self._prefix}plan:{plan_id}"

    def sight_key(self, plan_id: str) -> str:
        return f"{self._prefix}sight:{plan_id}"

    def _baseline_key(self, plan_id: str) -> str:
        return f"{self._prefix}baseline:{plan_id}"

    def put(self, plan: Plan, baseline: Baseline) -> None:
        """Publishes a plan with its baseline; the next tick serves it at once."""
        with self.connection.pipeline() as pipe:
            pipe.sadd(_QUEUES, self.queue)
            pipe.set(self.plan_key(plan.id), json.dumps(plan.to_json()))
            pipe.set(self._baseline_key(plan.id), json.dumps(baseline.to_json()))
            pipe.sadd(self._ids, plan.id)
            pipe.hdel(self._ended, plan.id)
            pipe.hset(self._given, plan.id, repr(plan.given))
            pipe.hset(self._active, plan.id, time.time())
            pipe.hdel(self._last, plan.id)
            pipe.hdel(self._problem, plan.id)
            pipe.hdel(self._last_word, plan.id)
            pipe.zadd(self._due, {plan.id: 0})
            pipe.persist(self.sight_key(plan.id))
            pipe.execute()

    def ids(self) -> set[str]:
        """The ids of the plans that run."""
        return {i.decode() for i in self.connection.smembers(self._ids)}

    def plans(self, only: Iterable[str] | None = None) -> list[Plan]:
        """The plans that run (or those of these ids), by directory and evaluator."""
        ids = sorted(self.ids() if only is None else only)
        found = self.connection.mget([self.plan_key(i) for i in ids]) if ids else []
        plans = []
        for plan_id, text in zip(ids, found, strict=True):
            if text:
                try:
                    plans.append(Plan.from_json(json.loads(text)))
                except (TypeError, KeyError, ValueError, AttributeError):
                    logger.warning("plan %s on queue %s is of another version of assayer; it is passed over", plan_id, self.queue)
        return sorted(plans, key=lambda plan: (plan.directory, plan.evaluator.name))

    def baseline(self, plan: Plan) -> Baseline | None:
        """The baseline of a plan; None when it is not here, because the plan was replaced or taken off meanwhile."""
        text = self.connection.get(self._baseline_key(plan.id)) if plan.baseline else b"[]"
        baseline = None if text is None else Baseline(json.loads(text))
        return baseline if baseline is not None and baseline.name == plan.baseline else None

    def has(self, plan_id: str) -> bool:
        return bool(self.connection.exists(self.plan_key(plan_id)))

    def remove(self, plan: Plan, last_word: str = "") -> bool:
        """Takes a plan off; True when it was there. A tick that is serving it notices before it queues another evaluation.

        ``last_word``: what went wrong and will not be mended any more; it stays readable as long as the last sight.
        """
        with self.connection.pipeline() as pipe:
            pipe.delete(self.plan_key(plan.id))
            pipe.delete(self._baseline_key(plan.id))
            pipe.srem(self._ids, plan.id)
            pipe.zrem(self._due, plan.id)
            pipe.hset(self._ended, plan.id, repr(plan.given))
            pipe.expire(self._ended, KEEP)
            pipe.expire(self.sight_key(plan.id), KEEP)
            for key in (self._given, self._active, self._last, self._problem):
                pipe.hdel(key, plan.id)
            if last_word:
                pipe.hset(self._last_word, plan.id, last_word)
                pipe.expire(self._last_word, KEEP)
            return bool(pipe.execute()[0])

    def ended(self, plan: Plan) -> bool:
        """True when this very plan was taken off, so that it is not missing by a loss of data."""
        given = self.connection.hget(self._ended, plan.id)
        return given is not None and float(given) >= plan.given

    def sights(self, plan_id: str) -> dict[str, dict[str, Any]]:
        """What the ticks saw: for each path its name, state, reason, step, job and, once it is done, its record's main fields.

        All that is under way, and of what is settled the last checkpoints; ``versions`` tells how many others there were.
        """
        found = self.connection.hgetall(self.sight_key(plan_id))
        return {path.decode("utf-8", "surrogateescape"): json.loads(text) for path, text in found.items()}

    def publish(self, plan_id: str, changed: dict[str, dict[str, Any]], gone: list[str], left_out: int) -> None:
        """Brings the sights of a watch up to date; paths in ``gone`` are taken out, ``left_out`` settled ones are not there."""
        key = self.sight_key(plan_id)
        if not changed and not gone:
            return
        with self.connection.pipeline() as pipe:
            if changed:
                pipe.hset(key, mapping={_field(path): json.dumps(sight) for path, sight in changed.items()})
            if gone:
                pipe.hdel(key, *[_field(path) for path in gone])
            pipe.hset(self._left_out, plan_id, left_out)
            pipe.hincrby(self._version, plan_id, 1)
            pipe.execute()

    def versions(self, plan_ids: list[str]) -> list[tuple[int, str, int]]:
        """Of each plan a number that grows with each change of its sights, what hinders it (of one that has ended its last word), and how
        many settled ones are left out."""
        with self.connection.pipeline(transaction=False) as pipe:
            for key in (self._version, self._problem, self._last_word, self._left_out):
                pipe.hmget(key, plan_ids)
            versions, problems, last_words, settled = pipe.execute() if plan_ids else ([], [], [], [])
        return [
            (int(version or 0), (problem or last_word or b"").decode("utf-8", "replace"), int(count or 0))
            for version, problem, last_word, count in zip(versions, problems, last_words, settled, strict=True)
        ]

    def tick(self, plan_id: str) -> dict[str, Any]:
        """When a watch looked last, when it looks next, and what hinders it: ``last``, ``next``, ``problem``, ``active_at``."""
        last, active, problem = (self.connection.hget(key, plan_id) for key in (self._last, self._active, self._problem))
        moments = {"last": last, "next": self.connection.zscore(self._due, plan_id), "active_at": active}
        return {
            **{name: float(moment) for name, moment in moments.items() if moment is not None},
            "problem": (problem or b"").decode("utf-8", "replace"),
        }

    def active_at(self, plan_ids: list[str]) -> list[float | None]:
        """Since when nothing has happened in each of these watches."""
        found = self.connection.hmget(self._active, plan_ids) if plan_ids else []
        return [None if moment is None else float(moment) for moment in found]

    def note(self, notes: list[Note]) -> None:
        """Writes down what looks have left; of a plan that was taken off meanwhile nothing stays for long."""
        if not notes:
            return
        with self.connection.pipeline() as pipe:
            # A plan that was taken off in the meantime must not come back as due: only what is there is changed.
            pipe.zadd(self._due, {note.plan_id: note.next for note in notes}, xx=True)
            fields = (("last", self._last), ("active_at", self._active))
            for name, key in fields:
                moments = {note.plan_id: getattr(note, name) for note in notes if getattr(note, name) is not None}
                if moments:
                    pipe.hset(key, mapping=moments)
            problems = {note.plan_id: note.problem for note in notes if note.problem}
            well = [note.plan_id for note in notes if note.problem == ""]
            if problems:
                pipe.hset(self._problem, mapping=problems)
            if well:
                pipe.hdel(self._problem, *well)
            pipe.execute()

    def given(self) -> dict[str, float]:
        """When each plan that runs was given: what tells a plan from its successor."""
        return {plan_id.decode(): float(given) for plan_id, given in self.connection.hgetall(self._given).items()}

    def due(self, now: float) -> list[str]:
        """The ids of the plans whose next look has come, the longest overdue first."""
        return [plan_id.decode() for plan_id in self.connection.zrangebyscore(self._due, "-inf", now)]

    def next_due(self, after: float | None = None) -> float | None:
        """When the earliest plan (or the earliest after a moment) is to be served, in seconds since the epoch; None when there is none."""
        least = "-inf" if after is None else f"({after!r}"
        first = self.connection.zrangebyscore(self._due, least, "+inf", start=0, num=1, withscores=True)
        return float(first[0][1]) if first else None

    def newest_key(self) -> str:
        """The hash that names, for each watch with ``--latest_only``, the job of the newest checkpoint that waits."""
        return f"{self._prefix}newest"


def queues_with_watches(connection: Connection) -> list[str]:
    """Names of the watch queues on this Redis that have a plan."""
    names = sorted(name.decode() for name in connection.smembers(_QUEUES))
    return [name for name in names if connection.exists(f"assayer:{name}:plans")]


def _field(path: str) -> bytes:
    return path.encode("utf-8", "surrogateescape")
