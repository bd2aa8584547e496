"""What is new: each checkpoint against the baseline, what is recorded and what the plan asks for. Pure."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from assayer.plan import Mark, Plan
from assayer.record import Record
from assayer.watch.ready import Seen, why_not

__all__ = ["Decision", "baseline_of", "decide"]


@dataclass(frozen=True, slots=True)
class Decision:
    """What is to happen with one checkpoint. ``state``: due, done, baseline, skipped or writing; ``reason`` says why it is not due."""

    seen: Seen
    state: str
    reason: str = ""
    record: Record | None = None


def baseline_of(seen: Iterable[Seen]) -> dict[str, Mark]:
    """The marks of the checkpoints that are whole, by path."""
    return {s.checkpoint.path: Mark(s.signature, s.identity) for s in seen if s.identity is not None}


def decide(plan: Plan, seen: Iterable[Seen], record_of: Callable[[Seen], Record | None], now: float, final: bool) -> list[Decision]:
    """One decision a checkpoint, in the order in which the due ones are to be evaluated.

    Args:
        plan: the watch.
        seen: the checkpoints that its directory holds.
        record_of: the record of a whole checkpoint's weights under this plan's evaluator, if there is one.
        now: seconds since the epoch.
        final: training has ended: the last checkpoint is evaluated whatever ``--every`` says.
    """
    ordered = sorted(seen, key=lambda s: s.checkpoint.order)
    whole = [s for s in ordered if s.is_whole]
    last = whole[-1].checkpoint.path if whole and final else None
    decisions = [_decide(plan, s, record_of, now, is_last=s.checkpoint.path == last) for s in ordered]
    return decisions if plan.order == "oldest" else decisions[::-1]


def _decide(plan: Plan, seen: Seen, record_of: Callable[[Seen], Record | None], now: float, is_last: bool) -> Decision:
    mark = plan.baseline.get(seen.checkpoint.path)
    if mark and mark.signature == seen.signature:
        return Decision(seen, "baseline", "was there when the watch began")
    reason = why_not(seen, now, plan.quiet_period)
    if reason or seen.identity is None:
        return Decision(seen, "writing", reason or "is read at the next look")
    if mark and mark.identity == seen.identity:
        return Decision(seen, "baseline", "was there when the watch began")
    try:
        record = record_of(seen)
    except OSError as error:
        return Decision(seen, "writing", f"its record cannot be read: {error.strerror}")
    if record and _counts(plan, record):
        return Decision(seen, "done", _change(plan, record), record)
    if plan.weights not in seen.variants:
        return Decision(seen, "skipped", f"holds no {'EMA' if plan.weights == 'ema' else plan.weights} weights")
    number = seen.checkpoint.position.number
    if plan.every and number is not None and number % plan.every and not is_last:
        return Decision(seen, "skipped", f"{number:g} is not divisible by {plan.every}")
    return Decision(seen, "due")


def _counts(plan: Plan, record: Record) -> bool:
    """False for a record that the command asked to make anew, and for one that the weights' being there refutes."""
    if not record.settles:
        return False
    if plan.reevaluate_before is not None and record.ended_at < plan.reevaluate_before:
        return False
    failed = record.status in ("failed", "timeout")
    return not (failed and plan.retry_failed_before is not None and record.ended_at < plan.retry_failed_before)


def _change(plan: Plan, record: Record) -> str:
    """How the evaluator has changed since this record was made; empty when it has not."""
    changed = []
    if record.evaluator.get("source") != plan.evaluator.source:
        changed.append("source")
    if record.evaluator.get("arguments") != plan.evaluator.arguments:
        changed.append("arguments")
    return f"evaluated with other {' and '.join(changed)} (--reevaluate acts on it)" if changed else ""
