"""What a pickle says is read, and nothing of it is run."""

import pickle
from typing import Any

import pytest
from torch.distributed.checkpoint import metadata

from assayer.errors import RefusedError
from assayer.pickles import read_metadata, read_tree


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
