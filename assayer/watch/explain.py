"""Everything that is known of one path: which format claims it, whether it is whole, held, queued or recorded, and what comes next."""

import os
import time
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rq.job import Job

from assayer import formats, kept
from assayer.checkpoint import Found, needed
from assayer.errors import UsageError
from assayer.files import printable
from assayer.plan import Baseline, Plan, PlanStore
from assayer.queues import Connection
from assayer.queues.board import Board
from assayer.queues.enqueue import job_id, open_queue
from assayer.record import OWN_FOLDERS, Place, read
from assayer.watch.diff import Decision, decide
from assayer.watch.look import place_of
from assayer.watch.ready import Seen, examine, why_not
from assayer.watch.scan import filtered, is_temporary
from assayer.worker import hold
from assayer.worker.hold import Held

__all__ = ["Explained", "explain"]


@dataclass(frozen=True)
class Explained:
    """What there is to say of a path; ``watches`` has, for each watch that looks there, its state and what happens next."""

    path: str
    format: str | None = None
    why: str = ""
    step: int | None = None
    epoch: float | None = None
    whole: bool = False
    missing: str = ""
    unchanged_since: str = ""
    identity: str = ""
    needs: dict[str, int] = field(default_factory=dict)
    held: str = ""
    watches: list[dict[str, Any]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[tuple[str, str]]:
        """A heading and a sentence a line, safe to print."""
        told = [("path", self.path)]
        told.append(("format", f"{self.format}: {self.why}" if self.format else f"none: {self.why}"))
        if self.format:
            position = f"step {self.step}" if self.step is not None else f"epoch {self.epoch:g}" if self.epoch is not None else "none told"
            told.append(("position", position))
            since = f", unchanged since {self.unchanged_since}" if self.unchanged_since else ""
            told.append(("whole", ("yes" if self.whole else f"no: {self.missing}") + since))
            told.append(("identity", self.identity or "not known before it is whole"))
            if self.needs:
                told.append(("needs", f"{self.needs['files']} of its {self.needs['of']} files, {self.needs['bytes']:,} bytes"))
        if self.format or self.held:
            told.append(("held", self.held or "no"))
        for watch in self.watches:
            told.append((f"{watch['evaluator']}", f"{watch['state']}: {watch['reason']}" if watch["reason"] else watch["state"]))
            told.append(("", f"next: {watch['next']}"))
        if not self.watches:
            told.append(
                ("watches", "none looks here: give a watch command with this directory (--eval_existing for what is there already)")
            )
        return [(heading, printable(text)) for heading, text in told]


def explain(path: str, plans: list[Plan], store: PlanStore, connection: Connection | None) -> Explained:
    """What is known of ``path``, a checkpoint's, an unfinished one's, or any other.

    Args:
        path: absolute.
        plans: the watches that are known, running or ended.
        store: has their baselines.
        connection: to the Redis of the watches; None where none runs.

    Raises:
        UsageError: nothing is there, was there, or is held.
    """
    looking = [plan for plan in plans if path == plan.root or path.startswith(os.path.join(plan.root, ""))]
    held = _held(path, looking)
    try:
        found = formats.identify_path(path)
    except FileNotFoundError:
        found = None
        is_known = any(place_of(plan, path).record.exists() or _sight(plan, path, connection) for plan in looking)
        if not is_known and not _told_of(path, held):
            raise UsageError(f"nothing lies at {printable(path)}, nothing is held of it, and no watch has a record of it") from None
        return Explained(
            path, why="nothing lies there any more", held=_told_of(path, held), watches=[_gone(p, path, held, connection) for p in looking]
        )
    except OSError as error:
        return Explained(path, why=f"it cannot be read: {error.strerror}", watches=[_passing(plan) for plan in looking])
    passed_over = _passed_over(path)
    if found is None or passed_over:
        return Explained(path, why=passed_over or _why_none(path), held=_told_of(path, held), watches=[_passing(plan) for plan in looking])
    now = time.time()
    quiet = max((plan.quiet_period for plan in looking), default=30.0)
    seen = examine(found, None, now, True, quiet)
    names = needed(found.listing, formats.of(found.checkpoint))
    sizes = [entry.size for entry in found.listing.entries if entry.name in names]
    return Explained(
        path,
        found.checkpoint.format,
        _why(found),
        found.checkpoint.position.step,
        found.checkpoint.position.epoch,
        seen.is_whole,
        why_not(seen, now, quiet) or "",
        _moment(seen.since),
        seen.identity or "",
        {"files": len(names), "of": len(found.listing.entries), "bytes": sum(sizes)},
        _told_of(path, held),
        [_watched(plan, store, seen, now, connection) for plan in looking],
    )


def _why(found: Found) -> str:
    """By which names the format claimed it, and over which wider ones it won."""
    form = formats.of(found.checkpoint)
    others = [name for name, other in formats.all_formats().items() if name != found.checkpoint.format and other.claims(found.listing)]
    names = list(form.weights(found.listing))
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    over = f"; it is narrower than {', '.join(others)}" if others else ""
    return f"it holds {shown or 'the names of one, and no weights yet'}{over}"


def _passed_over(path: str) -> str:
    """Why no look takes this path for a checkpoint, whatever it holds; empty where it may be one."""
    if os.path.islink(path):
        return "it is a symbolic link, which a watch does not follow"
    if is_temporary(os.path.basename(path)):
        return "its name says that it is not finished, or hidden"
    if OWN_FOLDERS.intersection(Path(path).parts):
        return "it lies in a folder of assayer's own"
    folder = os.path.dirname(path)
    above = formats.identify_path(folder)
    if above is None:
        return ""
    form = formats.of(above.checkpoint)
    is_part = os.path.isfile(path) and (
        above.checkpoint.position.number is not None or os.path.basename(path) in form.weights(above.listing)
    )
    return f"it is a part of {folder} ({above.checkpoint.format})" if is_part else ""


def _why_none(path: str) -> str:
    if not os.path.isdir(path):
        return "no format knows a file of this name"
    count = len(os.listdir(path))
    return f"it is a directory of {count} entries, which are not one checkpoint; checkpoints may lie in it"


def _held(path: str, plans: list[Plan]) -> Held | None:
    for results_dir in {None, *(plan.results_dir for plan in plans)}:
        for held in hold.held_in(Place.of(path, "e", results_dir).folder.parent / ".hold"):
            if held.checkpoint.path == path:
                return held
    return None


def _told_of(path: str, held: Held | None) -> str:
    told = [f"kept by a training, as {one.path}" for one in kept.of_checkpoint(path)]
    if held is not None:
        how = "read by an evaluation" if hold.is_read(held) else "waiting"
        told.insert(0, f"yes, as {held.path} (identity {held.identity[:8]}, {how})")
    return "; ".join(told)


def _watched(plan: Plan, store: PlanStore, seen: Seen, now: float, connection: Connection | None) -> dict[str, Any]:
    """One watch's view of a checkpoint that is there."""
    depth = len(Path(os.path.relpath(seen.checkpoint.path, plan.root)).parts)
    if not plan.is_pattern and depth > plan.max_depth and seen.checkpoint.path != plan.root:
        return _said(plan, "not looked at", f"it lies {depth} levels deep", f"nothing; --max_depth is {plan.max_depth}")
    if not filtered([Found(seen.checkpoint, seen.listing)], plan.root, plan.regex_filter):
        return _said(plan, "not looked at", f"--regex_filter {plan.regex_filter} does not match", "nothing")
    baseline = store.baseline(plan) if plan.baseline else Baseline()
    place = place_of(plan, seen.checkpoint.path)
    (decision,) = decide(plan, baseline, [seen], lambda s: place.find(s.identity or ""), now)
    return _decided(plan, decision, connection)


def _decided(plan: Plan, decision: Decision, connection: Connection | None) -> dict[str, Any]:
    seen, record = decision.seen, decision.record
    if record:
        place = place_of(plan, seen.checkpoint.path)
        again = "nothing until it is saved again (--reevaluate, or for a failure --retry_failed, evaluates it once more)"
        return _said(plan, f"recorded as {record.status}", f"{place.record}, {record.ended}", again)
    if decision.state == "baseline":
        return _said(plan, "not new", decision.reason, "nothing until it is saved again (--eval_existing evaluates what is there)")
    if decision.state == "skipped":
        return _said(plan, "skipped", decision.reason, "nothing")
    if not plan.active:
        return _said(plan, "not watched", "the watch has ended", "the next watch of this directory takes it up")
    if decision.state == "writing":
        return _said(
            plan, "not ready", decision.reason, f"it is looked at every {plan.polling_interval:g} s, and queued as soon as it is whole"
        )
    return _in_flight(plan, seen.checkpoint.path, seen.identity or "", connection) or _said(
        plan, "due", "it is whole and has no record", f"the next look, within {plan.polling_interval:g} s, queues it"
    )


def _in_flight(plan: Plan, path: str, identity: str, connection: Connection | None) -> dict[str, Any] | None:
    if connection is None:
        return None
    job = job_id(path, identity, plan.evaluator.name, plan.weights)
    status, worker = connection.hmget(Job.key_for(job), "status", "worker_name")
    if status == b"queued":
        queue = open_queue(connection, plan.eval_queue)
        place, count = connection.lpos(queue.key, job), queue.count
        where = f"place {place + 1} of {count} in the queue {queue.name}" if place is not None else "a worker is taking it"
        return _said(plan, "queued", where, "an eval worker takes it when its turn comes")
    if status == b"started":
        return _said(plan, "running", f"on {worker.decode() if worker else 'a worker'}", "its record is written when it ends")
    if status == b"failed":
        return _said(plan, "failing", "its job ended without a record", "it is queued again half a minute after that")
    return None


def _passing(plan: Plan) -> dict[str, Any]:
    """One watch's view of what is no checkpoint."""
    return _said(plan, "looks here" if plan.active else "has ended", "", "nothing, as long as this is no checkpoint")


def _sight(plan: Plan, path: str, connection: Connection | None) -> dict[str, Any] | None:
    """What the watch has on the board of a checkpoint that waits."""
    if connection is None:
        return None
    sight = Board(connection, plan.watch_queue).sights(plan.id).get(path)
    return sight if sight and sight["state"] in ("queued", "failing") else None


def _gone(plan: Plan, path: str, held: Held | None, connection: Connection | None) -> dict[str, Any]:
    """One watch's view of a checkpoint that is not there any more."""
    if held:
        told = _in_flight(plan, path, held.identity, connection)
        when = "the next look" if plan.active else "the next watch"
        return told or _said(plan, "deleted", "a second name of it is held", f"{when} queues it, unless it has a record")
    sight = _sight(plan, path, connection)
    if sight:
        return _said(plan, sight["state"], sight["reason"], "its record will say that it vanished, unless an evaluation reads it now")
    place = place_of(plan, path)
    record = read(place.record)
    if record:
        said = f": {record.error['message']}" if record.error else ""
        return _said(plan, f"recorded as {record.status}", f"{place.record}, {record.ended}{said}", "nothing until it is there again")
    return _said(plan, "deleted", "no record", "nothing")


def _said(plan: Plan, state: str, reason: str, then: str) -> dict[str, Any]:
    return {"directory": plan.directory, "evaluator": plan.label, "state": state, "reason": reason, "next": then}


def _moment(since: float) -> str:
    return datetime.fromtimestamp(since, UTC).isoformat(timespec="seconds") if since else ""
