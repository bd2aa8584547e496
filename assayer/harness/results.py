"""What lm-eval found, as flat metrics, facts for the record, and lines of samples."""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from assayer.files import write_whole

__all__ = ["facts_of", "metrics_of", "write_samples"]

_STDERR = "_stderr"


def metrics_of(results: Mapping[str, Any]) -> dict[str, float]:
    """``<task>/<metric>``, or ``<task>/<metric>,<filter>`` where a metric has several filters, with ``_stderr`` after the metric beside.

    Groups are tasks like others. What is no number (``N/A``) is left out.
    """
    found: dict[str, float] = {}
    for key, _, value in _named(results):
        found[key] = value
    return found


def _named(results: Mapping[str, Any]) -> Iterator[tuple[str, str, float]]:
    """Of each number its name as a metric, its filter, and itself."""
    for task, values in results["results"].items():
        named = [(*key.partition(",")[::2], float(value)) for key, value in values.items() if "," in key and _is_number(value)]
        filters: dict[str, set[str]] = {}
        for metric, name, _ in named:
            filters.setdefault(metric.removesuffix(_STDERR), set()).add(name)
        for metric, name, value in named:
            several = len(filters[metric.removesuffix(_STDERR)]) > 1
            yield f"{task}/{metric},{name}" if several else f"{task}/{metric}", name, value


def _is_number(value: Any) -> bool:
    # numpy's numbers are none of Python's, save float64.
    return not isinstance(value, bool | str) and hasattr(value, "__float__") and getattr(value, "ndim", 0) == 0


def facts_of(results: Mapping[str, Any]) -> dict[str, Any]:
    """What the record tells beside the metrics: versions, and of each task its version, samples, examples, and which way is better."""
    import datasets
    import lm_eval
    import transformers

    tasks = {}
    for name, samples in results.get("n-samples", {}).items():
        tasks[name] = {
            "version": _json(results["versions"].get(name)),
            "samples": int(samples["effective"]),
            "num_fewshot": _json(results["n-shot"].get(name)),
            "higher_is_better": {str(k): _json(v) for k, v in results["higher_is_better"].get(name, {}).items()},
        }
    versions = {"lm_eval": lm_eval.__version__, "transformers": transformers.__version__, "datasets": datasets.__version__}
    # Of a metric's only filter the metric's name says nothing.
    filters = {key: name for key, name, _ in _named(results) if "," not in key and name != "none"}
    return {"versions": versions, "tasks": tasks, **({"filters": filters} if filters else {})}


def _json(value: Any) -> Any:
    """A fact as JSON knows it; what it does not know as text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def write_samples(path: Path, samples: Mapping[str, list[dict[str, Any]]]) -> int:
    """Writes one JSON line a sample, its task first, whole or not at all; the number of lines."""
    from lm_eval.utils import handle_non_serializable

    lines = [json.dumps({"task": task, **sample}, default=handle_non_serializable) for task, found in samples.items() for sample in found]
    write_whole(path, "".join(f"{line}\n" for line in lines).encode())
    return len(lines)
