"""Averages checkpoints of one model: float32 accumulation, one box of one tensor at a time, whatever their formats."""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from assayer.checkpoint import Found
from assayer.errors import CheckpointError, StateError, UsageError
from assayer.files import printable
from assayer.merge.names import Target
from assayer.merge.output import check_room, part_folder
from assayer.merge.reader import Assembly, Source, boxes
from assayer.merge.run import Merged, Options, Plan, prepare, refuse_changed, refuse_output, size_in_bytes, without_tied, write_around
from assayer.merge.writer import OutputFile, allocated, layout

if TYPE_CHECKING:
    from assayer.merge.casts import Array

__all__ = ["mean", "parse_weights"]

# Bytes of one box of one checkpoint.
_ROOM = 4 << 20


def parse_weights(text: str | None, count: int) -> list[float]:
    """The checkpoints' shares, which add up to 1.

    Raises:
        UsageError: there is not one number for each, or they add up to nothing.
    """
    if text is None:
        return [1 / count] * count
    try:
        given = [float(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"--weights {printable(text)} must be numbers with commas between them") from None
    total = sum(given)
    if len(given) != count or not 0 < total < float("inf"):
        raise UsageError(
            f"--weights gives {len(given)} numbers that add up to {total:g}; give {count}, one a checkpoint, with a positive sum"
        )
    return [weight / total for weight in given]


@dataclass
class _Input:
    plan: Plan
    source: Source
    targets: dict[str, Target]
    share: float


def mean(
    found: Sequence[Found],
    output: Path,
    shares: Sequence[float],
    options: Options,
    started: Callable[[int], None] = lambda total: None,
    advance: Callable[[int], None] = lambda done: None,
) -> Merged:
    """Writes the weighted mean of checkpoints of one model as a Hugging Face directory.

    Floating-point tensors are accumulated in float32 and stored in the first checkpoint's dtype, or ``options.dtype``; tensors of other
    dtypes are taken from the first. Config and tokenizer are the first one's.

    Raises:
        CheckpointError: the checkpoints are not of one model, not whole, or damaged.
        StateError: the output cannot be written.
        UsageError: the output is there already.
    """
    began = time.monotonic()
    inputs = []
    for one, share in zip(found, shares, strict=True):
        refuse_output(one, output)
        plan = prepare(one, options)
        source = Source(one.listing, [target.source for target in plan.wanted], options.verify)
        plan = without_tied(plan, source)
        inputs.append(_Input(plan, source, {t.name: t for t in plan.wanted}, share))
    first = inputs[0]
    for other in inputs[1:]:
        _refuse_another_model(first, other)
    if any(target.form for target in first.plan.wanted):
        raise UsageError("a mean keeps the rows where they are: merge with this --key_map first, and average what that gives")
    with part_folder(output) as part:
        check_room(output.parent, first.plan.nbytes + first.plan.around.nbytes)
        started(first.plan.nbytes)
        files = layout(first.plan.wanted, size_in_bytes(options.max_shard_size))
        try:
            for file in files:
                _write(part, file, inputs, advance)
            write_around(part, files, first.plan)
        except OSError as error:
            raise StateError(f"cannot write below {printable(str(part))}: {error.strerror}") from None
        finally:
            for one_input in inputs:
                one_input.source.close()
        for one in found:
            refuse_changed(one)
    seconds = time.monotonic() - began
    return Merged(
        output,
        f"the mean of {len(found)} checkpoints",
        "mean",
        "regular",
        first.plan.nbytes,
        len(first.plan.wanted),
        len(files),
        seconds,
        first.plan.notes,
    )


def _refuse_another_model(first: _Input, other: _Input) -> None:
    one, two = first.plan.found.checkpoint.path, other.plan.found.checkpoint.path
    only = sorted(first.targets.keys() ^ other.targets.keys())
    if only:
        raise CheckpointError(f"{printable(one)} and {printable(two)} are not of one model: only one of them holds {printable(only[0])}")
    for name, target in first.targets.items():
        second = other.targets[name].source.dtype
        if target.source.dtype.floating != second.floating or (not second.floating and second is not target.source.dtype):
            kinds = f"{target.source.dtype.torch} and {second.torch}"
            raise CheckpointError(f"{printable(one)} and {printable(two)} are not of one model: {printable(name)} is of {kinds}")
        if target.shape != other.targets[name].shape:
            shapes = f"{list(target.shape)} and {list(other.targets[name].shape)}"
            raise CheckpointError(f"{printable(one)} and {printable(two)} are not of one model: {printable(name)} has the shapes {shapes}")


def _write(part: Path, file: OutputFile, inputs: list[_Input], advance: Callable[[int], None]) -> None:
    descriptor = allocated(part / file.name, file)
    try:
        for target, start in zip(file.targets, file.starts, strict=True):
            parts = [(Assembly(i.source, i.targets[target.name].source), i.targets[target.name], i.share) for i in inputs]
            if not target.dtype.floating or not target.source.dtype.floating:
                del parts[1:]
            place = start
            for begin, sizes in boxes(target.shape, 8, _ROOM):
                data = _mean_of(target, [(assembly.box(begin, sizes), one, share) for assembly, one, share in parts])
                os.pwrite(descriptor, data, place)
                place += len(data)
                advance(len(data))
            for assembly, _, _ in parts:
                assembly.finish()
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _mean_of(target: Target, parts: "list[tuple[Array, Target, float]]") -> bytes:
    import numpy

    from assayer.merge.casts import as_float32, from_float32

    if len(parts) == 1 and not target.source.dtype.floating:
        return numpy.ascontiguousarray(parts[0][0]).tobytes()
    total = None
    for values, one, share in parts:
        with numpy.errstate(over="ignore", invalid="ignore"):
            scaled = as_float32(numpy.ascontiguousarray(values).reshape(-1), one.source.dtype) * numpy.float32(share)
            total = scaled if total is None else total + scaled
    assert total is not None
    return bytes(from_float32(total, target.dtype).tobytes())
