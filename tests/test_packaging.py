"""The wheel and the sdist build, install and run outside the repository, without torch."""

import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from conftest import REPOSITORY

from assayer import __version__

EVALUATOR = """
import os

def size(path):
    return {"bytes": os.path.getsize(path), "step": 7}
"""

# A safetensors file of one empty tensor, without any library.
CHECKPOINT = (60).to_bytes(8, "little") + b'{"w":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'.ljust(60)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_what_is_built_installs_and_evaluates_outside_the_repository(tmp_path: Path, kind: str) -> None:
    subprocess.run([sys.executable, "-m", "build", f"--{kind}", "--outdir", tmp_path / "dist", REPOSITORY], check=True, capture_output=True)
    (built,) = (tmp_path / "dist").iterdir()
    assert __version__ in built.name
    names = zipfile.ZipFile(built).namelist() if kind == "wheel" else tarfile.open(built).getnames()
    assert any(name.endswith("assayer/py.typed") for name in names)
    assert any(name.endswith("LICENSE") for name in names)
    assert kind == "sdist" or not any(name.startswith(("tests", "examples", "benchmarks")) for name in names)
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", built], check=True, capture_output=True)
    subprocess.run([python, "-c", "import importlib.util; assert importlib.util.find_spec('torch') is None"], check=True)
    runs = tmp_path / "runs"
    runs.mkdir()
    (runs / "model_7.safetensors").write_bytes(CHECKPOINT)
    (tmp_path / "evals.py").write_text(EVALUATOR)
    # A socket's path has at most 107 bytes: the temporary directory stays the system's own, the state is ours.
    environment = {**os.environ, "XDG_STATE_HOME": str(tmp_path / "state")}
    assayer = tmp_path / "venv" / "bin" / "assayer"
    words = ["watch", "--directory", "runs", "--evaluator", "evals.py:size", "--once", "--polling_interval", "1"]
    done = subprocess.run([assayer, *words], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (runs / "evals" / "size" / "model_7.safetensors.json").exists()
    assert "nothing is running" in subprocess.run([assayer, "shutdown"], env=environment, capture_output=True, text=True).stdout
