"""The flags ``--evaluator`` and ``-E``: from words to evaluators with their arguments."""

import json
import re
from pathlib import Path
from typing import Any

from assayer import refs
from assayer.errors import EvaluatorError, UsageError
from assayer.files import printable
from assayer.plan import Evaluator

__all__ = ["ARGUMENT_HELP", "EVALUATOR_HELP", "parse_evaluators", "value_of"]

EVALUATOR_HELP = "What evaluates: path/to/file.py:function, pkg.module.function, pkg.module:function, or the built-in lm_eval or loss."
ARGUMENT_HELP = "Keyword for the evaluators, or for the one called NAME; VALUE is read as JSON, else as a string."


def parse_evaluators(given: tuple[str, ...], arguments: tuple[str, ...], cwd: Path) -> list[Evaluator]:
    """The evaluators by name, each with its arguments.

    Raises:
        EvaluatorError: a reference leads nowhere, a name is not allowed or stands for two functions.
        UsageError: an argument has no key, or names no evaluator.
    """
    named: dict[str, Evaluator] = {}
    for text in given:
        label = re.match(r"([^=:]*)=(.+)", text) if not Path(text.partition(":")[0]).exists() else None
        if label and not re.fullmatch(r"\w[\w.-]{,99}", label[1]):
            raise EvaluatorError(f"the evaluator's name {printable(label[1])!r} may hold letters, digits, '_', '.' and '-', 100 at most")
        reference = refs.parse(label[2] if label else text, cwd)
        name, bare = (label[1], label[2]) if label else (reference.name, text)
        if name in named and named[name].reference != reference:
            raise EvaluatorError(f"two evaluators are called {name!r}; give one of them another name: --evaluator other={printable(bare)}")
        named[name] = Evaluator(name, reference, source=refs.source_digest(reference))
    for text in arguments:
        key, equals, value = text.partition("=")
        scope, colon, inner = key.rpartition(":")
        if not equals or not inner.isidentifier():
            raise UsageError(f"-E {printable(text)} must be KEY=VALUE or NAME:KEY=VALUE")
        if colon and scope not in named:
            raise UsageError(f"-E {printable(text)}: no evaluator is called {printable(scope)!r}; there are {', '.join(named)}")
        for name in [scope] if colon else list(named):
            named[name].arguments[inner] = value_of(value)
    return list(named.values())


def value_of(text: str) -> Any:
    """The JSON value that this text is, else the text itself; NaN and what is too large for a number are text."""

    def refuse(name: str) -> Any:
        raise ValueError(name)

    try:
        value = json.loads(text, parse_constant=refuse)
        json.dumps(value, allow_nan=False)  # 1e999 is read as infinity, which no JSON file can hold
        return value
    except (ValueError, RecursionError):
        return text
