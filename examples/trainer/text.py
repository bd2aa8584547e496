"""Bytes of text that come with every Python: what is trained on, and what is not."""

import sysconfig
from pathlib import Path
from pydoc_data.topics import topics

import torch

LENGTH = 128
# One topic in so many is held out of training.
HELD_OUT = 8
# Modules of the standard library: text of another kind, which training never sees.
MODULES = ("argparse.py", "statistics.py")
# Bytes that a task takes of its text.
TASK_BYTES = 65536


def windows(text: str, most: int | None = None) -> torch.Tensor:
    """The text's bytes (int64), in rows of LENGTH; the rest is left out, and what is more than ``most`` bytes."""
    data = torch.tensor(list(text.encode()[:most]))
    return data[: len(data) // LENGTH * LENGTH].reshape(-1, LENGTH)


def manual(held_out: bool) -> str:
    """Python's documentation without the topics that are held out, or those alone."""
    return "\n".join(topics[name] for i, name in enumerate(sorted(topics)) if (i % HELD_OUT == 0) is held_out)


def code() -> str:
    """Python's own code."""
    library = Path(sysconfig.get_path("stdlib"))
    return "\n".join((library / name).read_text(encoding="utf-8") for name in MODULES)


def task(name: str) -> torch.Tensor:
    """What the task of this name asks for, (rows, LENGTH).

    Raises:
        ValueError: there is none of this name.
    """
    texts = {"manual": lambda: manual(held_out=True), "code": code}
    if name not in texts:
        raise ValueError(f"task {name!r} is not known; there are: {', '.join(texts)}")
    return windows(texts[name](), TASK_BYTES)
