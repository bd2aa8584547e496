"""Checkpoints as trainers write them, each with the full tensors that it holds.

``write_gloo`` runs the trainers' own savers in two or four CPU processes; ``write_single`` needs one process. Both import torch,
transformers and accelerate in a process of their own, once a call.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

__all__ = ["Sample", "load_expected", "write_gloo", "write_single"]

SAMPLES = "samples.json"

_SECONDS = 110


@dataclass(frozen=True)
class Sample:
    """One checkpoint and what is to be found in it.

    ``expected`` holds every tensor of the model, whole: under Hugging Face's names where the layout has them, else under the trainer's own,
    always without the container's prefix (``model.``, ``state_dict.``), a LightningModule's attribute and wrappers. ``expected_ema`` holds
    the same of the average, ``expected_hf`` the same model as Hugging Face names and orders it, where ``expected`` is under other names.
    Step, epoch and tokens are what names and JSON files tell. ``real`` is False for a layout that was put together here, by its trainer's
    source, because the trainer itself is not installed.
    """

    name: str
    path: Path
    expected: Path
    format: str
    step: int | None = None
    epoch: float | None = None
    tokens: int | None = None
    expected_ema: Path | None = None
    expected_hf: Path | None = None
    real: bool = True


def load_expected(sample: Sample, *, ema: bool = False) -> dict[str, torch.Tensor]:
    """The full tensors of a sample, by name."""
    path = sample.expected_ema if ema else sample.expected
    if path is None:
        raise ValueError(f"{sample.name} has no EMA")
    return load_file(path)


def write_gloo(root: Path, world_size: int) -> list[Sample]:
    """Write every sharded sample below ``root`` with ``world_size`` (2 or 4) ranks."""
    return _write("trainers.gloo", root, str(world_size))


def write_single(root: Path) -> list[Sample]:
    """Write every sample that needs one process alone below ``root``."""
    return _write("trainers.single", root)


def save_expected(root: Path, name: str, tensors: dict[str, torch.Tensor]) -> Path:
    """Write what a sample is expected to hold; returns the file."""
    path = root / "expected" / f"{name}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: value.detach().clone(memory_format=torch.contiguous_format) for key, value in tensors.items()}, path)
    return path


def save_samples(root: Path, samples: list[Sample]) -> None:
    """Write the list of samples, for the process that asked for them."""
    rows = [{key: str(value) if isinstance(value, Path) else value for key, value in asdict(sample).items()} for sample in samples]
    (root / SAMPLES).write_text(json.dumps(rows, indent=1))


def load_samples(root: Path) -> list[Sample]:
    """Read what ``save_samples`` wrote."""
    samples = []
    for row in json.loads((root / SAMPLES).read_text()):
        for key in ("path", "expected", "expected_ema", "expected_hf"):
            row[key] = row[key] and Path(row[key])
        samples.append(Sample(**row))
    return samples


def _write(module: str, root: Path, *words: str) -> list[Sample]:
    root.mkdir(parents=True, exist_ok=True)
    settings = {"PYTHONPATH": str(Path(__file__).parent.parent), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-m", module, str(root), *words]
    log = root / "log.txt"
    with log.open("wb") as output:
        process = subprocess.Popen(command, env={**os.environ, **settings}, stdout=output, stderr=output, start_new_session=True)
    try:
        status = process.wait(_SECONDS)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # no rank outlives the call
    if status:
        raise RuntimeError(f"{' '.join(command)} ended with {status}:\n{log.read_text(errors='replace')[-6000:]}")
    return load_samples(root)
