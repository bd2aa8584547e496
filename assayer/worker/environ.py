"""What a job sees of the machine: its own GPUs and nothing of the launcher that happened to start the worker."""

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from assayer.errors import UsageError

__all__ = ["LAUNCHERS", "evaluation_environment", "gpu_uuids", "is_launcher_variable", "parse_gpus", "visible_gpus"]

# What can start several processes for one evaluation.
LAUNCHERS = ("torchrun", "accelerate")

# Variables by which torchrun, MPI and Slurm tell a process its rank; with them an evaluation would wait for peers that never come.
_LAUNCHER = re.compile(
    r"RANK|LOCAL_RANK|GLOBAL_RANK|NODE_RANK|GROUP_RANK|ROLE_RANK|ROLE_NAME|ROLE_WORLD_SIZE|WORLD_SIZE|LOCAL_WORLD_SIZE|GROUP_WORLD_SIZE"
    r"|MASTER_ADDR|MASTER_PORT|TORCHELASTIC_\w+|TORCH_NCCL_\w+|PET_\w+|OMPI_\w+|MV2_COMM_WORLD_\w+|PMI_\w+|PMIX_\w+|MPI_\w+"
    r"|ACCELERATE_\w+|FSDP_\w+|DEEPSPEED_\w+"
    r"|SLURM_(PROCID|LOCALID|NODEID|NTASKS\w*|NPROCS|STEP\w*|TASKS_PER_NODE|TASK_PID|GTIDS|LAUNCH\w*|SRUN\w*|DISTRIBUTION|CPU_BIND\w*)"
)


def is_launcher_variable(name: str) -> bool:
    """True for a variable by which a launcher tells a process its rank or its peers."""
    return _LAUNCHER.fullmatch(name) is not None


def evaluation_environment(environment: Mapping[str, str], gpus: tuple[str, ...] | None) -> dict[str, str]:
    """The environment for a worker that has exactly these GPUs (ids, UUIDs or MIG names); None leaves the choice as it is."""
    kept = {name: value for name, value in environment.items() if not is_launcher_variable(name)}
    if gpus is not None:
        kept["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
        # Ids are those that nvidia-smi shows; CUDA's own default counts the fastest GPU first.
        kept.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    return kept


def parse_gpus(text: str) -> tuple[str, ...]:
    """The GPUs of a list such as ``0,1`` or ``GPU-1b2c,MIG-3d4e``.

    Raises:
        UsageError: an entry is neither an id nor a UUID, or stands twice.
    """
    names = tuple(part.strip() for part in text.split(",") if part.strip())
    for name in names:
        if not re.fullmatch(r"\d+|(GPU|MIG)-[\w/-]+", name):
            raise UsageError(f"GPU {name!r} is neither an id (0), a UUID (GPU-...) nor a MIG name (MIG-...)")
    if len(set(names)) < len(names):
        raise UsageError(f"the GPUs {text} name one of them twice")
    return names


def visible_gpus(environment: Mapping[str, str]) -> tuple[str, ...]:
    """The GPUs that a process with this environment would see, without touching CUDA; empty on a machine without.

    ``CUDA_VISIBLE_DEVICES`` decides where it is set (CUDA stops at the first entry that is no GPU); else ``nvidia-smi -L`` lists them,
    a GPU that is cut into MIG devices by those.
    """
    chosen = environment.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        names = []
        for part in chosen.split(","):
            if not re.fullmatch(r"\d+|(GPU|MIG)-[\w/-]+", part.strip()):
                break
            names.append(part.strip())
        return tuple(names)
    gpus: dict[str, list[str]] = {}
    for line in _nvidia_smi():
        gpu = re.match(r"GPU (\d+):", line)
        mig = re.search(r"MIG .*UUID: (MIG-[\w/-]+)", line)
        if gpu:
            gpus[gpu[1]] = []
        elif mig and gpus:
            gpus[next(reversed(gpus))].append(mig[1])
    if not gpus:
        gpus = {str(i): [] for i, _ in enumerate(Path("/proc/driver/nvidia/gpus").glob("*"))}
    return tuple(name for gpu, migs in gpus.items() for name in (migs or [gpu]))


def gpu_uuids() -> dict[str, str]:
    """The UUID of each GPU id on this machine, so that ``0`` and ``GPU-1b2c`` are known for the same GPU."""
    found = (re.match(r"GPU (\d+):.*UUID: (GPU-[\w-]+)", line) for line in _nvidia_smi())
    return {match[1]: match[2] for match in found if match}


def _nvidia_smi() -> list[str]:
    program = shutil.which("nvidia-smi", path=os.environ.get("PATH"))
    if program is None:
        return []
    try:
        done = subprocess.run([program, "-L"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.splitlines() if done.returncode == 0 else []
