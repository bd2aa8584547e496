"""A cast gives what torch gives, for every value that is a number."""

from pathlib import Path

import pytest
import torch
from merging import columns, dcp, rows, tensors_in

from assayer.merge import merge

FLOATS = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu),
]
OTHERS = [
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8),
    *(torch.bool, torch.complex64),
]


def word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def values(dtype: torch.dtype) -> torch.Tensor:
    """Random bits, and every value that is not ordinary: ties, subnormals, zeros, the largest, infinities and NaNs."""
    random = torch.Generator().manual_seed(7)
    bits = torch.randint(0, 256, (1 << 16,), generator=random, dtype=torch.uint8).view(dtype)
    if dtype.itemsize == 1:
        return torch.arange(256, dtype=torch.int32).to(torch.uint8).view(dtype).repeat(16)
    if dtype.itemsize == 2:
        return torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(dtype)
    # Around each number that a narrower dtype has, half-way to its neighbours, and one step off that.
    narrow = torch.cat([torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(kind) for kind in (torch.bfloat16, torch.float16)])
    exact = narrow.to(dtype)[narrow.isfinite()]
    after = exact.view(torch.int32 if dtype is torch.float32 else torch.int64)
    steps = (0x8000, 0x1000, 0x1001, 0x7FFF) if dtype is torch.float32 else (1 << 44, 1 << 41, (1 << 41) + 1, (1 << 44) - 1, 1 << 28)
    beside = [(after + step).view(dtype) for step in steps]
    special = torch.tensor(
        [0.0, -0.0, 1e-45, 1e-40, 6e-8, 65504, 65519.99, 65520, 3.4e38, 3.39e38, float("inf"), float("-inf"), float("nan")]
    )
    wide = torch.tensor([1e300, -1e300, 5e-324, 3.4028235677973366e38, 1 + 2**-25, 1 + 2**-9 + 2**-40], dtype=torch.float64)
    return torch.cat([bits, exact, *beside, special.to(dtype), wide.to(dtype)])


@pytest.mark.parametrize("target", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("source", FLOATS, ids=word)
def test_a_cast_is_what_torch_makes_of_it(tmp_path: Path, source: torch.dtype, target: str) -> None:
    whole = values(source)
    whole = whole[: len(whole) // 12 * 12].reshape(-1, 12)
    path = dcp(tmp_path / "step_1", {"streamed": rows(whole, 3), "assembled": columns(whole, 5)})
    merge(path, tmp_path / "out", dtype=target)
    kind = getattr(torch, target)
    wanted = whole.to(torch.float32).to(kind) if source.itemsize == 1 else whole.to(kind)
    for found in tensors_in(tmp_path / "out").values():
        assert found.dtype == kind
        nan = wanted.isnan()
        assert found.isnan().equal(nan)
        bits = torch.int32 if kind.itemsize == 4 else torch.int16
        assert found.view(bits)[~nan].equal(wanted.view(bits)[~nan])


def test_what_is_no_floating_point_number_is_never_cast(tmp_path: Path) -> None:
    whole = {word(dtype): torch.randint(0, 2, (6, 4)).to(dtype) for dtype in OTHERS}
    path = dcp(tmp_path / "step_1", {name: rows(tensor, 2) for name, tensor in whole.items()})
    merge(path, tmp_path / "out", dtype="bfloat16")
    found = tensors_in(tmp_path / "out")
    assert {name: tensor.dtype for name, tensor in found.items()} == {name: tensor.dtype for name, tensor in whole.items()}
    assert all(found[name].equal(tensor) for name, tensor in whole.items())


def test_every_dtype_is_kept_unless_another_is_asked_for(tmp_path: Path) -> None:
    whole = {word(dtype): values(dtype)[:4096].reshape(-1, 8) for dtype in FLOATS}
    path = dcp(tmp_path / "step_1", {name: columns(tensor, 3) for name, tensor in whole.items()})
    merge(path, tmp_path / "out")
    found = tensors_in(tmp_path / "out")
    for name, tensor in whole.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].view(torch.uint8).equal(tensor.contiguous().view(torch.uint8)), name


@pytest.mark.parametrize(("dtype", "told"), [("keep", "float32"), ("bfloat16", "bfloat16")])
def test_the_config_tells_the_dtype_that_was_written(tmp_path: Path, dtype: str, told: str) -> None:
    import json

    path = dcp(tmp_path / "step_1", {"w": torch.zeros(2, 2)})
    (path / "config.json").write_text(json.dumps({"dtype": "float32", "text_config": {"torch_dtype": "float32", "x": None}, "n": 1}))
    merge(path, tmp_path / "out", dtype=dtype)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == {"dtype": told, "text_config": {"torch_dtype": told, "x": None}, "n": 1}
