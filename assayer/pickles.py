"""What a pickle of torch's says, without running it: every class and function in it is replaced by an inert stand-in.

Two kinds of pickle are read: the ``.metadata`` of a distributed checkpoint, whose classes are a closed list, and the ``data.pkl`` of a
``torch.save`` archive, which names the tensors of a nested state dict. A name that is not known may stand for an object, which stays
inert; the moment a pickle asks for such a name to be called, it is refused. Sources: torch/distributed/checkpoint/metadata.py
(2.1 to 2.15), torch/_utils.py and torch/serialization.py (``_rebuild_*``, persistent ids), torch/distributed/tensor.
"""

import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, BinaryIO, ClassVar, TypeGuard

from assayer.errors import CheckpointError, RefusedError
from assayer.files import printable

__all__ = ["Inert", "Local", "Sharded", "Unsupported", "read_metadata", "read_objects", "read_tree", "text_of"]


# Arguments of a call, or dimensions of a shape, that are kept: each call copies them, and a call takes a few bytes of a pickle.
_ARGS_MAX = 64
# Names of classes that one pickle may refer to, the length of one that is shown, and the parts of a dictionary's key.
_NAMES_MAX, _NAME_MAX, _KEY_MAX = 10_000, 500, 200
# Bits of a number that is a dictionary's key.
_INT_BITS = 1024


class _Calls(type):
    """The class of stand-ins: what a pickle calls must be on the list."""

    known: bool
    given: str

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if not cls.known:
            raise RefusedError(f"refers to {printable(cls.given)}, which is not on the list of allowed names; nothing was run")
        return super().__call__(*args, **kwargs)


class Inert(metaclass=_Calls):
    """An object of a class that is not imported: ``args`` of its construction and ``state``, as the pickle gives them."""

    __slots__ = ("args", "items", "state")
    args: tuple[Any, ...]
    items: dict[Any, Any] | None
    state: Any
    known = True
    given = "object"

    def __new__(cls, *args: Any, **kwargs: Any) -> "Inert":
        made = super().__new__(cls)
        made.args, made.state, made.items = args[:_ARGS_MAX], None, None
        return made

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        if isinstance(key, str | int):
            self.items = {} if self.items is None else self.items
            self.items[key] = value

    def append(self, value: Any) -> None:
        """Lists and sets by another name keep nothing: no tensor that counts lies in one."""

    extend = append
    add = append

    def field(self, name: str, default: Any = None) -> Any:
        """One attribute of the object's state."""
        # A class with slots gives a pair: its dictionary, and its slots.
        state = self.state[1] if isinstance(self.state, tuple) and len(self.state) == 2 else self.state
        return state.get(name, default) if isinstance(state, dict) else default

    @property
    def class_name(self) -> str:
        """Module and name of the class that this object would be of."""
        return type(self).given


@dataclass(frozen=True, slots=True)
class Local:
    """A tensor in this archive: the key of its storage, its dtype as torch names it, and offset, size and stride in elements."""

    key: str
    dtype: str
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    stored: int


@dataclass(frozen=True, slots=True)
class Sharded:
    """One rank's share (None: none) of a tensor of ``shape``; ``spec`` is a DTensor's, or the metadata of a ShardedTensor's shard."""

    local: Local | None
    shape: tuple[int, ...]
    spec: Any


@dataclass(frozen=True, slots=True)
class Unsupported:
    """A tensor of a kind whose bytes are not simply its elements, such as a quantized or a sparse one."""

    kind: str


class _Mapping(dict[Any, Any]):
    """An OrderedDict; module state dicts carry an attribute (their versions), which is dropped."""

    def __init__(self, *args: Any) -> None:
        """Of Python 2 it has all its pairs at once; the list is used up, so that it is not copied again for a few bytes more."""
        super().__init__()
        pairs = args[0] if args else None
        if isinstance(pairs, list):
            for key, value in pairs:
                self[_checked_key(key)] = value
            pairs.clear()

    def __setstate__(self, state: Any) -> None:
        pass


class _Size(tuple[Any, ...]):
    """A shape."""

    def __new__(cls, *args: Any) -> "_Size":
        given = args[0] if args else ()
        if not isinstance(given, tuple | list) or len(given) > _ARGS_MAX:
            raise CheckpointError("has a pickle with a shape of impossible form")
        return super().__new__(cls, given)


class _List(list[Any]):
    """A list or a set by its name; what it is made of is left out."""

    def __init__(self, *args: Any) -> None:
        super().__init__()


def text_of(value: object) -> str:
    """A word as it is, and a number as text; of anything else only its type is told: to spell out what holds itself has no end."""
    return str(value) if isinstance(value, str | int | float) else type(value).__name__


def _checked_key(key: Any) -> Any:
    """A dictionary's key, if it is as plain as any honest one.

    To hash a tuple, Python hashes all that is in it, again for every place where it stands: one that holds another twice, forty deep, takes
    years, one that is a million deep ends the process.
    """
    todo, parts = [key], 0
    while todo:
        value = todo.pop()
        parts += 1
        if isinstance(value, tuple):
            todo += value[:_KEY_MAX]
            parts += max(0, len(value) - _KEY_MAX)
        is_plain = value is None or isinstance(value, str | bytes | float | tuple | Inert | type)
        if parts > _KEY_MAX or not (is_plain or (isinstance(value, int) and value.bit_length() <= _INT_BITS)):
            raise CheckpointError("has a pickle with a key of impossible form")
    return key


@lru_cache(maxsize=_NAMES_MAX)
def _inner(module: str, name: str) -> Any:
    return _stand_in(module[:_NAME_MAX], name[:_NAME_MAX], known=False)


# Names of classes whose construction means nothing to a reader of tensors.
_NEUTRAL = {
    ("torch", "Size"): _Size,
    ("torch", "device"): lambda *args: args,
    ("torch.serialization", "_get_layout"): lambda *args: "",
    ("collections", "OrderedDict"): _Mapping,
    ("collections", "defaultdict"): lambda *args: _Mapping(),
    ("collections", "Counter"): lambda *args: _Mapping(),
    ("builtins", "set"): _List,
    ("builtins", "frozenset"): _List,
    ("builtins", "dict"): _Mapping,
    ("builtins", "list"): _List,
    ("builtins", "slice"): lambda *args: args,
    ("builtins", "complex"): lambda *args: args,
    ("builtins", "bytearray"): lambda *args: b"",
    # How protocol 2 names a class inside a class: nothing is looked up.
    ("builtins", "getattr"): lambda owner, name: _inner(getattr(owner, "given", "?"), text_of(name)),
    ("_codecs", "encode"): lambda *args: b"",
    ("torch.serialization", "_maybe_decode_ascii"): lambda value: value if isinstance(value, str) else "",
}
_NEUTRAL |= {("__builtin__", name): made for (module, name), made in list(_NEUTRAL.items()) if module == "builtins"}

# Classes that may be constructed by a call; what they hold is kept inert.
_CALLABLE = {
    *(("pathlib", name) for name in ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath", "Path")),
    *(("pathlib._local", name) for name in ("PosixPath", "PurePosixPath")),
    *(("datetime", name) for name in ("datetime", "timedelta", "timezone", "date")),
    *(("numpy", name) for name in ("dtype", "ndarray")),
    *((f"numpy.{core}.multiarray", name) for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
    ("torch", "Generator"),
    ("uuid", "UUID"),
    ("copyreg", "_reconstructor"),
    ("copy_reg", "_reconstructor"),
    ("argparse", "Namespace"),
    ("deepspeed.runtime.zero.config", "ZeroStageEnum"),
    ("torch.distributed._shard.metadata", "ShardMetadata"),
    ("torch.distributed._shard.sharded_tensor.shard", "Shard"),
    ("torch.distributed._shard.sharded_tensor.metadata", "MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.hf_storage", "SerializationFormat"),
    ("torch.distributed.checkpoint._extension", "SerializationFormat"),
    ("torch.distributed.remote_device", "_remote_device"),
}

_DTYPES = frozenset(
    {
        *(f"float{n}" for n in (64, 32, 16)),
        "bfloat16",
        *(f"float8_{kind}" for kind in ("e4m3fn", "e5m2", "e4m3fnuz", "e5m2fnuz", "e8m0fnu")),
        *(f"{sign}int{n}" for sign in ("", "u") for n in (64, 32, 16, 8)),
        "bool",
        *(f"complex{n}" for n in (32, 64, 128)),
        "float4_e2m1fn_x2",
        *("quint8", "qint8", "qint32", "quint4x2", "quint2x4"),
    }
)
_STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
    "QUInt8Storage": "quint8",
    "QInt8Storage": "qint8",
    "QInt32Storage": "qint32",
    "UntypedStorage": "uint8",
}

# Every class that a `.metadata` may hold, by its last name; OLMo-core and Megatron-Core write classes of their own.
_METADATA = {
    "Metadata": ("torch.distributed.checkpoint.metadata",),
    "TensorStorageMetadata": ("torch.distributed.checkpoint.metadata",),
    "BytesStorageMetadata": ("torch.distributed.checkpoint.metadata",),
    "ChunkStorageMetadata": ("torch.distributed.checkpoint.metadata",),
    "TensorProperties": ("torch.distributed.checkpoint.metadata", "torch.distributed._shard.sharded_tensor.metadata"),
    "_MEM_FORMAT_ENCODING": ("torch.distributed.checkpoint.metadata",),
    "MEM_FORMAT_ENCODING": ("torch.distributed._shard.sharded_tensor.metadata",),
    "MetadataIndex": ("torch.distributed.checkpoint.metadata",),
    "StorageMeta": ("torch.distributed.checkpoint.metadata",),
    "_StorageInfo": ("torch.distributed.checkpoint.filesystem", "olmo_core.distributed.checkpoint.filesystem"),
    # Megatron-Core leaves its plans in the metadata.
    **dict.fromkeys(
        ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData"), ("torch.distributed.checkpoint.planner",)
    ),
    **dict.fromkeys(("MCoreMetadata", "MCoreSavePlan"), ("megatron.core.dist_checkpointing.strategies.torch",)),
    "PosixPath": ("pathlib", "pathlib._local"),
    "_get_layout": ("torch.serialization",),
    "Size": ("torch",),
    "OrderedDict": ("collections",),
    # Python 3.11.0 to 3.11.3 pickle an enum's member so; what it would look up stays inert.
    "getattr": ("builtins", "__builtin__"),
}


def _stand_in(module: str, name: str, known: bool) -> _Calls:
    return _Calls(name, (Inert,), {"known": known, "given": f"{module}.{name}", "__slots__": ()})


class _MetadataReader(pickle.Unpickler):
    """The closed list; implemented in C, so only to be used where memory is bounded from outside (a memo index can ask for gigabytes)."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file)
        self._made: dict[tuple[str, str], Any] = {}

    def find_class(self, module: str, name: str) -> Any:
        return _metadata_class(self._made, module, name)


def _metadata_class(made: dict[tuple[str, str], Any], module: str, name: str) -> Any:
    if module == "torch" and name in _DTYPES:
        return name
    if module not in _METADATA.get(name, ()):
        raise RefusedError(f"refers to {printable(f'{module}.{name}')}, which is not on the list of allowed names; nothing was run")
    if (module, name) not in made:
        made[module, name] = _NEUTRAL.get((module, name)) or _stand_in(module, name, known=True)
    return made[module, name]


_PYTHONS: dict[int, Any] = dict(pickle._Unpickler.dispatch)


class _PlainReader(pickle._Unpickler):
    """Implemented in Python: takes memory in proportion to its input whatever the input says."""

    # What Python's own reader keeps, of which its types tell nothing.
    stack: list[Any]
    append: Callable[[Any], None]
    pop_mark: Callable[[], list[Any]]

    dispatch: ClassVar[dict[int, Any]] = {
        code: function
        for code, function in _PYTHONS.items()
        # A length alone makes this one allocate; torch never writes it. Extension codes name functions of this process.
        if code not in (pickle.BYTEARRAY8[0], pickle.EXT1[0], pickle.EXT2[0], pickle.EXT4[0])
    }

    def __init__(self, file: "BinaryIO | _Bounded") -> None:
        super().__init__(file, encoding="utf-8", errors="surrogateescape")
        self.made: dict[tuple[str, str], Any] = {}

    def load_reduce(self) -> None:
        self._check_arguments()
        _PYTHONS[pickle.REDUCE[0]](self)

    def load_newobj(self) -> None:
        self._check_arguments()
        _PYTHONS[pickle.NEWOBJ[0]](self)

    def load_newobj_ex(self) -> None:
        """Keywords are left out."""
        self.stack.pop()
        self.load_newobj()

    def _check_arguments(self) -> None:
        """Each call copies its arguments, and one tuple may stand in any number of calls."""
        if len(self.stack[-1]) > _ARGS_MAX:
            raise CheckpointError("has a pickle with a call of impossible form")

    def load_setitem(self) -> None:
        _checked_key(self.stack[-2])
        _PYTHONS[pickle.SETITEM[0]](self)

    def load_setitems(self) -> None:
        for key in self.stack[::2]:
            _checked_key(key)
        _PYTHONS[pickle.SETITEMS[0]](self)

    def load_dict(self) -> None:
        for key in self.stack[::2]:
            _checked_key(key)
        _PYTHONS[pickle.DICT[0]](self)

    def load_frozenset(self) -> None:
        """Nothing that counts lies in a set."""
        self.pop_mark()
        self.append(frozenset())

    def load_additems(self) -> None:
        self.pop_mark()

    def load_build(self) -> None:
        """Only what is made here takes a state: another one's would go around the checks of its making."""
        state = self.stack.pop()
        if isinstance(self.stack[-1], Inert | _Mapping):
            self.stack[-1].__setstate__(state)

    dispatch[pickle.REDUCE[0]] = load_reduce
    dispatch[pickle.NEWOBJ[0]] = load_newobj
    dispatch[pickle.NEWOBJ_EX[0]] = load_newobj_ex
    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.SETITEMS[0]] = load_setitems
    dispatch[pickle.DICT[0]] = load_dict
    dispatch[pickle.FROZENSET[0]] = load_frozenset
    dispatch[pickle.ADDITEMS[0]] = load_additems
    dispatch[pickle.BUILD[0]] = load_build


class _PlainMetadataReader(_PlainReader):
    def find_class(self, module: str, name: str) -> Any:
        return _metadata_class(self.made, module, name)


class _TreeReader(_PlainReader):
    def find_class(self, module: str, name: str) -> Any:
        key = (module, name)
        if module == "torch" and name in _DTYPES:
            return name
        if name in _STORAGES and module in ("torch", "torch.storage", "torch.cuda"):
            return _STORAGES[name]
        if key not in self.made:
            if len(self.made) >= _NAMES_MAX:
                raise CheckpointError("has a pickle that refers to more classes than any honest one")
            self.made[key] = _REBUILD.get(key) or _NEUTRAL.get(key) or _stand_in(module, name, known=key in _CALLABLE)
        return self.made[key]

    def persistent_load(self, saved: Any) -> tuple[str, str, int]:
        """The storage's dtype, key and number of elements; of ("storage", type, key, location, number, ...)."""
        if not (isinstance(saved, tuple) and len(saved) >= 5 and saved[0] == "storage"):
            raise CheckpointError("has a pickle with a reference that is none of torch's")
        if not (isinstance(saved[1], str) and isinstance(saved[4], int)):
            raise CheckpointError("has a pickle with a storage that is none of torch's")
        return saved[1], text_of(saved[2]), saved[4]


def _rebuild_tensor(storage: tuple[str, str, int], offset: int, size: Any, stride: Any, *rest: Any) -> Local:
    dtype, key, stored = storage
    return _local(key, dtype, offset, size, stride, stored)


def _rebuild_untyped(
    storage: tuple[str, str, int], offset: int, size: Any, stride: Any, grad: Any, hooks: Any, dtype: str, *rest: Any
) -> Local:
    _, key, stored = storage
    return _local(key, dtype, offset, size, stride, stored)


def _local(key: str, dtype: object, offset: object, size: Any, stride: Any, stored: int) -> Local:
    if len(size) > _ARGS_MAX or len(stride) > _ARGS_MAX:
        raise CheckpointError("has a pickle with a tensor of impossible form")
    numbers = (offset, *size, *stride)
    if not isinstance(dtype, str) or any(not isinstance(n, int) or n < 0 for n in numbers) or len(size) != len(stride):
        raise CheckpointError("has a pickle with a tensor of impossible form")
    assert isinstance(offset, int)
    return Local(key, dtype, offset, tuple(size), tuple(stride), stored)


def _is_shape(value: Any) -> TypeGuard[tuple[int, ...]]:
    return isinstance(value, tuple | list) and len(value) <= _ARGS_MAX and all(isinstance(n, int) and n >= 0 for n in value)


def _rebuild_parameter(data: Any, *rest: Any) -> Any:
    return data


def _rebuild_from_type(function: Any, kind: Any, args: Any, state: Any) -> Any:
    name = getattr(kind, "given", "")
    if name.rpartition(".")[2] == "DTensor" and name.startswith("torch.distributed"):
        parts = state[1] if isinstance(state, tuple) else state
        local, spec = parts.get("_local_tensor"), parts.get("_spec")
        meta = spec.field("tensor_meta")
        shape = meta.args[0] if isinstance(meta, Inert) and meta.args else meta.field("shape") if isinstance(meta, Inert) else None
        if not isinstance(local, Local) or not _is_shape(shape):
            return Unsupported(f"DTensor of {getattr(local, 'kind', 'an unknown tensor')}")
        return Sharded(local, tuple(shape), spec)
    if name == "torch.distributed._shard.sharded_tensor.api.ShardedTensor":
        return _rebuild_sharded_tensor(state)
    if name in ("torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer", "torch.Tensor", "torch._tensor.Tensor"):
        return function(*args) if callable(function) and len(args) <= _ARGS_MAX else Unsupported(name)
    return Unsupported(name or "a tensor subclass")


def _rebuild_sharded_tensor(state: Any) -> "Sharded | Unsupported":
    """What FSDP1 gives: a list of this rank's shards, and the metadata of all."""
    shards, metadata = state[0], state[1]
    size = metadata.field("size")
    if not isinstance(size, tuple) or not _is_shape(size) or len(shards) > 1:
        return Unsupported("a ShardedTensor of several shards a rank")
    if not shards:
        return Sharded(None, size, None)
    local, told = shards[0].field("tensor"), shards[0].field("metadata")
    return Sharded(local, size, told) if isinstance(local, Local) else Unsupported("a ShardedTensor of an unknown kind")


def _unsupported(kind: str) -> Callable[..., Unsupported]:
    return lambda *args: Unsupported(kind)


_REBUILD: dict[tuple[str, str], Any] = {
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_untyped,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _rebuild_parameter,
    ("torch._tensor", "_rebuild_from_type_v2"): _rebuild_from_type,
    ("torch._utils", "_rebuild_wrapper_subclass"): _unsupported("a wrapper subclass"),
    ("torch._utils", "_rebuild_sparse_tensor"): _unsupported("a sparse tensor"),
    ("torch._utils", "_rebuild_nested_tensor"): _unsupported("a nested tensor"),
    ("torch._utils", "_rebuild_qtensor"): _unsupported("a quantized tensor"),
    ("torch._utils", "_rebuild_meta_tensor_no_storage"): _unsupported("a tensor on the meta device"),
    ("torch._utils", "_rebuild_device_tensor_from_numpy"): _unsupported("a tensor held by numpy"),
    ("torch._utils", "_rebuild_device_tensor_from_cpu_tensor"): _rebuild_parameter,
}


class _Bounded:
    """A file of which no more than ``limit`` bytes are read, whatever lengths it tells."""

    def __init__(self, file: BinaryIO, limit: int) -> None:
        self._file, self._limit, self._left = file, limit, limit

    def read(self, length: int = -1) -> bytes:
        return self._taken(self._file.read(self._left + 1 if length < 0 else min(length, self._left + 1)))

    def readline(self) -> bytes:
        return self._taken(self._file.readline(self._left + 1))

    def _taken(self, data: bytes) -> bytes:
        self._left -= len(data)
        if self._left < 0:
            raise RefusedError(f"describes its tensors in more than {self._limit} bytes")
        return data


def read_tree(data: bytes) -> Any:
    """The nested state dict of a ``data.pkl``: its tensors as ``Local``, ``Sharded`` or ``Unsupported``, other objects inert.

    Raises:
        CheckpointError: it is no pickle, or asks for a call of a name that is not on the list.
    """
    return _load(_TreeReader(io.BytesIO(data)))


def read_objects(file: BinaryIO, limit: int, count: int) -> list[Any]:
    """The next ``count`` pickles of an open file, each of at most ``limit`` bytes, as torch wrote them before 1.6.

    The file then stands behind them.

    Raises:
        CheckpointError: one is no pickle, larger, or asks for a call of a name that is not on the list.
    """
    return [_load(_TreeReader(_Bounded(file, limit))) for _ in range(count)]


def read_metadata(data: bytes, bounded: bool = False) -> Inert:
    """The ``Metadata`` of a distributed checkpoint, with every class inert.

    Args:
        data: the pickle.
        bounded: memory is limited from outside, so that the faster reader may be used.

    Raises:
        CheckpointError: it is no such pickle, or refers to a name that is not on the list.
    """
    found = _load((_MetadataReader if bounded else _PlainMetadataReader)(io.BytesIO(data)))
    if not isinstance(found, Inert) or type(found).__name__ not in ("Metadata", "MCoreMetadata"):
        raise CheckpointError("is no metadata of a distributed checkpoint")
    return found


def _load(reader: Any) -> Any:
    try:
        return reader.load()
    except (CheckpointError, MemoryError):
        raise
    except Exception as error:
        # A damaged pickle can raise anything that Python can.
        raise CheckpointError(f"holds a damaged pickle ({type(error).__name__})") from None
