"""What all commands share: one spelling of flags, one-line errors with an exit code, and the flags that name the Redis."""

import functools
import os
import re
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from assayer import __version__
from assayer.errors import AssayerError

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["command", "console", "redis_options", "run"]


def _underscored(token: str) -> str:
    return token.replace("-", "_")


# Columns of a table that is written into a pipe.
PIPE_WIDTH = 240

SETTINGS = {"token_normalize_func": _underscored, "help_option_names": ["-h", "--help"], "max_content_width": 120, "show_default": True}


def command(name: str) -> Callable[[Callable[..., Any]], click.Command]:
    """A click command whose flags may be spelled with hyphens or underscores."""
    return click.command(name, context_settings=dict(SETTINGS))


def _queue_name(context: click.Context, parameter: click.Parameter, value: str) -> str:
    if not re.fullmatch(r"\w[\w.-]*", value):
        raise click.BadParameter("a queue's name may hold letters, digits, '_', '.' and '-'")
    return value


def redis_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the flags that name the Redis and the two queues."""
    options = [
        click.option(
            "--redis_url",
            metavar="URL",
            help="Redis to connect to: redis://, rediss:// or unix://. Default: ASSAYER_REDIS_URL, "
            "else an embedded server of this user and host, without a TCP port.",
        ),
        click.option("--redis_host", metavar="HOST", help="Redis to connect to, by host; port 6379 unless given."),
        click.option(
            "--redis_port", type=click.IntRange(1, 65535), metavar="PORT", help="Redis to connect to, by port; on localhost unless given."
        ),
        click.option("--watch_queue_name", default="watch", metavar="NAME", callback=_queue_name, help="RQ queue of the watch jobs."),
        click.option("--eval_queue_name", default="evaluation", metavar="NAME", callback=_queue_name, help="RQ queue of the eval jobs."),
    ]
    return functools.reduce(lambda decorated, option: option(decorated), reversed(options), function)


def run(main: click.Command, program: str) -> None:
    """Runs a command to the end of the process; an error that the user can mend is one line on standard error.

    Exit codes: 0; 1 for what went wrong; 2 for words that cannot be carried out; 130 after Ctrl-C. A bug keeps its traceback.
    """
    try:
        code = main.main(prog_name=program, standalone_mode=False)
    except click.exceptions.Exit as error:
        code = error.exit_code
    except click.Abort:
        code = 130
    except click.ClickException as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # click 8.2 and later; click 8.1 shows the help itself
            click.echo(error.format_message(), err=True)
            sys.exit(error.exit_code)
        context = getattr(error, "ctx", None)
        hint = f" (see {context.command_path} --help)" if context else ""
        _say(error.format_message() + hint)
        code = error.exit_code
    except AssayerError as error:
        _say(str(error))
        code = error.exit_code
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:
        # The reader of our output has gone, as with `| head`.
        sys.stderr.close()
        code = 1
    except Exception as error:
        if isinstance(error, OSError):
            _say(f"{error.filename or 'the system'}: {error.strerror or error}")
        elif type(error).__module__.partition(".")[0] == "redis":
            _say(f"the Redis answered no more, or refused: {error}")
        else:
            raise
        code = 1
    sys.exit(code if isinstance(code, int) else 0)


def _say(text: str) -> None:
    print(f"assayer: error: {' '.join(text.split())}", file=sys.stderr)


def console() -> "Console":
    """A console for tables: as wide as the terminal, and on a pipe, where nobody sees the edge, wide enough for a line a row."""
    from rich.console import Console

    found = Console()
    return found if found.is_terminal or "COLUMNS" in os.environ else Console(width=PIPE_WIDTH)


version_option = click.version_option(__version__, prog_name="assayer", message="%(prog)s %(version)s")
