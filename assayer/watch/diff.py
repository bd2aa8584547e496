"""What is new: each checkpoint against the baseline, what is recorded and what the plan asks for. Pure."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from assayer.plan import Baseline, Plan
from assayer.record import Record
from assayer.watch.ready import Seen, why_not

__all__ = ["Decision", "baseline_of", "counts", "decide"]

THERE_BEFORE = "was there when the watch began"
GONE = "was deleted meanwhile"


@dataclass(frozen=True, slots=True)
class Decision:
    """What is to happen with one checkpoint. ``state``: due, done, baseline, skipped or writing; ``reason`` says why, or what hinders."""

    seen: Seen
    state: str
    reason: str = ""
    record: Record | None = None


def baseline_of(plan: Plan, seen: Iterable[Seen]) -> Baseline:
    """The baseline that these checkpoints make for a plan: those that are whole."""
    return Baseline.of((plan.below(s.checkpoint.path), s.signature, s.identity) for s in seen if s.identity is not None)


def decide(
    plan: Plan,
    baseline: Baseline,
    seen: Iterable[Seen],
    record_of: Callable[[Seen], Record | None],
    now: float,
    last: str | None = None,
) -> list[Decision]:
    """One decision a checkpoint, in the order in which the due ones are to be evaluated.

    Args:
        plan: the watch.
        baseline: what was there when it began.
        seen: the checkpoints of its directory that are not settled.
        record_of: the record of a checkpoint's weights under this plan's evaluator, if there is one.
        now: seconds since the epoch.
        last: once training has ended, the path of its last checkpoint: that is evaluated whatever ``--every`` says.
    """
    ordered = sorted(seen, key=lambda s: s.checkpoint.order)
    decisions = [_decide(plan, baseline, s, record_of, now, is_last=s.checkpoint.path == last) for s in ordered]
    return decisions if plan.order == "oldest" else decisions[::-1]


def _decide(plan: Plan, baseline: Baseline, seen: Seen, record_of: Callable[[Seen], Record | None], now: float, is_last: bool) -> Decision:
    path = plan.below(seen.checkpoint.path)
    if baseline.has_signature(path, seen.signature):
        return Decision(seen, "baseline", THERE_BEFORE)
    reason = None if seen.gone else why_not(seen, now, plan.quiet_period)
    if reason or (seen.identity is None and not seen.gone):
        return Decision(seen, "writing", reason or "is read at the next look")
    if seen.identity and baseline.has_identity(path, seen.identity):
        return Decision(seen, "baseline", THERE_BEFORE)
    try:
        record = record_of(seen)
    except OSError as error:
        return Decision(seen, "writing", f"its record cannot be read: {error.strerror}")
    if record and (counts(plan, record) or (seen.gone and record.status == "vanished")):
        said = record.notes if record.status == "skipped" else []
        return Decision(seen, "done", "; ".join(part for part in [*said, _change(plan, record)] if part), record)
    if plan.weights not in seen.variants and not seen.gone:
        return Decision(seen, "skipped", f"holds no {'EMA' if plan.weights == 'ema' else plan.weights} weights")
    number = seen.checkpoint.position.number
    if plan.every and number is not None and number % plan.every and not is_last:
        return Decision(seen, "skipped", f"{number:g} is not divisible by {plan.every}")
    return Decision(seen, "due", GONE if seen.gone else "")


def counts(plan: Plan, record: Record) -> bool:
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
