"""What passes between a training's thread and the thread that talks: memory alone, behind a lock that is never held over anything slow."""

import threading
import time
from dataclasses import dataclass
from typing import Any

__all__ = ["Mailbox", "Order", "Point"]


@dataclass(frozen=True)
class Point:
    """One evaluation's metrics (finite numbers), as they are to be logged; ``step`` is the checkpoint's, not the present one."""

    step: int
    metrics: dict[str, float]
    checkpoint: str
    weights: str
    key: str

    def fields(self) -> dict[str, Any]:
        """The metrics and ``global_step``: what a logger of fields gets."""
        return {**self.metrics, "global_step": self.step}


@dataclass(frozen=True)
class Order:
    """A checkpoint (absolute path) whose weights are to be evaluated."""

    key: str
    checkpoint: str
    step: int
    weights: str
    is_saved: bool = False


class Mailbox:
    """Orders go out, points come in; all that a training's own thread ever touches."""

    def __init__(self) -> None:
        self._changed = threading.Condition(threading.Lock())
        self._orders: list[Order] = []
        self._points: list[Point] = []
        self._handed: list[str] = []
        # What is still out, by its key, in words.
        self._out: dict[str, str] = {}
        # Those of them that the server does not let in.
        self._denied: set[str] = set()
        self._is_loaded = False
        self._unwritten: set[str] = set()
        self._is_closed = False
        self.wake = threading.Event()

    # What the training's thread calls.

    def order(self, orders: list[Order]) -> None:
        """Puts orders in; they count as out from now on."""
        with self._changed:
            self._orders += orders
            self._out |= {o.key: f"{o.checkpoint} ({o.weights}): not submitted yet" for o in orders}
        self.wake.set()

    def take_points(self) -> list[Point]:
        """What has come since the last call, by step; from now on it counts as logged."""
        with self._changed:
            points, self._points = self._points, []
            self._handed += [point.key for point in points]
            self._unwritten |= {point.key for point in points}
        if points:
            self.wake.set()
        return sorted(points, key=lambda p: (p.step, p.weights))

    def out(self) -> list[str]:
        """What is still out, in words."""
        with self._changed:
            return list(self._out.values())

    def wait_idle(self, deadline: float) -> bool:
        """Waits until nothing is out but what the server does not let in, after one more try; False when the deadline (``time.monotonic``)
        came first."""
        with self._changed:
            self._denied.clear()
        return self._wait(lambda: self._is_loaded and self._denied.issuperset(self._out), deadline)

    def wait_written(self, deadline: float) -> bool:
        """Waits until what was handed out is remembered as logged, or cannot be; False when the deadline came first."""
        return self._wait(lambda: not self._unwritten, deadline)

    def _wait(self, condition: Any, deadline: float) -> bool:
        with self._changed:
            return bool(self._changed.wait_for(condition, min(max(0.0, deadline - time.monotonic()), threading.TIMEOUT_MAX)))

    def close(self) -> None:
        """Asks the other thread to end."""
        with self._changed:
            self._is_closed = True
        self.wake.set()

    # What the thread that talks calls.

    @property
    def is_closed(self) -> bool:
        with self._changed:
            return self._is_closed

    @property
    def has_orders(self) -> bool:
        """True while there is an order that nobody has taken."""
        with self._changed:
            return bool(self._orders)

    def take_orders(self) -> tuple[list[Order], list[str]]:
        """New orders, and the keys of the points that were logged since."""
        with self._changed:
            orders, handed = self._orders, self._handed
            self._orders, self._handed = [], []
            return orders, handed

    def loaded(self, out: dict[str, str]) -> None:
        """What an earlier training left is known, and out again."""
        with self._changed:
            self._out |= out
            self._is_loaded = True
            self._changed.notify_all()

    def tell(self, key: str, words: str, is_denied: bool = False) -> None:
        """How something that is out goes."""
        with self._changed:
            self._out[key] = words
            if is_denied:
                self._denied.add(key)
                self._changed.notify_all()
            else:
                self._denied.discard(key)

    def settle(self, key: str, point: Point | None) -> None:
        """Something is not out any more; its point, if there is one, can be taken."""
        with self._changed:
            self._out.pop(key, None)
            self._denied.discard(key)
            if point:
                self._points.append(point)
            self._changed.notify_all()

    def written(self, keys: set[str]) -> None:
        """These are remembered as logged, or it was tried in vain."""
        with self._changed:
            self._unwritten -= keys
            self._changed.notify_all()
