"""References to a user's function: parsed where they are given, checked in a subprocess."""

from pathlib import Path

import pytest

from assayer import refs
from assayer.errors import EvaluatorError

SOURCE = """
def good(path, limit=3):
    return {"m": 1}

def strict(path, needed):
    return {"m": 1}

def open_ended(path, **more):
    return {"m": 1}

def nothing():
    return {"m": 1}

def _private(path):
    return {"m": 1}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "kit").mkdir()
    (tmp_path / "kit" / "evals.py").write_text(SOURCE)
    return tmp_path


@pytest.mark.parametrize("text", ["kit/evals.py:good", "kit.evals.good", "kit.evals:good"])
def test_the_three_forms_lead_to_the_same_function(folder: Path, text: str) -> None:
    reference = refs.parse(text, folder)
    assert reference.function == "good"
    assert refs.check(reference, {"limit": 1}, torch_elsewhere=False) is None
    assert refs.source_digest(reference) == refs.source_digest(refs.parse("kit/evals.py:good", folder))


def test_a_file_is_made_absolute_where_it_was_given(folder: Path) -> None:
    assert refs.parse("../kit/evals.py:good", folder / "kit").target == str(folder / "kit" / "evals.py")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("kit/none.py:good", "no file"),
        ("kit/evals.py", "kit/evals.py: the function is missing"),
        ("kit/evals.py:", "''? is no function's name"),
        ("good", "give path/to/file.py:function"),
        ("", "give path/to/file.py:function"),
        ("kit evals:good", "give path/to/file.py:function"),
    ],
)
def test_a_reference_that_leads_nowhere_says_what_is_allowed(folder: Path, text: str, said: str) -> None:
    with pytest.raises(EvaluatorError, match=said):
        refs.parse(text, folder)


@pytest.mark.parametrize(
    ("function", "arguments", "said"),
    [
        ("goood", [], "has no function 'goood'; it has good, strict, open_ended, nothing"),
        ("good", ["limt"], "good has no parameter 'limt'; it takes limit"),
        ("strict", [], "strict needs needed; give each with -E name=value"),
        ("nothing", [], "takes no checkpoint path"),
    ],
)
def test_a_typo_is_an_error_there_and_then(folder: Path, function: str, arguments: list[str], said: str) -> None:
    with pytest.raises(EvaluatorError, match=said):
        refs.check(refs.parse(f"kit/evals.py:{function}", folder), dict.fromkeys(arguments, 1), torch_elsewhere=False)


@pytest.mark.parametrize("name", ["progress", "details"])
def test_what_is_filled_in_is_no_argument_of_a_built_in_evaluator(folder: Path, name: str) -> None:
    with pytest.raises(EvaluatorError, match=f"loss has no parameter '{name}'; it takes data, tokenizer"):
        refs.check(refs.parse("loss", folder), {"data": "tokens.npy", name: 1}, torch_elsewhere=False)


@pytest.mark.parametrize(("function", "arguments"), [("strict", ["needed"]), ("open_ended", ["anything"]), ("good", [])])
def test_arguments_that_fit_are_accepted(folder: Path, function: str, arguments: list[str]) -> None:
    assert refs.check(refs.parse(f"kit/evals.py:{function}", folder), dict.fromkeys(arguments, 1), torch_elsewhere=False) is None


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("def f(p:\n", "line 1: "),
        ("raise RuntimeError('boom')\n", "its import raised RuntimeError: boom"),
        ("import sys\nsys.exit(3)\n", "its import raised SystemExit: 3"),
        ("import os\nos._exit(4)\n", "its import ended the process with code 4"),
        ("import no_such_package\n", "No module named 'no_such_package'"),
        ("print('a lot\\n' * 1000)\nimport nothing_here\n", "No module named 'nothing_here'"),
    ],
)
def test_a_module_that_cannot_be_imported_is_one_sentence(tmp_path: Path, source: str, said: str) -> None:
    (tmp_path / "sick.py").write_text(source)
    with pytest.raises(EvaluatorError, match=said) as caught:
        refs.check(refs.parse("sick.py:f", tmp_path), {}, torch_elsewhere=False)
    assert "\n" not in str(caught.value)


def test_on_a_login_node_a_missing_package_is_a_warning_and_the_source_decides(tmp_path: Path) -> None:
    (tmp_path / "gpu.py").write_text("import no_such_package\ndef f(path): pass\n")
    warning = refs.check(refs.parse("gpu.py:f", tmp_path), {}, torch_elsewhere=True)
    assert warning
    assert "no_such_package" in warning
    with pytest.raises(EvaluatorError, match=r"gpu\.py has f"):
        refs.check(refs.parse("gpu.py:g", tmp_path), {}, torch_elsewhere=True)


def test_a_missing_module_of_ones_own_is_an_error_also_on_a_login_node(tmp_path: Path) -> None:
    (tmp_path / "gpu.py").write_text("import helper.missing\ndef f(path): pass\n")
    (tmp_path / "helper").mkdir()
    with pytest.raises(EvaluatorError, match=r"helper\.missing"):
        refs.check(refs.parse("gpu.py:f", tmp_path), {}, torch_elsewhere=True)
