"""The order to stop the workers of a queue, for whoever supervises them, on whatever host."""

from assayer.queues import Connection

__all__ = ["order_to_stop", "stop_orders"]

_KEY = "assayer:stop"


def order_to_stop(connection: Connection, queues: list[str], how: str) -> None:
    """Tells all supervisors to end their workers on these queues: ``warm`` (after the running evaluation) or ``now``."""
    with connection.pipeline() as pipe:
        for queue in queues:
            pipe.hincrby(_KEY, f"{queue}:{how}", 1)
        pipe.execute()


def stop_orders(connection: Connection, queues: list[str]) -> tuple[int, int]:
    """How many orders there have been for these queues: to stop at all, and to stop now."""
    warm = connection.hmget(_KEY, [f"{queue}:warm" for queue in queues]) if queues else []
    now = connection.hmget(_KEY, [f"{queue}:now" for queue in queues]) if queues else []
    count = sum(int(n or 0) for n in now)
    return sum(int(n or 0) for n in warm) + count, count
