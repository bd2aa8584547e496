"""Where records lie below a directory."""

import os
from collections.abc import Iterator
from pathlib import Path

from assayer.errors import UsageError
from assayer.files import natural_key, printable

__all__ = ["find_records"]

# How deep records lie below a directory of results folders.
_RESULTS_DEPTH = 2
# What evaluators leave beside records: nothing in there is a results folder.
_FILES = (".files", ".progress")


def find_records(path: Path) -> list[Path]:
    """The files of records of a directory of runs, of a run, of a results folder, of an evaluator's folder in it, or that file itself.

    A results folder is called ``evals``; where there is none below the directory, it is one of ``--results_dir``, or the directory of them.

    Raises:
        UsageError: there is no such path, or no record.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UsageError(f"no directory {printable(str(path))}; give one that holds evals/, or a results folder")
    found = {file for folder in _results_folders(path) for file in _json_files(folder, 1)}
    if path.parent.name == "evals":
        found |= set(_json_files(path, 0))
    found = found or set(_json_files(path, _RESULTS_DEPTH))
    if not found:
        raise UsageError(f"no record below {printable(str(path))}; give a directory that holds evals/, or a results folder")
    return sorted(found, key=lambda file: natural_key(str(file)))


def _results_folders(path: Path) -> Iterator[Path]:
    """Every folder called ``evals``, the path itself included. One may also be a directory of runs, so it is looked into like any other."""
    for folder, below, _ in os.walk(path):
        if os.path.basename(folder) == "evals":
            yield Path(folder)
        below[:] = [name for name in below if name[0] != "." and not name.endswith(_FILES)]


def _json_files(folder: Path, depth: int) -> list[Path]:
    """The files that may be records, in the folder itself and in those below it."""
    return [file for level in range(depth + 1) for file in folder.glob("/".join([*["[!.]*"] * level, "*.json"])) if file.is_file()]
