"""lm-eval's model object around one checkpoint: its own weights, nothing from a hub."""

import contextlib
import inspect
import os
from collections.abc import Iterator, Mapping
from typing import Any

from assayer import language_model
from assayer.distributed import rank_of_process
from assayer.errors import EvaluatorError
from assayer.files import digest, printable
from assayer.harness.settings import Settings, nearest

__all__ = ["check_model", "describe", "load_model", "mark_of", "single_process"]

_BATCH_SIZE = 8
# What a launcher tells each process of its group; lm-eval and accelerate would form a group of their own from it.
_GROUP = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK")


def check_model(settings: Settings) -> None:
    """Nothing, when the installed lm-eval has this kind of model and it loads a checkpoint.

    Raises:
        EvaluatorError: it is not known (with the nearest names), needs a package that is missing, or evaluates a service.
    """
    _words(_class(settings.model), settings)
    if settings.model_args.get("tp_plan") and rank_of_process()[1] > 1:
        raise EvaluatorError("model_args tp_plan splits the model over the processes, which share out the requests; start one process")


def load_model(settings: Settings, path: str, tokenizer: str) -> Any:
    """The model of the Hugging Face directory ``path`` as lm-eval's ``LM``, alone in its process.

    Raises:
        EvaluatorError: the weights are not those that its config describes, or the model does not load.
    """
    model_class = _class(settings.model)
    words = _words(model_class, settings)
    if _is_transformers(model_class):
        words |= _places(settings, tokenizer)
    elif rank_of_process()[1] > 1:
        raise EvaluatorError(
            f"model {settings.model} shares out its work by itself (model_args, such as tensor_parallel_size); give it one process"
        )
    elif "tokenizer" in _takes(model_class):
        words["tokenizer"] = tokenizer
    strict = language_model.strict_loading() if _is_transformers(model_class) else contextlib.nullcontext()
    with language_model.with_config(path, settings.config) as folder, single_process(), strict:
        try:
            return model_class(pretrained=folder, **words)
        except (OSError, ValueError, ImportError, KeyError, AssertionError, TypeError) as error:
            line = printable(" ".join(str(error).split()))[:300]
            raise EvaluatorError(
                f"{printable(path)} does not load as lm-eval's model {settings.model}: {type(error).__name__}: {line}"
            ) from error


def describe(lm: Any) -> dict[str, Any]:
    """What is known of the weights: for a torch module its fingerprint and the number of its parameters."""
    import torch

    model = getattr(lm, "model", None)
    if not isinstance(model, torch.nn.Module):
        return {}
    return {"fingerprint": language_model.fingerprint(model), "parameters": sum(p.numel() for p in model.parameters())}


def mark_of(lm: Any, facts: Mapping[str, Any]) -> str:
    """What answers depend on beside the checkpoint's identity and the arguments: its config, and how it was merged.

    Args:
        lm: lm-eval's model.
        facts: what ``describe`` has told of it.
    """
    return digest(language_model.config_digest(lm.model), facts["fingerprint"]) if "fingerprint" in facts else ""


@contextlib.contextmanager
def single_process() -> Iterator[None]:
    """While it lasts, the environment tells of no group of processes, nor of what accelerate's launcher asks for."""
    hidden = {
        name: value for name, value in os.environ.items() if name in _GROUP or name.startswith(("ACCELERATE_", "TORCHELASTIC_", "FSDP_"))
    }
    for name in hidden:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(hidden)


def _places(settings: Settings, tokenizer: str) -> dict[str, Any]:
    """The device and the tokenizer of a transformers model."""
    device = settings.model_args.get("device", settings.device)
    trusted = bool(settings.model_args.get("trust_remote_code", settings.trust_remote_code))
    # A name is looked up in the local cache alone; lm-eval would ask the hub.
    found = tokenizer if os.path.isdir(tokenizer) else language_model.load_tokenizer(tokenizer, trusted)
    return {"tokenizer": found, "device": str(language_model.place_of(device))}


def _class(name: str) -> Any:
    import lm_eval.models  # noqa: F401  (it fills the registry)
    from lm_eval.api.registry import get_model, model_registry

    if name not in model_registry:
        raise EvaluatorError(f"lm-eval has no model {printable(name)}{nearest(name, model_registry.keys())}")
    try:
        return get_model(name)
    except ImportError as error:
        raise EvaluatorError(f"model {name} needs a package that is not installed here: {printable(str(error))[:200]}") from error


def _words(model_class: Any, settings: Settings) -> dict[str, Any]:
    """The keywords for the model, of those that were given and those that it takes."""
    takes = _takes(model_class)
    services = ("lm_eval.models.api_models", "lm_eval.models.openai_completions", "lm_eval.models.litellm_llms")
    if "pretrained" not in takes or any(base.__module__ in services for base in model_class.__mro__):
        raise EvaluatorError(f"model {settings.model} does not load a checkpoint's weights; give one that does, such as hf or vllm")
    given = {name: getattr(settings, name) for name in ("batch_size", "tokenizer", "dtype", "device")}
    given = {name: value for name, value in given.items() if value is not None}
    for name in given:
        if name not in takes:
            raise EvaluatorError(f"model {settings.model} takes no {name}")
    if settings.trust_remote_code:
        given["trust_remote_code"] = True
    return _batch(model_class, settings.model) | given | settings.model_args


def _batch(model_class: Any, name: str) -> dict[str, Any]:
    """The batch size where none was given; vllm's and sglang's own would be 1, where they can make up their batches by themselves."""
    if _is_transformers(model_class):
        return {"batch_size": _BATCH_SIZE}
    return {"batch_size": "auto"} if name.startswith(("vllm", "sglang")) else {}


def _takes(model_class: Any) -> set[str]:
    """The names of the keywords that a model takes, its bases' included."""
    inits = [base.__init__ for base in model_class.__mro__ if "__init__" in vars(base)]
    return {name for init in inits for name in inspect.signature(init).parameters}


def _is_transformers(model_class: Any) -> bool:
    return any(base.__module__ == "lm_eval.models.huggingface" for base in model_class.__mro__)
