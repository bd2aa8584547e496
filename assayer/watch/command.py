"""The flags of ``python -m assayer.watch``: from words to plans, on disk before anything runs."""

import glob
import math
import os
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from assayer import cli, refs, tracking
from assayer.containers import VARIANTS
from assayer.errors import EvaluatorError, StateError, UsageError
from assayer.evaluator_flags import ARGUMENT_HELP, EVALUATOR_HELP, parse_evaluators
from assayer.files import printable
from assayer.merge.command import merge_options
from assayer.merge.names import KEY_MAPS, key_map
from assayer.merge.run import size_in_bytes
from assayer.plan import Baseline, Evaluator, Merging, Plan, PlanStore, host_name, state_directory
from assayer.queues import Connection, chain
from assayer.queues.board import Board
from assayer.queues.connect import Target, open_target, target
from assayer.session import Session
from assayer.watch.diff import baseline_of
from assayer.watch.dry_run import show_dry_run
from assayer.watch.foreground import Foreground
from assayer.watch.look import Memory, directories_of, in_thread, see_all
from assayer.watch.ready import Seen
from assayer.worker.environ import LAUNCHERS
from assayer.worker.launch import Crew, Slot, eval_slots, watch_slots

__all__ = ["main"]

# Three years: what the alarm clocks below still take.
SECONDS_MAX = 10**8
# Seconds without progress after which a directory that is listed when the command is given counts as hung.
LISTING_TIMEOUT = 120


@cli.command("watch")
@click.option(
    "--directory",
    "directories",
    multiple=True,
    required=True,
    metavar="DIR",
    help="Directory that holds checkpoints, or a glob pattern of such directories, matched anew at every look. Repeatable.",
)
@click.option(
    "--evaluator",
    "evaluators",
    multiple=True,
    required=True,
    metavar="[NAME=]REF",
    help=f"{EVALUATOR_HELP} Repeatable.",
)
@click.option(
    "-E",
    "--evaluator_arg",
    "arguments",
    multiple=True,
    metavar="[NAME:]KEY=VALUE",
    help=f"{ARGUMENT_HELP} Repeatable.",
)
@click.option(
    "--regex_filter", metavar="REGEX", help="Only checkpoints whose path below the directory has a match.  [default: all of a known format]"
)
@click.option("--max_depth", type=click.IntRange(min=1), default=3, metavar="N", help="How deep below a directory to look.")
@click.option("--eval_existing", is_flag=True, help="Also evaluate the checkpoints that are there already.")
@click.option(
    "--polling_interval",
    type=click.FloatRange(0, SECONDS_MAX),
    default=5.0,
    metavar="SECONDS",
    help="Time between two looks; under 1 acts as 1.",
)
@click.option(
    "--quiet_period",
    type=click.FloatRange(0, SECONDS_MAX),
    default=30.0,
    metavar="SECONDS",
    help="Time without change after which a checkpoint counts as whole, where its format leaves no sign.",
)
@click.option(
    "--order", type=click.Choice(["oldest", "newest"]), default="oldest", help="Which waiting checkpoint is evaluated first, by step."
)
@click.option("--latest_only", is_flag=True, help="Skip every checkpoint that is older than the newest one that waits.")
@click.option(
    "--hold",
    type=click.IntRange(min=0),
    default=8,
    metavar="N",
    help="How many waiting checkpoints of a folder are protected from deletion, by hard links below evals/.hold; 0: none.",
)
@click.option("--hold_bytes", metavar="SIZE", help="How much they may amount to, such as 200GB.  [default: any]")
@click.option(
    "--hold_min_free",
    type=click.FloatRange(0, 100),
    default=10.0,
    metavar="PERCENT",
    help="With less than this part of the file system free, none is protected.",
)
@click.option(
    "--every", type=click.IntRange(min=1), metavar="N", help="Only steps divisible by N, and the last one when the watch ends by itself."
)
@click.option(
    "--num_eval_workers",
    type=click.IntRange(min=0),
    metavar="N",
    help="Eval workers on this host, in all; 0: they stand elsewhere.  [default: one a visible GPU, one without GPU]",
)
@click.option(
    "--num_watch_workers",
    type=click.IntRange(min=1),
    default=1,
    metavar="N",
    help="Watch workers on this host, in all; more are stand-bys.",
)
@click.option("--timeout", type=click.IntRange(1, SECONDS_MAX), default=86400, metavar="SECONDS", help="Time that one evaluation may take.")
@click.option(
    "--retries", type=click.IntRange(min=0), default=2, metavar="N", help="How often an evaluation that ended badly is tried again."
)
@click.option(
    "--launcher",
    type=click.Choice(LAUNCHERS),
    help="Start the evaluator in several processes, one for each of its GPUs; the record is that of rank 0.  [default: one process]",
)
@click.option(
    "--gpus_per_eval",
    type=click.IntRange(min=1),
    default=1,
    metavar="N",
    help="GPUs that each evaluation sees; without GPUs, with --launcher: its processes.",
)
@click.option("--results_dir", metavar="DIR", help="Where results go.  [default: evals/ beside the checkpoints]")
@click.option("--forget", is_flag=True, help="Drop what earlier watches of these directories took for existing.")
@click.option(
    "--track",
    "tracks",
    multiple=True,
    metavar="TRACKER",
    help="Where each record becomes a point at its checkpoint's step: tensorboard[:logdir], wandb:project=..., mlflow:uri=..., "
    "or my.py:function. Repeatable.",
)
@click.option("--retry_failed", is_flag=True, help="Evaluate the checkpoints again whose evaluation failed.")
@click.option("--reevaluate", is_flag=True, help="Evaluate the checkpoints again that have a record.")
@click.option("--wait_for_directory", is_flag=True, help="Accept a directory that does not exist yet.")
@click.option(
    "--once", is_flag=True, help="Evaluate what is there and is due, then end. A directory that was never watched has no baseline then."
)
@click.option(
    "--until_idle", type=click.FloatRange(0, SECONDS_MAX), metavar="SECONDS", help="End after this time without anything new or to do."
)
@click.option("--until_step", type=click.IntRange(min=0), metavar="N", help="End after the checkpoint of step N or later.")
@click.option("--until_file", metavar="PATH", help="End when this file exists: evaluate what is left, then free the GPUs.")
@click.option("--detach", is_flag=True, help="Return as soon as the watch runs; end it with assayer.shutdown.")
@click.option("--dry_run", is_flag=True, help="Say for each checkpoint what would be done, and why not; change nothing.")
@click.option(
    "--weights", type=click.Choice([*VARIANTS, "both"]), default="regular", help="Which weights of a checkpoint; both: two records."
)
@click.option(
    "--merge",
    type=click.Choice(["auto", "never"]),
    default="auto",
    help="Merge sharded checkpoints for the evaluator, or hand them over raw.",
)
@merge_options
@click.option(
    "--scratch_dir", metavar="DIR", help="Where merged checkpoints lie while they are evaluated.  [default: the workers' $TMPDIR]"
)
@click.option("--scratch_bytes", metavar="SIZE", help="How much they may take there, such as 200GB.  [default: what the disk holds]")
@cli.redis_options
def main(
    directories: tuple[str, ...],
    tracks: tuple[str, ...],
    evaluators: tuple[str, ...],
    arguments: tuple[str, ...],
    num_eval_workers: int | None,
    num_watch_workers: int,
    forget: bool,
    eval_existing: bool,
    wait_for_directory: bool,
    detach: bool,
    dry_run: bool,
    redis_url: str | None,
    redis_host: str | None,
    redis_port: int | None,
    **flags: Any,
) -> None:
    """Watches directories of checkpoints and evaluates each new one, once, as soon as it is whole."""
    console, errors = cli.console(), Console(stderr=True, soft_wrap=True)
    cwd, now = Path.cwd(), time.time()
    state = state_directory()
    _check_flags(flags)
    chosen = target(redis_url, redis_host, redis_port, state)
    found = _directories(directories, cwd, wait_for_directory)
    wanted = parse_evaluators(evaluators, arguments, cwd)
    for warning in [refs.check(e.reference, e.arguments, torch_elsewhere=num_eval_workers == 0) for e in wanted]:
        if warning:
            errors.print(f"assayer: warning: {printable(warning)}", markup=False)
    common = _common(flags, cwd, now) | {"redis": chosen.name, "host": host_name(), "given": now, "detached": detach}
    common["track"] = [tracking.check(text, cwd).to_json() for text in tracks]
    variants = VARIANTS if flags["weights"] == "both" else (str(flags["weights"]),)
    merging = {e.name: _merging(flags, e, cwd) for e in wanted}
    plans = [
        Plan(directory=d, real=d if p else os.path.realpath(d), is_pattern=p, evaluator=e, weights=w, merging=merging[e.name], **common)
        for d, p in found
        for e in wanted
        for w in variants
    ]
    store = PlanStore(state)
    _refuse_others(plans, store)
    if not dry_run:
        if plans[0].results_dir is not None:
            _make_results_dir(Path(plans[0].results_dir))
        open_target(chosen, state).close()
    keep_baseline = not (eval_existing or forget)
    known = _with_baselines(plans, store, keep_baseline, empty=eval_existing, once=bool(flags["once"]))
    plans = [plan for plan, _ in known]
    if dry_run:
        raise SystemExit(show_dry_run(known, console, chosen, state))
    slots = watch_slots(str(flags["watch_queue_name"]), num_watch_workers, chosen.name)
    each = int(flags["gpus_per_eval"])
    evals = eval_slots(str(flags["eval_queue_name"]), num_eval_workers, chosen.name, os.environ, each)
    if not evals and num_eval_workers != 0:
        raise UsageError(f"fewer than {each} GPUs are visible here; give a smaller --gpus_per_eval, or --num_eval_workers 0")
    if num_eval_workers is not None and len(evals) < num_eval_workers:
        on = "one on each" if each == 1 else f"one on every {each}"
        errors.print(f"assayer: warning: {len(evals) * each} GPUs are visible: {len(evals)} eval workers, {on}", markup=False)
    slots += evals
    crew = Crew(state, chosen)
    with Session(state, [plan.id for plan in plans]):
        connection, missing = _begin(known, slots, crew)
        for line in crew.conflicts(slots):
            errors.print(f"assayer: warning: {printable(line)}", markup=False)
        _announce(plans, chosen, [slot.label for slot in missing], errors)
        if detach:
            return
        ended_badly = Foreground(plans, connection, crew, console).run()
    if ended_badly:
        raise SystemExit(1)


def _begin(plans: list[tuple[Plan, Baseline]], slots: list[Slot], crew: Crew) -> tuple[Connection, list[Slot]]:
    """Writes the plans to disk, starts what is missing and publishes; returns a connection and the slots that get a worker now.

    A command that does not come to its end leaves no watch behind, and one that ran before it running.
    """
    store = PlanStore(crew.state)
    before = [_stored(store, plan) for plan, _ in plans]
    try:
        for plan, baseline in plans:
            store.write(plan, baseline)
        held = [slot for slot in slots if crew.is_held(slot)]
        missing = [slot for slot in crew.want(slots) if slot not in held]
        connection = open_target(crew.target, crew.state)
        for plan, baseline in plans:
            Board(connection, plan.watch_queue).put(plan, baseline)
        chain.hurry(connection, plans[0][0].watch_queue)
        return connection, missing
    except BaseException:
        for (plan, _), earlier in zip(plans, before, strict=True):
            if earlier and earlier[0].active:
                store.write(*earlier)
            else:
                store.stop(plan.id, plan.given)
        raise


def _stored(store: PlanStore, plan: Plan) -> tuple[Plan, Baseline] | None:
    earlier = store.read(plan.id)
    return (earlier, store.baseline(earlier)) if earlier and earlier.active else None


def _check_flags(flags: dict[str, Any]) -> None:
    if flags["regex_filter"] is not None:
        try:
            re.compile(flags["regex_filter"])
        except re.error as error:
            raise UsageError(f"--regex_filter {printable(flags['regex_filter'])} is no regular expression: {error}") from None
    for name in ("polling_interval", "quiet_period", "until_idle"):
        if flags[name] is not None and not math.isfinite(flags[name]):
            raise UsageError(f"--{name} must be a number of seconds")
    if flags["watch_queue_name"] == flags["eval_queue_name"]:
        raise UsageError("--watch_queue_name and --eval_queue_name must be two different queues")


def _common(flags: dict[str, Any], cwd: Path, now: float) -> dict[str, Any]:
    """The fields of a plan that are the same for every directory and evaluator of this command."""
    kept = ("regex_filter", "max_depth", "quiet_period", "order", "latest_only", "every", "timeout", "retries", "hold", "once")
    fields = {name: flags[name] for name in (*kept, "until_idle", "until_step", "launcher", "gpus_per_eval")}
    fields["hold_bytes"] = _size(flags, "hold_bytes")
    fields["hold_min_free"] = flags["hold_min_free"] / 100
    for name in ("results_dir", "until_file"):
        fields[name] = None if flags[name] is None else _absolute(flags[name], cwd)
    fields["polling_interval"] = max(1.0, flags["polling_interval"])
    fields |= {"watch_queue": flags["watch_queue_name"], "eval_queue": flags["eval_queue_name"]}
    fields["reevaluate_before"] = now if flags["reevaluate"] else None
    fields["retry_failed_before"] = now if flags["retry_failed"] else None
    return fields


def _merging(flags: dict[str, Any], evaluator: Evaluator, cwd: Path) -> Merging:
    """How checkpoints are merged for this evaluator, with absolute paths.

    What a built-in evaluator is told of the config and the tokenizer, where that is a path, holds for the merge too.

    Raises:
        UsageError: a path is not there, or a size is none.
    """
    given = {name: flags[name] for name in ("hf_config", "tokenizer", "scratch_dir")}
    if evaluator.reference.builtin:
        for name, key in (("hf_config", "config"), ("tokenizer", "tokenizer")):
            told = evaluator.arguments.get(key)
            if given[name] is None and isinstance(told, str) and os.path.exists(_absolute(told, cwd)):
                given[name] = told
    found: dict[str, Any] = {name: None if path is None else _absolute(path, cwd) for name, path in given.items()}
    for name, path in found.items():
        if path is not None and not os.path.exists(path):
            raise UsageError(f"--{name} {printable(path)} is not there; correct the path")
    rules = flags["key_map"]
    if rules is not None and rules not in KEY_MAPS:
        rules = _absolute(rules, cwd)
    key_map(rules)
    size = _size(flags, "scratch_bytes")
    return Merging(mode=flags["merge"], dtype=flags["dtype"], key_map=rules, scratch_bytes=size, **found)


def _size(flags: dict[str, Any], name: str) -> int | None:
    """The bytes that a flag tells, None where it is not given."""
    if flags[name] is None:
        return None
    try:
        return size_in_bytes(flags[name])
    except UsageError as error:
        raise UsageError(f"--{name}: {error}") from None


def _make_results_dir(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--results_dir {printable(str(path))} cannot be made: {error.strerror}") from None
    if not os.access(path, os.W_OK | os.X_OK):
        raise UsageError(f"--results_dir {printable(str(path))} cannot be written by this user; change its permissions")


def _absolute(path: str, cwd: Path) -> str:
    return os.path.normpath(os.path.join(cwd, os.path.expanduser(path)))


def _directories(given: tuple[str, ...], cwd: Path, may_be_missing: bool) -> list[tuple[str, bool]]:
    """Each directory as an absolute path, with whether it is a pattern.

    Raises:
        UsageError: one does not exist, is a file, or cannot be read.
    """
    found = []
    for text in given:
        if not text:
            raise UsageError("--directory is empty; is a shell variable unset?")
        path = _absolute(text, cwd)
        is_pattern = not os.path.lexists(path) and any(c in text for c in "*?[")
        if is_pattern:
            matches = [m for m in glob.glob(path, recursive=True) if os.path.isdir(m)]
            if not matches and not may_be_missing:
                raise UsageError(f"no directory matches {printable(path)}; correct the pattern, or give --wait_for_directory")
        elif os.path.isdir(path):
            if not os.access(path, os.R_OK | os.X_OK):
                raise UsageError(f"the directory {printable(path)} cannot be read by this user; change its permissions")
        elif os.path.lexists(path):
            raise UsageError(f"{printable(path)} is no directory; --directory takes the directory that holds the checkpoints")
        elif not may_be_missing:
            raise UsageError(f"no directory {printable(path)}; correct the path, or give --wait_for_directory")
        if (path, is_pattern) not in found:
            found.append((path, is_pattern))
    return found


def _refuse_others(plans: list[Plan], store: PlanStore) -> None:
    """Refuses a second evaluator under a name that a running watch of the same directory gives to another one.

    Both would have their records in one place.
    """
    known: dict[str, dict[str, Plan]] = {}
    for present in store.all():
        for directory in directories_of(present) if present.active else []:
            known.setdefault(present.evaluator.name, {})[os.path.realpath(directory)] = present
    for plan in plans:
        others = known.get(plan.evaluator.name, {})
        if all(str(other.evaluator.reference) == str(plan.evaluator.reference) for other in others.values()):
            continue
        ours = {os.path.realpath(directory) for directory in directories_of(plan)}
        above = {parent for one in ours for parent in _with_parents(one)}
        for directory, other in others.items():
            is_shared = directory in above or not ours.isdisjoint(_with_parents(directory)) or other.id == plan.id
            if is_shared and str(other.evaluator.reference) != str(plan.evaluator.reference):
                raise EvaluatorError(
                    f"{printable(other.directory)} is watched with another evaluator called {plan.evaluator.name!r} "
                    f"({printable(str(other.evaluator.reference))}); give this one another name: --evaluator name=..."
                )


def _with_parents(directory: str) -> list[str]:
    return [directory, *map(str, Path(directory).parents)]


def _with_baselines(plans: list[Plan], store: PlanStore, keep: bool, empty: bool, once: bool) -> list[tuple[Plan, Baseline]]:
    """The plans with what was there before: as an earlier watch noted it, else as it is now."""
    seen: dict[str, list[Seen]] = {}
    done = []
    for plan in plans:
        present = store.read(plan.id)
        detached = plan.detached or bool(present and present.active and present.detached)
        baseline = Baseline()
        if present and keep and not empty:
            baseline = store.baseline(present)
        elif not empty and not once:
            if plan.directory not in seen:
                seen[plan.directory] = _what_is_there(plan)
            baseline = baseline_of(plan, seen[plan.directory])
        done.append((replace(plan, detached=detached).with_baseline(baseline), baseline))
    return done


def _what_is_there(plan: Plan) -> list[Seen]:
    memory = Memory()
    seen = in_thread(lambda: see_all(plan, memory, time.time()), LISTING_TIMEOUT, progress=lambda: memory.count)
    if seen is None:
        raise StateError(f"{printable(plan.directory)} has not answered for {LISTING_TIMEOUT} s; is its file system up?")
    return seen


def _announce(plans: list[Plan], chosen: Target, started: list[str], console: Console) -> None:
    for plan in plans:
        there = "checkpoint was" if plan.there_before == 1 else "checkpoints were"
        kept = f", {plan.there_before} {there} there before" if plan.there_before else ""
        if plan.results_dir is None and not plan.is_pattern and os.path.isdir(plan.directory) and not os.access(plan.directory, os.W_OK):
            console.print(f"assayer: warning: {printable(plan.directory)} cannot be written: give a place with --results_dir", markup=False)
        console.print(f"watching {printable(plan.directory)} with {plan.label}{kept}", markup=False, highlight=False)
    if started:
        console.print(f"starting workers: {', '.join(started)} ({chosen.name})", markup=False, highlight=False)
