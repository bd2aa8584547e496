"""A causal language model out of a Hugging Face directory, with the very weights that lie there, or an error.

transformers fills what a checkpoint lacks with random numbers, ignores what it does not know, and takes a path that is not there for a name
on its hub; each of these gives figures that look like an evaluation. Here nothing is fetched, and every difference between the files and
the model is an error. torch and transformers (4.46 and later) are imported when a function needs them.
"""

import contextlib
import importlib
import importlib.util
import json
import os
import re
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from assayer.errors import EvaluatorError
from assayer.files import digest, printable

if TYPE_CHECKING:
    import torch

__all__ = [
    "CONFIG",
    "DTYPES",
    "check_dtype",
    "config_digest",
    "fingerprint",
    "has_tokenizer",
    "load",
    "load_config",
    "load_tokenizer",
    "place_of",
    "strict_loading",
    "tokenizer_place",
    "warm",
    "with_config",
]

CONFIG = "config.json"
# The words that a dtype is given by; "auto" is what the config says, else the dtype of the first floating tensor in the file.
DTYPES = ("auto", "float32", "bfloat16", "float16")

# One of these is enough to make a tokenizer of. A chat template or a map of special tokens alone is not.
_TOKENIZER = re.compile(
    r"tokenizer\.(json|model)|tokenizer_config\.json|tekken\.json|vocab\.(json|txt)|spiece\.model|sentencepiece.*\.model|.*\.tiktoken"
)
_CODE = re.compile(r"\w+\.py")
# Where trainers keep the tokenizer below a checkpoint; "" is the checkpoint itself.
_INSIDE = ("", "huggingface", "actor/huggingface")
# Elements of each tensor that a fingerprint is made of.
_SAMPLES = 256
# Names of keys that an error shows.
_SHOWN = 3
# Constants of the causal mask that GPT-2 and GPT-Neo have kept beside their weights; not every version passes over each.
_CONSTANTS = re.compile(r"(.*\.)?(masked_bias|attn\.bias|attn\.attention\.bias)")
# What a model and a tokenizer load with; of the models Llama alone, with which come the parts that all share.
_WARM = (
    "torch",
    "transformers.modeling_utils",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.modeling_llama",
    "tokenizers",
)
# The first release of transformers that calls the argument dtype and not torch_dtype.
_DTYPE_SINCE = (4, 56)


def load(
    path: str, *, config: str | None = None, dtype: str | None = None, device: str | None = None, trust_remote_code: bool = False
) -> "torch.nn.Module":
    """The model of a Hugging Face directory (``AutoModelForCausalLM``), in eval mode, on its device.

    Args:
        path: of the directory; never a name on a hub.
        config: a config file or a directory with one, for a directory that carries none; it wins over the directory's own.
        dtype: one of ``DTYPES``; None is ``auto``.
        device: as torch names it; None is ``place_of``'s choice.
        trust_remote_code: whether Python code beside the config may be run.

    Raises:
        EvaluatorError: there is no config, the model is not known, or a tensor is missing, unexpected or of another shape.
    """
    check_dtype(dtype)
    place, transformers = place_of(device), _need("transformers")
    words: dict[str, Any] = {_dtype_word(transformers): dtype or "auto", "trust_remote_code": trust_remote_code}
    if place.type == "cuda" and _has_accelerate():
        # Read straight into the GPU's memory.
        words["device_map"] = {"": str(place)}
    with with_config(path, config) as folder, strict_loading():
        try:
            model: torch.nn.Module = transformers.AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, **words)
        except (OSError, ValueError, ImportError, KeyError) as error:
            raise _not_loaded(path, error) from error
    return model.to(place).eval()


def load_config(path: str, config: str | None = None, trust_remote_code: bool = False) -> Any:
    """The config that ``load`` would take, without the weights.

    Raises:
        EvaluatorError: there is none, or it is of no known model.
    """
    transformers = _need("transformers")
    with with_config(path, config) as folder, _offline():
        try:
            return transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
        except (OSError, ValueError, ImportError, KeyError) as error:
            raise _not_loaded(path, error) from error


def _not_loaded(path: str, error: Exception) -> EvaluatorError:
    if "trust_remote_code" in str(error):
        return EvaluatorError(f"{printable(path)} brings Python code of its own, which is run only when -E trust_remote_code=true is given")
    return EvaluatorError(f"{printable(path)} does not load as a causal language model: {_first_line(error)}")


def check_dtype(dtype: str | None) -> None:
    """Nothing, when ``load`` takes this dtype.

    Raises:
        EvaluatorError: it is none of ``DTYPES``.
    """
    if dtype is not None and dtype not in DTYPES:
        raise EvaluatorError(f"dtype {printable(str(dtype))} is not known; give one of {', '.join(DTYPES)}")


def place_of(device: str | None) -> "torch.device":
    """The device of this process: what was given, else a GPU where there is one, else the CPU.

    A ``cuda`` without a number is, among several processes, the GPU of this process's ``LOCAL_RANK``.

    Raises:
        EvaluatorError: it is no device, or no CUDA answers.
    """
    _need("torch")
    import torch

    cuda = torch.cuda.is_available()
    try:
        place = torch.device(device or ("cuda" if cuda else "cpu"))
    except RuntimeError as error:
        raise EvaluatorError(f"device {printable(str(device))} is not known: {_first_line(error)}") from None
    if place.type != "cuda":
        return place
    if not cuda:
        raise EvaluatorError(f"device {printable(str(device))}: no CUDA GPU is seen by this process; leave it out, or give device=cpu")
    number = int(os.environ.get("LOCAL_RANK", "0")) if place.index is None else place.index
    if number >= torch.cuda.device_count():
        raise EvaluatorError(f"device cuda:{number} is not there: this process sees {torch.cuda.device_count()} GPUs, counted from 0")
    return torch.device("cuda", number)


@contextlib.contextmanager
def strict_loading() -> Iterator[None]:
    """While it lasts, every ``PreTrainedModel.from_pretrained`` of this process loads completely, and nothing is asked of a hub.

    For loaders that are not ours. Tied weights, and buffers that a model itself ignores, are neither missing nor unexpected, as
    transformers counts them. Of a tensor whose shape differs both shapes are told.

    Raises:
        EvaluatorError: (inside the block) a tensor is missing, unexpected or of another shape.
    """
    model_class = _need("transformers").PreTrainedModel
    own = model_class.__dict__["from_pretrained"]

    def from_pretrained(cls: Any, name: Any, *arguments: Any, **words: Any) -> Any:
        asked = words.pop("output_loading_info", False)
        # Without the second, what differs in shape is raised without names by some versions.
        words |= {"local_files_only": True, "ignore_mismatched_sizes": True}
        model, told = own.__func__(cls, name, *arguments, output_loading_info=True, **words)
        _refuse_differences(str(name), told)
        return (model, told) if asked else model

    model_class.from_pretrained = classmethod(from_pretrained)
    try:
        with _offline():
            yield
    finally:
        model_class.from_pretrained = own


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """While it lasts, huggingface_hub sends nothing; a name is looked up in the local cache alone.

    ``local_files_only`` is not enough: version 1.x asks its server about the headers of a request that it then does not send.
    """
    constants = _need("huggingface_hub.constants")
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _refuse_differences(name: str, told: dict[str, Any]) -> None:
    missing, unexpected = sorted(told["missing_keys"]), sorted(key for key in told["unexpected_keys"] if not _CONSTANTS.fullmatch(key))
    mismatched = sorted(f"{key}: {tuple(there)} there, {tuple(here)} in the model" for key, there, here in told["mismatched_keys"])
    # Some versions count a tensor of another shape among the missing ones too.
    other = {key for key, _, _ in told["mismatched_keys"]}
    missing = [key for key in missing if key not in other]
    parts = [
        f"{len(keys)} {what} ({_some(keys)})"
        for keys, what in ((missing, "missing"), (unexpected, "unexpected"), (mismatched, "of another shape"))
        if keys
    ]
    if not parts and told.get("error_msgs"):
        parts = [_first_line(ValueError("; ".join(told["error_msgs"])))]
    if parts:
        raise EvaluatorError(
            f"the weights in {printable(name)} are not those of the model that its config describes: tensors {', '.join(parts)}; "
            "give the config of this very model with -E config=..., or merge the checkpoint so that its names fit"
        )


def _some(keys: list[str]) -> str:
    return printable(", ".join(keys[:_SHOWN])) + (", ..." if len(keys) > _SHOWN else "")


def fingerprint(model: "torch.nn.Module") -> str:
    """A digest of what is loaded: names, shapes, dtypes and up to 256 evenly spaced values of every parameter and persistent buffer.

    The same weights in the same dtype have the same fingerprint on every device; buffers that a model computes for itself are left out,
    since a GPU rounds them otherwise. Training changes every tensor, so two checkpoints of one
    run differ.
    """
    import torch

    found = {name: tensor.detach() for name, tensor in sorted(model.state_dict().items()) if isinstance(tensor, torch.Tensor)}
    return digest(*(part for name, tensor in found.items() for part in (f"{name} {tuple(tensor.shape)} {tensor.dtype}", _sample(tensor))))


def config_digest(model: "torch.nn.Module") -> str:
    """A digest of the config that a model was made with, without the place where it lay; of one that has none, of its class's name."""
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "to_dict"):
        return digest(type(model).__qualname__)
    told = {name: value for name, value in config.to_dict().items() if name != "_name_or_path"}
    return digest(json.dumps(told, sort_keys=True, default=str))


def _sample(tensor: "torch.Tensor") -> bytes:
    """The bytes of some elements."""
    import torch

    flat = (torch.view_as_real(tensor) if tensor.is_complex() else tensor).reshape(-1)
    count = flat.numel()
    if count > _SAMPLES:
        # Whole numbers: a GPU and a CPU round fractions differently.
        flat = flat[torch.tensor([i * (count - 1) // (_SAMPLES - 1) for i in range(_SAMPLES)], device=flat.device)]
    return flat.cpu().contiguous().view(torch.uint8).numpy().tobytes()


def has_tokenizer(names: Collection[str]) -> bool:
    """True when one of these file names is enough to make a tokenizer of."""
    return any(_TOKENIZER.fullmatch(name) for name in names)


def tokenizer_place(path: str, original_path: str | None = None, given: str | None = None) -> str:
    """The directory, or the name, of the tokenizer: the one given, else the checkpoint's own, else the one in its run's directory.

    Args:
        path: the Hugging Face directory that is evaluated.
        original_path: the checkpoint's own path, where ``path`` is a merged copy or a second name of it; beside it lies the run.
        given: a directory, or the name of a tokenizer that the local cache holds.

    Raises:
        EvaluatorError: what was given is not there or holds none, or there is none.
    """
    if given is not None:
        return _given_tokenizer(given)
    places = [Path(path)]
    if original_path is not None:
        own = Path(original_path)
        places += [own / inside for inside in _INSIDE] + [own.absolute().parent]
    for place in places:
        if has_tokenizer(_names(place)):
            return str(place)
    raise EvaluatorError(
        f"{printable(original_path or path)} has no tokenizer, nor has its run's directory; give one with -E tokenizer=DIRECTORY"
    )


def _given_tokenizer(given: str) -> str:
    if os.path.isdir(given):
        if not has_tokenizer(_names(Path(given))):
            raise EvaluatorError(f"tokenizer {printable(given)} is no directory with a tokenizer's files (tokenizer.json and the like)")
    elif not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", given) or given.startswith("."):
        # A name has one slash at most.
        raise EvaluatorError(f"tokenizer {printable(given)} is not there; give a directory with a tokenizer's files")
    return given


def load_tokenizer(place: str, trust_remote_code: bool = False) -> Any:
    """The tokenizer (``AutoTokenizer``) of a directory, or of a name that the local cache holds; nothing is fetched.

    Raises:
        EvaluatorError: it does not load.
    """
    transformers = _need("transformers")
    try:
        with _offline():
            return transformers.AutoTokenizer.from_pretrained(place, local_files_only=True, trust_remote_code=trust_remote_code)
    except Exception as error:
        # Each tokenizer's own parser has errors of its own, plain Exception among them.
        raise EvaluatorError(f"the tokenizer of {printable(place)} does not load: {_first_line(error)}") from error


@contextlib.contextmanager
def with_config(path: str, config: str | None) -> Iterator[str]:
    """A directory that has the config: ``path`` itself, or, when a config is given, a temporary one of links to its files and that config.

    Args:
        config: a config file, or a directory with a ``config.json`` (and the Python code that it names, if any).

    Raises:
        EvaluatorError: there is no such directory or config.
    """
    if not os.path.isdir(path):
        raise EvaluatorError(f"{printable(path)} is not a Hugging Face directory; a model is loaded from one with {CONFIG} and its weights")
    if config is None:
        if not os.path.isfile(os.path.join(path, CONFIG)):
            raise EvaluatorError(f"{printable(path)} has no {CONFIG}; give one with -E config=FILE (or a directory that holds it)")
        yield path
        return
    around = _around(Path(config))
    with tempfile.TemporaryDirectory(prefix="assayer-config-") as folder:
        for name, file in ({name: Path(path, name) for name in _names(Path(path))} | around).items():
            os.symlink(file.absolute(), Path(folder, name))
        yield folder


def _around(config: Path) -> dict[str, Path]:
    """The given config, and the code that lies beside it, by name."""
    if config.is_file():
        return {CONFIG: config}
    if not (config / CONFIG).is_file():
        raise EvaluatorError(f"config {printable(str(config))} is no file, nor a directory that holds a {CONFIG}")
    return {CONFIG: config / CONFIG} | {name: config / name for name in _names(config) if _CODE.fullmatch(name)}


def _names(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []


def _first_line(error: Exception) -> str:
    """What an error of another library says, on one line of bounded length."""
    said = " ".join(line.strip() for line in str(error).splitlines() if line.strip())
    return printable(f"{type(error).__name__}: {said[:300]}{'...' if len(said) > 300 else ''}")


def _dtype_word(transformers: Any) -> str:
    return "dtype" if tuple(int(part) for part in transformers.__version__.split(".")[:2]) >= _DTYPE_SINCE else "torch_dtype"


def _has_accelerate() -> bool:
    return importlib.util.find_spec("accelerate") is not None


def warm() -> None:
    """Imports what ``load`` and ``load_tokenizer`` need, before a worker forks; no tensor is made, and no thread."""
    for name in _WARM:
        importlib.import_module(name)
    with contextlib.suppress(ImportError, AttributeError):
        # Version 5 compiles nine hundred patterns for the names of all models' tensors when it loads its first one.
        importlib.import_module("transformers.conversion_mapping").get_checkpoint_conversion_mapping("llama")


def _need(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise EvaluatorError(f"a language model needs {name} ({error}); install it: pip install 'assayer[hf]'") from None
