"""What is submitted is out of reach of the trainer's rotation at once, whether or not there is a server."""

import errno
import logging
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import until
from protocol_server import EvaluationServer
from training import GOOD, QUICK, Training, come, trainings

from assayer import kept, second_names
from assayer.client import AsyncEvaluation
from assayer.client.courier import Patience
from assayer.protocol import JobStatus


@pytest.fixture
def server() -> Iterator[EvaluationServer]:
    with EvaluationServer() as server:
        yield server


@pytest.fixture
def training(tmp_path: Path, server: EvaluationServer) -> Iterator[Training]:
    with trainings(tmp_path, server) as training:
        yield training


def submit(training: Training, evaluation: AsyncEvaluation, *steps: int) -> None:
    for step in steps:
        evaluation.submit(training.save(step, f"weights {step}"), step)
    until(lambda: len(training.states()) >= len(steps))


def held(training: Training) -> list[str]:
    """The names of the checkpoints that are kept."""
    return sorted(path.name for path in (training.run / "evals" / ".hold").glob("client*/checkpoint-*"))


def paths(server: EvaluationServer) -> list[Path]:
    """The checkpoints that were submitted, in their order."""
    return [Path(job.request.model_args["model"]) for job in server.jobs.values() if job.request.model_args]


def test_a_checkpoint_that_is_rotated_away_while_there_is_no_server_is_evaluated_all_the_same(
    training: Training, server: EvaluationServer
) -> None:
    server.down()
    evaluation = training.start(weights=("regular", "ema"))
    submit(training, evaluation, 1)
    shutil.rmtree(training.run / "checkpoint-1")
    server.up()
    until(lambda: len(server.jobs) == 2)
    for path in paths(server):
        assert path.name == "checkpoint-1"
        assert (path / "model.safetensors").read_text() == "weights 1"
    server.end(JobStatus.COMPLETED, GOOD)
    assert len(come(evaluation, 2)) == 2
    until(lambda: not (training.run / "evals" / ".hold").exists(), what="nothing is kept any more")


def test_it_is_kept_until_its_evaluation_has_ended(training: Training, server: EvaluationServer) -> None:
    """Upstream's server holds nothing: what waits there would be deleted."""
    evaluation = training.start()
    submit(training, evaluation, 1, 2)
    until(lambda: len(server.jobs) == 2)
    shutil.rmtree(training.run / "checkpoint-1")
    time.sleep(0.1)
    assert held(training) == ["checkpoint-1", "checkpoint-2"]
    server.end(JobStatus.FAILED, error="no luck")
    until(lambda: not held(training))
    assert evaluation.poll() == []


def test_the_newest_are_kept_and_what_was_submitted_stays(
    training: Training, server: EvaluationServer, caplog: pytest.LogCaptureFixture
) -> None:
    evaluation = training.start(hold=2)
    submit(training, evaluation, 1)
    until(lambda: server.jobs)
    server.down()
    # The first is asked for again and again now; else the second could be on its way, under its name, before the third comes.
    until(lambda: [words for words in evaluation.out() if "no answer" in words])
    with caplog.at_level(logging.INFO):
        submit(training, evaluation, 2, 3)
        until(lambda: held(training) == ["checkpoint-1", "checkpoint-3"])
    assert "checkpoint-2 of step 2 is not kept from the trainer's rotation any more" in caplog.text
    server.let_go.clear()
    server.up()
    until(lambda: len(server.jobs) == 3)
    assert [path.parent.name.startswith("client") for path in paths(server)] == [True, False, True]


def test_both_weights_of_a_checkpoint_are_one_of_those_that_are_kept(training: Training, server: EvaluationServer) -> None:
    server.down()
    evaluation = training.start(hold=2, weights=("regular", "ema"))
    submit(training, evaluation, 1, 2)
    until(lambda: len(held(training)) == 4)


def test_with_hold_0_nothing_is_kept(training: Training, server: EvaluationServer) -> None:
    evaluation = training.start(hold=0)
    submit(training, evaluation, 1)
    until(lambda: server.jobs)
    assert paths(server) == [training.run / "checkpoint-1"]
    assert held(training) == []


def test_a_restarted_training_finds_what_was_kept_and_takes_away_what_nobody_waits_for(
    training: Training, server: EvaluationServer
) -> None:
    server.down()
    first = training.start()
    submit(training, first, 1)
    first.close(30)
    shutil.rmtree(training.run / "checkpoint-1")
    # As when a training was killed between keeping and remembering; and what belongs to another evaluation of this run.
    left = kept.Kept.of(str(training.save(2)), str(training.file), "unknown")
    other = kept.Kept.of(str(training.save(2)), str(training.file) + "-other", "unknown")
    assert left.keep()
    assert other.keep()
    server.up()
    second = training.start()
    assert second.poll() == []
    until(lambda: server.jobs)
    assert not left.is_there
    assert other.is_there
    assert (paths(server)[0] / "model.safetensors").read_text() == "weights 1"
    server.end(JobStatus.COMPLETED, GOOD)
    assert [point.step for point in second.finish(30)] == [1]


def test_a_submission_is_the_same_in_every_try(training: Training, server: EvaluationServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under one key a server takes one request: with another path in it, the second try would be refused."""
    monkeypatch.setattr(second_names, "free_part", lambda _: 0.05)
    server.lose, server.at_once = 1, GOOD
    evaluation = training.start()
    submit(training, evaluation, 1)
    until(lambda: server.requests)
    monkeypatch.undo()
    assert [point.step for point in evaluation.finish(30)] == [1]
    assert paths(server) == [training.run / "checkpoint-1"]
    assert held(training) == []


def test_what_comes_later_is_kept_too_and_what_was_saved_anew_is_not_mixed_in(training: Training, server: EvaluationServer) -> None:
    server.statuses = [503] * 10**6
    evaluation = training.start()
    path = training.save(1, "first")
    evaluation.submit(path, 1)
    until(lambda: held(training))
    (path / "tokenizer.json").write_text("late")
    (second,) = (training.run / "evals" / ".hold").glob("client*/checkpoint-1")
    until((second / "tokenizer.json").exists)
    shutil.rmtree(path)
    training.save(1, "again")
    (path / "vocab.txt").write_text("of other weights")
    seen = len(server.requests)
    until(lambda: len(server.requests) > seen + 3)
    assert sorted(os.listdir(second)) == ["model.safetensors", "tokenizer.json"]
    assert (second / "model.safetensors").read_text() == "first"


def test_what_is_saved_after_it_was_submitted_is_waited_for(training: Training, server: EvaluationServer) -> None:
    """As by an asynchronous save: nothing lies there when the loop goes on."""
    server.at_once = GOOD
    evaluation = training.start(patience=Patience(first=0.01, most=0.05, absent=60.0))
    evaluation.submit(training.run / "checkpoint-1", 1)
    until(lambda: "nothing is there yet" in str(evaluation.out()))
    (training.run / "checkpoint-1").mkdir()
    time.sleep(0.1)
    assert not server.jobs
    training.save(1)
    assert [point.step for point in evaluation.finish(30)] == [1]


def test_what_never_comes_is_submitted_in_the_end(training: Training, server: EvaluationServer) -> None:
    """So that the server says what is wrong with it."""
    evaluation = training.start(patience=Patience(first=0.01, most=0.05, absent=0.2))
    server.statuses = [422]
    evaluation.submit(training.run / "checkpoint-1", 1)
    assert evaluation.finish(30) == []
    assert evaluation.out() == []
    assert server.count("POST", "/evaluate") == 1


def test_what_was_deleted_before_it_could_be_submitted_is_not_waited_for_as_if_it_were_still_to_come(
    training: Training, server: EvaluationServer
) -> None:
    """The end of a training would stand still for two minutes."""
    server.hang.set()
    evaluation = training.start(hold=0, patience=Patience(first=0.01, most=0.05, absent=60.0, quiet=0.1))
    for step in (1, 2):
        evaluation.submit(training.save(step), step)
    until(lambda: training.states() == ["new", "new"])
    shutil.rmtree(training.run / "checkpoint-2")
    server.at_once = GOOD
    server.hang.clear()
    server.let_go.set()
    # This server takes anything; ours says of the second that it cannot be read.
    assert [point.step for point in evaluation.finish(30)] == [1, 2]


def test_a_folder_that_gives_way_to_the_whole_checkpoint_was_none_that_was_deleted(training: Training, server: EvaluationServer) -> None:
    """Made before the save begins, by a saver in the background."""
    path, aside = training.run / "checkpoint-1", training.run / "aside"
    path.mkdir()
    evaluation = training.start(patience=Patience(first=0.01, most=0.05, absent=60.0, quiet=0.1))
    evaluation.submit(path, 1)
    until(lambda: training.states() == ["new"])
    path.rmdir()
    aside.mkdir()
    time.sleep(0.5)
    assert server.count("POST", "/evaluate") == 0
    (aside / "model.safetensors").write_text("weights")
    aside.rename(path)
    server.at_once = GOOD
    assert [point.step for point in evaluation.finish(30)] == [1]


def test_where_hard_links_are_refused_the_checkpoint_itself_is_submitted_and_that_is_said_once(
    training: Training, server: EvaluationServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def link(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", link)
    server.at_once = GOOD
    evaluation = training.start()
    submit(training, evaluation, 1, 2, 3)
    assert len(evaluation.finish(30)) == 3
    assert paths(server) == [training.run / f"checkpoint-{step}" for step in (1, 2, 3)]
    assert caplog.text.count("hard links cannot be made") == 1


def test_what_is_no_path_at_all_harms_no_other(training: Training, server: EvaluationServer) -> None:
    server.at_once = GOOD
    evaluation = training.start(patience=QUICK)
    evaluation.submit("a\0b", 1)
    evaluation.submit(training.save(2), 2)
    assert 2 in [point.step for point in evaluation.finish(30)]


def test_a_checkpoint_that_was_saved_anew_costs_no_later_order(training: Training, server: EvaluationServer) -> None:
    evaluation = training.start(hold=1, weights=("regular", "ema"))
    submit(training, evaluation, 1)
    until(lambda: len(server.jobs) == 2)
    evaluation.submit(training.save(1, "saved anew"), 1)
    evaluation.submit(training.save(2), 2)
    until(lambda: len(server.jobs) == 6)
    server.end(JobStatus.COMPLETED, GOOD)
    assert [(point.step, point.weights) for point in evaluation.finish(30)] == [(s, w) for s in (1, 2) for w in ("ema", "regular")]


def test_one_path_that_is_replaced_at_each_step_is_bounded_like_any(training: Training, server: EvaluationServer) -> None:
    server.down()
    evaluation = training.start(hold=2)
    for step in range(1, 7):
        shutil.rmtree(training.run / "checkpoint-0", ignore_errors=True)
        evaluation.submit(training.save(0, f"of step {step}"), step)
        until(lambda step=step: len(training.states()) == step)  # type: ignore[misc]
    until(lambda: len(held(training)) == 2)


def test_a_training_that_begins_sweeps_what_killed_ones_have_left(training: Training, server: EvaluationServer) -> None:
    root = training.run / "evals" / ".hold"
    old = kept.Kept.of(str(training.save(7)), "somebody else's file", "key")
    assert old.keep()
    for name in (".clientabc-1234", ".gone-clientabc-1234"):
        (root / name).mkdir()
    month = time.time() - 40 * 86400
    for path in (old.folder / "kept.json", root / ".clientabc-1234"):
        os.utime(path, (month, month))
    server.at_once = GOOD
    evaluation = training.start()
    submit(training, evaluation, 1)
    assert len(evaluation.finish(30)) == 1
    until(lambda: not root.exists())


def test_a_path_that_is_a_link_is_kept_by_what_it_leads_to(training: Training, server: EvaluationServer) -> None:
    server.down()
    evaluation = training.start()
    path = training.run / "epoch=3-step=5.ckpt"
    path.write_text("of step 5")
    (training.run / "last.ckpt").symlink_to(path.name)
    evaluation.submit(training.run / "last.ckpt", 5)
    until(lambda: list((training.run / "evals" / ".hold").glob("client*/last.ckpt")))
    path.unlink()
    server.up()
    until(lambda: server.jobs)
    assert paths(server)[0].read_text() == "of step 5"


def test_a_server_that_may_not_look_there_is_asked_for_the_first_name(training: Training, server: EvaluationServer) -> None:
    server.at_once, server.refuses = GOOD, "/.hold/"
    evaluation = training.start()
    submit(training, evaluation, 1)
    assert len(evaluation.finish(30)) == 1
    assert paths(server) == [training.run / "checkpoint-1"]


def test_what_is_replaced_beside_the_weights_while_it_is_written_is_replaced_here_too(training: Training, server: EvaluationServer) -> None:
    server.statuses = [503] * 10**6
    evaluation = training.start()
    path = training.save(1)
    (path / "config.json").write_text("early")
    evaluation.submit(path, 1)
    until(lambda: held(training))
    (path / "config.json.tmp").write_text("late")
    (path / "config.json.tmp").rename(path / "config.json")
    (path / "tokenizer.json").write_text("later")
    (second,) = (training.run / "evals" / ".hold").glob("client*/checkpoint-1")
    until((second / "tokenizer.json").exists)
    assert (second / "config.json").read_text() == "late"


def test_what_no_format_knows_is_submitted_once_nothing_of_it_changes(training: Training, server: EvaluationServer) -> None:
    server.at_once = GOOD
    evaluation = training.start(patience=Patience(first=0.01, most=0.05, absent=60.0, quiet=0.3))
    path = training.run / "own_format"
    path.mkdir()
    (path / "part0").touch()
    evaluation.submit(path, 1)
    for number in range(1, 6):
        time.sleep(0.1)
        (path / f"part{number}").touch()
    assert not server.jobs
    assert len(evaluation.finish(30)) == 1


def test_a_working_directory_that_is_gone_ends_no_step(
    training: Training, server: EvaluationServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluation = training.start()
    (training.run / "gone").mkdir()
    monkeypatch.chdir(training.run / "gone")
    (training.run / "gone").rmdir()
    evaluation.submit("checkpoint-1", 1)
    assert evaluation.poll() == []
