"""MLflow on a SQLite file: metrics read back through its own client, one each, whatever broke off."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from curves import AFTER, Run, killed, published

from assayer.points import Point
from assayer.publication import publish
from assayer.trackers import mlflow as tracker
from assayer.tracking import parse

# What MLflow uses of SQLAlchemy that goes away is between those two.
pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture(scope="module")
def new_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A database that MLflow has just made; to make one takes it seconds."""
    with pytest.MonkeyPatch.context() as patched:
        for name in ("MLFLOW_DISABLE_TELEMETRY", "DO_NOT_TRACK"):
            patched.setenv(name, "true")
        from mlflow.tracking import MlflowClient

        path = tmp_path_factory.mktemp("mlflow") / "new.db"
        MlflowClient(tracking_uri=f"sqlite:///{path}").search_experiments()
        yield path


class Store:
    """A database of one test's own."""

    def __init__(self, path: Path) -> None:
        from mlflow.tracking import MlflowClient

        self.uri = f"sqlite:///{path}"
        self.target = f"mlflow:uri={self.uri}"
        self.client = MlflowClient(tracking_uri=self.uri)

    def runs(self, experiment: str = "0") -> dict[str, str]:
        """The id of each run by its name."""
        return {run.info.run_name: run.info.run_id for run in self.client.search_runs([experiment])}

    def history(self, run: str, name: str = "eval/acc") -> list[tuple[int, float, int]]:
        return sorted((m.step, m.value, m.timestamp) for m in self.client.get_metric_history(run, name))


@pytest.fixture
def store(new_store: Path, tmp_path: Path) -> Store:
    return Store(Path(shutil.copy(new_store, tmp_path / "m.db")))


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "exp1")


def wall(step: int) -> int:
    return 1795147200250 + step * 1000


def test_out_of_order_late_and_twice_give_one_metric_each_in_a_run_of_our_own(store: Store, run: Run) -> None:
    for step in (30, 10, 20):
        record = run.record(step, {"acc": step / 100, "loss": None})
        assert published(store.target, record) == (1, 0)
        assert published(store.target, record) == (0, 1)
    assert set(store.runs()) == {"exp1-eval"}
    own = store.runs()["exp1-eval"]
    assert store.history(own) == [(step, step / 100, wall(step)) for step in (10, 20, 30)]
    assert store.client.get_run(own).info.status == "FINISHED", "nothing would ever end it"


def test_the_trainers_run_gets_the_points_and_stays_as_it_is(store: Store, run: Run) -> None:
    trainers = store.client.create_run(store.client.create_experiment("e"), run_name="train").info.run_id
    store.client.log_metric(trainers, "loss", 2.0, step=40)
    published(f"{store.target},run={trainers}", run.record(10, {"acc": 0.1}))
    published(f"{store.target},experiment=e,run=train", run.record(20, {"acc": 0.2}))
    assert [step for step, _, _ in store.history(trainers)] == [10, 20]
    assert store.client.get_run(trainers).info.status == "RUNNING"
    assert store.runs() == {}


@pytest.mark.parametrize(
    "patch",
    [
        pytest.param(AFTER, marks=pytest.mark.slow),
        "from assayer.trackers import mlflow\nfrom mlflow.tracking import MlflowClient\nmlflow._BATCH = 3\n"
        "log = MlflowClient.log_batch\nMlflowClient.log_batch = lambda self, *w, **m: (log(self, *w, **m), die())",
    ],
    ids=["after", "within"],
)
def test_a_publisher_that_is_killed_leaves_one_metric_each(store: Store, run: Run, patch: str) -> None:
    records = [run.record(step, {"acc": step / 100, "loss": 1.0}) for step in (10, 20)]
    killed(patch, store.target, *records)
    assert published(store.target, *records) == (2, 0)
    (own,) = store.runs().values()
    for name in ("eval/acc", "eval/loss"):
        assert [step for step, _, _ in store.history(own, name)] == [10, 20]


def test_a_ledger_that_was_lost_doubles_nothing(store: Store, run: Run) -> None:
    record = run.record(10, {"acc": 0.1})
    target = f"{store.target},run=mine"
    published(target, record)
    next(run.evals.glob("mlflow-*.ledger")).unlink()
    published(target, record)
    assert len(store.history(store.runs()["mine"])) == 1


def test_doubtful_points_are_looked_up_where_the_store_would_double_them(store: Store, run: Run) -> None:
    from assayer.points import Curve

    point = Point("k", "i", 10, 1.5, {"eval/acc": 0.1, "eval/loss": 2.0}, "accuracy", "/r.json")
    curve = Curve(run.evals, "0" * 16)
    options = tracker.settle({"uri": store.uri}, run.folder)
    tracker.publish([point], options, curve)
    # Another value at that step and moment would be another row.
    tracker.publish([Point(**{**point.to_json(), "values": {"eval/acc": 0.2}}, doubtful=True)], options, curve)
    assert [value for _, value, _ in store.history(store.runs()["exp1-eval"])] == [0.1]


def test_names_that_mlflow_refuses_are_written_in_its_letters_and_stay_apart(store: Store, run: Run) -> None:
    metrics = {"gsm8k/em,strict": 0.1, "gsm8k/em,flexible": 0.2, "a=b": 0.3, "a_b": 0.4, "x//../y": 0.5, "n" * 300: 0.6, "é": 0.7}
    published(store.target, run.record(10, metrics))
    logged = store.client.get_run(store.runs()["exp1-eval"]).data.metrics
    assert len(logged) == len(metrics)
    assert logged["eval/gsm8k/em_strict"] == 0.1
    assert logged["eval/a_b"] == 0.4


def test_a_store_that_is_away_is_one_line_and_is_repaired_later(store: Store, run: Run) -> None:
    record = run.record(10, {"acc": 0.1})
    target = f"{store.target},run={'0' * 32}"
    outcome = publish([record], parse(target, run.folder))
    assert outcome.published == 0
    (line,) = outcome.errors
    assert "0" * 32 in line and "\n" not in line
    assert published(store.target, record) == (1, 0)


def test_two_runs_of_one_name_are_refused(store: Store, run: Run) -> None:
    for _ in range(2):
        store.client.create_run("0", run_name="train")
    outcome = publish([run.record(10, {"acc": 0.1})], parse(f"{store.target},run=train", run.folder))
    assert outcome.errors == ["mlflow: 2 runs or more are called train; give the id of one, run=<32 hexadecimal digits>"]


def test_a_history_is_asked_for_once_however_many_points_are_doubtful(store: Store, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.tracking import MlflowClient

    from assayer.points import Curve

    asked: list[str] = []
    fetch = MlflowClient.get_metric_history

    def counted(self: MlflowClient, run_id: str, key: str) -> object:
        asked.append(key)
        return fetch(self, run_id, key)

    monkeypatch.setattr(MlflowClient, "get_metric_history", counted)
    points = [Point(f"k{n}", f"i{n}", n, 1.5, {"eval/acc": 0.1, "eval/loss": 2.0}, "accuracy", "/r.json", doubtful=True) for n in range(20)]
    tracker.publish(points, tracker.settle({"uri": store.uri}, run.folder), Curve(run.evals, "0" * 16))
    assert asked == ["eval/acc", "eval/loss"]
    assert len(store.history(store.runs()["exp1-eval"])) == 20
