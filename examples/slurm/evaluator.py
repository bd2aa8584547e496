"""An evaluator that evaluates nowhere here: it submits a job to Slurm, waits for it, and returns what it wrote.

The job's name is written down before it is submitted: an evaluation that is started again, after its worker was lost, finds the job that
it submitted before, waiting, running or done, and submits no second one.
"""

import contextlib
import getpass
import json
import os
import secrets
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# States in which Slurm is done with a job; of these, the ones for which neither the job nor the checkpoint can be blamed.
ENDED = {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "REVOKED", "TIMEOUT"}
BLAMELESS = {"BOOT_FAIL", "NODE_FAIL", "PREEMPTED"}
# Seconds for which a file that a job wrote on another machine may stay unseen here.
FILE_LAG = 60.0
# Seconds that a single command of Slurm's may take; the last one, scancel, has less, as its evaluation is about to be killed.
ANSWER_MAX, CANCEL_MAX = 120.0, 3.0
# What Slurm's commands say when its controller does not answer, in small letters.
SILENCE = (
    "unable to contact slurm controller",
    "socket timed out",
    "connection refused",
    "connection timed out",
    "zero bytes were transmitted",
    "transport endpoint is not connected",
    "in standby mode",
    "temporarily unable to accept",
)
# Characters of a job's own output that an error quotes.
QUOTED = 500


def submit(
    checkpoint_path: str,
    output_dir: str,
    command: str,
    sbatch: str = "",
    original_path: str = "",
    step: int | None = None,
    poll: float = 15.0,
    patience: float = 600.0,
) -> Mapping[str, Any]:
    """The metrics that ``command`` writes in a Slurm job.

    Args:
        checkpoint_path: the checkpoint, at a path that the compute nodes see.
        output_dir: takes the job's output and what it is known by; the compute nodes must see it too.
        command: a shell command. ``{checkpoint}``, ``{original}``, ``{run}`` (the directory of that), ``{step}`` and ``{result}`` in it
            are filled in; into the file ``{result}`` it writes a JSON object of metrics, or a record (``assayer.evaluate --output``).
        sbatch: more words for sbatch, such as ``--partition=gpu --gres=gpu:1 --time=1:00:00``.
        original_path: the checkpoint's own path.
        step: the checkpoint's step.
        poll: seconds between two questions to Slurm.
        patience: seconds for which Slurm may not answer.

    Raises:
        RuntimeError: the job ended badly, wrote no result, or Slurm refuses it or does not answer.
    """
    job = Job(Path(output_dir).resolve(), poll, patience)
    with cancelled_when_given_up(job):
        job.claim(files(checkpoint_path), command)
        words = {"checkpoint": checkpoint_path, "original": original_path, "run": os.path.dirname(original_path)}
        words |= {"step": str(step), "result": str(job.result)}
        for name, value in words.items():
            command = command.replace("{" + name + "}", shlex.quote(value))
        while True:
            state = job.wait(job.find() or job.send(command, shlex.split(sbatch)))
            if state not in BLAMELESS:
                return job.take(state)
            print(f"the Slurm job {job.name} ended as {state}; it is submitted again, unless Slurm does that itself", flush=True)
            time.sleep(poll)


def files(checkpoint: str) -> dict[str, list[int]]:
    """Size in bytes and time of modification in nanoseconds of every file of a checkpoint, by its name in it."""
    root = Path(checkpoint)
    paths = [path for path in sorted(root.rglob("*")) if path.is_file()] if root.is_dir() else [root]
    return {str(path.relative_to(root)): [path.stat().st_size, path.stat().st_mtime_ns] for path in paths}


class GivenUp(BaseException):
    """This process was told to end."""


@contextlib.contextmanager
def cancelled_when_given_up(job: "Job") -> Iterator[None]:
    """Cancels the job when this process is told to end, as it is when the time is out or the worker has to go."""

    def give_up(number: int, frame: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise GivenUp

    before = signal.signal(signal.SIGTERM, give_up)
    try:
        yield
    except GivenUp:
        job.cancel()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)


@dataclass
class Job:
    """The one job of one checkpoint under one evaluator; ``place`` is where its files lie."""

    place: Path
    poll: float
    patience: float
    name: str = ""
    # Since when Slurm has not answered, in seconds of the monotonic clock.
    silent_since: float | None = None

    @property
    def result(self) -> Path:
        return self.place / f"{self.name}.result.json"

    @property
    def code(self) -> Path:
        """Holds the exit code of the command, once it has ended."""
        return self.place / f"{self.name}.code"

    @property
    def order(self) -> Path:
        """The job's name, and what it is submitted for."""
        return self.place / "order.json"

    @property
    def log(self) -> Path:
        return self.place / "slurm.log"

    def claim(self, now: Mapping[str, Any], command: str) -> None:
        """Takes on the earlier job's name, if there is one for these very files and this command; else a new one."""
        order = self._ordered()
        self.name = order.get("name", "")
        then = order.get("files", {})
        # What is held of a checkpoint may be fewer files than what the trainer saved.
        both = then.keys() & now.keys()
        if order.get("command") != command or not both or any(then[name] != now[name] for name in both):
            while self.name and self._ask(["scancel", *self._own()]) is None:
                time.sleep(self.poll)
            self._clear()
            self.name = f"assayer-{secrets.token_hex(8)}"
            part = self.order.with_suffix(".part")
            part.write_text(json.dumps({"name": self.name, "command": command, "files": now}))
            part.replace(self.order)

    def _ordered(self) -> dict[str, Any]:
        try:
            order: dict[str, Any] = json.loads(self.order.read_text())
        except FileNotFoundError:
            return {}
        return order

    def find(self) -> str | None:
        """The id of the job where it waits, runs, or has left its exit code; None when it has to be submitted."""
        while not self.code.exists():
            states = self._states()
            if states is not None:
                return next((number for number, state in states.items() if state not in ENDED), None)
            time.sleep(self.poll)
        return "ended"

    def send(self, command: str, words: list[str]) -> str:
        """Submits the job; its id. Of a submission whose answer was lost the job is found by its name."""
        code = shlex.quote(str(self.code))
        script = f"#!/bin/sh\nrm -f {code}\n(\n{command}\n)\ncode=$?\necho $code > {code}.part && mv {code}.part {code}\nexit $code\n"
        self.result.unlink(missing_ok=True)
        # A percent sign in the name of a log has a meaning to Slurm.
        log = str(self.log).replace("%", "%%")
        sent = ["sbatch", "--parsable", f"--job-name={self.name}", f"--output={log}", f"--chdir={os.getcwd()}", *words]
        while True:
            told = self._ask(sent, script)
            if told is not None:
                number = told.strip().partition(";")[0]
                print(f"submitted as Slurm job {number} ({self.name})", flush=True)
                return number
            time.sleep(self.poll)
            known = self.find()
            if known:
                return known

    def wait(self, number: str) -> str:
        """The state in which the job ended; COMPLETED where its exit code is there, whatever that is."""
        missing_since: float | None = None
        while not self.code.exists():
            states = self._states()
            # Slurm forgets a job some minutes after its end.
            state = "SILENT" if states is None else states.get(number, "UNKNOWN")
            if state in BLAMELESS:
                return state
            if state in ENDED or state == "UNKNOWN":
                missing_since = missing_since or time.monotonic()
                # To list a folder makes a network file system look again.
                os.listdir(self.place)
                lag = FILE_LAG if state in {"COMPLETED", "UNKNOWN"} else 0
                if time.monotonic() - missing_since > lag and not self.code.exists():
                    return state
            else:
                missing_since = None
            time.sleep(self.poll)
        return "COMPLETED"

    def take(self, state: str) -> Mapping[str, Any]:
        """The metrics of the job that has ended; nothing but its log is left of it."""
        code = self.code.read_text().strip() if self.code.exists() else None
        try:
            if code != "0":
                how = f"as {state}" if code is None else f"with exit code {code}"
                raise RuntimeError(f"the Slurm job {self.name} ended {how}; {self._last_words()}")
            told = json.loads(self.result.read_text())
        except FileNotFoundError:
            raise RuntimeError(f"the command of the Slurm job {self.name} wrote no {self.result}; {self._last_words()}") from None
        except ValueError as error:
            raise RuntimeError(f"the command of the Slurm job {self.name} wrote no JSON into {self.result}: {error}") from None
        finally:
            self._clear()
        if not isinstance(told, dict):
            raise RuntimeError(f"the command of the Slurm job {self.name} wrote no JSON object into {self.result}: {told!r}")
        metrics: Mapping[str, Any] = told.get("metrics", told)
        return metrics

    def cancel(self) -> None:
        """Cancels the job, if there is one; in no more than CANCEL_MAX seconds."""
        if not self.name:
            return
        answer = _call(["scancel", *self._own()], CANCEL_MAX)
        if answer.returncode == 0:
            # Its name is not taken on: it may be seen running for a while.
            self.order.unlink(missing_ok=True)
            print(f"cancelled the Slurm job {self.name}", flush=True)
        else:
            print(f"the Slurm job {self.name} could not be cancelled: {_line(answer.stderr)}", flush=True)

    def _own(self) -> list[str]:
        return [f"--name={self.name}", f"--user={getpass.getuser()}"]

    def _states(self) -> dict[str, str] | None:
        """The states of the jobs of this name by their ids, as far back as Slurm remembers; None when it does not answer."""
        answer = self._ask(["squeue", *self._own(), "--noheader", "--states=all", "--format=%i|%T"])
        if answer is None:
            return None
        rows = (line.split("|") for line in answer.splitlines() if "|" in line)
        return {number.strip(): state.strip() for number, state in rows}

    def _ask(self, words: list[str], given: str = "") -> str | None:
        """What Slurm answers; None when it does not, which it may do for as long as the patience lasts."""
        answer = _call(words, ANSWER_MAX, given)
        if answer.returncode == 0:
            self.silent_since = None
            return answer.stdout
        if words[0] == "sbatch" and not _unreachable(answer):
            raise RuntimeError(f"sbatch refuses: {_line(answer.stderr)}")
        self.silent_since = self.silent_since or time.monotonic()
        if time.monotonic() - self.silent_since > self.patience:
            raise RuntimeError(f"Slurm has not answered for {self.patience:g} s: {_line(answer.stderr)}")
        return None

    def _last_words(self) -> str:
        text = self.log.read_text(errors="replace").strip() if self.log.exists() else ""
        return f"its output ({self.log}) ends: {text[-QUOTED:]}" if text else f"it has no output in {self.log}"

    def _clear(self) -> None:
        for path in (self.order, self.code, self.result):
            path.unlink(missing_ok=True)


def _call(words: list[str], seconds: float, given: str = "") -> "subprocess.CompletedProcess[str]":
    """One command of Slurm's, without what Slurm told this process of a job that it may itself run in, and of its GPUs."""
    kept = {"SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT"}
    dropped = {"CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"} | {name for name in os.environ if name.startswith("SLURM_")} - kept
    environment = {name: value for name, value in os.environ.items() if name not in dropped}
    try:
        return subprocess.run(words, input=given, capture_output=True, text=True, env=environment, timeout=seconds)
    except FileNotFoundError:
        raise RuntimeError(f"there is no {words[0]} on PATH: the workers of this watch have to stand where Slurm's commands are") from None
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(words, 1, "", f"{words[0]}: Socket timed out: no answer within {seconds:g} s")


def _unreachable(answer: "subprocess.CompletedProcess[str]") -> bool:
    """True where Slurm's controller did not answer, and not where it said no."""
    return any(sign in answer.stderr.lower() for sign in SILENCE)


def _line(text: str) -> str:
    return " ".join(text.split())[-QUOTED:]
