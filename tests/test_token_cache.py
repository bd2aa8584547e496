"""A text is tokenized once for a machine, and anew whenever the text or the tokenizer is another."""

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from language_models import TEXT, write_tokenizer

from assayer import token_cache, token_data
from assayer.language_model import load_tokenizer
from assayer.token_data import read
from assayer.token_source import find


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return load_tokenizer(str(folder))


@pytest.fixture(autouse=True)
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How often something was tokenized, in a cache of the test's own that keeps also what is short."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(token_cache, "TOKENS_MIN", 1)
    counted: list[int] = []
    tokenize = vars(token_data)["tokenize"]

    def counting(*words: Any) -> Any:
        counted.append(1)
        return tokenize(*words)

    monkeypatch.setattr(token_data, "tokenize", counting)
    yield counted


def told(file: Path, tokenizer: Any, enough: int | None = None) -> tuple[list[int], list[int]]:
    tokens = read(find(str(file)), tokenizer, enough)
    return tokens.take(0, len(tokens)).tolist(), [tokens.nbytes(i, i + 1) for i in range(len(tokens))]


def test_a_text_is_tokenized_once(tokenizer: Any, tmp_path: Path, runs: list[int]) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    first = told(tmp_path / "a.txt", tokenizer)
    assert told(tmp_path / "a.txt", tokenizer) == first
    assert len(runs) == 1
    assert token_cache.directory().stat().st_mode & 0o777 == 0o700


def test_what_changes_the_tokens_is_tokenized_anew(tokenizer: Any, tmp_path: Path, runs: list[int]) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "The quick"}\n{"text": "fox"}')
    told(file, tokenizer)
    # The same length, in place, at the same time of modification.
    before = file.stat()
    file.write_text('{"text": "The slow!"}\n{"text": "fox"}')
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert tokenizer.decode(told(file, tokenizer)[0]) == "The slow!<|end|>fox"
    told(file, tokenizer, 3)
    write_tokenizer(tmp_path / "other", 290)
    other = load_tokenizer(str(tmp_path / "other"))
    told(file, other)
    other.eos_token = "x"
    told(file, other)
    assert len(runs) == 5


def test_an_entry_that_was_cut_or_is_none_is_made_anew(tokenizer: Any, tmp_path: Path, runs: list[int]) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    first = told(tmp_path / "a.txt", tokenizer)
    entry = next(token_cache.directory().glob("*.npy"))
    whole = entry.read_bytes()
    for content in (b"", whole[:60], whole[:-1], b"garbage" * 50):
        entry.write_bytes(content)
        assert told(tmp_path / "a.txt", tokenizer) == first
        assert entry.read_bytes() == whole
    assert len(runs) == 5


def test_a_cache_that_cannot_be_written_costs_only_time(
    tokenizer: Any, tmp_path: Path, runs: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").write_text("a file in its place")
    (tmp_path / "a.txt").write_text(TEXT)
    first = told(tmp_path / "a.txt", tokenizer)
    assert told(tmp_path / "a.txt", tokenizer) == first
    assert len(runs) == 2
    assert "tokens are not kept" in caplog.text


def test_what_is_short_is_not_kept(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_cache, "TOKENS_MIN", 10_000)
    (tmp_path / "a.txt").write_text(TEXT)
    told(tmp_path / "a.txt", tokenizer)
    assert not token_cache.directory().exists()


def test_a_tokenizer_with_code_of_its_own_is_asked_each_time(tmp_path: Path, tokenizer: Any, runs: list[int]) -> None:
    own: Any = type("Own", (type(tokenizer),), {"__module__": "tokenization_own"})
    (tmp_path / "a.txt").write_text(TEXT)
    mine = own.from_pretrained(tokenizer.name_or_path)
    told(tmp_path / "a.txt", mine)
    told(tmp_path / "a.txt", mine)
    assert len(runs) == 2


def test_what_is_unused_for_long_or_too_much_goes(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(TEXT)
    told(tmp_path / "a.txt", tokenizer)
    old = next(token_cache.directory().glob("*.npy"))
    os.utime(old, (time.time() - token_cache.SECONDS_MAX - 60,) * 2)
    told(tmp_path / "b.txt", tokenizer)
    assert not old.exists()
    second = next(token_cache.directory().glob("*.npy"))
    os.utime(second, (time.time() - 60,) * 2)
    monkeypatch.setattr(token_cache, "BYTES_MAX", int(second.stat().st_size * 1.5))
    told(tmp_path / "c.txt", tokenizer)
    assert not second.exists()
    assert len(list(token_cache.directory().glob("*.npy"))) == 1
