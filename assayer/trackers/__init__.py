"""One file a tracker. To add one is to add a module here that has what ``Tracker`` names; ``--track`` knows it by its name."""

import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

from assayer.points import Curve, Point

__all__ = ["Tracker", "all_trackers"]


class Tracker(Protocol):
    """What a module in this folder has. It imports its library only in ``publish``."""

    @property
    def OPTIONS(self) -> Mapping[str, str]:
        """The options that may follow its name, with what each is."""

    @property
    def WORD(self) -> str | None:
        """The option that may be given without its name: ``tensorboard:logs`` is ``tensorboard:logdir=logs``."""

    @property
    def EXTRA(self) -> str:
        """What ``pip install 'assayer[...]'`` brings its library."""

    @property
    def NEEDS(self) -> Sequence[str]:
        """The modules that its library is."""

    def settle(self, options: Mapping[str, str], cwd: Path) -> dict[str, str]:
        """The options with every path made absolute. Only words are looked at.

        Raises:
            UsageError: one is missing, or its value is not allowed.
        """

    def publish(self, points: Sequence[Point], options: Mapping[str, str], curve: Curve) -> list[str]:
        """Gives the tracker these points, each once, and returns notes for the user. When it returns, the tracker has them.

        A point that is ``doubtful`` may be there, whole or in part: it is looked up first.

        Raises:
            AssayerError: it cannot be done; what was done is looked up the next time.
            Exception: whatever the library raises; it counts the same.
        """


@cache
def all_trackers() -> MappingProxyType[str, Tracker]:
    """Every tracker by its module's name."""
    found: dict[str, Tracker] = {}
    for module in pkgutil.iter_modules(__path__):
        found[module.name] = importlib.import_module(f"{__name__}.{module.name}")
    return MappingProxyType(found)
