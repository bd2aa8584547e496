"""One rule that turns ``path/to/file.py:fn``, ``pkg.mod.fn``, ``pkg.mod:fn`` or the name of a built-in evaluator into a function.

A reference is made absolute where the command is given and travels as plain data; it is imported only where it is needed: in the child
process that evaluates, and once, in a subprocess, when the command is given.
"""

import ast
import contextlib
import importlib
import importlib.util
import inspect
import json
import os
import re
import subprocess
import sys
import traceback
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from assayer.errors import EvaluatorError
from assayer.files import digest, printable

__all__ = ["FILLED", "PACKAGE_PARENT", "Reference", "builtin_module", "builtins", "check", "functions_in", "load", "parse", "source_digest"]

# Seconds that the import of an evaluator may take when a command is given; torch from a cold network disk takes most of a minute.
IMPORT_TIMEOUT = 300

# The folder that holds this package: a subprocess that starts there finds it, installed or not.
PACKAGE_PARENT = str(Path(__file__).resolve().parent.parent)

# The parameters of an evaluator that are filled where they are named and no argument gives them.
FILLED = ("step", "original_path", "weights", "output_dir", "samples_path", "progress", "details")

# The package whose modules are the built-in evaluators, each with a function of this name.
_BUILTIN, _FUNCTION = "assayer.evaluators", "evaluate"


def builtins() -> list[str]:
    """The names of the built-in evaluators: the files of ``assayer/evaluators``."""
    folder = Path(__file__).resolve().parent / "evaluators"
    return sorted(path.stem for path in folder.glob("*.py") if path.stem[0] != "_")


_FORMS = f"path/to/file.py:function, pkg.module.function, pkg.module:function, or a built-in one: {', '.join(builtins())}"


@dataclass(frozen=True)
class Reference:
    """Where a function is, independent of the process that imports it.

    ``target`` is an absolute file or a module's dotted name; ``cwd`` the folder in which the reference was given: relative paths in
    the evaluator mean what they meant there.
    """

    target: str
    function: str
    cwd: str

    @property
    def is_file(self) -> bool:
        return os.path.isabs(self.target)

    @property
    def builtin(self) -> str | None:
        """The name of the built-in evaluator that this is, else None."""
        package, _, name = self.target.rpartition(".")
        return name if package == _BUILTIN else None

    @property
    def name(self) -> str:
        """What an evaluator is called that was given no name."""
        return self.builtin or self.function

    @property
    def folders(self) -> list[str]:
        """The folders that imports are looked up in first: the file's own, then the one in which the command was given."""
        if self.builtin:
            return []
        return [str(Path(self.target).parent), self.cwd] if self.is_file else [self.cwd]

    def __str__(self) -> str:
        return self.builtin or f"{self.target}:{self.function}"


def parse(text: str, cwd: Path) -> Reference:
    """The reference that ``text`` means when given in the folder ``cwd``; nothing is imported.

    Raises:
        EvaluatorError: it has none of the forms, or the file does not exist.
    """
    if text in builtins():
        return Reference(f"{_BUILTIN}.{text}", _FUNCTION, str(cwd))
    file, colon, function = text.rpartition(":")
    if colon and file.endswith(".py"):
        path = Path(os.path.abspath(cwd / Path(file).expanduser()))
        if not path.is_file():
            raise EvaluatorError(f"evaluator {printable(text)}: no file {printable(str(path))}; give {_FORMS}")
        if not function.isidentifier():
            raise EvaluatorError(f"evaluator {printable(text)}: {function!r} is no function's name; {_offer(path)}")
        return Reference(str(path), function, str(cwd))
    if text.endswith(".py") or "/" in text:
        raise EvaluatorError(f"evaluator {printable(text)}: the function is missing; give {_FORMS}{_offer_of(cwd, text)}")
    module, _, function = text.rpartition(":" if colon else ".")
    if not re.fullmatch(r"\w+(\.\w+)*", module) or not function.isidentifier():
        raise EvaluatorError(f"evaluator {printable(text)}: give {_FORMS}")
    return Reference(module, function, str(cwd))


def functions_in(path: Path) -> list[str]:
    """The public functions that a Python file defines at its top level, in order; empty when it cannot be parsed."""
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return []
    return [n.name for n in tree.body if isinstance(n, ast.FunctionDef) and not n.name.startswith("_")]


def _offer(path: Path) -> str:
    names = functions_in(path)
    return f"{path.name} has {', '.join(names)}" if names else f"{path.name} has no public function"


def _offer_of(cwd: Path, text: str) -> str:
    path = cwd / text.rpartition(":")[0] if ":" in text else cwd / text
    return f" ({_offer(path)})" if path.suffix == ".py" and path.is_file() else ""


def source_digest(reference: Reference) -> str | None:
    """A digest of the evaluator's own source file; None where it is a module that cannot be found here."""
    path = Path(reference.target) if reference.is_file else _module_file(reference)
    try:
        return digest(path.read_bytes())[:16] if path else None
    except OSError:
        return None


def _module_file(reference: Reference) -> Path | None:
    relative = Path(*reference.target.split("."))
    for folder in [*reference.folders, *sys.path]:
        for candidate in (Path(folder) / relative.with_suffix(".py"), Path(folder) / relative / "__init__.py"):
            if candidate.is_file():
                return candidate
    return None


def load(reference: Reference) -> Callable[..., Any]:
    """The function itself, imported now; its folders stay first on ``sys.path``, so that ``import helper`` works also later.

    Raises:
        EvaluatorError: the module has no such function.
        Exception: whatever the module raises while it is imported.
    """
    sys.path[:0] = reference.folders
    with contextlib.suppress(OSError):
        os.chdir(reference.cwd)
    if reference.is_file:
        path = Path(reference.target)
        # The module's own name lets worker processes of the evaluation find its functions again (multiprocessing pickles by name).
        name = path.stem if path.stem.isidentifier() and path.stem not in sys.modules else f"assayer_evaluator_{digest(str(path))[:8]}"
        spec = importlib.util.spec_from_file_location(name, path)
        if spec is None or spec.loader is None:
            raise EvaluatorError(f"{printable(str(path))} is no Python file")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    else:
        module = importlib.import_module(reference.target)
    function = getattr(module, reference.function, None)
    if not callable(function):
        names = [n for n, v in vars(module).items() if inspect.isfunction(v) and v.__module__ == module.__name__ and n[0] != "_"]
        offer = f"it has {', '.join(names)}" if names else "it has no public function"
        raise EvaluatorError(f"{printable(reference.target)} has no function {reference.function!r}; {offer}")
    return function  # type: ignore[no-any-return]


def builtin_module(reference: Reference) -> ModuleType | None:
    """The module of a built-in evaluator, imported now; None for anybody else's."""
    return importlib.import_module(reference.target) if reference.builtin else None


def check(reference: Reference, arguments: Mapping[str, Any], torch_elsewhere: bool, offered: Collection[str] = ()) -> str | None:
    """Imports the evaluator once, in a subprocess that sees no GPU. None when all is well, else a warning to show.

    A built-in evaluator also looks at the values of its arguments.

    Args:
        reference: the evaluator.
        arguments: the keywords that it will be called with.
        torch_elsewhere: no worker stands here, so a package that is missing here is a warning and the file's source decides.
        offered: keywords that it will be given if it names them.

    Raises:
        EvaluatorError: the import fails, the function is missing, or it does not take one of the arguments.
    """
    question = json.dumps([reference.target, reference.function, reference.cwd, dict(arguments), list(offered)])
    command = [sys.executable, "-m", "assayer.refs", question]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=IMPORT_TIMEOUT,
            env=environment,
            stdin=subprocess.DEVNULL,
            cwd=PACKAGE_PARENT,
        )
    except subprocess.TimeoutExpired:
        raise EvaluatorError(f"evaluator {reference}: its import did not end within {IMPORT_TIMEOUT} s") from None
    lines = done.stdout.splitlines()
    answer = json.loads(lines[-1]) if lines and lines[-1].startswith('{"assayer"') else {}
    if answer.get("assayer") == "ok":
        return None
    if answer.get("assayer") == "no module" and torch_elsewhere and reference.builtin:
        return f"the arguments of {reference} were not checked: {answer['error']}"
    if answer.get("assayer") == "no module" and torch_elsewhere and reference.is_file:
        names = functions_in(Path(reference.target))
        if reference.function in names:
            return f"evaluator {reference} was checked by its source only: {answer['error']} on this machine"
        raise EvaluatorError(f"evaluator {reference}: no function {reference.function!r}; {_offer(Path(reference.target))}")
    if answer.get("error", "").endswith("SystemExit: 2") and done.stderr.strip():
        # argparse at the top level of the file: what it complained of says more.
        answer["error"] += f" ({done.stderr.strip().splitlines()[-1]})"
    reason = answer.get("error") or (done.stderr.strip().splitlines() or [f"its import ended the process with code {done.returncode}"])[-1]
    raise EvaluatorError(f"evaluator {printable(str(reference))}: {printable(reason)}")


def _line_of(error: BaseException, reference: Reference) -> str:
    """Where in the user's own files an import went wrong, such as ``eval.py line 3: ``."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if str(Path(f.filename).parent) in reference.folders]
    return f"{Path(frames[-1].filename).name} line {frames[-1].lineno}: " if frames else ""


def _examine(target: str, function: str, cwd: str, arguments: dict[str, Any], offered: list[str]) -> dict[str, str]:
    """What ``check`` asks its subprocess: can this be imported and called so."""
    reference = Reference(target, function, cwd)
    try:
        signature = inspect.signature(load(reference))
    except EvaluatorError as error:
        return {"assayer": "wrong", "error": str(error)}
    except ModuleNotFoundError as error:
        own = error.name == target or any((Path(f) / (error.name or "").partition(".")[0]).exists() for f in reference.folders)
        return {"assayer": "wrong" if own else "no module", "error": f"{_line_of(error, reference)}{error}"}
    except SyntaxError as error:
        return {"assayer": "wrong", "error": f"line {error.lineno}: {error.msg}"}
    except BaseException as error:  # SystemExit at import is the user's mistake like any other
        return {"assayer": "wrong", "error": f"{_line_of(error, reference)}its import raised {type(error).__name__}: {error}"}
    parameters = list(signature.parameters.values())
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.VAR_POSITIONAL)]
    if not positional:
        return {"assayer": "wrong", "error": f"{function}{signature} takes no checkpoint path; its first parameter must be the path"}
    taken = [p.name for p in parameters[1:] if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return {"assayer": "ok"}
    asked = [name for name in taken if not (reference.builtin and name in FILLED)]
    for argument in arguments:
        if argument not in asked:
            offer = f"it takes {', '.join(asked)}" if asked else "it takes the checkpoint path alone"
            return {"assayer": "wrong", "error": f"{reference.name} has no parameter {argument!r}; {offer}"}
    filled = {*FILLED, *arguments, *offered}
    bare = [p.name for p in parameters[1:] if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    missing = [name for name in bare if name not in filled]
    if missing:
        return {"assayer": "wrong", "error": f"{reference.name} needs {', '.join(missing)}; give each with -E name=value"}
    return _examine_values(reference, arguments)


def _examine_values(reference: Reference, arguments: dict[str, Any]) -> dict[str, str]:
    module = builtin_module(reference)
    if module is None:
        return {"assayer": "ok"}
    try:
        module.check(arguments)
    except EvaluatorError as error:
        # An extra that is not installed here may be where the workers stand.
        kind = "no module" if isinstance(error.__context__, ModuleNotFoundError) else "wrong"
        return {"assayer": kind, "error": str(error)}
    return {"assayer": "ok"}


if __name__ == "__main__":
    print("\n" + json.dumps(_examine(*json.loads(sys.argv[1]))))
