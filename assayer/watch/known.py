"""The running plans of one watch queue with their baselines, read again only when they were given anew."""

import os

from assayer.plan import Baseline, Plan
from assayer.queues import Connection
from assayer.queues.board import Board
from assayer.queues.enqueue import is_wanted
from assayer.watch.protect import Neighbours

__all__ = ["Known"]


class Known:
    """What this process knows of the plans of a queue, by id."""

    def __init__(self) -> None:
        self.plans: dict[str, tuple[Plan, Baseline]] = {}
        self._below: dict[str, list[str]] = {}

    def refresh(self, board: Board) -> None:
        """Brings the plans up to date: one request while nothing has changed."""
        given = board.given()
        for plan_id in self.plans.keys() - given.keys():
            del self.plans[plan_id]
        changed = [plan_id for plan_id, moment in given.items() if not self._is_known(plan_id, moment)]
        for plan in board.plans(changed) if changed else []:
            baseline = board.baseline(plan)
            if baseline is not None:
                self.plans[plan.id] = (plan, baseline)
        self._below = {}
        for plan_id, (plan, _) in self.plans.items():
            self._below.setdefault(plan.root, []).append(plan_id)

    def _is_known(self, plan_id: str, given: float) -> bool:
        return plan_id in self.plans and self.plans[plan_id][0].given == given

    def is_current(self, plan: Plan) -> bool:
        """False when the watch was stopped or given anew since ``plan`` was read."""
        return self._is_known(plan.id, plan.given)

    def neighbours(self, connection: Connection) -> Neighbours:
        """What the watches make of a checkpoint, for those who ask from a thread of their own."""
        plans, below = dict(self.plans), self._below

        def of(path: str) -> list[tuple[Plan, Baseline]]:
            found, folder = [], path
            while True:
                found += [plans[plan_id] for plan_id in below.get(folder, []) if plan_id in plans]
                if folder == os.path.dirname(folder):
                    return found
                folder = os.path.dirname(folder)

        return Neighbours(of, lambda key: is_wanted(connection, key))
