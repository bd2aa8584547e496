"""An installed lmms-eval, run as a process of its own, as its own server runs it; nothing of it is imported here."""

import json
import os
import subprocess
import sys
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from assayer.errors import EvaluatorError
from assayer.files import printable, read_json

__all__ = ["command", "results_below", "run"]

# Lines of its output that are looked through for the reason of a bad end.
_LAST_LINES = 20


def command(request: Mapping[str, Any], model_args: Mapping[str, Any], output: str) -> list[str]:
    """The command line of one evaluation.

    Each value stands in one word with its flag, so that none can pass for a flag of its own.

    Args:
        request: an EvaluateRequest's JSON.
        model_args: by name; none of the values holds a comma.
        output: the folder for the results.
    """
    count = int(request["num_gpus"])
    start = [sys.executable, "-m"]
    if count > 1:
        start += ["accelerate.commands.launch", "--multi_gpu", "--num_processes", str(count), "--num_machines", "1", "-m"]
    words = [*start, "lmms_eval", f"--model={request['model']}", f"--tasks={','.join(request['tasks'])}", f"--output_path={output}"]
    if model_args:
        words.append("--model_args=" + ",".join(f"{name}={value}" for name, value in model_args.items()))
    for name in ("batch_size", "limit", "gen_kwargs"):
        if request[name]:
            words.append(f"--{name}={request[name]}")
    if request["num_fewshot"] is not None:
        words.append(f"--num_fewshot={request['num_fewshot']}")
    return words + [f"--{name}" for name in ("log_samples", "predict_only") if request[name]]


def run(request: Mapping[str, Any], model_args: Mapping[str, Any], output: str) -> None:
    """Runs one evaluation to its end; its output goes to this process's own.

    Raises:
        EvaluatorError: it ended badly; with the last line that says why.
    """
    last: deque[str] = deque(maxlen=_LAST_LINES)
    words = command(request, model_args, output)
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", env=environment
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            if line.strip():
                last.append(line.strip())
    if process.returncode:
        reason = printable(last[-1])[:500] if last else "it said nothing"
        raise EvaluatorError(f"lmms_eval ended with code {process.returncode}: {reason}")


def results_below(output: Path) -> dict[str, tuple[Path, list[Path], dict[str, Any]]]:
    """What lies in a folder of results: for each model's folder the results' file, the samples' files, and the tables ``results``.

    Raises:
        EvaluatorError: there is none.
    """
    found = {}
    for folder in sorted(path for path in output.iterdir() if path.is_dir()):
        files = sorted(folder.glob("*_results.json"))
        if files:
            stamp = files[-1].name.removesuffix("_results.json")
            told = read_json(files[-1])
            tables = told.get("results") if isinstance(told, dict) else None
            samples = sorted(folder.glob("*_samples_*.jsonl"))
            found[folder.name] = files[-1], [p for p in samples if p.name.startswith(stamp)], tables if isinstance(tables, dict) else {}
    if not found:
        raise EvaluatorError(f"lmms_eval left no results in {printable(str(output))}")
    return found


def plain(value: Any) -> Any:
    """A value of a results file as JSON for certain."""
    return json.loads(json.dumps(value, default=str))
