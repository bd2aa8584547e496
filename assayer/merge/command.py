"""The flags of ``python -m assayer.merge``, its progress, and its last line."""

import functools
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from assayer import cli, formats
from assayer.containers import VARIANTS
from assayer.errors import CheckpointError, UsageError
from assayer.files import printable
from assayer.merge.output import default_output
from assayer.merge.run import (
    DTYPE_WORDS,
    READERS,
    SHARD_SIZE,
    Merged,
    Options,
    find_checkpoint,
    prepare,
    refuse_output,
    run,
    size_in_bytes,
)
from assayer.merge.writer import layout

__all__ = ["main", "merge_options"]

# What LMMs-Engine's merger calls kinds of models; the config tells that here.
_GENERAL_TYPES = ("causal_lm", "masked_lm", "image_text_to_text", "general")


def merge_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the flags that say how a checkpoint is merged, the same for every command that merges."""
    options = [
        click.option("--dtype", type=click.Choice(DTYPE_WORDS), default="keep", help="Cast floating-point tensors; integers never."),
        click.option("--hf_config", metavar="DIR_OR_FILE", help="Hugging Face config.  [default: the checkpoint's or its run's]"),
        click.option("--tokenizer", metavar="DIR", help="Directory of tokenizer files.  [default: the checkpoint's or its run's]"),
        click.option(
            "--key_map",
            metavar="FILE|NAME",
            help="Other names for tensors: kempnerforge, torchtitan-llama3, or a JSON file of pairs [regular expression, replacement].",
        ),
    ]
    return functools.reduce(lambda decorated, option: option(decorated), reversed(options), function)


class _Commands(click.Group):
    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args[0] not in self.commands:
            raise UsageError(f"{printable(args[0])} is no command of merge; a checkpoint is given with --checkpoint_path")
        return super().resolve_command(ctx, args)


@click.group("merge", cls=_Commands, invoke_without_command=True, context_settings=dict(cli.SETTINGS))
@click.option("--checkpoint_path", metavar="PATH", help="A checkpoint, or a directory of checkpoints: then its newest whole one.")
@click.option("--output_path", metavar="DIR", help="Where the result goes.  [default: merged/<name> beside the checkpoints]")
@click.option("--checkpoint_type", type=click.Choice([*VARIANTS, "both"]), default="regular", help="Which weights.")
@merge_options
@click.option("--max_shard_size", default=SHARD_SIZE, metavar="SIZE", help="Largest file, such as 5GB, 500MB or 2GiB.")
@click.option("--verify/--no_verify", default=True, help="Compare the CRC32 of every tensor that has one.")
@click.option(
    "--check_model/--no_check_model", default=False, help="Compare names and shapes with the config's model (imports transformers)."
)
@click.option("--threads", type=click.IntRange(min=0), default=0, metavar="N", help="Threads that copy; 0: one a processor, eight at most.")
@click.option(
    "--reader", type=click.Choice(READERS), default="assayer", help="torch: what only torch's own reader reads, in a limited child."
)
@click.option(
    "--model_general_type", type=click.Choice(_GENERAL_TYPES), help="Accepted and not needed: the config tells the model's class."
)
@click.option("--dry_run", is_flag=True, help="Say what would be written; write nothing.")
@click.pass_context
def main(
    context: click.Context,
    /,
    checkpoint_path: str | None,
    output_path: str | None,
    checkpoint_type: str,
    model_general_type: str | None,
    dry_run: bool,
    **flags: Any,
) -> None:
    """Merges a checkpoint of any trainer's into a Hugging Face safetensors directory.

    Only its model's bytes are read, no pickle is run, and the output is complete under its name or not there.
    """
    if context.invoked_subcommand:
        return
    if not checkpoint_path:
        raise UsageError("--checkpoint_path is missing: give a checkpoint, or a directory of checkpoints")
    size_in_bytes(flags["max_shard_size"])
    found = find_checkpoint(Path(checkpoint_path))
    variants = VARIANTS if checkpoint_type == "both" else (checkpoint_type,)
    held = formats.of(found.checkpoint).variants(found.listing) if checkpoint_type == "both" else variants
    absent = [variant for variant in variants if variant not in held]
    if absent:
        raise CheckpointError(f"{printable(found.checkpoint.path)} holds no {absent[0]} weights; give --checkpoint_type {held[0]}")
    for variant in variants:
        output = Path(output_path).absolute() if output_path else default_output(found, variant)
        if output_path and checkpoint_type == "both" and variant == "ema":
            output = output.with_name(f"{output.name}-ema")
        options = Options(checkpoint_type=variant, **flags)
        if dry_run:
            _show_plan(options, output, found)
            continue
        with progress() as (started, advance):
            done = run(found, output, options, started, advance)
        _report(done)


@main.command("mean", context_settings=dict(cli.SETTINGS))
@click.argument("checkpoints", nargs=-1, required=True, metavar="CKPT...")
@click.option("--output_path", required=True, metavar="DIR", help="Where the result goes.")
@click.option("--weights", metavar="W,W,...", help="One number for each checkpoint.  [default: all the same]")
@merge_options
@click.option("--max_shard_size", default=SHARD_SIZE, metavar="SIZE", help="Largest file, such as 5GB, 500MB or 2GiB.")
@click.option("--verify/--no_verify", default=True, help="Compare the CRC32 of every tensor that has one.")
def mean_command(checkpoints: tuple[str, ...], output_path: str, weights: str | None, **flags: Any) -> None:
    """Averages checkpoints of one model, in float32, one tensor at a time; sharded ones are read as they lie there."""
    from assayer.merge.mean import mean, parse_weights

    with progress() as (started, advance):
        done = mean(
            [find_checkpoint(Path(path)) for path in checkpoints],
            Path(output_path).absolute(),
            parse_weights(weights, len(checkpoints)),
            Options(**flags),
            started,
            advance,
        )
    _report(done)


def _show_plan(options: Options, output: Path, found: Any) -> None:
    refuse_output(found, output)
    plan = prepare(found, options)
    files = layout(plan.wanted, size_in_bytes(options.max_shard_size))
    click.echo(f"{printable(found.checkpoint.path)} ({found.checkpoint.format}, {options.checkpoint_type}) -> {printable(str(output))}")
    for target in sorted(plan.wanted, key=lambda t: t.name):
        source = target.source
        cast = f" from {source.dtype.torch}" if source.dtype is not target.dtype else ""
        click.echo(f"  {printable(target.name)}  {target.dtype.torch}{cast}  {list(target.shape)}  {len(source.pieces)} pieces")
    beside = ", ".join(sorted(plan.around.files)) or "nothing"
    click.echo(f"{len(plan.wanted)} tensors, {plan.nbytes} bytes in {_files(len(files))}; beside: {beside}")

    for note in plan.notes:
        click.echo(f"note: {note}")


def _files(count: int) -> str:
    return "1 file" if count == 1 else f"{count} files"


def _report(done: Merged) -> None:
    for note in done.notes:
        click.echo(f"assayer: note: {note}", err=True)
    speed = done.weights / 1e9 / done.seconds if done.seconds else 0.0
    held = f"{done.tensors} tensors, {done.weights} bytes in {_files(done.files)}"
    click.echo(f"merged {printable(done.source)} -> {printable(str(done.path))}: {held}, {done.seconds:.2f} s, {speed:.2f} GB/s")


@contextmanager
def progress() -> Iterator[tuple[Callable[[int], None], Callable[[int], None]]]:
    """A bar in bytes on a terminal's standard error; nothing where that is no terminal."""
    if not sys.stderr.isatty():
        yield (lambda total: None), (lambda done: None)
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("merge", total=None)
        lock = threading.Lock()

        def advance(done: int) -> None:
            with lock:
                bar.advance(task, done)

        yield (lambda total: bar.update(task, total=total)), advance
