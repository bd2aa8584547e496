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
from assayer.worker.workers import EvalWorker, WatchWorker, preload


def main() -> None:
    orders = json.loads(os.environ.pop(ORDERS))
    slot = Slot.from_json(orders["slot"])
    # The locks are this process's life; programs that an evaluation starts must not carry them on.
    for descriptor in orders["locks"]:
        os.set_inheritable(descriptor, False)
    kept_from_children.extend(orders["locks"])
    if orders["parent"]:
        die_with_parent(orders["parent"], signal.SIGTERM)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stdout)
    connection = connect(orders["url"], patience=60, retries=WORKER_RETRIES)
    if slot.kind == "watch":
        watcher = WatchWorker(slot.queue, connection, orders["name"], slot.gpus or ())
        worker: WatchWorker | EvalWorker = watcher
    else:
        preload()
        worker = EvalWorker(slot.queue, connection, orders["name"], slot.gpus or ())
    if orders["supervisor"]:
        worker.on_maintenance = lambda: revive_supervisor(Path(orders["supervisor"]))
    worker.work(with_scheduler=slot.kind == "watch", logging_level="WARNING")


if __name__ == "__main__":
    main()
