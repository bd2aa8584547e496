"""What the worker's own process imports before it forks, so that no evaluation pays for it.

Only imports: after one tensor operation (or CUDA) in this process, every child of it would hang in its own first one.
"""

import contextlib
import importlib
import logging
import os
import threading
from collections.abc import Callable
from typing import Any

from assayer import refs
from assayer.refs import Reference

__all__ = ["preload", "warm"]

logger = logging.getLogger(__name__)

# Seconds between two signs of life while it imports.
_BEAT = 5.0

_warmed: set[str] = set()


# The modules whose functions jobs name; else each job's own process would import them anew.
_RECIPES = ("assayer.worker.eval_job", "assayer.worker.served_job")


def preload() -> None:
    """Imports what every evaluation needs, and torch, where it is installed."""
    for name in _RECIPES:
        importlib.import_module(name)
    # Packages that ask at their import whether there is a GPU ask NVML then; CUDA's own answer would make it unusable in every child.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    with contextlib.suppress(ImportError):
        importlib.import_module("torch")


def warm(evaluator: object, beat: Callable[[], None]) -> None:
    """Imports what a built-in evaluator needs, once a worker; ``beat`` is called every few seconds meanwhile.

    Args:
        evaluator: the job's argument of this name, which may be anything.
        beat: tells that this worker lives.
    """
    reference = _reference(evaluator)
    if reference is None or reference.target in _warmed or reference.builtin not in refs.builtins():
        return
    _warmed.add(reference.target)
    thread = threading.Thread(target=_import, args=(reference,), daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(_BEAT)
        if thread.is_alive():
            beat()


def _reference(evaluator: object) -> Reference | None:
    told: Any = evaluator.get("reference") if isinstance(evaluator, dict) else None
    try:
        return Reference(**told) if isinstance(told, dict) else None
    except TypeError:
        return None


def _import(reference: Reference) -> None:
    try:
        module = refs.builtin_module(reference)
        if module is not None:
            module.warm()
    except Exception as error:
        # The evaluation itself meets the same, and its record says so.
        logger.warning("%s could not be imported ahead: %s: %s", reference, type(error).__name__, error)
