"""The arguments of the evaluator ``lm_eval``, checked and in one form."""

import difflib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from assayer.errors import EvaluatorError
from assayer.files import printable

__all__ = ["DEFAULT_TASKS", "Settings", "nearest", "pairs_of", "settings_of"]

DEFAULT_TASKS = "hellaswag,arc_easy,arc_challenge,winogrande,piqa,boolq"

# What lm-eval's models take that leads to weights other than the checkpoint's.
_OTHER_WEIGHTS = ("pretrained", "model", "path", "load", "revision", "subfolder", "gguf_file", "peft", "delta")


@dataclass(frozen=True)
class Settings:
    """What one evaluation is asked to do.

    ``limit``: documents a task (a whole number), or a share of them (below 1). ``batch_size``: a number, ``auto``, or ``auto:N`` (found
    anew N times); None: 8, or what the kind of model makes up by itself. ``model_args`` and ``gen_kwargs``: by name, as lm-eval's models
    and ``generate`` take them.
    """

    tasks: tuple[str, ...]
    num_fewshot: int | None = None
    batch_size: int | str | None = None
    limit: float | None = None
    include_path: str | None = None
    apply_chat_template: bool = False
    log_samples: bool = False
    predict_only: bool = False
    model: str = "hf"
    model_args: dict[str, Any] = field(default_factory=dict)
    gen_kwargs: dict[str, Any] = field(default_factory=dict)
    tokenizer: str | None = None
    dtype: str | None = None
    device: str | None = None
    config: str | None = None
    trust_remote_code: bool = False


def settings_of(arguments: Mapping[str, Any]) -> Settings:
    """The settings that these arguments mean; those not given have their defaults, None counts as not given.

    Raises:
        EvaluatorError: a value is not of the kind that the argument takes; the text says which.
    """
    given = {name: value for name, value in arguments.items() if value is not None}
    read: dict[str, Any] = {"tasks": _names(given.pop("tasks", DEFAULT_TASKS))}
    for name, value in given.items():
        read[name] = _READERS[name](name, value)
    settings = Settings(**read)
    for name in ("tokenizer", "dtype", "device", "trust_remote_code", "batch_size"):
        if name in given and name in settings.model_args:
            raise EvaluatorError(f"{name} is given twice, as an argument of its own and in model_args; give it once")
    return settings


def nearest(name: str, known: Iterable[str], to: str = "") -> str:
    """``; the nearest<to>: a, b, c`` out of what is known, most similar first; empty when nothing is similar."""
    found = difflib.get_close_matches(name, list(known), n=5, cutoff=0.6)
    return f"; the nearest{to}: {', '.join(found)}" if found else ""


def _wrong(name: str, value: object, takes: str) -> EvaluatorError:
    return EvaluatorError(f"-E {name}={printable(str(value))[:80]}: it takes {takes}")


def _names(value: object) -> tuple[str, ...]:
    names = value.split(",") if isinstance(value, str) else value
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise _wrong("tasks", value, "names of tasks, groups or tags with commas between, or a JSON list of them")
    stripped = [name.strip() for name in names if name.strip()]
    if not stripped:
        raise _wrong("tasks", value, "at least one name")
    return tuple(dict.fromkeys(stripped))


def _text(name: str, value: object) -> str:
    if not isinstance(value, str) or not value:
        raise _wrong(name, value, "a word")
    return value


def _flag(name: str, value: object) -> bool:
    said = {"true": True, "false": False}.get(value.lower()) if isinstance(value, str) else value
    if not isinstance(said, bool):
        raise _wrong(name, value, "true or false")
    return said


def _count(name: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise _wrong(name, value, "a whole number, 0 or more")
    return value


def _limit(name: str, value: object) -> float:
    fits = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0
    if not fits or (isinstance(value, float) and value > 1 and not value.is_integer()):
        raise _wrong(name, value, "a number of documents a task (1 or more), or a share of them (below 1)")
    return value  # type: ignore[return-value]


def _batch_size(name: str, value: object) -> int | str:
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    if isinstance(value, str) and re.fullmatch(r"[1-9]\d{0,8}", value):
        return int(value)
    if isinstance(value, str) and re.fullmatch(r"auto(:[1-9]\d{0,3})?", value):
        return value
    raise _wrong(name, value, "a number above 0, auto, or auto:N")


def _folder(name: str, value: object) -> str:
    path = Path(_text(name, value)).expanduser()
    if not path.is_dir():
        raise EvaluatorError(f"{name} {printable(str(value))}: no such folder; give the one that holds your tasks' YAML files")
    return str(path.absolute())


def pairs_of(name: str, value: object) -> dict[str, Any]:
    """What ``gen_kwargs`` or ``model_args`` mean: pairs of name and value, from ``name=value,...`` or JSON.

    Raises:
        EvaluatorError: it is neither.
    """
    if isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise _wrong(name, value, "name=value pairs with commas between, or a JSON object") from None
    elif isinstance(value, str):
        pairs = [part.partition("=") for part in value.split(",") if part]
        if not all(key.strip() and equals for key, equals, _ in pairs):
            raise _wrong(name, value, "name=value pairs with commas between, or a JSON object")
        value = {key.strip(): _plain(text.strip()) for key, _, text in pairs}
    if not isinstance(value, dict):
        raise _wrong(name, value, "name=value pairs with commas between, or a JSON object")
    return value


def _plain(text: str) -> Any:
    """A value as lm-eval's own command line reads it: a number, True or False, None, else the text."""
    words = {"True": True, "False": False, "None": None, "none": None}
    if text in words:
        return words[text]
    try:
        return json.loads(text)
    except ValueError:
        return text


def _model_args(name: str, value: object) -> dict[str, Any]:
    pairs = pairs_of(name, value)
    for key in _OTHER_WEIGHTS:
        if key in pairs:
            raise EvaluatorError(f"model_args may not have {key!r}: the weights that are evaluated are the checkpoint's")
    return pairs


_READERS = {
    "num_fewshot": _count,
    "batch_size": _batch_size,
    "limit": _limit,
    "include_path": _folder,
    "apply_chat_template": _flag,
    "log_samples": _flag,
    "predict_only": _flag,
    "model": _text,
    "model_args": _model_args,
    "gen_kwargs": pairs_of,
    "tokenizer": _text,
    "dtype": _text,
    "device": _text,
    "config": _text,
    "trust_remote_code": _flag,
}
