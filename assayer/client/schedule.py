"""Which of the checkpoints that a training saves are evaluated."""

from typing import Any

from assayer.errors import UsageError

__all__ = ["STRATEGIES", "Schedule"]

STRATEGIES = ("steps", "epoch", "no")


class Schedule:
    """``eval_strategy`` and ``eval_steps`` of a training.

    Only what is saved can be evaluated: with ``steps``, that is the first checkpoint saved at or after each multiple of ``eval_steps``
    (None: every one); with ``epoch``, the first one at or after the end of each epoch; with ``no``, none. No strategy at all: every one.

    Raises:
        UsageError: neither of these, or ``eval_steps`` below 1.
    """

    def __init__(self, eval_strategy: str | None = None, eval_steps: int | None = None) -> None:
        # transformers gives a member of an enumeration, YAML may turn `no` into False.
        word: Any = getattr(eval_strategy, "value", eval_strategy)
        word = "no" if word is False else word
        if word is not None and word not in STRATEGIES:
            raise UsageError(f"eval_strategy is {eval_strategy!r}; allowed: {', '.join(STRATEGIES)}")
        if eval_steps is not None and (isinstance(eval_steps, bool) or not isinstance(eval_steps, int) or eval_steps < 1):
            raise UsageError(f"eval_steps is {eval_steps!r}; it must be a whole number of steps, at least 1")
        self.strategy = word
        self.steps = eval_steps
        self._step = 0
        self._epoch = 0

    def begin(self, step: int, epoch: float | None) -> None:
        """Where the training stands, when it begins or is resumed: what lies before is not evaluated again."""
        self._step, self._epoch = step, _whole(epoch)

    def takes(self, step: int, epoch: float | None) -> bool:
        """True when the checkpoint just saved is to be evaluated.

        Args:
            step: optimizer steps so far.
            epoch: epochs so far, with their fraction; None where it is not known.
        """
        if self.strategy == "no":
            return False
        if self.strategy == "epoch":
            due, self._epoch = _whole(epoch) > self._epoch, max(self._epoch, _whole(epoch))
            return due
        if self.strategy == "steps" and self.steps:
            due, self._step = step // self.steps > self._step // self.steps, max(self._step, step)
            return due
        return True


def _whole(epoch: float | None) -> int:
    """Epochs that are over: trainers count them in fractions that are not quite exact."""
    return int((epoch or 0) + 1e-6)
