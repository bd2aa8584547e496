"""The flags of ``python -m assayer.server``: from words to rules, and whatever is missing is started before the first request."""

import logging
import os
import sys
from pathlib import Path
from typing import Any

import click

from assayer import cli, refs
from assayer.errors import UsageError
from assayer.files import printable, private_directory
from assayer.merge.command import merge_options
from assayer.merge.names import KEY_MAPS, key_map
from assayer.merge.run import size_in_bytes
from assayer.plan import Merging, state_directory
from assayer.queues.connect import open_target, target
from assayer.queues.embedded import Server
from assayer.server.access import is_loopback, read_token
from assayer.server.models import OFFERED, Models, parse_models
from assayer.server.order import Rules
from assayer.server.paths import Roots
from assayer.session import Serving
from assayer.worker.hold import Bounds
from assayer.worker.launch import Crew, eval_slots

__all__ = ["main"]

SECONDS_MAX = 10**8


@cli.command("server")
@click.option("--host", default="127.0.0.1", metavar="ADDRESS", help="Where to listen; any other than loopback needs a token and a root.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8000, metavar="PORT", help="Where to listen; 0: a free port, which is printed."
)
@click.option("--root", "roots", multiple=True, metavar="DIR", help="Folder in which clients may name paths. Repeatable.  [default: any]")
@click.option("--token_file", metavar="FILE", help="File (mode 600) with the token that every client has to send.")
@click.option(
    "--results_dir", metavar="DIR", help="Where records go of jobs without a checkpoint.  [default: server/ in the state directory]"
)
@click.option(
    "--model",
    "models",
    multiple=True,
    metavar="NAME=REF",
    help="Serve this model's name with a function of your own: path/to/file.py:function, or pkg.module.function. Repeatable.",
)
@click.option("--include_path", metavar="DIR", help="A folder of lm-eval tasks of your own (YAML).")
@click.option("--trust_remote_code", is_flag=True, help="Let clients ask for Python code beside a model's config to be run.")
@click.option(
    "--model_arg", "model_args", multiple=True, metavar="NAME", help="Let clients give this argument of a model, too. Repeatable."
)
@click.option(
    "--num_eval_workers",
    type=click.IntRange(min=0),
    metavar="N",
    help="Eval workers on this host, in all; 0: they stand elsewhere.  [default: one a visible GPU, one without GPU]",
)
@click.option("--gpus_per_eval", type=click.IntRange(min=1), default=1, metavar="N", help="GPUs that each evaluation sees.")
@click.option("--timeout", type=click.IntRange(1, SECONDS_MAX), default=86400, metavar="SECONDS", help="Time that one evaluation may take.")
@click.option(
    "--retries", type=click.IntRange(min=0), default=0, metavar="N", help="How often an evaluation that ended badly is tried again."
)
@click.option(
    "--hold",
    type=click.IntRange(min=0),
    default=8,
    metavar="N",
    help="How many waiting checkpoints of a folder are protected from deletion, by hard links below evals/.hold; 0: none.",
)
@click.option(
    "--hold_min_free",
    type=click.FloatRange(0, 100),
    default=10.0,
    metavar="PERCENT",
    help="With less than this part of the file system free, none is protected.",
)
@click.option("--max_queued", type=click.IntRange(min=1), default=10_000, metavar="N", help="With so many jobs waiting, no more are taken.")
@click.option("--until_idle", type=click.FloatRange(min=1), metavar="SECONDS", help="End after this time without a job that waits or runs.")
@click.option(
    "--until_file",
    metavar="PATH",
    help="End when this file exists: evaluate what is left, then free the GPUs. A training makes it at its end.",
)
@merge_options
@click.option(
    "--scratch_dir", metavar="DIR", help="Where merged checkpoints lie while they are evaluated.  [default: the workers' $TMPDIR]"
)
@click.option("--scratch_bytes", metavar="SIZE", help="How much they may take there, such as 200GB.  [default: what the disk holds]")
@cli.redis_options
def main(
    host: str,
    port: int,
    roots: tuple[str, ...],
    token_file: str | None,
    models: tuple[str, ...],
    num_eval_workers: int | None,
    redis_url: str | None,
    redis_host: str | None,
    redis_port: int | None,
    watch_queue_name: str,
    eval_queue_name: str,
    **flags: Any,
) -> None:
    """Serves evaluations to clients that speak the LMMs-Eval protocol, on the queue that the watches use.

    Ctrl-C ends the server at once. What runs is evaluated to its end; what waits stays in the queue for the next server.
    """
    try:
        from assayer.server.desk import Desk
        from assayer.server.serve import BY_SHUTDOWN, Until, bind, leave, serve
    except ImportError as error:
        raise UsageError(f"the server needs {error.name}; install it: pip install 'assayer[server]'") from None
    cwd = Path.cwd()
    state = state_directory()
    if watch_queue_name == eval_queue_name:
        raise UsageError("--watch_queue_name and --eval_queue_name must be two different queues")
    if not is_loopback(host) and not (token_file and roots):
        raise UsageError(f"--host {printable(host)} is open to other machines: give --token_file and --root, too")
    token = read_token(token_file) if token_file else None
    own = parse_models(models, cwd)
    for evaluator in own.values():
        warning = refs.check(evaluator.reference, {}, torch_elsewhere=num_eval_workers == 0, offered=OFFERED)
        if warning:
            _say(f"warning: {warning}")
    chosen = target(redis_url, redis_host, redis_port, state)
    rules = _rules(flags, roots, cwd, state)
    each = int(flags["gpus_per_eval"])
    slots = eval_slots(eval_queue_name, num_eval_workers, chosen.name, os.environ, each)
    if not slots and num_eval_workers != 0:
        raise UsageError(f"fewer than {each} GPUs are visible here; give a smaller --gpus_per_eval, or --num_eval_workers 0")
    listening = bind(host, port)
    shown = f"[{host}]" if ":" in host else host
    url = f"http://{shown}:{listening.getsockname()[1]}"
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", stream=sys.stderr)
    crew = Crew(state, chosen)
    with Serving(state, chosen.name, eval_queue_name, url):
        open_target(chosen, state).close()
        missing = crew.want(slots) if slots else []
        for line in crew.conflicts(slots):
            _say(f"warning: {line}")
        desk = Desk(chosen.url, eval_queue_name, watch_queue_name, Models(own, cwd), rules)

        def ready() -> None:
            click.echo(f"serving {url} ({chosen.name})" + (f", starting workers: {', '.join(s.label for s in missing)}" if missing else ""))
            sys.stdout.flush()

        def care() -> None:
            if slots:
                crew.start_supervisor()
            elif chosen.embedded:
                Server(state).start()

        until = Until(flags["until_idle"], None if flags["until_file"] is None else _absolute(flags["until_file"], cwd))
        why = serve(desk, listening, token, state, ready, care, [eval_queue_name], until)
    if why is not None:
        _say(f"ended: {why}")
    if why != BY_SHUTDOWN and not crew.has_plans() and crew.is_staffed():
        # They end after the running evaluation, and nobody waits for that here.
        crew.stop("warm")
    leave()


def _rules(flags: dict[str, Any], roots: tuple[str, ...], cwd: Path, state: Path) -> Rules:
    """What the flags decide.

    Raises:
        UsageError: a path is not there, or a size is none.
    """
    folders = tuple(_folder("root", root, cwd) for root in roots)
    include = flags["include_path"]
    results = private_directory(state / "server") if flags["results_dir"] is None else _made(_absolute(flags["results_dir"], cwd))
    return Rules(
        roots=Roots(folders),
        results_dir=str(results),
        trust_remote_code=flags["trust_remote_code"],
        model_args=frozenset(flags["model_args"]),
        include_path=None if include is None else _folder("include_path", include, cwd),
        timeout=flags["timeout"],
        retries=flags["retries"],
        gpus_per_eval=flags["gpus_per_eval"],
        queue_max=flags["max_queued"],
        bounds=Bounds(flags["hold"], None, flags["hold_min_free"] / 100),
        merging=_merging(flags, cwd),
    )


def _merging(flags: dict[str, Any], cwd: Path) -> Merging:
    found: dict[str, Any] = {}
    for name in ("hf_config", "tokenizer", "scratch_dir"):
        found[name] = None if flags[name] is None else _absolute(flags[name], cwd)
        if found[name] is not None and not os.path.exists(found[name]):
            raise UsageError(f"--{name} {printable(found[name])} is not there; correct the path")
    rules = flags["key_map"]
    if rules is not None and rules not in KEY_MAPS:
        rules = _absolute(rules, cwd)
    key_map(rules)
    size = None if flags["scratch_bytes"] is None else size_in_bytes(flags["scratch_bytes"])
    return Merging(dtype=flags["dtype"], key_map=rules, scratch_bytes=size, **found)


def _absolute(path: str, cwd: Path) -> str:
    return os.path.normpath(os.path.join(cwd, os.path.expanduser(path)))


def _folder(flag: str, path: str, cwd: Path) -> str:
    found = _absolute(path, cwd)
    if not path or not os.path.isdir(found):
        raise UsageError(f"--{flag} {printable(found)} is no directory; correct the path")
    return found


def _made(path: str) -> Path:
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--results_dir {printable(path)} cannot be made: {error.strerror}") from None
    return Path(path)


def _say(text: str) -> None:
    click.echo(f"assayer: {printable(text)}", err=True)
