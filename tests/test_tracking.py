"""What ``--track`` means, and that each record is one point of each target, whoever publishes it and however often."""

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import REPOSITORY, until
from curves import AFTER, BEFORE, Run, killed, published

from assayer.errors import TrackerError, UsageError
from assayer.publication import Outcome, publish, publish_apart
from assayer.tracking import Target, check, parse

# A tracker of the user's own: a line a point.
OWN = """
import json

def note(points):
    with open({out!r}, "a") as file:
        for point in points:
            print(json.dumps([point.step, point.values, point.doubtful]), file=file)
"""


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "exp1")


@pytest.fixture
def own(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A function of the user's as ``--track`` has it, and the file that it writes."""
    out = tmp_path / "out.jsonl"
    (tmp_path / "my.py").write_text(OWN.format(out=str(out)))
    before, path = os.getcwd(), list(sys.path)
    yield f"{tmp_path}/my.py:note", out
    os.chdir(before)
    sys.path[:] = path


def lines(out: Path) -> list[tuple[int, dict[str, float], bool]]:
    return [(step, values, doubtful) for step, values, doubtful in map(json.loads, out.read_text().splitlines())] if out.exists() else []


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("tensorboard", {}),
        ("tensorboard:logs/{run}", {"logdir": "/cwd/logs/{run}"}),
        ("tensorboard:/a=b,c", {"logdir": "/a=b,c"}),
        ("tensorboard:logdir=logs", {"logdir": "/cwd/logs"}),
        ("mlflow:uri=sqlite:///m.db", {"uri": "sqlite:////cwd/m.db"}),
        ("mlflow:uri=sqlite:////abs/m.db,run=x", {"uri": "sqlite:////abs/m.db", "run": "x"}),
        ("mlflow:uri=mlruns", {"uri": "file:///cwd/mlruns"}),
        ("mlflow:uri=http://h:5000,experiment=a b", {"uri": "http://h:5000", "experiment": "a b"}),
        (
            "wandb:project=p,run=r,entity=e,group=g,mode=offline",
            {"project": "p", "run": "r", "entity": "e", "group": "g", "mode": "offline"},
        ),
    ],
)
def test_targets_are_absolute_and_come_back_from_json(text: str, options: dict[str, str]) -> None:
    target = parse(text, Path("/cwd"))
    assert target.options == options
    assert Target.from_json(json.loads(json.dumps(target.to_json()))) == target
    assert parse(str(target), Path("/elsewhere")) == target


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("tensorbord", "--track tensorbord: give mlflow, tensorboard, wandb (with :option=value,...) or path/to/file.py:function"),
        ("tensorboard:", "--track tensorboard: nothing follows the colon; give logdir=, names="),
        ("wandb", "wandb needs project=...: the project"),
        ("wandb:project=p,grup=g", "--track wandb: grup=g is not allowed; give project= the project; run= "),
        ("wandb:p", "--track wandb: p is not allowed; give project= the project"),
        ("wandb:project=p,project=q", "--track wandb: project= is given twice"),
        ("wandb:project=p,mode=dry", "wandb: mode=dry is not allowed; give online, offline, shared"),
        ("wandb:project=p,mode=shared", "wandb: mode=shared needs run=...: "),
        ("wandb:project=p,run=a/b", "wandb: run=a/b holds '/'"),
        ("mlflow:run=x", "mlflow needs uri=...: "),
        ("tensorboard:names=both", "--track tensorboard: names=both is not allowed; give metric or evaluator"),
        ("none.py:fn", "--track none.py:fn: no file /cwd/none.py; give "),
        ("my.py", "--track my.py: give "),
        ("a b:c", "--track a b:c: give "),
    ],
)
def test_what_is_no_target_is_one_line_that_says_what_is_allowed(text: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(text, Path("/cwd"))
    assert str(caught.value).startswith(said)
    assert "\n" not in str(caught.value)


def test_a_function_is_imported_once_when_it_is_given(tmp_path: Path) -> None:
    (tmp_path / "my.py").write_text("def f(points):\n    pass\n\ndef two(points, more):\n    pass\n")
    (tmp_path / "bad.py").write_text("import sys\nsys.exit(3)\n")
    assert str(check("my.py:f", tmp_path)) == f"{tmp_path}/my.py:f"
    for text, said in [
        ("my.py:g", "has no function 'g'; it has f, two"),
        ("my.py:two", "it must take one argument, the list of points"),
        ("bad.py:f", "its import raised SystemExit: 3"),
        ("no_such_module:f", "its import raised ModuleNotFoundError"),
    ]:
        with pytest.raises(UsageError, match=said) as caught:
            check(text, tmp_path)
        assert "\n" not in str(caught.value)


def test_a_library_that_is_missing_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    said = r"wandb needs wandb, which is not installed: pip install 'assayer\[wandb\]'"
    with pytest.raises(TrackerError, match=said):
        check("wandb:project=p", tmp_path)
    run = Run(tmp_path / "r")
    assert publish([run.record(1, {"a": 1.0})], parse("wandb:project=p", tmp_path)).errors == [
        "wandb: needs wandb, which is not installed: pip install 'assayer[wandb]'"
    ]


def test_an_evaluation_anew_is_no_second_point_unless_asked_for(run: Run, own: tuple[str, Path]) -> None:
    target, out = own
    published(target, run.record(10, {"acc": 0.1}))
    later = run.record(10, {"acc": 0.2}, ended="2026-11-21T00:00:00+00:00")
    assert published(target, later) == (0, 1)
    assert published(target, later, again=True) == (1, 0)
    assert published(target, later, again=True) == (0, 1)
    assert [values for _, values, _ in lines(out)] == [{"eval/acc": 0.1}, {"eval/acc": 0.2}]


def test_a_path_that_was_saved_again_is_a_point_of_its_own_and_so_is_what_it_was_before(run: Run, own: tuple[str, Path]) -> None:
    target, out = own
    run.record(10, {"acc": 0.1}, name="last.ckpt", identity="a" * 32)
    current = run.record(10, {"acc": 0.2}, name="last.ckpt", identity="b" * 32)
    records = sorted(current.parent.glob("*.json"))
    assert len(records) == 2
    assert published(target, *records) == (2, 0)
    assert sorted(values["eval/acc"] for _, values, _ in lines(out)) == [0.1, 0.2]


def test_the_same_weights_at_two_steps_are_two_points_and_under_two_names_one(run: Run, own: tuple[str, Path]) -> None:
    target, out = own
    same = {"identity": "a" * 32}
    paths = [
        run.record(10, {"acc": 0.1}, **same),
        run.record(20, {"acc": 0.1}, **same),
        run.record(20, {"acc": 0.1}, name="best_20.pt", **same),
    ]
    assert published(target, *paths) == (2, 1)
    assert [step for step, _, _ in lines(out)] == [10, 20]


def test_what_did_not_finish_is_no_point_and_said(run: Run, own: tuple[str, Path]) -> None:
    target, _ = own
    failed = run.record(10, {}, status="failed")
    outcome = publish([failed, run.record(20, {"acc": 0.1})], parse(target, REPOSITORY))
    assert outcome.without == {"its status is failed": [failed]}
    assert outcome.published == 1
    # Once it has finished, it is one.
    assert published(target, run.record(10, {"acc": 0.2})) == (1, 0)


def test_two_evaluators_with_one_metric_keep_two_curves(run: Run, own: tuple[str, Path]) -> None:
    target, out = own
    published(target, run.record(10, {"acc": 0.1}, evaluator="val"))
    published(target, run.record(10, {"acc": 0.2}, evaluator="test"))
    published(target, run.record(20, {"acc": 0.3}, evaluator="val"), run.record(20, {"acc": 0.4}, evaluator="test"))
    curves: dict[str, list[float]] = {}
    for _, values, _ in lines(out):
        for name, number in values.items():
            curves.setdefault(name, []).append(number)
    assert curves == {"eval/acc": [0.1, 0.3], "eval/test/acc": [0.2, 0.4]}


def test_each_target_has_a_ledger_of_its_own_and_nothing_that_looks_like_a_record(run: Run, own: tuple[str, Path], tmp_path: Path) -> None:
    record = run.record(10, {"acc": 0.1})
    for target in (own[0], "tensorboard", f"tensorboard:{tmp_path}/logs"):
        assert published(target, record) == (1, 0)
    assert len(list(run.evals.glob("*.ledger"))) == 3
    assert [path.name for path in run.evals.rglob("*.json")] == ["model_step10.pt.json"]


def test_a_run_that_was_moved_is_not_published_anew(run: Run, own: tuple[str, Path], tmp_path: Path) -> None:
    record = run.record(10, {"acc": 0.1})
    published(own[0], record)
    published("tensorboard", record)
    run.folder.rename(tmp_path / "moved")
    moved = tmp_path / "moved" / record.relative_to(run.folder)
    assert published(own[0], moved) == (0, 1)
    assert published("tensorboard", moved) == (0, 1)


@pytest.mark.parametrize("patch", [BEFORE, AFTER], ids=["before", "after"])
def test_a_function_gets_again_what_is_doubtful_and_is_told(run: Run, own: tuple[str, Path], patch: str) -> None:
    target, out = own
    killed(patch, target, run.record(10, {"acc": 0.1}))
    given = [10] if patch == AFTER else []
    assert [step for step, _, _ in lines(out)] == given
    assert published(target, run.record(20, {"acc": 0.2})) == (2, 0)
    assert [(step, doubtful) for step, _, doubtful in lines(out)][len(given) :] == [(10, True), (20, False)]


def test_a_tracker_that_is_down_is_one_line_and_the_next_record_repairs_it(run: Run, own: tuple[str, Path], tmp_path: Path) -> None:
    target, out = own
    (tmp_path / "my.py").write_text("def note(points):\n    raise ConnectionError('no route\\nto host')\n")
    outcome = publish([run.record(10, {"acc": 0.1})], parse(target, REPOSITORY))
    assert outcome.errors == [f"{target}: ConnectionError: no route to host"]
    (tmp_path / "my.py").write_text(OWN.format(out=str(out)))
    os.utime(tmp_path / "my.py", (1, 1))
    assert published(target, run.record(20, {"acc": 0.2})) == (2, 0)
    assert [step for step, _, _ in lines(out)] == [10, 20]


def test_a_record_is_published_in_a_process_apart_to_every_target(run: Run, own: tuple[str, Path], tmp_path: Path) -> None:
    for given in (1, 0):
        for text in ("tensorboard", own[0]):
            outcome = publish_apart([run.record(10, {"acc": 0.1})], parse(text, tmp_path))
            assert outcome == Outcome(published=given, present=1 - given)
    assert [step for step, _, _ in lines(own[1])] == [10]
    assert len(list(run.evals.glob("*tfevents*"))) == 1


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("    import time; time.sleep(600)", r"took longer than 3 s; the next publication repairs it"),
        ("    raise OSError(5, 'away')", r"OSError: \[Errno 5\] away"),
        ("    import os; os._exit(7)", r"it ended with code 7"),
        ("    import sys; sys.exit('no key')", r"no key"),
    ],
    ids=["hangs", "raises", "dies", "exits"],
)
def test_whatever_a_tracker_does_the_caller_only_gets_a_sentence(run: Run, tmp_path: Path, body: str, said: str) -> None:
    (tmp_path / "my.py").write_text(f"def note(points):\n{body}\n")
    record = run.record(10, {"acc": 0.1})
    (note,) = publish_apart([record], parse("my.py:note", tmp_path), timeout=3 if "sleep" in body else 60).errors
    assert re.search(said, note), note
    assert "\n" not in note


def test_many_processes_publish_one_folder_and_every_point_is_there_once(run: Run, tmp_path: Path) -> None:
    # Four publishers at once, each with all records in an order of its own.
    records = [run.record(step, {"acc": step / 100}) for step in range(1, 41)]
    code = (
        "import sys; from pathlib import Path; from assayer.tracking import parse; from assayer.publication import publish\n"
        "paths = [Path(p) for p in sys.argv[2:]]; n = int(sys.argv[1])\n"
        "for path in paths[n * 10:] + paths[:n * 10]:\n"
        "    outcome = publish([path], parse('tensorboard', Path.cwd())); assert not outcome.errors, outcome"
    )
    words = [sys.executable, "-c", code]
    running = [subprocess.Popen([*words, str(n), *map(str, records)], cwd=REPOSITORY) for n in range(4)]
    assert [process.wait(60) for process in running] == [0] * 4
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(run.evals), size_guidance={"scalars": 0})
    read.Reload()
    assert sorted(event.step for event in read.Scalars("eval/acc")) == list(range(1, 41))


def test_a_publisher_whose_caller_is_gone_ends_by_itself(run: Run, tmp_path: Path) -> None:
    pids = tmp_path / "pid"
    (tmp_path / "my.py").write_text(
        f"import os, time\ndef note(points):\n    open({str(pids)!r}, 'w').write(str(os.getpid()))\n    time.sleep(600)\n"
    )
    record = run.record(10, {"acc": 0.1})
    code = (
        "import sys; from pathlib import Path; from assayer import apart, publication, tracking\n"
        "apart.GRACE = 1; target = tracking.parse(sys.argv[1], Path.cwd())\n"
        "publication.publish_apart([Path(sys.argv[2])], target, timeout=2)"
    )
    caller = subprocess.Popen([sys.executable, "-c", code, f"{tmp_path}/my.py:note", str(record)], cwd=REPOSITORY)
    pid = int(until(lambda: pids.exists() and pids.read_text()))
    caller.kill()
    caller.wait()
    until(lambda: not Path(f"/proc/{pid}").exists(), seconds=20)


def test_a_password_in_a_url_is_neither_shown_nor_on_a_command_line(run: Run, tmp_path: Path) -> None:
    target = parse("mlflow:uri=http://me:secret@127.0.0.1:1", tmp_path)
    assert str(target) == "mlflow:uri=http://***@127.0.0.1:1"
    code = "import sys, json; from pathlib import Path; from assayer.tracking import Target\n"
    code += "from assayer.publication import publish_apart\n"
    code += "print(publish_apart([Path(sys.argv[1])], Target.from_json(json.loads(sys.stdin.read())), timeout=4))"
    words = [sys.executable, "-c", code, str(run.record(10, {"acc": 0.1}))]
    with subprocess.Popen(words, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as caller:
        assert caller.stdin and caller.stdout
        with caller.stdin as orders:
            orders.write(json.dumps(target.to_json()))
        lines = until(lambda: [line for line in command_lines() if b"run_module" in line and b"assayer.publication" in line])
        said = caller.stdout.read()
    assert not any(b"secret" in line for line in lines)
    assert "http://***@127.0.0.1:1" in said and "secret" not in said
    assert not any("secret" in path.read_text() for path in run.evals.glob("*.ledger"))


def test_a_password_may_change_and_hold_any_letter(tmp_path: Path) -> None:
    targets = [
        parse(f"mlflow:uri={uri}", tmp_path) for uri in ("http://h:5000", "http://me:a@h:5000", "http://me:p/s@s@h:5000", "http://h:5000/")
    ]
    assert len({target.ledger for target in targets}) == 1, "a password is no part of where points are"
    assert str(targets[2]) == "mlflow:uri=http://***@h:5000"
    assert targets[2].masked("no route to http://me:p/s@s@h:5000/api, user me:p/s@s") == "no route to http://***@h:5000/api, user ***"
    assert parse("mlflow:uri=http://g:5000", tmp_path).ledger != targets[0].ledger
    assert str(parse("mlflow:uri=file:///a@b,experiment=c@d", tmp_path)) == "mlflow:uri=file:///a@b,experiment=c@d"


def command_lines() -> Iterator[bytes]:
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            yield path.read_bytes()


def test_a_record_without_a_step_says_so(run: Run) -> None:
    record = run.record(None, {"acc": 0.1}, name="last.ckpt")
    outcome = publish_apart([record], parse("tensorboard", run.folder))
    assert outcome.without == {"it has neither a step nor a whole number of epochs": [record]}


def test_a_results_folder_that_is_held_for_too_long_is_one_line(run: Run) -> None:
    from assayer.ledger import opened

    record, target = run.record(10, {"acc": 0.1}), parse("tensorboard", run.folder)
    with opened(run.evals / target.ledger, 1):
        began = time.monotonic()
        (line,) = publish([record], target, lock_timeout=0.2).errors
    assert "is held by another publisher; publish again later" in line
    assert time.monotonic() - began < 30
