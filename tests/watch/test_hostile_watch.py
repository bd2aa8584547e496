"""A watch over a directory into which anybody may write: hostile things run nothing, stop nothing and break no terminal."""

import json
import os
import time
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import House, until
from hostile import SCENES, Street

from assayer.files import printable
from assayer.sealed import sealed
from assayer.watch.ready import examine
from assayer.watch.scan import scan

# It reads what it is given as most evaluators do, and says so where that fails.
EVALUATOR = """
import torch
from safetensors.torch import load_file

def mean(checkpoint_path):
    if checkpoint_path.endswith(".safetensors"):
        return {"mean": load_file(checkpoint_path)["w"].mean().item()}
    return {"mean": torch.load(checkpoint_path, weights_only=True)["w"].mean().item()}
"""


def is_harmless(text: str) -> bool:
    """No character that a terminal obeys, but the end of a line."""
    return not [c for c in text if c != "\n" and unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")]


def looked_at(directory: Path) -> Iterator[list[str]]:
    """Each checkpoint's name, and why it is not whole, as a watch's first look sees it without a quiet period; then what it cannot read."""
    scanned = scan(str(directory), 3)
    for found in scanned.found:
        seen = examine(found, None, time.time(), first_look=True, quiet_period=0)
        yield [os.path.relpath(found.checkpoint.path, directory), seen.missing or ""]
    yield ["", *scanned.problems]


@pytest.mark.parametrize("scene", [pytest.param(scene, marks=pytest.mark.slow) if scene == "knots" else scene for scene in SCENES])
def test_a_look_at_what_is_hostile_ends_with_a_sentence_each(tmp_path: Path, scene: str) -> None:
    """In a process of its own, which may take 1 GiB more than it has."""
    street = Street(tmp_path)
    laid, whole = SCENES[scene]
    laid(street)
    around = street.around()
    *told, (_, *problems) = sealed(lambda: looked_at(street.runs), 1 << 30, 60)
    assert {os.path.basename(name) for name, missing in told if not missing} == whole
    assert not problems
    assert [missing for _, missing in told if missing] or scene in ("depths", "links")
    assert is_harmless("".join(printable(part) for line in told for part in line))
    assert not street.mark.exists()
    assert street.around() == around


@pytest.mark.slow
@pytest.mark.parametrize("scene", SCENES)
@pytest.mark.timeout(300)
def test_a_watch_goes_on_beside_what_is_hostile(house: House, scene: str) -> None:
    # Given: a good checkpoint among hostile things
    house.file("evaluator.py", EVALUATOR)
    street = Street(house.root)
    house.save("good_step1.pt", 1)
    laid, whole = SCENES[scene]
    laid(street)
    around = street.around()
    # When: a dry run, a foreground watch and a detached one pass over them
    flags = ["--eval_existing", "--quiet_period", 0, "--retries", 0, "--num_eval_workers", 1]
    dry = house.once(*flags, "--dry_run")
    foreground = house.once(*flags, check=False, timeout=300)
    house.watch("--quiet_period", 0, "--retries", 0, "--num_eval_workers", 1)
    house.save("good_step2.pt", 2)
    until(lambda: good(house, "good_step2.pt"), 60, "the later checkpoint's record")
    # Then: both good ones have their record, and one that failed is there for each hostile one that is whole
    assert good(house, "good_step1.pt") == {"mean": 1.0}
    assert good(house, "good_step2.pt") == {"mean": 2.0}
    others = {Path(r["checkpoint"]).name: r for r in house.records().values() if "/good_" not in r["checkpoint"]}
    assert others.keys() == whole
    assert not [r for r in others.values() if r["attempts"] != 1]
    # All others are shown, each with a sentence why not.
    status = house.command("status", check=False)
    told = house.status()
    waiting = [c for c in told["watches"][0]["checkpoints"] if c["state"] == "writing"]
    assert all(c["reason"] for c in waiting)
    assert not [c for c in told["watches"][0]["checkpoints"] if c["state"] not in ("writing", "finished", "failed", "baseline")]
    # Nothing was run, nothing around the runs was written or taken for a checkpoint, and no terminal was spoken to.
    assert not street.mark.exists()
    assert street.around() == around
    assert not [r for r in house.records().values() if "outside" in os.path.realpath(r["checkpoint"])]
    for said in (dry, foreground, status):
        assert is_harmless(said.stdout + said.stderr), repr(said.stdout + said.stderr)
        assert "Traceback" not in said.stdout + said.stderr
    assert "Traceback" not in house.log()
    assert house.shutdown().returncode == 0


def good(house: House, name: str) -> dict[str, float] | None:
    path = house.runs / "evals" / "mean" / f"{name}.json"
    if not path.is_file() or path.stat().st_size > 1 << 20:
        return None
    record = json.loads(path.read_bytes())
    return record["metrics"] if record["status"] == "finished" else None
