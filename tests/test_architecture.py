"""Who may import whom: every arrow goes down, or to a neighbour on the same floor where that makes no circle."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "assayer"

# The floor of each room; a room is a module or a folder directly below the package.
FLOORS = {
    **dict.fromkeys(["errors", "files", "content", "archive", "pickles", "sealed"], 1),
    **dict.fromkeys(["tensors", "torch_file", "safetensors_file", "saved_state", "containers", "placement", "language_model"], 2),
    **dict.fromkeys(["checkpoint", "progress", "record", "plan", "refs", "queues", "session", "evaluator_flags", "fields", "protocol"], 2),
    **dict.fromkeys(["distributed", "documents", "token_source", "token_cache", "token_data"], 2),
    **dict.fromkeys(["evaluators", "harness", "client"], 3),
    **dict.fromkeys(["points", "ledger", "wandb_log", "second_names", "apart"], 2),
    **dict.fromkeys(["formats", "kept", "trackers", "tracking", "publication", "results"], 3),
    "merge": 4,
    "worker": 5,
    **dict.fromkeys(["watch", "server"], 6),
    **dict.fromkeys(["status", "shutdown", "evaluate"], 7),
    "cli": 1,
}


def module_of(path: Path) -> str:
    return ".".join(("assayer", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")


MODULES = {module_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {name if (name := f"{node.module}.{a.name}") in MODULES else node.module for a in node.names}
    return {name for name in found if name.split(".")[0] == "assayer"}


ARROWS = {name: imports_of(path) - {name} for name, path in MODULES.items()}


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def test_no_arrow_goes_up() -> None:
    for module, targets in ARROWS.items():
        for target in targets:
            if room(module) in FLOORS and room(target):
                assert FLOORS[room(module)] >= FLOORS[room(target)], f"{module} -> {target}"


def test_every_room_has_a_floor() -> None:
    assert {room(name) for name in MODULES} - {"", "__main__"} == set(FLOORS)


def test_there_is_no_circle() -> None:
    def reach(start: str) -> set[str]:
        seen: set[str] = set()
        todo = list(ARROWS[start])
        while todo:
            module = todo.pop()
            if module not in seen:
                seen.add(module)
                todo += ARROWS[module]
        return seen

    # A package's own __init__ stands for the package: what is below it may import it.
    assert [name for name in MODULES if name in reach(name)] == []


def test_nothing_imports_a_main_module() -> None:
    assert [name for name, targets in ARROWS.items() if any(t.endswith("__main__") for t in targets)] == []


def test_no_job_function_lives_in_a_module_that_is_run() -> None:
    from assayer.queues.chain import TICK
    from assayer.queues.enqueue import EVALUATE
    from assayer.queues.served import SERVE

    for name in (TICK, EVALUATE, SERVE):
        assert 'if __name__ == "__main__"' not in MODULES[name.rpartition(".")[0]].read_text()


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        *(
            (name, ["torch"])
            for name in ("assayer.watch.command", "assayer.formats", "assayer.status", "assayer.shutdown", "assayer.worker.eval_job")
        ),
        *(
            (name, ["torch", "numpy", "redis", "rq", "rich", "transformers"])
            for name in ("assayer.merge", "assayer.merge.command", "assayer.merge.state_dict")
        ),
        ("assayer.evaluate", ["torch", "redis", "rq", "transformers"]),
        *((name, ["torch", "redis", "rq"]) for name in ("assayer.record", "assayer.plan", "assayer.refs", "assayer.formats")),
        ("assayer.server.command", ["torch", "transformers", "lm_eval", "starlette", "uvicorn"]),
        ("assayer.worker.served_job", ["torch", "starlette"]),
        ("assayer.progress", ["torch", "numpy", "redis", "rq", "rich"]),
        *(
            (name, ["torch", "redis", "rq", "wandb", "mlflow", "tensorboard"])
            for name in ("assayer.trackers", "assayer.tracking", "assayer.publication", "assayer.results.command")
        ),
        *(
            (name, ["torch", "redis", "rq", "click", "rich", "numpy", "safetensors", "transformers", "lightning", "pydantic"])
            for name in ("assayer.protocol", "assayer.client", "assayer.client.callback")
        ),
        ("assayer", ["torch", "redis", "rq", "click", "rich"]),
        ("assayer.__main__", ["torch", "redis", "rq"]),
    ],
)
def test_a_module_does_not_load_what_is_heavy(module: str, heavy: list[str]) -> None:
    code = f"import sys, {module}; assayer = sys.modules['assayer']\n"
    code += "import assayer.formats\nassayer.formats.all_formats()\n" if module in ("assayer.formats", "assayer.client") else ""
    code += "import assayer.trackers\nassayer.trackers.all_trackers()\n" if module == "assayer.trackers" else ""
    code += f"print([name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent)
    assert done.stdout == "[]\n"


def test_every_module_and_public_function_has_a_docstring() -> None:
    bare = []
    for name, path in MODULES.items():
        tree = ast.parse(path.read_text())
        if not ast.get_docstring(tree) and not name.endswith("__main__"):
            bare.append(name)
        exported: list[str] = []
        for node in tree.body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                exported = ast.literal_eval(node.value)
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name in exported and not ast.get_docstring(node):
                bare.append(f"{name}.{node.name}")
    assert bare == []
