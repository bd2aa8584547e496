"""From a client's request to a job: every word of it is checked, and none is ever a file to import."""

import os
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
from assayer.server.allowed import OF_THE_REQUEST, is_false, refuse, refuse_code_beside, refused
from assayer.server.models import Model
from assayer.server.paths import Roots, is_path, why_not_into, within
from assayer.worker.answer import PATH_KEYS, paths_in
from assayer.worker.hold import Bounds

__all__ = ["Order", "Rules", "order"]


class NotWholeError(ProtocolError):
    """A checkpoint is still being written; a moment later it may be whole."""


@dataclass(frozen=True)
class Rules:
    """What the server's owner has decided: see the command's flags. Paths are absolute, times seconds."""

    roots: Roots
    results_dir: str
    trust_remote_code: bool = False
    model_args: frozenset[str] = frozenset()
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
    refuse(request, model.kind, rules.roots, rules.trust_remote_code, rules.model_args)
    path = _checkpoint_path(request, rules.roots)
    found = _found(path, request, rules.roots) if path else None
    second = kept.at(found.checkpoint.path) if found else None
    if found and second:
        # What a training keeps is still the checkpoint of its first name, which may be gone.
        found = Found(replace(found.checkpoint, path=rules.roots.resolve(second.checkpoint)), found.listing)
    if path and model.kind == "lmms_eval" and not rules.trust_remote_code:
        refuse_code_beside(found.listing.path if found else path)
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
        raise refused(("model_args",), f"{where} is no checkpoint of a known format" if path else f"{where} leads to a checkpoint", path)
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
        raise refused(loc, f"{printable(path)[:500]} cannot be read: {error.strerror}", text) from None
    return path


def _found(path: str, request: EvaluateRequest, roots: Roots) -> Found | None:
    """The checkpoint at the path; with ``lmms_engine_kwargs`` also the newest one directly in it."""
    engine = request.lmms_engine_kwargs
    try:
        if engine is not None and engine.model_path is not None:
            return within(find_checkpoint(Path(path)), roots)
        return formats.identify_path(path)
    except CheckpointError as error:
        raise refused(("lmms_engine_kwargs", "model_path"), str(error), path) from None
    except OSError as error:
        raise refused(("model_args",), f"{printable(path)} cannot be read: {error.strerror}", path) from None


def _whole(found: Found, weights: str) -> tuple[Found, str]:
    """The checkpoint with its position, and the identity of its weights, read where it was listed, which may be a second name.

    Raises:
        NotWholeError: it is still being written.
        ProtocolError: it was deleted, or does not hold these weights.
    """
    form, listing = formats.of(found.checkpoint), found.listing
    path = printable(found.checkpoint.path)
    try:
        reason = form.missing(listing)
        if reason is None:
            if weights not in form.variants(listing):
                raise refused(("lmms_engine_kwargs", "checkpoint_type"), f"{path} holds no {weights} weights", weights)
            told = identity(listing, form.weights(listing))
            at = form.position(listing)
            if at.number is None:
                # Under a second name, the folder's name that would tell it is another one.
                at = form.position(replace(listing, path=found.checkpoint.path))
            return Found(replace(found.checkpoint, position=at), listing), told
    except (CheckpointError, OSError) as error:
        reason = str(error)
    if not os.path.lexists(found.checkpoint.path):
        raise refused(("model_args",), f"{path} was deleted", found.checkpoint.path)
    raise NotWholeError(f"{path} is not whole yet: {printable(reason)}", status=503)


def _facts_of(found: Found, told: str) -> dict[str, Any]:
    at = found.checkpoint.position
    position = {"step": at.step, "epoch": at.epoch, "tokens": at.tokens}
    return {"format": found.checkpoint.format, **position, "identity": told, "signature": found.listing.signature()}


def _merged_to(request: EvaluateRequest, checkpoint: str, roots: Roots) -> str | None:
    engine = request.lmms_engine_kwargs
    if engine is None or engine.output_path is None:
        return None
    target = roots.resolve(engine.output_path)
    if why := why_not_into(target, checkpoint):
        raise refused(("lmms_engine_kwargs", "output_path"), why, engine.output_path)
    return target


def _output_dir(request: EvaluateRequest, checkpoint: str, roots: Roots) -> str | None:
    """Where the results' files go; None for a place inside a checkpoint, which would break its trainer's rotation."""
    if request.output_dir is None:
        return None
    path = roots.resolve(request.output_dir)
    return None if formats.is_inside_checkpoint(path, checkpoint) else path


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
    no_args = {*OF_THE_REQUEST, *paths_in(request.to_json())}
    arguments: dict[str, Any] = {
        "tasks": list(request.tasks),
        "model": request.model,
        "num_fewshot": request.num_fewshot,
        "batch_size": request.batch_size or given.get("batch_size"),
        # -1 is upstream's word for all.
        "limit": None if request.limit in (0, -1) else request.limit,
        "gen_kwargs": request.gen_kwargs,
        "log_samples": request.log_samples,
        "predict_only": request.predict_only or None,
        "include_path": rules.include_path,
        **{name: given.get(name) for name in ("config", "tokenizer", "dtype")},
        "trust_remote_code": (not is_false(given.get("trust_remote_code"))) or None,
        "model_args": {name: value for name, value in given.items() if name not in no_args} or None,
    }
    chosen = {name: value for name, value in arguments.items() if value is not None}
    try:
        settings_of(chosen)
    except EvaluatorError as error:
        raise refused((), str(error).removeprefix("-E "), None) from None
    except OverflowError:
        raise refused((), "a number is too large", None) from None
    return chosen
