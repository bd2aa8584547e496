"""What lm-eval costs through assayer: ten checkpoints of a small model with a local task, by one worker, beside ten runs of lm-eval's own
command line, and beside a second call of ``simple_evaluate`` in one process, which pays for nothing but the evaluation.

Run by ``scripts/bench harness``. Models, tokenizer and task are made here; nothing is downloaded.
"""

import argparse
import ctypes
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

TASK = """
task: next_word
dataset_path: json
dataset_kwargs:
  data_files: {data}
test_split: train
output_type: multiple_choice
doc_to_text: text
doc_to_choice: choices
doc_to_target: label
metric_list:
  - metric: acc
  - metric: acc_norm
"""
WORDS = [
    "the",
    "a",
    "model",
    "data",
    "train",
    "loss",
    "step",
    "batch",
    "token",
    "layer",
    "weight",
    "grows",
    "falls",
    "reads",
    "slowly",
    "well",
]
_PR_SET_CHILD_SUBREAPER = 36


def make(root: Path, checkpoints: int, documents: int) -> None:
    """Checkpoints in ``runs``, and a task of multiple choice in ``tasks``."""
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    chance = random.Random(0)
    text = [" ".join(chance.choices(WORDS, k=12)) for _ in range(documents)]
    raw = ByteLevelBPETokenizer()
    raw.train_from_iterator(text, vocab_size=400, special_tokens=["<s>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw._tokenizer, bos_token="<s>", eos_token="<s>")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=0,
    )
    for step in range(1, checkpoints + 1):
        torch.manual_seed(step)
        folder = root / "runs" / f"checkpoint-{step}"
        LlamaForCausalLM(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    tasks = root / "tasks"
    tasks.mkdir()
    rows = [{"text": t, "choices": [f" {w}" for w in chance.sample(WORDS, 4)], "label": chance.randrange(4)} for t in text]
    (tasks / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tasks / "next_word.yaml").write_text(TASK.format(data=tasks / "data.jsonl"))


@contextmanager
def measured(told: dict[str, float]) -> Iterator[None]:
    """Puts the seconds of a block, and those of the processors of all processes that it started and that have ended, into ``told``."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    yield
    told["wall"] = time.monotonic() - began
    # Daemons that were started become this process's children, and are waited for.
    while True:
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            break
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    told["cpu"] = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def by_assayer(root: Path, environment: dict[str, str]) -> tuple[dict[str, float], list[dict[str, object]]]:
    told: dict[str, float] = {}
    words = ["watch", "--directory", root / "runs", "--evaluator", "lm_eval", "-E", "tasks=next_word", "-E", f"include_path={root}/tasks"]
    words += ["-E", "batch_size=8", "-E", "device=cpu", "--num_eval_workers", 1, "--polling_interval", 1, "--once"]
    with measured(told):
        subprocess.run([sys.executable, "-m", "assayer", *map(str, words)], env=environment, check=True, stdout=subprocess.DEVNULL)
    records = [json.loads(path.read_text()) for path in (root / "runs" / "evals" / "lm_eval").glob("*.json")]
    return told, sorted(records, key=lambda record: record["started"])


def by_command_line(root: Path, environment: dict[str, str]) -> tuple[dict[str, float], dict[str, float]]:
    told: dict[str, float] = {}
    found = {}
    with measured(told):
        for folder in sorted((root / "runs").glob("checkpoint-*")):
            command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={folder}", "--tasks", "next_word"]
            command += [
                "--include_path",
                f"{root}/tasks",
                "--batch_size",
                "8",
                "--device",
                "cpu",
                "--output_path",
                f"{root}/out/{folder.name}",
            ]
            subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            (written,) = (root / "out" / folder.name).rglob("results_*.json")
            found[folder.name] = json.loads(written.read_text())["results"]["next_word"]["acc,none"]
    return told, found


SECOND = """
import sys, time, lm_eval
from lm_eval.tasks import TaskManager
root, names = sys.argv[1], sys.argv[2:]
tasks = TaskManager(include_path=f"{root}/tasks")
for name in names:
    began = time.monotonic()
    lm_eval.simple_evaluate(
        "hf", model_args={"pretrained": f"{root}/runs/{name}"}, tasks=["next_word"], task_manager=tasks,
        batch_size=8, device="cpu",
    )
    print("seconds", time.monotonic() - began)
"""


def second_calls(root: Path, environment: dict[str, str]) -> float:
    """The median of the seconds of each call of ``simple_evaluate`` but the first in one process."""
    command = [sys.executable, "-c", SECOND, str(root), *[f"checkpoint-{step}" for step in (1, 2, 3, 4)]]
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    seconds = [float(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("seconds ")]
    return statistics.median(seconds[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoints", type=int, default=10)
    parser.add_argument("--documents", type=int, default=200, help="documents of the task, four choices each")
    options = parser.parse_args()
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
    with tempfile.TemporaryDirectory(prefix="assayer-bench-") as folder:
        root = Path(folder)
        environment = {**os.environ, "XDG_STATE_HOME": f"{root}/state", "XDG_CACHE_HOME": f"{root}/cache", "HF_HOME": f"{root}/hf"}
        environment |= {"TMPDIR": str(root), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        environment.pop("ASSAYER_REDIS_URL", None)
        make(root, options.checkpoints, options.documents)
        print(", ".join(f"{name} {version(name)}" for name in ("lm_eval", "transformers", "torch")), f"{os.cpu_count()} cores", flush=True)
        theirs, expected = by_command_line(root, environment)
        ours, records = by_assayer(root, environment)
        got = {os.path.basename(str(record["checkpoint"])): record["metrics"]["next_word/acc"] for record in records}  # type: ignore[index]
        if got != expected:
            raise SystemExit(f"the metrics differ: {got} and {expected}")
        count = options.checkpoints
        print(f"{count} checkpoints            wall      CPU")
        print(f"lm_eval's command line  {theirs['wall']:7.1f} s {theirs['cpu']:7.1f} s")
        print(f"assayer, one worker     {ours['wall']:7.1f} s {ours['cpu']:7.1f} s")
        moments = [datetime.fromisoformat(str(record["started"])).timestamp() for record in records]
        each = statistics.median(b - a for a, b in pairwise(moments[1:]))
        second = second_calls(root, environment)
        print(
            f"one more checkpoint: assayer {each:.2f} s, simple_evaluate called again in one process {second:.2f} s: {each - second:+.2f} s"
        )


if __name__ == "__main__":
    main()
