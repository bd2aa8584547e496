"""Which of the tensors in a checkpoint are the model's, and by which names: beside it lie optimizers, loaders and random states.

A tensor's path is the way to it through nested dictionaries, such as ``("model", "layers.0.weight")``; a distributed checkpoint keeps it
as planner data, a ``torch.save`` file by its very nesting. So a container is told from a model whose own parameters begin with the same
word.
"""

import re
from collections.abc import Iterable

from assayer.errors import CheckpointError
from assayer.files import printable

__all__ = ["VARIANTS", "model_names"]

# The weights that a checkpoint may hold: those that are trained, and their exponential moving average.
VARIANTS = ("regular", "ema")

_MODEL = ("model", "state_dict", "model_state_dict", "module", "models", "network", "net", "weights", "params")
_EMA = ("ema", "ema_model", "model_ema", "ema_state_dict", "ema_model_state_dict", "ema_weights")
_AROUND = ("app", "state", "checkpoint")
_OTHER = re.compile(
    r"optim(izer)?s?(_\d+|_states?|_state_dicts?)?|.*scheduler.*|data_?loaders?|train(er)?_state|rng.*|.*_rng_state.*|loops|callbacks|extra_state|scaler|sampler"
    r"|hyper_parameters|args|config"
)


def model_names(paths: Iterable[tuple[str, ...]], variant: str = "regular") -> dict[tuple[str, ...], str]:
    """The model's own paths among all, each with the name that the model gives to the tensor.

    Args:
        paths: of every tensor.
        variant: ``regular`` or ``ema``.

    Raises:
        CheckpointError: there are no such weights.
    """
    kept = [(path, path) for path in paths if path]
    wanted = _EMA if variant == "ema" else _MODEL
    while True:
        inner = [(path, rest) for path, rest in kept if len(rest) > 1]
        container = next((name for name in wanted if any(rest[0] == name for _, rest in inner)), None)
        if container:
            return _below(variant, [(path, rest[1:]) for path, rest in inner if rest[0] == container])
        around = next((name for name in _AROUND if any(rest[0] == name for _, rest in inner)), None)
        if not around:
            break
        kept = [(path, rest[1:]) for path, rest in inner if rest[0] == around]
    if variant == "ema":
        raise CheckpointError("holds no EMA weights")
    others = {*_EMA} if variant == "regular" else set()
    plain = [(path, rest) for path, rest in kept if rest[0] not in others and not (len(rest) > 1 and _OTHER.fullmatch(rest[0]))]
    return _named(plain)


def _below(variant: str, found: list[tuple[tuple[str, ...], tuple[str, ...]]]) -> dict[tuple[str, ...], str]:
    """Inside a container, a second one (``model`` of several parts, or a model saved with its optimizer) is looked for once more."""
    inner = [(path, rest) for path, rest in found if len(rest) > 1]
    if len(inner) == len(found) and {rest[0] for _, rest in inner} & {*_MODEL} and any(_OTHER.fullmatch(rest[0]) for _, rest in inner):
        found = [(path, rest[1:]) for path, rest in inner if rest[0] in _MODEL]
    return _named([(path, rest) for path, rest in found if not (len(rest) > 1 and _OTHER.fullmatch(rest[0]))])


def _named(found: list[tuple[tuple[str, ...], tuple[str, ...]]]) -> dict[tuple[str, ...], str]:
    names = {path: ".".join(rest) for path, rest in found}
    if not names:
        raise CheckpointError("holds no tensors of a model")
    if len(set(names.values())) < len(names):
        twice = sorted(name for name in set(names.values()) if list(names.values()).count(name) > 1)
        raise CheckpointError(f"holds two tensors called {printable(twice[0])}")
    return names
