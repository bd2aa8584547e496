"""What a worker's own process imports before it forks: built-in evaluators, once, and nothing that a stranger names."""

import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from assayer import refs
from assayer.worker import warm as warming


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The calls of the ``warm`` of a stand-in for the built-in ``loss``, which notes in which thread it runs."""
    found: list[str] = []
    module: Any = ModuleType("assayer.evaluators.loss")

    def warm() -> None:
        found.append(threading.current_thread().name)
        time.sleep(0.3)
        raise RuntimeError("no matter")

    module.warm = warm
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(refs, "builtins", lambda: ["loss"])
    monkeypatch.setattr(warming, "_warmed", set())
    monkeypatch.setattr(warming, "_BEAT", 0.05)
    return found


def test_a_built_in_evaluator_is_imported_once_while_the_worker_goes_on_to_say_that_it_lives(calls: list[str], tmp_path: Path) -> None:
    evaluator = {"reference": asdict(refs.parse("loss", tmp_path))}
    beats: list[int] = []
    before = threading.active_count()
    warming.warm(evaluator, lambda: beats.append(1))
    assert len(beats) > 1
    assert threading.active_count() == before
    # It failed; the evaluation itself will say so, and the next job is not kept waiting by it.
    warming.warm(evaluator, lambda: beats.append(1))
    assert len(calls) == 1
    assert calls != [threading.main_thread().name]


@pytest.mark.parametrize(
    "evaluator",
    [
        None,
        "loss",
        {},
        {"reference": "loss"},
        {"reference": {"target": "os", "function": "getcwd", "cwd": "/"}},
        {"reference": {"target": "assayer.evaluators.other", "function": "evaluate", "cwd": "/"}},
        {"reference": {"target": "/tmp/loss.py", "function": "evaluate", "cwd": "/"}},
        {"reference": {"name": "loss"}},
    ],
)
def test_nothing_else_is_imported_whatever_a_job_names(calls: list[str], evaluator: object) -> None:
    before = set(sys.modules)
    warming.warm(evaluator, lambda: None)
    assert not calls
    assert set(sys.modules) == before
