"""The names under which an evaluation's metrics stand on a training's curves."""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["STYLES", "named"]

STYLES = ("slash", "lmms_engine")

# As lm-eval writes them, and lmms-eval's other kinds of them (0.7.3).
_STANDARD_ERROR = re.compile(r"_stderr(_[a-z]+)?,")

_JOINTS = {"slash": "/", "lmms_engine": "_"}


def named(metrics: Mapping[str, Any], style: str = "slash", weights: str = "regular") -> dict[str, float]:
    """``{task: {"<metric>,<filter>": value}}`` as ``eval/<task>/<metric>`` (EMA weights: ``eval_ema/...``), finite numbers alone.

    A metric with several filters keeps their names (``eval/<task>/<metric>/<filter>``; the filter ``none`` adds nothing): LMMs-Engine
    lets them overwrite each other. Standard errors are left out. A number that belongs to no task is ``eval/<name>``.

    Args:
        style: ``slash``, or ``lmms_engine``: ``eval/<task>_<metric>``, ``eval/<task>_<metric>_<filter>``.
    """
    prefix = "eval" if weights == "regular" else f"eval_{weights}"
    joint = _JOINTS[style]
    found: dict[str, float] = {}
    for parts, value in _parts(metrics):
        name = f"{prefix}/{joint.join(parts)}"
        # "a_b" of "c" and "b" of "c_a" join to one name: the later keeps its slashes.
        found[name if name not in found else f"{prefix}/{'/'.join(parts)}"] = value
    return found


def _parts(metrics: Mapping[str, Any]) -> Iterator[tuple[list[str], float]]:
    for task, values in metrics.items():
        if not isinstance(values, Mapping):
            if (number := _number(values)) is not None:
                yield [task], number
            continue
        keys = [key for key in values if not _STANDARD_ERROR.search(key)]
        for key in keys:
            metric, _, chosen = key.partition(",")
            alike = [other for other in keys if other.partition(",")[0] == metric]
            # "acc" and "acc,none" in one task: neither may take the other's place.
            plain = len(alike) == 1 or not chosen or (chosen == "none" and metric not in keys)
            if (number := _number(values[key])) is not None:
                yield [task, metric] if plain else [task, metric, chosen], number


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None
