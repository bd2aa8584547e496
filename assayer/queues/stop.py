"""The order to stop, for every supervisor on this Redis, on whatever host."""

from assayer.queues import Connection

__all__ = ["order_to_stop", "stop_orders"]

_KEY = "assayer:stop"


def order_to_stop(connection: Connection, how: str) -> None:
    """Tells all supervisors to end their workers: ``warm`` (after the running evaluation) or ``now``."""
    with connection.pipeline() as pipe:
        pipe.hincrby(_KEY, "epoch", 1)
        pipe.hset(_KEY, "how", how)
        pipe.execute()


def stop_orders(connection: Connection) -> tuple[int, str]:
    """How many orders there have been, and how the last one is meant."""
    epoch, how = connection.hmget(_KEY, "epoch", "how")
    return int(epoch or 0), (how or b"warm").decode()
