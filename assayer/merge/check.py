"""Compares the names and shapes of weights with the model that a config describes, before a byte of them is copied.

The model is built on the meta device, where it takes no memory; transformers' own loading says what it would miss, not know, or find in
another shape, so that its renamings count. A model loaded with such a difference would have random weights.
"""

import os
from collections.abc import Sequence
from typing import Any

from assayer.errors import CheckpointError, UsageError
from assayer.files import printable
from assayer.merge.names import Target

__all__ = ["check_model"]

_SHOWN = 5
# What a config asks of the machine that loads it, and not of the weights.
_OF_THIS_MACHINE = ("attn_implementation", "_attn_implementation", "quantization_config")


def check_model(wanted: Sequence[Target], config: dict[str, Any]) -> str | None:
    """None when the weights are those of the model, or a sentence why that cannot be told (an architecture that transformers lacks).

    Raises:
        CheckpointError: weights are missing, unexpected or of another shape; it lists them.
        UsageError: transformers is not installed.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        import torch
        import transformers
    except ImportError as error:
        raise UsageError(
            f"checking the weights against their model needs {error.name}: pip install 'assayer[hf]', or --no_check_model"
        ) from None
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    known = config.get("model_type")
    if known not in transformers.CONFIG_MAPPING:
        return f"not checked against a model: transformers knows no model type {printable(str(known))!r}"
    try:
        made = transformers.AutoConfig.for_model(**{key: value for key, value in config.items() if key not in _OF_THIS_MACHINE})
    except Exception as error:
        # A config's values are checked by whatever raises what it likes.
        return _not_checked(error)
    kind = _class_of(transformers, made)
    if kind is None:
        return f"not checked against a model: transformers has no {printable(str(made.architectures or type(made).__name__))}"
    state = {t.name: torch.empty(t.shape, dtype=getattr(torch, t.dtype.torch), device="meta") for t in wanted}
    try:
        with torch.device("meta"):
            model = kind(made)
        missing, unexpected, misshapen = _compare(model, made, state)
    except Exception as error:
        return _not_checked(error)
    problems = [
        f"{len(found)} {what} ({_some(found)})"
        for what, found in (("missing", missing), ("unexpected", unexpected), ("of another shape", misshapen))
        if found
    ]
    if problems:
        raise CheckpointError(
            f"the weights are not those of the model that config.json describes ({kind.__name__}): {', '.join(problems)}; "
            "give its own config with --hf_config, or other names with --key_map"
        )
    return None


def _class_of(transformers: Any, config: Any) -> Any:
    """The model's class: the architecture that the config names, else the one with a head that goes with its type."""
    names = config.architectures
    for name in names if isinstance(names, list) else ():
        kind = getattr(transformers, str(name), None)
        return kind if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel) else None
    for auto in ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMaskedLM", "AutoModel"):
        kind = getattr(transformers, auto)._model_mapping.get(type(config), None)
        if kind is not None:
            return kind[0] if isinstance(kind, tuple) else kind
    return None


def _not_checked(error: Exception) -> str:
    text = " ".join(printable(str(error)).split())[:300]
    return f"not checked against a model, which cannot be made from config.json: {type(error).__name__}: {text}"


def _compare(model: Any, config: Any, state: dict[str, Any]) -> tuple[list[str], list[str], list[str]]:
    """Missing, unexpected and misshapen names."""
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    tied = _tied(model, config)
    direct = {name: tuple(value.shape) for name, value in state.items()}
    if (
        direct.keys() - {n for n in direct if n.endswith("rotary_emb.inv_freq")} <= expected.keys()
        and expected.keys() - tied <= direct.keys()
    ):
        return [], [], [f"{n} {list(direct[n])}, the model's is {list(s)}" for n, s in expected.items() if n in direct and direct[n] != s]
    # By names of older files, which transformers renames and puts together while it loads.
    _, told = type(model).from_pretrained(
        None, config=config, state_dict=state, output_loading_info=True, ignore_mismatched_sizes=True, device_map="meta", dtype="auto"
    )
    misshapen = [f"{entry[0]} {list(entry[1])}, the model's is {list(entry[2])}" for entry in told.get("mismatched_keys", ())]
    return sorted(told["missing_keys"]), sorted(told["unexpected_keys"]), sorted(misshapen)


def _tied(model: Any, config: Any) -> set[str]:
    """Names that need not be there, because the model fills them from others."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    if not getattr(config, "tie_word_embeddings", getattr(text, "tie_word_embeddings", False)):
        return set()
    return set(getattr(model, "_tied_weights_keys", None) or ())


def _some(names: list[str]) -> str:
    shown = ", ".join(printable(name) for name in names[:_SHOWN])
    return shown + (", ..." if len(names) > _SHOWN else "")
