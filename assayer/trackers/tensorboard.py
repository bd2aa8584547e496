"""TensorBoard: event files of our own, in the results folder (a run called ``<run>/evals``) or in the directory given.

Exactly one point each, whatever breaks off: a record is one event, an event is one length-prefixed block with two CRCs, and what a killed
publisher has left half of is no event. Before anything is written, our event files in that directory are read; a point whose step, moment
and names stand there is not written again, even where the ledger was lost. Values are float32, as everywhere in TensorBoard.

TensorBoard's Python reader never comes back to a file once it has seen a younger one (directory_watcher.py), so one file a results folder
is appended to, and the trainer's own event files should lie in a directory of their own; its default reader takes files in any order.
"""

import io
import os
import re
import struct
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from assayer.errors import StateError
from assayer.files import open_file, printable
from assayer.plan import host_name
from assayer.points import Curve, Point

__all__ = ["EXTRA", "NEEDS", "OPTIONS", "WORD", "publish", "settle"]

OPTIONS = {"logdir": "directory of the event files; {run} stands for the run's name; default: beside the records"}
WORD = "logdir"
EXTRA = "tensorboard"
NEEDS = ("tensorboard",)

_FLOAT32_MAX = 3.4028234663852886e38
# Of a block: the length of its data, the CRC of that length; then the data and its CRC.
_HEAD, _CRC = struct.Struct("<QI"), struct.Struct("<I")


def settle(options: Mapping[str, str], cwd: Path) -> dict[str, str]:
    """The directory made absolute."""
    given = options.get("logdir")
    return {"logdir": os.path.abspath(cwd / Path(given).expanduser())} if given else {}


def publish(points: Sequence[Point], options: Mapping[str, str], curve: Curve) -> list[str]:
    """Appends the points that our event files there do not hold."""
    folder = Path(options["logdir"].replace("{run}", curve.run)) if "logdir" in options else curve.results
    try:
        folder.mkdir(parents=True, exist_ok=True)
        present: dict[tuple[int, float], set[str]] = {}
        for step, wall, name in (mark for path in _own_files(folder) for mark in _marks(path)):
            present.setdefault((step, wall), set()).add(name)
        notes = []
        blocks = []
        for point in points:
            huge = {name for name, number in point.values.items() if abs(number) > _FLOAT32_MAX}
            notes += [f"{name} of step {point.step} is too large for TensorBoard" for name in sorted(huge)]
            missing = point.without(huge | present.get((point.step, point.wall), set()))
            if missing.values:
                blocks.append(_block(_event(missing)))
        if blocks:
            _append(folder, curve.uid[:8], b"".join(blocks))
    except OSError as error:
        raise StateError(f"cannot write {printable(str(error.filename or folder))}: {error.strerror}") from None
    return notes


def _own_files(folder: Path, uid: str = "") -> list[Path]:
    """Our event files in this folder, the youngest last."""
    return sorted(path for path in folder.iterdir() if re.fullmatch(rf"events\.out\.tfevents\.\d+\..*\.assayer-{uid}[0-9a-f]*", path.name))


def _append(folder: Path, uid: str, data: bytes) -> None:
    """Writes whole blocks at the end of the file of this uid; behind a half or damaged block nobody reads, so then a new one begins."""
    own = _own_files(folder, uid)
    if own and _whole_length(own[-1]) == own[-1].stat().st_size:
        path, flags = own[-1], os.O_APPEND
    else:
        # Younger by its name than every other, whatever this host's clock says.
        youngest = max((int(path.name.split(".")[3]) for path in own), default=0)
        name = f"events.out.tfevents.{max(int(time.time()), youngest + 1):010d}.{host_name()}.{os.getpid()}.assayer-{uid}"
        path, flags = folder / name, os.O_CREAT | os.O_EXCL
        data = _block(_version()) + data
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC | flags, 0o666)
    try:
        while data:
            data = data[os.write(descriptor, data) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _blocks(path: Path) -> Iterator[tuple[int, Any]]:
    """The event of each whole block, with the position of its end; ends before the first that is half or damaged.

    A CRC in Python takes a second for ten megabytes, so of the data only the last block's is checked: behind a half one nothing is written.
    """
    from google.protobuf.message import DecodeError
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        while len(head := file.read(_HEAD.size)) == _HEAD.size:
            length, crc = _HEAD.unpack(head)
            if crc != masked_crc32c(head[:8]):
                return
            data, tail = file.read(length), file.read(_CRC.size)
            if len(data) < length or len(tail) < _CRC.size:
                return
            if file.tell() == size and _CRC.unpack(tail)[0] != masked_crc32c(data):
                return
            try:
                event = Event.FromString(data)
            except DecodeError:
                return
            yield file.tell(), event


def _whole_length(path: Path) -> int:
    return max((end for end, _ in _blocks(path)), default=0)


def _marks(path: Path) -> Iterator[tuple[int, float, str]]:
    """Step, moment and name of every scalar in an event file."""
    for _, event in _blocks(path):
        for value in event.summary.value:
            yield event.step, event.wall_time, value.tag


def _event(point: Point) -> Any:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary

    values = [Summary.Value(tag=name, simple_value=float(number)) for name, number in point.values.items()]
    return Event(step=point.step, wall_time=point.wall, summary=Summary(value=values))


def _version() -> Any:
    from tensorboard.compat.proto.event_pb2 import Event

    return Event(wall_time=time.time(), file_version="brain.Event:2")


def _block(event: Any) -> bytes:
    from tensorboard.summary.writer.record_writer import RecordWriter

    block = io.BytesIO()
    RecordWriter(block).write(event.SerializeToString())
    return block.getvalue()
