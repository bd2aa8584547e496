"""One evaluation here and now, without Redis: ``python -m assayer.evaluate CHECKPOINT --evaluator REF``.

The checkpoint's own place is only read. What is merged lies in scratch and goes with the command, whatever ends it; how far the evaluation
was lies in the state directory until it has succeeded, so that the same command goes on where it was killed.
"""

import contextlib
import json
import logging
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
from rich.table import Table
from rich.text import Text

from assayer import cli, formats, progress, refs
from assayer.checkpoint import Checkpoint
from assayer.containers import VARIANTS
from assayer.errors import AssayerError, CheckpointError, StateError, UsageError
from assayer.evaluator_flags import ARGUMENT_HELP, EVALUATOR_HELP, parse_evaluators
from assayer.files import digest, is_locked, is_open_as, lock_file, printable, private_directory, try_lock, write_json
from assayer.merge import command as merge_command
from assayer.merge.hf import companions
from assayer.merge.run import Options, find_checkpoint
from assayer.merge.run import run as run_merge
from assayer.plan import Evaluator, host_name, state_directory
from assayer.record import Record, installed_versions, now_utc
from assayer.watch.ready import Seen, examine
from assayer.worker import child, ranks
from assayer.worker.call import Call, Outcome, clean_environment
from assayer.worker.environ import LAUNCHERS, visible_gpus
from assayer.worker.scratch import Scratch

__all__ = ["main"]

# Seconds for which the unfinished state of a command that was not given again is kept.
KEPT = 30 * 86400.0
# Seconds that an evaluation's end waits for a checkpoint that is half written or half deleted.
HALF_THERE = 5.0
# The merges of these commands among those of the workers, which all have keys of hexadecimal digits.
_OWN = "alone-"


@cli.command("evaluate")
@click.argument("checkpoint", metavar="CHECKPOINT")
@click.option("--evaluator", required=True, metavar="[NAME=]REF", help=EVALUATOR_HELP)
@click.option("-E", "--evaluator_arg", "arguments", multiple=True, metavar="KEY=VALUE", help=f"{ARGUMENT_HELP} Repeatable.")
@click.option("--output", metavar="FILE", help="Write a record there, and the evaluator's own files beside it.")
@click.option("--weights", type=click.Choice(VARIANTS), default="regular", help="Which weights of the checkpoint.")
@click.option("--merge", type=click.Choice(["auto", "never"]), default="auto", help="Merge a sharded checkpoint, or hand it over raw.")
@merge_command.merge_options
@click.option("--scratch_dir", metavar="DIR", help="Where a merged checkpoint lies while it is evaluated.  [default: $TMPDIR]")
@click.option("--launcher", type=click.Choice(LAUNCHERS), help="Start the evaluator in several processes; the outcome is that of rank 0.")
@click.option(
    "--processes", type=click.IntRange(min=1), metavar="N", help="How many, with --launcher.  [default: one for each visible GPU]"
)
def main(checkpoint: str, evaluator: str, arguments: tuple[str, ...], **flags: Any) -> None:
    """Evaluates one checkpoint here and now; the last line of standard output is JSON.

    Needs no Redis and writes nothing beside the checkpoint. Given again after it was killed, it goes on where it was.
    """
    cwd = Path.cwd()
    (named,) = parse_evaluators((evaluator,), arguments, cwd)
    output = _output(flags["output"])
    processes = _processes(flags["launcher"], flags["processes"])
    if flags["scratch_dir"] is not None and not os.path.isdir(flags["scratch_dir"]):
        raise UsageError(f"--scratch_dir {printable(flags['scratch_dir'])} is no directory; correct the path")
    seen = _whole(checkpoint, flags["weights"])
    warning = refs.check(named.reference, named.arguments, torch_elsewhere=False)
    if warning:
        _say(f"warning: {warning}")
    wanted = _Wanted(seen, named, _options(flags, named), flags["merge"], flags["launcher"], processes, flags["scratch_dir"], output)
    with cli.ended_once():
        record = _evaluate(wanted)
    if output is not None:
        write_json(output, record.to_json())
    _show(record)


@dataclass(frozen=True)
class _Wanted:
    """What one command asks for."""

    seen: Seen
    evaluator: Evaluator
    options: Options
    merge: str
    launcher: str | None
    processes: int
    scratch_dir: str | None
    output: Path | None

    @property
    def checkpoint(self) -> Checkpoint:
        return self.seen.checkpoint

    @property
    def merges(self) -> bool:
        return self.merge == "auto" and formats.is_merged_for(self.checkpoint, self.evaluator.reference.builtin is not None)

    @property
    def key(self) -> str:
        """The same for the same command."""
        evaluator = [self.evaluator.name, str(self.evaluator.reference), json.dumps(self.evaluator.arguments, sort_keys=True)]
        how = [self.options.checkpoint_type, self.merge, self.launcher or "", str(self.processes)]
        merged = [self.options.dtype, *(word or "" for word in (self.options.hf_config, self.options.tokenizer, self.options.key_map))]
        return digest(self.checkpoint.path, *evaluator, *how, *merged)


@dataclass
class _Stations:
    """What became known on the way."""

    seconds: dict[str, float] = field(default_factory=dict)
    merged: dict[str, Any] | None = None

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - began, 3)


def _output(given: str | None) -> Path | None:
    if given is None:
        return None
    path = Path(os.path.abspath(os.path.expanduser(given)))
    if path.is_dir():
        raise UsageError(f"--output {printable(str(path))} is a directory; give a file")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK | os.X_OK):
        raise UsageError(f"--output {printable(str(path))}: {printable(str(path.parent))} is no directory that this user may write in")
    return path


def _processes(launcher: str | None, given: int | None) -> int:
    gpus = visible_gpus(os.environ)
    if launcher is None:
        if given is not None:
            raise UsageError(f"--processes {given} needs --launcher {' or '.join(LAUNCHERS)}")
        return 1
    ranks.refuse_missing(launcher)
    if given is None and not gpus:
        raise UsageError(f"--launcher {launcher}: no GPU is visible, so give the number of processes with --processes")
    if given is not None and gpus and given > len(gpus):
        seen = "1 GPU is" if len(gpus) == 1 else f"{len(gpus)} GPUs are"
        raise UsageError(f"--processes {given}: {seen} visible, and each process takes one")
    return given or len(gpus)


def _whole(given: str, weights: str) -> Seen:
    """The checkpoint at this path, with its identity.

    Raises:
        CheckpointError: there is none, it is not whole, or it has no such weights.
    """
    path = os.path.abspath(os.path.expanduser(given))
    if os.path.islink(path):
        # Its name may tell the step.
        path = os.path.realpath(path)
    try:
        found = formats.identify_path(path)
    except OSError as error:
        raise CheckpointError(f"{printable(path)}: {error.strerror}; give the path of a checkpoint") from None
    if found is None:
        inside = ""
        with contextlib.suppress(CheckpointError):
            inside = f"; the newest whole one in it is {printable(find_checkpoint(Path(path)).checkpoint.name)}"
        known = ", ".join(sorted(formats.all_formats()))
        raise CheckpointError(f"{printable(path)} is no checkpoint of a known format ({known}){inside}")
    # Whoever names it says that it is done: a quiet period is for watching.
    seen = examine(found, None, time.time(), True, 0.0)
    if seen.missing:
        raise CheckpointError(f"{printable(path)} is not whole: {seen.missing}")
    if weights not in seen.variants:
        raise CheckpointError(f"{printable(path)} holds no {weights} weights; give --weights {seen.variants[0]}")
    return seen


def _options(flags: dict[str, Any], evaluator: Evaluator) -> Options:
    """How the checkpoint is merged; what a built-in evaluator is told of config and tokenizer, where that is a path, holds here too."""
    found = {name: flags[name] for name in ("hf_config", "tokenizer")}
    if evaluator.reference.builtin:
        for name, key in (("hf_config", "config"), ("tokenizer", "tokenizer")):
            told = evaluator.arguments.get(key)
            if found[name] is None and isinstance(told, str) and os.path.exists(told):
                found[name] = told
    can_check = find_spec("transformers") is not None and find_spec("torch") is not None
    return Options(checkpoint_type=flags["weights"], dtype=flags["dtype"], key_map=flags["key_map"], check_model=can_check, **found)


def _evaluate(wanted: _Wanted) -> Record:
    """The record of the evaluation; of what it needed on this disk nothing is left, but its unfinished state where it ended badly.

    Raises:
        AssayerError: it ended badly.
    """
    behind = contextlib.ExitStack()
    try:
        try:
            return _carry_out(wanted, behind)
        finally:
            with cli.undisturbed():
                behind.close()
    finally:
        # The one signal that is heeded may have come just before that.
        behind.close()


def _carry_out(wanted: _Wanted, behind: contextlib.ExitStack) -> Record:
    stations, started = _Stations(), now_utc()
    state = _state(wanted.key, behind)
    path = _readable(wanted, stations, behind)
    call = _call(wanted, path, state)
    with stations.timed("evaluate"):
        ending = child.run(lambda: _in_child(call, wanted.launcher, wanted.processes), None)
    if ending.cause is not None:
        raise AssayerError(f"{wanted.evaluator.name} on {printable(wanted.checkpoint.name)}: {ending.message}")
    _refuse_changed(wanted.seen)
    progress.remove(state)
    return _record(wanted, Outcome(**ending.value), stations, started)


def _refuse_changed(seen: Seen) -> None:
    """What was evaluated must be what was there before; a checkpoint that was deleted since is no other.

    Raises:
        CheckpointError: other weights lie there now, or are being written.
    """
    deadline = time.monotonic() + HALF_THERE
    while os.path.lexists(seen.checkpoint.path):
        with contextlib.suppress(FileNotFoundError):
            now = formats.identify_path(seen.checkpoint.path)
            again = examine(now, None, time.time(), True, 0.0) if now else None
            if again and again.identity == seen.identity:
                return
            if (again and again.is_whole) or time.monotonic() > deadline:
                path = printable(seen.checkpoint.path)
                raise CheckpointError(f"the weights of {path} changed while they were evaluated; evaluate them again")
        time.sleep(0.1)


def _in_child(call: Call, launcher: str | None, processes: int) -> dict[str, Any]:
    _become_quiet()
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("assayer: %(message)s"))
    logging.getLogger("assayer").addHandler(handler)
    logging.getLogger("assayer").setLevel(logging.INFO)
    clean_environment()
    return ranks.called(call, launcher, processes, call.point(processes)).to_json()


def _become_quiet() -> None:
    """In a child: the last line of standard output is the command's own, and a Ctrl-C, which a terminal sends to this process too, is for
    the command to heed, which then ends its children without a traceback."""
    os.dup2(2, 1)
    signal.signal(signal.SIGINT, lambda number, frame: None)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def _readable(wanted: _Wanted, stations: _Stations, behind: contextlib.ExitStack) -> str:
    """The path that the evaluator gets: the checkpoint's, or that of its merge, which is removed behind it."""
    _check_files(wanted)
    if not wanted.merges:
        return wanted.checkpoint.path
    scratch = Scratch(wanted.scratch_dir, None, lambda key: not key.startswith(_OWN))
    key = _OWN + wanted.key
    behind.callback(scratch.release, key)
    # A process that is left would read on.
    behind.callback(child.end_descendants)
    # What a killed command has left may have been merged with another config since.
    scratch.release(key)
    try:
        with stations.timed("merge"):
            lent = scratch.lend(key, wanted.checkpoint.name, lambda path: _merged(wanted, scratch, key, path))
            path, facts, _ = behind.enter_context(lent)
    except OSError as error:
        raise StateError(f"cannot use the scratch directory {printable(str(scratch.root))}: {error.strerror}") from None
    stations.merged = {name: value for name, value in facts.items() if name != "boot"}
    for note in facts["notes"]:
        _say(f"note: {note}")
    return str(path)


def _check_files(wanted: _Wanted) -> None:
    """Asks a built-in evaluator, before any weights are read, whether it has all that it needs beside them.

    Raises:
        EvaluatorError: a tokenizer, or the like, is missing.
    """
    module = refs.builtin_module(wanted.evaluator.reference)
    if module is None:
        return
    names = set(companions(wanted.checkpoint, wanted.options.hf_config, wanted.options.tokenizer).files)
    if not wanted.merges:
        names |= wanted.seen.listing.names
    module.check_files(names, wanted.evaluator.arguments)


def _merged(wanted: _Wanted, scratch: Scratch, key: str, path: Path) -> dict[str, Any]:
    """Merges in a child process, since comparing with the model starts torch, and a process that has is not forked any more."""

    def merge() -> dict[str, Any]:
        _become_quiet()
        found = find_checkpoint(Path(wanted.checkpoint.path))
        with merge_command.progress() as (started, advance):
            done = run_merge(found, path, wanted.options, started, advance, lambda size: _reserve(scratch, key, size), flush=False)
        unchecked = [] if wanted.options.check_model else ["not checked against a model: transformers is not installed"]
        facts = {"from": done.format, "bytes": done.weights, "tensors": done.tensors, "seconds": round(done.seconds, 3)}
        return {**facts, "notes": done.notes + unchecked}

    ending = child.run(merge, None)
    if ending.cause is not None:
        raise CheckpointError(ending.message if ending.cause == "evaluator" else f"the merge of {printable(path.name)}: {ending.message}")
    facts: dict[str, Any] = ending.value
    return facts


def _reserve(scratch: Scratch, key: str, size: int) -> None:
    scratch.reserve(key, size)


def _call(wanted: _Wanted, path: str, state: Path) -> Call:
    raw = path == wanted.checkpoint.path and formats.of(wanted.checkpoint).SHARDED
    beside = None if wanted.output is None else str(wanted.output).removesuffix(".json")
    return Call(
        reference=wanted.evaluator.reference,
        name=wanted.evaluator.name,
        arguments=wanted.evaluator.arguments,
        path=path,
        original_path=wanted.checkpoint.path,
        identity=str(wanted.seen.identity),
        step=wanted.checkpoint.position.step,
        weights=wanted.options.checkpoint_type,
        source=wanted.evaluator.source,
        output=f"{beside or state}.files",
        samples=f"{beside}.samples.jsonl" if beside else None,
        progress=str(state),
        is_ambiguous=raw and wanted.options.checkpoint_type != "regular",
    )


def _state(key: str, behind: contextlib.ExitStack) -> Path:
    """The folder of the unfinished state of this command, for it alone; beside it lies what its evaluator may write for itself.

    Raises:
        StateError: the same command runs already.
    """
    folder = private_directory(state_directory() / "progress")
    _forget_old(folder)
    lock = folder / f"{key}.lock"
    while True:
        descriptor = lock_file(lock)
        if not try_lock(descriptor, lock):
            os.close(descriptor)
            raise StateError("this very evaluation runs already; wait for it, or end it")
        if is_open_as(descriptor, lock):
            break
        os.close(descriptor)
    behind.callback(os.close, descriptor)
    behind.callback(lock.unlink, missing_ok=True)
    behind.callback(_remove_own_files, folder, key)
    behind.callback(child.end_descendants)
    return folder / key


def _remove_own_files(folder: Path, key: str) -> None:
    """Removes what the evaluator wrote for itself, unless its unfinished state may tell of that."""
    if not progress.has_progress(folder / key):
        shutil.rmtree(folder / f"{key}.files", ignore_errors=True)


def _forget_old(folder: Path) -> None:
    for entry in folder.iterdir():
        with contextlib.suppress(OSError):
            if time.time() - entry.lstat().st_mtime > KEPT and not is_locked(folder / f"{entry.name.partition('.')[0]}.lock"):
                progress.remove(entry)


def _record(wanted: _Wanted, outcome: Outcome, stations: _Stations, started: str) -> Record:
    evaluator, position = wanted.evaluator, wanted.checkpoint.position
    record = Record(
        checkpoint=wanted.checkpoint.path,
        format=wanted.checkpoint.format,
        step=position.step,
        epoch=position.epoch,
        tokens=position.tokens,
        identity=str(wanted.seen.identity),
        signature=wanted.seen.signature,
        weights=wanted.options.checkpoint_type,
        evaluator={
            "name": evaluator.name,
            "reference": str(evaluator.reference),
            "source": evaluator.source,
            "arguments": evaluator.arguments,
        },
        status="finished",
        attempts=1,
        started=started,
        ended=now_utc(),
        seconds=stations.seconds,
        host=host_name(),
        gpus=list(visible_gpus(os.environ)),
        versions=installed_versions(),
        merged=stations.merged,
    )
    notes = (stations.merged or {}).get("notes", []) + outcome.notes
    return replace(record, metrics=outcome.metrics, notes=notes, details=outcome.details)


def _show(record: Record) -> None:
    for note in record.notes[len((record.merged or {}).get("notes", [])) :]:
        _say(f"note: {note}")
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(Text(printable(os.path.basename(record.checkpoint))), overflow="fold")
    table.add_column(Text(record.evaluator["name"]), justify="right")
    for name, value in record.metrics.items():
        table.add_row(Text(printable(name)), "-" if value is None else f"{value:.6g}")
    cli.console().print(table)
    known = {"step": record.step} | ({} if record.tokens is None else {"tokens_seen": record.tokens})
    click.echo(json.dumps(known | {name: value for name, value in record.metrics.items() if name not in known}, allow_nan=False))


def _say(text: str) -> None:
    print(f"assayer: {' '.join(text.split())}", file=sys.stderr)


if __name__ == "__main__":
    cli.run(main, "python -m assayer.evaluate")
