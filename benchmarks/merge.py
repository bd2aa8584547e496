"""What a merge costs, beside ``cp`` and beside what torch and accelerate offer: whole processes, in one run, on one machine.

Run by ``scripts/bench merge``. Every method reads the same sharded checkpoint of a Llama in bfloat16, which four ranks saved with torch's
own saver, and its output is flushed to the disk. Time is the wall time of the whole process, interpreter and imports included; memory is
the peak of the process and its children.
"""

import argparse
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

RANKS = 4
HIDDEN, INNER, VOCABULARY = 2048, 8192, 32000
# Parameters of one layer, in elements.
LAYER = HIDDEN * HIDDEN * 4 + HIDDEN * INNER * 3

SAVER = """
import os, sys, torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.tensor import DTensor, Shard, init_device_mesh

folder, layers, hidden, inner, vocabulary, world = sys.argv[1], *map(int, sys.argv[2:7])
rank = int(os.environ["RANK"])
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
mesh = init_device_mesh("cpu", (world,))
chance = torch.Generator().manual_seed(rank)

def part(rows, columns=0):
    if columns:
        noise = torch.randint(-2**31, 2**31 - 1, (rows // world, columns // 2), generator=chance, dtype=torch.int32)
        local = noise.view(torch.bfloat16)
    else:
        local = torch.ones(rows // world, dtype=torch.bfloat16)
    return DTensor.from_local(local, mesh, [Shard(0)])

state = {name: part(vocabulary, hidden) for name in ("model.embed_tokens.weight", "lm_head.weight")}
state["model.norm.weight"] = part(hidden)
for i in range(layers):
    for name in ("q", "k", "v", "o"):
        state[f"model.layers.{i}.self_attn.{name}_proj.weight"] = part(hidden, hidden)
    for name, rows, columns in (("gate", inner, hidden), ("up", inner, hidden), ("down", hidden, inner)):
        state[f"model.layers.{i}.mlp.{name}_proj.weight"] = part(rows, columns)
    state[f"model.layers.{i}.input_layernorm.weight"] = part(hidden)
    state[f"model.layers.{i}.post_attention_layernorm.weight"] = part(hidden)
dcp.save({"model": state}, checkpoint_id=f"{folder}/step_1")
if "SAFETENSORS" in os.environ:
    dcp.save(state, storage_writer=dcp.HuggingFaceStorageWriter(f"{folder}/safetensors", save_distributed=True))
dist.barrier()
os._exit(0)
"""

TORCH = """
import sys, torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from safetensors.torch import save_file
dcp_to_torch_save(sys.argv[1], sys.argv[2] + ".pt")
save_file(torch.load(sys.argv[2] + ".pt", weights_only=True)["model"], sys.argv[2])
"""

# A process inherits the peak of the one that started it, so that one must be small.
MEASURE = """
import os, sys, time
began = time.monotonic()
pid = os.posix_spawnp(sys.argv[1], sys.argv[1:], os.environ, file_actions=[(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)])
_, status, usage = os.wait4(pid, 0)
print(time.monotonic() - began, usage.ru_maxrss)
sys.exit(os.waitstatus_to_exitcode(status))
"""

CONSOLIDATE = """
import sys
from safetensors import safe_open
from torch.distributed.checkpoint._consolidate_hf_safetensors import consolidate_safetensors_files
import glob
names = {name for path in glob.glob(sys.argv[1] + "/*.safetensors") for name in safe_open(path, "pt").keys()}
consolidate_safetensors_files(sys.argv[1], sys.argv[2], dict.fromkeys(names, 1))
"""


def save(folder: Path, gigabytes: float, safetensors: bool) -> None:
    """Has four ranks save a checkpoint of about this size."""
    folder.mkdir()
    layers = max(1, round((gigabytes * 1e9 / 2 - 2 * VOCABULARY * HIDDEN) / LAYER))
    words = [str(n) for n in (folder, layers, HIDDEN, INNER, VOCABULARY, RANKS)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"} | ({"SAFETENSORS": "1"} if safetensors else {})
    ranks = [subprocess.Popen([sys.executable, "-c", SAVER, *words], env={**environment, "RANK": str(r)}) for r in range(RANKS)]
    if any(rank.wait() for rank in ranks):
        raise SystemExit("a rank did not save its part")


def drop_cache(folder: Path) -> None:
    """Makes the files' bytes leave memory, so that the next reader finds them on the disk alone."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def warm(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                while file.read(1 << 24):
                    pass


def measure(command: list[str]) -> tuple[float, int]:
    """Seconds and peak memory (bytes) of a command and its children."""
    measuring = [sys.executable, "-I", "-S", "-c", MEASURE, *command]
    done = subprocess.run(measuring, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)[:200]} ended with {done.returncode}")
    seconds, memory = done.stdout.split()[-2:]
    return float(seconds), int(memory) * 1024


def methods(folder: Path, output: Path, slow: bool, safetensors: bool) -> dict[str, list[str]]:
    checkpoint = str(folder / "step_1")
    python = sys.executable
    found = {
        "cp -r, sync -f": ["sh", "-c", f"cp -r {checkpoint} {output} && sync -f {output}"],
        "assayer.merge": [python, "-m", "assayer.merge", "--checkpoint_path", checkpoint, "--output_path", str(output)],
        "assayer.merge --no_verify": [
            python,
            "-m",
            "assayer.merge",
            "--checkpoint_path",
            checkpoint,
            "--output_path",
            str(output),
            "--no_verify",
        ],
    }
    if slow:
        target = f"{output}/model.safetensors"
        found["dcp_to_torch_save, save_file"] = [
            "sh",
            "-c",
            f'mkdir {output} && {python} -c "$0" {checkpoint} {target} && sync -f {target}',
            TORCH,
        ]
        found["accelerate merge-weights"] = [
            "sh",
            "-c",
            f"{python} -m accelerate.commands.merge {checkpoint} {output} && sync -f {output}",
        ]
    if slow and safetensors:
        source = folder / "safetensors"
        found["torch's consolidation"] = [
            "sh",
            "-c",
            f'mkdir {output} && {python} -c "$0" {source} {output} && sync -f {output}',
            CONSOLIDATE,
        ]
        found["assayer.merge of its safetensors"] = [
            python,
            "-m",
            "assayer.merge",
            "--checkpoint_path",
            str(source),
            "--output_path",
            str(output),
        ]
    return found


def compare(folder: Path, output: Path, commands: dict[str, list[str]], rounds: int, prepare: Callable[[Path], None]) -> None:
    """Prints the median of every method, and its speed as a multiple of cp's in the same round."""
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    peak: dict[str, int] = dict.fromkeys(commands, 0)
    for _ in range(rounds):
        for name, command in commands.items():
            shutil.rmtree(output, ignore_errors=True)
            os.sync()
            prepare(folder)
            took, memory = measure(command)
            seconds[name].append(took)
            peak[name] = max(peak[name], memory)
    copied = seconds["cp -r, sync -f"]
    for name, found in seconds.items():
        ratio = statistics.median(c / s for c, s in zip(copied, found, strict=True))
        print(f"  {name:34} {statistics.median(found):8.2f} s  {ratio:5.2f} x cp  {peak[name] >> 20:6} MiB", flush=True)
    shutil.rmtree(output, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[0.5, 2, 6])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--slow_rounds", type=int, default=1, help="rounds with the methods of torch and accelerate; 0: without them")
    parser.add_argument("--folder", help="where to work; needs three times the largest size")
    options = parser.parse_args()
    print(f"{platform.platform()}, {os.cpu_count()} cores, Python {platform.python_version()}, ", end="")
    print(", ".join(f"{name} {version(name)}" for name in ("torch", "safetensors", "accelerate")))
    with tempfile.TemporaryDirectory(prefix="assayer-bench-", dir=options.folder) as root:
        for size in options.gigabytes:
            folder, output = Path(root) / f"{size}", Path(root) / "output"
            safetensors = bool(options.slow_rounds)
            save(folder, size, safetensors)
            held = sum(path.stat().st_size for path in (folder / "step_1").iterdir())
            fast = methods(folder, output, slow=False, safetensors=False)
            print(f"{held / 1e9:.2f} GB, warm, {options.rounds} rounds:")
            compare(folder, output, fast, options.rounds, warm)
            print(f"{held / 1e9:.2f} GB, cold, {options.rounds} rounds:")
            compare(folder, output, fast, options.rounds, drop_cache)
            if options.slow_rounds:
                print(f"{held / 1e9:.2f} GB, warm, {options.slow_rounds} rounds:")
                compare(folder, output, methods(folder, output, slow=True, safetensors=True), options.slow_rounds, warm)
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
