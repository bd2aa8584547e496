"""Which of a watch's waiting checkpoints are protected from deletion: as many of the newest as its bounds allow."""

import logging
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from assayer import second_names
from assayer.checkpoint import Found
from assayer.files import printable
from assayer.plan import Baseline, Plan
from assayer.record import Record, hold_folder, hold_key
from assayer.watch.diff import Decision, decide
from assayer.watch.ready import Seen
from assayer.worker import hold
from assayer.worker.hold import Bounds, Held

__all__ = ["Neighbours", "Protection", "as_seen", "is_meant", "protect"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Neighbours:
    """What others make of a checkpoint: the plans of this watch queue, with their baselines, that its path belongs to, and whether a job
    waits or runs on this Redis, whoever queued it, that needs this hold (its key)."""

    plans: Callable[[str], list[tuple[Plan, Baseline]]] = lambda path: []
    in_flight: Callable[[str], bool] = lambda key: False


@dataclass
class Protection:
    """What one watch knows of holds. ``folders`` are those that may hold something, ``refused`` why no hard link can be made in one.

    ``searched``: what earlier watches have left was looked for. ``notes`` says of each checkpoint, by path, why it waits unprotected.
    """

    folders: set[Path] = field(default_factory=set)
    refused: dict[Path, str] = field(default_factory=dict)
    searched: bool = False
    notes: dict[str, str] = field(default_factory=dict)

    def held(self, plan: Plan) -> list[Held]:
        """Everything that is held for checkpoints of this watch's directories."""
        found = []
        above = os.path.join(plan.root, "")
        for folder in list(self.folders):
            # The watched directory may be a checkpoint itself.
            inside = [held for held in hold.held_in(folder) if os.path.join(held.checkpoint.path, "").startswith(above)]
            found += inside
            if not inside and not folder.exists() and folder.parent.parent.is_dir():
                self.folders.discard(folder)
        return found


def is_meant(plan: Plan, directories: Iterable[str], path: str) -> bool:
    """True for a path that a look of this plan at these directories would take up, were it there; of a pattern's only looking can tell."""
    for directory in directories:
        if plan.is_pattern and directory == plan.directory:
            return True
        below = os.path.relpath(path, directory)
        depth = 0 if below == "." else below.count(os.sep) + 1
        if below != ".." and not below.startswith(f"..{os.sep}") and depth <= plan.max_depth:
            return plan.regex_filter is None or re.search(plan.regex_filter, below) is not None
    return False


def as_seen(held: Held, now: float) -> Seen | None:
    """A held checkpoint as if it had just been seen; None when it is gone."""
    try:
        listing = held.listing()
    except OSError:
        return None
    return Seen(held.checkpoint, listing, held.signature, now, identity=held.identity, variants=held.variants)


def protect(
    plan: Plan,
    decisions: list[Decision],
    held: list[Held],
    state: Protection,
    record_of: Callable[[Plan, Seen], Record | None],
    neighbours: Neighbours,
    now: float,
) -> None:
    """Holds the newest of those that wait, lets go of what nobody waits for, and of the oldest where the bounds are passed."""
    state.notes = {}
    due = [d.seen for d in decisions if d.state == "due" and d.seen.identity]
    by_folder: dict[Path, list[Seen]] = {}
    for seen in sorted(due, key=lambda s: s.checkpoint.order, reverse=True):
        by_folder.setdefault(hold_folder(Path(seen.checkpoint.path), plan.results_dir), []).append(seen)
    present: dict[Path, dict[str, Held]] = {}
    for one in held:
        present.setdefault(one.folder.parent, {})[one.key] = one
    for folder in by_folder.keys() | present.keys():
        waiting, there = by_folder.get(folder, []), present.get(folder, {})
        wanted = {hold_key(seen.checkpoint.path, seen.identity or "") for seen in waiting}
        for key in there.keys() - wanted:
            # It may be read for a watch of another Redis, too.
            if not _is_wanted(plan, there[key], record_of, neighbours, now) and not hold.is_read(there[key]):
                hold.release(there.pop(key))
        _protect_folder(plan, folder, waiting, there, state, neighbours)


def _is_wanted(plan: Plan, held: Held, record_of: Callable[[Plan, Seen], Record | None], neighbours: Neighbours, now: float) -> bool:
    """True while another watch has not evaluated this, or a job that was queued for it waits or runs."""
    seen = as_seen(held, now)
    if seen is None:
        return False
    plans = neighbours.plans(held.checkpoint.path)
    if neighbours.in_flight(held.key):
        return True
    others = [
        (other, baseline) for other, baseline in plans if other.id != plan.id and is_meant(other, [other.directory], seen.checkpoint.path)
    ]
    return any(
        decision.state in ("due", "writing")
        for other, baseline in others
        for decision in decide(other, baseline, [seen], lambda s, other=other: record_of(other, s), now)  # type: ignore[misc]
    )


def _protect_folder(
    plan: Plan, folder: Path, waiting: list[Seen], there: dict[str, Held], state: Protection, neighbours: Neighbours
) -> None:
    """One folder of checkpoints: ``waiting`` the newest first, ``there`` what is held of them and of others."""
    if not waiting and not there:
        return
    others = [p for seen in waiting[:1] for p, _ in neighbours.plans(seen.checkpoint.path) if p.results_dir == plan.results_dir]
    bounds = _bounds([plan, *others])
    sizes = {hold_key(seen.checkpoint.path, seen.identity or ""): seen for seen in waiting}
    scarce = bounds.count > 0 and second_names.free_part(str(folder.parent.parent)) < bounds.min_free
    claimed = [(key, held.nbytes) for key, held in there.items() if held.is_claimed or key not in sizes]
    candidates = [(key, _size(seen)) for key, seen in sizes.items()]
    kept = hold.chosen(candidates, claimed, bounds)
    # Where space is scarce nothing new is held, and what was is let go until there is room: the oldest first.
    for key in reversed([key for key in sizes if key in there]):
        is_beyond = key not in kept or (scarce and second_names.free_part(str(folder.parent.parent)) < bounds.min_free)
        if is_beyond and hold.drop(there[key]):
            del there[key]
    for key, seen in sizes.items():
        path = seen.checkpoint.path
        if key in there:
            state.folders.add(folder)
        elif seen.gone:
            continue
        elif folder in state.refused:
            state.notes[path] = "not protected from deletion: hard links cannot be made here"
        elif plan.hold == 0:
            state.notes[path] = "not protected from deletion (--hold 0)"
        elif scarce:
            state.notes[path] = f"not protected from deletion: less than {bounds.min_free:.0%} of its file system is free (--hold_min_free)"
        elif bounds.nbytes is not None and _size(seen) > bounds.nbytes:
            state.notes[path] = f"not protected from deletion: larger than --hold_bytes {bounds.nbytes}"
        elif key not in kept:
            limit = f"--hold {bounds.count}" if bounds.nbytes is None or len(kept) >= bounds.count else f"--hold_bytes {bounds.nbytes}"
            state.notes[path] = f"not protected from deletion: newer ones are held ({limit})"
        else:
            _take(seen, folder, plan, state)


def _take(seen: Seen, folder: Path, plan: Plan, state: Protection) -> None:
    path = seen.checkpoint.path
    try:
        if hold.take(Found(seen.checkpoint, seen.listing), seen.identity or "", seen.signature, seen.variants, plan.results_dir):
            state.folders.add(folder)
            logger.info("-> %s held", printable(seen.checkpoint.name))
    except OSError as error:
        if second_names.is_refusal(error):
            state.refused[folder] = (
                f"hard links cannot be made in {printable(os.path.dirname(path))} ({error.strerror}): what waits is not held"
            )
        state.notes[path] = f"not protected from deletion: a hard link cannot be made ({error.strerror})"


def _bounds(plans: Iterable[Plan]) -> Bounds:
    """The widest of what these watches allow."""
    chosen = list(plans)
    sizes = [plan.hold_bytes for plan in chosen]
    nbytes = None if None in sizes else max(size for size in sizes if size is not None)
    return Bounds(max(plan.hold for plan in chosen), nbytes, min(plan.hold_min_free for plan in chosen))


def _size(seen: Seen) -> int:
    return hold.size_of(Found(seen.checkpoint, seen.listing))
