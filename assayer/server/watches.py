"""Hints from clients for the watches on the same Redis: something new lies in a directory."""

import os
import time

from assayer.plan import Plan
from assayer.queues import Connection, chain
from assayer.queues.board import Board, Note
from assayer.watch.look import directories_of

__all__ = ["hurry"]


def hurry(connection: Connection, queue: str, path: str) -> int:
    """Makes every watch look now whose directory this path is or lies in; how many there are."""
    board = Board(connection, queue)
    real = os.path.realpath(path)
    meant = [plan for plan in board.plans() if any(_has(directory, real) for directory in _directories(plan))]
    if meant:
        board.note([Note(plan.id, next=time.time()) for plan in meant])
        chain.hurry(connection, queue)
    return len(meant)


def _directories(plan: Plan) -> list[str]:
    return [plan.directory, plan.real] if not plan.is_pattern else list(directories_of(plan))


def _has(directory: str, path: str) -> bool:
    return (path + os.sep).startswith(os.path.join(os.path.realpath(directory), ""))
