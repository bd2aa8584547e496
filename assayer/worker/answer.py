"""A served evaluation in its child: calls what a model's name stands for, and turns what comes back into results in lmms-eval's form.

``evaluate`` is called like any evaluator; what it is told of the request are its arguments.
"""

import contextlib
import inspect
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from assayer import refs
from assayer.files import short_name, write_json
from assayer.formats import is_inside_checkpoint
from assayer.harness import lmms
from assayer.record import flatten
from assayer.refs import Reference

if TYPE_CHECKING:
    from assayer.progress import Progress

__all__ = ["ANSWER", "PATH_KEYS", "Tables", "evaluate", "paths_in", "with_path"]

# Where among a record's details the answer stands.
ANSWER = "served"

# The names under which a request's model_args may lead to the checkpoint, the first that is there counts.
PATH_KEYS = ("pretrained", "model", "model_path")

# {task: {"<metric>,<filter>": number}}
Tables = dict[str, dict[str, Any]]


def paths_in(request: Mapping[str, Any]) -> list[str]:
    """The names among ``model_args`` under which the checkpoint's path stands: where the path to be merged does, whatever that is called;
    else the first of ``PATH_KEYS``, if one is there."""
    given = request["model_args"] or {}
    merged = (request.get("lmms_engine_kwargs") or {}).get("model_path")
    if merged is not None:
        names = [name for name, value in given.items() if isinstance(value, str) and os.path.normpath(value) == os.path.normpath(merged)]
        if names:
            return names
    return [name for name in PATH_KEYS if isinstance(given.get(name), str)][:1]


def with_path(request: Mapping[str, Any], path: str | None) -> dict[str, Any]:
    """The model's arguments with this path in the checkpoint's place; where none led to one, as ``pretrained``."""
    given = dict(request["model_args"] or {})
    return given if path is None else given | dict.fromkeys(paths_in(request) or PATH_KEYS[:1], path)


def evaluate(
    path: str | None,
    *,
    kind: str,
    request: dict[str, Any],
    reference: dict[str, str],
    arguments: dict[str, Any],
    name: str,
    output: str | None,
    label: str,
    step: int | None = None,
    original_path: str | None = None,
    weights: str | None = None,
    output_dir: str = "",
    samples_path: str | None = None,
    progress: "Progress | None" = None,
    details: dict[str, Any] | None = None,
) -> Mapping[str, Any]:
    """The metrics of one request, by task.

    Args:
        path: what is evaluated; None: the request names no checkpoint.
        kind: ``own``, ``lm_eval`` or ``lmms_eval``.
        request: an EvaluateRequest's JSON.
        reference: the function that the model's name stands for.
        arguments: the keywords of a built-in evaluator.
        name: of the model's folder among the results.
        output: where the results go; None: to ``output_dir``.
        label: what the files' names begin with, of this job alone.
        step: and all that follow: as any evaluator gets them.
        original_path: see above.
        weights: see above.
        output_dir: see above.
        samples_path: see above.
        progress: see above.
        details: see above.

    Raises:
        AssayerError: it returned no metrics.
    """
    told: dict[str, Any] = details if details is not None else {}
    offered = {
        "step": step,
        "original_path": original_path,
        "weights": weights,
        "output_dir": output_dir,
        "samples_path": samples_path if request["log_samples"] or request["predict_only"] else None,
        "progress": progress,
        "details": told,
    }
    folder = _folder(output, output_dir, original_path, told)
    request = {**request, "num_gpus": max(1, min(int(request["num_gpus"]), _gpus()))}
    if kind == "lmms_eval":
        tables, found = _run_lmms(path, request, Path(output_dir), folder, label)
    else:
        if kind == "own":
            fields = {**request, "model_args": with_path(request, path)}
            returned = _called(Reference(**reference), path, {}, {**fields, **offered})
        else:
            returned = _called(Reference(**reference), path, arguments, offered)
        if os.environ.get("RANK", "0") != "0":
            # The outcome is that of rank 0.
            return returned  # type: ignore[no-any-return]
        tables = from_flat(returned, told) if kind == "lm_eval" else to_tables(returned, request)
        found = _written(tables, folder / short_name(name, 80), label, request, samples_path)
    told[ANSWER] = {"result": found, "metrics": _finite(tables)}
    return _numbers(tables)


def _gpus() -> int:
    """How many GPUs this evaluation sees; no client's number starts more processes than that."""
    return len([gpu for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu])


def _called(reference: Reference, path: str | None, arguments: dict[str, Any], offered: dict[str, Any]) -> Any:
    """What the function returns, given of ``offered`` what it names."""
    function: Callable[..., Any] = refs.load(reference)
    named = list(inspect.signature(function).parameters)[1:]
    return function(path, **arguments, **{name: value for name, value in offered.items() if name in named and name not in arguments})


def _folder(output: str | None, own: str, checkpoint: str | None, details: dict[str, Any]) -> Path:
    """The folder of the results: the one that was asked for, where that can be written, and lies in no checkpoint by now."""
    if output is not None:
        try:
            if is_inside_checkpoint(output, checkpoint or ""):
                raise OSError(0, "it lies inside a checkpoint")
            Path(output).mkdir(parents=True, exist_ok=True)
            if os.access(output, os.W_OK | os.X_OK):
                return Path(output)
            reason = "it cannot be written"
        except OSError as error:
            reason = str(error.strerror)
        details["note"] = f"output_dir {output} is not used ({reason}); the results are in {own}"
    return Path(own)


def to_tables(returned: object, request: Mapping[str, Any]) -> Tables:
    """What an evaluator of one's own returned, ``{task: {metric: number}}`` or flat, in lmms-eval's form.

    What is flat belongs to the task where one was asked for, else to the model.

    Raises:
        AssayerError: these are no metrics.
    """
    flatten(returned)
    assert isinstance(returned, Mapping)
    tables: Tables = {}
    bare = request["tasks"][0] if len(request["tasks"]) == 1 else request["model"]
    for name, value in returned.items():
        task, inner = (str(name), value) if isinstance(value, Mapping) else (bare, {name: value})
        if inner:
            tables.setdefault(task, {}).update({_key(metric): number for metric, number in flatten(inner)[0].items()})
    return tables


def _key(metric: str) -> str:
    return metric if "," in metric else f"{metric},none"


def from_flat(metrics: Mapping[str, float], details: Mapping[str, Any]) -> Tables:
    """What the evaluator lm_eval returned, ``<task>/<metric>`` with ``,<filter>`` where there are several, in lmms-eval's form."""
    tables: Tables = {}
    filters = details.get("filters", {})
    for name, value in metrics.items():
        task, _, metric = name.rpartition("/")
        key = metric if "," in metric else f"{metric},{filters.get(name, 'none')}"
        tables.setdefault(task, {})[key] = value if math.isfinite(value) else None
    return tables


def _written(tables: Tables, folder: Path, label: str, request: Mapping[str, Any], samples: str | None) -> dict[str, Any]:
    """Writes the results' file, and names it and the samples'."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{label}_results.json"
    shown = {task: {"alias": task, **table} for task, table in tables.items()}
    kept = {
        "model": request["model"],
        "model_args": request["model_args"],
        "limit": request["limit"],
        "num_fewshot": request["num_fewshot"],
    }
    write_json(path, {"results": shown, "config": kept})
    found = _split_samples(samples, folder, label) if samples is not None and os.path.exists(samples) else []
    return {folder.name: {"results": str(path), "samples": found}}


def _split_samples(samples: str, folder: Path, label: str) -> list[str]:
    """One file a task, as lmms-eval writes them."""
    files: dict[str, Any] = {}
    with contextlib.ExitStack() as stack, open(samples) as lines:
        for line in lines:
            told = json.loads(line)
            task = str(told.get("task", "samples")) if isinstance(told, dict) else "samples"
            if task not in files:
                path = folder / short_name(f"{label}_samples_{task.replace('/', '_')}.jsonl", 0)
                files[task] = stack.enter_context(open(path, "w"))
            files[task].write(line)
    return sorted(str(file.name) for file in files.values())


def _run_lmms(path: str | None, request: dict[str, Any], own: Path, folder: Path, label: str) -> tuple[Tables, dict[str, Any]]:
    """Runs lmms-eval into a folder of its own, and moves what it left to where it belongs."""
    work = own / "lmms_eval"
    # What an earlier attempt has left.
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    lmms.run(request, with_path(request, path), str(work))
    tables: Tables = {}
    found: dict[str, Any] = {}
    for name, (results, samples, told) in lmms.results_below(work).items():
        target = folder / name
        target.mkdir(parents=True, exist_ok=True)
        moved = [shutil.move(file, target / f"{label}_{file.name}") for file in (results, *samples)]
        found[name] = {"results": str(moved[0]), "samples": [str(file) for file in moved[1:]]}
        tables |= {task: lmms.plain(table) for task, table in told.items() if isinstance(table, dict)}
    shutil.rmtree(work, ignore_errors=True)
    return tables, found


def _finite(tables: Tables) -> Tables:
    """The numbers of the tables; what is not finite is null."""
    kept = {
        task: {key: _number(value) for key, value in table.items() if key != "alias" and (value is None or _is_number(value))}
        for task, table in tables.items()
    }
    return {task: table for task, table in kept.items() if table}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number(value: Any) -> Any:
    return value if value is not None and math.isfinite(value) else None


def _numbers(tables: Tables) -> Tables:
    """The tables as metrics of the record, where null is written for what is not finite."""
    numbers = {task: {key: math.nan if value is None else value for key, value in table.items()} for task, table in _finite(tables).items()}
    return numbers
