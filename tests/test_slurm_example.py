"""examples/slurm: one job for one checkpoint, whatever happens to the evaluation that waits for it; Slurm's commands are stand-ins."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY, House, until

EXAMPLE = REPOSITORY / "examples" / "slurm"

# Each job is a folder with its name, its script, its process and, once it has ended, its state. A file "down": Slurm does not answer;
# "deaf": it takes a job and its answer is lost.
COMMANDS = {
    "sbatch": """#!/bin/sh
cd "$STAND_IN"; echo sbatch "$@" >> calls
[ ! -e down ] || { echo "sbatch: error: Unable to contact slurm controller (connect failure)" >&2; exit 1; }
for word; do case $word in
    --job-name=*) name=${word#*=};; --output=*) log=${word#*=};; --chdir=*) folder=${word#*=};;
    --refused) echo "sbatch: error: invalid option" >&2; exit 1;;
esac; done
id=$(($(ls -d *.job 2> /dev/null | wc -l) + 1)); mkdir $id.job; cat > $id.job/script; echo "$name" > $id.job/name
setsid sh -c 'cd "$1"; sh "$2/script" > "$3" 2>&1 && echo COMPLETED > "$2/state" || echo FAILED > "$2/state"' \\
    - "$folder" "$STAND_IN/$id.job" "$log" > /dev/null 2>&1 &
echo $! > $id.job/pid
[ ! -e deaf ] || { rm deaf; echo "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation" >&2; exit 1; }
echo "$id;cluster"
""",
    "squeue": """#!/bin/sh
cd "$STAND_IN"; echo squeue "$@" >> calls
[ ! -e down ] || { echo "slurm_load_jobs error: Unable to contact slurm controller (connect failure)" >&2; exit 1; }
for job in *.job; do
    [ "--name=$(cat $job/name 2> /dev/null)" != "$1" ] || echo "${job%.job}|$(cat $job/state 2> /dev/null || echo RUNNING)"
done
""",
    "scancel": """#!/bin/sh
cd "$STAND_IN"; echo scancel "$@" >> calls
for job in *.job; do
    [ "--name=$(cat $job/name)" != "$1" ] || [ -e $job/state ] || { kill -- -$(cat $job/pid); echo CANCELLED > $job/state; }
done
""",
}

CALL = "import json, sys; from evaluator import submit; print('result', json.dumps(submit(**json.loads(sys.argv[1]))))"

# A job that runs until the file "go" is there.
WAITS = "until [ -e {checkpoint}.go ]; do sleep 0.05; done; echo '{\"accuracy\": 0.5}' > {result}"


class Slurm:
    """A cluster of one, and what an evaluation of one checkpoint says of it."""

    def __init__(self, root: Path) -> None:
        self.root = root / "slurm"
        self.commands = root / "bin"
        for folder in (self.root, self.commands):
            folder.mkdir()
        for name, text in COMMANDS.items():
            (self.commands / name).write_text(text)
            (self.commands / name).chmod(0o755)
        self.environment = {"PATH": f"{self.commands}:{os.environ['PATH']}", "STAND_IN": str(self.root)}
        self.checkpoint = root / "it's 100% step_5.pt"
        self.checkpoint.write_bytes(b"weights")
        self.evaluations: list[subprocess.Popen[str]] = []
        self.output = root / "files"
        self.output.mkdir()

    def evaluation(self, command: str, **more: Any) -> "subprocess.Popen[str]":
        words = {"checkpoint_path": str(self.checkpoint), "output_dir": str(self.output), "command": command, "poll": 0.05} | more
        environment = os.environ | self.environment | {"PYTHONPATH": str(EXAMPLE)}
        call = [sys.executable, "-c", CALL, json.dumps(words)]
        made = subprocess.Popen(call, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.evaluations.append(made)
        return made

    def evaluate(self, command: str, **more: Any) -> Any:
        """The metrics, or the error's text."""
        return self.end_of(self.evaluation(command, **more))

    def end_of(self, evaluation: "subprocess.Popen[str]") -> Any:
        out, error = evaluation.communicate(timeout=60)
        if evaluation.returncode:
            return error.strip().splitlines()[-1]
        return json.loads(out.partition("result ")[2])

    def go(self) -> None:
        Path(f"{self.checkpoint}.go").touch()

    def states(self) -> list[str]:
        """The states of all jobs that were ever submitted."""
        jobs = sorted(self.root.glob("*.job"))
        return [(job / "state").read_text().strip() if (job / "state").exists() else "RUNNING" for job in jobs if (job / "pid").exists()]

    def calls(self, name: str) -> int:
        calls = self.root / "calls"
        return sum(line.startswith(name) for line in calls.read_text().splitlines()) if calls.exists() else 0

    def end(self) -> None:
        for evaluation in self.evaluations:
            evaluation.kill()
            evaluation.communicate()
        for pid in self.root.glob("*.job/pid"):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(int(pid.read_text()), signal.SIGKILL)


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[Slurm]:
    made = Slurm(tmp_path)
    try:
        yield made
    finally:
        made.end()


def test_a_job_s_result_is_the_evaluation_s(slurm: Slurm) -> None:
    command = 'echo evaluating {checkpoint} of step {step}; echo "{\\"bytes\\": $(wc -c < {checkpoint})}" > {result}'
    assert slurm.evaluate(command, step=5) == {"bytes": 7}
    # Nothing but the job's own output is left of it.
    (log,) = slurm.output.iterdir()
    assert log.read_text() == f"evaluating {slurm.checkpoint} of step 5\n"


def test_of_a_record_the_metrics_are_taken(slurm: Slurm) -> None:
    assert slurm.evaluate('echo \'{"status": "finished", "metrics": {"loss": 2}}\' > {result}') == {"loss": 2}


def test_a_job_that_fails_says_so_with_its_last_words_and_is_submitted_anew(slurm: Slurm) -> None:
    error = slurm.evaluate("echo no such tokenizer; exit 3")
    assert "ended with exit code 3" in error and error.endswith("no such tokenizer")
    assert "wrote no" in slurm.evaluate("true")
    assert "no JSON object" in slurm.evaluate("echo 3 > {result}")
    assert slurm.evaluate("echo '{\"accuracy\": 1}' > {result}") == {"accuracy": 1}
    assert "sbatch refuses: sbatch: error: invalid option" in slurm.evaluate("true", sbatch="--gres=gpu:1 --refused")


def test_an_evaluation_that_was_killed_finds_its_job_again(slurm: Slurm) -> None:
    first = slurm.evaluation(WAITS)
    until(lambda: slurm.calls("squeue") > 1)
    first.kill()
    first.communicate()
    # While it runs, and when it has ended while nobody waited for it.
    second = slurm.evaluation(WAITS)
    asked = slurm.calls("squeue")
    until(lambda: slurm.calls("squeue") > asked + 1)
    second.kill()
    second.communicate()
    slurm.go()
    until(lambda: slurm.states() == ["COMPLETED"])
    assert slurm.evaluate(WAITS) == {"accuracy": 0.5}
    assert slurm.calls("sbatch") == 1


def test_a_job_of_weights_that_are_no_longer_there_is_cancelled(slurm: Slurm) -> None:
    first = slurm.evaluation(WAITS)
    until(lambda: slurm.calls("squeue") > 1)
    first.kill()
    first.communicate()
    slurm.checkpoint.write_bytes(b"other weights")
    second = slurm.evaluation(WAITS)
    until(lambda: len(slurm.states()) == 2)
    slurm.go()
    assert slurm.end_of(second) == {"accuracy": 0.5}
    assert slurm.states()[0] == "CANCELLED"


def test_an_evaluation_that_is_given_up_cancels_its_job(slurm: Slurm) -> None:
    first = slurm.evaluation(WAITS)
    until(lambda: slurm.calls("squeue") > 1)
    first.terminate()
    first.communicate()
    assert first.returncode == -signal.SIGTERM
    assert slurm.states() == ["CANCELLED"]
    # What was cancelled is not waited for.
    slurm.go()
    assert slurm.evaluate(WAITS) == {"accuracy": 0.5}
    assert slurm.calls("sbatch") == 2


def test_a_slurm_that_does_not_answer_is_waited_for(slurm: Slurm) -> None:
    (slurm.root / "down").touch()
    evaluation = slurm.evaluation(WAITS)
    until(lambda: slurm.calls("squeue") > 2)
    (slurm.root / "down").unlink()
    until(lambda: slurm.states() == ["RUNNING"])
    (slurm.root / "down").touch()
    asked = slurm.calls("squeue")
    until(lambda: slurm.calls("squeue") > asked + 2)
    # It still does not answer when the job has ended.
    slurm.go()
    assert slurm.end_of(evaluation) == {"accuracy": 0.5}
    assert "has not answered" in slurm.evaluate(WAITS, patience=0.2)


def test_a_submission_whose_answer_was_lost_is_not_made_twice(slurm: Slurm) -> None:
    (slurm.root / "deaf").touch()
    evaluation = slurm.evaluation(WAITS)
    until(lambda: slurm.calls("squeue") > 3)
    slurm.go()
    assert slurm.end_of(evaluation) == {"accuracy": 0.5}
    assert slurm.calls("sbatch") == 1


def killed(group: int) -> bool:
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def test_a_node_that_failed_costs_no_attempt(slurm: Slurm) -> None:
    evaluation = slurm.evaluation(WAITS)
    until(lambda: slurm.states() == ["RUNNING"])
    # For a moment its process has a number, and no group of its own yet.
    until(lambda: killed(int((slurm.root / "1.job" / "pid").read_text())))
    (slurm.root / "1.job" / "state").write_text("NODE_FAIL\n")
    slurm.go()
    assert slurm.end_of(evaluation) == {"accuracy": 0.5}
    assert slurm.states() == ["NODE_FAIL", "COMPLETED"]


def test_a_watch_s_checkpoints_are_evaluated_by_slurm(house: House, slurm: Slurm) -> None:
    house.environment |= slurm.environment
    sizes = {path.name: path.stat().st_size for path in (house.save("step_1.pt", 1), house.save("step_2.pt", 2))}
    command = 'echo "{\\"bytes\\": $(wc -c < {checkpoint}), \\"step\\": {step}}" > {result}'
    words = ["-E", "sbatch=--gres=gpu:1", "-E", "poll=0.1", "-E", f"command={command}"]
    house.once(*words, evaluator=f"{EXAMPLE / 'evaluator.py'}:submit")
    assert {name: record["metrics"] for name, record in house.records().items()} == {
        "step_1.pt.json": {"bytes": sizes["step_1.pt"], "step": 1},
        "step_2.pt.json": {"bytes": sizes["step_2.pt"], "step": 2},
    }
    assert slurm.calls("sbatch") == 2
