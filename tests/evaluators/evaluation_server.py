"""A process that stands for a worker: it imports once, and forks a child for every order (a JSON line) that it reads.

It imports no torch operation of its own, as a worker does not; each child answers with one JSON line in a file, or dies.
"""

import json
import os
import signal
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

import local_tasks

from assayer.errors import EvaluatorError
from assayer.evaluators import lm_eval
from assayer.harness import answers, requests
from assayer.harness.index import default_index
from assayer.progress import Binding, Progress


def count_calls(kill_at: int | None) -> list[int]:
    """Counts the batches that go to the model; at number ``kill_at`` this process is killed."""
    from lm_eval.models.huggingface import HFLM

    counted = [0]

    def counting(method: Any) -> Any:
        def call(*arguments: Any, **words: Any) -> Any:
            counted[0] += 1
            if counted[0] == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return method(*arguments, **words)

        return call

    HFLM._model_call = counting(HFLM._model_call)
    HFLM._model_generate = counting(HFLM._model_generate)
    return counted


def note_what_is_built() -> list[str]:
    """The names of the tasks whose requests are built from now on."""
    built: list[str] = []
    own = requests._build

    def build(task: Any, limit: int | None, settings: Any, lm: Any) -> None:
        built.append(task.task_name)
        own(task, limit, settings, lm)

    requests._build = build
    return built


def register_counting() -> None:
    """A model of lm-eval that makes up its batches by itself and is no torch module, as vllm's is: it counts letters."""
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model

    class Counting(LM):  # type: ignore[misc, no-any-unimported, unused-ignore]
        def __init__(self, pretrained: str, tokenizer: str | None = None, tensor_parallel_size: int = 1, **others: Any) -> None:
            super().__init__()
            assert Path(pretrained, "model.safetensors").exists()
            assert tensor_parallel_size == 2

        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            return [(-float(request.args[1].count("e")), False) for request in requests]

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            return [-float(request.args[0].count("e")) for request in requests]

        def generate_until(self, requests: list[Any]) -> list[str]:
            return [request.args[0][:1] for request in requests]

    register_model("counting")(Counting)


def evaluate(order: dict[str, Any]) -> dict[str, Any]:
    """One evaluation; with ``progress`` every chunk is saved."""
    answers._PAUSE = answers._SHARE = 0.0
    calls = count_calls(order.get("kill_at"))
    details: dict[str, Any] = {}
    reports: list[tuple[int, int | None]] = []
    progress = None
    if "progress" in order:
        rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        binding = Binding("identity", "regular", "lm_eval", None, {}, world_size)
        report = lambda done, total: reports.append((done, total))  # noqa: E731
        progress = Progress(Path(order["progress"]), binding, rank, world_size, order.get("point"), report)
    built = note_what_is_built()
    metrics = lm_eval.evaluate(order["path"], **order["arguments"], progress=progress, details=details, **order.get("more", {}))
    return {"metrics": metrics, "details": details, "calls": calls[0], "reports": reports, "built": built}


def reference(order: dict[str, Any]) -> dict[str, Any]:
    """What lm-eval's own simple_evaluate finds, with the same batch size on the same device."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    words = dict(order["arguments"])
    tasks = words.pop("tasks").split(",")
    manager = TaskManager(include_path=words.pop("include_path"), include_defaults=False)
    model = {"pretrained": order["path"], **dict(pair.split("=") for pair in words.pop("model_args", "").split(",") if pair)}
    model = {name: int(value) if value.isdigit() else value for name, value in model.items()}
    found = simple_evaluate(words.pop("model", "hf"), model, tasks=tasks, task_manager=manager, device="cpu", **words)
    return {"results": {task: {k: float(v) for k, v in m.items() if "," in k and v != "N/A"} for task, m in found["results"].items()}}


def save(order: dict[str, Any]) -> dict[str, Any]:
    local_tasks.save_model(Path(order["path"]), **order["arguments"])
    return {}


def check(order: dict[str, Any]) -> dict[str, Any]:
    lm_eval.check(order["arguments"])
    return {}


def state(order: dict[str, Any]) -> dict[str, Any]:
    """What the process that forks looks like."""
    import torch

    threads = [Path(f"/proc/self/task/{thread}/comm").read_text().strip() for thread in os.listdir("/proc/self/task")]
    return {"threads": threading.active_count(), "native": threads, "cuda": torch.cuda.is_initialized()}


def index(order: dict[str, Any]) -> dict[str, Any]:
    """What the kept index lacks or has otherwise than lm-eval's own, which is not asked a second time."""
    from lm_eval import tasks

    own = tasks.TaskManager().task_index
    default_index.cache_clear()
    tasks.TaskManager = None
    found = default_index()
    other = [
        n for n, e in own.items() if n not in found or (e.kind, e.yaml_path, e.tags) != (found[n].kind, found[n].yaml_path, found[n].tags)
    ]
    return {"count": len(found), "other": other, "more": sorted(set(found) - set(own))}


def work(order: dict[str, Any]) -> None:
    os.environ.update(order.get("environment", {}))
    register_counting()
    try:
        answer = {"evaluate": evaluate, "reference": reference, "check": check, "save": save, "index": index}[order["do"]](order)
    except EvaluatorError as error:
        answer = {"error": str(error)}
    except BaseException:
        answer = {"bug": traceback.format_exc()}
    Path(order["out"]).write_text(json.dumps(answer))
    sys.stdout.flush()
    os._exit(0)


def main() -> None:
    lm_eval._import_ahead()
    print(json.dumps(state({})), flush=True)
    for line in sys.stdin:
        orders = json.loads(line)
        if orders == "warm":
            lm_eval.warm()
            print(json.dumps(state({})), flush=True)
            continue
        children = []
        for order in orders:
            child = os.fork()
            if child == 0:
                os.dup2(2, 1)
                work(order)
            children.append(child)
        print(json.dumps([os.waitpid(child, 0)[1] for child in children]), flush=True)


if __name__ == "__main__":
    main()
