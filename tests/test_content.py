"""What a weight file says of itself, at every length that a writer passes through."""

import json
import os
import pickle
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from assayer import content
from assayer.errors import CheckpointError


def tensors(value: float = 1.0) -> dict[str, torch.Tensor]:
    return {"big": torch.full((64, 64), value), "small": torch.arange(3.0), "empty": torch.zeros(0)}


def saved(folder: Path, kind: str, state: dict[str, torch.Tensor]) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / ("m.safetensors" if kind == "safetensors" else "m.pt")
    if kind == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind == "zip")
    return path


@pytest.mark.parametrize("kind", ["zip", "safetensors"])
def test_no_shorter_file_is_taken_for_whole(tmp_path: Path, kind: str) -> None:
    path = saved(tmp_path, kind, tensors())
    whole = path.read_bytes()
    assert content.incomplete(path) is None
    for length in [*range(0, len(whole), 97), len(whole) - 1]:
        path.write_bytes(whole[:length])
        assert content.incomplete(path), f"{length} of {len(whole)} bytes"
        with pytest.raises(CheckpointError):
            content.fingerprint(path)


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_the_fingerprint_follows_the_weights_and_nothing_else(tmp_path: Path, kind: str) -> None:
    first = content.fingerprint(saved(tmp_path / "a", kind, tensors()))
    # The form before torch 1.6 holds memory addresses: of two saves of the same weights, no two are alike.
    path = tmp_path / "a" / "m.pt" if kind == "legacy" else saved(tmp_path / "b", kind, tensors())
    os.utime(path, (1, 1))
    assert content.fingerprint(path) == first
    copy = tmp_path / f"other{path.suffix}"
    shutil.copy(path, copy)
    assert content.fingerprint(copy) == first
    changed = tensors()
    changed["small"][1] = 7.0
    assert content.fingerprint(saved(tmp_path / "c", kind, changed)) != first


def test_crcs_that_torch_was_told_to_leave_out_count_as_absent(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        one, two = (content.fingerprint(saved(tmp_path / str(v), "zip", tensors(v))) for v in (1.0, 2.0))
    finally:
        torch.serialization.set_crc32_options(True)
    assert one != two


def test_only_a_pickle_without_a_zip_has_no_end_mark(tmp_path: Path) -> None:
    assert content.is_legacy(saved(tmp_path / "a", "legacy", tensors()))
    assert not content.is_legacy(saved(tmp_path / "b", "zip", tensors()))
    assert not content.is_legacy(saved(tmp_path / "c", "safetensors", tensors()))


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, ...]:
            return os.mkdir, (str(tmp_path / "sprung"),)

    path = tmp_path / "m.pt"
    path.write_bytes(pickle.dumps(Trap()))
    content.incomplete(path)
    content.fingerprint(path)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    "data",
    [
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 4) + b"\xff\xfe\x00\x00",
        *(
            struct.pack("<Q", len(header)) + header
            for header in (
                json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": offsets}}).encode()
                for offsets in ([-4, 0], [4, 0], ["a", 1], [0])
            )
        ),
    ],
)
def test_a_hostile_safetensors_header_is_a_sentence(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(data)
    assert content.incomplete(path)


@pytest.mark.parametrize("data", [b"", b"hello", b"PK\x03\x04" + b"x" * 100, b"PK\x05\x06" + bytes(18)])
def test_what_is_no_checkpoint_is_a_sentence(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "m.pt"
    path.write_bytes(data)
    assert content.incomplete(path)
