"""What stands around the weights in a Hugging Face directory: config, generation config, tokenizer and processor files."""

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from assayer.checkpoint import Checkpoint
from assayer.content import read_table
from assayer.errors import AssayerError, CheckpointError, UnreadableError, UsageError
from assayer.files import printable, write_whole
from assayer.tensors import Dtype

__all__ = ["Companions", "companions", "is_tied"]

CONFIG = "config.json"
_GENERATION = "generation_config.json"
_TOKENIZER = re.compile(
    r"tokenizer.*\.(json|model|jinja)|special_tokens_map\.json|added_tokens\.json|vocab\.(json|txt)|merges\.txt|spiece\.model"
    r"|sentencepiece.*\.model|chat_template\.(jinja|json)|.*processor(_config)?\.json|.*preprocessor_config\.json"
)
_CODE = re.compile(r"(configuration|modeling|tokenization|processing|image_processing)_\w+\.py")
# Where trainers keep them below a checkpoint (verl) or beside it (a run's own directory).
_INSIDE = ("", "huggingface", "actor/huggingface")


class Companions:
    """The files to copy, by name, and the config as a table (None: there is none)."""

    def __init__(self, files: dict[str, Path], config: dict[str, Any] | None) -> None:
        self.files, self.config = files, config

    @property
    def nbytes(self) -> int:
        return sum(path.stat().st_size for path in self.files.values())

    def write(self, folder: Path, dtype: Dtype | None) -> None:
        """Copies the files; of a cast, the config tells the new dtype.

        Raises:
            OSError: one cannot be read or written.
        """
        for name, path in sorted(self.files.items()):
            if name != CONFIG:
                shutil.copyfile(path, folder / name)
                _flush(folder / name)
        if self.config is not None:
            config = dict(self.config)
            if dtype is not None:
                config = {"torch_dtype": dtype.torch} | config if not {"dtype", "torch_dtype"} & config.keys() else config
                config = _with_dtype(config, dtype.torch)
            write_whole(folder / CONFIG, (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode())


def companions(checkpoint: Checkpoint, hf_config: str | None, tokenizer: str | None, original: str | None = None) -> Companions:
    """What is found in the checkpoint or beside it, under what was given.

    Args:
        checkpoint: whose directory, then the run's own, is looked through.
        original: the checkpoint's own path, where that of ``checkpoint`` is a second name: beside it lies the run.
        hf_config: a directory, or a config file.
        tokenizer: a directory.

    Raises:
        UsageError: what was given is not there, or no config.
    """
    path, own = Path(checkpoint.path), Path(original or checkpoint.path)
    # What lies in a checkpoint may have come from anywhere: its links are followed no further than the run.
    roots = {os.path.realpath(path.parent), os.path.realpath(own.parent)}
    files: dict[str, Path] = {}
    for place in reversed(list(_places(path, own))):
        for name, found_path in _found(place).items():
            if any(Path(os.path.realpath(found_path)).is_relative_to(root) for root in roots):
                files[name] = found_path
    if hf_config is not None:
        given = Path(hf_config)
        if given.is_dir():
            files |= {name: path for name, path in _found(given).items() if tokenizer is None or not _TOKENIZER.fullmatch(name)}
            if not (given / CONFIG).is_file():
                raise UsageError(f"--hf_config {printable(hf_config)} holds no {CONFIG}; give a directory that does, or the file itself")
        elif given.is_file():
            files[CONFIG] = given
        else:
            raise UsageError(f"--hf_config {printable(hf_config)} is not there; give a {CONFIG}, or a directory that holds one")
    if tokenizer is not None:
        found = {name: path for name, path in _found(Path(tokenizer)).items() if _TOKENIZER.fullmatch(name)}
        if not found:
            raise UsageError(f"--tokenizer {printable(tokenizer)} is no directory with a tokenizer's files (tokenizer.json and the like)")
        files = {name: path for name, path in files.items() if not _TOKENIZER.fullmatch(name)} | found
    return Companions(files, _config(files.get(CONFIG), UsageError if hf_config is not None else UnreadableError))


def _places(path: Path, own: Path) -> Iterator[Path]:
    folder = path if path.is_dir() else own.parent
    for inside in _INSIDE:
        yield folder / inside
    if path.is_dir():
        yield own.parent


def _found(folder: Path) -> dict[str, Path]:
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return {}
    wanted = (CONFIG, _GENERATION)
    return {n: folder / n for n in names if (n in wanted or _TOKENIZER.fullmatch(n) or _CODE.fullmatch(n)) and (folder / n).is_file()}


def _config(path: Path | None, kind: type[AssayerError]) -> dict[str, Any] | None:
    if path is None:
        return None
    try:
        config = read_table(path)
    except OSError as error:
        raise kind(f"{printable(str(path))} is no config that can be read ({error.strerror})") from None
    except CheckpointError as error:
        raise kind(f"{printable(str(path))} is no config: it {error}") from None
    if config is None:
        raise kind(f"{printable(str(path))} is no config: it must hold a table in JSON")
    return config


def is_tied(config: dict[str, Any] | None) -> bool:
    """True when the config says that the output head is the input embedding."""
    if config is None:
        return False
    inner = config.get("text_config")
    return bool(config.get("tie_word_embeddings", inner.get("tie_word_embeddings") if isinstance(inner, dict) else False))


def _with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    changed = {key: dtype if key in ("dtype", "torch_dtype") and isinstance(value, str) else value for key, value in config.items()}
    return {
        key: _with_dtype(value, dtype) if isinstance(value, dict) and key.endswith("_config") else value for key, value in changed.items()
    }


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
