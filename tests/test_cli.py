"""All commands, walked through: help, spelling, and one line for every mistake."""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from conftest import REPOSITORY, House

import assayer
from assayer.__main__ import COMMANDS

pytestmark = pytest.mark.usefixtures("without_torch")


def flags(text: str) -> set[str]:
    return set(re.findall(r"--[a-z][a-z_]+", text))


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_under_both_of_its_names(house: House, name: str) -> None:
    short = house.command(name, "--help").stdout
    long = subprocess.run(
        [sys.executable, "-m", f"assayer.{name}", "--help"], capture_output=True, text=True, env=house.environment, check=True
    ).stdout
    assert flags(short) == flags(long)
    assert ("--redis_url" in short) is (name not in ("merge", "evaluate", "results"))


@pytest.mark.parametrize("name", COMMANDS)
def test_every_flag_may_be_spelled_with_hyphens_and_underscores(name: str) -> None:
    main = importlib.import_module(COMMANDS[name]).main
    for option in main.params:
        for flag in option.opts if option.param_type_name == "option" else []:
            for spelled in (flag, flag[:2] + flag[2:].replace("_", "-")):
                done = CliRunner().invoke(main, [spelled, *([] if option.is_flag else ["1"]), "--help"])
                assert (done.exit_code, done.output[:6]) == (0, "Usage:"), f"{spelled}: {done.output}"


def test_version(house: House) -> None:
    assert house.command("--version").stdout == f"assayer {assayer.__version__}\n"


def test_the_console_script_and_its_completion(house: House) -> None:
    script = Path(sys.executable).parent / "assayer"
    assert subprocess.run([script, "--version"], capture_output=True, text=True, check=True).stdout == f"assayer {assayer.__version__}\n"
    completed = subprocess.run(
        [script],
        capture_output=True,
        text=True,
        env={**house.environment, "_ASSAYER_COMPLETE": "bash_complete", "COMP_WORDS": "assayer wa", "COMP_CWORD": "1"},
    )
    assert completed.stdout == "plain,watch\n"


MISTAKES = [
    (["--directory", "none"], 2, "no directory {root}/none; correct the path, or give --wait_for_directory"),
    (["--directory", "none*"], 2, "no directory matches {root}/none*; correct the pattern, or give --wait_for_directory"),
    (["--directory", "evaluator.py"], 2, "{root}/evaluator.py is no directory; --directory takes the directory that holds the checkpoints"),
    (["--regex_filter", "("], 2, "--regex_filter ( is no regular expression: missing ), unterminated subpattern at position 0"),
    (["--polling_interval", "-1"], 2, "-1.0 is not in the range 0<=x<=100000000"),
    (["--polling_interval", "soon"], 2, "'soon' is not a valid float"),
    (["--polling_interval", "nan"], 2, "--polling_interval must be a number of seconds"),
    (["--every", "0"], 2, "0 is not in the range x>=1"),
    (["--max-depth", "0"], 2, "0 is not in the range x>=1"),
    (["--order", "random"], 2, "'random' is not one of 'oldest', 'newest'"),
    (["--evaluator", "evaluator.py:main"], 2, "has no function 'main'; it has mean"),
    (["--evaluator", "lm_evil"], 2, "give path/to/file.py:function"),
    (["--evaluator", "a/b=evaluator.py:mean"], 2, "the evaluator's name 'a/b' may hold letters"),
    (["--directory", ""], 2, "--directory is empty; is a shell variable unset?"),
    (["--evaluator", "-x=evaluator.py:mean"], 2, "the evaluator's name '-x' may hold letters"),
    (
        ["--evaluator", "mean=evaluator.py:other"],
        2,
        "two evaluators are called 'mean'; give one of them another name: --evaluator other=evaluator.py:other",
    ),
    (["-E", "limit"], 2, "-E limit must be KEY=VALUE or NAME:KEY=VALUE"),
    (["-E", "other:limit=3"], 2, "no evaluator is called 'other'; there are mean"),
    (["-E", "limit=3"], 2, "mean has no parameter 'limit'; it takes the checkpoint path alone"),
    (["--redis_url", "http://x"], 2, "must be redis://host:port/db"),
    (["--redis_port", "1"], 1, "no Redis answers at redis://localhost:1/0"),
    (["--redis_url", "unix:///none.sock"], 1, "no Redis answers at unix:///none.sock"),
    (["--eval_queue_name", "watch"], 2, "must be two different queues"),
    (["--eval_queue_name", "a b"], 2, "may hold letters, digits"),
    (["--eval_queue_name", "--detach"], 2, "may hold letters, digits"),
    (["--timeout", "3000000000"], 2, "3000000000 is not in the range 1<=x<=100000000"),
    (["--results_dir", "evaluator.py"], 2, "--results_dir {root}/evaluator.py cannot be made: File exists"),
    (["--nonsense"], 2, "No such option"),
]


@pytest.mark.parametrize(("words", "code", "said"), MISTAKES, ids=[" ".join(m[0]) for m in MISTAKES])
def test_a_mistake_is_one_line_that_says_what_is_allowed(house: House, words: list[str], code: int, said: str) -> None:
    usual = ["--directory", "runs", "--evaluator", "evaluator.py:mean"]
    done = house.command("watch", *usual, *words, check=False, cwd=house.root, env={"PYTHONPATH": str(Path(__file__).parent.parent)})
    assert done.returncode == code, done.stderr
    assert said.format(root=house.root) in done.stderr
    assert done.stderr.startswith("assayer: error: ")
    assert done.stderr.count("\n") == 1
    assert not (house.state / "redis").exists()
    assert not list(house.state.glob("watches/*"))
    assert os.listdir(house.runs) == []


@pytest.mark.parametrize(
    "words",
    [
        ["watch"],
        ["watch", "--directory", "."],
        ["nonsense"],
        ["worker", "--gpus", "x"],
        ["worker", "--gpus_per_eval", 2],
        ["worker", "--gpus", "0,1,2", "--gpus_per_eval", 2],
        ["evaluate"],
        ["evaluate", "."],
        ["evaluate", ".", "--evaluator", "lm_evil"],
    ],
)
def test_other_mistakes_are_one_line_too(house: House, words: list[str]) -> None:
    done = house.command(*words, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("assayer: error: ")


def test_status_and_shutdown_start_no_server_that_has_no_work(house: House) -> None:
    assert "does not run" in house.command("status").stdout
    assert "nothing is running" in house.command("shutdown").stdout
    assert not (house.state / "redis").exists()
    assert house.processes() == {}


def test_a_directory_to_shut_down_that_is_not_watched_says_what_is(house: House) -> None:
    house.watch()
    done = house.command("shutdown", "--directory", "/none", check=False)
    assert done.returncode == 2
    assert f"/none is not watched; watched: {house.runs}" in done.stderr


def test_a_dry_run_says_what_would_be_done_and_touches_nothing(house: House) -> None:
    house.save("model_step2.pt")
    house.save("model_step3.pt", 2)
    (house.runs / "model_step4.pt").write_bytes(b"PK\x03\x04")
    words = ["watch", "--directory", house.runs, "--evaluator", f"{house.evaluator}:mean", "--dry_run"]
    said = house.command(*words, "--eval_existing", "--every", 2).stdout
    assert re.search(r"model_step2\.pt +would be evaluated", said)
    assert re.search(r"model_step3\.pt +skipped .* 3 is not divisible by 2", said)
    assert re.search(r"model_step4\.pt +not ready .* has no zip directory yet", said)
    assert "1 of 3 would be evaluated" in said
    assert "0 of 3 would be evaluated" in house.command(*words).stdout, "without --eval_existing they are the baseline"
    assert sorted(os.listdir(house.runs)) == ["model_step2.pt", "model_step3.pt", "model_step4.pt"]
    assert not (house.state / "redis").exists()
    assert not list(house.state.glob("watches/*"))


def test_a_watch_may_wait_for_its_directory(house: House) -> None:
    later = house.runs / "later"
    house.command(
        "watch", "--directory", later, "--wait_for_directory", "--evaluator", f"{house.evaluator}:mean", "--detach", "--polling_interval", 1
    )
    from conftest import until

    until(lambda: "waiting for it" in house.status()["watches"][0]["problem"])
    house.save("later/model_step1.pt")
    until(lambda: house.record("later/model_step1.pt"))


def test_status_tells_all_and_ends_with_1_when_something_failed(house: House) -> None:
    sick = house.file("sick.py", "def sick(path):\n    raise RuntimeError('no')\n")
    house.save("model_step1.pt")
    house.once("--retries", 0, check=False, evaluator=f"{sick}:sick")
    assert house.command("status", check=False).returncode == 0, "no Redis runs: nothing is asked"
    house.watch("--retries", 0, evaluator=f"{sick}:sick")
    from conftest import until

    until(lambda: house.status()["failed"])
    told = house.status()
    assert told["failed"][0]["error"] == "RuntimeError: no"
    done = house.command("status", check=False)
    assert done.returncode == 1
    assert "RuntimeError: no" in done.stdout
    assert "1 failed" in done.stdout


ENDS_MEANWHILE = """
import sys
from assayer import cli, status
from assayer.plan import state_directory
from assayer.queues.embedded import Server

server = Server(state_directory())
server.start()
gather = status.gather

def late(connection, *others):
    server.stop(False)
    return gather(connection, *others)

status.gather = late
sys.argv = ["status", "--json"]
cli.run(status.main, "status")
"""


def test_a_status_while_the_redis_ends_says_that_it_does_not_run(house: House) -> None:
    """As behind the last worker of a server that has ended."""
    words = [sys.executable, "-c", ENDS_MEANWHILE]
    done = subprocess.run(words, env=house.environment, cwd=REPOSITORY, capture_output=True, text=True, check=True, timeout=90)
    assert json.loads(done.stdout)["running"] is False
