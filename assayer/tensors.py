"""The nouns of a merge: a tensor by name, dtype and shape, and the pieces of it that lie in files."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod

from assayer.archive import Record, read_bytes, read_checked, records_of
from assayer.errors import CheckpointError
from assayer.files import printable
from assayer.pickles import Local, read_tree

__all__ = ["DTYPES", "Dtype", "Piece", "Tensor", "cover", "dtype_of", "is_contiguous", "open_piece", "piece_of"]


@dataclass(frozen=True, slots=True)
class Dtype:
    """A dtype: its name in torch and in safetensors, bytes of one element, and whether it is a (real) floating-point type."""

    torch: str
    safetensors: str
    size: int
    floating: bool


# The names of safetensors (its Dtype enum, 0.8) for torch's.
_TABLE = (
    *(Dtype(f"float{8 * n}", f"F{8 * n}", n, True) for n in (8, 4, 2)),
    Dtype("bfloat16", "BF16", 2, True),
    Dtype("float8_e4m3fn", "F8_E4M3", 1, True),
    Dtype("float8_e5m2", "F8_E5M2", 1, True),
    Dtype("float8_e4m3fnuz", "F8_E4M3FNUZ", 1, True),
    Dtype("float8_e5m2fnuz", "F8_E5M2FNUZ", 1, True),
    Dtype("float8_e8m0fnu", "F8_E8M0", 1, True),
    *(Dtype(f"int{8 * n}", f"I{8 * n}", n, False) for n in (8, 4, 2, 1)),
    *(Dtype(f"uint{8 * n}", f"U{8 * n}", n, False) for n in (8, 4, 2, 1)),
    Dtype("bool", "BOOL", 1, False),
    Dtype("complex64", "C64", 8, False),
)
DTYPES = {dtype.torch: dtype for dtype in _TABLE}


def dtype_of(name: str, tensor: str) -> Dtype:
    """The dtype that torch calls ``name``.

    Raises:
        CheckpointError: safetensors has no such dtype.
    """
    if name not in DTYPES:
        raise CheckpointError(f"the tensor {printable(tensor)} is of dtype {printable(name)}, which safetensors cannot hold")
    return DTYPES[name]


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of a tensor, from ``begin`` on and ``sizes`` long, as it lies in a file of the checkpoint.

    ``start`` is the byte of its first element; ``stride`` counts elements (None: contiguous); ``record`` is the record of the archive that
    holds it. A piece with ``archive`` (bytes) is a ``torch.save`` archive of that length at ``start``: ``open_piece`` says what lies in it.
    """

    file: str
    begin: tuple[int, ...]
    sizes: tuple[int, ...]
    start: int
    archive: int = 0
    stride: tuple[int, ...] | None = None
    record: Record | None = None

    @property
    def numel(self) -> int:
        return prod(self.sizes)


@dataclass(slots=True)
class Tensor:
    """One tensor of a checkpoint. With ``flat``, its pieces are ranges of its elements in a row, whatever its shape."""

    name: str
    dtype: Dtype
    shape: tuple[int, ...]
    pieces: Sequence[Piece] = field(default_factory=list)
    flat: bool = False

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.size

    @property
    def space(self) -> tuple[int, ...]:
        """The shape in which its pieces are boxes."""
        return (self.numel,) if self.flat else self.shape


def is_contiguous(sizes: Sequence[int], stride: Sequence[int]) -> bool:
    """True when elements of these sizes and strides lie in a row, the last dimension innermost."""
    expected = 1
    for size, step in zip(reversed(sizes), reversed(stride), strict=True):
        if size == 0:
            return True
        if size != 1 and step != expected:
            return False
        expected *= size
    return True


def cover(tensor: Tensor) -> None:
    """Checks that the pieces make up the tensor exactly; those that another one repeats, and empty ones, are dropped.

    Raises:
        CheckpointError: a piece lies outside, two overlap, or some part is missing.
    """
    space = tensor.space
    unique: dict[tuple[tuple[int, ...], tuple[int, ...]], Piece] = {}
    for piece in tensor.pieces:
        if len(piece.begin) != len(space) or len(piece.sizes) != len(space):
            raise CheckpointError(f"the tensor {printable(tensor.name)} has a piece of another number of dimensions")
        if any(b < 0 or s < 0 or b + s > n for b, s, n in zip(piece.begin, piece.sizes, space, strict=True)):
            raise CheckpointError(
                f"the tensor {printable(tensor.name)} of shape {list(space)} has a piece outside of it, "
                f"at {list(piece.begin)}, {list(piece.sizes)}"
            )
        if 0 not in piece.sizes:
            unique.setdefault((piece.begin, piece.sizes), piece)
    pieces = sorted(unique.values(), key=lambda p: p.begin)
    held = sum(p.numel for p in pieces)
    if len(pieces) > 1:
        _refuse_overlap(tensor, pieces)
    if held != tensor.numel:
        raise CheckpointError(
            f"the tensor {printable(tensor.name)} of shape {list(tensor.shape)} has pieces for {held} of its {tensor.numel} elements"
        )
    tensor.pieces = pieces


def _refuse_overlap(tensor: Tensor, pieces: list[Piece]) -> None:
    """Sweeps along the dimension that is cut most often, so that few pieces stand side by side."""
    dim = max(range(len(tensor.space)), key=lambda d: len({p.begin[d] for p in pieces}))
    beside: list[Piece] = []
    for piece in sorted(pieces, key=lambda p: p.begin[dim]):
        beside = [p for p in beside if p.begin[dim] + p.sizes[dim] > piece.begin[dim]]
        for other in beside:
            if all(a < b + n and b < a + m for a, m, b, n in zip(piece.begin, piece.sizes, other.begin, other.sizes, strict=True)):
                raise CheckpointError(
                    f"the tensor {printable(tensor.name)} has pieces that overlap, at {list(other.begin)} in {printable(other.file)} "
                    f"and at {list(piece.begin)} in {printable(piece.file)}"
                )
        beside.append(piece)


def piece_of(file: str, local: Local, records: dict[str, Record], begin: tuple[int, ...], sizes: tuple[int, ...], dtype: Dtype) -> Piece:
    """The piece that a tensor of an archive is.

    Raises:
        CheckpointError: its storage is not in the archive, or too short for it.
    """
    record = records.get(f"data/{local.key}")
    if record is None:
        raise CheckpointError(f"{printable(file)} has no record data/{printable(local.key)}")
    last = local.offset + sum((n - 1) * step for n, step in zip(local.size, local.stride, strict=True)) + 1 if prod(local.size) else 0
    if last * dtype.size > record.length:
        raise CheckpointError(
            f"{printable(file)} holds {record.length} bytes in data/{printable(local.key)}, its tensor needs {last * dtype.size}"
        )
    stride = None if is_contiguous(local.size, local.stride) else local.stride
    return Piece(file, begin, sizes, record.start + local.offset * dtype.size, stride=stride, record=record)


_KNOWN: dict[bytes, Local] = {}
_RECORDS = ("data.pkl", "byteorder")
# Bytes of a description of one tensor; torch's are under 300.
_DESCRIPTION_MAX = 1 << 16


def open_piece(piece: Piece, dtype: Dtype, descriptor: int) -> Piece:
    """A piece that is an archive of one tensor, as what lies in it; any other piece as it is.

    Raises:
        CheckpointError: the archive is damaged, or holds another tensor than the metadata says.
    """
    if not piece.archive:
        return piece
    records = records_of(descriptor, piece.start, piece.archive)
    description = records.get("data.pkl")
    if description is None or description.length > _DESCRIPTION_MAX:
        raise CheckpointError("holds no description of a tensor")
    order = records.get("byteorder")
    if order and read_bytes(descriptor, min(order.length, 16), order.start) != b"little":
        raise CheckpointError("is in another byte order than little-endian; --reader torch reads it")
    text = read_checked(descriptor, description, "the description of its tensor")
    local = _KNOWN.get(text)
    if local is None:
        local = read_tree(text)
        if not isinstance(local, Local):
            kind = getattr(local, "kind", type(local).__name__)
            raise CheckpointError(f"holds a tensor of a kind that is not merged ({printable(kind)}); --reader torch reads it")
        if len(_KNOWN) > 10_000:
            _KNOWN.clear()
        _KNOWN[text] = local
    if local.size != piece.sizes or local.dtype != dtype.torch:
        raise CheckpointError(f"holds a tensor {local.dtype} {list(local.size)}, its metadata says {dtype.torch} {list(piece.sizes)}")
    return piece_of(piece.file, local, records, piece.begin, piece.sizes, dtype)
