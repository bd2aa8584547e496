"""``python -m assayer.results publish``: repairs, and fills in what was before."""

import re
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from curves import Run

from assayer.errors import UsageError
from assayer.results.command import main
from assayer.results.find import find_records


def command(*words: object) -> Result:
    return CliRunner().invoke(main, ["publish", *map(str, words)])


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Two runs with two records of one evaluator, one of them with a third of another, and what is no record."""
    for name in ("exp1", "exp2"):
        run = Run(tmp_path / "runs" / name)
        for step in (9, 10):
            run.record(step, {"acc": step / 100})
        (run.evals / ".hold" / "abc" / "checkpoint-9").mkdir(parents=True)
        (run.evals / ".hold" / "abc" / "checkpoint-9" / "config.json").write_text("{}")
        (run.folder / "checkpoint-9").mkdir()
        (run.folder / "checkpoint-9" / "config.json").write_text("{}")
    Run(tmp_path / "runs" / "exp2").record(9, {"loss": 2.0}, evaluator="loss")
    return tmp_path / "runs"


def test_everything_below_a_directory_is_published_once(runs: Path) -> None:
    done = command("--track", "tensorboard", runs)
    assert done.exit_code == 0, done.output
    assert done.output == "tensorboard: 5 published, 0 there already, of 5 records\n"
    assert command("--track", "tensorboard", runs, runs / "exp1").output == "tensorboard: 0 published, 5 there already, of 5 records\n"
    assert [len(list((runs / name / "evals").glob("*tfevents*"))) for name in ("exp1", "exp2")] == [1, 1]


def test_records_are_found_from_every_height_in_the_order_of_their_steps(runs: Path) -> None:
    run = runs / "exp1"
    found = [run / "evals" / "accuracy" / f"model_step{step}.pt.json" for step in (9, 10)]
    for place in (run, run / "evals", run / "evals" / "accuracy"):
        assert find_records(place) == found
    assert find_records(found[0]) == [found[0]]


def test_results_that_lie_elsewhere_are_found(tmp_path: Path, runs: Path) -> None:
    elsewhere = tmp_path / "results"
    elsewhere.mkdir()
    (runs / "exp1" / "evals").rename(elsewhere / "exp1-0a1b2c3d")
    assert len(find_records(elsewhere)) == len(find_records(elsewhere / "exp1-0a1b2c3d")) == 2
    assert command("--track", f"tensorboard:{tmp_path}/logs/{{run}}", elsewhere).exit_code == 0
    assert [path.name for path in (tmp_path / "logs").iterdir()] == ["exp1-0a1b2c3d"]


def test_results_are_found_at_any_depth_and_below_a_parent_that_is_called_like_a_results_folder(tmp_path: Path) -> None:
    deep = Run(tmp_path.joinpath("evals", *"abcdefgh", "exp1")).record(1, {"acc": 0.1})
    near = Run(tmp_path / "evals" / "exp2").record(1, {"acc": 0.1})
    assert find_records(tmp_path) == find_records(tmp_path / "evals") == [deep, near]
    assert find_records(tmp_path / "evals" / "exp2") == [near]
    assert find_records(near.parent) == [near]
    # What an evaluator has written is none.
    files = near.parent / "model_step1.pt.files" / "evals" / "x"
    files.mkdir(parents=True)
    (files / "y.json").write_text("{}")
    assert find_records(tmp_path) == [deep, near]


def test_one_evaluator_alone_can_be_published(runs: Path) -> None:
    assert "1 published, 0 there already, of 1 records" in command("--track", "tensorboard", "--evaluator", "loss", runs).output
    done = command("--track", "tensorboard", "--evaluator", "none", runs)
    assert isinstance(done.exception, UsageError)
    assert str(done.exception) == "no results of none; there are some of accuracy, loss"


def test_what_gives_no_point_is_counted_with_its_reason(runs: Path) -> None:
    run = Run(runs / "exp1")
    for step in (11, 12):
        run.record(step, {}, status="failed")
    (run.evals / "accuracy" / "torn.json").write_text("{")
    done = command("--track", "tensorboard", run.folder)
    assert "assayer: note: 2 give no point, such as " in done.stderr
    assert "its status is failed" in done.stderr
    assert re.search(r"1 give no point, such as \S+torn\.json: it is no record", done.stderr)
    assert done.stdout == "tensorboard: 2 published, 0 there already, of 5 records\n"
    assert done.exit_code == 0


def test_one_tracker_that_is_away_keeps_no_other_from_its_points_and_ends_with_1(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "away").write_text("a file, no directory")
    done = command("--track", f"tensorboard:{tmp_path}/away", "--track", "tensorboard", runs / "exp1")
    assert done.exit_code == 1
    assert f"assayer: error: tensorboard: cannot write {tmp_path}/away: File exists\n" in done.stderr
    assert "tensorboard: 2 published, 0 there already, of 2 records\n" in done.stdout
    # Mended: the same words repair it.
    (tmp_path / "away").unlink()
    done = command("--track", f"tensorboard:{tmp_path}/away", runs / "exp1")
    assert (done.exit_code, done.stdout) == (0, f"tensorboard:logdir={tmp_path}/away: 2 published, 0 there already, of 2 records\n")


def test_a_place_without_records_is_one_line(tmp_path: Path) -> None:
    for place, said in [(tmp_path / "none", "no directory"), (tmp_path, "no record below")]:
        with pytest.raises(UsageError, match=said):
            find_records(place)
