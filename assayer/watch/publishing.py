"""From the records of watches to their trackers, in a thread beside the ticks, so that no look waits for a tracker that is slow or away."""

import contextlib
import glob
import logging
import queue
import re
import threading
from collections.abc import Iterable
from pathlib import Path

from assayer.errors import UsageError
from assayer.files import printable
from assayer.plan import Plan
from assayer.record import Place
from assayer.results.find import find_records
from assayer.tracking import Target, publish_records
from assayer.watch.look import directories_of

__all__ = ["Publisher"]

logger = logging.getLogger(__name__)


class Publisher:
    """Publishes what has a record: of a watch that this process meets for the first time all of it, then what is new.

    A record that a tracker has is no second point there (``assayer.ledger``), so what was broken off is simply begun again.
    """

    def __init__(self) -> None:
        self._orders: queue.SimpleQueue[tuple[Plan, list[str] | None]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._waiting: dict[str, int] = {}
        self._problems: dict[str, str] = {}
        # Watches by id, as they were given: one that is given again may have other trackers.
        self._met: dict[str, float] = {}
        self._thread: threading.Thread | None = None

    def keep_up(self, plan: Plan, finished: Iterable[str]) -> None:
        """Orders what this watch's trackers lack: ``finished`` are the paths of checkpoints that have a record since the last look."""
        if not plan.track:
            return
        new = list(finished)
        if self._met.get(plan.id) != plan.given:
            self._met[plan.id] = plan.given
            self._order(plan, None)
        elif new:
            self._order(plan, new)

    def is_busy(self, plan: Plan) -> bool:
        """True while something of this watch's is to be published; never for ever, since each publication has a time limit."""
        return self._waiting.get(plan.id, 0) > 0

    def problem(self, plan: Plan) -> str:
        """What did not go well in the last publication; empty when all is well."""
        return self._problems.get(plan.id, "") if plan.track else ""

    def _order(self, plan: Plan, checkpoints: list[str] | None) -> None:
        with self._lock:
            self._waiting[plan.id] = self._waiting.get(plan.id, 0) + 1
        self._orders.put((plan, checkpoints))
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, daemon=True, name="publisher")
            self._thread.start()

    def _run(self) -> None:
        while True:
            plan, checkpoints = self._orders.get()
            try:
                self._problems[plan.id] = "; ".join(_publish(plan, checkpoints))
            except Exception as error:
                # A bug that one watch's records meet must not keep the others from their trackers.
                logger.exception("publishing the records of %s failed", printable(plan.directory))
                self._problems[plan.id] = f"its records could not be published: {type(error).__name__}: {error}"
            finally:
                with self._lock:
                    self._waiting[plan.id] -= 1


def _publish(plan: Plan, checkpoints: list[str] | None) -> list[str]:
    paths = _all_records(plan) if checkpoints is None else _records_of(plan, checkpoints)
    return publish_records(paths, [Target.from_json(told) for told in plan.track]) if paths else []


def _all_records(plan: Plan) -> list[Path]:
    found: list[Path] = []
    for place in [plan.results_dir] if plan.results_dir else directories_of(plan):
        # There may be no record yet.
        with contextlib.suppress(UsageError):
            found += [path for path in find_records(Path(place)) if path.parent.name == plan.evaluator.name]
    return found


def _records_of(plan: Plan, checkpoints: list[str]) -> list[Path]:
    """The records under these checkpoints' names, also those of other weights that the names stood for before."""
    found: list[Path] = []
    # What was saved before under a name stands on the board as <path>@<8 digits>.
    for checkpoint in [name for path in checkpoints for name in (path, re.sub("@[0-9a-f]{8}$", "", path))]:
        place = Place.of(checkpoint, plan.evaluator.name, plan.results_dir, plan.weights)
        found += [place.record, *place.folder.glob(f"{glob.escape(place.name)}@*.json")]
    return [path for path in dict.fromkeys(found) if path.is_file()]
