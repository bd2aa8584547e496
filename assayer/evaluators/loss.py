"""The built-in evaluator ``loss``: a language model's mean loss, perplexity and bits per byte, over the same tokens for every checkpoint.

Each token's loss is taken in float32; the losses are summed in float64. Which tokens stand in which batch, ``token_data.Batches`` says.
"""

import importlib
import logging
import math
import os
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from assayer import language_model, token_data, token_source
from assayer.distributed import joined, rank_of_process
from assayer.errors import EvaluatorError
from assayer.files import digest, printable
from assayer.token_data import Batches, Tokens
from assayer.token_source import Source

if TYPE_CHECKING:
    import torch

    from assayer.progress import Progress

__all__ = ["check", "check_files", "evaluate", "warm"]

logger = logging.getLogger(__name__)

SEQ_LEN, BATCH_SIZE = 1024, 8
# A loss above this has the same perplexity, so that it stays finite.
LOSS_MAX = 20.0
# Logits that are cast to float32 at once: 128 MB.
SLICE = 1 << 25
# Seconds between two saves, at the speeds below (operations a second, and seconds that a batch takes however small the model is). What
# matters is that a save, some milliseconds, costs nothing; fixed speeds make it come after the same batches in every attempt and rank.
SAVE_SECONDS = 2.0
_SPEED = {"cpu": 5e10}
_SPEED_OF_GPUS = 5e13
_BATCH_SECONDS = 0.01


def evaluate(
    path: str,
    *,
    data: str,
    tokenizer: str | None = None,
    seq_len: int | None = None,
    batch_size: int = BATCH_SIZE,
    steps: int | None = None,
    dtype: str | None = None,
    bin_dtype: str | None = None,
    split: str | None = None,
    device: str | None = None,
    config: str | None = None,
    trust_remote_code: bool = False,
    original_path: str | None = None,
    progress: "Progress | None" = None,
    details: dict[str, Any] | None = None,
) -> dict[str, float]:
    """``eval/loss`` (nats a token), ``eval/perplexity``, ``eval/bits_per_byte`` where bytes are known, and ``tokens``, those predicted.

    The loss of a token between two documents counts in all of them, though it stands for no bytes.

    With several processes (``WORLD_SIZE``) the batches are dealt out in turn, and every process returns the same.

    Args:
        path: a Hugging Face directory.
        data: a ``.npy`` or ``.bin`` file of tokens, a text or JSONL file, a pattern of these, or a saved dataset's folder.
        tokenizer: a directory or name, for text; default the checkpoint's own, or its run's.
        seq_len: tokens that the model sees at once; default 1024, or what its config allows where that is less.
        batch_size: windows a batch; default 8.
        steps: batches; default all. More than there are begin anew at the first.
        dtype: of the weights, ``auto`` (default), ``float32``, ``bfloat16`` or ``float16``.
        bin_dtype: of a ``.bin`` file; it is never guessed.
        split: of a saved dataset that has several.
        device: default a GPU where there is one.
        config: for a checkpoint that carries none.
        trust_remote_code: whether code in the checkpoint may be run.

    Raises:
        EvaluatorError: an argument cannot work, the data cannot be read, or the model does not load with just these weights.
    """
    _check_values({"seq_len": seq_len, "batch_size": batch_size, "steps": steps, "dtype": dtype})
    source = token_source.find(data, bin_dtype, split)
    length = _length(seq_len, path, config, trust_remote_code)
    enough = steps * batch_size * length + 1 if steps else None
    tokens = token_data.read(source, _tokenizer(source, path, original_path, tokenizer, trust_remote_code), enough)
    if len(tokens) < 2:
        raise EvaluatorError(f"data {printable(data)} holds {len(tokens)} tokens; at least 2 are needed, one to predict the other from")
    batches = Batches(len(tokens), length, batch_size)
    count = steps or len(batches)

    model = language_model.load(path, config=config, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    _check_tokens(tokens, batches, count, model, data)
    mark = digest(source.digest(), tokens.digest())
    parameters = sum(parameter.numel() for parameter in model.parameters())
    fingerprint = language_model.fingerprint(model)
    told = {
        "fingerprint": fingerprint,
        "parameters": parameters,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "data": mark,
        "seq_len": length,
        "batch_size": batch_size,
        "batches": count,
        **{f"{name}_version": importlib.import_module(name).__version__ for name in ("torch", "transformers")},
    }
    logger.info("loss over %d batches of %d windows of %d tokens, of %d tokens in all", count, batch_size, length, len(tokens))

    state = {"loss": 0.0, "tokens": 0, "bytes": 0}
    every = _every(parameters, batch_size * length, next(model.parameters()).device.type)
    # The identity of a checkpoint says nothing of its config, nor of how it was merged.
    what = digest(mark, fingerprint, language_model.config_digest(model), str(length))
    _accumulate(model, tokens, batches, count, state, progress, every, what)
    with joined() as ranks:
        sums = ranks.summed(state)
    if details is not None:
        details |= told | {"tokens": int(sums["tokens"])}
    return _metrics(sums, tokens.has_bytes)


def _metrics(sums: dict[str, float], has_bytes: bool) -> dict[str, float]:
    loss = sums["loss"] / sums["tokens"]
    # min() of NaN and a number is the first of the two.
    metrics = {"eval/loss": loss, "eval/perplexity": math.exp(min(loss, LOSS_MAX)), "tokens": int(sums["tokens"])}
    if has_bytes and sums["bytes"]:
        metrics["eval/bits_per_byte"] = sums["loss"] / math.log(2) / sums["bytes"]
    return metrics


def _tokenizer(source: Source, path: str, original_path: str | None, given: str | None, trust_remote_code: bool) -> Any:
    if not source.is_text:
        return None
    return language_model.load_tokenizer(language_model.tokenizer_place(path, original_path, given), trust_remote_code)


def _length(asked: int | None, path: str, config: str | None, trust_remote_code: bool) -> int:
    """``seq_len``, or its default."""
    loaded = language_model.load_config(path, config, trust_remote_code)
    inner = loaded.get_text_config() if hasattr(loaded, "get_text_config") else loaded
    positions = getattr(inner, "max_position_embeddings", None)
    allowed = positions if isinstance(positions, int) and positions > 0 else None
    if asked is None:
        return min(SEQ_LEN, allowed or SEQ_LEN)
    if allowed is not None and asked > allowed:
        raise EvaluatorError(
            f"seq_len {asked} is more than the {allowed} tokens that the model's config allows (max_position_embeddings); "
            "give a smaller one, or a config that allows it with -E config=..."
        )
    return asked


def _check_tokens(tokens: Tokens, batches: Batches, count: int, model: "torch.nn.Module", data: str) -> None:
    """Refuses tokens that the model does not have, before it sees one: a wrong ``bin_dtype`` or tokenizer gives figures too."""
    stop = len(tokens)
    if count < len(batches):
        start, windows, width = batches.span(count - 1)
        stop = start + windows * width + 1
    smallest, largest = tokens.extremes(stop)
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    vocabulary = int(embedding.weight.shape[0])
    if largest >= vocabulary or smallest < 0:
        raise EvaluatorError(
            f"data {printable(data)} holds token {largest if largest >= vocabulary else smallest}, and the model's vocabulary has "
            f"{vocabulary}, counted from 0: another tokenizer made these tokens, or their dtype (bin_dtype) is another"
        )


def _every(parameters: int, tokens: int, device: str) -> int:
    """Batches between two saves."""
    seconds = max(_BATCH_SECONDS, 2 * parameters * tokens / _SPEED.get(device, _SPEED_OF_GPUS))
    return max(1, round(SAVE_SECONDS / seconds))


def _accumulate(
    model: "torch.nn.Module",
    tokens: Tokens,
    batches: Batches,
    count: int,
    state: dict[str, float],
    progress: "Progress | None",
    every: int,
    what: str,
) -> None:
    """Adds this rank's batches to ``state``; those that an earlier attempt has saved are in it already.

    ``what`` names the model and the data: another file or config under the same name starts over.
    """
    import torch

    rank, world_size = rank_of_process()
    own = range(rank, count, world_size)
    device = next(model.parameters()).device
    # A cache of keys and values is of no use here, and is as large as many models.
    config: Any = model.config
    config.use_cache = False
    numbers: Iterable[int] = own if progress is None else progress.items(own, state, every, name=f"batches of {what}")
    with torch.inference_mode():
        for number in numbers:
            start, windows, width = batches.span(number)
            taken = torch.from_numpy(tokens.take(start, start + windows * width + 1)).to(device)
            # The logits have no name here, so that they are gone before the next ones come.
            state["loss"] += _summed_loss(model(input_ids=taken[:-1].view(windows, width)).logits, taken[1:])
            state["tokens"] += windows * width
            state["bytes"] += tokens.nbytes(start + 1, start + windows * width + 1)
            if progress is not None:
                progress.report(min(count, number + world_size), count)


def _summed_loss(logits: "torch.Tensor", labels: "torch.Tensor") -> float:
    """The sum of the cross entropies (nats) of all tokens; only a slice of the logits is ever held in float32."""
    import torch

    rows = logits.flatten(0, 1)
    labels = labels.to(rows.device)
    step = max(1, SLICE // rows.shape[-1])
    losses = [
        torch.nn.functional.cross_entropy(rows[i : i + step].float(), labels[i : i + step], reduction="none")
        for i in range(0, len(rows), step)
    ]
    return float(torch.cat(losses).cpu().double().sum())


def check(arguments: Mapping[str, Any]) -> None:
    """Nothing, when these arguments can work: the data are there and readable, and every value has its type.

    Raises:
        EvaluatorError: one cannot; the text says which.
    """
    if "data" not in arguments:
        raise EvaluatorError("the evaluator loss needs data; give -E data=FILE")
    _check_values(arguments)
    source = token_source.find(arguments["data"], arguments.get("bin_dtype"), arguments.get("split"))
    if source.is_text and arguments.get("tokenizer") is not None:
        # A path of "" is no directory: what is given is looked at first.
        language_model.tokenizer_place("", None, arguments["tokenizer"])
    config = arguments.get("config")
    if config is not None and not os.path.exists(config):
        raise EvaluatorError(f"config {printable(str(config))} is not there; give a config file, or a directory that holds a config.json")


def _check_values(arguments: Mapping[str, Any]) -> None:
    for name in ("seq_len", "batch_size", "steps"):
        value = arguments.get(name)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise EvaluatorError(f"{name} must be a whole number from 1 on, not {printable(str(value))}")
    for name in ("tokenizer", "dtype", "bin_dtype", "split", "device", "config"):
        value = arguments.get(name)
        if value is not None and not isinstance(value, str):
            raise EvaluatorError(f"{name} must be text, not {printable(str(value))}")
    if not isinstance(arguments.get("trust_remote_code", False), bool):
        raise EvaluatorError(f"trust_remote_code must be true or false, not {printable(str(arguments['trust_remote_code']))}")
    language_model.check_dtype(arguments.get("dtype"))


def check_files(names: Collection[str], arguments: Mapping[str, Any]) -> None:
    """Nothing, when a checkpoint with these files around its weights can be evaluated.

    Raises:
        EvaluatorError: it has no config, or no tokenizer for data that are text, and none is given.
    """
    if language_model.CONFIG not in names and arguments.get("config") is None:
        raise EvaluatorError(f"there is no {language_model.CONFIG} in the checkpoint or its run's directory; give one with -E config=FILE")
    if arguments.get("tokenizer") is None and not language_model.has_tokenizer(names):
        source = token_source.find(arguments["data"], arguments.get("bin_dtype"), arguments.get("split"))
        if source.is_text:
            raise EvaluatorError("there is no tokenizer in the checkpoint or its run's directory; give one with -E tokenizer=DIRECTORY")


def warm() -> None:
    """Imports what an evaluation needs, so that a worker's children have it; no tensor is made, and no thread.

    Not ``datasets``: a thread of its allocator would stay.
    """
    language_model.warm()
    importlib.import_module("encodings.utf_32_le")
