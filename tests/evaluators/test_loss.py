"""The loss is that of a plain loop over the same batches, whatever happens in between."""

import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from conftest import REPOSITORY, until
from language_models import TEXT, write_llama, write_tokenizer
from safetensors.torch import load_file, save_file

from assayer import language_model
from assayer.errors import EvaluatorError
from assayer.evaluators import loss
from assayer.progress import Binding, Progress

VOCABULARY = 320


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a model and its tokenizer; nobody writes into it."""
    folder = tmp_path_factory.mktemp("llama")
    write_llama(folder, vocabulary=VOCABULARY)
    write_tokenizer(folder, VOCABULARY)
    return folder


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some 2,000 tokens; nobody writes into them."""
    file = tmp_path_factory.mktemp("tokens") / "held_out.npy"
    numpy.save(file, numpy.random.default_rng(0).integers(0, VOCABULARY, 2003).astype(numpy.uint16))
    return file


def plain_loop(llama: Path, ids: list[int], seq_len: int, batch_size: int, steps: int | None = None) -> tuple[float, int]:
    """The mean loss and the tokens counted, by the model's own loss where it has one: a mean over each batch."""
    model = language_model.load(str(llama))
    windows = [ids[start : start + seq_len + 1] for start in range(0, len(ids) - 1, seq_len)]
    whole = [window for window in windows if len(window) == seq_len + 1]
    batches = [whole[i : i + batch_size] for i in range(0, len(whole), batch_size)] + [[w] for w in windows if len(w) <= seq_len]
    total, count = 0.0, 0
    for number in range(steps or len(batches)):
        batch = torch.tensor(batches[number % len(batches)])
        with torch.no_grad():
            logits = model(input_ids=batch[:, :-1]).logits
        mean = torch.nn.functional.cross_entropy(logits.reshape(-1, VOCABULARY), batch[:, 1:].reshape(-1))
        total += mean.item() * batch[:, 1:].numel()
        count += batch[:, 1:].numel()
    return total / count, count


def refused(path: object, **arguments: Any) -> str:
    with pytest.raises(EvaluatorError) as raised:
        loss.evaluate(str(path), **arguments)
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize(
    ("seq_len", "batch_size", "steps"),
    [(64, 4, None), (64, 4, 3), (64, 4, 20), (100, 1, None), (7, 8, 5), (256, 100, None)],
    ids=["all", "some", "more than there are", "one at a time", "short", "one batch and a rest"],
)
def test_the_loss_is_that_of_a_plain_loop_over_the_same_batches(
    seq_len: int, batch_size: int, steps: int | None, llama: Path, tokens: Path
) -> None:
    expected, count = plain_loop(llama, numpy.load(tokens).tolist(), seq_len, batch_size, steps)
    found = loss.evaluate(str(llama), data=str(tokens), seq_len=seq_len, batch_size=batch_size, steps=steps)
    assert found["eval/loss"] == pytest.approx(expected, abs=1e-6)
    assert found["eval/perplexity"] == pytest.approx(math.exp(expected), rel=1e-5)
    assert found["tokens"] == count
    # Of tokens alone nobody knows the bytes.
    assert set(found) == {"eval/loss", "eval/perplexity", "tokens"}


def test_a_large_vocabulary_is_taken_in_slices(llama: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = loss.evaluate(str(llama), data=str(tokens), seq_len=64)
    monkeypatch.setattr(loss, "SLICE", VOCABULARY * 7 + 5)
    assert loss.evaluate(str(llama), data=str(tokens), seq_len=64) == whole


def test_logits_of_another_dtype_are_cast_before_the_loss(tokens: Path, tmp_path: Path) -> None:
    write_llama(tmp_path, dtype=torch.bfloat16, vocabulary=VOCABULARY)
    model = language_model.load(str(tmp_path))
    ids = torch.from_numpy(numpy.load(tokens)[:129].astype(numpy.int64))
    with torch.no_grad():
        logits = model(input_ids=ids[None, :-1]).logits
    assert logits.dtype == torch.bfloat16
    expected = torch.nn.functional.cross_entropy(logits[0].float(), ids[1:]).item()
    assert loss.evaluate(str(tmp_path), data=str(tokens), seq_len=128, steps=1, batch_size=1)["eval/loss"] == pytest.approx(
        expected, abs=1e-6
    )


def test_of_text_the_bits_per_byte_are_told(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "held_out.txt").write_text(TEXT)
    tokenizer = language_model.load_tokenizer(str(llama))
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    expected, count = plain_loop(llama, ids, 64, 8)
    found = loss.evaluate(str(llama), data=str(tmp_path / "held_out.txt"), seq_len=64)
    assert found["eval/loss"] == pytest.approx(expected, abs=1e-6)
    # The first token is predicted from nothing, and counts on neither side.
    nbytes = len(TEXT.encode()) - len(tokenizer.decode(ids[:1]).encode())
    assert found["eval/bits_per_byte"] == pytest.approx(expected * count / math.log(2) / nbytes, rel=1e-6)


def test_of_a_part_of_the_text_its_own_bytes_count(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "held_out.txt").write_text(TEXT)
    tokenizer = language_model.load_tokenizer(str(llama))
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    expected, count = plain_loop(llama, ids, 5, 2, 3)
    found = loss.evaluate(str(llama), data=str(tmp_path / "held_out.txt"), seq_len=5, batch_size=2, steps=3)
    nbytes = len(tokenizer.decode(ids[1 : count + 1]).encode())
    assert found["tokens"] == count == 30
    assert found["eval/bits_per_byte"] == pytest.approx(expected * count / math.log(2) / nbytes, rel=1e-6)


def test_the_tokenizer_of_the_run_is_found(llama: Path, tmp_path: Path) -> None:
    merged, original = tmp_path / "scratch" / "step-5", tmp_path / "run" / "step-5"
    original.mkdir(parents=True)
    shutil.copytree(llama, merged, ignore=shutil.ignore_patterns("tokenizer*", "special*"))
    (tmp_path / "a.txt").write_text(TEXT)
    assert "has no tokenizer, nor has its run's directory" in refused(merged, data=str(tmp_path / "a.txt"), original_path=str(original))
    write_tokenizer(original.parent, VOCABULARY)
    expected = loss.evaluate(str(llama), data=str(tmp_path / "a.txt"), seq_len=64)
    assert loss.evaluate(str(merged), data=str(tmp_path / "a.txt"), seq_len=64, original_path=str(original)) == expected


def test_the_default_length_is_what_the_config_allows_at_most(llama: Path, tokens: Path) -> None:
    details: dict[str, Any] = {}
    loss.evaluate(str(llama), data=str(tokens), steps=1, details=details)
    assert (details["seq_len"], details["batch_size"], details["batches"]) == (256, 8, 1)
    assert "seq_len 257 is more than the 256 tokens that the model's config allows" in refused(llama, data=str(tokens), seq_len=257)


def test_the_perplexity_of_a_hopeless_model_stays_finite(llama: Path, tokens: Path, tmp_path: Path) -> None:
    shutil.copytree(llama, tmp_path / "hopeless")
    weights = load_file(llama / "model.safetensors")
    weights["lm_head.weight"] *= 1e4
    save_file(weights, tmp_path / "hopeless" / "model.safetensors", metadata={"format": "pt"})
    found = loss.evaluate(str(tmp_path / "hopeless"), data=str(tokens), steps=1)
    assert found["eval/loss"] > 20
    assert found["eval/perplexity"] == math.exp(20)


def test_a_loss_that_is_no_number_is_told_as_one(llama: Path, tokens: Path, tmp_path: Path) -> None:
    shutil.copytree(llama, tmp_path / "diverged")
    weights = load_file(llama / "model.safetensors")
    weights["model.norm.weight"] *= math.nan
    save_file(weights, tmp_path / "diverged" / "model.safetensors", metadata={"format": "pt"})
    found = loss.evaluate(str(tmp_path / "diverged"), data=str(tokens), steps=1)
    assert math.isnan(found["eval/loss"]) and math.isnan(found["eval/perplexity"])


def test_tokens_that_the_model_does_not_have_are_refused_before_it_sees_one(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss, "_accumulate", lambda *words: pytest.fail("the model was asked"))
    # given: tokens of two bytes, read as tokens of four.
    numpy.arange(300, dtype=numpy.uint16).tofile(tmp_path / "a.bin")
    said = refused(llama, data=str(tmp_path / "a.bin"), bin_dtype="uint32")
    largest = int(numpy.fromfile(tmp_path / "a.bin", numpy.uint32).max())
    assert f"holds token {largest}, and the model's vocabulary has 320, counted from 0" in said
    numpy.save(tmp_path / "edge.npy", numpy.array([1, 319, 320]))
    assert "holds token 320" in refused(llama, data=str(tmp_path / "edge.npy"))
    numpy.save(tmp_path / "below.npy", numpy.array([1, -1, 5]))
    assert "holds token -1" in refused(llama, data=str(tmp_path / "below.npy"))


def test_tokens_beyond_the_steps_do_not_count(llama: Path, tmp_path: Path) -> None:
    numpy.save(tmp_path / "a.npy", numpy.array([1, 2, 3, 4, 5, 320]))
    assert loss.evaluate(str(llama), data=str(tmp_path / "a.npy"), seq_len=2, batch_size=1, steps=2)["tokens"] == 4
    assert "holds token 320" in refused(llama, data=str(tmp_path / "a.npy"), seq_len=2, batch_size=1, steps=3)


def test_one_token_is_nothing_to_predict(llama: Path, tmp_path: Path) -> None:
    numpy.save(tmp_path / "a.npy", numpy.array([1]))
    assert "holds 1 tokens; at least 2 are needed" in refused(llama, data=str(tmp_path / "a.npy"))


def test_details_tell_what_was_evaluated_on_what(llama: Path, tokens: Path, tmp_path: Path) -> None:
    details: dict[str, Any] = {}
    loss.evaluate(str(llama), data=str(tokens), seq_len=64, details=details)
    assert details["fingerprint"] == language_model.fingerprint(language_model.load(str(llama)))
    assert details["parameters"] == sum(tensor.numel() for tensor in load_file(llama / "model.safetensors").values())
    assert (details["tokens"], details["batches"], details["dtype"]) == (2002, 5, "float32")
    assert json.loads(json.dumps(details)) == details
    # The same data elsewhere are the same; another tokenizer makes others of the same text.
    shutil.copy(tokens, tmp_path / "held_out.npy")
    again: dict[str, Any] = {}
    loss.evaluate(str(llama), data=str(tmp_path / "held_out.npy"), seq_len=64, details=again)
    assert again == details
    (tmp_path / "a.txt").write_text(TEXT)
    write_tokenizer(tmp_path / "other", 300)
    loss.evaluate(str(llama), data=str(tmp_path / "a.txt"), seq_len=64, details=again)
    other: dict[str, Any] = {}
    loss.evaluate(str(llama), data=str(tmp_path / "a.txt"), seq_len=64, tokenizer=str(tmp_path / "other"), details=other)
    assert len({details["data"], again["data"], other["data"]}) == 3


# What is said before an evaluation


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({}, "the evaluator loss needs data; give -E data=FILE"),
        ({"data": "/not/there.npy"}, "there is no such file"),
        ({"steps": 0}, "steps must be a whole number from 1 on, not 0"),
        ({"batch_size": "auto"}, "batch_size must be a whole number from 1 on, not auto"),
        ({"seq_len": True}, "seq_len must be a whole number from 1 on, not True"),
        ({"dtype": "fp8"}, "dtype fp8 is not known"),
        ({"tokenizer": 5}, "tokenizer must be text, not 5"),
        ({"trust_remote_code": "yes"}, "trust_remote_code must be true or false, not yes"),
        ({"config": "/not/there"}, "config /not/there is not there"),
        ({"bin_dtype": "uint16"}, "bin_dtype is for .bin files"),
    ],
)
def test_an_argument_that_cannot_work_is_told_when_the_command_is_given(arguments: dict[str, Any], said: str, tokens: Path) -> None:
    given = {"data": str(tokens)} | arguments if arguments else {}
    with pytest.raises(EvaluatorError) as raised:
        loss.check(given)
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


def test_arguments_that_can_work_are_taken(llama: Path, tokens: Path, tmp_path: Path) -> None:
    loss.check({"data": str(tokens), "steps": 5, "config": str(llama), "dtype": "bfloat16", "trust_remote_code": True})
    (tmp_path / "a.txt").write_text("a")
    loss.check({"data": str(tmp_path / "a.txt")})
    loss.check({"data": str(tmp_path / "a.txt"), "tokenizer": str(llama)})
    with pytest.raises(EvaluatorError, match="is no directory with a tokenizer's files"):
        loss.check({"data": str(tmp_path / "a.txt"), "tokenizer": str(tmp_path)})


def test_what_a_checkpoint_lacks_is_told_before_its_weights_are_read(llama: Path, tokens: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    text = {"data": str(tmp_path / "a.txt")}
    loss.check_files({"config.json"}, {"data": str(tokens)})
    loss.check_files({"config.json", "tokenizer.json"}, text)
    loss.check_files((), text | {"config": "config.json", "tokenizer": str(llama)})
    with pytest.raises(EvaluatorError, match=r"there is no config\.json .* give one with -E config=FILE"):
        loss.check_files({"tokenizer.json"}, text)
    with pytest.raises(EvaluatorError, match=r"there is no tokenizer .* give one with -E tokenizer=DIRECTORY"):
        loss.check_files({"config.json", "special_tokens_map.json"}, text)


# In processes of their own


# What a worker does: it imports what an evaluation needs once, then forks a child (a rank) for each order that it reads.
WORKER = """
import json, os, signal, sys, threading, traceback
from pathlib import Path
from assayer.evaluators import loss
from assayer.progress import Binding, Progress, choose_point

def evaluate(order, rank, ranks, point):
    loss.SAVE_SECONDS = order.get("save_seconds", loss.SAVE_SECONDS)
    reports = Path(f"{order['reports']}{rank}")
    stop = order.get("stops", {}).get(str(rank), 10**9)

    def tell(done, total):
        reports.write_text(f"{done} {total}")
        while done >= stop:
            signal.pause()  # until it is killed

    progress = Progress(Path(order["progress"]), binding(ranks), rank, ranks, point, tell)
    metrics = loss.evaluate(order["path"], progress=progress, **order["arguments"])
    Path(f"{order['answer']}{rank}").write_text(json.dumps(metrics))

def binding(ranks):
    return Binding("identity", "regular", "loss", None, {}, ranks)

loss.warm()
assert threading.active_count() == len(os.listdir("/proc/self/task")) == 1
for line in sys.stdin:
    order = json.loads(line)
    ranks = order.get("ranks", 1)
    point = choose_point(Path(order["progress"]), binding(ranks), ranks)
    pids = []
    for rank in range(ranks):
        pid = os.fork()
        if pid == 0:
            if ranks > 1:
                os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(order["port"])}
            try:
                evaluate(order, rank, ranks, point)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        pids.append(pid)
    print(json.dumps(pids), flush=True)
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]), flush=True)
"""


class Worker:
    """A process that evaluates what it is ordered, in children that may be killed."""

    def __init__(self) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=REPOSITORY
        )

    def _read(self) -> list[int]:
        assert self.process.stdout
        told: list[int] = json.loads(self.process.stdout.readline())
        return told

    def start(self, order: dict[str, Any]) -> list[int]:
        """The pids of the ranks."""
        assert self.process.stdin
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return self._read()

    def wait(self) -> list[int]:
        """The exit codes of the ranks."""
        return self._read()


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    worker = Worker()
    yield worker
    worker.process.kill()
    worker.process.communicate()


class Evaluation:
    """One evaluation of some 500 small batches, saved every five of them, and what it has left in its folder."""

    def __init__(self, folder: Path, llama: Path, worker: Worker, **more: Any) -> None:
        folder.mkdir()
        (folder / "a.txt").write_text(TEXT * 12)
        names = {name: str(folder / name) for name in ("progress", "reports", "answer")}
        arguments = {"data": str(folder / "a.txt"), "seq_len": 4, "batch_size": 2}
        self.folder, self.worker = folder, worker
        self.order = {"path": str(llama), "arguments": arguments, "save_seconds": 0.05, **names, **more}

    def start(self, **stops: int) -> list[int]:
        """The pids of the ranks. Each waits to be killed where it is told to stop: ``rank0=103`` at batch 103, or its next one."""
        for file in self.folder.glob("reports*"):
            file.unlink()
        port = {"port": free_port()} if "ranks" in self.order else {}
        return self.worker.start(self.order | port | {"stops": {rank.removeprefix("rank"): number for rank, number in stops.items()}})

    def done(self, rank: int = 0) -> int:
        """The number of the last batch that this rank has told of since the last start; 0 before the first."""
        try:
            return int(((self.folder / f"reports{rank}").read_text() or "0").split()[0])
        except FileNotFoundError:
            return 0

    def reach(self, number: int, rank: int = 0) -> None:
        until(lambda: self.done(rank) >= number)

    def answer(self, rank: int = 0) -> Any:
        return json.loads((self.folder / f"answer{rank}").read_text())


@pytest.fixture(scope="module")
def undisturbed(llama: Path, worker: Worker, tmp_path_factory: pytest.TempPathFactory) -> Any:
    evaluation = Evaluation(tmp_path_factory.mktemp("undisturbed") / "run", llama, worker)
    evaluation.start()
    assert worker.wait() == [0]
    return evaluation.answer()


def test_a_killed_evaluation_comes_to_the_same_numbers(llama: Path, worker: Worker, undisturbed: Any, tmp_path: Path) -> None:
    evaluation = Evaluation(tmp_path / "run", llama, worker)

    # when: it is killed three times in the middle, between two saves.
    firsts = []
    for aim in (103, 207, 311):
        pids = evaluation.start(rank0=aim)
        firsts.append(until(evaluation.done))
        evaluation.reach(aim)
        os.kill(pids[0], signal.SIGKILL)
        assert worker.wait() == [-9]
    evaluation.start()
    assert worker.wait() == [0]

    # then: it went on from the save before each, and every number is what it is undisturbed, to the last digit.
    assert firsts[1] > 90 and firsts[2] > 190, "it began anew"
    assert evaluation.answer() == undisturbed


def test_ranks_killed_at_different_batches_come_to_the_same_numbers(llama: Path, worker: Worker, undisturbed: Any, tmp_path: Path) -> None:
    # when: two processes share the batches, and are killed one after the other.
    evaluation = Evaluation(tmp_path / "run", llama, worker, ranks=2)
    pids = evaluation.start(rank0=307, rank1=104)
    evaluation.reach(104, rank=1)
    os.kill(pids[1], signal.SIGKILL)
    evaluation.reach(307)
    os.kill(pids[0], signal.SIGKILL)
    assert worker.wait() == [-9, -9]
    evaluation.start()
    first = until(lambda: evaluation.done(0))
    assert worker.wait() == [0, 0]

    # then: they went on from where both were, and both say what one alone says.
    assert first > 50, "it began anew"
    for rank in (0, 1):
        assert evaluation.answer(rank) == {name: pytest.approx(value, abs=1e-6) for name, value in undisturbed.items()}
        assert evaluation.answer(rank)["tokens"] == undisturbed["tokens"]


def test_other_data_under_the_same_name_start_over(llama: Path, tokens: Path, tmp_path: Path) -> None:
    # given: an evaluation that was saved at its end, and whose data were then written anew.
    binding = Binding("identity", "regular", "loss", None, {}, 1)
    numpy.save(tmp_path / "a.npy", numpy.load(tokens)[:500])
    loss.evaluate(str(llama), data=str(tmp_path / "a.npy"), progress=Progress(tmp_path / "progress", binding))
    numpy.save(tmp_path / "a.npy", numpy.load(tokens)[500:1000])

    again = loss.evaluate(str(llama), data=str(tmp_path / "a.npy"), progress=Progress(tmp_path / "progress", binding))

    assert again == loss.evaluate(str(llama), data=str(tmp_path / "a.npy"))


def test_another_config_under_the_same_name_starts_over(llama: Path, tokens: Path, tmp_path: Path) -> None:
    # given: an evaluation that was saved at its end, by a config that was then found to be wrong.
    binding = Binding("identity", "regular", "loss", None, {}, 1)
    model = Path(shutil.copytree(llama, tmp_path / "model"))
    right = (model / "config.json").read_text()
    (model / "config.json").write_text(json.dumps(json.loads(right) | {"rms_norm_eps": 1.0}))
    wrong = loss.evaluate(str(model), data=str(tokens), steps=2, progress=Progress(tmp_path / "progress", binding))
    (model / "config.json").write_text(right)

    again = loss.evaluate(str(model), data=str(tokens), steps=2, progress=Progress(tmp_path / "progress", binding))

    assert again == loss.evaluate(str(llama), data=str(tokens), steps=2) != wrong


@pytest.mark.slow
def test_two_processes_of_torchrun_come_to_what_one_does(llama: Path, tokens: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import json, os, sys\n"
        "from assayer.evaluators import loss\n"
        "found = loss.evaluate(sys.argv[1], data=sys.argv[2], seq_len=64, batch_size=3, steps=9)\n"
        "open(f'{sys.argv[3]}{os.environ[\"RANK\"]}', 'w').write(json.dumps(found))\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    subprocess.run([*command, str(llama), str(tokens), str(tmp_path / "answer")], check=True, timeout=100, env=environment, cwd=tmp_path)
    alone = loss.evaluate(str(llama), data=str(tokens), seq_len=64, batch_size=3, steps=9)
    for rank in (0, 1):
        assert json.loads((tmp_path / f"answer{rank}").read_text()) == {
            name: pytest.approx(value, abs=1e-6) for name, value in alone.items()
        }


def free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return int(opened.getsockname()[1])
