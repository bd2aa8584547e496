"""TensorBoard: event files that its own reader reads back, with one point each, whatever broke off."""

from pathlib import Path

import pytest
from curves import AFTER, BEFORE, Run, killed, published
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from assayer.publication import publish
from assayer.tracking import parse

Scalars = list[tuple[int, float, float]]


def scalars(folder: Path) -> dict[str, Scalars]:
    """What TensorBoard finds in a directory: step, moment and value of each point, by name."""
    read = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    read.Reload()
    return {tag: [(e.step, e.wall_time, round(e.value, 6)) for e in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


def wall(step: int) -> float:
    return 1795147200.25 + step


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "exp1")


def test_points_lie_beside_the_records_with_their_steps_and_moments(run: Run) -> None:
    records = [run.record(step, {"acc": step / 100, "loss": None}) for step in (10, 20)]
    assert published("tensorboard", *records) == (2, 0)
    assert scalars(run.evals) == {"eval/acc": [(10, wall(10), 0.1), (20, wall(20), 0.2)]}


def test_late_ends_and_publishing_twice_give_one_point_each(run: Run) -> None:
    for step in (30, 10, 20):
        record = run.record(step, {"acc": step / 100})
        assert published("tensorboard", record) == (1, 0)
        assert published("tensorboard", record) == (0, 1)
    assert sorted(scalars(run.evals)["eval/acc"]) == [(step, wall(step), step / 100) for step in (10, 20, 30)]
    assert len(list(run.evals.glob("*tfevents*"))) == 1, "one file is appended to"


def test_the_directory_given_may_name_the_run(run: Run, tmp_path: Path) -> None:
    published(f"tensorboard:{tmp_path}/logs/{{run}}", run.record(10, {"acc": 0.5}))
    assert list(scalars(tmp_path / "logs" / "exp1")) == ["eval/acc"]
    assert not list(run.evals.glob("*tfevents*"))


def test_two_runs_in_one_directory_have_a_file_each(tmp_path: Path) -> None:
    runs = [Run(tmp_path / name) for name in ("a", "b")]
    for step, run in enumerate(runs):
        published(f"tensorboard:{tmp_path}/logs", run.record(step, {"acc": 0.5}))
    assert len(list((tmp_path / "logs").iterdir())) == 2
    assert len(scalars(tmp_path / "logs")["eval/acc"]) == 2


@pytest.mark.parametrize(
    "patch",
    [
        BEFORE,
        AFTER,
        # The second half of what is to be appended never comes.
        "from assayer.trackers import tensorboard\nwrite = os.write\n"
        "tensorboard.os = type('half', (), {**vars(os), 'write': lambda d, b: (write(d, b[: len(b) - 20]), die())})",
    ],
    ids=["before", "after", "within"],
)
def test_a_publisher_that_is_killed_leaves_one_point_each(run: Run, patch: str) -> None:
    first = run.record(10, {"acc": 0.1})
    published("tensorboard", first)
    later = [run.record(step, {"acc": step / 100, "loss": 1.0}) for step in (20, 30)]
    killed(patch, "tensorboard", *later)
    # The next record repairs it.
    assert published("tensorboard", run.record(40, {"acc": 0.4})) == (3, 0)
    assert published("tensorboard", first, *later) == (0, 3)
    found = scalars(run.evals)
    assert [(step, value) for step, _, value in found["eval/acc"]] == [(10, 0.1), (20, 0.2), (30, 0.3), (40, 0.4)]
    assert [step for step, _, _ in found["eval/loss"]] == [20, 30]


def test_a_ledger_that_was_lost_doubles_nothing(run: Run) -> None:
    record = run.record(10, {"acc": 0.1})
    published("tensorboard", record)
    next(run.evals.glob("tensorboard-*.ledger")).unlink()
    assert published("tensorboard", record) == (1, 0)
    assert scalars(run.evals) == {"eval/acc": [(10, wall(10), 0.1)]}


def test_the_trainers_own_event_files_are_left_alone(run: Run) -> None:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(run.folder / "logs") as writer:
        writer.add_scalar("train/loss", 1.0, 10)
    (own,) = (run.folder / "logs").iterdir()
    before = own.read_bytes()
    published(f"tensorboard:{run.folder / 'logs'}", run.record(10, {"acc": 0.1}))
    assert own.read_bytes() == before
    assert set(scalars(run.folder / "logs")) == {"train/loss", "eval/acc"}


def test_a_number_beyond_float32_is_left_out_and_said(run: Run) -> None:
    outcome = publish([run.record(10, {"acc": 0.1, "huge": 1e300})], parse("tensorboard", run.folder))
    assert outcome.notes == ["eval/huge of step 10 is too large for TensorBoard"]
    assert set(scalars(run.evals)) == {"eval/acc"}


def test_a_damaged_file_is_at_its_end_where_the_damage_is_and_a_new_one_is_begun(run: Run) -> None:
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

    for step in (10, 20, 30):
        published("tensorboard", run.record(step, {"acc": step / 100}))
    (path,) = run.evals.glob("*tfevents*")
    data = path.read_bytes()
    # An event that is none, in a block with lengths that are right.
    length = int.from_bytes(data[:8], "little")
    second = 16 + length
    size = int.from_bytes(data[second : second + 8], "little")
    nonsense = b"\xff" * size
    block = data[second : second + 12] + nonsense + masked_crc32c(nonsense).to_bytes(4, "little")
    path.write_bytes(data[:second] + block + data[second + len(block) :])
    for step in (40, 50):
        assert published("tensorboard", run.record(step, {"acc": step / 100})) == (1, 0)
    first, younger = sorted(run.evals.glob("*tfevents*"))
    assert first == path, "the younger one has a later name"
    read = EventAccumulator(str(younger))
    read.Reload()
    assert [event.step for event in read.Scalars("eval/acc")] == [40, 50]
