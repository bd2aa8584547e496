"""What must be true after any faults: nothing lost, nothing recorded twice, nothing half done, and the trainer undisturbed."""

import contextlib
import itertools
import json
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conftest import House
from evidence import Sight, Version
from fake_trainer import FILES
from rq.job import Job
from rq.serializers import JSONSerializer

from assayer.queues.enqueue import open_queue
from assayer.record import Place

__all__ = [
    "Moment",
    "debts",
    "held_before_the_end",
    "ledger_faults",
    "left_in_redis",
    "left_on_disk",
    "record_faults",
    "status_faults",
    "still_owed",
    "trainer_faults",
]

# What only says that the weights were away: it may be said again.
_UNSETTLED = ("vanished", "superseded")
# Losing its data, Redis also loses what waits in it: of a checkpoint that was deleted meanwhile, and not held, nothing is known.
_LOSING = ("flush redis", "kill redis", "kill everything")
# How many of a folder's checkpoints are held at most, as the watches of a trial have it.
_HELD_MAX = 8
# Seconds that a clock and a poller may be apart.
_SLACK = 0.5


@dataclass(frozen=True)
class Moment:
    """One fault: when it was done (seconds since the epoch), its kind, and what was done."""

    at: float
    kind: str
    detail: str


def still_owed(versions: list[Version], sights: list[Sight]) -> list[Version]:
    """The versions that lie there, whole, and have no finished record yet."""
    finished = {(s.checkpoint, s.identity) for s in sights if s.status == "finished"}
    return [v for v in versions if v.end is None and v.whole and (v.path, v.identity) not in finished]


def held_before_the_end(
    versions: list[Version],
    sights: list[Sight],
    looks: dict[str, set[float]],
    away: list[tuple[str, float, float]],
    results: dict[str, str | None],
) -> set[tuple[str, float]]:
    """Path and value of the versions that must have had a second name before they were deleted or written anew.

    A look that finds a checkpoint whole holds it, and has done so when the next one begins: unless the results lie on another file system,
    or so many others waited, too, that the newest of them may have taken its place.
    """
    first: dict[tuple[str, str], float] = {}
    for sight in sights:
        first.setdefault((sight.checkpoint, sight.identity), sight.at)
    waits = {
        (v.path, v.value): (v.whole, first.get((v.path, v.identity), v.end if v.end is not None else float("inf")))
        for v in versions
        if v.whole is not None
    }
    found = set()
    for version in versions:
        key = (version.path, version.value)
        folder = os.path.dirname(version.path)
        if version.whole is None or version.end is None or results[folder] is not None or len(_seen_at(version, looks, away)) < 2:
            continue
        begun, until = waits[key]
        others = [wait for (path, _), wait in waits.items() if os.path.dirname(path) == folder and wait[0] <= until and wait[1] >= begun]
        if max(sum(a <= at <= b for a, b in others) for at in [begun, *(a for a, _ in others)]) <= _HELD_MAX:
            found.add(key)
    return found


def _seen_at(version: Version, looks: dict[str, set[float]], away: list[tuple[str, float, float]]) -> list[float]:
    """When the looks began that must have found this version whole."""
    assert version.whole is not None and version.end is not None
    folder = os.path.dirname(version.path)
    gone = [(a - _SLACK, b + _SLACK) for f, a, b in away if f == folder]
    return [t for t in looks.get(folder, set()) if version.whole < t < version.end - _SLACK and not any(a < t < b for a, b in gone)]


def debts(
    versions: list[Version],
    sights: list[Sight],
    looks: dict[str, set[float]],
    away: list[tuple[str, float, float]],
    faults: list[Moment],
    held: set[tuple[str, float]],
) -> tuple[list[str], list[str]]:
    """Versions without a record that should have one, and those excused: they could not be held, and Redis lost its data meanwhile."""
    recorded = {(s.checkpoint, s.identity) for s in sights}
    lost: list[str] = []
    excused: list[str] = []
    for version in versions:
        if version.whole is None or version.end is None or (version.path, version.identity) in recorded:
            continue
        seen = _seen_at(version, looks, away)
        if len(seen) < 2:
            continue
        is_held = (version.path, version.value) in held
        losses = [f.kind for f in faults if f.kind in _LOSING and min(seen) - 2 < f.at]
        text = f"{version.name} lay there for {version.end - version.whole:.1f} s and {len(seen)} looks, and has no record"
        (excused if losses and not is_held else lost).append(text + (" though it was held" if is_held else ""))
    return lost, excused


def record_faults(versions: list[Version], sights: list[Sight], results: dict[str, str | None], held: set[tuple[str, float]]) -> list[str]:
    """Records of weights that never were, untrue ones, changed ones, and those in a wrong place or more than one.

    What a record says must be true when it is first seen: the evaluation itself has ended before its weights are looked at again. What was
    ``held`` can only have been written anew under the evaluation: deleted, it is evaluated all the same.
    """
    known = {(v.path, v.identity): v for v in versions if v.identity}
    deletions = [(v.path, v.deleted) for v in versions if v.deleted]
    problems = []
    for sight in sights:
        version = known.get((sight.checkpoint, sight.identity))
        label = f"{os.path.basename(sight.file)} ({sight.status}, ended {sight.ended})"
        if version is None:
            problems.append(f"{label} tells of weights that never lay whole at {sight.checkpoint}")
            continue
        place = Place.of(sight.checkpoint, "look", results[os.path.dirname(sight.checkpoint)])
        if Path(sight.file) not in (place.record, place.earlier(sight.identity)):
            problems.append(f"{label} lies at {sight.file}, not at {place.record}")
        if sight.status == "finished" and sight.value != version.value:
            problems.append(f"{label} holds the value {sight.value} of other weights than {version.name}")
        elif sight.status == "vanished" and not any(
            p == version.path and version.whole < at <= sight.at for p, at in deletions if version.whole
        ):
            # It may also have been written anew first, and deleted then.
            problems.append(f"{label}: {version.name} was not deleted by then")
        elif sight.status == "superseded" and (version.end is None or version.end > sight.at):
            problems.append(f"{label}: {version.name} was still there")
        elif sight.status in _UNSETTLED and (version.path, version.value) in held and not version.rewritten:
            problems.append(f"{label}: {version.name} was held when it was deleted")
        elif sight.status == "superseded" and not any(
            v.path == version.path and v.value != version.value and version.end <= v.begun <= sight.at for v in versions if version.end
        ):
            problems.append(f"{label}: nothing else was saved in place of {version.name}")
        elif sight.status not in ("finished", *_UNSETTLED):
            problems.append(f"{label}: {version.name} has this record instead of a finished one")
    return list(dict.fromkeys(problems)) + _changed(known, sights) + _in_two_places(sights)


def _changed(known: dict[tuple[str, str], Version], sights: list[Sight]) -> list[str]:
    contents: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for sight in sights:
        found = contents.setdefault((sight.checkpoint, sight.identity), [])
        if (sight.status, sight.ended) not in found:
            found.append((sight.status, sight.ended))
    return [
        f"{known[key].name if key in known else key} was recorded {len(found)} times: {found}"
        for key, found in contents.items()
        if len(found) > 1 and any(status not in _UNSETTLED for status, _ in found)
    ]


def _in_two_places(sights: list[Sight]) -> list[str]:
    """The files as they are now: one a version, or two names of one file."""
    last = {sight.file: sight for sight in sights}
    inodes: dict[tuple[str, str], dict[str, int]] = {}
    for sight in last.values():
        with contextlib.suppress(OSError):
            inodes.setdefault((sight.checkpoint, sight.identity), {})[sight.file] = os.stat(sight.file).st_ino
    return [
        "one version has records in " + " and ".join(f"{file} ({last[file].status}, ended {last[file].ended})" for file in sorted(files))
        for files in inodes.values()
        if len(set(files.values())) > 1
    ]


def ledger_faults(ledger: list[dict[str, Any]], faults: list[Moment]) -> tuple[list[str], int, int]:
    """Second runs that no fault explains, and runs of one version side by side; how many runs there were, and how many were second ones."""
    ends = {line["run"]: line["at"] for line in ledger if line["event"] == "end"}
    runs: dict[tuple[str, float], list[tuple[float, float | None]]] = {}
    for line in ledger:
        if line["event"] == "start":
            runs.setdefault((line["path"], line["value"]), []).append((line["at"], ends.get(line["run"])))
    problems, again = [], 0
    for (path, value), spans in runs.items():
        spans.sort()
        for (start, end), (second, _) in itertools.pairwise(spans):
            again += 1
            if end is not None and second < end:
                problems.append(
                    f"{path} with value {value:g} was evaluated twice side by side: from {start:.2f} to {end:.2f} and from {second:.2f}"
                )
            if end is not None and not any(start - 60 < f.at < second for f in faults):
                problems.append(f"{path} with value {value:g} was evaluated again at {second:.2f} though no fault came in between")
    return problems, sum(map(len, runs.values())), again


def left_in_redis(house: House, sights: list[Sight]) -> list[str]:
    """What is stuck: started, handed over, or waiting although its record is there."""
    recorded = {(s.checkpoint, s.identity) for s in sights if s.status == "finished"}
    connection = house.connection()
    queue = open_queue(connection, "evaluation")
    left = [f"the started registry holds {entry.decode()}" for entry in connection.zrange(queue.started_job_registry.key, 0, -1)]
    left += [f"the intermediate queue holds {entry.decode()}" for entry in connection.lrange(queue.intermediate_queue_key, 0, -1)]
    for job_id in queue.get_job_ids():
        job = Job.fetch(job_id, connection=connection, serializer=JSONSerializer)
        about = (job.kwargs["checkpoint"], job.kwargs["identity"])
        left.append(f"job {job_id[:8]} of {about[0]} waits" + (", whose record is there" if about in recorded else ""))
    watch = open_queue(connection, "watch")
    ticks = (
        connection.zcard(watch.scheduled_job_registry.key) + connection.llen(watch.key) + connection.zcard(watch.started_job_registry.key)
    )
    if ticks > 2:
        left.append(f"the watch queue holds {ticks} ticks")
    connection.close()
    return left


def trainer_faults(journal: list[dict[str, Any]], versions: list[Version], code: int) -> list[str]:
    """Saves and deletes that did not succeed, and strangers' files in checkpoints."""
    problems = [f"the trainer failed: {line['error']}" for line in journal if line["event"] == "error"]
    if code:
        problems.append(f"the trainer ended with code {code}")
    problems += [f"the save of {version.name} did not end" for version in versions if version.whole is None]
    count = Counter(line["event"] for line in journal)
    if count["delete"] != count["deleted"]:
        problems.append(f"{count['delete']} deletes were begun, {count['deleted']} done")
    kinds = {line["path"]: line["kind"] for line in journal if line["event"] == "begin"}
    for version in versions:
        kind = kinds[version.path]
        if version.end is None and kind in FILES and sorted(os.listdir(version.path)) != sorted(FILES[kind]):
            problems.append(f"{version.path} holds {sorted(os.listdir(version.path))}")
    return problems


def status_faults(told: dict[str, Any], versions: list[Version]) -> list[str]:
    """Where the status does not say of every checkpoint that lies there, once all is at rest, that it is finished."""
    states = {c["path"]: c["state"] for watch in told["watches"] for c in watch["checkpoints"]}
    there = [version.path for version in versions if version.end is None]
    return [f"the status says of {path}: {states.get(path)}" for path in there if states.get(path) != "finished"]


def left_on_disk(results: list[Path], temporary: Path) -> list[str]:
    """Half-written files and holds below the folders of results, and merged checkpoints in the temporary directory."""
    left = [f"{path} is left" for path in temporary.glob("assayer-scratch-*/*") if path.is_dir()]
    for folder in results:
        for root, below, files in os.walk(folder):
            if os.path.basename(root) == ".hold":
                left += [f"{os.path.join(root, name)} is left" for name in (*below, *files)]
                below.clear()
                continue
            for name in files:
                path = os.path.join(root, name)
                if ".tmp-" in name:
                    left.append(f"{path} is left")
                elif name.endswith(".json"):
                    try:
                        json.loads(Path(path).read_bytes())
                    except ValueError:
                        left.append(f"{path} is no JSON")
    return left
