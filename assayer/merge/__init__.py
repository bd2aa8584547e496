"""``python -m assayer.merge``: any trainer's checkpoint becomes one Hugging Face directory; ``merge`` does it from Python."""

from assayer.merge.run import merge

__all__ = ["merge"]
