"""The examples do what their READMEs say."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
from conftest import REPOSITORY, House

LLAMA = REPOSITORY / "examples" / "llama"
TORCHRUN = [os.path.join(os.path.dirname(sys.executable), "torchrun"), "--standalone", "--nproc_per_node", "2"]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_processes_train_under_fsdp_and_every_sharded_checkpoint_is_evaluated(house: House) -> None:
    example = house.root / "fsdp"
    shutil.copytree(REPOSITORY / "examples" / "fsdp", example, ignore=shutil.ignore_patterns("checkpoints", "__pycache__"))
    words = ["--directory", "checkpoints", "--wait_for_directory", "--eval_existing", "--evaluator", "eval.py:bits_per_byte"]
    words += ["--polling_interval", "1"]
    with house.running("watch", *words, "--until_step", 60, cwd=example) as watch:
        train = [*TORCHRUN, "train.py", "--steps", "60", "--save_every", "20"]
        done = subprocess.run(train, cwd=example, env=house.environment, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr
        assert watch.wait(200) == 0
    records = [path.read_text() for path in sorted((example / "checkpoints" / "evals" / "bits_per_byte").glob("*.json"))]
    assert len(records) == 3
    assert all('"status": "finished"' in record and '"from": "dcp"' in record for record in records)
    assert not any("not checked" in record for record in records)


@pytest.fixture(scope="module")
def corpus() -> Iterator[Any]:
    """examples/llama/corpus.py, with fifty modules of the standard library for its text."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(LLAMA))
        module = importlib.import_module("corpus")
        whole = [text for text in module.library() if module.END not in text]
        texts = whole[:: len(whole) // 50]
        patch.setattr(module, "library", lambda: texts)
        yield module


@pytest.fixture(scope="module")
def prepared(corpus: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's directory with its data, named by a relative path."""
    folder = tmp_path_factory.mktemp("llama")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        corpus.prepare(Path('a "run": 1'), vocabulary=400, questions=40)
    return folder / 'a "run": 1'


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_llama_s_tasks_are_about_files_that_it_never_sees(corpus: Any, prepared: Path) -> None:
    seen, held_out = corpus.split(corpus.library())
    assert not set(seen) & set(held_out)
    questions = lines(prepared / "choice.jsonl")
    assert len(questions) == 40
    for question in questions:
        assert not any(question["context"] in text for text in seen)
        follows = [any(question["context"] + choice in text for text in held_out) for choice in question["choices"]]
        assert [i for i, right in enumerate(follows) if right] == [question["label"]]
    passages = lines(prepared / "passages.jsonl")
    assert passages and all(any(passage["text"] in text for text in held_out) for passage in passages)


def test_the_llama_s_tokens_say_every_text_it_is_trained_on(corpus: Any, prepared: Path) -> None:
    tokenizer = importlib.import_module("transformers").AutoTokenizer.from_pretrained(prepared)
    tokens = numpy.load(prepared / "train.npy")
    assert tokenizer.decode(tokens, clean_up_tokenization_spaces=False).split(corpus.END) == [*corpus.split(corpus.library())[0], ""]
    strange = "\u00e9\u4e2d \t\x00"
    assert tokenizer.decode(tokenizer.encode(strange), clean_up_tokenization_spaces=False) == strange


def test_the_llama_s_tasks_name_their_data_wherever_the_run_lies(corpus: Any, prepared: Path) -> None:
    yaml = importlib.import_module("yaml")
    tasks = {path.stem: yaml.safe_load(path.read_text()) for path in (prepared / "tasks").iterdir()}
    assert set(tasks) == {path.stem for path in (LLAMA / "tasks").iterdir()} == {task["task"] for task in tasks.values()}
    for task in tasks.values():
        data = Path(task["dataset_kwargs"]["data_files"]["test"])
        assert data.is_absolute() and data.parent.samefile(prepared) and lines(data)


def test_a_llama_s_run_goes_on_with_the_tokenizer_that_it_has(corpus: Any, prepared: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in prepared.rglob("*")}
    corpus.prepare(prepared, vocabulary=500)
    assert {path: path.stat().st_mtime_ns for path in prepared.rglob("*")} == before


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_llama_is_trained_on_what_lies_there_and_its_checkpoints_are_evaluated_by_lm_eval_and_loss(house: House) -> None:
    house.environment |= {"XDG_CACHE_HOME": str(house.root / "cache"), "HF_HOME": str(house.root / "hf"), "HF_HUB_OFFLINE": "1"}
    out = house.root / "out"
    corpus = [sys.executable, str(LLAMA / "corpus.py"), str(out), "--questions", "60"]
    train = [*TORCHRUN, str(LLAMA / "train.py"), str(out), "--steps", "40", "--save_every", "10", "--keep", "2"]
    for command in (corpus, train):
        done = subprocess.run(command, env=house.environment, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr
    # The older ones were rotated out.
    assert {path.name for path in out.glob("step_*")} == {"step_30", "step_40"}
    words = ["--directory", out, "--once", "--polling_interval", 1, "--num_eval_workers", 1]
    words += [
        "--evaluator",
        "lm_eval",
        "-E",
        "lm_eval:tasks=stdlib_choice,stdlib_perplexity",
        "-E",
        f"lm_eval:include_path={out / 'tasks'}",
    ]
    words += ["--evaluator", "loss", "-E", f"loss:data={out / 'heldout.txt'}", "-E", "loss:steps=20"]
    house.command("watch", *words, timeout=200)
    told = {}
    for path in (out / "evals").glob("*/*.json"):
        record = json.loads(path.read_text())
        assert record["status"] == "finished" and record["merged"]["from"] == "dcp", record
        told[path.parent.name, record["step"]] = record["metrics"]
    assert set(told) == {(evaluator, step) for evaluator in ("lm_eval", "loss") for step in (30, 40)}
    for name in ("stdlib_perplexity/bits_per_byte", "stdlib_perplexity/byte_perplexity"):
        assert told["lm_eval", 40][name] < told["lm_eval", 30][name]
    assert told["loss", 40]["eval/loss"] < told["loss", 30]["eval/loss"] < 6.9
    assert 0 <= told["lm_eval", 40]["stdlib_choice/acc_mutual_info"] <= 1
