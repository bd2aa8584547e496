"""The noun of what an evaluation has finished so far, so that one that was killed goes on where it was.

Below the evaluation's own folder lies one file a rank and saved point, ``<point>-<rank>of<world size>.safetensors``, whole or absent. A
point counts when all ranks have saved it. Who starts the ranks asks ``choose_point`` once, while none of them runs, and hands the number
to each: so they never wait for each other, and never disagree. What was saved after that point is removed there and then; hence no rank's
file of an earlier attempt can ever be taken for its point of a later one.

Whatever lies there that was cut, changed or saved for something else is never an error: the evaluation starts over, and the log says why.
"""

import contextlib
import itertools
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from assayer.errors import EvaluatorError, StateError
from assayer.files import printable, remove_left_over, write_whole
from assayer.saved_state import Frozen, freeze, pack, thaw, unpack

__all__ = ["Binding", "Progress", "choose_point", "furthest", "has_progress", "remove"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

_NAME = re.compile(r"([0-9]{6,15})-([0-9]{1,7})of([0-9]{1,7})\.safetensors")
_END = object()
# What the log shows of a value that differs.
_SHOWN = 60


@dataclass(frozen=True)
class Binding:
    """What a state belongs to: if any of it differs, the evaluation starts over. ``arguments`` are JSON."""

    identity: str
    weights: str
    evaluator: str
    source: str | None
    arguments: Mapping[str, Any]
    world_size: int

    def to_json(self) -> dict[str, Any]:
        return {**asdict(replace(self, arguments={})), "arguments": dict(self.arguments)}


@dataclass(frozen=True, order=True)
class _Point:
    """One rank's file of one point; ``name`` is the file's."""

    point: int
    rank: int
    world_size: int

    @property
    def name(self) -> str:
        return f"{self.point:06d}-{self.rank}of{self.world_size}.safetensors"


@dataclass(frozen=True)
class _Loop:
    """How far one ``items`` has come: items done, items in all (None: not told), its state at that moment."""

    position: int
    total: int | None
    is_done: bool
    state: Frozen


def furthest(folder: Path) -> int:
    """The newest point that any rank has saved; 0 when there is none.

    Right after ``choose_point`` it is the chosen one: an attempt has got further if it is larger at its end.
    """
    return max((found.point for found in _points(folder)), default=0)


def has_progress(folder: Path) -> bool:
    """True when there is a saved point, usable or not: one listing of a folder."""
    return bool(_points(folder))


def remove(folder: Path) -> None:
    """Removes the folder with all that is in it, whatever it is; links are not followed. What cannot be removed is told in the log."""
    _discard(folder)
    if os.path.lexists(folder):
        logger.warning("cannot remove %s", printable(str(folder)))


def choose_point(folder: Path, binding: Binding, world_size: int) -> int | None:
    """The newest point that all ranks have saved whole, for the same binding; None: the evaluation starts from the beginning.

    It is called once, by the process that starts the ranks, before any of them runs. All files are read, and those that do not count, or
    are newer than the chosen point, are removed, so that what is saved from now on is never mixed with them.

    Raises:
        ValueError: ``world_size`` is not the binding's.
    """
    if world_size != binding.world_size:
        raise ValueError(f"{world_size} ranks, and a binding of {binding.world_size}")
    found = _points(folder)
    chosen, reasons = None, []
    for point in _common(found, world_size)[::-1]:
        reason = _unusable(folder, point, binding)
        if reason is None:
            chosen = point
            break
        if reason not in reasons:
            reasons.append(reason)
    if found and chosen is None:
        other = {p.world_size for p in found} - {world_size}
        if other and not reasons:
            reasons.append(f"world_size was {max(other)} and is {world_size}")
        logger.warning(
            "%s: starts over: %s", printable(str(folder)), "; ".join(reasons) or f"no point that all {world_size} ranks have saved"
        )
    elif chosen is not None:
        because = f" ({'; '.join(reasons)})" if reasons else ""
        logger.log(logging.WARNING if reasons else logging.INFO, "%s: goes on from point %d%s", printable(str(folder)), chosen, because)
    for file in found:
        if file.world_size != world_size or file.rank >= world_size or file.point > (chosen or 0):
            _discard(folder / file.name)
    return chosen


def _points(folder: Path) -> list[_Point]:
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    except OSError as error:
        logger.warning("%s cannot be listed: %s", printable(str(folder)), error.strerror)
        return []
    found = [(_Point(*map(int, match.groups())), match[0]) for match in map(_NAME.fullmatch, names) if match]
    return sorted(point for point, name in found if point.name == name)


def _common(found: list[_Point], world_size: int) -> list[int]:
    """The points that have a file of every rank, the oldest first."""
    by_rank = [{p.point for p in found if p.rank == rank and p.world_size == world_size} for rank in range(world_size)]
    return sorted(set.intersection(*by_rank))


def _unusable(folder: Path, point: int, binding: Binding) -> str | None:
    """Why the files of this point do not count, or None."""
    for rank in range(binding.world_size):
        try:
            _read(folder, _Point(point, rank, binding.world_size), binding)
        except StateError as error:
            return str(error)
    return None


def _read(folder: Path, file: _Point, binding: Binding) -> tuple[Frozen | None, dict[str, _Loop]]:
    """The state given to ``save`` and the loops in one file.

    Raises:
        StateError: it is not whole, or was saved for something else; the text says what.
    """
    try:
        facts, parts = unpack(folder / file.name)
        differences = list(_differences(facts["bound"], _bound(binding, file)))
        if differences:
            raise StateError(", ".join(differences))
        loops = {key: _Loop(place, total, is_done, parts[f"items {key}"]) for key, (place, total, is_done) in facts["loops"].items()}
        return parts.get("state"), loops
    except StateError as error:
        raise StateError(f"{file.name}: {error}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StateError(f"{file.name}: is no saved point ({printable(str(error))})") from None


def _bound(binding: Binding, file: _Point) -> dict[str, Any]:
    return {**binding.to_json(), "rank": file.rank, "point": file.point}


def _differences(before: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    """What differs, in words. NaN is NaN here, so texts are compared."""
    for key in now:
        if key == "arguments":
            was, given = before[key], now[key]
            for name in sorted({*was, *given}):
                if _shown(was, name, None) != _shown(given, name, None):
                    yield f"the argument {printable(name)} was {_shown(was, name)} and is {_shown(given, name)}"
        elif _shown(before, key, None) != _shown(now, key, None):
            yield f"{key} was {_shown(before, key)} and is {_shown(now, key)}"


def _shown(values: Mapping[str, Any], name: str, length: int | None = _SHOWN) -> str:
    text = json.dumps(values[name], sort_keys=True) if name in values else "not given"
    return text if length is None or len(text) <= length else text[:length] + "..."


def _discard(path: Path) -> None:
    """Removes a file, a link, or a folder with all in it, as far as that is possible."""
    try:
        os.unlink(path)
    except (IsADirectoryError, PermissionError):
        # It raises for a link to a folder, which is not one.
        shutil.rmtree(path, ignore_errors=True)
    except OSError:
        pass


class Progress:
    """What one rank of an evaluation has finished, and what an evaluator's parameter ``progress`` gets.

    ``save`` and ``items`` both write one file with everything: the state last given to ``save``, and for each ``items`` its position and
    its own state. ``resume`` returns the former, ``items`` puts back the latter. A state holds dict with str keys, list, tuple, str, int,
    float, bool, None, torch tensors, numpy arrays and numbers, and comes back exactly (tensors on the CPU, without gradient).

    One thread of the evaluator saves. A save that fails (a full disk, a folder that is read-only) is told once in the log, and the
    evaluation goes on. With several ranks all should save equally often, since a point counts when all have saved it.

    Args:
        folder: of this evaluation; made at the first save, its parent exists.
        binding: what the state belongs to.
        rank: of this process, from 0.
        world_size: number of ranks.
        point: what ``choose_point`` returned to the process that started the ranks; None: from the beginning (one rank alone asks itself).
        on_report: is called with what is given to ``report``.

    Raises:
        ValueError: the rank or the world size is impossible.
        StateError: several ranks, and the point that was chosen for all cannot be read any more; a new attempt chooses an earlier one.
    """

    def __init__(
        self,
        folder: Path,
        binding: Binding,
        rank: int = 0,
        world_size: int = 1,
        point: int | None = None,
        on_report: Callable[[int, int | None], object] | None = None,
    ) -> None:
        if not 0 <= rank < world_size == binding.world_size:
            raise ValueError(f"rank {rank} of {world_size}, and a binding of {binding.world_size}")
        self._folder = folder
        self._binding = binding
        self._rank = rank
        self._on_report = on_report
        self._warned: set[str] = set()
        self._point = 0
        self._saved: Frozen | None = None
        self._loops: dict[str, _Loop] = {}
        # Loops that were begun in this process, and those of them that stand in the middle.
        self._begun: set[str] = set()
        self._open: set[str] = set()
        self._unnamed = 0
        if point is None and world_size == 1:
            point = choose_point(folder, binding, 1)
        if point is not None:
            self._take_up(point)
        # What came after that point is gone already; should it be back, it must not be mixed with what is saved from now on. What came
        # before it stayed when this rank was killed between a save and the removal of the older one.
        for file in _points(folder):
            if file.rank == rank and file.point != self._point:
                _discard(folder / file.name)
        remove_left_over(folder)

    def _take_up(self, point: int) -> None:
        """Loads a point; one rank alone goes back to an earlier one, or to the beginning, where that cannot be read any more."""
        world_size = self._binding.world_size
        try:
            self._saved, self._loops = _read(self._folder, _Point(point, self._rank, world_size), self._binding)
            self._point = point
        except StateError as error:
            if world_size > 1:
                raise StateError(f"{printable(str(self._folder))}: the point that was chosen for all ranks is gone: {error}") from None
            earlier = choose_point(self._folder, self._binding, 1)
            if earlier is not None:
                self._take_up(earlier)

    def resume(self) -> Any:
        """A new copy of the state that was last given to ``save``, in this attempt or an earlier one; None when there is none."""
        return None if self._saved is None else thaw(self._saved)

    def save(self, state: Any) -> None:
        """Saves a state, whole or not at all. What ``items`` loops have saved stays as it was saved.

        Raises:
            TypeError: something in it cannot be stored; the message says where. Nothing is written then.
        """
        self._saved = freeze(state)
        self._write()

    def items(self, iterable: Iterable[T], state: dict[str, Any], every: int, *, name: str | None = None) -> Iterator[T]:
        """Yields the items that are left, and saves position and state together, in one file, after every ``every`` items and the last.

        Before the first item is yielded, ``state`` holds what it held at that save: the dict is the same, what is in it is new, so look
        things up in it inside the loop. A tensor goes back to the device of the one that stood in its place. An item counts as done when
        the next one is asked for. A loop that had ended is skipped whole, with the state it ended with. Code between loops runs again.

        Args:
            iterable: the same items in the same order in every attempt. A sequence (list, tuple, range) is indexed from the first item that
                is left; anything else is iterated, and what was done is passed over. For items that are dear to load give
                ``range(len(data))``.
            state: a dict that the loop changes in place. Several loops may share one.
            every: the number of items between two saves, at least 1.
            name: tells this loop from others of the same evaluator; without it the order of the calls does. A loop within another one needs
                a name, a different one each time. (A ``save`` inside a loop may be newer than the loop's position.)

        Raises:
            TypeError: something in the state cannot be stored, or it is no dict.
            ValueError: ``every`` is less than 1, a name is used twice, or missing inside another loop.
            EvaluatorError: there are fewer items, or another number, than when they were saved; the next attempt starts over.
        """
        if not isinstance(state, dict):
            raise TypeError(f"progress.items takes a dict as its state, not a {type(state).__name__}")
        if every < 1:
            raise ValueError(f"progress.items saves after every 1 item or more, not {every}")
        return self._items(iterable, state, every, self._key(name))

    def _key(self, name: str | None) -> str:
        if name is None:
            if self._open:
                raise ValueError("progress.items within another one, or after one that was left and not closed, needs a name=")
            self._unnamed += 1
        key = f"number {self._unnamed}" if name is None else f"name {name}"
        if key in self._begun:
            raise ValueError(f"two progress.items have the name {name!r}")
        self._begun.add(key)
        return key

    def _items(self, iterable: Iterable[T], state: dict[str, Any], every: int, key: str) -> Iterator[T]:
        total = _length(iterable)
        loop = self._loops.get(key)
        position = 0
        if loop:
            if loop.total != total:
                raise self._not_the_same(f"{total} items, which were {loop.total} when they were saved")
            _put_back(state, thaw(loop.state))
            if loop.is_done:
                return
            position = loop.position
        left = self._left(iterable, position)
        self._open.add(key)
        try:
            item: Any = next(left, _END)
            while item is not _END:
                yield item
                position += 1
                item = next(left, _END)
                if position % every == 0 and item is not _END:
                    self._save_loop(key, _Loop(position, total, False, freeze(dict(state))))
            self._save_loop(key, _Loop(position, total, True, freeze(dict(state))))
        finally:
            self._open.discard(key)

    def _left(self, iterable: Iterable[T], position: int) -> Iterator[Any]:
        """The items from this position on."""
        if isinstance(iterable, Sequence):
            return map(iterable.__getitem__, range(position, len(iterable)))
        left = iter(iterable)
        passed = sum(1 for _ in itertools.islice(left, position))
        if passed < position:
            raise self._not_the_same(f"{passed} items, of which {position} were done when they were saved")
        return left

    def _not_the_same(self, found: str) -> EvaluatorError:
        """Removes this rank's points, so that the next attempt of all ranks starts over."""
        for file in _points(self._folder):
            if file.rank == self._rank:
                _discard(self._folder / file.name)
        return EvaluatorError(f"progress.items was given {found}: it needs the same items in every attempt; the next one starts over")

    def _save_loop(self, key: str, loop: _Loop) -> None:
        self._loops[key] = loop
        self._write()

    def report(self, done: int, total: int | None = None) -> None:
        """Tells how far the evaluation is, in any unit; ``total`` may be None. It never raises, and may be called as often as one likes."""
        if self._on_report is None:
            return
        try:
            self._on_report(done, total)
        except Exception as error:
            self._warn_once("report", f"how far the evaluation is cannot be shown: {type(error).__name__}: {error}")

    def _write(self) -> None:
        """The next point. Its number also goes on when it cannot be written, so that ranks agree on which point is which."""
        self._point += 1
        file = _Point(self._point, self._rank, self._binding.world_size)
        facts = {
            "bound": _bound(self._binding, file),
            "loops": {key: [loop.position, loop.total, loop.is_done] for key, loop in self._loops.items()},
        }
        parts = {f"items {key}": loop.state for key, loop in self._loops.items()}
        data = pack(facts, parts if self._saved is None else {"state": self._saved, **parts})
        try:
            with contextlib.suppress(FileExistsError):
                os.mkdir(self._folder)
            write_whole(self._folder / file.name, data)
        except OSError as error:
            self._warn_once("save", f"progress is not saved, the evaluation goes on: {error.strerror} ({printable(str(self._folder))})")
            return
        self._remove_old()

    def _remove_old(self) -> None:
        """Removes this rank's points before the newest that all ranks have."""
        found = _points(self._folder)
        newest = max(_common(found, self._binding.world_size), default=0)
        for file in found:
            if file.rank == self._rank and file.point < newest:
                _discard(self._folder / file.name)

    def _warn_once(self, kind: str, text: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            logger.warning("%s", printable(text))


def _length(iterable: object) -> int | None:
    """The number of its items where it tells; a DataLoader over an IterableDataset has a length that raises."""
    try:
        return len(iterable)  # type: ignore[arg-type]  # that is the question
    except (TypeError, NotImplementedError):
        return None


def _put_back(state: dict[str, Any], saved: dict[str, Any]) -> None:
    placed = {key: _placed(value, state.get(key)) for key, value in saved.items()}
    state.clear()
    state.update(placed)


def _placed(saved: Any, before: Any) -> Any:
    """``saved``, its tensors on the devices of those that stand in their places."""
    if type(saved) is dict and isinstance(before, dict):
        return {key: _placed(value, before.get(key)) for key, value in saved.items()}
    if type(saved) in (list, tuple) and type(before) is type(saved):
        return type(saved)(_placed(value, old) for value, old in itertools.zip_longest(saved, before[: len(saved)]))
    device = getattr(before, "device", None)
    return saved.to(device) if device is not None and hasattr(saved, "to") else saved
