"""What a pickle says is read, and nothing of it is run."""

import pickle
import struct
from typing import Any

import pytest
from torch.distributed.checkpoint import metadata

from assayer.errors import CheckpointError, RefusedError
from assayer.pickles import read_metadata, read_tree
from assayer.sealed import sealed


class Member:
    """An enum's member, as Python 3.11.0 to 3.11.3 pickle it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (metadata._MEM_FORMAT_ENCODING, "TORCH_CONTIGUOUS_FORMAT")


@pytest.mark.parametrize("bounded", [False, True])
def test_an_enum_of_any_python_is_read_as_nothing(bounded: bool) -> None:
    written = metadata.Metadata(state_dict_metadata={}, planner_data=Member(), storage_data={})
    found = read_metadata(pickle.dumps(written), bounded)
    assert found.field("state_dict_metadata") == {}
    assert not hasattr(found.field("planner_data"), "value")


def test_what_would_be_looked_up_is_never_called() -> None:
    with pytest.raises(RefusedError, match=r"posix\.system, which is not on the list"):
        read_metadata(b"cbuiltins\ngetattr\n(cposix\nsystem\nS'x'\ntR.")
    with pytest.raises(RefusedError, match=r"posix\.system\.x, which is not on the list"):
        read_tree(b"cbuiltins\ngetattr\n(cposix\nsystem\nS'x'\ntR(S'y'\ntR.")


START = b"\x80\x02"
# A tuple that holds one tuple twice, sixty deep; and one in one, two hundred thousand deep.
TWICE = b")" + b"".join(b"q%ch%c\x86" % (i, i) for i in range(60))
DEEP = b")" + b"\x85" * 200_000
LONG = b"(" + b"N" * 100_000
# Calls the function behind it with what lies in the memo, again and again.
CALLS = b"hdhc\x85R" * 20_000 + b"t."

KNOTS = {
    "a key that holds itself twice": START + b"}" + TWICE + b"Ns.",
    "such a key among several": START + b"}(" + TWICE + b"Nu.",
    "such a key in a finished dictionary": START + b"(" + TWICE + b"Nd.",
    "such a member of a set": b"\x80\x04(" + TWICE + b"\x91.",
    "such a pair of an ordered dictionary": START + b"ccollections\nOrderedDict\n](]" + TWICE + b"aNae\x85R.",
    "a key too deep for the stack": START + b"}" + DEEP + b"Ns.",
    "a key that is a number of megabytes": START + b"}\x8b" + struct.pack("<I", 1 << 20) + b"\x11" * (1 << 20) + b"Ns.",
    "text of it": START + b"ctorch.serialization\n_get_layout\n" + TWICE + b"\x85R.",
    "its name": START + b"cbuiltins\ngetattr\ncx\ny\n" + TWICE + b"\x86R.",
    "a long shape again and again": START + LONG + b"tqc0ctorch\nSize\nqd0(" + CALLS,
    "a long list as a set again and again": START + b"]qc" + LONG + b"e0cbuiltins\nset\nqd0(" + CALLS,
    "long text as bytes again and again": START + b"X" + struct.pack("<I", 100_000) + b"x" * 100_000 + b"qc0c_codecs\nencode\nqd0(" + CALLS,
    "a long call again and again": START + LONG + b"tqc0cuuid\nUUID\nqd0(" + b"hdhcR" * 20_000 + b"t.",
    "pairs again and again": START + b"]qc(" + b"K\x01K\x02\x86" * 20_000 + b"e0ccollections\nOrderedDict\nqd0(" + CALLS,
    "a class for every few bytes": START + b"(" + b"".join(b"ca\n%x\n" % i for i in range(50_000)) + b"t.",
    "a name that grows": START + b"cbuiltins\ngetattr\nqc0cx\ny\nqd" + b"0hchdU\x05abcde\x86Rqd" * 20_000 + b".",
    "a storage by such a name": START + b"(U\x07storagectorch\nFloatStorage\n" + TWICE + b"U\x03cpuK\x04tQ.",
}


def kind_of(data: bytes) -> str:
    try:
        return type(read_tree(data)).__name__
    except CheckpointError as error:
        return str(error)


@pytest.mark.parametrize("knot", KNOTS)
def test_what_holds_itself_takes_no_years_and_no_memory(knot: str) -> None:
    """In a process that may take 128 MiB more than it has, and 30 s: each of these took gigabytes, years, or the process."""
    (kind,) = sealed(lambda: iter([[kind_of(KNOTS[knot])]]), 128 << 20, 30)
    assert kind[0]


def test_what_is_made_while_reading_takes_no_state_from_the_pickle() -> None:
    """A function of ours would keep it for the next file, and a tensor go around what was checked when it was made."""
    read_tree(START + b"ctorch._utils\n_rebuild_tensor_v2\n}U\x01aK\x01sb.")
    read_tree(START + b"ctorch._utils\n_rebuild_tensor_v2\nN}U\x0c__defaults__K\x01\x85s\x86b.")
    from assayer.pickles import _rebuild_tensor

    assert (_rebuild_tensor.__dict__, _rebuild_tensor.__defaults__) == ({}, None)
