"""One worker process, as ``launch`` starts it: ``python -m assayer.worker.process`` with its orders in ``ASSAYER_WORKER``."""

import json
import logging
import os
import signal
import sys
from pathlib import Path

from assayer.queues.connect import WORKER_RETRIES, connect
from assayer.worker.child import die_with_parent, kept_from_children
from assayer.worker.launch import ORDERS, Slot, revive_supervisor
from assayer.worker.warm import preload
from assayer.worker.workers import EvalWorker, WatchWorker


def main() -> None:
    orders = json.loads(os.environ.pop(ORDERS))
    slot = Slot.from_json(orders["slot"])
    # The locks are this process's life; programs that an evaluation starts must not carry them on.
    for descriptor in orders["locks"]:
        os.set_inheritable(descriptor, False)
    kept_from_children.extend(orders["locks"])
    # Nothing is held yet that would have to go back.
    for number in (signal.SIGINT, *orders["requeue_signals"]):
        signal.signal(number, lambda number, frame: os._exit(0))
    if orders["parent"]:
        die_with_parent(orders["parent"], signal.SIGINT)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stdout)
    connection = connect(orders["url"], patience=60, retries=WORKER_RETRIES)
    if slot.kind == "watch":
        watcher = WatchWorker(slot.queue, connection, orders["name"], slot.gpus or (), tuple(orders["requeue_signals"]))
        worker: WatchWorker | EvalWorker = watcher
    else:
        preload()
        worker = EvalWorker(slot.queue, connection, orders["name"], slot.gpus or (), tuple(orders["requeue_signals"]))
    if orders["supervisor"]:
        worker.on_maintenance = lambda: revive_supervisor(Path(orders["supervisor"]))
    worker.work(with_scheduler=slot.kind == "watch", logging_level="WARNING")
    # RQ returns after an error, too.
    sys.exit(0 if worker.was_told_to_leave else 1)


if __name__ == "__main__":
    main()
