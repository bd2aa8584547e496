"""What all commands share: one spelling of flags, one-line errors with an exit code, and the flags that name the Redis."""

import contextlib
import functools
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from assayer import __version__
from assayer.errors import AssayerError

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["URL_VARIABLE", "command", "console", "ended_once", "hide_passwords", "redis_options", "run", "undisturbed", "without_secrets"]


def _underscored(token: str) -> str:
    return token.replace("-", "_")


# The environment variable that names the Redis; see ``hide_passwords`` for why it is the better place for a password.
URL_VARIABLE = "ASSAYER_REDIS_URL"
_URL_FLAG = "--redis_url"
_OTHER_WAYS = ("--redis_host", "--redis_port")

# What ends a command in the foreground.
_ENDS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

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
            help="Redis to connect to: redis://, rediss:// or unix://; a password in it is better given in ASSAYER_REDIS_URL. "
            "Default: ASSAYER_REDIS_URL, else an embedded server of this user and host, without a TCP port.",
        ),
        click.option("--redis_host", metavar="HOST", help="Redis to connect to, by host; port 6379 unless given."),
        click.option(
            "--redis_port", type=click.IntRange(1, 65535), metavar="PORT", help="Redis to connect to, by port; on localhost unless given."
        ),
        click.option("--watch_queue_name", default="watch", metavar="NAME", callback=_queue_name, help="RQ queue of the watch jobs."),
        click.option("--eval_queue_name", default="evaluation", metavar="NAME", callback=_queue_name, help="RQ queue of the eval jobs."),
    ]
    return functools.reduce(lambda decorated, option: option(decorated), reversed(options), function)


def without_secrets(words: list[str]) -> tuple[list[str], str | None]:
    """These words of a command line without Redis URLs that may hold a password, and the URL that counted, where it was one of those."""
    end = words.index("--") if "--" in words else len(words)
    urls: list[tuple[int, int, str]] = []
    at = 0
    while at < end:
        name, equals, value = words[at].partition("=")
        name, length = name[:2] + _underscored(name[2:]), 1 if equals else 2
        if name in _OTHER_WAYS:
            # Both ways to name a Redis are refused a moment later: a variable would hide that.
            return words, None
        if name == _URL_FLAG and (equals or at + 1 < end):
            urls.append((at, length, value if equals else words[at + 1]))
            at += length
        else:
            at += 1
    secret = [_may_hold_password(url) for _, _, url in urls]
    if not any(secret):
        return words, None
    # Of several, the last one counts; with it in the environment no other may be left on the line.
    gone = {at + i for (at, length, _), hide in zip(urls, secret, strict=True) if hide or secret[-1] for i in range(length)}
    return [word for at, word in enumerate(words) if at not in gone], urls[-1][2] if secret[-1] else None


def _may_hold_password(url: str) -> bool:
    return "@" in url or "password" in url.lower()


def hide_passwords() -> None:
    """Takes a Redis URL with a password out of this process's command line, by starting the process anew without it.

    Every user of the host reads command lines (``ps``, ``/proc/<pid>/cmdline``) as long as a process lives, and a watch may stand in the
    foreground for weeks; its environment is read by its own user alone. Python cannot change the command line that it was started with,
    so the URL goes into ``ASSAYER_REDIS_URL`` and the process executes itself: same pid, same directory, same options of the interpreter.
    The new line holds no such URL, so this happens once.
    """
    given = sys.argv[1:]
    words, url = without_secrets(given)
    before = sys.orig_argv[: len(sys.orig_argv) - len(given)]
    if words == given or [*before, *given] != sys.orig_argv or not sys.executable:
        # Words that a program hands over in sys.argv stand on no command line.
        return
    if url is not None:
        os.environ[URL_VARIABLE] = url
    sys.stdout.flush()
    sys.stderr.flush()
    # The interpreter by its path, not as it was called: by a name alone it would look for its own packages along PATH.
    os.execv(sys.executable, [sys.executable, *before[1:], *words])


def run(main: click.Command, program: str) -> None:
    """Runs a command to the end of the process; an error that the user can mend is one line on standard error.

    Exit codes: 0; 1 for what went wrong; 2 for words that cannot be carried out; 130 after Ctrl-C. A bug keeps its traceback.
    """
    hide_passwords()
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
            # What a server refuses it tells with the name of the user.
            _say("the Redis answered no more, or refused: " + re.sub(r"\b([Uu]ser) \S+ has", r"\1 *** has", str(error)))
        else:
            raise
        code = 1
    sys.exit(code if isinstance(code, int) else 0)


def _say(text: str) -> None:
    print(f"assayer: error: {' '.join(text.split())}", file=sys.stderr)


@contextlib.contextmanager
def ended_once() -> Iterator[None]:
    """Ctrl-C, SIGTERM and a terminal that is closed end the block, once: what clears up behind it is not interrupted again.

    After SIGTERM the exit code is 143, after SIGHUP 129, as a shell counts them.
    """

    def end(number: int, frame: FrameType | None) -> None:
        for other in before:
            signal.signal(other, signal.SIG_IGN)
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

    # What is ignored, as under nohup, is nothing to heed.
    before: dict[int, Callable[..., Any] | int | None] = {
        number: handler for number in _ENDS if (handler := signal.getsignal(number)) != signal.SIG_IGN
    }
    for number in before:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """What would end the block comes when it is over."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def console() -> "Console":
    """A console for tables: as wide as the terminal, and on a pipe, where nobody sees the edge, wide enough for a line a row."""
    from rich.console import Console

    found = Console()
    return found if found.is_terminal or "COLUMNS" in os.environ else Console(width=PIPE_WIDTH)


version_option = click.version_option(__version__, prog_name="assayer", message="%(prog)s %(version)s")
