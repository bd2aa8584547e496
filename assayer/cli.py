"""What all commands share: one spelling of flags, one-line errors with an exit code, and the flags that name the Redis."""

import functools
import re
import sys
from collections.abc import Callable
from typing import Any

import click

from assayer import __version__
from assayer.errors import AssayerError

__all__ = ["command", "redis_options", "run"]


def _underscored(token: str) -> str:
    return token.replace("-", "_")


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


version_option = click.version_option(__version__, prog_name="assayer", message="%(prog)s %(version)s")
