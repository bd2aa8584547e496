"""The flags of ``python -m assayer.results``."""

import sys
from pathlib import Path

import click

from assayer import cli
from assayer.errors import UsageError
from assayer.files import printable
from assayer.publication import publish
from assayer.results.find import find_records
from assayer.tracking import check

__all__ = ["main"]


@click.group("results", context_settings=dict(cli.SETTINGS))
def main() -> None:
    """Shows and publishes what the records hold."""


@main.command("publish", context_settings=dict(cli.SETTINGS))
@click.argument("directories", nargs=-1, required=True, metavar="DIRECTORY...")
@click.option(
    "--track",
    "tracks",
    multiple=True,
    required=True,
    metavar="TRACKER",
    help="tensorboard[:logdir], wandb:project=...[,run=...], mlflow:uri=...[,run=...], or my.py:function; repeatable.",
)
@click.option(
    "--evaluator", "evaluators", multiple=True, metavar="NAME", help="Only results of this evaluator; repeatable.  [default: all]"
)
@click.option("--again", is_flag=True, help="Also publish later evaluations of weights that have a point: they get a second one.")
def publish_command(directories: tuple[str, ...], tracks: tuple[str, ...], evaluators: tuple[str, ...], again: bool) -> None:
    """Gives trackers what they lack of the records below DIRECTORY, one point each: to repair, or to fill in what was before.

    DIRECTORY is a directory of runs, a run, a results folder, or a record. Exit code 1 when a tracker did not take everything.
    """
    cwd = Path.cwd()
    targets = [check(text, cwd) for text in tracks]
    paths = list(dict.fromkeys(path for directory in directories for path in find_records(cwd / directory)))
    if evaluators:
        present = {path.parent.name for path in paths}
        if absent := [name for name in evaluators if name not in present]:
            raise UsageError(f"no results of {printable(absent[0])}; there are some of {printable(', '.join(sorted(present))) or 'none'}")
        paths = [path for path in paths if path.parent.name in evaluators]
    failed = False
    for target in targets:
        done = publish(paths, target, again)
        for reason, given in done.without.items():
            click.echo(f"assayer: note: {len(given)} give no point, such as {printable(str(given[0]))}: {reason}", err=True)
        for line in done.notes:
            click.echo(f"assayer: note: {line}", err=True)
        for line in done.errors:
            click.echo(f"assayer: error: {line}", err=True)
        failed = failed or bool(done.errors)
        click.echo(f"{printable(str(target))}: {done.published} published, {done.present} there already, of {len(paths)} records")
    if failed:
        sys.exit(1)
