"""torch's distributed checkpoint as safetensors shards (``HuggingFaceStorageWriter(save_distributed=True)``), not yet consolidated.

``shard-<rank>-model-<i>-of-<n>.safetensors``, one a rank and output file; each header tells where its parts begin, and nothing tells
the whole shape or the number of ranks (torch/distributed/checkpoint/hf_storage.py): hence a quiet period. torchtitan keeps them in
``sharded/`` beside the consolidated files, which ``hf_dir`` knows.
"""

import json
import re
from typing import Any

from assayer.checkpoint import Listing, Position, first_absent, first_incomplete
from assayer.errors import CheckpointError
from assayer.files import printable
from assayer.formats import dcp
from assayer.safetensors_file import Span, read_header
from assayer.tensors import Piece, Tensor, cover

REFINES: tuple[str, ...] = ()
FOLDERS = "sharded"
RESUMING = ""
SHARDED = True

_SHARD = re.compile(r"(?:sharded/)?shard-(\d+)-model-\d+-of-\d+\.safetensors")


def claims(listing: Listing) -> bool:
    return listing.is_directory and any(_SHARD.fullmatch(name) for name in listing.names)


def missing(listing: Listing) -> str | None:
    absent = first_absent(int(found[1]) - 1 for name in listing.names if (found := _SHARD.fullmatch(name)))
    if absent is not None:
        return f"no shard-{absent + 1:05d}-model-*.safetensors yet"
    return first_incomplete(listing, weights(listing))


def unmarked(listing: Listing) -> str | None:
    return "nothing tells how many ranks there are"


def position(listing: Listing) -> Position:
    return dcp.position(listing)


def weights(listing: Listing) -> tuple[str, ...]:
    return tuple(sorted(name for name in listing.names if _SHARD.fullmatch(name)))


def variants(listing: Listing) -> tuple[str, ...]:
    return ("regular",)


def tensors(listing: Listing, variant: str) -> list[Tensor]:
    found: dict[str, list[tuple[Piece, Span]]] = {}
    for name in weights(listing):
        spans, free = read_header(listing.file(name))
        offsets = _offsets(free, name)
        for key, span in spans.items():
            begin = offsets.get(key, [0] * len(span.shape))
            if len(begin) != len(span.shape) or any(not isinstance(n, int) or n < 0 for n in begin):
                raise CheckpointError(f"{printable(name)} has impossible offsets for {printable(key)}")
            found.setdefault(key, []).append((Piece(name, tuple(begin), span.shape, span.start), span))
    made = []
    for key, parts in found.items():
        ends = [[b + n for b, n in zip(piece.begin, piece.sizes, strict=True)] for piece, _ in parts]
        if len({(span.dtype, len(span.shape)) for _, span in parts}) > 1:
            raise CheckpointError(f"the shards hold {printable(key)} in different dtypes or numbers of dimensions")
        tensor = Tensor(key, parts[0][1].dtype, tuple(map(max, zip(*ends, strict=True))), [piece for piece, _ in parts])
        cover(tensor)
        made.append(tensor)
    return made


def _offsets(free: dict[str, Any], name: str) -> dict[str, list[int]]:
    try:
        table = json.loads(free.get("DCP_SHARDING_INFO", "{}"))
        return {key: list(value["saved_offsets"]) for key, value in table.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(f"{printable(name)} has a damaged DCP_SHARDING_INFO") from None
