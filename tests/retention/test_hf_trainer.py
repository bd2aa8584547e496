"""``transformers.Trainer`` deletes by ``save_total_limit`` while its checkpoints wait to be evaluated."""

import pytest
from conftest import House
from rotation import Scene, assert_told, assert_undisturbed, rotate


def test_the_hf_trainer_keeps_the_checkpoints_that_it_keeps_without_a_watch(house: House) -> None:
    assert rotate(house, "hf_trainer") == ["checkpoint-3", "checkpoint-4"]


@pytest.mark.slow
def test_the_hf_trainer_trains_and_resumes_beside_what_a_watch_has_left(house: House) -> None:
    assert_undisturbed(*Scene(house, "hf_trainer").train_beside_evals())


@pytest.mark.slow
def test_the_hf_trainer_rotates_through_a_queue_longer_than_the_holds(house: House) -> None:
    assert rotate(house, "hf_trainer", 12) == ["checkpoint-11", "checkpoint-12"]


@pytest.mark.slow
def test_the_best_checkpoint_is_kept_and_loaded_at_the_end_as_without_a_watch(house: House) -> None:
    assert rotate(house, "hf_trainer_best") == ["checkpoint-1", "checkpoint-4"]


@pytest.mark.slow
def test_without_holds_what_was_deleted_while_it_waited_is_recorded_as_vanished(house: House) -> None:
    scene = Scene(house, "hf_trainer")
    alone, watched = scene.train_watched(4, "", "--hold", 0)
    assert_undisturbed(alone, watched)
    records = scene.evaluate(watched)
    assert_told(watched, records)
    assert [records[f"checkpoint-{step}.json"]["status"] for step in (1, 2, 3, 4)] == ["vanished", "vanished", "finished", "finished"]
