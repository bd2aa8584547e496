"""What a training loop drives: nothing delays it, nothing is lost, nothing comes twice."""

import contextlib
import copy
import json
import logging
import os
import pickle
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from conftest import until
from protocol_server import EvaluationServer
from training import GOOD, QUICK, Training, come, trainings

from assayer.client import AsyncEvaluation, asynchronous
from assayer.client.courier import Patience
from assayer.client.names import named
from assayer.errors import UsageError
from assayer.files import read_json
from assayer.protocol import JobInfo, JobStatus


@pytest.fixture
def server() -> Iterator[EvaluationServer]:
    with EvaluationServer() as server:
        yield server


@pytest.fixture
def training(tmp_path: Path, server: EvaluationServer) -> Iterator[Training]:
    with trainings(tmp_path, server) as training:
        yield training


def returns(call: Callable[[], Any]) -> Any:
    """What the call returns, made in a thread of its own: one that is held up fails, and does not hold up the tests."""
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(call()), daemon=True)
    thread.start()
    thread.join(30)
    assert found, "the call was held up"
    return found[0]


def test_metrics_come_with_their_checkpoints_step(training: Training, server: EvaluationServer) -> None:
    evaluation = training.start()
    evaluation.submit(training.save(500), 500)
    until(lambda: server.jobs)
    assert evaluation.poll() == []
    server.end(JobStatus.COMPLETED, GOOD)
    (point,) = come(evaluation)
    assert point.fields() == {"eval/t/acc": 0.5, "global_step": 500}
    assert evaluation.poll() == []
    (job,) = server.jobs.values()
    assert job.request.model_args is not None
    assert Path(job.request.model_args["model"]).name == "checkpoint-500"
    # Results inside a checkpoint would keep it from being rotated.
    assert job.request.output_dir is None


def test_both_weights_are_evaluated_and_logged_apart(training: Training, server: EvaluationServer) -> None:
    server.at_once = GOOD
    evaluation = training.start(weights=("regular", "ema"), style="lmms_engine")
    evaluation.submit(training.save(5), 5)
    assert [list(point.metrics) for point in sorted(come(evaluation, 2), key=lambda p: p.weights)] == [["eval_ema/t_acc"], ["eval/t_acc"]]
    kinds = [job.request.lmms_engine_kwargs.checkpoint_type for job in server.jobs.values() if job.request.lmms_engine_kwargs]
    assert sorted(kinds) == ["ema", "regular"]


# Whatever the thread of the training does inside submit and poll that is no work in memory is an audit event: files, sockets, processes.
AUDITED = """
import os, socket, sys, threading
from assayer.client import AsyncEvaluation

events, main, watching = [], threading.get_ident(), False
def hook(event, args):
    if watching and threading.get_ident() == main:
        events.append(event)

run, url = sys.argv[1:]
config = {"server_url": url, "model": "m", "tasks": ["t"], "poll_interval": 0.01}
evaluation = AsyncEvaluation(config, run)
sys.addaudithook(hook)
for step in range(200):
    path = f"checkpoint-{step}"
    watching = True
    evaluation.submit(path, step)
    evaluation.poll()
    evaluation.out()
    watching = False
print(sorted(set(events) - {"_thread.start_new_thread", "_thread.start_joinable_thread"}), flush=True)
os._exit(0)
"""


@pytest.mark.parametrize("trouble", ["none", "hang", "refused", "no host"])
def test_submit_and_poll_open_no_file_and_no_socket(tmp_path: Path, trouble: str) -> None:
    with EvaluationServer(at_once=GOOD) as server, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        if trouble == "hang":
            server.hang.set()
        urls = {"refused": f"http://127.0.0.1:{free.getsockname()[1]}", "no host": "http://nowhere.invalid:1"}
        words = [sys.executable, "-c", AUDITED, str(tmp_path), urls.get(trouble, server.url)]
        assert subprocess.run(words, capture_output=True, text=True, check=True, timeout=60).stdout == "[]\n"


def test_a_server_that_never_answers_holds_nothing_up(training: Training, server: EvaluationServer) -> None:
    evaluation = training.start()
    server.hang.set()
    evaluation.submit(training.save(1), 1)
    until(lambda: server.requests)
    # The thread that talks stands in the middle of a request now.
    for step in range(2, 50):
        returns(partial(evaluation.submit, training.run / f"checkpoint-{step}", step))
        assert returns(evaluation.poll) == []
    assert len(returns(evaluation.out)) == 49
    # Remembered all the same, should the training be killed now.
    until(lambda: training.states() == ["new"] * 49)
    assert returns(partial(evaluation.finish, 0.1)) == []


@pytest.mark.parametrize("call", ["read_json", "write_whole", "list_path", "lock_file"])
def test_a_file_system_that_hangs_holds_nothing_up(
    training: Training, server: EvaluationServer, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    from assayer.client import pending

    stuck, free = threading.Event(), threading.Event()
    real = getattr(pending, call)

    def slow(*words: Any) -> Any:
        stuck.set()
        free.wait(60)
        return real(*words)

    monkeypatch.setattr(pending, call, slow)
    server.at_once = GOOD
    (training.run / "evals").mkdir()
    evaluation = training.start()
    evaluation.submit(training.save(1), 1)
    until(stuck.is_set)
    returns(partial(evaluation.submit, training.run / "checkpoint-2", 2))
    assert returns(evaluation.poll) == []
    assert returns(partial(evaluation.finish, 0.05)) == []
    free.set()
    assert [point.step for point in come(evaluation, 2)] == [1, 2]


def test_a_pipe_in_the_files_place_is_no_trap(training: Training, server: EvaluationServer) -> None:
    server.at_once = GOOD
    (training.run / "evals").mkdir()
    os.mkfifo(training.file)
    evaluation = training.start()
    evaluation.submit(training.save(1), 1)
    assert len(come(evaluation)) == 1
    assert training.file.is_file()


def test_a_restarted_training_goes_on_collecting_and_logs_nothing_twice(training: Training, server: EvaluationServer) -> None:
    first = training.start()
    first.submit(training.save(1), 1)
    first.submit(training.save(2), 2)
    until(lambda: len(server.jobs) == 2)
    one = next(iter(server.jobs))
    server.jobs[one] = JobInfo.from_json({**server.jobs[one].to_json(), "status": "completed", "metrics": GOOD})
    assert [point.step for point in come(first)] == [1]
    first.close()
    server.end(JobStatus.COMPLETED, GOOD)

    second = training.start()
    assert [point.step for point in second.finish(30)] == [2]
    second.close()
    assert training.start().finish(30) == []
    assert server.count("POST", "/evaluate") == 2


TRAINING = """
import os, signal, sys, time
from assayer.client import AsyncEvaluation

run, url, end = sys.argv[1:]
evaluation = AsyncEvaluation({"server_url": url, "model": "m", "tasks": ["t"], "poll_interval": 0.02}, run)
evaluation.submit(os.path.join(run, "checkpoint-7"), 7)
if end == "before":
    while not os.path.exists(run + "/evals/pending-evaluations"):
        time.sleep(0.001)
elif end == "collected":
    while '"done"' not in open(run + "/evals/pending-evaluations").read() if os.path.exists(run + "/evals/pending-evaluations") else True:
        time.sleep(0.001)
else:
    while not evaluation.poll():
        time.sleep(0.001)
    while '"logged"' not in open(run + "/evals/pending-evaluations").read():
        time.sleep(0.001)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize(("end", "left"), [("before", [7]), ("collected", [7]), ("logged", [])])
def test_a_training_that_is_killed_loses_and_doubles_nothing(
    training: Training, server: EvaluationServer, end: str, left: list[int]
) -> None:
    server.at_once = GOOD
    training.save(7)
    killed = subprocess.run([sys.executable, "-c", TRAINING, str(training.run), server.url, end], timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert [point.step for point in training.start().finish(30)] == left
    assert len(server.jobs) == 1


def test_a_submission_whose_answer_is_lost_is_one_job(training: Training, server: EvaluationServer) -> None:
    server.at_once, server.lose = GOOD, 3
    evaluation = training.start()
    evaluation.submit(training.save(1), 1)
    assert len(evaluation.finish(30)) == 1
    assert len(server.jobs) == 1
    assert server.count("POST", "/evaluate") == 4


def test_a_server_that_is_away_for_a_while_gets_all_of_it(training: Training, server: EvaluationServer) -> None:
    evaluation = training.start()
    evaluation.submit(training.save(1), 1)
    until(lambda: server.jobs)
    server.down()
    evaluation.submit(training.save(2), 2)
    assert until(lambda: [words for words in evaluation.out() if "checkpoint-2" in words and "not submitted yet" in words])
    until(lambda: [words for words in evaluation.out() if "no answer" in words])
    server.let_go.clear()
    server.up()
    until(lambda: len(server.jobs) == 2)
    server.end(JobStatus.COMPLETED, GOOD)
    assert [point.step for point in come(evaluation, 2)] == [1, 2]


@pytest.mark.parametrize("status", [401, 429, 500, 503])
def test_a_server_in_trouble_is_asked_again(training: Training, server: EvaluationServer, status: int) -> None:
    server.at_once, server.statuses = GOOD, [status] * 3
    evaluation = training.start()
    evaluation.submit(training.save(1), 1)
    until(lambda: server.jobs)
    server.statuses = [status] * 3
    assert len(evaluation.finish(30)) == 1


@pytest.mark.parametrize("status", [401, 403])
def test_the_end_does_not_wait_for_a_server_that_lets_nobody_in(
    training: Training, server: EvaluationServer, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    server.statuses = [status] * 10_000
    evaluation = training.start()
    evaluation.submit(training.save(1), 1)
    assert returns(partial(evaluation.finish, 3600)) == []
    assert "1 evaluations are still out" in caplog.text and f"{status}" in caplog.text
    # Remembered all the same, and asked for again.
    assert training.states() == ["new"]
    server.statuses, server.at_once = [], GOOD
    assert len(evaluation.finish(30)) == 1


def test_one_refusal_amid_other_trouble_does_not_end_the_wait(training: Training, server: EvaluationServer) -> None:
    """As from a proxy, while the server behind it restarts."""
    server.statuses = [*[503] * 6, 403, *[503] * 6]
    server.at_once = GOOD
    evaluation = training.start()
    evaluation.submit(training.save(1), 1)
    until(lambda: len(server.statuses) <= 9)
    assert [point.step for point in evaluation.finish(30)] == [1]


def test_a_submission_that_is_refused_is_told_and_not_repeated(
    training: Training, server: EvaluationServer, caplog: pytest.LogCaptureFixture
) -> None:
    evaluation = training.start()
    server.statuses = [422]
    evaluation.submit(training.save(1), 1)
    assert evaluation.finish(30) == []
    assert evaluation.out() == []
    assert "checkpoint-1 (regular) is not evaluated: POST" in caplog.text
    assert server.count("POST", "/evaluate") == 1


@pytest.mark.parametrize("status", [JobStatus.FAILED, JobStatus.CANCELLED])
def test_a_job_that_comes_to_nothing_is_told_and_waited_for_no_longer(
    training: Training, server: EvaluationServer, caplog: pytest.LogCaptureFixture, status: JobStatus
) -> None:
    evaluation = training.start()
    evaluation.submit(training.save(1), 1)
    until(lambda: server.jobs)
    server.end(status, error="the checkpoint vanished")
    assert evaluation.finish(30) == []
    assert evaluation.out() == []
    assert f"{status}: the checkpoint vanished" in caplog.text
    evaluation.close()
    asked = server.count("GET", "/jobs")
    assert training.start().finish(30) == []
    assert server.count("GET", "/jobs") == asked


def test_a_job_that_the_server_forgot_is_submitted_again(
    training: Training, server: EvaluationServer, caplog: pytest.LogCaptureFixture
) -> None:
    evaluation = training.start()
    evaluation.submit(training.save(1), 1)
    until(lambda: server.jobs)
    server.jobs.clear()
    until(lambda: server.jobs)
    server.end(JobStatus.COMPLETED, GOOD)
    assert len(come(evaluation)) == 1
    assert "submitted again" in caplog.text


def test_a_server_that_forgets_every_job_is_not_asked_for_ever(
    training: Training, server: EvaluationServer, caplog: pytest.LogCaptureFixture
) -> None:
    evaluation = training.start()
    server.jobs = Forgetful()
    evaluation.submit(training.save(1), 1)
    assert evaluation.finish(30) == []
    assert evaluation.out() == []
    assert "lost it 3 times before" in caplog.text
    assert server.count("POST", "/evaluate") == 4


class Forgetful(dict[str, JobInfo]):
    def __setitem__(self, key: str, value: JobInfo) -> None:
        pass


def test_finish_waits_no_longer_than_asked_and_says_what_is_out(
    training: Training, server: EvaluationServer, caplog: pytest.LogCaptureFixture
) -> None:
    evaluation = training.start()
    evaluation.submit(training.save(1), 1)
    until(lambda: server.jobs)
    server.end(JobStatus.COMPLETED, GOOD)
    evaluation.submit(training.save(2), 2)
    until(lambda: len(server.jobs) == 2 and "done" in training.states())
    # What came by then is returned, although not everything did.
    assert [point.step for point in evaluation.finish(1.0)] == [1]
    (words,) = evaluation.out()
    assert "1 evaluations are still out after 1 s: " + words in caplog.text
    assert "checkpoint-2 (regular): job" in words
    server.end(JobStatus.COMPLETED, GOOD)
    assert [point.step for point in evaluation.finish(30)] == [2]


def test_the_same_checkpoint_is_evaluated_twice_only_when_it_was_saved_anew(training: Training, server: EvaluationServer) -> None:
    server.at_once = GOOD
    evaluation = training.start()
    for _ in range(2):
        evaluation.submit(training.save(1), 1)
        assert len(come(evaluation)) == 1
        evaluation.submit(training.run / "checkpoint-1", 1)
        assert evaluation.finish(30) == []
    assert len(server.jobs) == 2


def test_a_resumed_training_that_overwrites_a_checkpoint_waits_for_the_new_weights_alone(
    training: Training, server: EvaluationServer
) -> None:
    first = training.start()
    first.submit(training.save(1, "earlier"), 1)
    until(lambda: server.jobs)
    first.close()
    second = training.start()
    second.submit(training.save(1, "later on"), 1)
    until(lambda: len(server.jobs) == 2)
    server.end(JobStatus.COMPLETED, GOOD)
    assert len(second.finish(30)) == 1
    assert second.out() == []


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_whatever_the_server_does_every_point_comes_once(training: Training, server: EvaluationServer, seed: int) -> None:
    chance = random.Random(seed)
    patience = Patience(first=0.01, most=0.1, forgotten=1000)
    evaluation = training.start(patience=patience, timeout=0.3, rank=0)
    steps: list[int] = []
    for step in range(1, 151):
        evaluation.submit(training.save(step), step)
        trouble = chance.random()
        if trouble < 0.1:
            server.lose = chance.randint(1, 3)
        elif trouble < 0.2:
            server.statuses = [chance.choice([401, 429, 500, 503])] * chance.randint(1, 4)
        elif trouble < 0.3:
            server.jobs.clear()
        elif trouble < 0.4:
            server.hang.set()
            server.let_go.wait(chance.uniform(0, 0.5))
            server.hang.clear()
        elif trouble < 0.5:
            server.down()
            server.let_go.clear()
            server.up()
        elif trouble < 0.55:
            # The training is restarted.
            steps += [point.step for point in evaluation.poll()]
            evaluation.close(30)
            evaluation = training.start(patience=patience, timeout=0.3, rank=0)
        else:
            server.end(JobStatus.COMPLETED, GOOD)
        steps += [point.step for point in evaluation.poll()]
    server.at_once = GOOD
    server.end(JobStatus.COMPLETED, GOOD)
    steps += [point.step for point in evaluation.finish(60)]
    assert sorted(steps) == list(range(1, 151))
    assert evaluation.out() == []


def test_numbers_are_read_from_the_results_files_of_a_server_that_gives_no_metrics(training: Training, server: EvaluationServer) -> None:
    evaluation = training.start()
    evaluation.submit(training.save(1), 1)
    until(lambda: server.jobs)
    results = training.run / "1_results.json"
    server.end(JobStatus.COMPLETED, result={"m": {"results": str(results), "samples": []}})
    asked = server.count("GET", "/jobs")
    # The file system shows the file late.
    until(lambda: server.count("GET", "/jobs") > asked + 1)
    results.write_text(json.dumps({"results": {"t": {"acc,none": 0.25, "acc_stderr,none": 0.1, "alias": "t"}}}))
    assert evaluation.finish(30)[0].metrics == {"eval/t/acc": 0.25}


def test_a_job_without_a_number_is_told(training: Training, server: EvaluationServer, caplog: pytest.LogCaptureFixture) -> None:
    evaluation = training.start()
    evaluation.submit(training.save(1), 1)
    evaluation.submit(training.save(2), 2)
    until(lambda: len(server.jobs) == 2)
    first = next(iter(server.jobs))
    server.jobs[first] = JobInfo.from_json({**server.jobs[first].to_json(), "status": "completed", "metrics": {"t": {"acc,none": None}}})
    server.end(JobStatus.COMPLETED, result={"m": {"results": "/nowhere/results.json"}})
    assert evaluation.finish(30) == []
    assert "completed without a finite number" in caplog.text
    assert "its results cannot be read" in caplog.text


def test_only_the_first_rank_talks(training: Training, server: EvaluationServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    for evaluation in (training.start(), training.start(rank=1)):
        evaluation.submit(training.save(1), 1)
        assert (evaluation.poll(), evaluation.finish(30)) == ([], [])
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("assayer-")]
    server.at_once = GOOD
    first = training.start(rank=0)
    first.submit(training.save(1), 1)
    assert len(first.finish(30)) == 1


RANK = """
import sys, torch.distributed as dist
from assayer.client import AsyncEvaluation

run, url, rank = sys.argv[1:]
evaluation = AsyncEvaluation({"server_url": url, "model": "m", "tasks": ["t"], "poll_interval": 0.02}, run)
dist.init_process_group("gloo", init_method=f"file://{run}/rendezvous", rank=int(rank), world_size=2)
evaluation.submit(f"{run}/checkpoint-1", 1)
print(rank, [point.step for point in evaluation.finish(60)])
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_of_a_process_group_only_the_first_rank_talks(training: Training, server: EvaluationServer) -> None:
    server.at_once = GOOD
    training.save(1)
    words = [sys.executable, "-c", RANK, str(training.run), server.url]
    ranks = [subprocess.Popen([*words, str(rank)], stdout=subprocess.PIPE, text=True) for rank in range(2)]
    assert [rank.communicate(timeout=100)[0] for rank in ranks] == ["0 [1]\n", "1 []\n"]
    assert len(server.jobs) == 1


def another_process(training: Training, **more: Any) -> AsyncEvaluation:
    """A training that knows nothing of those before it in this process."""
    asynchronous._living.clear()
    return training.start(**more)


def has_locked(training: Training) -> bool:
    return (training.run / "evals" / "pending-evaluations.lock").exists() and "submitted" in training.states()


def test_a_second_training_of_the_run_waits_until_the_first_has_ended(
    training: Training, server: EvaluationServer, caplog: pytest.LogCaptureFixture
) -> None:
    first = training.start()
    first.submit(training.save(1), 1)
    until(lambda: server.jobs and has_locked(training))
    second = another_process(training)
    second.submit(training.save(2), 2)
    until(lambda: "another training has this file" in caplog.text)
    assert len(server.jobs) == 1
    first.close()
    until(lambda: len(server.jobs) == 2)
    server.end(JobStatus.COMPLETED, GOOD)
    assert [point.step for point in second.finish(30)] == [1, 2]


def test_one_that_has_waited_long_enough_has_a_file_of_its_own(training: Training, server: EvaluationServer) -> None:
    first = training.start()
    first.submit(training.save(1), 1)
    until(lambda: server.jobs and has_locked(training))
    second = another_process(training, patience=Patience(first=0.01, most=0.05, lock=0.1, absent=0.0))
    second.submit(training.save(2), 2)
    until(lambda: len(server.jobs) == 2)
    server.end(JobStatus.COMPLETED, GOOD)
    assert [point.step for point in second.finish(30)] == [2]
    assert [point.step for point in first.finish(30)] == [1]
    for name, step in (("pending-evaluations", 1), ("pending-evaluations-2", 2)):
        assert [job["step"] for job in read_json(training.run / "evals" / name)["jobs"]] == [step]


def test_a_training_that_ends_while_another_has_the_file_leaves_it_alone(
    training: Training, server: EvaluationServer, caplog: pytest.LogCaptureFixture
) -> None:
    first = training.start()
    first.submit(training.save(1), 1)
    until(lambda: has_locked(training))
    second = another_process(training)
    second.submit(training.save(2), 2)
    until(lambda: "another training has this file" in caplog.text)
    second.close(30)
    assert len(training.states()) == 1
    (job,) = read_json(training.run / "evals" / "pending-evaluations-2")["jobs"]
    assert (job["step"], job["state"]) == (2, "new")


def test_a_second_evaluation_in_one_process_takes_over_from_one_that_nobody_closed(training: Training, server: EvaluationServer) -> None:
    """As in a notebook, after an exception."""
    first = training.start()
    first.submit(training.save(1), 1)
    until(lambda: server.jobs and has_locked(training))
    second = training.start()
    second.submit(training.save(2), 2)
    until(lambda: len(server.jobs) == 2)
    server.end(JobStatus.COMPLETED, GOOD)
    assert [point.step for point in second.finish(30)] == [1, 2]


def test_two_evaluations_of_one_run_lose_nothing_to_each_other(
    training: Training, server: EvaluationServer, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody gave them names: each has its own jobs all the same, also after a restart."""

    def begin() -> list[AsyncEvaluation]:
        configs = [{"server_url": server.url, "model": "m", "tasks": [task], "poll_interval": 0.02} for task in ("a", "b")]
        training.evaluations += [AsyncEvaluation(config, training.run, patience=QUICK) for config in configs]
        return training.evaluations[-2:]

    both = begin()
    for step in (1, 2):
        path = training.save(step)
        for evaluation in both:
            evaluation.submit(path, step)
            assert evaluation.poll() == []
    until(lambda: len(server.jobs) == 4)
    assert sorted(job.request.tasks for job in server.jobs.values()) == [("a",), ("a",), ("b",), ("b",)]
    assert caplog.text.count("give it a name of its own") == 1
    for evaluation in both:
        evaluation.close(30)
    server.end(JobStatus.COMPLETED, GOOD)
    again = begin()
    for evaluation in again:
        evaluation.poll()
    assert [[point.step for point in evaluation.finish(30)] for evaluation in again] == [[1, 2], [1, 2]]
    assert len(server.jobs) == 4


def test_one_that_takes_over_from_another_at_once_has_all_that_it_ordered(training: Training, server: EvaluationServer) -> None:
    """Before there is any file whose lock could tell them apart."""
    server.at_once = GOOD
    first, second = training.start(), training.start()
    paths = {step: training.save(step) for step in range(1, 7)}
    for step, path in paths.items():
        (first, second)[step % 2].submit(path, step)
    assert [point.step for point in first.finish(30)] == list(paths)
    assert len(server.jobs) == len(paths)


def test_one_with_another_address_takes_over_what_the_first_could_not_send(
    training: Training, server: EvaluationServer, caplog: pytest.LogCaptureFixture
) -> None:
    """A cell of a notebook is run again, with what was wrong in it mended: the next training is to find all in one file."""
    asked = {"model": "m", "tasks": ["t"]}
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        first = AsyncEvaluation({**asked, "server_url": url}, training.run, patience=QUICK)
        training.evaluations.append(first)
        first.submit(training.save(1), 1)
        server.at_once = GOOD
        second = training.start()
        second.submit(training.save(2), 2)
        assert [point.step for point in second.finish(30)] == [1, 2]
    assert "give it a name of its own" not in caplog.text
    assert training.states() == ["logged", "logged"]


def test_one_whose_thread_could_not_be_started_holds_up_no_other(
    training: Training, server: EvaluationServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = training.start(), training.start()
    with monkeypatch.context() as full:

        def refuse(thread: threading.Thread) -> None:
            raise RuntimeError("can't start new thread")

        full.setattr(threading.Thread, "start", refuse)
        first.submit(training.save(1), 1)
    server.at_once = GOOD
    returns(partial(second.submit, training.save(2), 2))
    assert [point.step for point in second.finish(30)] == [2]


def test_one_that_is_over_gives_its_file_to_one_that_asks_for_something_else(training: Training, server: EvaluationServer) -> None:
    server.at_once = GOOD
    first = training.start()
    first.submit(training.save(1), 1)
    assert [point.step for point in first.finish(30)] == [1]
    second = training.start(style="lmms_engine")
    second.submit(training.save(2), 2)
    assert [point.step for point in second.finish(30)] == [2]
    assert training.states() == ["logged", "logged"]


def test_a_child_of_a_fork_keeps_no_file_locked(training: Training, server: EvaluationServer) -> None:
    """Workers of a DataLoader outlive the training's evaluation, and one that was killed."""
    server.at_once = GOOD
    words = [sys.executable, "-c", FORKING, str(training.run), server.url]
    training.save(1)
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as killed:
        assert killed.stdout is not None
        child = int(killed.stdout.readline())
        killed.kill()
        killed.wait(30)
        try:
            os.kill(child, 0)
            evaluation = training.start(patience=Patience(first=0.01, most=0.05, lock=60.0))
            assert [point.step for point in evaluation.finish(20)] == [1]
        finally:
            os.kill(child, signal.SIGKILL)


FORKING = """
import os, sys, time
from assayer.client import AsyncEvaluation

run, url = sys.argv[1:]
evaluation = AsyncEvaluation({"server_url": url, "model": "m", "tasks": ["t"], "poll_interval": 0.02}, run)
evaluation.submit(os.path.join(run, "checkpoint-1"), 1)
path = run + "/evals/pending-evaluations"
while '"done"' not in (open(path).read() if os.path.exists(path) else ""):
    time.sleep(0.01)
child = os.fork()
if child == 0:
    os.close(1)
    time.sleep(120)
    os._exit(0)
print(child, flush=True)
time.sleep(120)
"""


FORKED = """
import os, sys
from assayer.client import AsyncEvaluation

run, url = sys.argv[1:]
evaluation = AsyncEvaluation({"server_url": url, "model": "m", "tasks": ["t"], "poll_interval": 0.02}, run)
evaluation.submit(run + "/checkpoint-1", 1)
evaluation._mailbox._changed.acquire()
child = os.fork()
if child == 0:
    sys.exit(5)
evaluation._mailbox._changed.release()
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_child_that_was_forked_ends_without_what_is_its_parents(training: Training, server: EvaluationServer) -> None:
    training.save(1)
    words = [sys.executable, "-W", "ignore", "-c", FORKED, str(training.run), server.url]
    assert subprocess.run(words, capture_output=True, text=True, timeout=60).stdout == "5\n"


ENDING = """
import sys
from assayer.client import AsyncEvaluation

run, url, how = sys.argv[1:]
evaluation = AsyncEvaluation({"server_url": url, "model": "m", "tasks": ["t"]}, run)
evaluation.submit(run + "/checkpoint-1", 1)
if how == "exception":
    raise KeyError("of the training")
if how == "interrupt":
    raise KeyboardInterrupt
sys.exit(3 if how == "exit" else 0)
"""


@pytest.mark.parametrize("how", ["exception", "interrupt", "exit", "end"])
def test_what_is_ordered_a_moment_before_a_training_ends_is_remembered(training: Training, server: EvaluationServer, how: str) -> None:
    server.hang.set()
    training.save(1)
    subprocess.run([sys.executable, "-c", ENDING, str(training.run), server.url, how], capture_output=True, timeout=60)
    assert training.states() == ["new"]


@pytest.mark.parametrize("trouble", ["a file", "a folder in its place", "no folder"])
def test_a_file_that_cannot_be_written_holds_no_end_up(
    training: Training, server: EvaluationServer, caplog: pytest.LogCaptureFixture, trouble: str
) -> None:
    server.at_once = GOOD
    if trouble == "a file":
        (training.run / "evals").touch()
    if trouble == "a folder in its place":
        (training.file / "a").mkdir(parents=True)
    where = training.run / "none" / "such" if trouble == "no folder" else training.run
    config = {"server_url": server.url, "model": "m", "tasks": ["t"], "poll_interval": 0.02}
    evaluation = AsyncEvaluation(config, where, patience=Patience(first=0.01, most=0.05, lock=0.1))
    evaluation.submit(training.save(1), 1)
    began = time.monotonic()
    assert [point.step for point in evaluation.finish(60)] == [1]
    assert time.monotonic() - began < 30
    assert "a restarted training would not know of what is out" in caplog.text
    evaluation.close(30)


def test_a_path_that_a_later_step_overwrites_gives_no_number_of_the_earlier(
    training: Training, server: EvaluationServer, caplog: pytest.LogCaptureFixture
) -> None:
    """last.ckpt, written over in place while the server is away: also its second name shows the later weights."""
    server.down()
    evaluation = training.start()
    last = training.run / "last.ckpt"
    last.write_text("of step 100")
    evaluation.submit(last, 100)
    until(lambda: training.states() == ["new"])
    last.write_text("of step 200, and longer")
    evaluation.submit(last, 200)
    until(lambda: "overwritten by step 200" in caplog.text)
    server.at_once = GOOD
    server.up()
    assert [point.step for point in evaluation.finish(30)] == [200]


def test_one_that_is_replaced_is_kept_for_its_own_step(training: Training, server: EvaluationServer) -> None:
    server.down()
    evaluation = training.start()
    path = training.save(100, "of step 100") / "model.safetensors"
    evaluation.submit(path, 100)
    until(lambda: list((training.run / "checkpoint-100" / "evals" / ".hold").glob("client*/model.safetensors")))
    path.unlink()
    path.write_text("of step 200, and longer")
    evaluation.submit(path, 200)
    server.at_once = GOOD
    server.up()
    assert [point.step for point in evaluation.finish(30)] == [100, 200]


def test_a_training_may_wait_for_ever(training: Training, server: EvaluationServer) -> None:
    server.at_once = GOOD
    evaluation = training.start()
    evaluation.submit(training.save(1), 1)
    assert [point.step for point in evaluation.finish(float("inf"))] == [1]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        '{"jobs": 5}',
        '{"jobs": {"a": 1}}',
        '{"jobs": [5, null, {}]}',
        '{"jobs": [{"key": "k", "checkpoint": "c", "metrics": null}]}',
    ],
)
def test_a_damaged_file_keeps_nothing_from_being_evaluated(training: Training, server: EvaluationServer, content: str) -> None:
    server.at_once = GOOD
    (training.run / "evals").mkdir()
    training.file.write_text(content)
    evaluation = training.start()
    evaluation.submit(training.save(1), 1)
    assert [point.step for point in evaluation.finish(30)] == [1]


def test_what_an_earlier_training_submitted_under_another_configuration_is_submitted_anew(
    training: Training, server: EvaluationServer
) -> None:
    """Its answer was lost, and a server takes one request under one key."""
    server.down()
    evaluation = training.start()
    evaluation.submit(training.save(1), 1)
    until(lambda: training.states() == ["new"])
    evaluation.close(30)
    (job,) = read_json(training.file)["jobs"]
    server.refused_keys.add(job["sent_as"])
    server.at_once = GOOD
    server.up()
    assert [point.step for point in training.start().finish(30)] == [1]


def test_a_server_that_drips_is_cut_off(tmp_path: Path) -> None:
    """A letter of a header now and then: no read ever comes to its time-out."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def drip() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listening.accept()
                    threading.Thread(target=dribble, args=(connection,), daemon=True).start()

        def dribble(connection: socket.socket) -> None:
            with contextlib.suppress(OSError), connection:
                connection.sendall(b"HTTP/1.1 200 OK\r\nX: ")
                while True:
                    connection.sendall(b"x")
                    time.sleep(0.05)

        threading.Thread(target=drip, daemon=True).start()
        config = {"server_url": f"http://127.0.0.1:{listening.getsockname()[1]}", "model": "m", "tasks": ["t"]}
        evaluation = AsyncEvaluation(config, tmp_path, timeout=0.2, patience=QUICK)
        evaluation.submit(tmp_path, 1)
        until(lambda: "no answer in time" in str(evaluation.out()))
        evaluation.close(30)


def test_a_copy_has_a_thread_of_its_own(training: Training, server: EvaluationServer) -> None:
    """As when a trainer is copied, or sent to processes that are spawned."""
    server.at_once = GOOD
    evaluation = training.start()
    evaluation.submit(training.save(1), 1)
    assert [point.step for point in evaluation.finish(30)] == [1]
    for copy_of in (copy.deepcopy(evaluation), pickle.loads(pickle.dumps(evaluation))):
        copy_of.submit(training.save(2, "again" * random.randrange(1000)), 2)
        assert [point.step for point in copy_of.finish(30)] == [2]
        copy_of.close(30)


def test_a_checkpoint_is_where_it_was_when_it_was_submitted(
    training: Training, server: EvaluationServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.at_once = GOOD
    evaluation = training.start()
    (training.run / "below").mkdir()
    monkeypatch.chdir(training.run / "below")
    Path("m.pt").write_text("weights")
    evaluation.submit("m.pt", 1)
    (point,) = evaluation.finish(30)
    assert point.checkpoint == str(training.run / "below" / "m.pt")


def test_a_file_that_cannot_be_read_for_a_moment_is_not_written_over(
    training: Training, server: EvaluationServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from assayer.client import pending

    first = training.start()
    first.submit(training.save(1), 1)
    until(lambda: "submitted" in training.states())
    first.close(30)
    real = read_json
    failures = iter(range(2))

    def failing(path: Path) -> Any:
        if next(failures, None) is not None:
            raise OSError(5, "Input/output error")
        return real(path)

    monkeypatch.setattr(pending, "read_json", failing)
    server.end(JobStatus.COMPLETED, GOOD)
    assert [point.step for point in training.start().finish(30)] == [1]
    assert "cannot be read (Input/output error)" in caplog.text


def test_without_a_place_for_the_file_all_goes_on_in_memory(
    training: Training, server: EvaluationServer, caplog: pytest.LogCaptureFixture
) -> None:
    server.at_once = GOOD
    checkpoint = training.save(1)
    # A file in the place of the folder: nobody can write there, root included.
    (training.run / "evals").write_text("")
    evaluation = training.start()
    evaluation.submit(checkpoint, 1)
    assert len(come(evaluation)) == 1
    assert caplog.text.count("cannot be written") == 1


def test_a_file_that_is_damaged_is_told(training: Training, server: EvaluationServer, caplog: pytest.LogCaptureFixture) -> None:
    server.at_once = GOOD
    training.file.parent.mkdir()
    training.file.write_text("{")
    evaluation = training.start()
    evaluation.submit(training.save(1), 1)
    assert len(evaluation.finish(30)) == 1
    assert "is no file of pending evaluations" in caplog.text


@pytest.mark.parametrize(("directory", "where"), [("run", "run"), ("run/checkpoints", "run"), ("run/checkpoint", "run")])
def test_the_file_lies_where_no_trainer_takes_it_for_a_checkpoint(
    tmp_path: Path, server: EvaluationServer, directory: str, where: str
) -> None:
    (tmp_path / directory).mkdir(parents=True)
    training = Training(tmp_path / directory, server)
    server.at_once = GOOD
    evaluation = training.start(name="second")
    evaluation.submit(training.save(1), 1)
    assert len(evaluation.finish(30)) == 1
    evaluation.close()
    assert sorted(os.listdir(tmp_path / where / "evals")) == ["pending-second", "pending-second.lock"]


@pytest.mark.parametrize("more", [{"style": "other"}, {"weights": "ema"}, {"weights": ["best"]}, {"name": "a.json"}, {"name": "a/b"}])
def test_an_argument_that_cannot_work_is_said_when_training_begins(training: Training, more: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        training.start(**more)


def test_a_bug_of_ours_over_one_evaluation_is_logged_and_the_next_one_comes(
    training: Training, server: EvaluationServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from assayer.client import courier

    real = named

    def wrong(metrics: Any, *words: Any) -> Any:
        if "poison" in metrics:
            raise KeyError("a bug")
        return real(metrics, *words)

    monkeypatch.setattr(courier, "named", wrong)
    server.at_once = {"poison": 1.0}
    evaluation = training.start()
    with caplog.at_level(logging.ERROR):
        evaluation.submit(training.save(1), 1)
        until(lambda: "a bug" in caplog.text)
        server.at_once = GOOD
        evaluation.submit(training.save(2), 2)
        assert [point.step for point in come(evaluation)] == [2]
    assert len(evaluation.out()) == 1
