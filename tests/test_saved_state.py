"""A state comes back as it was, or says at once why it cannot; a file that was cut or changed is never taken for a whole one."""

import collections
import enum
import json
import math
import os
import random
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch

from assayer.errors import StateError
from assayer.saved_state import freeze, pack, thaw, unpack

TORCH_DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.bool, torch.complex64),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8),
]
NUMPY_DTYPES = ["f8", "f4", "f2", "c8", "?", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", ">f4", ">i8"]
SHAPES: list[tuple[int, ...]] = [(), (0,), (3, 0, 2), (1,), (2, 3), (2, 1, 3, 2)]


def through_a_file(state: object, folder: Path) -> Any:
    path = folder / "a.safetensors"
    path.write_bytes(pack({"n": 1}, {"state": freeze(state), "other": freeze([torch.ones(2)])}))
    facts, parts = unpack(path)
    assert facts == {"n": 1}
    assert thaw(parts["other"])[0].tolist() == [1, 1]
    return thaw(parts["state"])


@pytest.mark.parametrize("dtype", TORCH_DTYPES, ids=str)
def test_a_tensor_comes_back_bit_by_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = [(torch.arange(math.prod(shape)).reshape(shape) % 2 + 0.0).to(dtype) for shape in SHAPES]
    for tensor, back in zip(tensors, through_a_file(tensors, tmp_path), strict=True):
        assert (type(back), back.dtype, back.shape, back.device.type) == (torch.Tensor, dtype, tensor.shape, "cpu")
        assert torch.equal(back.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))
        back.zero_()


@pytest.mark.parametrize("dtype", NUMPY_DTYPES)
def test_an_array_comes_back_as_an_array(dtype: str, tmp_path: Path) -> None:
    arrays = [np.arange(math.prod(shape)).reshape(shape).astype(dtype) for shape in SHAPES]
    for array, back in zip(arrays, through_a_file(arrays, tmp_path), strict=True):
        assert (type(back), back.dtype, back.shape) == (np.ndarray, array.dtype.newbyteorder("="), array.shape)
        assert np.array_equal(back, array)
        back[...] = 0


def test_a_tensor_is_stored_as_it_looks_and_not_as_it_lies(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    complex_ones = torch.tensor([1 + 2j, 3 - 4j], dtype=torch.complex64)
    state = {
        "transposed": base.T,
        "every second": base[::2, 1::2],
        "expanded": torch.tensor(2.0).expand(2, 3),
        "conjugate": complex_ones.conj(),
        "parameter": torch.nn.Parameter(base),
        "fortran": np.asfortranarray(base.numpy()),
        "backwards": base.numpy()[:, ::-1],
    }
    back = through_a_file(state, tmp_path)
    for name in ("transposed", "every second", "expanded", "conjugate"):
        assert torch.equal(back[name], state[name]), name  # type: ignore[arg-type]
    assert torch.equal(back["parameter"], base)
    assert not back["parameter"].requires_grad
    assert np.array_equal(back["fortran"], base.numpy())
    assert np.array_equal(back["backwards"], base.numpy()[:, ::-1])


def test_numbers_and_texts_come_back_exactly(tmp_path: Path) -> None:
    state = {
        "floats": [0.1, -0.0, 5e-324, 1.7976931348623157e308, math.pi, math.inf, -math.inf],
        "integers": [2**53 + 1, -(2**64), 10**400, 2**14_000 - 1],
        "kinds": [True, False, None, 1, 1.0],
        "texts": ["", "é\n\0", "\U0001f600", "\udcff", "$"],
        "keys": {"": 1, "a/b": 2, "\udcff": 3, "__metadata__": 4, "of": 5},
        "nested": ((1, (2,)), [(), [], {}]),
        "numbers": [np.float64(0.1), np.float32(0.1), np.int64(2**62), np.bool_(True), np.uint8(255), np.complex64(1j)],
    }
    back = through_a_file(state, tmp_path)
    assert repr(back) == repr(state)
    assert [type(number) for number in back["numbers"]] == [type(number) for number in state["numbers"]]  # type: ignore[attr-defined]
    assert math.isnan(through_a_file(math.nan, tmp_path))


@pytest.mark.parametrize(
    "state",
    [
        {"$": "tuple", "of": [1]},
        {"$": None},
        {"$": {"$": "torch", "of": 0}},
        [{"$": "dict", "of": [["a", 1]]}],
        {"of": 3, "$": (1, {"$": 2})},
    ],
    ids=str,
)
def test_a_table_that_looks_like_one_of_ours_comes_back_as_it_was(state: object, tmp_path: Path) -> None:
    assert through_a_file(state, tmp_path) == state


def test_the_states_of_random_generators_can_be_put_back(tmp_path: Path) -> None:
    generator, chance = np.random.default_rng(3), random.Random(3)
    state = {
        "torch": torch.get_rng_state(),
        "python": chance.getstate(),
        "numpy": generator.bit_generator.state,
        "old": np.random.RandomState(3).get_state(),
    }
    back = through_a_file(state, tmp_path)
    expected = chance.random(), generator.random(), np.random.RandomState(3).rand()
    chance.setstate(back["python"])
    generator.bit_generator.state = back["numpy"]
    old = np.random.RandomState()
    old.set_state(back["old"])
    torch.set_rng_state(back["torch"])
    assert (chance.random(), generator.random(), old.rand()) == expected


def test_what_was_frozen_does_not_change_with_the_state() -> None:
    state: dict[str, Any] = {"t": torch.zeros(2), "a": np.zeros(2), "l": [1]}
    frozen = freeze(state)
    state["t"] += 1
    state["a"] += 1
    state["l"].append(2)
    first = thaw(frozen)
    first["t"] += 5
    first["l"].append(3)
    again = thaw(frozen)
    assert (again["t"].tolist(), again["a"].tolist(), again["l"]) == ([0, 0], [0, 0], [1])


Point = collections.namedtuple("Point", "x y")
Colour = enum.IntEnum("Colour", "RED")
LOOP: list[Any] = []
LOOP.append(LOOP)


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"a": [0, {"b": {1, 2}}]}, "state['a'][1]['b'] is a set;"),
        ({"a": {1: 2}}, "state['a'] has the key 1, of type int; keys must be str"),
        ({"a": {None: 2}}, "state['a'] has the key None"),
        ({3: 4}, "state has the key 3"),
        ({"a": (object(),)}, "state['a'][0] is a object;"),
        ({"a": b"bytes"}, "state['a'] is a bytes;"),
        ({"a": collections.Counter("ab")}, "state['a'] is a collections.Counter;"),
        ({"a": Point(1, 2)}, "state['a'] is a test_saved_state.Point;"),
        ([Colour(1)], "state[0] is a "),
        ([1j], "state[0] is a complex;"),
        ([2**14_000], "state[0] is an integer of 14001 bits"),
        (LOOP, "state is nested more than 200 deep, or holds itself"),
        ({"a": np.array(["x"])}, "state['a'] is of dtype str32;"),
        ({"a": np.array([object()])}, "state['a'] is of dtype object;"),
        ({"a": np.zeros(2, "c16")}, "state['a'] is of dtype complex128;"),
        ({"a": np.zeros(2, "f4,i4")}, "state['a'] is of dtype void64;"),
        ({"a": np.datetime64("2026-11-20")}, "state['a'] is of dtype datetime64"),
        ({"a": np.ma.masked_array([1, 2])}, "state['a'] is a numpy.ma.MaskedArray;"),
        ({"a": torch.zeros(2, dtype=torch.complex128)}, "state['a'] is of dtype complex128;"),
        ({"a": torch.zeros(2, 2).to_sparse()}, "state['a'] is a Tensor (torch.sparse_coo, cpu)"),
        ({"a": torch.zeros(2, device="meta")}, "state['a'] is a Tensor (torch.strided, meta)"),
        ({"a": torch.zeros(2).as_subclass(type("Mine", (torch.Tensor,), {}))}, "state['a'] is a Mine"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_come_back_is_an_error_that_says_where(state: object, words: str) -> None:
    with pytest.raises(TypeError) as caught:
        freeze(state)
    assert str(caught.value).startswith(words)


def test_too_many_tensors_are_an_error_that_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("assayer.saved_state._TENSORS_MAX", 3)
    freeze([np.float32(0)] * 3)
    with pytest.raises(TypeError, match=r"state\[3\] is one tensor too many; .* stack them"):
        freeze([np.float32(0)] * 4)


def test_the_file_is_one_that_the_safetensors_package_reads(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(pack({}, {"state": freeze({"x": torch.arange(3), "y": np.float32(2), "z": torch.zeros(2, 0)})}))
    tensors = safetensors.torch.load_file(path)
    assert tensors["0"].tolist() == [0, 1, 2]
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items() if name != "json"} == {"0": (3,), "1": (), "2": (2, 0)}
    tree = json.loads(bytes(tensors["json"].tolist()))
    assert tree["parts"]["state"] == [3, {"x": {"$": "torch", "of": 0}, "y": {"$": "number", "of": 1}, "z": {"$": "torch", "of": 2}}]


DATA = pack({"n": 1}, {"state": freeze({"t": torch.arange(5.0), "text": "text"})})


def refused(path: Path) -> str:
    with pytest.raises(StateError) as caught:
        unpack(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("length", [*range(0, len(DATA), len(DATA) // 8), 7, 8, 9, len(DATA) - 1, len(DATA) + 1])
def test_a_file_of_another_length_is_refused(length: int, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes((DATA + b"\0")[:length])
    assert refused(tmp_path / "a")


def test_a_file_with_a_flipped_bit_in_any_byte_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a"
    for place in range(len(DATA)):
        path.write_bytes(DATA[:place] + bytes([DATA[place] ^ 1 << place % 8]) + DATA[place + 1 :])
        assert refused(path), place


def _header(table: object, data: bytes = b"") -> bytes:
    text = json.dumps(table).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.mark.parametrize(
    "data",
    [
        b"not a file of ours",
        b"\0" * 1000,
        b"\xff" * 1000,
        _header([]),
        _header({}),
        _header(None),
        _header({"__metadata__": {}}),
        _header({"__metadata__": {"format": "pt", "digest": "0"}}),
        _header({"__metadata__": {"format": "assayer progress 1", "digest": "0" * 32}}),
        _header(
            {"__metadata__": {"format": "assayer progress 1", "digest": 5}, "json": {"dtype": "U8", "shape": [], "data_offsets": [0, 0]}}
        ),
        _header({"a": {"data_offsets": ["x", "y"]}}),
        _header({"a": {"data_offsets": [0, 1 << 62]}}),
        _header({"a": 3}),
        struct.pack("<Q", 1 << 40) + b"{",
        safetensors.torch.save({"a": torch.zeros(3)}, {"format": "pt"}),
        DATA.replace(b"assayer progress 1", b"assayer progress 2"),
    ],
    ids=lambda data: repr(data[8:40]),
)
def test_a_strangers_file_is_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(data)
    assert refused(tmp_path / "a")


def test_what_is_no_file_is_refused_and_links_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "whole").write_bytes(DATA)
    assert unpack(tmp_path / "whole")
    (tmp_path / "link").symlink_to("whole")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in ("link", "folder", "pipe", "none"):
        assert refused(tmp_path / name).startswith("cannot be read (")
