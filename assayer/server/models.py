"""The table of models: a name that a client may send, and the evaluator that it stands for. A name is looked up, never parsed."""

import ast
import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from assayer import refs
from assayer.errors import EvaluatorError, UsageError
from assayer.files import printable
from assayer.plan import Evaluator
from assayer.protocol import EvaluateRequest
from assayer.refs import PACKAGE_PARENT, Reference

__all__ = ["OFFERED", "Model", "Models", "parse_models"]

# The fields of a request that an evaluator of one's own is given if it names them.
OFFERED = tuple(EvaluateRequest.__dataclass_fields__)

# The tables in which lm-eval and lmms-eval write their models down, read without importing either.
_TABLES = {
    "lm_eval": ("MODEL_MAPPING",),
    "lmms_eval": ("AVAILABLE_SIMPLE_MODELS", "AVAILABLE_CHAT_TEMPLATE_MODELS", "AVAILABLE_MODELS", "MODEL_ALIASES"),
}
_LMMS = Reference("assayer.harness.lmms", "run", PACKAGE_PARENT)


@dataclass(frozen=True)
class Model:
    """What a name stands for: ``kind`` is ``own``, ``lm_eval`` or ``lmms_eval``."""

    kind: str
    evaluator: Evaluator


class Models:
    """The names that are served: one's own first, then lm-eval's, then those of an installed lmms-eval."""

    def __init__(self, own: dict[str, Evaluator], cwd: Path) -> None:
        self._kinds = {name: kind for kind in ("lmms_eval", "lm_eval") for name in model_names(kind)}
        self._own = own
        self._cwd = cwd

    @property
    def names(self) -> list[str]:
        return sorted({*self._own, *self._kinds})

    def find(self, name: str) -> Model | None:
        """The model of this name; None when none is called so."""
        if name in self._own:
            return Model("own", self._own[name])
        kind = self._kinds.get(name)
        if kind is None:
            return None
        reference = refs.parse("lm_eval", self._cwd) if kind == "lm_eval" else _LMMS
        return Model(kind, Evaluator(name, reference, source=refs.source_digest(reference)))

    def nearest(self, name: str) -> list[str]:
        """The names most like this one."""
        return difflib.get_close_matches(name[:200], self.names, n=5, cutoff=0.5)


def parse_models(given: Sequence[str], cwd: Path) -> dict[str, Evaluator]:
    """The models of ``--model NAME=REF``.

    Raises:
        UsageError: a word has another form, or a name stands twice.
        EvaluatorError: a reference leads nowhere.
    """
    found: dict[str, Evaluator] = {}
    for text in given:
        name, equals, reference = text.partition("=")
        if not equals or not re.fullmatch(r"\w[\w.-]{,99}", name):
            raise UsageError(f"--model {printable(text)} must be NAME=REF; a name may hold letters, digits, '_', '.' and '-', 100 at most")
        if name in found:
            raise UsageError(f"--model {name} is given twice")
        parsed = refs.parse(reference, cwd)
        if parsed.builtin:
            raise EvaluatorError(f"--model {printable(text)}: give a function of your own; lm_eval's models are served by their own names")
        found[name] = Evaluator(name, parsed, source=refs.source_digest(parsed))
    return found


def model_names(package: str) -> list[str]:
    """The models that an installed lm-eval or lmms-eval has, as its source tells; empty where it is not installed."""
    spec = find_spec(package)
    names: set[str] = set()
    for folder in (spec.submodule_search_locations or []) if spec else []:
        try:
            tree = ast.parse((Path(folder) / "models" / "__init__.py").read_bytes())
        except (OSError, SyntaxError, ValueError):
            continue
        for node in tree.body:
            if not isinstance(node, ast.AnnAssign | ast.Assign) or not isinstance(node.value, ast.Dict):
                continue
            target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
            if isinstance(target, ast.Name) and target.id in _TABLES[package]:
                names |= _words_of(node.value, aliases=target.id == "MODEL_ALIASES")
    return sorted(name for name in names if re.fullmatch(r"\w[\w.-]{,99}", name))


def _words_of(table: ast.Dict, aliases: bool) -> set[str]:
    keys = {node.value for node in table.keys if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    inner = {node.value for value in table.values for node in ast.walk(value) if isinstance(node, ast.Constant)} if aliases else set()
    return keys | {word for word in inner if isinstance(word, str)}
