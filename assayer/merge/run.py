"""From a checkpoint to a Hugging Face directory: read what lies where, check, lay out, copy, and only then give it its name."""

import contextlib
import os
import re
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from assayer import formats
from assayer.checkpoint import Found, list_path
from assayer.containers import VARIANTS
from assayer.errors import CheckpointError, StateError, UnreadableError, UsageError
from assayer.files import printable, write_json
from assayer.merge.hf import Companions, companions, is_tied
from assayer.merge.names import Target, head_size, key_map, targets
from assayer.merge.output import check_room, default_output, part_folder
from assayer.merge.reader import Assembly, Source, boxes
from assayer.merge.writer import INDEX, OutputFile, index_of, layout, write_files
from assayer.record import OWN_FOLDERS
from assayer.tensors import DTYPES, Dtype, Tensor

__all__ = ["Merged", "Options", "find_checkpoint", "merge", "run", "size_in_bytes"]

SHARD_SIZE = "5GB"
READERS = ("assayer", "torch")
DTYPE_WORDS = ("keep", "bfloat16", "float16", "float32")
# Where torch's reader puts what it read, inside the output that is being made.
_READING = "reading"


@dataclass(frozen=True)
class Options:
    """How a checkpoint is merged; the defaults are the command's.

    ``checkpoint_type`` is ``regular`` or ``ema``; ``dtype`` ``keep`` or the one that floating-point tensors are cast to; ``threads`` 0
    stands for the processors there are, eight at most; ``hf_config``, ``tokenizer`` and ``key_map`` are paths, or a built-in map's name;
    ``original`` is the checkpoint's own path, where it is merged from a second name.
    """

    checkpoint_type: str = "regular"
    dtype: str = "keep"
    max_shard_size: str = SHARD_SIZE
    hf_config: str | None = None
    tokenizer: str | None = None
    key_map: str | None = None
    verify: bool = True
    threads: int = 0
    check_model: bool = False
    reader: str = "assayer"
    original: str | None = None


@dataclass(frozen=True)
class Merged:
    """What a merge of ``source`` came to: bytes of ``weights``, ``seconds``, and sentences about what the user should know."""

    path: Path
    source: str
    format: str
    checkpoint_type: str
    weights: int
    tensors: int
    files: int
    seconds: float
    notes: list[str] = field(default_factory=list)


def merge(
    checkpoint_path: str | os.PathLike[str],
    output_path: str | os.PathLike[str] | None = None,
    *,
    checkpoint_type: str = "regular",
    dtype: str = "keep",
    max_shard_size: str = SHARD_SIZE,
    hf_config: str | None = None,
    tokenizer: str | None = None,
    key_map: str | None = None,
    verify: bool = True,
    threads: int = 0,
    check_model: bool = False,
    reader: str = "assayer",
) -> Path:
    """Merges a checkpoint into a Hugging Face directory, and returns that.

    Args:
        checkpoint_path: of a checkpoint in any known format, or of a directory of checkpoints, whose newest whole one is taken.
        output_path: must not exist; default ``merged/<name>`` beside the checkpoints.
        checkpoint_type: ``regular`` or ``ema``.
        dtype: ``keep``, ``bfloat16``, ``float16`` or ``float32``; integers and booleans are never cast.
        max_shard_size: of one file, such as ``5GB`` or ``500MB``.
        hf_config: a config file or a directory with one, for checkpoints that hold none.
        tokenizer: a directory with tokenizer files.
        key_map: ``kempnerforge``, ``torchtitan-llama3``, or a JSON file of regular expressions and replacements.
        verify: compare the CRC32 of every tensor that has one.
        threads: that copy; 0: one a processor, eight at most.
        check_model: compare names and shapes with the model that the config describes (imports transformers).
        reader: ``torch`` reads what this package does not, with torch's own reader, in a child process of limited memory.

    Raises:
        AssayerError: one line; nothing is left behind.
    """
    given = Options(checkpoint_type, dtype, max_shard_size, hf_config, tokenizer, key_map, verify, threads, check_model, reader)
    found = find_checkpoint(Path(checkpoint_path))
    output = Path(output_path).absolute() if output_path is not None else default_output(found, checkpoint_type)
    return run(found, output, given).path


@dataclass(frozen=True)
class Plan:
    """What a merge will do: targets, what stands around them, and sentences for the user."""

    found: Found
    wanted: list[Target]
    around: Companions
    dtype: Dtype | None
    notes: list[str]

    @property
    def nbytes(self) -> int:
        return sum(target.nbytes for target in self.wanted)


def run(
    found: Found,
    output: Path,
    options: Options,
    started: Callable[[int], None] = lambda total: None,
    advance: Callable[[int], None] = lambda done: None,
    reserve: Callable[[int], None] = lambda total: None,
    flush: bool = True,
) -> Merged:
    """Merges a checkpoint that is known; see ``merge``.

    Args:
        found: the checkpoint.
        output: the directory that is to be; its parent is made.
        options: how.
        started: is told the bytes of the output's weights, before the first is copied.
        advance: is told bytes written, from any thread.
        reserve: is told the bytes of all files, before the first is made; may refuse.
        flush: to the disk before the directory gets its name.

    Raises:
        AssayerError: one line; nothing is left behind.
    """
    began = time.monotonic()
    _check_words(options)
    threads = options.threads or min(8, os.cpu_count() or 1)
    refuse_output(found, output)
    with part_folder(output) as part:
        holder, variant = found, options.checkpoint_type
        if options.reader == "torch":
            from assayer.merge.torch_reader import read_with_torch

            holder, variant = read_with_torch(found, part / _READING, variant), "regular"
        plan = prepare(found, options, holder, variant)
        source = Source(holder.listing, [target.source for target in plan.wanted], options.verify)
        try:
            plan = without_tied(plan, source)
            check_room(output.parent, plan.nbytes + plan.around.nbytes)
            reserve(plan.nbytes + plan.around.nbytes)
            started(plan.nbytes)
            files = layout(plan.wanted, size_in_bytes(options.max_shard_size))
            head_rows = head_size(plan.around.config) if any(t.form == "pairs" for t in plan.wanted) else 0
            write_files(part, files, source, threads, head_rows, advance, flush)
        finally:
            source.close()
        refuse_changed(found)
        write_around(part, files, plan)
        shutil.rmtree(part / _READING, ignore_errors=True)
    seconds = time.monotonic() - began
    return Merged(
        output,
        found.checkpoint.path,
        found.checkpoint.format,
        options.checkpoint_type,
        plan.nbytes,
        len(plan.wanted),
        len(files),
        seconds,
        plan.notes,
    )


def write_around(part: Path, files: Sequence[OutputFile], plan: Plan) -> None:
    """Writes what stands beside the weights: the index of several files, config, tokenizer.

    Raises:
        StateError: it cannot be written.
    """
    try:
        if len(files) > 1:
            write_json(part / INDEX, index_of(files))
        plan.around.write(part, plan.dtype)
    except OSError as error:
        raise StateError(f"cannot write below {printable(str(part))}: {error.strerror}") from None


def refuse_output(found: Found, output: Path) -> None:
    """Refuses a place that is taken or lies inside the checkpoint, and a checkpoint of which no model can be made.

    Raises:
        UsageError: one of these.
    """
    if os.path.lexists(output):
        raise UsageError(f"{printable(str(output))} is there already; remove it, or give another --output_path")
    if output.resolve().is_relative_to(Path(found.checkpoint.path).resolve()):
        raise UsageError(f"{printable(str(output))} lies inside the checkpoint, where nothing is ever written; give another --output_path")
    if "adapter_config.json" in found.listing.names:
        raise UsageError(f"{printable(found.checkpoint.path)} is a PEFT adapter, which is loaded onto its base model and needs no merge")


def _check_words(options: Options) -> None:
    """Refuses what the command's own flags would not have let through.

    Raises:
        UsageError: a word is none of those that are allowed.
    """
    for name, allowed in (("checkpoint_type", VARIANTS), ("dtype", DTYPE_WORDS), ("reader", READERS)):
        if getattr(options, name) not in allowed:
            raise UsageError(f"{name} {printable(str(getattr(options, name)))!r} is none of {', '.join(allowed)}")
    if options.threads < 0:
        raise UsageError(f"threads must be 0 or more, not {options.threads}")


def prepare(found: Found, options: Options, holder: Found | None = None, variant: str | None = None) -> Plan:
    """Reads what lies where, and decides what is written; nothing is written yet.

    Args:
        found: the checkpoint.
        options: how it is merged.
        holder: what its tensors are read from, and ``variant`` which of those, when torch has read it already.

    Raises:
        CheckpointError: it is not whole, damaged, or not the model that its config describes.
        UsageError: an option cannot be carried out.
    """
    holder = holder or found
    form = formats.of(holder.checkpoint)
    try:
        reason = form.missing(holder.listing)
        if reason:
            raise CheckpointError(f"{printable(found.checkpoint.path)} is not whole: {reason}")
        tensors = form.tensors(holder.listing, variant or options.checkpoint_type)
    except OSError as error:
        raise UnreadableError(f"{printable(str(error.filename or found.checkpoint.path))} cannot be read: {error.strerror}") from None
    except CheckpointError as error:
        text = str(error)
        if found.checkpoint.path not in text:
            text = f"{printable(found.checkpoint.path)}: {text}"
        raise type(error)(text) from None
    dtype = None if options.dtype == "keep" else DTYPES[options.dtype]
    wanted = targets(tensors, key_map(options.key_map), dtype)
    if not wanted:
        raise CheckpointError(f"{printable(found.checkpoint.path)} holds no tensors that are to be merged")
    notes = []
    if options.key_map is not None and {target.name for target in wanted} == {tensor.name for tensor in tensors}:
        notes.append(f"the key map {printable(options.key_map)} changed no name")
    around = companions(found.checkpoint, options.hf_config, options.tokenizer, options.original)
    if around.config is None:
        unchecked = ", and they were not compared with a model" if options.check_model else ""
        notes.append(f"no config.json was found: the output holds weights alone{unchecked} (give one with --hf_config)")
    elif options.check_model:
        from assayer.merge.check import check_model

        told = check_model(wanted, around.config)
        notes += [told] if told else []
    return Plan(found, wanted, around, dtype, notes)


def find_checkpoint(path: Path) -> Found:
    """The checkpoint at a path, or the newest whole one of those directly in it.

    Directories that are called ``...-merged`` (or ``...-merged-ema``), and empty ones, are passed over.

    Raises:
        CheckpointError: there is none.
    """
    path = path.absolute()
    try:
        found = formats.identify_path(str(path))
    except OSError as error:
        raise CheckpointError(f"{printable(str(path))}: {error.strerror}; give the path of a checkpoint") from None
    if found:
        return found
    inside: list[Found] = []
    if path.is_dir():
        for name in sorted(os.listdir(path)):
            if name in OWN_FOLDERS or name.startswith(".") or re.search(r"-merged\b", name):
                continue
            with contextlib.suppress(OSError):
                one = formats.identify_path(str(path / name))
                if one:
                    inside.append(one)
    for one in sorted(inside, key=lambda f: f.checkpoint.order, reverse=True):
        with contextlib.suppress(OSError):
            if formats.of(one.checkpoint).missing(one.listing) is None:
                return one
    if inside:
        last = max(inside, key=lambda f: f.checkpoint.order)
        reason = formats.of(last.checkpoint).missing(last.listing)
        raise CheckpointError(
            f"none of the {len(inside)} checkpoints in {printable(str(path))} is whole ({last.checkpoint.name}: {reason})"
        )
    known = ", ".join(sorted(formats.all_formats()))
    raise CheckpointError(f"{printable(str(path))} is no checkpoint of a known format, and none lies directly in it ({known})")


def size_in_bytes(text: str) -> int:
    """The bytes of ``5GB``, ``500MB``, ``2GiB`` or a plain number.

    Raises:
        UsageError: it is none of these, or zero.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)B?", text.strip().upper())
    size = float(found[1]) * (1024 if found[3] else 1000) ** " KMGT".index(found[2] or " ") if found else 0
    if not 1 <= size < 1e18:
        raise UsageError(f"{printable(text)!r} is no size; give one such as 5GB, 500MB or 2GiB")
    return int(size)


def without_tied(plan: Plan, source: Source) -> Plan:
    """Of an output head that is the input embedding, byte for byte, one is stored, where the config says that they are tied."""
    if not is_tied(plan.around.config):
        return plan
    heads = [t for t in plan.wanted if t.name.endswith("lm_head.weight")]
    inputs = [t for t in plan.wanted if t.name.endswith(("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight"))]
    for head in heads:
        for other in inputs:
            if head.shape == other.shape and head.source.dtype is other.source.dtype:
                if _is_same(source, head.source, other.source):
                    wanted = [t for t in plan.wanted if t is not head]
                    return replace(plan, wanted=wanted)
                plan.notes.append(f"the config ties {head.name} to {other.name}, but they differ: both are stored")
    return plan


def _is_same(source: Source, one: Tensor, other: Tensor) -> bool:
    if _places(one) == _places(other):
        return True
    import numpy

    first, second = Assembly(source, one), Assembly(source, other)
    return all(numpy.array_equal(first.box(*box), second.box(*box)) for box in boxes(one.shape, one.dtype.size, 4 << 20))


def _places(tensor: Tensor) -> list[tuple[Any, ...]]:
    return [(p.file, p.start, p.begin, p.sizes) for p in tensor.pieces]


def refuse_changed(found: Found) -> None:
    """The files must be those that were listed at the beginning.

    Raises:
        CheckpointError: they changed, or are gone.
    """
    try:
        now = list_path(found.listing.path, formats.of(found.checkpoint).FOLDERS)
    except OSError:
        raise UnreadableError(f"{printable(found.checkpoint.path)} was deleted while it was read") from None
    names = set(formats.of(found.checkpoint).weights(found.listing))
    if _kept(now.entries, names) != _kept(found.listing.entries, names):
        raise UnreadableError(f"{printable(found.checkpoint.path)} changed while it was read; merge it again")


def _kept(entries: Sequence[Any], names: set[str]) -> list[tuple[Any, ...]]:
    return sorted((e.name, e.size, e.mtime_ns, e.inode) for e in entries if e.name in names)
