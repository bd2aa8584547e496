"""``--reader torch``: torch's own loader in a child process of limited memory, for what is not read byte by byte.

Such are tensor subclasses (quantized ones are dequantized), and bytes that went through an extension such as compression. The child
loads the model's tensors, which takes their size in memory, and writes them as one safetensors file, from which the merge goes on. What
torch.load refuses without ``weights_only=False`` is refused here too: no pickle of a stranger's is run.
"""

import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

from assayer import formats
from assayer.checkpoint import Found
from assayer.errors import CheckpointError, UsageError
from assayer.files import printable
from assayer.formats import dcp

__all__ = ["read_with_torch"]

# Bytes of address space for torch itself, and for each byte of the checkpoint.
_BASE, _EACH = 16 << 30, 3


def read_with_torch(found: Found, folder: Path, variant: str) -> Found:
    """The model's tensors as one safetensors file in ``folder``, which is made.

    Raises:
        CheckpointError: torch cannot read it either, or not in so much memory.
        UsageError: its format is none that torch reads by itself.
    """
    listing = found.listing
    is_dcp = listing.is_directory and dcp.METADATA in listing.names
    if not is_dcp and listing.is_directory:
        raise UsageError(f"--reader torch reads distributed checkpoints and single files, not {printable(found.checkpoint.path)}")
    form = formats.of(found.checkpoint)
    size = sum(entry.size for entry in listing.entries if entry.name in set(form.weights(listing)))
    folder.mkdir()
    limit = _BASE + _EACH * size
    words = json.dumps(
        {"path": listing.path, "output": str(folder / "model.safetensors"), "variant": variant, "dcp": is_dcp, "limit": limit}
    )
    command = [sys.executable, "-m", "assayer.merge.torch_reader", words]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"ended with {done.returncode}"])[-1]
        raise CheckpointError(f"{printable(listing.path)}: torch's reader says: {printable(last)} (it may take {limit >> 20} MiB)")
    read = formats.identify_path(str(folder / "model.safetensors"))
    assert read is not None
    return read


def _load(path: str, variant: str, is_dcp: bool) -> dict[str, Any]:
    """The model's tensors by name, with torch."""
    import torch

    from assayer.containers import model_names

    if not is_dcp:
        tree = torch.load(path, map_location="cpu", weights_only=True)
        held = dict(_leaves(tree, ()))
        return {name: held[key] for key, name in model_names(held, variant).items()}
    from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    found = formats.identify_path(path)
    assert found is not None
    stored = dcp.read(found.listing, "")
    names = model_names([item.path for item in stored], variant)
    keys = {item.tensor.name: names[item.path] for item in stored if item.path in names}
    state: dict[str, Any] = {}
    _load_state_dict(state, storage_reader=FileSystemReader(path), planner=_EmptyStateDictLoadPlanner(keys=set(keys)), no_dist=True)
    held = dict(_leaves(state, ()))
    return {name: held[path] for path, name in names.items()}


def _leaves(tree: Any, above: tuple[str, ...]) -> list[tuple[tuple[str, ...], Any]]:
    import torch

    if isinstance(tree, torch.Tensor):
        return [(above, tree)]
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list | tuple) else ()
    return [leaf for key, value in inner for leaf in _leaves(value, (*above, str(key)))]


def _plain(name: str, tensor: Any) -> Any:
    """A tensor as safetensors holds one."""
    import torch

    if type(tensor) not in (torch.Tensor, torch.nn.Parameter) and hasattr(tensor, "dequantize"):
        tensor = tensor.dequantize()
    if tensor.is_quantized:
        tensor = tensor.dequantize()
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        raise CheckpointError(f"{name} is a {type(tensor).__name__}, which has no plain form")
    return tensor.detach().contiguous().clone()


def _main(words: str) -> None:
    given = json.loads(words)
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (given["limit"] if hard == resource.RLIM_INFINITY else min(given["limit"], hard), hard))
    from safetensors.torch import save_file

    found = _load(given["path"], given["variant"], given["dcp"])
    save_file({name: _plain(name, tensor) for name, tensor in found.items()}, given["output"], metadata={"format": "pt"})


if __name__ == "__main__":
    _main(sys.argv[1])
