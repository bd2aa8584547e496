"""W&B: rows with ``global_step`` as a field, which is the x axis of ``eval/*``; W&B's own step is never given, since it may not go back.

Where the points go: with ``run=ID`` into the trainer's own run, when it takes them, else into a companion run ``ID-eval`` of its group;
without, into a run of our own, called after the folder of the checkpoints. A run takes rows of a second process only when its own process
has opened it with ``mode="shared"``; nothing tells that beforehand, and rows that are not taken are lost without an error. So the first
points are written in shared mode and read back from the server; when they do not appear within ``VERIFY`` seconds, this and every later
point goes to the companion. So do those of a run that is not there (yet), without anything being noted. ``mode=shared`` never uses a
companion. ``mode=offline`` (or ``WANDB_MODE=offline``) always does: it writes below ``evals/wandb/``, one folder a publication, for
``wandb sync``.

Exactly one point each: a point is one row, there or not, and known again by its ``global_step``, its ``_timestamp`` (the end of the
evaluation) and one of its metrics. Everything is read back after writing: offline from the ``.wandb`` files, online from the server's
history. What is doubtful is looked up there first, after W&B's own process, which may outlive a killed publisher by two seconds, has fallen
silent. The one limit: when a server shows rows of the very first publication only after ``VERIFY`` seconds, those stand in both runs.
"""

import contextlib
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from assayer.errors import TrackerError, UsageError
from assayer.files import printable
from assayer.points import Curve, Point
from assayer.wandb_log import rows

__all__ = ["EXTRA", "NEEDS", "OPTIONS", "WORD", "publish", "settle"]

OPTIONS = {
    "project": "the project",
    "run": "the id of the trainer's run; {run} stands for the folder's name; default: a run of our own",
    "entity": "the user or team; default: W&B's own",
    "group": "the group of a companion run; default: that of the trainer's run",
    "mode": "online, offline or shared; default: WANDB_MODE, else online",
}
WORD = None
EXTRA = "wandb"
NEEDS = ("wandb",)

MODES = ("online", "offline", "shared")
# Seconds in which rows must be seen on the server, and between two looks.
VERIFY, _STEP = 30.0, 2.0
# Seconds without a change after which W&B's own process of a killed publisher has ended.
QUIET = 5.0
# Rows with one of our metrics that are asked for: of more the server gives a sample.
_SAMPLES = 10_000
# In the ledger: whether the trainer's run takes our rows.
_SHARED = "wandb_shared"


def settle(options: Mapping[str, str], cwd: Path) -> dict[str, str]:
    """The options, looked at."""
    if not options.get("project"):
        raise UsageError("wandb needs project=...: " + OPTIONS["project"])
    if options.get("mode", MODES[0]) not in MODES:
        raise UsageError(f"wandb: mode={options['mode']} is not allowed; give {', '.join(MODES)}")
    if options.get("mode") == "shared" and not options.get("run"):
        raise UsageError("wandb: mode=shared needs run=...: " + OPTIONS["run"])
    if forbidden := re.search(r"[:;,#?/']", options.get("run", "")):
        raise UsageError(
            f"wandb: run={printable(options['run'])} holds {forbidden[0]!r}; give the id, as it stands at the end of the run's address"
        )
    return dict(options)


def publish(points: Sequence[Point], options: Mapping[str, str], curve: Curve) -> list[str]:
    """Writes the rows that W&B does not have, and reads them back."""
    mode = options.get("mode") or {"dryrun": "offline", "run": "online", "": "online"}.get(word := os.environ.get("WANDB_MODE", ""), word)
    if mode not in MODES:
        raise TrackerError(f"WANDB_MODE={printable(mode)} lets nothing be published; give mode=online or mode=offline")
    place = _Place.of(options, curve)
    if any(point.doubtful for point in points):
        _await_silence(place)
    if mode == "offline":
        return _offline(points, place)
    try:
        return _online(points, place, curve, must_share=mode == "shared")
    finally:
        _end()


def _end() -> None:
    """Ends W&B's own process, and waits for its end: it may close a run's file only after the run has finished."""
    import wandb

    wandb.teardown()


@dataclass(frozen=True)
class _Place:
    """The runs that are meant: ``trainer``, which may be None, and ``companion``, which is ours; W&B's files lie in ``folder``."""

    entity: str | None
    project: str
    group: str | None
    trainer: str | None
    companion: str
    run_name: str
    folder: Path

    @classmethod
    def of(cls, options: Mapping[str, str], curve: Curve) -> "_Place":
        safe = re.sub(r"[^\w.-]", "_", curve.run)
        trainer = options.get("run", "").replace("{run}", safe) or None
        companion = f"{trainer or f'{safe[:80]}-{curve.uid[:8]}'}-eval"
        name = f"{trainer or curve.run}-eval"
        return cls(options.get("entity"), options["project"], options.get("group"), trainer, companion, name, curve.results)

    def folders(self) -> Iterator[Path]:
        """What our publications have left of their own files."""
        for run in {self.companion, self.trainer or self.companion}:
            for path in (self.folder / "wandb").glob(f"*run-*/run-{run}.wandb"):
                yield path.parent


def _await_silence(place: _Place) -> None:
    while True:
        changes = [path.stat().st_mtime for folder in place.folders() for path in folder.rglob("*") if path.exists()]
        wait = max(changes, default=0.0) + QUIET - time.time()
        # A clock that runs ahead keeps nobody waiting for longer.
        if wait <= 0 or wait > QUIET:
            return
        time.sleep(wait)


def _offline(points: Sequence[Point], place: _Place) -> list[str]:
    def missing(wanted: Sequence[Point], folders: Iterable[Path]) -> list[Point]:
        return _missing(wanted, [row for folder in folders for row in rows(folder / f"run-{place.companion}.wandb")])

    before = set(place.folders())
    doubtful = [point for point in points if point.doubtful]
    wanted = (missing(doubtful, before) if doubtful else []) + [point for point in points if not point.doubtful]
    if not wanted:
        return []
    _write(wanted, place, mode="offline", run=place.companion, group=place.group or place.trainer)
    if left := missing(wanted, set(place.folders()) - before):
        raise TrackerError(f"W&B did not keep {len(left)} of {len(wanted)} rows in {printable(str(place.folder / 'wandb'))}")
    return []


def _online(points: Sequence[Point], place: _Place, curve: Curve, must_share: bool) -> list[str]:
    is_shared = True if must_share else curve.facts.get(_SHARED)
    if place.trainer is None:
        is_shared = False
    doubtful = [point for point in points if point.doubtful]
    wanted = [point for point in points if not point.doubtful]
    if doubtful:
        known = [] if must_share else _history(place, place.companion, doubtful)
        known += _history(place, place.trainer, doubtful) if place.trainer and is_shared is not False else []
        wanted = _missing(doubtful, known) + wanted
        curve.alive()
    notes = []
    is_tried = place.trainer is not None and is_shared is not False and bool(wanted)
    if place.trainer and is_tried and _find(place, place.trainer) is None:
        # To write there would make a run, and to note that would hold when the trainer has begun it.
        if must_share or is_shared:
            raise TrackerError(f"there is no run {place.trainer} in {place.project}; give the id of one that its trainer has begun")
        is_tried = False
        notes.append(f"there is no run {place.trainer} in {place.project} yet: the points are in {place.companion}")
    if place.trainer and is_tried:
        _write(wanted, place, mode="shared", run=place.trainer)
        wanted = _await_rows(place, place.trainer, wanted)
        curve.alive()
        if wanted and is_shared:
            raise TrackerError(
                f"W&B does not show {len(wanted)} rows in the run {place.trainer}; they are looked up when you publish again"
            )
        curve.remember({_SHARED: not wanted})
        if wanted:
            notes.append(
                f"the run {place.trainer} was not opened in W&B's shared mode: its points are in {place.companion}, in the same group"
            )
    if wanted:
        _write(wanted, place, mode="online", run=place.companion, group=place.group or _group(place))
        if left := _await_rows(place, place.companion, wanted):
            raise TrackerError(
                f"W&B does not show {len(left)} rows in the run {place.companion}; they are looked up when you publish again"
            )
    _remove_own_files(place)
    return notes


def _remove_own_files(place: _Place) -> None:
    """Of online runs: the server has what lies there."""
    for folder in list(place.folders()):
        if not folder.name.startswith("offline-"):
            shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):
        for path in (place.folder / "wandb").iterdir():
            if path.is_symlink() and not path.exists():
                path.unlink()
        (place.folder / "wandb").rmdir()


def _write(points: Sequence[Point], place: _Place, *, mode: str, run: str, group: str | None = None) -> None:
    """One row a point. Returns when W&B has taken all of them."""
    import wandb

    settings: dict[str, Any] = {"silent": True, "console": "off", "disable_git": True, "save_code": False, "x_disable_stats": True}
    settings |= {"x_disable_meta": True, "x_save_requirements": False}
    words: dict[str, Any] = {"entity": place.entity, "project": place.project, "id": run, "mode": mode, "dir": str(place.folder)}
    if mode == "shared":
        # The trainer's summary, state and files stay its own.
        settings |= {"x_primary": False, "x_update_finish_state": False, "x_server_side_derived_summary": True}
    else:
        words |= {"name": place.run_name, "group": group, "job_type": "eval", "resume": "allow"}
    opened = wandb.init(**words, settings=wandb.Settings(**settings))
    try:
        opened.define_metric("global_step")
        for pattern in sorted({name.partition("/")[0] for point in points for name in point.values}):
            opened.define_metric(f"{pattern}/*", step_metric="global_step")
        for point in points:
            opened.log({**point.values, "global_step": point.step, "_timestamp": point.wall})
    finally:
        try:
            opened.finish()
        finally:
            _end()


def _missing(points: Iterable[Point], known: Iterable[Mapping[str, Any]]) -> list[Point]:
    """The points of which there is no row."""
    present: dict[tuple[int, float], set[str]] = {}
    for row in known:
        if isinstance(row.get("global_step"), int | float) and isinstance(row.get("_timestamp"), int | float):
            present.setdefault((int(row["global_step"]), round(row["_timestamp"], 3)), set()).update(row)
    return [point for point in points if present.get((point.step, round(point.wall, 3)), set()).isdisjoint(point.values)]


def _await_rows(place: _Place, run: str, points: Sequence[Point]) -> list[Point]:
    """What the server does not show of these in time."""
    deadline = time.monotonic() + VERIFY
    while True:
        left = _missing(points, _history(place, run, points))
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(_STEP)


def _history(place: _Place, run: str, points: Sequence[Point]) -> list[dict[str, Any]]:
    """The server's rows of these points, each with one metric that tells it; none where there is no such run."""
    found = _find(place, run)
    if found is None:
        return []
    # Not scan_history: it goes through every step of a run, a thousand a request.
    keys = [["global_step", "_timestamp", name] for name in _telling(points)]
    return [row for wanted in keys for row in found.history(samples=_SAMPLES, keys=wanted, pandas=False)]


def _telling(points: Sequence[Point]) -> list[str]:
    """Names of which every point has one: as few requests as there are kinds of points, not one a metric."""
    found: list[str] = []
    for values in {tuple(sorted(point.values)): None for point in points}:
        if not any(name in found for name in values):
            found.append(values[0])
    return found


def _group(place: _Place) -> str | None:
    found = _find(place, place.trainer) if place.trainer else None
    return (found.group if found is not None else None) or place.trainer


def _find(place: _Place, run: str) -> Any:
    """The run as the server has it now; None when there is none."""
    import wandb

    api = wandb.Api(overrides={"project": place.project, **({"entity": place.entity} if place.entity else {})})
    try:
        return api.run(f"{place.project}/{run}" if place.entity is None else f"{place.entity}/{place.project}/{run}")
    except (ValueError, wandb.errors.CommError) as error:
        if re.search(r"not find|not found|404", str(error), re.IGNORECASE):
            return None
        raise
