"""A mean of checkpoints is torch's own mean, whatever formats and numbers of ranks they come from."""

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from merging import Ended, Held, assert_same, columns, command, dcp, flip, rows, tensors_in
from samples_of_trainers import FOUR, SINGLE, TWO, expected, sample

from assayer.archive import records_of
from assayer.merge import merge


def mean(output: Path, checkpoints: Sequence[Path], *words: object) -> Ended:
    return command("mean", *checkpoints, "--output_path", output, *words)


def refused(output: Path, checkpoints: Sequence[Path], *words: object, code: int = 1) -> str:
    before = sorted(output.parent.iterdir())
    ended = mean(output, checkpoints, *words)
    assert ended.code == code, ended
    assert ended.err.startswith("assayer: error: ") and ended.err.count("\n") == 1, ended.err
    assert sorted(output.parent.iterdir()) == before
    return ended.err


def state(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    return {
        "a.weight": torch.randn(37, 20, generator=random).to(dtype),
        "b.weight": torch.randn(13, generator=random).to(dtype),
        "scalar": torch.randn((), generator=random),
        "count": torch.tensor([seed, 2 * seed]),
        "none": torch.zeros(0, 3),
    }


def averaged(states: Sequence[dict[str, torch.Tensor]], shares: Sequence[float]) -> dict[str, torch.Tensor]:
    found = dict(states[0])
    for name, first in states[0].items():
        if first.is_floating_point():
            total = sum((one[name].float() * torch.tensor(share) for one, share in zip(states, shares, strict=True)), torch.tensor(0.0))
            found[name] = total.to(first.dtype)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("count", "weights"), [(2, None), (3, None), (2, "3,1"), (3, "0.5,0.25,0.25"), (1, None), (2, "1,0")])
def test_floating_point_tensors_are_averaged_and_others_taken_from_the_first(
    tmp_path: Path, dtype: torch.dtype, count: int, weights: str | None
) -> None:
    states = [state(seed, dtype) for seed in range(1, count + 1)]
    cuts: list[Callable[[torch.Tensor], Held]] = [lambda whole: rows(whole, 3), lambda whole: columns(whole, 4), lambda whole: whole]
    paths = [
        dcp(tmp_path / f"step_{number}", {**one, "a.weight": cut(one["a.weight"])})
        for number, (one, cut) in enumerate(zip(states, cuts, strict=False))
    ]
    given = [float(part) for part in weights.split(",")] if weights else [1.0] * count
    words = ("--weights", weights) if weights else ()
    assert mean(tmp_path / "out", paths, *words).code == 0
    assert_same(tensors_in(tmp_path / "out"), averaged(states, [weight / sum(given) for weight in given]))


def test_the_mean_is_that_of_torch_up_to_the_last_bit_of_float32(tmp_path: Path) -> None:
    states = [state(seed) for seed in (1, 2, 3)]
    paths = [dcp(tmp_path / f"step_{number}", one) for number, one in enumerate(states)]
    mean(tmp_path / "out", paths)
    found = tensors_in(tmp_path / "out")["a.weight"]
    torch.testing.assert_close(found, torch.stack([one["a.weight"] for one in states]).mean(0), rtol=1e-6, atol=1e-7)


def test_checkpoints_of_two_and_of_four_ranks_are_averaged(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    one, other = sample(tmp_path_factory, TWO, "dcp_flat"), sample(tmp_path_factory, FOUR, "verl")
    assert mean(tmp_path / "out", [one.path, other.path], "--max_shard_size", "2KB").code == 0
    assert_same(tensors_in(tmp_path / "out"), averaged([expected(one), expected(other)], [0.5, 0.5]))


def test_a_flat_and_a_sharded_checkpoint_of_one_model_are_averaged(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    one = sample(tmp_path_factory, SINGLE, "deepspeed_zero3")
    merge(one.path, tmp_path / "step_1")
    whole = expected(one)
    for number, paths in enumerate(([one.path, tmp_path / "step_1"], [tmp_path / "step_1", one.path], [one.path, one.path])):
        assert mean(tmp_path / f"out{number}", paths).code == 0
        assert_same(tensors_in(tmp_path / f"out{number}"), averaged([whole, whole], [0.5, 0.5]))


@pytest.mark.parametrize("target", ["bfloat16", "float16", "float32"])
def test_a_mean_is_cast_once(tmp_path: Path, target: str) -> None:
    states = [state(1), state(2)]
    paths = [dcp(tmp_path / f"step_{number}", one) for number, one in enumerate(states)]
    mean(tmp_path / "out", paths, "--dtype", target)
    kind = getattr(torch, target)
    wanted = {n: t.to(kind) if t.is_floating_point() else t for n, t in averaged(states, [0.5, 0.5]).items()}
    assert_same(tensors_in(tmp_path / "out"), wanted)


def test_the_mean_of_different_dtypes_has_the_first_ones(tmp_path: Path) -> None:
    states = [state(1, torch.bfloat16), state(2, torch.float32)]
    paths = [dcp(tmp_path / f"step_{number}", one) for number, one in enumerate(states)]
    mean(tmp_path / "out", paths)
    assert_same(tensors_in(tmp_path / "out"), averaged(states, [0.5, 0.5]))


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"w": torch.zeros(3, 2)}, "w"),
        ({"w": torch.zeros(2, 3), "v": torch.zeros(1)}, "v"),
        ({"x": torch.zeros(2, 3)}, "not of one model"),
        ({"w": torch.zeros(2, 3, dtype=torch.int64)}, "w"),
        ({"w": torch.zeros(2, 3, dtype=torch.complex64)}, "w"),
        ({"w": torch.zeros(6)}, "[6]"),
    ],
    ids=["shape", "more", "name", "integers", "complex", "dimensions"],
)
def test_checkpoints_of_different_models_are_refused(tmp_path: Path, other: dict[str, torch.Tensor], said: str) -> None:
    paths = [dcp(tmp_path / "step_1", {"w": torch.zeros(2, 3)}), dcp(tmp_path / "step_2", other)]
    told = refused(tmp_path / "out", paths)
    assert said in told and str(paths[0]) in told and str(paths[1]) in told


@pytest.mark.parametrize("weights", ["1", "1,2,3", "a,b", "0,0", "1,-1", "nan,1", "inf,1", "", ",", "-1,-1"])
def test_weights_that_are_no_shares_are_refused(tmp_path: Path, weights: str) -> None:
    paths = [dcp(tmp_path / f"step_{number}", {"w": torch.zeros(2)}) for number in range(2)]
    assert "--weights" in refused(tmp_path / "out", paths, "--weights", weights, code=2)


def test_a_flipped_bit_in_any_input_is_found(tmp_path: Path) -> None:
    whole = torch.randn(30, 40)
    paths = [dcp(tmp_path / "step_1", {"w": columns(whole, 2)}), dcp(tmp_path / "step_2", {"w": rows(whole, 2)})]
    for path in paths:
        file = path / "__1_0.distcp"
        with file.open("rb") as opened:
            start = records_of(opened.fileno(), 0, file.stat().st_size)["data/0"].start
        flip(file, start + 100)
        assert str(file) in refused(tmp_path / "out", paths)
        assert mean(tmp_path / "out", paths, "--no_verify").code == 0
        shutil.rmtree(tmp_path / "out")
        flip(file, start + 100)


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "padded"])
def test_a_flipped_bit_in_a_storage_of_several_tensors_or_its_padding_is_found(tmp_path: Path, shared: bool) -> None:
    base = torch.arange(100.0)
    whole = {"first": base[:40], "second": base[40:]} if shared else {"first": base[10:30]}
    paths = [tmp_path / "m_step1.pt", tmp_path / "m_step2.pt"]
    for path in paths:
        torch.save(whole, path)
    with paths[1].open("rb") as opened:
        record = records_of(opened.fileno(), 0, paths[1].stat().st_size)["data/0"]
    flip(paths[1], record.start + 80)
    assert str(paths[1]) in refused(tmp_path / "out", paths)


def test_a_mean_of_half_written_checkpoints_is_refused(tmp_path: Path) -> None:
    paths = [dcp(tmp_path / f"step_{number}", {"w": torch.zeros(2)}) for number in range(2)]
    (paths[1] / ".metadata").unlink()
    assert str(paths[1]) in refused(tmp_path / "out", paths)


def test_an_output_that_is_there_is_kept(tmp_path: Path) -> None:
    path = dcp(tmp_path / "step_1", {"w": torch.zeros(2)})
    (tmp_path / "out").mkdir()
    assert str(tmp_path / "out") in refused(tmp_path / "out", [path, path], code=2)
    assert not os.listdir(tmp_path / "out")


def test_numbers_beyond_float32_come_out_without_a_warning(tmp_path: Path) -> None:
    paths = [dcp(tmp_path / f"step_{number}", {"w": torch.tensor([3e38, float("inf"), float("nan")])}) for number in range(2)]
    assert mean(tmp_path / "out", paths, "--weights", "3,-1").code == 0
    found = tensors_in(tmp_path / "out")["w"]
    assert found[0] == 3e38 or found[0].isinf() or found[0].isnan()


def test_the_config_is_the_first_ones(tmp_path: Path) -> None:
    paths = [dcp(tmp_path / f"run_{number}" / "step_1", {"w": torch.zeros(2)}) for number in range(2)]
    for number, path in enumerate(paths):
        (path / "config.json").write_text(f'{{"number": {number}}}')
    mean(tmp_path / "out", paths)
    assert '"number": 0' in (tmp_path / "out" / "config.json").read_text()
