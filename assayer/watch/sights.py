"""What one watch has on the board: all that is under way, and of what is settled the last checkpoints."""

from typing import Any

from assayer.queues.board import Board
from assayer.watch.look import Look

__all__ = ["Sights"]

# How many settled checkpoints of each kind stay in sight; the others are counted.
SETTLED_MAX = {"skipped": 50, "good": 200, "bad": 200}

_UNDER_WAY = ("queued", "writing", "failing", "due")


class Sights:
    """The board as this process has left it, so that only changes are sent."""

    def __init__(self) -> None:
        self.active: dict[str, dict[str, Any]] = {}
        self._settled: dict[str, dict[str, dict[str, Any]]] = {kind: {} for kind in SETTLED_MAX}
        self._left_out = 0
        self._is_read = False
        # What has come to metrics since the look before.
        self.finished: list[str] = []

    def publish(self, board: Board, plan_id: str, states: dict[str, dict[str, Any]], look: Look) -> bool:
        """Brings the board up to date; True when a checkpoint has come, gone or changed its state."""
        if look.is_anew or not self._is_read:
            self._read(board, plan_id)
        self.finished = []
        if not states and not self.active:
            return False
        before = {**self.active, **{path: sight for kept in self._settled.values() for path, sight in kept.items()}}
        active = {path: sight for path, sight in states.items() if sight["state"] in _UNDER_WAY}
        # While the directory cannot be read, nothing is known to be gone. A settled one stays in sight after rotation took it.
        lost = set() if look.missing else self.active.keys() - states.keys()
        self.active = {**({path: sight for path, sight in self.active.items() if path not in states} if look.missing else {}), **active}
        settled = {path: sight for path, sight in states.items() if path not in active}
        for kept in self._settled.values():
            for path in kept.keys() & states.keys():
                del kept[path]
        for path, sight in sorted(settled.items(), key=lambda item: item[1].get("ended") or 0.0):
            self._settled[_kind(sight)][path] = sight
        for kind, kept in self._settled.items():
            for path in list(kept)[: max(0, len(kept) - SETTLED_MAX[kind])]:
                del kept[path]
                self._left_out += 1
                lost.add(path)
        now = {**self.active, **{path: sight for kept in self._settled.values() for path, sight in kept.items()}}
        changed = {path: sight for path, sight in now.items() if before.get(path) != sight}
        gone = [path for path in lost if path in before]
        # Also what is out of sight already: more may have finished within one look than stays in it.
        self.finished = [path for path, sight in settled.items() if sight["state"] == "finished" and _is_new(sight, before.get(path))]
        board.publish(plan_id, changed, gone, self._left_out)
        return bool(gone) or any(before.get(path, {}).get("state") != sight["state"] for path, sight in changed.items())

    def _read(self, board: Board, plan_id: str) -> None:
        """Takes over what an earlier process has left there."""
        self.active, self._settled, self._left_out, self._is_read = {}, {kind: {} for kind in SETTLED_MAX}, 0, True
        for path, sight in board.sights(plan_id).items():
            if sight["state"] in _UNDER_WAY:
                self.active[path] = sight
            else:
                self._settled[_kind(sight)][path] = sight


def _is_new(sight: dict[str, Any], before: dict[str, Any] | None) -> bool:
    return before is None or before["state"] != "finished" or before.get("ended") != sight.get("ended")


def _kind(sight: dict[str, Any]) -> str:
    if sight["state"] == "skipped":
        return "skipped"
    return "bad" if sight["state"] in ("failed", "timeout") else "good"
