"""The README is true: its tree is the tree, its flags are the flags, its commands exist, and the project speaks of itself alone."""

import importlib
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from assayer.__main__ import COMMANDS
from assayer.record import Record

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def tree() -> set[str]:
    """The Python files that the README's tree names."""
    block = README.split("```\nassayer/\n")[1].split("```")[0]
    found, folder = set(), ""
    for line in block.splitlines():
        indent = len(line) - len(line.lstrip())
        name = line.split()[0]
        if indent == 0:
            break
        if name.endswith("/"):
            folder = name
        elif indent == 2:
            found.add(name)
        else:
            found |= {folder + word for word in line.split()[:2] if word.endswith(".py")}
    return found


def test_the_tree_names_every_file_and_no_other() -> None:
    files = {str(p.relative_to(ROOT / "assayer")) for p in (ROOT / "assayer").rglob("*.py")}
    assert tree() == {f for f in files if not f.endswith("/__init__.py")}


def test_the_table_of_flags_is_complete() -> None:
    rows = README.split("### Flags of `watch`")[1].split("###")[0]
    told = set(re.findall(r"`(?:-E`, `)?(--[a-z_]+)", rows)) | {"--redis_host", "--redis_port", "--eval_queue_name"}
    main = importlib.import_module(COMMANDS["watch"]).main
    assert told == {flag for option in main.params for flag in option.opts if flag.startswith("--")}


def test_the_record_shown_has_the_fields_of_a_record() -> None:
    shown = README.split("### A record")[1].split("```json")[1].split("```")[0]
    import json

    assert set(json.loads(shown)) == set(Record.__dataclass_fields__)


@pytest.mark.parametrize("text", sorted(set(re.findall(r"python -m assayer\.(.+?)(?:  +#|`|\n)", README))))
def test_every_command_shown_is_accepted(text: str) -> None:
    name, *words = text.replace("'", "").split()
    if words != ["..."]:
        done = CliRunner().invoke(importlib.import_module(COMMANDS[name]).main, [*words, "--help"])
        assert done.output.startswith("Usage:"), done.output


def test_the_scripts_shown_exist() -> None:
    for name in re.findall(r"scripts/(\w+)", README + (ROOT / "CONTRIBUTING.md").read_text()):
        assert (ROOT / "scripts" / name).exists() or name == "constraints", name
