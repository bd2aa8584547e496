"""Never lost, never twice, never in the trainer's way: a house with watches and a training, in which everything is killed in turn.

Run by ``scripts/soak``. Everything is real but the training; the faults, their moments and the training are drawn from one seed.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))

from conftest import REPOSITORY, House
from evidence import EVALUATOR, Poller, read_lines, versions_of
from fake_trainer import KINDS, Orders, Run, spoken
from injuries import INJURIES, Scene, mount, unmount
from verdict import (
    Moment,
    debts,
    held_before_the_end,
    ledger_faults,
    left_in_redis,
    left_on_disk,
    record_faults,
    status_faults,
    still_owed,
    trainer_faults,
)

__all__ = ["Outcome", "Scenario", "trial"]

# A failed job that left no record is queued again after a pause; a short trial cannot wait for it.
_SHORTER_PAUSE = "from assayer.watch import watch_job\nwatch_job.RETRY_PAUSE = {}\n"
_GIVEN = "command given again"
# Seconds that a fault of a list waits for something to do it to.
_PATIENCE = 6.0
# Lines of each log that a failure shows.
_TAIL = 60


@dataclass(frozen=True)
class Scenario:
    """What is to happen. Times in seconds.

    ``faults``: each once, in this order; None: by chance, for ``seconds``. ``pause`` is the mean time between two of them. ``settle``: how
    long everything may take to come to rest when they are over.
    """

    seed: int
    seconds: float = 60.0
    faults: tuple[str, ...] | None = None
    pause: float = 2.5
    longest_stop: float = 10.0
    slowest_evaluation: float = 3.0
    slowest_save: float = 1.0
    pace: float = 1.0
    runs: int = 3
    # How long it takes until a foreground command that was killed is given again: sooner or later than its watch ends.
    away: tuple[float, ...] = (0.0, 2.0, 12.0)
    settle: float = 240.0
    # How long nothing may happen until it counts as at rest.
    rest: float = 3.0
    retry_pause: float | None = None


@dataclass
class Outcome:
    """What a trial came to; it was survived when ``problems`` is empty."""

    scenario: Scenario
    faults: list[Moment] = field(default_factory=list)
    counts: dict[str, float] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    excused: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    log: str = ""
    began: float = 0.0

    def story(self) -> str:
        """Everything that is needed to repeat and to understand a failure."""
        lines = [f"seed {self.scenario.seed}: {self.scenario}"]
        lines += [f"  {moment.at - self.began:7.2f} s ({moment.at:.2f})  {moment.kind}: {moment.detail}" for moment in self.faults]
        return "\n".join([*lines, "the logs end with:", self.log, "problems:", *[f"  {problem}" for problem in self.problems]])

    def table(self) -> str:
        """How often each fault was done, and what became of the checkpoints."""
        done = Counter(moment.kind for moment in self.faults if moment.kind in INJURIES or moment.kind == _GIVEN)
        lines = [f"{'fault':<24} {'injected':>9}"]
        lines += [f"{kind:<24} {done[kind]:>9}" for kind in (*INJURIES, _GIVEN) if kind in done]
        lines += [f"{'all':<24} {sum(done.values()):>9}"]
        lines += [f"skipped: {text}" for text in self.skipped]
        lines += ["", *[f"{name:<52} {value:>9g}" for name, value in self.counts.items()]]
        lines += [f"excused: {text} (Redis lost its data)" for text in self.excused]
        return "\n".join([*lines, f"seed {self.scenario.seed}: " + ("survived" if not self.problems else f"{len(self.problems)} problems")])


def trial(scenario: Scenario) -> Outcome:
    """Runs a scenario in a house of its own, from the first command to the shutdown, and judges it."""
    root = Path(tempfile.mkdtemp(prefix="assayer-test-"))
    house = House(root)
    disk = root / "disk"
    disk.mkdir()
    why_not = mount(disk, "64m" if scenario.faults is None else "1m")
    try:
        one = _Trial(house, scenario, disk, why_not)
        try:
            one.run()
        finally:
            one.end()
        return one.outcome
    finally:
        house.end()
        if why_not is None:
            unmount(disk)
        shutil.rmtree(root, ignore_errors=True)


class _Trial:
    def __init__(self, house: House, scenario: Scenario, disk: Path, no_disk: str | None) -> None:
        self.house = house
        self.scenario = scenario
        self.chance = random.Random(scenario.seed)
        self.outcome = Outcome(scenario, began=time.time())
        if no_disk:
            self.outcome.skipped.append(f"fill disk ({no_disk})")
        names = ["file", "hf", "dcp"]
        self.runs = []
        for i in range(scenario.runs):
            folder = house.runs / f"run{i}"
            folder.mkdir()
            self.runs.append(Run(str(folder), str(house.root / f"run{i}.lock"), names[i:] + names[:i]))
        # The first is watched from the foreground; the last keeps its results on the small disk.
        self.results = {run.folder: str(disk) if run is self.runs[-1] else None for run in self.runs}
        self.result_folders = [disk, *[Path(run.folder, "evals") for run in self.runs]]
        self.scene = Scene(house, self.runs, self.chance, scenario.longest_stop, None if no_disk else disk, self.result_folders)
        self.ledger, self.journal, self.stop = house.root / "ledger", house.root / "journal", house.root / "stop"
        self.evaluator = house.file("look.py", EVALUATOR)
        self.away: list[tuple[str, float, float]] = []
        self.trainer: subprocess.Popen[bytes] | None = None
        self.foregrounds: list[Path] = []
        self.give_at = 0.0
        if scenario.retry_pause is not None:
            house.file("site/sitecustomize.py", _SHORTER_PAUSE.format(scenario.retry_pause))
            house.environment["PYTHONPATH"] = f"{house.root / 'site'}:{REPOSITORY}"

    def run(self) -> None:
        folders = {run.folder: Path(run.folder) for run in self.runs}
        with Poller(self.house, folders, self.result_folders) as self.poller:
            # First, because it takes seconds to begin.
            self._train()
            self._give_foreground()
            for run in self.runs[1:]:
                self._give_detached(run)
            self._injure()
            settled = self._settle()
            self._judge(settled)
            self._shut_down()

    def _words(self, run: Run) -> list[str]:
        words: list[object] = ["watch", "--directory", run.folder, "--evaluator", f"{self.evaluator}:look", "--eval_existing"]
        words += ["--polling_interval", 1, "--quiet_period", 2, "--num_eval_workers", 2, "--retries", 1000]
        words += ["-E", f"ledger={self.ledger}", "-E", f"slowest={self.scenario.slowest_evaluation}"]
        words += ["-E", f"seed={self.scenario.seed}"]
        if self.results[run.folder]:
            words += ["--results_dir", self.results[run.folder]]
        return [str(word) for word in words]

    def _give_foreground(self) -> None:
        log = self.house.root / f"foreground{len(self.foregrounds)}.log"
        self.foregrounds.append(log)
        with log.open("wb") as output:
            self.scene.foreground = subprocess.Popen(
                [sys.executable, "-m", "assayer", *self._words(self.runs[0])],
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                cwd=REPOSITORY,
                env=self.house.environment,
            )

    def _give_detached(self, run: Run) -> None:
        deadline = time.monotonic() + 60
        while True:
            done = self.house.command(*self._words(run), "--detach", check=False)
            if done.returncode == 0:
                return
            if time.monotonic() > deadline:
                raise AssertionError(f"the watch of {run.folder} cannot be given: {done.stderr}")

    def _train(self) -> None:
        orders = Orders(
            self.runs, str(self.journal), str(self.stop), self.scenario.seed, pace=self.scenario.pace, slowest=self.scenario.slowest_save
        )
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(Path(__file__).with_name("fake_trainer.py")), spoken(orders)]
        self.trainer = subprocess.Popen(command, env=environment, cwd=REPOSITORY, stdin=subprocess.DEVNULL)

    def _injure(self) -> None:
        """Faults at random moments, until their time, or their list, is over."""
        listed = self.scenario.faults
        todo = deque(listed or ())
        end = time.monotonic() + self.scenario.seconds
        pause, phase = self.scenario.pause, end
        at = time.monotonic() + self.chance.expovariate(1 / pause)
        while time.monotonic() < end and (todo or listed is None):
            self._keep_foreground()
            self._note_undone(self.scene.undo())
            if time.monotonic() >= at:
                if not todo or (listed is None and time.monotonic() > phase):
                    # For a while a few kinds only, fast or slowly: faults that meet find more than all of them evenly mixed.
                    kinds = self.chance.sample(list(INJURIES), self.chance.randint(2, 8))
                    todo = deque(self.chance.sample(kinds * 2, 2 * len(kinds)))
                    pause = self.scenario.pause * self.chance.choice((0.3, 1.0, 2.0))
                    phase = time.monotonic() + 40
                kind = todo[0]
                detail = INJURIES[kind](self.scene)
                if detail is None:
                    # There is nothing to do it to just now, such as no evaluation: another comes first, of a list after a while.
                    if listed is None or time.monotonic() > at + _PATIENCE:
                        todo.rotate(-1)
                        at = time.monotonic()
                else:
                    todo.popleft()
                    self._note(kind, detail)
                    at = time.monotonic() + min(4 * pause, self.chance.expovariate(1 / pause))
            time.sleep(0.05)
        if listed is not None:
            self.outcome.skipped += [f"{kind} (there was nothing to do it to)" for kind in todo if kind != "fill disk" or self.scene.disk]
        self._note_undone(self.scene.undo(everything=True))
        self.stop.touch()

    def _note(self, kind: str, detail: str) -> None:
        now = time.time()
        self.outcome.faults.append(Moment(now, kind, detail))
        if kind == "directory away":
            self.away.append((str(self.house.runs / detail.split()[0]), now, float("inf")))
        if kind == "kill foreground":
            self.give_at = time.monotonic() + self.chance.choice(self.scenario.away)

    def _note_undone(self, names: list[str]) -> None:
        for name in names:
            self.outcome.faults.append(Moment(time.time(), "undone", name))
            if name.endswith(" is back"):
                folder = str(self.house.runs / name.split()[0])
                self.away = [(f, a, min(b, time.time()) if f == folder else b) for f, a, b in self.away]

    def _keep_foreground(self) -> None:
        """The user gives the command again when it was killed, or could not begin."""
        command = self.scene.foreground
        code = command.poll() if command else 0
        if code is None or time.monotonic() < self.give_at:
            return
        text = self.foregrounds[-1].read_text(errors="replace")
        if code != -signal.SIGKILL and text.startswith("watching"):
            self.outcome.problems.append(f"the foreground command ended by itself with code {code}: {text[-600:]}")
        self._note(_GIVEN, f"the last one ended with {code}: {text.strip().splitlines()[-1:]}")
        self.give_at = time.monotonic() + 1
        self._give_foreground()

    def _settle(self) -> bool:
        """True once the training has ended, every checkpoint has its record and nothing is under way, for a few ticks."""
        assert self.trainer
        self.trainer.wait(120)
        began = time.monotonic()
        rest = 0.0
        while time.monotonic() - began < self.scenario.settle:
            self._keep_foreground()
            if self._is_at_rest():
                rest = rest or time.monotonic()
                if time.monotonic() - rest > self.scenario.rest:
                    self.outcome.counts["seconds until all was at rest"] = round(rest - began, 1)
                    return True
            else:
                rest = 0.0
            time.sleep(0.2)
        return False

    def _is_at_rest(self) -> bool:
        if still_owed(versions_of(read_lines(self.journal)), self.poller.sights) or not self.scene.pids("redis"):
            return False
        with contextlib.suppress(Exception):
            return not left_in_redis(self.house, self.poller.sights) and not any(map(self.scene.pids, ("work horse", "evaluator")))
        return False

    def _judge(self, settled: bool) -> None:
        assert self.trainer
        self.poller.look_at_records()
        journal, sights = read_lines(self.journal), self.poller.sights
        versions, ledger = versions_of(journal), read_lines(self.ledger)
        held = held_before_the_end(versions, sights, self.poller.looks, self.away, self.results)
        lost, self.outcome.excused = debts(versions, sights, self.poller.looks, self.away, self.outcome.faults, held)
        problems = [f"{version.name} has no finished record" for version in still_owed(versions, sights)] + lost
        if not settled:
            problems.append(f"not at rest after {self.scenario.settle:g} s: {self._why_not()}")
        problems += record_faults(versions, sights, self.results, held)
        twice, runs, again = ledger_faults(ledger, self.outcome.faults)
        problems += twice + sorted(self.poller.problems) + trainer_faults(journal, versions, self.trainer.returncode)
        if settled:
            problems += status_faults(self.house.status(), versions)
        self.outcome.problems += problems
        deleted = {(v.path, v.identity): v.deleted for v in versions if v.deleted is not None}
        finished = [(s.checkpoint, s.identity, datetime.fromisoformat(s.ended).timestamp()) for s in sights if s.status == "finished"]
        late = {(path, identity) for path, identity, ended in finished if ended > deleted.get((path, identity), float("inf"))}
        last = {sight.file: sight for sight in sights}
        states = Counter(sight.status for sight in {(s.checkpoint, s.identity): s for s in last.values()}.values())
        self.outcome.counts |= {
            "seconds of faults": round(self.scenario.seconds if self.scenario.faults is None else self._injured_for(), 1),
            "versions of checkpoints written": len(versions),
            "  written in place of an earlier one": sum(v.rewritten is not None for v in versions),
            "  deleted by retention": sum(v.deleted is not None for v in versions),
            "  held when they were deleted, and evaluated": sum(
                v.deleted is not None and (v.path, v.value) in held and (v.path, v.identity) in late for v in versions
            ),
            "runs of the evaluator": runs,
            "  run again after a fault": again,
            **{f"records that say {status}": count for status, count in sorted(states.items())},
            "versions gone before two looks, without a record": len(versions)
            - sum(states.values())
            - len(lost)
            - len(self.outcome.excused),
            "versions lost with Redis' data after they were deleted": len(self.outcome.excused),
        }

    def _injured_for(self) -> float:
        return self.outcome.faults[-1].at - self.outcome.faults[0].at if self.outcome.faults else 0.0

    def _why_not(self) -> str:
        try:
            told = self.house.status()
            sights = [(c["name"], c["state"], c["reason"]) for w in told["watches"] for c in w["checkpoints"] if c["state"] != "finished"]
            return json.dumps({"redis": left_in_redis(self.house, self.poller.sights), "sights": sights, "problems": told["problems"]})
        except Exception as error:
            return f"{type(error).__name__}: {error}"

    def _shut_down(self) -> None:
        said = self.house.command("shutdown", check=False)
        if said.returncode:
            self.outcome.problems.append(f"the shutdown ended with code {said.returncode}: {said.stderr[-600:]}")
        deadline = time.monotonic() + 15
        while (left := self.house.processes()) and time.monotonic() < deadline:
            if self.scene.foreground:
                self.scene.foreground.poll()
            time.sleep(0.1)
        self.outcome.problems += [f"process {pid} is left after the shutdown: {line}" for pid, line in left.items()]
        if self.house.server.is_running():
            self.outcome.problems.append("the embedded Redis runs after the shutdown")
        self.outcome.problems += left_on_disk(self.result_folders, self.house.root / "tmp")

    def end(self) -> None:
        """Leaves nothing behind, whatever has happened."""
        for undo in self.scene.undos:
            with contextlib.suppress(OSError, AssertionError):
                undo.act()
        self.stop.touch()
        for process in (self.trainer, self.scene.foreground):
            if process:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(5)
                if process.poll() is None:
                    process.kill()
                    process.wait()
        self.outcome.log = "\n".join(_tails(self.house, self.foregrounds))


def _tails(house: House, foregrounds: list[Path]) -> Iterator[str]:
    for path in [*house.state.glob("workers/*/*/log"), *house.state.glob("redis/*/redis.log"), *foregrounds[-3:]]:
        yield f"--- {path}"
        yield from path.read_text(errors="replace").splitlines()[-_TAIL:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("minutes", type=float, help="how long faults go on")
    parser.add_argument("--seed", type=int, default=None, help="of the faults, their moments and the training")
    parser.add_argument("--pause", type=float, default=2.5, help="mean seconds between two faults")
    parser.add_argument("--pace", type=float, default=1.0, help="mean seconds between two acts of the training; at 0.6 evaluations lag")
    options = parser.parse_args()
    # Ended from outside it cleans up, too.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))
    seed = random.SystemRandom().randrange(1_000_000) if options.seed is None else options.seed
    print(
        f"seed {seed}: {options.minutes:g} minutes of faults; every kind is in {', '.join(INJURIES)}; checkpoints of {', '.join(KINDS)}",
        flush=True,
    )
    outcome = trial(Scenario(seed, seconds=options.minutes * 60, pause=options.pause, pace=options.pace))
    if outcome.problems:
        print(outcome.story())
    print(outcome.table())
    raise SystemExit(1 if outcome.problems else 0)


if __name__ == "__main__":
    main()
