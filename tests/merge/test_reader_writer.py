"""How files are laid out, how little memory it takes, and that every bit that a checkpoint can vouch for is looked at."""

import contextlib
import io
import json
import os
import shutil
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from merging import assert_same, columns, command, dcp, flip, hollow, peak_memory, place_of, refused, rewritten, rows, tensors_in
from samples_of_trainers import SINGLE, TWO, sample

from assayer.archive import records_of
from assayer.errors import CheckpointError
from assayer.merge import merge
from assayer.merge.reader import boxes, run_of
from assayer.tensors import Piece

MIB = 1 << 20


def some() -> dict[str, torch.Tensor]:
    return {
        "layers.10.w": torch.randn(30, 9),
        "layers.9.w": torch.randn(9, 30, dtype=torch.float64),
        "layers.9.flag": torch.tensor([True, False, True]),
        "layers.9.half": torch.randn(7).bfloat16(),
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(3.25),
    }


@pytest.mark.parametrize("size", ["5GB", "1KB", "1"])
def test_headers_are_padded_elements_aligned_and_names_in_order(tmp_path: Path, size: str) -> None:
    whole = some()
    merge(dcp(tmp_path / "step_1", whole), tmp_path / "out", max_shard_size=size)
    assert_same(tensors_in(tmp_path / "out"), whole)
    for path in (tmp_path / "out").glob("*.safetensors"):
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        assert length % 8 == 0
        header = json.loads(data[8 : 8 + length])
        assert header.pop("__metadata__") == {"format": "pt"}
        end, widths = 0, []
        for name, entry in header.items():
            begin, after = entry["data_offsets"]
            assert begin == end and begin % whole[name].element_size() == 0
            assert after - begin == whole[name].nbytes
            end = after
            widths.append(-whole[name].element_size())
        assert len(data) == 8 + length + end
        assert widths == sorted(widths)


def test_shards_are_filled_in_the_order_of_names_up_to_their_size(tmp_path: Path) -> None:
    whole = {f"layers.{number}.w": torch.randn(100) for number in range(12)} | {"big": torch.randn(1000)}
    merge(dcp(tmp_path / "step_1", whole), tmp_path / "out", max_shard_size="2000")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert files == [f"model-{number:05d}-of-00004.safetensors" for number in range(1, 5)]
    assert set(index["weight_map"].values()) == set(files) and set(index["weight_map"]) == set(whole)
    # A tensor larger than a file has one of its own; layers follow one another as numbers do.
    assert [index["weight_map"][name] for name in ("big", "layers.0.w", "layers.4.w", "layers.5.w", "layers.10.w", "layers.11.w")] == [
        files[0],
        files[1],
        files[1],
        files[2],
        files[3],
        files[3],
    ]
    assert_same(tensors_in(tmp_path / "out"), whole)


def test_one_file_has_its_plain_name_and_no_index(tmp_path: Path) -> None:
    merge(dcp(tmp_path / "step_1", some()), tmp_path / "out")
    assert os.listdir(tmp_path / "out") == ["model.safetensors"]


@pytest.mark.parametrize("name", ["__metadata__", "", "x\udc80", 'with "quotes" and \\', "ключ", "line\nbreak", "a" * 3000])
def test_every_name_that_is_merged_can_be_read_again(tmp_path: Path, name: str) -> None:
    path = dcp(tmp_path / "step_1", {name: torch.ones(2), "other": torch.zeros(3)})
    ended = command("--checkpoint_path", path, "--output_path", tmp_path / "out")
    assert ended.err.count("\n") == 1
    if ended.code:
        # What safetensors cannot hold is refused.
        assert name in ("__metadata__", "", "x\udc80") and not (tmp_path / "out").exists()
    else:
        assert set(tensors_in(tmp_path / "out")) == {name, "other"}


@pytest.mark.parametrize(
    ("space", "begin", "sizes", "place"),
    [
        ((4, 6), (2, 0), (2, 6), 12),
        ((4, 6), (2, 1), (1, 3), 13),
        ((4, 6), (0, 1), (2, 3), None),
        ((4, 6), (0, 0), (4, 6), 0),
        ((3, 4, 5), (1, 2, 0), (1, 2, 5), 30),
        ((3, 4, 5), (1, 2, 0), (2, 2, 5), None),
        ((3, 4, 5), (0, 0, 1), (1, 1, 2), 1),
        ((), (), (), 0),
        ((7,), (3,), (2,), 3),
        ((2, 1, 3), (1, 0, 0), (1, 1, 3), 3),
    ],
)
def test_a_piece_lies_in_one_run_only_when_its_outer_indices_stand_still(
    space: tuple[int, ...], begin: tuple[int, ...], sizes: tuple[int, ...], place: int | None
) -> None:
    assert run_of(space, Piece("f", begin, sizes, 0)) == place


@pytest.mark.parametrize("space", [(5, 7), (3, 4, 5), (11,), (), (2, 3, 4, 5), (1, 1, 100), (6, 1)])
@pytest.mark.parametrize("room", [1, 7, 16, 64, 10**6])
def test_boxes_cover_a_tensor_in_order_and_keep_their_size(space: tuple[int, ...], room: int) -> None:
    whole = torch.arange(max(1, torch.Size(space).numel())).reshape(space)
    found = []
    for begin, sizes in boxes(space, 4, room):
        part = whole[tuple(slice(at, at + size) for at, size in zip(begin, sizes, strict=True))]
        assert part.numel() * 4 <= max(room, 4)
        found.append(part.flatten())
    assert torch.cat(found).equal(whole.flatten())


def test_boxes_keep_rows_together_that_belong_together() -> None:
    assert [sizes for _, sizes in boxes((12, 5), 4, 1, multiple=4)] == [(4, 5)] * 3
    assert [sizes for _, sizes in boxes((12, 5), 4, 200, multiple=4)] == [(8, 5), (4, 5)]


@pytest.mark.parametrize("group_name", ["dcp_flat", "verl", "lmms_engine", "accelerate_fsdp1_ranks", "placements_ranks"])
def test_a_flipped_bit_is_found_and_named(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, group_name: str) -> None:
    path = tmp_path / sample(tmp_path_factory, TWO, group_name).path.name
    shutil.copytree(sample(tmp_path_factory, TWO, group_name).path, path)
    (file, *_) = sorted(p for p in path.rglob("*") if p.name.startswith(("__0_0", "model_world", "pytorch_model_fsdp_0_rank")))
    start, name = storage_in(file)
    flip(file, start + 5)
    said = refused(path, tmp_path / "out")
    assert str(file) in said and f"at byte {start}" in said and "CRC32" in said and (not name or name in said)
    assert command("--checkpoint_path", path, "--output_path", tmp_path / "out", "--no_verify").code == 0


def storage_in(file: Path) -> tuple[int, str]:
    """Where some tensor's storage lies in a file of archives; its name where one archive holds one tensor."""
    if file.suffix == ".distcp":
        import pickle

        metadata = pickle.loads((file.parent / ".metadata").read_bytes())
        index, _ = next((i, p) for i, p in metadata.storage_data.items() if p.relative_path == file.name and i.offset is not None)
        return place_of_first(file, metadata.storage_data[index]), index.fqn
    with file.open("rb") as opened:
        records = records_of(opened.fileno(), 0, file.stat().st_size)
    return next(record.start for key, record in records.items() if key.startswith("data/") and record.length > 8), ""


def place_of_first(file: Path, place: object) -> int:
    offset, length = place.offset, place.length  # type: ignore[attr-defined]
    with file.open("rb") as opened:
        return records_of(opened.fileno(), offset, length)["data/0"].start


@pytest.mark.parametrize("name", ["deepspeed_zero1", "deepspeed_zero2", "deepspeed_zero3"])
def test_a_flipped_bit_in_a_flat_range_is_found(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    path = tmp_path / "run" / sample(tmp_path_factory, SINGLE, name).path.name
    shutil.copytree(sample(tmp_path_factory, SINGLE, name).path.parent, path.parent)
    file = next(path.glob("*rank_1_mp_rank_00_optim_states.pt"))
    with zipfile.ZipFile(file) as archive, file.open("rb") as opened:
        assert archive.testzip() is None
        records = records_of(opened.fileno(), 0, file.stat().st_size)
    refusals = 0
    for record in records.values():
        if record.length > 400:
            flip(file, record.start + record.length - 3)
            ended = command("--checkpoint_path", path, "--output_path", tmp_path / "out", "--max_shard_size", "1GB")
            if ended.code:
                assert str(file) in ended.err and not (tmp_path / "out").exists()
                refusals += 1
            else:
                shutil.rmtree(tmp_path / "out")
            flip(file, record.start + record.length - 3)
    # The optimizer's own states are of no concern; at least one large range is the weights'.
    assert refusals


def test_a_flipped_bit_in_the_padding_of_a_storage_is_found_too(tmp_path: Path) -> None:
    path = tmp_path / "m_step1.pt"
    torch.save({"w": torch.arange(64.0)[:50].reshape(5, 10)}, path)
    with path.open("rb") as opened:
        record = records_of(opened.fileno(), 0, path.stat().st_size)["data/0"]
    assert record.length == 256
    flip(path, record.start + 250)
    assert f"at byte {record.start}" in refused(path, tmp_path / "out")


@pytest.mark.parametrize("kind", ["file", "dcp"])
def test_a_flipped_bit_in_the_description_of_a_tensor_is_found(tmp_path: Path, kind: str) -> None:
    # The zip's directory vouches for the pickle as it does for the bytes.
    if kind == "file":
        path = file = tmp_path / "m_step1.pt"
        torch.save({"model": {"w": torch.arange(12.0).reshape(3, 4).t(), "v": torch.arange(12.0)}}, path)
        start = 0
        length = file.stat().st_size
    else:
        path = dcp(tmp_path / "step_1", {"w": torch.arange(24.0).reshape(4, 6)})
        file = path / "__0_0.distcp"
        start, length = 0, file.stat().st_size
    with file.open("rb") as opened:
        record = records_of(opened.fileno(), start, length)["data.pkl"]
    merge(path, tmp_path / "right")
    right = tensors_in(tmp_path / "right")
    unnoticed = []
    for position in range(record.start, record.start + record.length):
        flip(file, position)
        ended = command("--checkpoint_path", path, "--output_path", tmp_path / "out")
        if ended.code == 0:
            found = tensors_in(tmp_path / "out")
            if found.keys() != right.keys() or any(not found[name].equal(right[name]) for name in right):
                unnoticed.append(position - record.start)
            shutil.rmtree(tmp_path / "out")
        flip(file, position)
    assert unnoticed == []


@pytest.mark.parametrize("assembled", [False, True], ids=["streamed", "assembled"])
def test_a_flipped_bit_is_found_however_a_tensor_is_put_together(tmp_path: Path, assembled: bool) -> None:
    whole = torch.randn(600, 700)
    path = dcp(tmp_path / "step_1", {"some.weight": columns(whole, 2) if assembled else rows(whole, 2)})
    file, position = place_of(path, "some.weight")
    for offset in (0, whole.nbytes // 4, whole.nbytes // 2 - 1):
        flip(file, position + offset)
        said = refused(path, tmp_path / "out")
        assert f"{file} is damaged in the {whole.nbytes // 2} bytes at byte {position}, which hold some.weight" in said
        flip(file, position + offset)
    merge(path, tmp_path / "out")
    assert_same(tensors_in(tmp_path / "out"), {"some.weight": whole})


def test_weights_whose_writer_left_the_crcs_out_are_merged(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        path = dcp(tmp_path / "step_1", {"w": torch.ones(5)})
    finally:
        torch.serialization.set_crc32_options(True)
    merge(path, tmp_path / "out")
    assert_same(tensors_in(tmp_path / "out"), {"w": torch.ones(5)})


def test_columns_of_three_dimensions_and_transposed_shards_find_their_places(tmp_path: Path) -> None:
    whole = torch.arange(4 * 6 * 5.0).reshape(4, 6, 5)
    crossed = torch.arange(24.0).reshape(6, 4)
    path = dcp(
        tmp_path / "step_1",
        {
            "middle": columns(whole, 4),
            "corner": [((a, b), crossed[a : a + 3, b : b + 2]) for a in (0, 3) for b in (0, 2)],
            "last": [((0, 0, at), whole[:, :, at : at + 1]) for at in range(5)],
            "twice": [*rows(crossed, 2), *rows(crossed, 2)],
        },
    )
    merge(path, tmp_path / "out")
    assert_same(tensors_in(tmp_path / "out"), {"middle": whole, "corner": crossed, "last": whole, "twice": crossed})


@pytest.mark.parametrize("parts", [300, 40])
def test_more_files_than_may_be_open_at_a_time_are_merged(tmp_path: Path, parts: int) -> None:
    whole = torch.randn(300, 3)
    path = dcp(tmp_path / "step_1", {"w": rows(whole, parts), "v": columns(torch.ones(2, 40), 40)})
    merge(path, tmp_path / "out", threads=3)
    assert_same(tensors_in(tmp_path / "out"), {"w": whole, "v": torch.ones(2, 40)})


def in_columns(folder: Path, dtype: str, rows_: int, columns_: int) -> Path:
    for rank in range(2):
        begin = (0, rank * columns_ // 2)
        hollow(folder / f"shard-0000{rank + 1}-model-00001-of-00001.safetensors", dtype, (rows_, columns_ // 2), begin)
    return folder


# Each holds about 200 MiB, or becomes as much.
LARGE: dict[str, tuple[Callable[[Path], Path], str]] = {
    "one_run": (lambda folder: hollow(folder / "m_step1.safetensors", "F32", (10240, 5120)), "keep"),
    "checked": (lambda folder: dcp(folder / "step_1", {"w": rows(torch.zeros(10240, 5120), 2)}), "bfloat16"),
    "columns": (lambda folder: in_columns(folder / "step_1", "F32", 10240, 5120), "keep"),
    "columns_cast": (lambda folder: in_columns(folder / "step_1", "F32", 10240, 5120), "bfloat16"),
    "columns_widened": (lambda folder: in_columns(folder / "step_1", "F8_E4M3", 10240, 5120), "float32"),
}


@pytest.mark.parametrize("threads", [pytest.param(0, marks=pytest.mark.slow), 1])
@pytest.mark.parametrize("kind", LARGE)
def test_a_merge_takes_under_a_hundred_mebibytes_whatever_the_models_size(tmp_path: Path, kind: str, threads: int) -> None:
    make, dtype = LARGE[kind]
    taken = peak_memory("--checkpoint_path", make(tmp_path), "--output_path", tmp_path / "out", "--dtype", dtype, "--threads", threads)
    shutil.rmtree(tmp_path)
    assert taken < 100 * MIB


def test_a_checkpoint_larger_than_the_memory_that_is_allowed_is_merged(tmp_path: Path) -> None:
    path = dcp(tmp_path / "step_1", {f"w{i}": torch.zeros(4096, 2048) for i in range(10)})
    allowed = 256 * MIB
    assert sum(file.stat().st_size for file in path.iterdir()) > allowed
    code = "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv.pop(1)),) * 2); "
    code += "runpy.run_module('assayer.merge', run_name='__main__')"
    words = [sys.executable, "-c", code, str(allowed), "--checkpoint_path", str(path), "--output_path", str(tmp_path / "out")]
    # Each thread's own heap counts for 64 MiB of addresses, taken or not.
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "MALLOC_ARENA_MAX": "1"})
    assert done.returncode == 0, done.stderr
    shutil.rmtree(tmp_path)


def test_reordered_rows_take_no_more_memory_than_others(tmp_path: Path) -> None:
    path = hollow(tmp_path / "m_step1.safetensors", "F32", (10240, 5120), name="layers.0.attention.wq.weight")
    (tmp_path / "config.json").write_text('{"head_dim": 128}')
    words = "--key_map", "torchtitan-llama3", "--dtype", "bfloat16", "--threads", 1
    taken = peak_memory("--checkpoint_path", path, "--output_path", tmp_path / "out", *words)
    shutil.rmtree(tmp_path)
    assert taken < 100 * MIB


def test_a_transposed_tensor_takes_no_more_memory_than_another(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(4096, 7680).t()}, tmp_path / "m_step1.pt")
    taken = peak_memory("--checkpoint_path", tmp_path / "m_step1.pt", "--output_path", tmp_path / "out")
    shutil.rmtree(tmp_path)
    assert taken < 100 * MIB


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda data: data[:-1], "bytes"),
        (lambda data: data[: len(data) // 2], "bytes"),
        (lambda data: b"", "bytes"),
    ],
    ids=["one_byte", "half", "all"],
)
def test_a_shard_that_is_cut_short_is_named_with_both_sizes(tmp_path: Path, change: Callable[[bytes], bytes], said: str) -> None:
    path = dcp(tmp_path / "step_1", {"w": rows(torch.randn(40, 40), 2)})
    shard, metadata = path / "__1_0.distcp", path / ".metadata"
    whole = shard.read_bytes()
    shard.write_bytes(change(whole))
    os.utime(shard, ns=(metadata.stat().st_mtime_ns, metadata.stat().st_mtime_ns))
    told = refused(path, tmp_path / "out")
    assert str(path) in told and "__1_0.distcp" in told and str(len(change(whole))) in told and str(len(whole)) in told


@pytest.mark.parametrize("how", ["missing", "symlink"])
def test_a_shard_that_is_not_there_is_named(tmp_path: Path, how: str) -> None:
    path = dcp(tmp_path / "step_1", {"w": rows(torch.randn(40, 40), 2)})
    shard = path / "__1_0.distcp"
    shard.rename(tmp_path / "elsewhere")
    if how == "symlink":
        shard.symlink_to(tmp_path / "elsewhere")
    assert "__1_0.distcp is missing" in refused(path, tmp_path / "out")


def test_a_shard_younger_than_its_metadata_is_told(tmp_path: Path) -> None:
    path = dcp(tmp_path / "step_1", {"w": torch.randn(4)})
    after = (path / ".metadata").stat().st_mtime_ns + 10**9
    os.utime(path / "__0_0.distcp", ns=(after, after))
    assert "younger" in refused(path, tmp_path / "out")


def test_parts_that_overlap_are_refused_with_both_files(tmp_path: Path) -> None:
    whole = torch.randn(6, 4)
    path = dcp(tmp_path / "step_1", {"w": [((0, 0), whole[:4]), ((3, 0), whole[3:])]})
    said = refused(path, tmp_path / "out")
    assert "w has pieces that overlap" in said and "__0_0.distcp" in said and "__1_0.distcp" in said


def test_parts_that_leave_a_gap_are_refused_with_their_number(tmp_path: Path) -> None:
    whole = torch.randn(6, 4)
    path = dcp(tmp_path / "step_1", {"w": [((0, 0), whole[:2]), ((4, 0), whole[4:])]})
    assert "w of shape [6, 4] has pieces for 16 of its 24 elements" in refused(path, tmp_path / "out")
    path = dcp(tmp_path / "step_2", {"w": rows(whole, 2)}, shapes={"w": (7, 4)})
    assert "24 of its 28" in refused(path, tmp_path / "out")


def test_parts_outside_of_their_tensor_are_refused(tmp_path: Path) -> None:
    path = dcp(tmp_path / "step_1", {"w": rows(torch.randn(6, 4), 2)}, shapes={"w": (5, 4)})
    assert "w of shape [5, 4] has a piece outside of it, at [3, 0], [3, 4]" in refused(path, tmp_path / "out")


def test_an_archive_that_holds_another_tensor_than_its_metadata_says_is_refused(tmp_path: Path) -> None:
    path = dcp(tmp_path / "step_1", {"w": torch.randn(6, 4), "v": torch.randn(4, 6)})

    def swap(metadata: object) -> None:
        storage = metadata.storage_data  # type: ignore[attr-defined]
        first, second = storage
        storage[first], storage[second] = storage[second], storage[first]

    rewritten(path, swap)
    said = refused(path, tmp_path / "out")
    assert "float32 [4, 6]" in said and "float32 [6, 4]" in said and "__0_0.distcp" in said


def test_a_dtype_that_safetensors_lacks_is_refused_with_the_tensors_name(tmp_path: Path) -> None:
    path = dcp(tmp_path / "step_1", {"fine": torch.zeros(2), "wave": torch.zeros(2, dtype=torch.complex128)})
    said = refused(path, tmp_path / "out")
    assert "wave" in said and "complex128" in said and str(path) in said
    torch.save({"wave": torch.zeros(2, dtype=torch.complex128)}, tmp_path / "m_step1.pt")
    assert "complex128" in refused(tmp_path / "m_step1.pt", tmp_path / "out")


@pytest.mark.parametrize("cut", [0, 1, 10, 100])
def test_metadata_that_is_cut_short_is_refused(tmp_path: Path, cut: int) -> None:
    path = dcp(tmp_path / "step_1", {"w": torch.randn(6, 4)})
    data = (path / ".metadata").read_bytes()
    (path / ".metadata").write_bytes(data[: cut and len(data) - cut])
    said = refused(path, tmp_path / "out")
    assert str(path) in said and ".metadata" in said


def test_without_metadata_nothing_is_merged(tmp_path: Path) -> None:
    path = dcp(tmp_path / "step_1", {"w": torch.randn(6, 4)})
    (path / ".metadata").rename(path / ".metadata.tmp")
    assert "no .metadata yet" in refused(path, tmp_path / "out")


def test_views_of_one_storage_in_a_file_come_out_each_by_itself(tmp_path: Path) -> None:
    base = torch.arange(100.0)
    whole = {
        "view": base[10:30].reshape(4, 5),
        "steps": base[::7],
        "transposed": base[:12].reshape(3, 4).t(),
        "expanded": base[5:6].expand(4),
        "scalar": base[3],
        "none": base[:0],
        "tied": base,
        "also": base,
    }
    torch.save(whole, tmp_path / "m_step1.pt")
    torch.save(whole, tmp_path / "old_step1.pt", _use_new_zipfile_serialization=False)
    for name in ("m", "old"):
        merge(tmp_path / f"{name}_step1.pt", tmp_path / name)
        assert_same(tensors_in(tmp_path / name), whole)


def test_zip_directories_that_point_anywhere_are_told_as_damage(tmp_path: Path) -> None:
    # Every byte of the directory in turn is set to its largest value, and so are the wide fields.
    data = io.BytesIO()
    torch.save({"w": torch.zeros(3)}, data)
    whole = data.getvalue()
    begin = whole.index(b"PK\x01\x02")
    path = tmp_path / "m_step1.pt"
    for position in range(begin, len(whole)):
        for width in (1, 8):
            path.write_bytes(whole[:position] + b"\xff" * min(width, len(whole) - position) + whole[position + width :])
            with path.open("rb") as file, contextlib.suppress(CheckpointError):
                records_of(file.fileno(), 0, len(whole))


def test_a_record_beyond_the_largest_file_is_told_as_damage(tmp_path: Path) -> None:
    # An entry of a wide zip, whose header would begin at byte 2**63.
    path = tmp_path / "m_step1.pt"
    name, extra = b"archive/data.pkl", struct.pack("<2HQ", 1, 8, 1 << 63)
    entry = struct.pack("<4s6H3L5H2L", b"PK\x01\x02", *[0] * 6, 0, 4, 4, len(name), len(extra), *[0] * 3, 0, 0xFFFFFFFF) + name + extra
    begin = b"PK\x03\x04" + bytes(60)
    path.write_bytes(begin + entry + struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 1, 1, len(entry), len(begin), 0))
    with path.open("rb") as file, pytest.raises(CheckpointError):
        records_of(file.fileno(), 0, path.stat().st_size)
