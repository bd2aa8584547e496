"""The examples do what their READMEs say."""

import os
import shutil
import subprocess
import sys

import pytest
from conftest import REPOSITORY, House


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_processes_train_under_fsdp_and_every_sharded_checkpoint_is_evaluated(house: House) -> None:
    example = house.root / "fsdp"
    shutil.copytree(REPOSITORY / "examples" / "fsdp", example, ignore=shutil.ignore_patterns("checkpoints", "__pycache__"))
    words = ["--directory", "checkpoints", "--wait_for_directory", "--eval_existing", "--evaluator", "eval.py:bits_per_byte"]
    words += ["--polling_interval", "1"]
    with house.running("watch", *words, "--until_step", 60, cwd=example) as watch:
        torchrun = [os.path.join(os.path.dirname(sys.executable), "torchrun"), "--standalone", "--nproc_per_node", "2"]
        train = [*torchrun, "train.py", "--steps", "60", "--save_every", "20"]
        done = subprocess.run(train, cwd=example, env=house.environment, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr
        assert watch.wait(200) == 0
    records = [path.read_text() for path in sorted((example / "checkpoints" / "evals" / "bits_per_byte").glob("*.json"))]
    assert len(records) == 3
    assert all('"status": "finished"' in record and '"from": "dcp"' in record for record in records)
    assert not any("not checked" in record for record in records)
