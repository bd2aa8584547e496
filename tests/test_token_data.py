"""The tokens are those that the files hold, in their order, each predicted once; what cannot be read is an error of one line."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
from language_models import TEXT, write_tokenizer

from assayer import documents, token_source
from assayer.errors import EvaluatorError
from assayer.language_model import load_tokenizer
from assayer.token_data import Batches, Tokens, read
from assayer.token_source import find

COUNTING = numpy.arange(1000, dtype=numpy.uint16)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return load_tokenizer(str(folder))


def all_of(tokens: Tokens) -> list[int]:
    return [int(token) for token in tokens.take(0, len(tokens))]


def refused(*words: Any, **more: Any) -> str:
    with pytest.raises(EvaluatorError) as raised:
        read(find(*words, **more))
    assert "\n" not in str(raised.value)
    return str(raised.value)


# Token files


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int32", "int64", "uint64", ">i4"])
def test_an_npy_file_of_any_integers_is_read_as_they_are(dtype: str, tmp_path: Path) -> None:
    numpy.save(tmp_path / "a.npy", numpy.arange(200).astype(dtype))
    tokens = read(find(str(tmp_path / "a.npy")))
    assert all_of(tokens) == list(range(200))
    assert tokens.take(3, 5).dtype == numpy.int64
    assert not tokens.has_bytes and tokens.nbytes(0, 10) == 0


@pytest.mark.parametrize("order", ["C", "F"])
def test_the_rows_of_an_array_stand_end_to_end(order: Any, tmp_path: Path) -> None:
    numpy.save(tmp_path / "a.npy", numpy.asarray(numpy.arange(60).reshape(6, 10), order=order))
    assert all_of(read(find(str(tmp_path / "a.npy")))) == list(range(60))


@pytest.mark.parametrize("dtype", ["uint16", "uint32", "int32", "int64"])
def test_a_bin_file_is_read_with_the_dtype_given(dtype: str, tmp_path: Path) -> None:
    COUNTING.astype(dtype).tofile(tmp_path / "a.bin")
    assert all_of(read(find(str(tmp_path / "a.bin"), bin_dtype=dtype))) == list(range(1000))


def test_the_dtype_of_a_bin_file_is_never_guessed(tmp_path: Path) -> None:
    COUNTING.tofile(tmp_path / "a.bin")
    assert "a .bin file does not say what it holds; give -E bin_dtype= one of uint8, uint16" in refused(str(tmp_path / "a.bin"))
    assert refused(str(tmp_path / "a.bin"), bin_dtype="float32").startswith("bin_dtype float32 is not known: ")
    (tmp_path / "odd.bin").write_bytes(b"123")
    assert "has 3 bytes, which are no uint16 of 2 bytes each" in refused(str(tmp_path / "odd.bin"), bin_dtype="uint16")
    (tmp_path / "empty.bin").touch()
    assert "has 0 bytes" in refused(str(tmp_path / "empty.bin"), bin_dtype="uint16")
    numpy.save(tmp_path / "a.npy", COUNTING)
    assert refused(str(tmp_path / "a.npy"), bin_dtype="uint16") == "bin_dtype is for .bin files; leave it out"


def test_files_of_a_pattern_stand_in_natural_order(tmp_path: Path) -> None:
    for number in (10, 9, 1):
        COUNTING[number * 10 : number * 10 + 10].tofile(tmp_path / f"part{number}.bin")
    source = find(str(tmp_path / "part*.bin"), bin_dtype="uint16")
    assert [file.name for file in source.files] == ["part1.bin", "part9.bin", "part10.bin"]
    assert all_of(read(source)) == [*range(10, 20), *range(90, 110)]


def test_a_name_with_a_patterns_signs_is_a_name_first(tmp_path: Path) -> None:
    numpy.save(tmp_path / "a[1].npy", COUNTING[:5])
    assert all_of(read(find(str(tmp_path / "a[1].npy")))) == [0, 1, 2, 3, 4]


def test_an_array_that_holds_no_tokens_is_refused_and_nothing_is_unpickled(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return open, (str(tmp_path / "ran"), "w")

    numpy.save(tmp_path / "object.npy", numpy.array([Trap()], dtype=object), allow_pickle=True)
    numpy.save(tmp_path / "float.npy", numpy.ones(3))
    numpy.save(tmp_path / "bool.npy", numpy.ones(3, bool))
    numpy.save(tmp_path / "deep.npy", numpy.ones((2, 2, 2), int))
    numpy.save(tmp_path / "one.npy", numpy.array(3))
    numpy.save(tmp_path / "cut.npy", COUNTING)
    (tmp_path / "cut.npy").write_bytes((tmp_path / "cut.npy").read_bytes()[:-7])
    (tmp_path / "empty.npy").touch()
    (tmp_path / "text.npy").write_text("tokens")
    assert "is no .npy file that can be read" in refused(str(tmp_path / "object.npy"))
    for name in ("cut", "empty", "text"):
        assert "is no .npy file that can be read" in refused(str(tmp_path / f"{name}.npy"))
    for name, said in (("float", "float64 in 1"), ("bool", "bool in 1"), ("deep", "int64 in 3"), ("one", "int64 in 0")):
        assert f"holds {said} dimensions; tokens are integers in 1 or 2" in refused(str(tmp_path / f"{name}.npy"))
    assert not (tmp_path / "ran").exists()


def test_tokens_across_files_are_taken_as_one() -> None:
    random.seed(0)
    parts = [numpy.arange(a, b) for a, b in [(0, 7), (7, 7), (7, 8), (8, 30)]]
    tokens = Tokens(parts)
    assert len(tokens) == 30
    for _ in range(100):
        start, stop = sorted(random.choices(range(33), k=2))
        assert [int(t) for t in tokens.take(start, stop)] == list(range(30))[start:stop]
    assert tokens.extremes(9) == (0, 8)
    assert len(Tokens([])) == 0 and len(Tokens([]).take(0, 5)) == 0


# What is given


def test_what_is_not_there_or_not_read_is_one_line(tmp_path: Path) -> None:
    assert "there is no such file; give a .npy or .bin file" in refused(str(tmp_path / "absent*.npy"))
    assert "there is no such file" in refused(str(tmp_path / "absent.txt"))
    (tmp_path / "a.parquet").touch()
    assert "a.parquet: .parquet is not read" in refused(str(tmp_path / "a.parquet"))
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "a.jsonl").write_text('{"text": "a"}')
    assert "means files of several kinds" in refused(str(tmp_path / "a.[tj]*"))
    assert "is a folder, and not one that a dataset's save_to_disk has written" in refused(str(tmp_path))
    assert refused(str(tmp_path / "a.txt"), split="train") == "split is for saved datasets; leave it out"
    for nothing in ("", 5, None):
        assert "is no path" in refused(nothing)


def test_a_digest_tells_data_apart_and_not_where_they_lie(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        COUNTING.tofile(tmp_path / name / "a.bin")

    def of(name: str, dtype: str = "uint16") -> str:
        return find(str(tmp_path / name / "a.bin"), bin_dtype=dtype).digest()

    same = of("one")
    assert of("two") == same
    assert of("one", "uint32") != same
    changed = COUNTING.copy()
    changed[500] += 1
    changed.tofile(tmp_path / "two" / "a.bin")
    assert of("two") != same
    assert Tokens([COUNTING]).digest() == Tokens([COUNTING[:3], COUNTING[3:]]).digest()
    assert Tokens([COUNTING]).digest() != Tokens([changed]).digest() != Tokens([COUNTING[:-1]]).digest()
    assert Tokens([]).digest()


# Text


def test_a_text_file_is_one_document(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(TEXT.encode() + b"line\r\nend")
    tokens = read(find(str(tmp_path / "a.txt")), tokenizer)
    assert all_of(tokens) == tokenizer(TEXT + "line\r\nend", add_special_tokens=False)["input_ids"]
    assert tokens.nbytes(0, len(tokens)) == len(TEXT.encode()) + 9


def test_documents_stand_apart_by_the_end_of_sequence_token(tokenizer: Any, tmp_path: Path) -> None:
    texts = ["The fox", "", "Käfer\n", "🦊"]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text, "id": 5}) for text in texts) + "\n\n")
    tokens = read(find(str(tmp_path / "a.jsonl")), tokenizer)
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    end = tokenizer.eos_token_id
    assert all_of(tokens) == [*ids[0], end, *ids[2], end, *ids[3]]
    assert tokens.nbytes(0, len(tokens)) == len("The foxKäfer\n🦊".encode())
    # The separator stands for no bytes.
    assert tokens.nbytes(len(ids[0]), len(ids[0]) + 1) == 0


def test_several_text_files_are_several_documents(tokenizer: Any, tmp_path: Path) -> None:
    for name in ("part1", "part2", "part10"):
        (tmp_path / f"{name}.txt").write_text(name)
    tokens = read(find(str(tmp_path / "*.txt")), tokenizer)
    assert tokenizer.decode(all_of(tokens)) == "part1<|end|>part2<|end|>part10"


def test_each_token_stands_for_the_bytes_of_its_text(tokenizer: Any, tmp_path: Path) -> None:
    text = "Käfer 東京 🦊 plain\n"
    (tmp_path / "a.txt").write_text(text)
    tokens = read(find(str(tmp_path / "a.txt")), tokenizer)
    sizes = [tokens.nbytes(i, i + 1) for i in range(len(tokens))]
    assert sum(sizes) == len(text.encode()) and min(sizes) >= 0
    # Wherever the text so far is whole characters, the bytes so far are its bytes.
    for count in range(len(tokens)):
        so_far = tokenizer.decode(all_of(tokens)[:count])
        if "\ufffd" not in so_far:
            assert sum(sizes[:count]) == len(so_far.encode())


def test_a_long_text_is_tokenized_in_pieces_that_end_with_a_line(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    whole = read(find(str(tmp_path / "a.txt")), tokenizer)
    monkeypatch.setattr(documents, "PIECE", 150)
    assert len(list(documents.pieces_of_file(tmp_path / "a.txt"))) > 3
    pieces = read(find(str(tmp_path / "a.txt")), tokenizer)
    assert all_of(pieces) == all_of(whole)
    assert pieces.nbytes(0, len(pieces)) == whole.nbytes(0, len(whole)) == len(TEXT.encode())


def test_reading_stops_where_it_is_enough(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "PIECE", 100)
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"text": TEXT[:100]}) + "\n" for _ in range(50)) + "not JSON\n")
    some = read(find(str(file)), tokenizer, enough=90)
    assert 90 <= len(some) < 300
    assert "line 51, is not an object in JSON" in refused_text(file, tokenizer)


def refused_text(file: Path, tokenizer: Any) -> str:
    with pytest.raises(EvaluatorError) as raised:
        read(find(str(file)), tokenizer)
    return str(raised.value)


def test_text_that_is_none_is_one_line(tokenizer: Any, tmp_path: Path) -> None:
    def said(name: str, content: bytes) -> str:
        (tmp_path / name).write_bytes(content)
        return refused_text(tmp_path / name, tokenizer)

    assert "is not text in UTF-8" in said("latin.txt", "Käfer".encode("latin-1"))
    assert "line 1, has neither input_ids nor text, but id" in said("neither.jsonl", b'{"id": 1}')
    assert "line 2, has no text: a NoneType stands there" in said("second.jsonl", b'{"text": "a"}\n{"input_ids": [1]}')
    assert "line 1, holds half a surrogate pair" in said("half.jsonl", b'{"text": "\\ud83e"}')
    assert "has neither input_ids nor text, but nothing" in said("empty.jsonl", b"\n")
    assert "line 1, is not an object in JSON" in said("list.jsonl", b"[1]")


def test_documents_need_a_token_between_them(tokenizer: Any, tmp_path: Path) -> None:
    class Without:
        eos_token_id = None
        is_fast = True

        def __call__(self, *words: Any, **more: Any) -> Any:
            return tokenizer(*words, **more)

    (tmp_path / "a.txt").write_text("one")
    assert all_of(read(find(str(tmp_path / "a.txt")), Without())) == tokenizer("one")["input_ids"]
    (tmp_path / "b.txt").write_text("two")
    with pytest.raises(EvaluatorError, match="the tokenizer has no end-of-sequence token to stand between documents"):
        read(find(str(tmp_path / "*.txt")), Without())


def test_without_offsets_the_bytes_are_not_known(tmp_path: Path) -> None:
    class Slow:
        eos_token_id = 0

        def __call__(self, texts: list[str], **more: Any) -> Any:
            assert not more["return_offsets_mapping"]
            return {"input_ids": [list(text.encode()) for text in texts]}

    (tmp_path / "a.txt").write_text("one")
    tokens = read(find(str(tmp_path / "a.txt")), Slow())
    assert all_of(tokens) == list(b"one") and not tokens.has_bytes


# Tokens in lines and datasets


def test_lists_of_tokens_are_taken_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"input_ids": [1, 2], "text": "x"}\n{"input_ids": []}\n{"input_ids": [3]}')
    source = find(str(tmp_path / "a.jsonl"))
    assert not source.is_text
    assert all_of(read(source)) == [1, 2, 3]
    assert len(read(source, enough=2)) == 2
    for line in (
        '{"input_ids": 5}',
        '{"input_ids": [1.5]}',
        '{"input_ids": [[1], [2, 3]]}',
        '{"input_ids": ["a"]}',
        '{"input_ids": [true]}',
    ):
        (tmp_path / "b.jsonl").write_text(line)
        assert "line 1, has no input_ids that are a list of integers" in refused(str(tmp_path / "b.jsonl"))


@pytest.fixture
def quiet() -> Iterator[Any]:
    import datasets

    datasets.disable_progress_bars()
    yield datasets
    datasets.enable_progress_bars()


def test_a_saved_dataset_is_read(quiet: Any, tokenizer: Any, tmp_path: Path) -> None:
    quiet.Dataset.from_dict({"input_ids": [[1, 2], [], [3]], "n": [1, 2, 3]}).save_to_disk(tmp_path / "lists")
    assert all_of(read(find(str(tmp_path / "lists")))) == [1, 2, 3]
    # Rows that were chosen are those, and in that order.
    quiet.Dataset.from_dict({"input_ids": [[1, 2], [4], [3]]}).select([2, 0]).save_to_disk(tmp_path / "chosen")
    assert all_of(read(find(str(tmp_path / "chosen")))) == [3, 1, 2]
    quiet.Dataset.from_dict({"text": ["one", "two"]}).save_to_disk(tmp_path / "texts")
    source = find(str(tmp_path / "texts"))
    assert source.is_text
    assert tokenizer.decode(all_of(read(source, tokenizer))) == "one<|end|>two"
    assert source.digest() != find(str(tmp_path / "lists")).digest()


def test_the_split_of_a_saved_dataset_must_be_clear(quiet: Any, tmp_path: Path) -> None:
    def dataset(*ids: int) -> Any:
        return quiet.Dataset.from_dict({"input_ids": [list(ids)]})

    quiet.DatasetDict({"train": dataset(1, 2), "test": dataset(3)}).save_to_disk(tmp_path / "both")
    quiet.DatasetDict({"test": dataset(4)}).save_to_disk(tmp_path / "one")
    dataset(5).save_to_disk(tmp_path / "plain")
    assert "has the splits train, test; give one with -E split=" in refused(str(tmp_path / "both"))
    assert "has the splits train, test, and no 'dev'; give one" in refused(str(tmp_path / "both"), split="dev")
    assert "has no splits; leave split out" in refused(str(tmp_path / "plain"), split="train")
    assert all_of(read(find(str(tmp_path / "both"), split="train"))) == [1, 2]
    assert all_of(read(find(str(tmp_path / "one")))) == [4]


def test_a_dataset_without_tokens_is_one_line(quiet: Any, tmp_path: Path) -> None:
    quiet.Dataset.from_dict({"tokens": [[1]]}).save_to_disk(tmp_path / "other")
    assert "has neither input_ids nor text, but tokens" in refused(str(tmp_path / "other"))
    quiet.Dataset.from_dict({"input_ids": [1, 2]}).save_to_disk(tmp_path / "flat")
    assert "in input_ids; tokens are lists of integers" in refused(str(tmp_path / "flat"))
    quiet.Dataset.from_dict({"input_ids": [[1.5]]}).save_to_disk(tmp_path / "float")
    assert "has no input_ids that are a list of integers" in refused(str(tmp_path / "float"))
    (next((tmp_path / "float").glob("*.arrow"))).unlink()
    assert "does not load as a saved dataset" in refused(str(tmp_path / "float"))


# Batches


@pytest.mark.parametrize("tokens", [2, 3, 8, 9, 10, 33, 34, 40, 41])
@pytest.mark.parametrize(("seq_len", "batch_size"), [(8, 2), (1, 3), (50, 4)])
def test_every_token_but_the_first_is_predicted_once_in_order(tokens: int, seq_len: int, batch_size: int) -> None:
    batches = Batches(tokens, seq_len, batch_size)
    predicted: list[int] = []
    for number in range(len(batches)):
        start, windows, width = batches.span(number)
        assert 1 <= windows <= batch_size and 1 <= width <= seq_len
        predicted += range(start + 1, start + windows * width + 1)
    assert predicted == list(range(1, tokens))
    assert batches.span(len(batches) * 2) == batches.span(0)
    assert batches.span(len(batches) - 1) == batches.span(2 * len(batches) - 1)


def test_a_digest_of_a_dataset_leaves_out_what_datasets_caches(quiet: Any, tmp_path: Path) -> None:
    quiet.Dataset.from_dict({"input_ids": [[1]]}).save_to_disk(tmp_path / "a")
    before = find(str(tmp_path / "a")).digest()
    (tmp_path / "a" / "cache-0123.arrow").write_bytes(b"x")
    assert find(str(tmp_path / "a")).digest() == before


def test_of_a_large_file_a_digest_reads_little(tmp_path: Path) -> None:
    with (tmp_path / "a.bin").open("wb") as file:
        file.truncate(1 << 30)
    source = find(str(tmp_path / "a.bin"), bin_dtype="uint16")
    before = source.digest()
    with (tmp_path / "a.bin").open("r+b") as file:
        file.seek((1 << 30) - 1)
        file.write(b"1")
    assert source.digest() != before
    assert token_source.mapped(source.files[0], source)[-1] == ord("1") << 8
