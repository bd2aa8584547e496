"""Where records lie below a directory."""

import os
from collections.abc import Iterator
from pathlib import Path

from assayer.errors import UsageError
from assayer.files import natural_key, printable

__all__ = ["find_records"]

# How deep below the directory given results folders are looked for, and records below a directory of results folders.
_DEPTH, _RESULTS_DEPTH = 6, 2


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
    folders = [path] if path.name == "evals" or path.parent.name == "evals" else sorted(_results_folders(path))
    found = [file for folder in folders for file in _json_files(folder, 1)] or _json_files(path, _RESULTS_DEPTH)
    if not found:
        raise UsageError(f"no record below {printable(str(path))}; give a directory that holds evals/, or a results folder")
    return sorted(found, key=lambda file: natural_key(str(file)))


def _results_folders(path: Path) -> Iterator[Path]:
    for folder, below, _ in os.walk(path):
        depth = len(Path(folder).relative_to(path).parts)
        if "evals" in below:
            yield Path(folder, "evals")
        below[:] = [name for name in below if name[0] != "." and name != "evals" and depth < _DEPTH]


def _json_files(folder: Path, depth: int) -> list[Path]:
    """The files that may be records, in the folder itself and in those below it."""
    return [file for level in range(depth + 1) for file in folder.glob("/".join([*["[!.]*"] * level, "*.json"])) if file.is_file()]
