"""The name of every task, group and tag that comes with lm-eval, read once for an installation of it.

lm-eval parses its 14,000 YAML files anew in every process (5 s of CPU). What is needed of them is where each name leads, and that is kept
on disk (0.5 s), under a digest of the files' names, sizes and times.
"""

import functools
import json
import os
from pathlib import Path
from typing import Any

from assayer.files import digest
from assayer.harness.cache import keep, kept

__all__ = ["default_index"]

# Changes when the file's form does.
_FORM = "index 1"


@functools.cache
def default_index() -> dict[str, Any]:
    """lm-eval's own index of what comes with it, by name; the contents of tasks, which it reads again when one is made, are left out."""
    from lm_eval import tasks

    root = Path(tasks.__file__).parent
    name = f"{digest(_FORM, *_stamps(root))}.json.z"
    rows = kept(name)
    if rows is None:
        found = dict(tasks.TaskManager().task_index)
        rows = [_row(entry, root) for entry in found.values()]
        keep(name, json.dumps(rows))
    return {row[0]: _entry(row, root) for row in rows}


def _stamps(root: Path) -> list[str]:
    """What tells that a file was changed, added or removed."""
    from lm_eval import __version__

    found = [__version__, str(root)]
    for folder, below, names in os.walk(root):
        below.sort()
        for name in sorted(names):
            if name.endswith(".yaml"):
                status = os.stat(os.path.join(folder, name))
                found.append(f"{os.path.join(folder, name)} {status.st_size} {status.st_mtime_ns}")
    return found


def _row(entry: Any, root: Path) -> list[Any]:
    path = None if entry.yaml_path is None else os.path.relpath(entry.yaml_path, root)
    members = {"task": entry.cfg.get("task")} if entry.kind.name == "GROUP" else None
    return [entry.name, entry.kind.name, path, sorted(entry.tags), members]


def _entry(row: list[Any], root: Path) -> Any:
    from lm_eval.tasks._index import Entry, Kind

    name, kind, path, tags, members = row
    return Entry(name=name, kind=Kind[kind], yaml_path=None if path is None else root / path, cfg=members, tags=set(tags))
