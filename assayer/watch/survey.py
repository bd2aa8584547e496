"""One watched directory tree, look after look: what has not changed is not read again, what is settled is not kept.

A directory whose own time of modification stands still has neither gained nor lost a name, so that one ``stat`` tells that nothing is new
in it. That time says nothing of a file that is written again under its name, and on network file systems it can come late: so directories
are also listed anyway, in turn, as often as that is cheap; what is not settled yet, and what is likely to be saved again (the youngest
checkpoint, and names without a number, such as ``last.ckpt``), at every look.
"""

import os
import time
from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from assayer.checkpoint import Checkpoint, Entry, Found
from assayer.watch.ready import Seen, examine
from assayer.watch.scan import cannot_read, filtered, list_whole, open_folder

__all__ = ["Survey", "Terms"]

# Seconds for which a directory that has just changed may change again without its time of modification showing it.
RACY = 2.0
# Settled checkpoints of one directory that are looked at every time: the one with the highest number, and so many without a number.
NAMELESS_MAX = 4

# Names, sizes, times and inodes of the files that count, as one number of this process.
_Mark = int
_Stamp = tuple[int, ...]
# Under this key a directory keeps the mark of the checkpoint that it is itself.
_OWN = hash("")


@dataclass(frozen=True)
class Terms:
    """What a watch asks of its survey. Times in seconds.

    ``is_known`` tells by its listing's signature that a checkpoint is settled and need not be looked into; ``recall`` gives the identity
    that a record tells for this very signature. ``keeps_lost``: what was deleted with the directory around it stays in sight, since its
    record lies elsewhere. ``full_every``: how long a directory may go without being listed; ``turns_max`` and
    ``new_max``: how long one look may spend on directories whose turn it is, and on those that no look has seen.
    """

    max_depth: int
    regex_filter: str | None
    quiet_period: float
    is_known: Callable[[Found, str], bool] = lambda found, signature: False
    recall: Callable[[Found, str], str | None] = lambda found, signature: None
    keeps_lost: bool = False
    full_every: float = 0.0
    turns_max: float = float("inf")
    new_max: float = float("inf")


@dataclass(slots=True)
class _Node:
    """One directory that is looked into.

    ``settled`` has a mark for each file in it that is a settled checkpoint, for each directory in it that is one and holds nothing else,
    and for itself; keys are hashes of names, so that a settled checkpoint takes about a hundred bytes. ``restless`` are those of them that
    are looked at every time, with their number and stamp; ``records`` is the folder of their records, its stamp, and the names in it.
    """

    stamp: _Stamp | None = None
    listed: float = 0.0
    took: float = 0.0
    mark: _Mark = 0
    number: float | None = None
    folders: dict[str, None] = field(default_factory=dict)
    inside: tuple[str, ...] = ()
    settled: dict[int, _Mark] = field(default_factory=dict)
    open: set[str] = field(default_factory=set)
    restless: dict[str, tuple[float | None, _Stamp]] = field(default_factory=dict)
    records: "tuple[str, _Stamp, array[int]] | None" = None


class Survey:
    """What earlier looks of this process know of one directory tree."""

    def __init__(self, directory: str) -> None:
        self.directory = directory
        # What is not settled, by path.
        self.seen: dict[str, Seen] = {}
        self.problems: list[str] = []
        # True while there are directories that no look has seen, for want of time.
        self.is_partial = False
        self._first_pass = True
        # Folders of holds beside checkpoints that this look has come across.
        self.hold_folders: set[Path] = set()
        # The highest position of any checkpoint that was seen whole.
        self.furthest = -1.0
        # Seconds that it takes to list everything.
        self.cost = 0.0
        self._nodes: dict[str, _Node] = {}

    def look(self, terms: Terms, now: float) -> list[Seen]:
        """The checkpoints that are not settled, as they are now.

        Raises:
            OSError: the directory itself is gone or cannot be read; then nothing is known of its checkpoints.
        """
        self.problems, self.is_partial = [], False
        began, turns = time.monotonic(), 0.0
        todo = [(self.directory, 0)]
        while todo:
            path, depth = todo.pop()
            before = self._nodes.get(path)
            if before is None and time.monotonic() - began > terms.new_max:
                self.is_partial = True
                continue
            started = time.monotonic()
            try:
                stamp = _stamp(path, before.inside if before else ())
                is_due = before is None or now - before.listed >= terms.full_every
                if before and not self._has_changed(path, before, stamp) and not (is_due and turns < terms.turns_max):
                    todo += [(os.path.join(path, name), depth + 1) for name in before.folders]
                    continue
                node = self._list(path, depth, stamp, terms, now, is_due)
            except OSError as error:
                if depth == 0:
                    raise
                self.problems += cannot_read(path, error)
                continue
            # Its children first: one that is a settled checkpoint and nothing else leaves the list.
            todo += [(os.path.join(path, name), depth + 1) for name in node.folders]
            node.took = time.monotonic() - started
            self.cost += node.took - (before.took if before else 0.0)
            turns += node.took if before and is_due else 0.0
            self._fold(path, node)
        self._first_pass = self._first_pass and self.is_partial
        return list(self.seen.values())

    def settle(self, seen: Seen, record_folder: str | None = None) -> None:
        """Nothing is left to do with a checkpoint until its files change, or its record goes from ``record_folder``."""
        path = seen.checkpoint.path
        self.seen.pop(path, None)
        own = self._nodes.get(path)
        node = own if own and path in own.open else self._nodes.get(os.path.dirname(path))
        if node is None or path not in node.open:
            return
        node.open.discard(path)
        if not seen.gone:
            self._remember(node, path, None if node is own else _mark(seen.listing.entries), seen.checkpoint.position.number)
        if record_folder and (node.records is None or node.records[0] != record_folder):
            node.records = (record_folder, *_names_in(record_folder))
        if own:
            self._fold(path, own)

    def ask_again(self, path: str) -> None:
        """Asks anew about one checkpoint that was settled."""
        parent, name = os.path.split(path)
        for node, key in ((self._nodes.get(path), _OWN), (self._nodes.get(parent), hash(name))):
            if node and node.settled.pop(key, None) is not None:
                node.stamp = None

    def reconsider(self) -> None:
        """Asks anew about everything that was settled."""
        for node in self._nodes.values():
            node.settled.clear()
            node.restless.clear()
            node.stamp = None

    def _has_changed(self, path: str, node: _Node, stamp: _Stamp) -> bool:
        if self._has_lost_a_record(node):
            node.settled.clear()
            node.restless.clear()
            return True
        if node.stamp != stamp or node.open:
            return True
        for name, (_, seen) in node.restless.items():
            if _stamp_of(os.path.join(path, name)) != seen:
                node.settled.pop(hash(name), None)
                return True
        return False

    def _list(self, path: str, depth: int, stamp: _Stamp, terms: Terms, now: float, is_due: bool) -> _Node:
        """Lists one directory, and examines what is not settled in it; ``is_due``: also what is."""
        before = self._nodes.get(path) or _Node()
        node = _Node(number=before.number, records=before.records, restless=before.restless)

        def is_settled(entry: Entry) -> bool:
            key, mark = hash(entry.name), _mark((entry,))
            if before.settled.get(key) != mark:
                return False
            node.settled[key] = mark
            return True

        folder = open_folder(path, depth, terms.max_depth, self.seen, self.problems, is_settled)
        if "evals" in folder.others and os.path.isdir(os.path.join(path, "evals", ".hold")):
            self.hold_folders.add(Path(path, "evals", ".hold"))
        node.mark, node.inside = _mark(folder.whole.entries), folder.inside
        # One that has changed a moment ago may change again within the same tick of its clock.
        is_quiet = now - max(stamp[::3]) / 1e9 > RACY and before.inside == folder.inside
        node.stamp = stamp if is_quiet else None
        node.listed = now if is_due else before.listed
        for found in [*([folder.own] if folder.own else []), *folder.singles]:
            self._meet(found, node, before, terms, now, is_own=found is folder.own)
        for name in folder.folders:
            child, mark = os.path.join(path, name), before.settled.get(hash(name))
            if mark is not None and child not in self._nodes and not (is_due and _mark_of_folder(child) != mark):
                node.settled[hash(name)] = mark
            else:
                node.folders[name] = None
        node.restless = {name: kept for name, kept in node.restless.items() if hash(name) in node.settled}
        self._nodes[path] = node
        for name in before.folders.keys() - set(folder.folders):
            self._lose_folder(os.path.join(path, name), node, terms)
        for lost in before.open - node.open:
            # A directory that has come back speaks for itself.
            if lost not in (os.path.join(path, name) for name in folder.folders):
                self._lose(lost, node)
        return node

    def _meet(self, found: Found, node: _Node, before: _Node, terms: Terms, now: float, is_own: bool) -> None:
        """One checkpoint that was listed: it is settled, or is examined."""
        path = found.checkpoint.path
        name = "" if is_own else found.checkpoint.name
        mark = node.mark if is_own else _mark(found.listing.entries)
        if before.settled.get(hash(name)) == mark:
            node.settled[hash(name)] = mark
            return
        seen = self.seen.get(path)
        if seen is None:
            signature = found.listing.signature()
            is_meant = bool(filtered([found], self.directory, terms.regex_filter))
            if not is_meant or terms.is_known(found, signature):
                if is_meant:
                    self._note_whole(found.checkpoint)
                self._remember(node, path, None if is_own else mark, found.checkpoint.position.number)
                return
            identity = terms.recall(found, signature)
            if identity:
                seen = Seen(found.checkpoint, found.listing, signature, now, identity=identity)
        node.open.add(path)
        self.seen[path] = examine(found, replace(seen, gone=False) if seen else None, now, self._first_pass, terms.quiet_period)
        if self.seen[path].is_whole:
            self._note_whole(found.checkpoint)

    def _note_whole(self, checkpoint: Checkpoint) -> None:
        if checkpoint.position.number is not None:
            self.furthest = max(self.furthest, checkpoint.position.number)

    def _remember(self, node: _Node, path: str, mark: _Mark | None, number: float | None) -> None:
        """Notes a settled checkpoint: a file in this directory with its mark, or (None) the directory itself."""
        if mark is None:
            node.settled[_OWN], node.number = node.mark, number
        else:
            name = os.path.basename(path)
            node.settled[hash(name)] = mark
            _look_again(node, path, number)

    def _fold(self, path: str, node: _Node) -> None:
        """A directory that is a settled checkpoint and nothing else is remembered by the one that it lies in."""
        parent, name = os.path.split(path)
        above = self._nodes.get(parent)
        if above is None or name not in above.folders or node.folders or node.open or node.settled.keys() != {_OWN}:
            return
        above.settled[hash(name)] = node.mark
        del above.folders[name], self._nodes[path]
        self.cost -= node.took
        _look_again(above, path, node.number)
        if above.records is None:
            above.records = node.records

    def _has_lost_a_record(self, node: _Node) -> bool:
        """True when a record has gone from the folder of this directory's records: all that was settled by one is asked about again."""
        if node.records is None:
            return False
        folder, stamp, names = node.records
        if _stamp_of(folder) == stamp:
            return False
        node.records = (folder, *_names_in(folder))
        return not set(names) <= set(node.records[2])

    def _lose_folder(self, path: str, node: _Node, terms: Terms) -> None:
        """A directory has gone, with all below it; the checkpoint that it was itself may still wait for its record."""
        inside = path + os.sep
        for below in [p for p in self._nodes if p == path or p.startswith(inside)]:
            gone = self._nodes.pop(below)
            self.cost -= gone.took
            for lost in gone.open:
                if lost == path or terms.keeps_lost:
                    self._lose(lost, node)
                else:
                    self.seen.pop(lost, None)

    def _lose(self, path: str, node: _Node) -> None:
        """A checkpoint has gone that was not settled. One that was whole, as far as it told, stays in sight until there is word of it."""
        seen = self.seen.pop(path, None)
        if seen and not seen.missing:
            self.seen[path] = replace(seen, gone=True)
            node.open.add(path)


def _look_again(node: _Node, path: str, number: float | None) -> None:
    """Has a settled checkpoint of this directory looked at every time, where it is one of those that are saved again."""
    name, kept = os.path.basename(path), node.restless
    kept.pop(name, None)
    highest = next((other for other, (n, _) in kept.items() if n is not None), None)
    if number is None:
        if len(kept) - (highest is not None) >= NAMELESS_MAX:
            return
    elif highest is not None:
        if (kept[highest][0] or 0) > number:
            return
        del kept[highest]
    kept[name] = (number, _stamp_of(path))


def _mark(entries: Iterable[Entry]) -> _Mark:
    return hash(tuple((entry.name, entry.size, entry.mtime_ns, entry.inode) for entry in entries))


def _mark_of_folder(path: str) -> _Mark | None:
    """The mark of a directory that is a checkpoint, as it is now; None when it is gone or cannot be read."""
    try:
        return _mark(list_whole(path)[0].entries)
    except OSError:
        return None


def _stamp(path: str, inside: tuple[str, ...]) -> _Stamp:
    """What changes when a directory, or one of these folders inside it, gains or loses a name."""
    status = os.stat(path)
    stamp = [status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
    for name in inside:
        stamp += _stamp_of(os.path.join(path, name))
    return tuple(stamp)


def _stamp_of(path: str) -> _Stamp:
    """What changes when a file is written, or a directory gains or loses a name; the same for all that is gone."""
    try:
        status = os.lstat(path)
    except OSError:
        return (0, 0, 0)
    return (status.st_mtime_ns, status.st_size, status.st_ino)


def _names_in(folder: str) -> "tuple[_Stamp, array[int]]":
    """The stamp of a folder of records, and a number for each record in it."""
    stamp = _stamp_of(folder)
    try:
        names = os.listdir(folder)
    except OSError:
        names = []
    return stamp, array("q", [hash(name) for name in names if name.endswith(".json")])
