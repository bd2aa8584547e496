"""Classes that are pickled under the names of packages that are not installed."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType


@contextmanager
def pretend(module: str, *classes: type) -> Iterator[None]:
    """Within the context, ``classes`` are to be found in ``module``, and so pickle as its own."""
    parts = module.split(".")
    absent = [".".join(parts[: end + 1]) for end in range(len(parts)) if ".".join(parts[: end + 1]) not in sys.modules]
    homes = [made.__module__ for made in classes]
    sys.modules |= {name: ModuleType(name) for name in absent}
    for made in classes:
        setattr(sys.modules[module], made.__name__, made)
        made.__module__ = module
    try:
        yield
    finally:
        for made, home in zip(classes, homes, strict=True):
            made.__module__ = home
        for name in absent:
            del sys.modules[name]
