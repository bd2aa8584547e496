"""What somebody may lay into a watched directory to make its watch, or a merge, run something, hang, or take all memory."""

import json
import os
import pickle
import socket
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

GIB = 1 << 30


class Runs:
    """When it is unpickled, a file appears."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch '{self.mark}'",)


class Street:
    """The directory of runs, and what must stay as it is around it: an outside, and a mark that appears when something was run."""

    def __init__(self, root: Path) -> None:
        self.root, self.runs, self.mark, self.outside = root, root / "runs", root / "ran", root / "outside"
        self.runs.mkdir(exist_ok=True)
        self.outside.mkdir()
        # Whoever opens it outside waits for ever; whoever takes it for a checkpoint makes a record of it.
        os.mkfifo(self.outside / "pipe")
        torch.save({"w": torch.zeros(3)}, self.outside / "model_step77.pt")
        (self.outside / "step_78").mkdir()
        torch.save({"w": torch.zeros(3)}, self.outside / "step_78" / "pytorch_model.bin")

    def write(self, name: str, data: bytes) -> Path:
        path = self.runs / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return path

    def folder(self, name: str) -> Path:
        (self.runs / name).mkdir(parents=True, exist_ok=True)
        return self.runs / name

    def weights(self, folder: str) -> Path:
        """A directory as transformers saves one, whole but for what a scene does to it."""
        path = self.folder(folder)
        save_file({"w": torch.ones(4)}, path / "model.safetensors")
        (path / "config.json").write_text("{}")
        return path

    def around(self) -> set[tuple[str, int, int]]:
        """Everything beside the runs, but for what is assayer's own."""
        ours = ("runs", "tmp", "xdg", "__pycache__")
        paths = [path for path in self.root.rglob("*") if path.relative_to(self.root).parts[0] not in ours]
        return {(str(path), path.lstat().st_size, path.lstat().st_mtime_ns) for path in paths}

    def sparse(self, name: str, start: bytes, size: int, end: bytes = b"") -> Path:
        """A file of many gigabytes that takes no room: whoever reads it whole is seen."""
        path = self.write(name, start)
        with path.open("r+b") as file:
            file.truncate(size - len(end))
            file.seek(0, os.SEEK_END)
            file.write(end)
        return path


def header(table: object, length: int | None = None, data: bytes = b"") -> bytes:
    text = table if isinstance(table, bytes) else json.dumps(table).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(begin: int, end: int) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [(end - begin) // 4], "data_offsets": [begin, end]}


def pickles(street: Street) -> None:
    torch.save(Runs(street.mark), street.runs / "hostile_step10.pt")
    torch.save({"w": Runs(street.mark)}, street.runs / "hostile_step11.pt", _use_new_zipfile_serialization=False)
    street.write("hostile_step12.pt", pickle.dumps(Runs(street.mark)))
    # A name that tells no step makes the watch look for one inside.
    torch.save({"global_step": Runs(street.mark)}, street.runs / "last.ckpt")
    torch.save({"global_step": Runs(street.mark)}, street.runs / "latest.ckpt", _use_new_zipfile_serialization=False)
    for name, size in (("step_13", 0), ("step_14", 300_000)):
        street.write(f"{name}/.metadata", pickle.dumps([b"x" * size, Runs(street.mark)]))
        street.write(f"{name}/__0_0.distcp", b"x" * 100)
    path = street.folder("global_step15")
    for file in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"):
        torch.save({"optimizer_state_dict": Runs(street.mark), "param_shapes": Runs(street.mark)}, path / file)
    torch.save(Runs(street.mark), street.weights("checkpoint-16") / "training_args.bin")
    street.write("checkpoint-16/modeling_x.py", f"open({str(street.mark)!r}, 'w')".encode())
    street.write("checkpoint-16/__init__.py", f"open({str(street.mark)!r}, 'w')".encode())
    street.write("conftest.py", f"open({str(street.mark)!r}, 'w')".encode())
    street.write("torch.py", f"open({str(street.mark)!r}, 'w')".encode())


def knots(street: Street) -> None:
    """Pickles that hold themselves: to hash, to copy or to spell out a part of them takes years, all memory, or the process."""
    twice = b")" + b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(60))
    nested = b")" + b"\x85" * 200_000
    start = b"\x80\x02ctorch.distributed.checkpoint.metadata\nMetadata\n)\x81}("
    knot = {
        "hashed": b"\x80\x02}" + twice + b"Ns.",
        "sunk": b"\x80\x02}" + nested + b"Ns.",
        "spelled": start
        + b"U\x0cplanner_datad"[:0]
        + b"U\x0cplanner_data}U\x01w"
        + twice
        + b"\x85sU\x13state_dict_metadata}U\x0cstorage_data}ub.",
        "copied": b"\x80\x02(" + b"N" * 100_000 + b"tq\x630ctorch\nSize\nq\x64(" + b"hdhc\x85R" * 20_000 + b"t.",
    }
    for number, (name, data) in enumerate(knot.items()):
        for place, size in (("small", 0), ("large", 300_000)):
            street.write(f"{name}_{place}_step_{20 + number}/.metadata", data[:2] + b"U\x01x0" + b"N0" * (size // 2) + data[2:])
            street.write(f"{name}_{place}_step_{20 + number}/__0_0.distcp", b"x" * 100)
        with zipfile.ZipFile(street.folder(f"rank_{name}") / "last.ckpt", "w") as archive:
            archive.writestr("last/data.pkl", data)


STATES = {
    "huge": b'{"global_step": 1, "log_history": ["' + b"x" * (40 << 20) + b'"]}',
    "nested": b'{"global_step":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "listed": b'{"log_history": [' + b"[]," * 1_000_000 + b"[]]}",
    "nan": b'{"global_step": NaN, "epoch": Infinity, "num_input_tokens_seen": -Infinity}',
    "typed": b'{"global_step": {"a": []}, "epoch": "\\u001b[2J", "num_input_tokens_seen": true}',
    "gigantic": b'{"global_step": 1' + b"0" * 4000 + b', "epoch": -1e308}',
    "endless": b'{"global_step": ' + b"9" * 1_000_000 + b"}",
    "list": b"[]",
    "cut": b'{"global_step": 5',
    "bytes": b"\xff\xfe\x00",
}


def tables(street: Street) -> None:
    """JSON that is too much, or nothing that a trainer writes."""
    for number, (name, data) in enumerate(STATES.items()):
        path = street.weights(f"{name}/checkpoint-{30 + number}")
        (path / "trainer_state.json").write_bytes(data)
    weight_maps = [
        b'{"weight_map": {"w": "../../outside/model_step77.pt"}}',
        b'{"weight_map": {"w": ["/etc/passwd"]}}',
        b'{"weight_map": 5}',
    ]
    for number, data in enumerate([*weight_maps, b"{" + b" " * (40 << 20) + b"}", b"[" * 1_000_000]):
        path = street.weights(f"index/checkpoint-{40 + number}")
        (path / "model.safetensors").rename(path / "model-00001-of-00001.safetensors")
        (path / "model.safetensors.index.json").write_bytes(data)


def safetensors(street: Street) -> None:
    headers = {
        "long": header({"w": entry(0, 4)}, 2**63 - 1, b"1234"),
        "negative": header({"w": entry(0, 4)}, 2**64 - 8, b"1234"),
        "overlap": header({"w": entry(0, 8), "v": entry(4, 12)}, None, bytes(12)),
        "past": header({"w": entry(0, 1 << 60)}, None, bytes(4)),
        "twice": header(
            b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', None, bytes(4)
        ),
        "full": header(b"{" + b" " * 90_000_000 + b"}"),
        "lists": header(b'{"w":[' + b"[]," * 9_000_000 + b"[]]}"),
        "nested": header(b'{"w":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
        "backwards": header({"w": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}, None, bytes(4)),
        "gigantic": header(b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,' + b"9" * 5000 + b"]}}", None, bytes(4)),
    }
    for number, (name, data) in enumerate(headers.items()):
        street.write(f"{name}_step{50 + number}.safetensors", data)


def zips(street: Street) -> None:
    bomb = street.runs / "bomb_step60.pt"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        for part in range(20):
            archive.writestr(f"bomb/data/{part}", bytes(50 << 20))
        archive.writestr("bomb/data.pkl", bytes(50 << 20))
    with zipfile.ZipFile(street.runs / "slip_step61.pt", "w") as archive:
        for name in ("../../slipped", "/tmp/../slipped", "a/../../slipped", "slip/data.pkl", "\x1b[2J\n"):
            archive.writestr(name, "x")
    with zipfile.ZipFile(street.runs / "empty_step62.pt", "w"):
        pass
    # A directory of gigabytes, as far as its end tells, in both of its forms.
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 9, 9, 3 * GIB, 100, 0)
    street.sparse("directory_step63.pt", b"PK\x03\x04", 4 * GIB - 1, end)
    wide = struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, 9, 9, 19 * GIB, 100)
    locator = struct.pack("<4sLQL", b"PK\x06\x07", 0, 20 * GIB - 22 - 20 - 56, 1)
    narrow = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 9, 9, 46, 100, 0)
    street.sparse("directory_step64.pt", b"PK\x03\x04", 20 * GIB, wide + locator + narrow)


def sparse_files(street: Street) -> None:
    """Each of them, read whole, takes more memory than the machine may have."""
    size = 40 * GIB
    street.sparse("big_step70.pt", b"PK\x03\x04", size)
    street.sparse("big_step71.safetensors", header({"w": entry(0, size - 1000)}), size)
    street.sparse("step_72/.metadata", b"\x80\x02", size)
    street.sparse("step_72/__0_0.distcp", b"x", size)
    street.write("step_73/.metadata", b"\x80\x04N.")
    street.sparse("step_73/__0_0.distcp", b"x", size, struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 1, 1, 2 * GIB, 0, 0))
    for number, name in enumerate(("trainer_state.json", "model.safetensors.index.json", "config.json", "metadata.json")):
        street.weights(f"checkpoint-{74 + number}")
        street.sparse(f"checkpoint-{74 + number}/{name}", b"{", size)
    street.sparse("last.ckpt", b"\x80\x02", size)
    street.sparse("evals/mean/good_step1.pt.json", b"{", size)


def special_files(street: Street) -> None:
    for name in (
        "pipe_step80.pt",
        "evals/mean/good_step1.pt.json",
        "latest",
        "checkpoint-81/model.safetensors",
        "checkpoint-82/trainer_state.json",
    ):
        (street.runs / name).parent.mkdir(parents=True, exist_ok=True)
        os.mkfifo(street.runs / name)
    street.weights("checkpoint-82")
    here = os.open(street.runs, os.O_RDONLY)
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(f"/proc/self/fd/{here}/socket_step83.pt")
    os.close(here)
    for name in ("null", "con", "nul_step84.pt", "...", "-rf", "--help_step85.pt", "~_step86.pt", "$(touch x)_step87.pt", "`id`_step88.pt"):
        street.write(name, b"x")
    # DeepSpeed's marker, beside a tag's folder and, under transformers, inside the checkpoint.
    path = street.folder("global_step89")
    torch.save({"module": {"w": torch.ones(3)}}, path / "mp_rank_00_model_states.pt")
    street.weights("checkpoint-90")
    os.mkfifo(street.runs / "checkpoint-90" / "latest")


def links(street: Street) -> None:
    outside = street.outside
    for name, to in {
        "link_step77.pt": outside / "model_step77.pt",
        "passwd_step91.pt": Path("/etc/passwd"),
        "pipe_step92.pt": outside / "pipe",
        "step_78": outside / "step_78",
        "directory": outside,
        "loop": Path("loop"),
        "up": Path(".."),
        "root": Path("/"),
        "latest": outside / "pipe",
        "dangling_step93.pt": outside / "nothing",
    }.items():
        os.symlink(to, street.runs / name)
    for number, (name, target) in enumerate(
        {
            "model.safetensors": "/etc/passwd",
            "pytorch_model.bin": str(outside / "model_step77.pt"),
            "trainer_state.json": str(outside / "pipe"),
            "model.safetensors.index.json": str(outside / "pipe"),
            "adapter_model.safetensors": str(outside / "pipe"),
        }.items()
    ):
        path = street.folder(f"linked/checkpoint-{94 + number}")
        (path / "config.json").write_text("{}")
        os.symlink(target, path / name)
    path = street.folder("linked/step_99")
    os.symlink(outside / "pipe", path / ".metadata")
    os.symlink(outside / "pipe", path / "__0_0.distcp")
    path = street.folder("linked/global_step100")
    torch.save({"module": {"w": torch.ones(3)}}, path / "mp_rank_00_model_states.pt")
    os.symlink(outside / "pipe", street.runs / "linked" / "latest")
    turning = street.folder("turning/a/b")
    os.symlink("../..", turning / "c")


NAMES = (
    b"line\nbreak_step110.pt",
    b"\x1b[2J\x1b[31mred_step111.pt",
    b"\x1b]0;title\x07_step112.pt",
    b"\r\x08\x08_step113.pt",
    "\u202egnp_step114.pt".encode(),
    "\u2028\u0085\u200b_step115.pt".encode(),
    b"\xff\xfe\x80_step116.pt",
    b"-rf_step117.pt",
    b"--detach_step118.pt",
    b"[bold red]markup[blink]_step119.pt",
    b"$HOME;id|&_step120.pt",
    b"x" * (255 - len(b"_step121.pt")) + b"_step121.pt",
    b"\x1b[2J" * 62 + b".pt",
    b"a\\..\\_step123.pt",
    b"%s%n{0}{__class__}_step124.pt",
    b"NaN.pt",
)


def names(street: Street) -> None:
    for name in NAMES:
        torch.save({"w": torch.full((2,), 3.0)}, os.fsdecode(os.fsencode(street.runs) + b"/" + name))
        Path(os.fsdecode(os.fsencode(street.runs) + b"/not_whole_" + name[:200] + b".pt")).write_bytes(b"PK\x03\x04")
        folder = Path(os.fsdecode(os.fsencode(street.runs) + b"/run_" + name[:200]))
        folder.mkdir()
        (folder / "model_step1.pt").write_bytes(b"\x00")


def depths(street: Street) -> None:
    path = street.runs
    for level in range(60):
        path = path / f"level{level}"
    path.mkdir(parents=True)
    torch.save({"w": torch.ones(2)}, path / "model_step130.pt")


# What each scene lays down, and which of it is whole for all that a look can tell: the evaluator gets those.
SCENES: dict[str, tuple[Callable[[Street], None], set[str]]] = {
    "pickles": (
        pickles,
        {"hostile_step10.pt", "hostile_step11.pt", "hostile_step12.pt", "last.ckpt", "latest.ckpt", "checkpoint-16", "global_step15"},
    ),
    "knots": (knots, {"last.ckpt", "spelled_small_step_22", "spelled_large_step_22"}),
    "tables": (tables, {"checkpoint-33", "checkpoint-34", "checkpoint-35"}),
    "safetensors": (safetensors, set()),
    "zips": (zips, {"bomb_step60.pt", "slip_step61.pt"}),
    "sparse files": (sparse_files, {"last.ckpt", "checkpoint-76", "checkpoint-77"}),
    "special files": (special_files, {"checkpoint-82", "global_step89", "checkpoint-90"}),
    "links": (links, {"global_step100"}),
    "names": (names, {os.fsdecode(name) for name in NAMES}),
    "depths": (depths, set()),
}
