"""From a client's request to a job: every word of it is checked, and none is ever a file to import."""

import contextlib
import os
import re
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from assayer import formats, kept
from assayer.checkpoint import Found, identity
from assayer.errors import CheckpointError, EvaluatorError, ProtocolError
from assayer.files import printable
from assayer.harness.settings import settings_of
from assayer.merge.run import find_checkpoint
from assayer.plan import Merging
from assayer.protocol import EvaluateRequest
from assayer.queues.served import Served
from assayer.record import results_folder, run_folder
from assayer.server.models import Model
from assayer.server.paths import Roots, inside_checkpoint, is_path, strings_in
from assayer.worker.answer import PATH_KEYS
from assayer.worker.hold import Bounds

__all__ = ["Order", "Rules", "order"]

# Seconds that a submission waits for a checkpoint that is still being written.
HALF_THERE = 3.0

# Arguments of models that lead to code: a client may not name any.
_CODE = {"include_path", "worker_cls", "worker_extension_cls", "logits_processors", "custom_generate", "steer_path"}
# What belongs to the request, or to a launcher, and is no argument of lm-eval's models.
_NO_MODEL_ARGS = ("num_gpus", "batch_size", "config", "tokenizer", "dtype", "trust_remote_code", *PATH_KEYS)


@dataclass(frozen=True)
class Rules:
    """What the server's owner has decided: see the command's flags. Paths are absolute, times seconds."""

    roots: Roots
    results_dir: str
    trust_remote_code: bool = False
    include_path: str | None = None
    timeout: int = 86400
    retries: int = 0
    gpus_per_eval: int = 1
    queue_max: int = 10_000
    bounds: Bounds = field(default_factory=Bounds)
    merging: Merging = field(default_factory=Merging)


@dataclass(frozen=True)
class Order:
    """A job to be queued, and the checkpoint that it is about, where a format knows it."""

    served: Served
    found: Found | None


def order(job: str, request: EvaluateRequest, model: Model, rules: Rules) -> Order:
    """The job that this request means.

    Raises:
        ProtocolError: it may not be done (403), cannot be done (422), or not yet (503).
    """
    _refuse_code(request, model, rules)
    path = _checkpoint_path(request, rules.roots)
    found = _found(path, request, model) if path else None
    second = kept.at(found.checkpoint.path) if found else None
    if found and second:
        # What a training keeps is still the checkpoint of its first name, which may be gone.
        found = Found(replace(found.checkpoint, path=rules.roots.resolve(second.checkpoint)), found.listing)
    weights = request.lmms_engine_kwargs.checkpoint_type if request.lmms_engine_kwargs else "regular"
    checkpoint = found.checkpoint.path if found else path
    merged_to = _merged_to(request, checkpoint, rules.roots)
    facts: dict[str, Any] = {"format": "", "step": None, "epoch": None, "tokens": None, "identity": ""}
    if found:
        found, told = _whole(found, weights)
        facts = _facts_of(found, told)
        facts["merges"] = formats.is_merged_for(found.checkpoint, model.kind != "own") or weights != "regular" or merged_to is not None
    elif model.kind == "lm_eval" or weights != "regular" or merged_to:
        where = printable(path) if path else "model_args names no path that"
        raise _refused(("model_args",), f"{where} is no checkpoint of a known format" if path else f"{where} leads to a checkpoint", path)
    evaluator = model.evaluator
    if model.kind == "lm_eval":
        evaluator = type(evaluator)(evaluator.name, evaluator.reference, _for_lm_eval(request, rules), evaluator.source)
    served = Served(
        checkpoint=checkpoint,
        evaluator=evaluator,
        results_dir=_results_dir(checkpoint, rules),
        timeout=rules.timeout,
        retries=rules.retries,
        weights=weights,
        merging=rules.merging,
        launcher="torchrun" if model.kind == "lm_eval" and request.num_gpus > 1 and rules.gpus_per_eval > 1 else None,
        job=job,
        kind=model.kind,
        request=request.to_json(),
        output_dir=_output_dir(request, checkpoint, rules.roots),
        merged_to=merged_to,
        kept=second.path if second else None,
        **facts,
    )
    return Order(served, found)


def _refused(loc: tuple[str | int, ...], text: str, value: object = None) -> ProtocolError:
    detail = {"type": "value_error", "loc": ["body", *loc], "msg": f"Value error, {text}", "input": value, "ctx": {"error": text}}
    return ProtocolError([detail])


def _refuse_code(request: EvaluateRequest, model: Model, rules: Rules) -> None:
    """Refuses words that would make a model, a task or lmms-eval's command line import, or run, what a client names."""
    given = dict(request.model_args or {})
    for name in _names_in(given):
        if name in _CODE:
            raise _refused(("model_args", name), f"{name} may not be given by a client", None)
    if not rules.trust_remote_code:
        if any(key == "trust_remote_code" and not _is_false(value) for key, value in _pairs(given)):
            raise _refused(("model_args", "trust_remote_code"), "trust_remote_code is not allowed by this server", True)
        if re.search(r"trust_remote_code|custom_generate", request.gen_kwargs or ""):
            raise _refused(("gen_kwargs",), "trust_remote_code is not allowed by this server", request.gen_kwargs)
    for text in strings_in(given):
        if is_path(text):
            rules.roots.resolve(text)
    if model.kind == "own":
        return
    for i, task in enumerate(request.tasks):
        if not re.fullmatch(r"\w[^/\\,\x00-\x1f]{,299}", task) or task.endswith((".yaml", ".yml", ".json", ".py")):
            raise _refused(("tasks", i), "a task is given by its name", task)
    if not request.tasks:
        raise _refused(("tasks",), "at least one task is needed", [])
    if model.kind == "lmms_eval":
        for name, value in given.items():
            if not re.fullmatch(r"[A-Za-z_]\w*", name) or re.search(r"[,\x00-\x1f]", str(value)):
                raise _refused(("model_args", name), "for lmms-eval a name is a word, and a value holds no comma", None)
        for name in ("batch_size", "gen_kwargs"):
            if re.search(r"[\x00-\x1f]", str(getattr(request, name))):
                raise _refused((name,), "it holds control characters", None)


def _names_in(value: Any) -> set[str]:
    return {key for key, _ in _pairs(value)}


def _pairs(value: Any) -> list[tuple[str, Any]]:
    """Every key of a JSON value, at any depth, with what it holds."""
    if isinstance(value, dict):
        return [*value.items(), *(pair for inner in value.values() for pair in _pairs(inner))]
    return [pair for inner in value for pair in _pairs(inner)] if isinstance(value, list) else []


def _is_false(value: Any) -> bool:
    return value in (False, None, 0) or str(value).strip().lower() in ("", "false", "no", "0", "none")


def _checkpoint_path(request: EvaluateRequest, roots: Roots) -> str:
    """The path of the checkpoint; empty where the request names none on this machine."""
    engine = request.lmms_engine_kwargs
    if engine is not None and engine.model_path is not None:
        return _present(engine.model_path, ("lmms_engine_kwargs", "model_path"), roots)
    for name in PATH_KEYS:
        text = (request.model_args or {}).get(name)
        if isinstance(text, str):
            return _present(text, ("model_args", name), roots) if is_path(text) else ""
    return ""


def _present(text: str, loc: tuple[str, ...], roots: Roots) -> str:
    path = roots.resolve(text)
    try:
        os.stat(path)
    except OSError as error:
        raise _refused(loc, f"{printable(path)[:500]} cannot be read: {error.strerror}", text) from None
    return path


def _found(path: str, request: EvaluateRequest, model: Model) -> Found | None:
    """The checkpoint at the path; with ``lmms_engine_kwargs`` also the newest one directly in it."""
    engine = request.lmms_engine_kwargs
    try:
        if engine is not None and engine.model_path is not None:
            return find_checkpoint(Path(path))
        return formats.identify_path(path)
    except CheckpointError as error:
        raise _refused(("lmms_engine_kwargs", "model_path"), str(error), path) from None
    except OSError as error:
        raise _refused(("model_args",), f"{printable(path)} cannot be read: {error.strerror}", path) from None


def _whole(found: Found, weights: str) -> tuple[Found, str]:
    """The checkpoint as it is once it is whole, and the identity of its weights; one that is still being written is waited for, a little.

    It is read where it was listed, which may be a second name.
    """
    deadline = time.monotonic() + HALF_THERE
    first, second = found.checkpoint.path, found.listing.path
    path = printable(first)
    while True:
        form, listing = formats.of(found.checkpoint), found.listing
        try:
            reason = form.missing(listing)
            if reason is None:
                if weights not in form.variants(listing):
                    raise _refused(("lmms_engine_kwargs", "checkpoint_type"), f"{path} holds no {weights} weights", weights)
                return Found(replace(found.checkpoint, position=form.position(listing)), listing), identity(listing, form.weights(listing))
        except (CheckpointError, OSError) as error:
            reason = str(error)
        if not os.path.lexists(first):
            raise _refused(("model_args",), f"{path} was deleted", first)
        if time.monotonic() > deadline:
            raise ProtocolError(f"{path} is not whole yet: {printable(reason)}", status=503)
        time.sleep(0.1)
        with contextlib.suppress(OSError):
            now = formats.identify_path(second)
            found = Found(replace(now.checkpoint, path=first), now.listing) if now else found


def _facts_of(found: Found, told: str) -> dict[str, Any]:
    at = found.checkpoint.position
    position = {"step": at.step, "epoch": at.epoch, "tokens": at.tokens}
    return {"format": found.checkpoint.format, **position, "identity": told, "signature": found.listing.signature()}


def _merged_to(request: EvaluateRequest, checkpoint: str, roots: Roots) -> str | None:
    engine = request.lmms_engine_kwargs
    if engine is None or engine.output_path is None:
        return None
    target, loc = roots.resolve(engine.output_path), ("lmms_engine_kwargs", "output_path")
    if os.path.lexists(target):
        raise _refused(loc, f"{printable(target)} is there already; remove it, or give another output_path", engine.output_path)
    if inside_checkpoint(target, checkpoint):
        raise _refused(loc, f"{printable(target)} lies inside a checkpoint, where nothing is ever written", engine.output_path)
    return target


def _output_dir(request: EvaluateRequest, checkpoint: str, roots: Roots) -> str | None:
    """Where the results' files go; None for a place inside a checkpoint, which would break its trainer's rotation."""
    if request.output_dir is None:
        return None
    path = roots.resolve(request.output_dir)
    return None if inside_checkpoint(path, checkpoint) else path


def _results_dir(checkpoint: str, rules: Rules) -> str | None:
    """None where the record can be written beside the checkpoint."""
    if not checkpoint:
        return rules.results_dir
    run, folder = run_folder(Path(checkpoint)), results_folder(Path(checkpoint))
    place = folder if folder.is_dir() else run
    return None if os.access(place, os.W_OK | os.X_OK) and rules.roots.has(str(place)) else rules.results_dir


def _for_lm_eval(request: EvaluateRequest, rules: Rules) -> dict[str, Any]:
    """The arguments of the built-in evaluator lm_eval.

    Raises:
        ProtocolError: it does not take them.
    """
    given = dict(request.model_args or {})
    merged = request.lmms_engine_kwargs.model_path if request.lmms_engine_kwargs else None
    no_args = {*_NO_MODEL_ARGS, *(name for name, value in given.items() if merged is not None and value == merged)}
    arguments: dict[str, Any] = {
        "tasks": list(request.tasks),
        "model": request.model,
        "num_fewshot": request.num_fewshot,
        "batch_size": request.batch_size or given.get("batch_size"),
        "limit": request.limit or None,
        "gen_kwargs": request.gen_kwargs,
        "log_samples": request.log_samples,
        "predict_only": request.predict_only or None,
        "include_path": rules.include_path,
        **{name: given.get(name) for name in ("config", "tokenizer", "dtype")},
        "trust_remote_code": (not _is_false(given.get("trust_remote_code"))) or None,
        "model_args": {name: value for name, value in given.items() if name not in no_args} or None,
    }
    chosen = {name: value for name, value in arguments.items() if value is not None}
    try:
        settings_of(chosen)
    except EvaluatorError as error:
        raise _refused((), str(error).removeprefix("-E "), None) from None
    except OverflowError:
        raise _refused((), "a number is too large", None) from None
    return chosen
