"""The belt between the stations: which Redis, and what lies on it."""

from typing import Any, TypeAlias

__all__ = ["Connection"]

# A redis.Redis that answers in bytes. redis-py annotates each answer as a union of what any of its clients could give.
Connection: TypeAlias = Any
