"""``assayer watch ...`` is ``python -m assayer.watch ...``, and so for every command."""

import importlib

import click

from assayer import cli

COMMANDS = {
    "watch": "assayer.watch.command",
    "worker": "assayer.worker.command",
    "merge": "assayer.merge.command",
    "evaluate": "assayer.evaluate",
    "results": "assayer.results.command",
    "server": "assayer.server.command",
    "status": "assayer.status",
    "shutdown": "assayer.shutdown",
}


class _Commands(click.Group):
    """Imports a command only when it is asked for, so that ``--version`` and completion stay fast."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        module = COMMANDS.get(cmd_name)
        return importlib.import_module(module).main if module else None


@cli.version_option
@click.group(cls=_Commands, context_settings=dict(cli.SETTINGS))
def group() -> None:
    """Evaluates every checkpoint of a training run while training goes on."""


def main() -> None:
    cli.run(group, "assayer")


if __name__ == "__main__":
    main()
