"""A plan and a task for tests that need any."""

from assayer.plan import Evaluator, Plan, host_name
from assayer.queues.enqueue import Task
from assayer.refs import Reference

EVALUATOR = Evaluator("e", Reference("/none/e.py", "e", "/none"))


def plan(**fields: object) -> Plan:
    return Plan(**{"directory": "/run", "evaluator": EVALUATOR, "host": host_name(), "given": 1.0, **fields})  # type: ignore[arg-type]


def task(**fields: object) -> Task:
    base = {"checkpoint": "/run/m_step1.pt", "format": "single_file", "step": 1, "epoch": None, "tokens": None, "identity": "a" * 32}
    return Task(**{**base, "evaluator": EVALUATOR, "results_dir": None, "timeout": 86400, "retries": 2, **fields})  # type: ignore[arg-type]
