"""Look after look: what has changed is seen, what has not is not read, what is settled is not kept."""

import gc
import os
import shutil
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch

from assayer.watch import scan
from assayer.watch.ready import Seen
from assayer.watch.survey import Survey, Terms

# A full look comes only when it is asked for.
SELDOM = Terms(3, None, 30.0, full_every=1e9)
ALWAYS = Terms(3, None, 30.0)


def save(path: Path, value: float = 1.0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"w": torch.full((4,), value)}, path)
    return path


def save_hf(path: Path, value: float = 1.0) -> Path:
    from safetensors.torch import save_file

    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text("{}")
    save_file({"w": torch.full((4,), value)}, path / "model.safetensors")
    (path / "trainer_state.json").write_text('{"global_step": 1}')
    return path


def age(*roots: Path) -> None:
    """As if everything had been written long ago: what has changed a moment ago is listed again anyway."""
    for root in roots:
        for path in [root, *root.rglob("*")]:
            os.utime(path, (1_000_000_000, 1_000_000_000))


class Listed:
    """Which directories are listed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.paths: list[str] = []
        real = scan.open_folder

        def listing(path: str, *rest: Any) -> Any:
            self.paths.append(path)
            return real(path, *rest)

        monkeypatch.setattr("assayer.watch.survey.open_folder", listing)

    def take(self) -> list[str]:
        taken, self.paths = self.paths, []
        return taken


def look(survey: Survey, terms: Terms = SELDOM) -> dict[str, Seen]:
    return {os.path.relpath(s.checkpoint.path, survey.directory): s for s in survey.look(terms, time.time())}


def settle_all(survey: Survey) -> None:
    for seen in list(survey.seen.values()):
        survey.settle(seen)


def test_an_unchanged_tree_is_not_listed_and_what_is_new_in_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for run in range(3):
        for step in (1, 2):
            save(tmp_path / f"run{run}" / f"m_step{step}.pt", step)
    age(tmp_path)
    listed, survey = Listed(monkeypatch), Survey(str(tmp_path))
    assert len(look(survey)) == 6
    settle_all(survey)
    listed.take()
    assert look(survey) == {}
    assert listed.take() == []
    save(tmp_path / "run1" / "m_step3.pt")
    assert set(look(survey)) == {"run1/m_step3.pt"}
    assert listed.take() == [str(tmp_path / "run1")]


def test_a_settled_directory_is_remembered_by_the_one_it_lies_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2, 3):
        save_hf(tmp_path / "run" / f"checkpoint-{step}")
    age(tmp_path)
    listed, survey = Listed(monkeypatch), Survey(str(tmp_path))
    assert len(look(survey)) == 3
    settle_all(survey)
    listed.take()
    assert look(survey) == {}
    assert listed.take() == []
    save_hf(tmp_path / "run" / "checkpoint-4")
    assert set(look(survey)) == {"run/checkpoint-4"}
    assert set(listed.take()) == {str(tmp_path / "run"), str(tmp_path / "run" / "checkpoint-4")}
    assert set(survey._nodes) == {str(tmp_path), str(tmp_path / "run"), str(tmp_path / "run" / "checkpoint-4")}


@pytest.mark.parametrize("name", ["last.ckpt", "m_step2.pt"])
def test_the_youngest_and_the_nameless_are_looked_at_every_time(tmp_path: Path, name: str) -> None:
    for step in (1, 2):
        save(tmp_path / f"m_step{step}.pt")
    save(tmp_path / "last.ckpt")
    age(tmp_path)
    survey = Survey(str(tmp_path))
    look(survey)
    settle_all(survey)
    mtime = os.stat(tmp_path).st_mtime_ns
    with (tmp_path / name).open("r+b") as file:
        # In place: the directory's own time stands still.
        torch.save({"w": torch.full((4,), 7.0)}, file)
    assert os.stat(tmp_path).st_mtime_ns == mtime
    assert set(look(survey)) == {name}


def test_any_other_that_is_written_again_in_place_is_seen_when_its_turn_comes(tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path / f"m_step{step}.pt")
    age(tmp_path)
    survey = Survey(str(tmp_path))
    look(survey)
    settle_all(survey)
    with (tmp_path / "m_step1.pt").open("r+b") as file:
        torch.save({"w": torch.full((4,), 7.0)}, file)
    assert look(survey) == {}
    assert set(look(survey, ALWAYS)) == {"m_step1.pt"}


def test_a_shard_that_changes_in_a_settled_directory_is_seen_when_its_turn_comes(tmp_path: Path) -> None:
    save_hf(tmp_path / "checkpoint-1")
    survey = Survey(str(tmp_path))
    before = look(survey, ALWAYS)["checkpoint-1"]
    settle_all(survey)
    assert look(survey, ALWAYS) == {}
    save_hf(tmp_path / "checkpoint-1", 2.0)
    after = look(survey, ALWAYS)["checkpoint-1"]
    assert before.identity and after.identity and before.identity != after.identity


def test_the_folder_of_shards_inside_a_checkpoint_counts_as_its_own(tmp_path: Path) -> None:
    inner = tmp_path / "checkpoint_1" / "pytorch_model_fsdp_0"
    inner.mkdir(parents=True)
    age(tmp_path)
    survey = Survey(str(tmp_path))
    assert look(survey) == {}
    assert look(survey) == {}
    (inner / "__0_0.distcp").write_bytes(b"PK")
    assert set(look(survey)) == {"checkpoint_1"}


def test_one_that_was_whole_and_is_deleted_stays_in_sight_until_it_is_settled(tmp_path: Path) -> None:
    path, folder = save(tmp_path / "m_step1.pt"), save_hf(tmp_path / "checkpoint-2")
    (tmp_path / "m_step3.pt").write_bytes(b"PK\x03\x04 half")
    survey = Survey(str(tmp_path))
    assert set(look(survey)) == {"m_step1.pt", "checkpoint-2", "m_step3.pt"}
    path.unlink()
    shutil.rmtree(folder)
    (tmp_path / "m_step3.pt").unlink()
    for _ in range(2):
        assert {name: seen.gone for name, seen in look(survey).items()} == {"m_step1.pt": True, "checkpoint-2": True}
    settle_all(survey)
    assert look(survey) == {}
    save(path, 2.0)
    save_hf(folder, 2.0)
    assert {name: seen.gone for name, seen in look(survey).items()} == {"m_step1.pt": False, "checkpoint-2": False}


def test_one_that_comes_back_before_it_was_settled_is_there_again(tmp_path: Path) -> None:
    folder = save_hf(tmp_path / "checkpoint-2")
    survey = Survey(str(tmp_path))
    look(survey)
    folder.rename(tmp_path / "tmp-away")
    assert look(survey)["checkpoint-2"].gone
    (tmp_path / "tmp-away").rename(folder)
    for _ in range(2):
        assert not look(survey)["checkpoint-2"].gone
    settle_all(survey)
    assert look(survey) == {}


def test_a_directory_that_is_away_takes_nothing_with_it(tmp_path: Path) -> None:
    save(tmp_path / "run" / "m_step1.pt")
    survey = Survey(str(tmp_path / "run"))
    look(survey)
    (tmp_path / "run").rename(tmp_path / "away")
    with pytest.raises(FileNotFoundError):
        look(survey)
    (tmp_path / "away").rename(tmp_path / "run")
    assert not look(survey)["m_step1.pt"].gone


def test_a_look_that_has_no_time_for_all_that_is_new_goes_on_where_it_stopped(tmp_path: Path) -> None:
    for run in range(5):
        save(tmp_path / f"run{run}" / "m_step1.pt")
    survey, found = Survey(str(tmp_path)), []
    hasty = Terms(3, None, 30.0, new_max=0.0)
    for _ in range(20):
        found.append(len(look(survey, hasty)))
        if not survey.is_partial:
            break
    assert found[0] < 5
    hurried = Terms(3, None, 30.0, new_max=10.0)
    assert len(look(survey, hurried)) == 5
    assert not survey.is_partial


def test_a_settled_checkpoint_takes_little_memory(tmp_path: Path) -> None:
    path = save(tmp_path / "few" / "m_step0.pt")
    (tmp_path / "many").mkdir()
    for step in range(2000):
        os.link(path, tmp_path / "many" / f"m_step{step}.pt")
    terms = Terms(3, None, 30.0, is_known=lambda found, signature: True)
    look(Survey(str(tmp_path / "few")), terms)
    survey = Survey(str(tmp_path / "many"))
    tracemalloc.start()
    look(survey, terms)
    gc.collect()
    kept = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert kept < 2000 * 200
