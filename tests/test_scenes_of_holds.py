"""Whole commands against a trainer that deletes, saves again and overwrites while checkpoints wait."""

import json
from pathlib import Path

import pytest
from conftest import House, until

pytestmark = pytest.mark.usefixtures("without_torch")

# Waits for a word, and returns what it reads then.
GATED = """
import os, time
from evaluator import mean

def gated(path, original_path):
    open(original_path + '.begun', 'a').write('x')
    while not os.path.exists(os.path.join(os.path.dirname(original_path), 'go')):
        time.sleep(0.05)
    return mean(path)
"""


def watched(house: House, *words: object) -> None:
    house.watch(*words, evaluator=f"{house.file('gated.py', GATED)}:gated")


def states(house: House) -> dict[str, str]:
    return {row["name"]: row["state"] for row in house.status()["watches"][0]["checkpoints"]}


def recorded(house: House) -> dict[str, tuple[str, float | None]]:
    return {name: (record["status"], record["metrics"].get("mean")) for name, record in house.records().items()}


def explained(house: House, path: Path) -> dict[str, object]:
    told: dict[str, object] = json.loads(house.command("status", "--json", "--explain", path).stdout)
    return told


def test_what_the_trainer_deletes_while_it_waits_is_evaluated_and_what_was_not_held_has_vanished(house: House) -> None:
    watched(house, "--hold", 2)
    first = house.save("m_step0.pt", 0)
    until(Path(f"{first}.begun").exists)
    paths = [house.save(f"m_step{step}.pt", step) for step in (1, 2, 3)]
    until(lambda: sum(state == "queued" for state in states(house).values()) == 3)
    for path in paths:
        path.unlink()
    (house.runs / "go").touch()
    until(lambda: len(house.records()) == 4)
    assert recorded(house) == {
        "m_step0.pt.json": ("finished", 0.0),
        "m_step1.pt.json": ("vanished", None),
        "m_step2.pt.json": ("vanished", None),
        "m_step3.pt.json": ("finished", 3.0),
    }
    vanished = house.record("m_step1.pt", "gated")
    assert vanished
    assert vanished["error"]["message"].endswith("it was not protected from deletion: newer ones are held (--hold 2)")
    until(lambda: not (house.runs / "evals" / ".hold").exists())
    house.shutdown()


def test_a_rewrite_in_place_during_the_evaluation_supersedes_it_also_through_the_hard_link(house: House) -> None:
    watched(house)
    path = house.save("last.ckpt", 1.0)
    until(Path(f"{path}.begun").exists)
    inode = path.stat().st_ino
    house.save("last.ckpt", 2.0)
    assert path.stat().st_ino == inode, "torch.save writes in place"
    (house.runs / "go").touch()
    until(lambda: ("finished", 2.0) in recorded(house).values())
    (superseded,) = [record for name, record in house.records().items() if "@" in name]
    assert (superseded["status"], superseded["metrics"]) == ("superseded", {})
    house.shutdown()


def test_a_path_that_is_saved_anew_while_its_earlier_save_waits_gives_two_results(house: House) -> None:
    watched(house)
    path = house.save("last.ckpt", 1.0)
    until(Path(f"{path}.begun").exists)
    path.unlink()
    house.save("last.ckpt", 2.0)
    until(lambda: house.status()["queues"]["evaluation"]["queued"] == 1)
    (house.runs / "go").touch()
    until(lambda: len(house.records()) == 2)
    found = recorded(house)
    assert found.pop("last.ckpt.json") == ("finished", 2.0), "the name is the newest one's"
    assert list(found.values()) == [("finished", 1.0)]
    house.shutdown()


def test_latest_only_skips_what_is_older_than_the_newest_that_waits(house: House) -> None:
    watched(house, "--latest_only")
    first = house.save("m_step0.pt", 0)
    until(Path(f"{first}.begun").exists)
    for step in (1, 2, 10):
        house.save(f"m_step{step}.pt", step)
    until(lambda: sum(state == "queued" for state in states(house).values()) == 3)
    (house.runs / "go").touch()
    until(lambda: len(house.records()) == 4)
    assert {name: status for name, (status, _) in recorded(house).items()} == {
        "m_step0.pt.json": "finished",
        "m_step1.pt.json": "skipped",
        "m_step2.pt.json": "skipped",
        "m_step10.pt.json": "finished",
    }
    until(lambda: states(house).get("m_step2.pt") == "skipped")
    house.shutdown()


def test_explain_tells_each_station_of_a_checkpoint(house: House) -> None:
    path = house.runs / "m_step1.pt"
    house.save("m_step0.pt")
    watched(house)
    assert explained(house, house.runs / "m_step0.pt")["watches"][0]["state"] == "not new"  # type: ignore[index]
    path.write_bytes(b"PK\x03\x04 half")
    half = explained(house, path)
    assert (half["format"], half["whole"], half["missing"]) == ("single_file", False, "has no zip directory yet (it is written last)")
    assert half["watches"][0]["state"] == "not ready"  # type: ignore[index]
    house.save("m_step1.pt", 1.0)
    until(Path(f"{path}.begun").exists)
    running = explained(house, path)
    assert running["whole"] is True
    assert str(running["held"]).startswith("yes, as ")
    assert running["watches"][0]["state"] == "running"  # type: ignore[index]
    house.save("m_step2.pt", 2.0)
    until(lambda: explained(house, house.runs / "m_step2.pt")["watches"][0]["reason"] == "place 1 of 1 in the queue evaluation")  # type: ignore[index]
    (house.runs / "go").touch()
    until(lambda: len(house.records()) == 2)
    done = explained(house, path)
    assert done["watches"][0]["state"] == "recorded as finished"  # type: ignore[index]
    until(lambda: explained(house, path)["held"] == "")
    path.unlink()
    assert explained(house, path)["why"] == "nothing lies there any more"
    assert house.command("status", "--explain", house.runs / "none.pt", check=False).returncode == 2
    text = house.command("status", "--explain", house.runs / "m_step2.pt").stdout
    assert "next: nothing until it is saved again" in text
    house.shutdown()


def test_a_shutdown_lets_go_of_what_waits_but_for_what_is_left_nowhere_else(house: House) -> None:
    watched(house)
    first = house.save("m_step0.pt", 0)
    until(Path(f"{first}.begun").exists)
    house.save("m_step1.pt", 1)
    taken = house.save("m_step2.pt", 2)
    until(lambda: sum(state == "queued" for state in states(house).values()) == 2)
    taken.unlink()
    said = house.shutdown("--now").stdout
    assert f"{taken} was deleted by its trainer and is kept for the next watch" in said
    assert len(list((house.runs / "evals" / ".hold").iterdir())) == 1
    (house.runs / "go").touch()
    watched(house)
    until(lambda: len(house.records()) == 3)
    assert recorded(house)["m_step2.pt.json"] == ("finished", 2.0)
    until(lambda: not (house.runs / "evals" / ".hold").exists())
    house.shutdown()
