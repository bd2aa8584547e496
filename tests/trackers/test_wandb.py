"""W&B without a network: offline runs read back, one row each, whatever broke off; and where rows go, with a server of ten lines."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from curves import AFTER, Run, killed, published
from wandb_server import Runs, serving

from assayer.errors import TrackerError
from assayer.points import Curve, Point
from assayer.publication import publish, publish_apart
from assayer.trackers import wandb as tracker
from assayer.tracking import parse
from assayer.wandb_log import records, rows

# What W&B uses of others that goes away is between them.
pytestmark = pytest.mark.filterwarnings("default")

TARGET = "wandb:project=p,run=abc"


@pytest.fixture(autouse=True)
def _offline(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path_factory.mktemp("wandb")))


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "exp1")


def logs(run: Run, name: str = "abc-eval") -> list[Path]:
    return sorted(run.evals.glob(f"wandb/offline-run-*/run-{name}.wandb"))


def logged(run: Run, name: str = "abc-eval") -> list[tuple[int, float, dict[str, float]]]:
    """Step, moment and metrics of every row of a run."""
    found = [row for path in logs(run, name) for row in rows(path)]
    return sorted((row["global_step"], row["_timestamp"], {name: row[name] for name in row if name.startswith("eval")}) for row in found)


def wall(step: int) -> float:
    return 1795147200.25 + step


def test_rows_carry_the_step_as_a_field_in_a_companion_of_the_trainers_run(run: Run) -> None:
    from wandb.proto import wandb_internal_pb2 as protocol

    late = run.record(30, {"acc": 0.3, "loss": None})
    published(f"{TARGET},group=g", late)
    assert published(f"{TARGET},group=g", run.record(10, {"acc": 0.1}), late) == (1, 1)
    assert logged(run) == [(10, wall(10), {"eval/acc": 0.1}), (30, wall(30), {"eval/acc": 0.3})]
    kept: dict[str, list[Any]] = {}
    for data in records(logs(run)[0]):
        record: Any = protocol.Record.FromString(data)
        kind = record.WhichOneof("record_type")
        kept.setdefault(kind, []).append(getattr(record, kind))
    (opened,) = kept["run"]
    assert (opened.run_id, opened.project, opened.run_group) == ("abc-eval", "p", "g")
    axes = {metric.glob_name or metric.name: metric.step_metric for metric in kept["metric"]}
    assert (axes["global_step"], axes["eval/*"]) == ("", "global_step")
    assert [item.step.num for item in kept["history"]] == [0], "W&B counts its own steps"


def test_without_a_run_the_points_have_one_of_their_own_that_stays_the_same(run: Run) -> None:
    for step in (10, 20):
        published("wandb:project=p,mode=offline", run.record(step, {"acc": 0.5}))
    (name,) = {path.stem.removeprefix("run-") for path in run.evals.glob("wandb/*/run-*.wandb")}
    assert name.startswith("exp1-") and name.endswith("-eval")
    assert [step for step, _, _ in logged(run, name)] == [10, 20]


@pytest.mark.parametrize(
    "patch", [AFTER, pytest.param("import wandb\nwandb.Run.finish = die", marks=pytest.mark.slow)], ids=["after", "within"]
)
def test_a_publisher_that_is_killed_leaves_one_row_each(run: Run, patch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    records = [run.record(step, {"acc": step / 100}) for step in (10, 20)]
    killed(patch, TARGET, *records)
    # Not shortened is the time in which W&B's own process ends after its parent: the row of a living one would come later.
    assert published(TARGET, *records) == (2, 0)
    assert [step for step, _, _ in logged(run)] == [10, 20]


def test_half_a_row_is_none_and_is_written_again(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracker, "QUIET", 0.0)
    records = [run.record(step, {"acc": step / 100, "long": 1.0}) for step in (10, 20)]
    killed(AFTER, TARGET, *records)
    (log,) = logs(run)
    data = log.read_bytes()
    os.truncate(log, data.index(b"global_step", data.index(b"global_step", data.index(b"eval/long")) + 1) + 3)
    left = len(logged(run))
    assert left < 2
    assert published(TARGET, *records) == (2, 0)
    assert [step for step, _, _ in logged(run)] == [10, 20]
    assert len(logs(run)) == 2


def test_a_row_that_spans_blocks_is_read_whole(run: Run) -> None:
    metrics = {f"task_{n}/acc": n / 1000 for n in range(1500)}
    published(TARGET, run.record(10, metrics))
    assert logs(run)[0].stat().st_size > 2 * 32768
    ((step, _, found),) = logged(run)
    assert (step, len(found)) == (10, 1500)


def test_w_and_b_switched_off_is_one_line_and_publishes_later(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    record = run.record(10, {"acc": 0.1})
    monkeypatch.setenv("WANDB_MODE", "disabled")
    outcome = publish([record], parse(TARGET, run.folder))
    assert outcome.errors == ["wandb: WANDB_MODE=disabled lets nothing be published; give mode=online or mode=offline"]
    assert published(f"{TARGET},mode=offline", record) == (1, 0)


class Server:
    """What a W&B server does with rows: it keeps those of a run that takes them, and shows them from the ``slow``-th look on."""

    def __init__(self, takes_shared: bool, slow: int = 0) -> None:
        self.takes_shared = takes_shared
        self.slow = slow
        self.kept: dict[str, list[dict[str, Any]]] = {"abc": []}
        self.groups: dict[str, str | None] = {"abc": "g"}

    def write(self, points: Sequence[Point], place: Any, *, mode: str, run: str, group: str | None = None) -> None:
        if mode == "shared" and not self.takes_shared:
            return
        self.groups.setdefault(run, group)
        self.kept.setdefault(run, []).extend({**p.values, "global_step": p.step, "_timestamp": p.wall} for p in points)

    def history(self, place: Any, run: str, points: Sequence[Point]) -> list[dict[str, Any]]:
        self.slow -= 1
        return [] if self.slow >= 0 else list(self.kept.get(run, []))

    def steps(self, run: str) -> list[int]:
        return [row["global_step"] for row in self.kept.get(run, [])]


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    def put(server: Server) -> Server:
        monkeypatch.setattr(tracker, "_write", server.write)
        monkeypatch.setattr(tracker, "_history", server.history)
        monkeypatch.setattr(
            tracker, "_find", lambda place, run: type("Found", (), {"group": server.groups[run]}) if run in server.groups else None
        )
        return server

    monkeypatch.setattr(tracker, "_end", lambda: None)
    monkeypatch.setattr(tracker, "VERIFY", 0.2)
    monkeypatch.setattr(tracker, "_STEP", 0.01)
    yield put


def a_point(step: int, doubtful: bool = False) -> Point:
    return Point(f"k{step}", f"i{step}", step, step + 0.25, {"eval/acc": step / 100}, "accuracy", "/r.json", doubtful)


def send(curve: Curve, *points: Point, **more: str) -> list[str]:
    return tracker.publish(points, {"project": "p", "run": "abc", "mode": "online", **more}, curve)


def a_curve(run: Run) -> Curve:
    facts: dict[str, Any] = {}
    return Curve(run.evals, "0" * 16, facts, facts.update)


def test_a_run_that_was_opened_shared_takes_the_points_itself(run: Run, online: Any) -> None:
    server, curve = online(Server(takes_shared=True, slow=3)), a_curve(run)
    assert send(curve, a_point(10)) == []
    assert send(curve, a_point(20)) == []
    assert server.steps("abc") == [10, 20]
    assert set(server.kept) == {"abc"}


def test_a_run_that_loses_them_gets_a_companion_in_its_group(run: Run, online: Any) -> None:
    server, curve = online(Server(takes_shared=False)), a_curve(run)
    (note,) = send(curve, a_point(10))
    assert "abc was not opened in W&B's shared mode: its points are in abc-eval" in note
    assert send(curve, a_point(20)) == [], "it is not tried again"
    assert (server.steps("abc"), server.steps("abc-eval"), server.groups["abc-eval"]) == ([], [10, 20], "g")


def test_what_is_doubtful_is_looked_up_in_both_runs(run: Run, online: Any) -> None:
    server, curve = online(Server(takes_shared=True)), a_curve(run)
    server.write([a_point(10)], None, mode="shared", run="abc")
    server.write([a_point(20)], None, mode="online", run="abc-eval")
    send(curve, a_point(10, True), a_point(20, True), a_point(30, True), a_point(40))
    assert (server.steps("abc"), server.steps("abc-eval")) == ([10, 30, 40], [20])


def test_a_known_shared_run_that_does_not_show_them_is_an_error_and_no_second_place(run: Run, online: Any) -> None:
    server, curve = online(Server(takes_shared=True)), a_curve(run)
    send(curve, a_point(10))
    server.takes_shared = False
    with pytest.raises(TrackerError, match="does not show 1 rows in the run abc; they are looked up when you publish again"):
        send(curve, a_point(20))
    assert set(server.kept) == {"abc"}


def test_shared_by_word_never_falls_back(run: Run, online: Any) -> None:
    server, curve = online(Server(takes_shared=False)), a_curve(run)
    with pytest.raises(TrackerError, match="does not show"):
        send(curve, a_point(10), mode="shared")
    assert set(server.kept) == {"abc"}


@pytest.fixture(scope="module")
def server() -> Iterator[Runs]:
    """One for all: in one process W&B keeps to the address that it was first given."""
    with serving() as runs:
        yield runs


@pytest.fixture
def served(server: Runs, monkeypatch: pytest.MonkeyPatch) -> Runs:
    """A server of this machine that W&B itself talks to; a trainer has opened the run "shr" in shared mode, and "solo" as usual."""
    for name, value in {"BASE_URL": server.url, "API_KEY": "0" * 40, "MODE": "online", "SILENT": "true"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    monkeypatch.setattr(tracker, "VERIFY", 2.0)
    monkeypatch.setattr(tracker, "_STEP", 0.2)
    monkeypatch.setattr(tracker, "QUIET", 0.5)
    server.clear()
    server.add_trainer("shr", "g", is_shared=True)
    server.add_trainer("solo", "g", is_shared=False)
    return server


def test_the_library_itself_writes_into_a_shared_run_and_leaves_its_summary_and_state_alone(run: Run, served: Runs) -> None:
    for step in (20, 10):
        assert published("wandb:project=p,entity=e,run=shr", run.record(step, {"acc": step / 100})) == (1, 0)
    assert served.steps("shr") == [10, 20]
    assert set(served.rows) == {"shr", "solo"}
    assert served.summaries == set()
    assert served.states == set()
    assert not (run.evals / "wandb").exists(), "what the server has is removed here"


def test_the_library_itself_finds_a_run_that_loses_rows_and_goes_on_in_the_companion(run: Run, served: Runs) -> None:
    for step in (20, 10, 30):
        assert published("wandb:project=p,run=solo", run.record(step, {"acc": step / 100})) == (1, 0)
    assert (served.steps("solo"), served.steps("solo-eval"), served.groups["solo-eval"]) == ([], [10, 20, 30], "g")


@pytest.mark.parametrize("name", ["shr", pytest.param("solo", marks=pytest.mark.slow)])
def test_a_publisher_that_is_killed_with_the_server_leaves_one_row_each(run: Run, served: Runs, name: str) -> None:
    target = f"wandb:project=p,run={name}"
    published(target, run.record(10, {"acc": 0.1}))
    records = [run.record(step, {"acc": step / 100}) for step in (20, 30)]
    killed(AFTER, target, *records)
    assert published(target, *records) == (2, 0)
    assert served.steps("shr") + served.steps("solo-eval") == [10, 20, 30]


def test_a_server_that_is_away_is_one_line_in_time_and_the_points_come_later(
    run: Run, served: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = run.record(10, {"acc": 0.1})
    target = parse("wandb:project=p,run=shr", run.folder)
    with monkeypatch.context() as patched:
        patched.setenv("WANDB_BASE_URL", "http://127.0.0.1:1")
        assert publish_apart([record], target, timeout=4).errors == [f"{target} took longer than 4 s; the next publication repairs it"]
    assert published(str(target), record) == (1, 0)
    assert served.steps("shr") == [10]


@pytest.mark.slow
def test_offline_publications_are_uploaded_as_one_run_by_w_and_bs_own_command(run: Run, served: Runs) -> None:
    for step in (20, 10, 30):
        published("wandb:project=p,mode=offline,run=abc", run.record(step, {"acc": step / 100}))
    words = [sys.executable, "-m", "wandb", "sync", "--yes", *(str(path.parent) for path in logs(run))]
    done = subprocess.run(words, cwd=run.folder, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert served.steps("abc-eval") == [10, 20, 30]


def test_another_evaluation_of_the_same_step_is_a_row_of_its_own(run: Run) -> None:
    point = a_point(10)
    row: Mapping[str, Any] = {"global_step": 10, "_timestamp": 10.25, "eval/acc": 0.1}
    assert tracker._missing([point, replace(point, wall=11.25)], [row]) == [replace(point, wall=11.25)]
    assert json.dumps(row)


def test_a_run_that_is_not_there_yet_gets_no_points_and_is_asked_again(run: Run, online: Any) -> None:
    server, curve = online(Server(takes_shared=True)), a_curve(run)
    (note,) = send(curve, a_point(10), run="new")
    assert note == "there is no run new in p yet: the points are in new-eval"
    assert (server.steps("new"), server.steps("new-eval")) == ([], [10])
    # Its trainer begins it.
    server.groups["new"] = "g"
    assert send(curve, a_point(20), run="new") == []
    assert server.steps("new") == [20]


def test_a_run_that_is_to_be_shared_and_is_not_there_is_an_error(run: Run, online: Any) -> None:
    server, curve = online(Server(takes_shared=True)), a_curve(run)
    with pytest.raises(TrackerError, match="there is no run new in p; give the id of one that its trainer has begun"):
        send(curve, a_point(10), run="new", mode="shared")
    assert set(server.kept) == {"abc"}


def test_rows_are_looked_up_in_as_many_requests_as_there_are_kinds_of_points(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    class Found:
        def history(self, samples: int, keys: list[str], pandas: bool) -> list[dict[str, Any]]:
            asked.append(keys)
            return []

    monkeypatch.setattr(tracker, "_find", lambda place, run: Found())
    many = {f"eval/task{n}": 0.5 for n in range(300)}
    points = [replace(a_point(step), values=many if step % 2 else {"eval/loss": 1.0}) for step in range(100)]
    tracker._history(None, "abc", points)  # type: ignore[arg-type]
    assert asked == [["global_step", "_timestamp", name] for name in ("eval/loss", "eval/task0")]
