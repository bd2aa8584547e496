"""What a stranger has written can be refused, and can do nothing else: no pickle is run, no memory taken, no file outside read."""

import io
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from merging import Held, columns, command, dcp, peak_memory, refused, rewritten, rows, tensors_in

from assayer.errors import CheckpointError
from assayer.pickles import read_metadata, read_tree

MEMO_BOMB = b"\x80\x04Nr\x00\x00\x00\x10."
MIB = 1 << 20


class Call:
    """Pickles as a call of ``os.system``, which makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


def checkpoint(folder: Path) -> Path:
    return dcp(folder / "step_1", {"a.w": rows(torch.randn(6, 4), 2), "a.v": columns(torch.randn(6, 4), 2)})


PLACES: dict[str, Callable[[Any, Any], object]] = {
    "planner_data": lambda metadata, call: metadata.planner_data.update({"a.w": (call,)}),
    "storage_meta": lambda metadata, call: setattr(metadata, "storage_meta", call),
    "state_dict_metadata": lambda metadata, call: metadata.state_dict_metadata.update({"optimizer.x": call}),
    "storage_data": lambda metadata, call: metadata.storage_data.update({"x": call}),
}


@pytest.mark.parametrize(("place", "reader"), [*((place, "assayer") for place in PLACES), ("planner_data", "torch")])
def test_a_call_in_the_metadata_is_refused_by_its_name(tmp_path: Path, place: str, reader: str) -> None:
    path = checkpoint(tmp_path)
    marker = tmp_path / "ran"
    rewritten(path, lambda metadata: PLACES[place](metadata, Call(marker)))
    said = refused(path, tmp_path / "out", "--reader", reader)
    assert "posix.system" in said and str(path) in said
    assert not marker.exists()


def test_a_call_in_large_metadata_is_refused_by_its_name(tmp_path: Path) -> None:
    path = checkpoint(tmp_path)
    marker = tmp_path / "ran"

    def change(metadata: Any) -> None:
        metadata.planner_data["x"] = ("y" * 300_000,)
        metadata.planner_data["a.w"] = (Call(marker),)

    assert "posix.system" in refused(rewritten(path, change), tmp_path / "out")
    assert not marker.exists()


def states(call: Any) -> dict[str, Any]:
    fine = torch.zeros(3)
    wrapped = torch._utils._rebuild_wrapper_subclass

    class Nested:
        def __reduce__(self) -> Any:
            kind = torch.distributed.tensor.DTensor
            return torch._tensor._rebuild_from_type_v2, (wrapped, kind, (), (None, {"_local_tensor": fine, "_spec": call}))

    return {
        "top": {"w": fine, "x": call},
        "optimizer": {"model": {"w": fine}, "optimizer": {"state": [{"deep": call}]}},
        "key": {"model": {"w": fine}, "by": {"a": [call]}},
        "placement": {"w": Nested()},
    }


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("where", ["top", "optimizer", "key", "placement"])
def test_a_call_in_a_file_is_refused_by_its_name(tmp_path: Path, where: str, zipped: bool) -> None:
    marker, path = tmp_path / "ran", tmp_path / "m_step1.pt"
    torch.save(states(Call(marker))[where], path, _use_new_zipfile_serialization=zipped)
    said = refused(path, tmp_path / "out")
    assert "posix.system" in said and str(path) in said
    assert not marker.exists()


def test_torchs_own_reader_runs_no_call_either(tmp_path: Path) -> None:
    marker, path = tmp_path / "ran", tmp_path / "m_step1.pt"
    torch.save(states(Call(marker))["optimizer"], path)
    assert str(path) in refused(path, tmp_path / "out", "--reader", "torch")
    assert not marker.exists()


def test_a_call_in_a_shard_is_refused_and_named(tmp_path: Path) -> None:
    path = checkpoint(tmp_path)
    marker = tmp_path / "ran"
    archive = io.BytesIO()
    torch.save(Call(marker), archive)
    shard = path / "__0_0.distcp"
    shard.write_bytes(archive.getvalue())

    def point(metadata: Any) -> None:
        for place in metadata.storage_data.values():
            if place.relative_path == shard.name:
                place.offset, place.length = 0, len(archive.getvalue())

    said = refused(rewritten(path, point), tmp_path / "out")
    assert "posix.system" in said and str(shard) in said
    assert not marker.exists()


@pytest.mark.parametrize("name", ["builtins.eval", "builtins.getattr", "importlib.import_module", "torch.load", "collections.deque"])
def test_no_name_off_the_list_is_called(name: str) -> None:
    module, _, function = name.rpartition(".")
    words = f"c{module}\n{function}\n(S'1'\nS'2'\ntR.".encode()
    for read in (read_metadata, read_tree):
        try:
            found = read(words)
        except CheckpointError as error:
            assert name in str(error) or "metadata" in str(error)
        else:
            # What a pickle may name without harm stays a word.
            assert name == "builtins.getattr" and "?" in str(getattr(found, "given", "?"))


@pytest.mark.parametrize("given", ["/etc/passwd", "../outside.distcp", "sub/../../outside.distcp", ".", ""])
def test_a_file_outside_of_the_checkpoint_is_never_read(tmp_path: Path, given: str) -> None:
    path = checkpoint(tmp_path)
    shutil.copy(path / "__0_0.distcp", tmp_path / "outside.distcp")

    def point(metadata: Any) -> None:
        for place in metadata.storage_data.values():
            place.relative_path = given

    said = refused(rewritten(path, point), tmp_path / "out")
    assert str(path) in said and given in said


def test_a_memo_bomb_in_small_metadata_takes_no_memory(tmp_path: Path) -> None:
    path = checkpoint(tmp_path)
    (path / ".metadata").write_bytes(MEMO_BOMB)
    assert "no metadata" in refused(path, tmp_path / "out")
    with pytest.raises(CheckpointError):
        read_metadata(MEMO_BOMB)
    assert read_tree(MEMO_BOMB) is None


def test_a_memo_bomb_in_large_metadata_ends_in_a_child_of_limited_memory(tmp_path: Path) -> None:
    path = checkpoint(tmp_path)
    (path / ".metadata").write_bytes(b"\x80\x04X" + (300_000).to_bytes(4, "little") + b"x" * 300_000 + b"0" + MEMO_BOMB[2:])
    said = refused(path, tmp_path / "out")
    assert "MiB" in said and ".metadata" in said


def test_a_length_that_is_a_lie_takes_no_memory(tmp_path: Path) -> None:
    path = checkpoint(tmp_path)
    for bomb in (b"\x80\x05\x96" + (1 << 36).to_bytes(8, "little") + b".", b"\x80\x04\x8d" + (1 << 36).to_bytes(8, "little") + b"."):
        (path / ".metadata").write_bytes(bomb)
        assert str(path) in refused(path, tmp_path / "out")


def setter(**fields: object) -> Callable[[Any], None]:
    def change(metadata: Any) -> None:
        for name, value in fields.items():
            object.__setattr__(metadata.state_dict_metadata["a.w"], name, value)

    return change


def places(**fields: object) -> Callable[[Any], None]:
    def change(metadata: Any) -> None:
        for place in metadata.storage_data.values():
            for name, value in fields.items():
                setattr(place, name, value)

    return change


ODD: dict[str, Callable[[Any], object]] = {
    "path_empty": lambda metadata: metadata.planner_data.update({"a.w": ()}),
    "path_number": lambda metadata: metadata.planner_data.update({"a.w": 5}),
    "path_none": lambda metadata: metadata.planner_data.update({"a.w": None}),
    "chunks_number": setter(chunks=5),
    "chunks_words": setter(chunks=["x"]),
    "size_word": setter(size="xx"),
    "size_negative": setter(size=(-1, 4)),
    "size_fraction": setter(size=(6.0, 4)),
    "properties_word": setter(properties="xx"),
    "key_number": lambda metadata: metadata.state_dict_metadata.update({5: metadata.state_dict_metadata.pop("a.w")}),
    "file_number": places(relative_path=5),
    "offset_negative": places(offset=-1),
    "offset_huge": places(offset=1 << 70),
    "length_none": places(length=0),
    "length_short": places(length=10),
    "extension_number": places(transform_descriptors=5),
    "extension_words": places(transform_descriptors=["zstd"]),
    "no_storage": lambda metadata: setattr(metadata, "storage_data", None),
    "storage_list": lambda metadata: setattr(metadata, "storage_data", [1]),
    "no_state": lambda metadata: setattr(metadata, "state_dict_metadata", {}),
    "other_object": lambda metadata: metadata.__dict__.clear(),
}


@pytest.mark.parametrize("odd", ODD)
def test_metadata_of_impossible_form_is_refused_in_one_line(tmp_path: Path, odd: str) -> None:
    path = rewritten(checkpoint(tmp_path), ODD[odd])
    assert str(path) in refused(path, tmp_path / "out")


@pytest.mark.parametrize("kind", ["metadata", "shard", "file", "legacy", "safetensors"])
def test_no_damage_ends_in_anything_but_one_line(tmp_path: Path, kind: str) -> None:
    if kind in ("metadata", "shard"):
        path = checkpoint(tmp_path)
        target = path / (".metadata" if kind == "metadata" else "__0_0.distcp")
    elif kind == "safetensors":
        from safetensors.torch import save_file

        path = target = tmp_path / "m_step1.safetensors"
        save_file({"w": torch.zeros(3), "v": torch.ones(2, 2)}, path)
    else:
        path = target = tmp_path / "m_step1.pt"
        whole = {"model": {"w": torch.randn(3, 4), "v": torch.nn.Parameter(torch.zeros(3))}, "optimizer": {"state": {0: torch.ones(2)}}}
        torch.save(whole, path, _use_new_zipfile_serialization=kind == "file")
    data, status = target.read_bytes(), target.stat()
    chance = random.Random(f"damage {kind}")
    for _ in range(80):
        damaged = bytearray(data)
        for _ in range(chance.choice((1, 1, 3))):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        target.write_bytes(damaged)
        os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns))
        ended = command("--checkpoint_path", path, "--output_path", tmp_path / "out")
        assert ended.code in (0, 1) and ended.err.count("\n") == 1, ended
        if ended.code == 0:
            tensors_in(tmp_path / "out")
            shutil.rmtree(tmp_path / "out")
        assert not list(tmp_path.glob("*.part-*"))


def test_one_tensor_alone_in_a_file_is_refused_in_one_line(tmp_path: Path) -> None:
    torch.save(torch.zeros(3), tmp_path / "m_step1.pt")
    assert "m_step1.pt" in refused(tmp_path / "m_step1.pt", tmp_path / "out")


def test_a_state_dict_under_two_names_is_there_under_both(tmp_path: Path) -> None:
    inner = {"w": torch.ones(2)}
    torch.save({"encoder": inner, "decoder": inner}, tmp_path / "m_step1.pt")
    assert command("--checkpoint_path", tmp_path / "m_step1.pt", "--output_path", tmp_path / "out").code == 0
    assert set(tensors_in(tmp_path / "out")) == {"encoder.w", "decoder.w"}


def test_a_dictionary_that_holds_itself_is_no_endless_loop(tmp_path: Path) -> None:
    loop: dict[str, Any] = {"w": torch.ones(2)}
    loop["self"] = loop
    torch.save(loop, tmp_path / "m_step1.pt")
    command("--checkpoint_path", tmp_path / "m_step1.pt", "--output_path", tmp_path / "out")


def test_a_million_names_for_one_dictionary_take_no_time_and_memory(tmp_path: Path) -> None:
    level: dict[str, Any] = {"w": torch.ones(2)}
    for _ in range(40):
        level = {"a": level, "b": level}
    torch.save(level, tmp_path / "m_step1.pt")
    ended = command("--checkpoint_path", tmp_path / "m_step1.pt", "--output_path", tmp_path / "out")
    assert ended.err.count("\n") == 1


class Mine(torch.Tensor):
    """A tensor subclass, as quantizing libraries have them."""


def test_a_tensor_subclass_is_refused_and_not_made_plain(tmp_path: Path) -> None:
    torch.save({"fine": torch.zeros(2), "odd": torch.zeros(2).as_subclass(Mine)}, tmp_path / "m_step1.pt")
    said = refused(tmp_path / "m_step1.pt", tmp_path / "out")
    assert "odd" in said and "Mine" in said and "--reader torch" in said


@pytest.mark.parametrize(
    "odd",
    [
        lambda: torch.zeros(3, 3).to_sparse(),
        lambda: torch.zeros(2, device="meta"),
    ],
    ids=["sparse", "meta"],
)
def test_a_tensor_that_is_not_simply_its_elements_is_refused(tmp_path: Path, odd: Callable[[], torch.Tensor]) -> None:
    torch.save({"fine": torch.zeros(2), "odd": odd()}, tmp_path / "m_step1.pt")
    assert "odd" in refused(tmp_path / "m_step1.pt", tmp_path / "out")


def quantized() -> torch.Tensor:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(torch.arange(4.0), 0.5, 0, torch.qint8)


def test_a_quantized_tensor_is_refused_and_read_by_torch(tmp_path: Path) -> None:
    path = tmp_path / "m_step1.pt"
    torch.save({"fine": torch.ones(2), "odd": quantized()}, path)
    assert "odd" in refused(path, tmp_path / "out")
    ended = command("--checkpoint_path", path, "--output_path", tmp_path / "out", "--reader", "torch")
    assert ended.code == 0, ended
    assert tensors_in(tmp_path / "out")["odd"].equal(torch.arange(4.0))


def test_torchs_reader_gives_the_same(tmp_path: Path) -> None:
    whole = {"w": torch.randn(6, 4), "v": torch.randn(3).bfloat16()}
    parts: dict[str, Held] = {"model.w": rows(whole["w"], 2), "model.v": whole["v"], "optimizer.w": torch.zeros(3)}
    path = dcp(tmp_path / "step_1", parts, {name: tuple(name.split(".")) for name in parts})
    ended = command("--checkpoint_path", path, "--output_path", tmp_path / "out", "--reader", "torch", "--dtype", "float32")
    assert ended.code == 0, ended
    found = tensors_in(tmp_path / "out")
    assert found.keys() == whole.keys() and all(found[name].equal(tensor.float()) for name, tensor in whole.items())
    assert os.listdir(tmp_path / "out") == ["model.safetensors"]


def test_torchs_reader_is_not_offered_what_it_cannot_read(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint-3"
    path.mkdir()
    (path / "config.json").write_text("{}")
    torch.save({"w": torch.zeros(2)}, path / "pytorch_model.bin")
    assert str(path) in refused(path, tmp_path / "out", "--reader", "torch", code=2)


def test_names_with_control_characters_are_shown_harmlessly(tmp_path: Path) -> None:
    path = dcp(tmp_path / "step_1", {"a\x1b[31m\nb": torch.zeros(2, dtype=torch.complex128)})
    said = refused(path, tmp_path / "out")
    assert "\x1b" not in said and "complex128" in said


def test_large_metadata_takes_memory_in_proportion_and_in_a_child(tmp_path: Path) -> None:
    whole = torch.arange(1000.0).reshape(500, 2)
    path = dcp(tmp_path / "step_1", {"w": rows(whole, 500)})
    rewritten(path, lambda metadata: metadata.planner_data.update({"x": ("y" * (256 << 10),)}))
    assert peak_memory("--checkpoint_path", path, "--output_path", tmp_path / "out") < 100 * MIB
    assert tensors_in(tmp_path / "out")["w"].equal(whole)
