"""What is queued, running, done and failed, and why a checkpoint is not ready: ``python -m assayer.status``."""

import json
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import redis
from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from assayer import cli
from assayer.files import locked, printable
from assayer.plan import Plan, PlanStore, state_directory
from assayer.queues import Connection
from assayer.queues.board import Board
from assayer.queues.connect import Target, open_running, target
from assayer.queues.embedded import Server, other_hosts
from assayer.queues.enqueue import open_queue
from assayer.queues.recover import is_dead, our_workers
from assayer.session import servers
from assayer.watch.explain import explain as explained
from assayer.watch.show import BAD, Row, View, Watched, table_of
from assayer.worker.launch import Crew
from assayer.worker.supervise import retire_redis

__all__ = ["main"]

# Seconds between two looks of --watch.
STEP = 1.0


@cli.command("status")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--explain", metavar="PATH", help="Say of one path what it is, what is missing, and what happens next.")
@click.option("--watch", "live", is_flag=True, help="Keep showing, until Ctrl-C.")
@cli.redis_options
def main(
    as_json: bool,
    explain: str | None,
    live: bool,
    redis_url: str | None,
    redis_host: str | None,
    redis_port: int | None,
    watch_queue_name: str,
    eval_queue_name: str,
) -> None:
    """Shows watches, checkpoints, queues, workers and failures. Exit code 0, or 1 when an evaluation of a running watch failed."""
    state = state_directory()
    chosen = target(redis_url, redis_host, redis_port, state)
    queues = [watch_queue_name, eval_queue_name]
    console = cli.console()
    was_running = Server(state).is_running()
    connection = open_running(chosen, state)
    if explain is not None:
        path = os.path.abspath(os.path.expanduser(explain))
        told_of = explained(path, _plans(connection, state, chosen, watch_queue_name), PlanStore(state), connection)
        if as_json:
            click.echo(json.dumps(told_of.to_json(), indent=1))
        else:
            console.print(_explained(told_of.lines()))
        return
    if live and connection is not None:
        with Live(console=console, auto_refresh=False, screen=console.is_terminal) as screen:
            while True:
                try:
                    told = gather(connection, state, chosen, queues)
                    tables = max(1, sum(watch["state"] != "ended" for watch in told["watches"]))
                    shown = _shown(told, limit=max(3, (console.height - 14 - len(told["workers"])) // tables - 4))
                except redis.RedisError as error:
                    shown = Group(Text(f"{chosen.name} does not answer ({error}); waiting"))
                screen.update(shown, refresh=True)
                time.sleep(STEP)
    try:
        told = gather(connection, state, chosen, queues)
    except redis.RedisError:
        if not chosen.embedded or Server(state).is_running():
            raise
        # It ended under this look, as it does behind the last worker.
        connection = None
        told = gather(connection, state, chosen, queues)
    if connection is not None and chosen.embedded and not was_running:
        # It was started for this look alone.
        crew = Crew(state, chosen)
        with locked(crew.gate):
            retire_redis(crew)
    if as_json:
        click.echo(json.dumps(told, indent=1))
    else:
        console.print(_shown(told))
    if told["failed"]:
        raise SystemExit(1)


def gather(connection: Connection | None, state: Path, chosen: Target, queues: list[str]) -> dict[str, Any]:
    """Everything that status tells, as JSON."""
    plans = _plans(connection, state, chosen, queues[0])
    shown = View(connection).watched(plans) if connection is not None else [Watched([], "", 0) for _ in plans]
    watches = [_watch(connection, plan, one) for plan, one in zip(plans, shown, strict=True)]
    told: dict[str, Any] = {"redis": chosen.name, "running": connection is not None, "watches": watches}
    told["servers"] = servers(state, chosen.name)
    told["queues"] = {name: _lengths(connection, name) for name in queues} if connection is not None else {}
    told["workers"] = _workers(connection, queues) if connection is not None else []
    problems = connection.hgetall("assayer:problems") if connection is not None else {}
    told["problems"] = [p.decode(errors="replace") for p in problems.values() if p]
    told["problems"] += list(PlanStore(state).unreadable())
    if connection is None:
        told["problems"] += [f"an embedded Redis has data on host {host}: look there, or give --redis_url" for host in other_hosts(state)]
    looks = any(worker["queue"] == queues[0] and worker["state"] != "dead" for worker in told["workers"])
    if any(watch["state"] == "running" for watch in watches) and not looks:
        told["problems"].append("no watch worker lives: nobody looks for checkpoints; give a watch command again, or assayer.shutdown")
    waits = any(told["queues"][name]["queued"] for name in told["queues"] if name != queues[0])
    if waits and not any(worker["queue"] == queues[1] and worker["state"] != "dead" for worker in told["workers"]):
        told["problems"].append("no eval worker lives: nothing that waits is evaluated; start one with assayer.worker")
    failures = [c for w in watches if w["state"] != "ended" for c in w["checkpoints"] if c["state"] in BAD]
    told["failed"] = [{key: c[key] for key in ("path", "evaluator", "state", "error", "reason", "log")} for c in failures]
    return told


def _plans(connection: Connection | None, state: Path, chosen: Target, queue: str) -> list[Plan]:
    """The plans that run, from Redis; and those of this host that are on disk alone: ended, or not published yet."""
    running = {p.id: p for p in Board(connection, queue).plans()} if connection is not None else {}
    stored = {p.id: p for p in PlanStore(state).all() if p.redis == chosen.name and p.watch_queue == queue}
    return sorted({**stored, **running}.values(), key=lambda plan: (plan.directory, plan.label))


def _watch(connection: Connection | None, plan: Plan, shown: Watched) -> dict[str, Any]:
    board = Board(connection, plan.watch_queue) if connection is not None else None
    tick = board.tick(plan.id) if board else {"problem": ""}
    active = board.has(plan.id) if board else False
    return {
        "directory": plan.directory,
        "evaluator": plan.label,
        "reference": str(plan.evaluator.reference),
        "state": "running" if active else "starting" if plan.active else "ended",
        "polling_interval": plan.polling_interval,
        "last_look": tick.get("last"),
        "next_look": tick.get("next") if active else None,
        "problem": tick["problem"] if active else "",
        "there_before": plan.there_before,
        "left_out": shown.left_out,
        "checkpoints": [asdict(row) for row in shown.rows],
    }


def _lengths(connection: Connection, name: str) -> dict[str, int]:
    queue = open_queue(connection, name)
    started = queue.started_job_registry.get_job_count(cleanup=False)
    return {"queued": queue.count, "started": started, "scheduled": queue.scheduled_job_registry.get_job_count(cleanup=False)}


def _workers(connection: Connection, queues: list[str]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for worker in our_workers(connection, queues):
        job = worker.pop("current_job")
        if is_dead(worker):
            worker["state"] = "dead"
        description = connection.hget(f"rq:job:{job}", "description") if job else None
        found.append({**worker, "job": description.decode(errors="replace") if description else None})
    return found


def _shown(told: dict[str, Any], limit: int | None = None) -> Group:
    parts: list[Any] = [Text(f"Redis: {told['redis']}" + ("" if told["running"] else " (does not run: nothing is watched, nothing waits)"))]
    parts += [Text(f"server: {printable(str(server['url']))}, pid {server['pid']}") for server in told["servers"]]
    if told["queues"]:
        lengths = {n: f"{q['queued']} queued, {q['started']} started, {q['scheduled']} scheduled" for n, q in told["queues"].items()}
        parts.append(_two_columns("queue", lengths))
    if told["workers"]:
        parts.append(_two_columns("worker", {w["name"]: _doing(w) for w in told["workers"]}))
    now = time.time()
    for watch in told["watches"]:
        name = f"{printable(watch['directory'])} with {watch['evaluator']}"
        if watch["state"] == "ended":
            # Its results are in its records; the whole of what was last seen is in --json.
            parts.append(Text(f"\n{name}: ended", style="dim"))
            continue
        when = f", next look in {max(0.0, watch['next_look'] - now):.0f} s" if watch["next_look"] is not None else ""
        parts.append(Text(f"\n{name}: {watch['state']}{when}", style="bold"))
        if watch["problem"]:
            parts.append(Text(f"  {printable(watch['problem'])}", style="yellow"))
        if watch["checkpoints"] or watch["there_before"]:
            rows = [Row(**c) for c in watch["checkpoints"]]
            parts.append(table_of(rows, limit=limit, there_before=watch["there_before"], left_out=watch["left_out"]))
    parts += [Text(printable(problem), style="yellow") for problem in told["problems"]]
    if told["failed"]:
        parts.append(Text(f"\n{len(told['failed'])} failed", style="red"))
    return Group(*parts)


def _doing(worker: dict[str, Any]) -> str:
    gpus = f"gpu {worker['gpus']}, " if worker["gpus"] else ""
    doing = "dead" if worker["state"] == "dead" else worker["job"] or worker["state"] or "starting"
    return f"{gpus}{worker['hostname']}, pid {worker['pid']}: {doing}"


def _explained(lines: list[tuple[str, str]]) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for heading, text in lines:
        table.add_row(Text(heading), Text(text))
    return table


def _two_columns(heading: str, rows: dict[str, str]) -> Group:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(heading, overflow="fold")
    table.add_column("", overflow="fold")
    for name, text in rows.items():
        table.add_row(Text(printable(name)), Text(printable(text)))
    return Group(Text(""), table)


if __name__ == "__main__":
    cli.run(main, "python -m assayer.status")
