"""``Accelerator.save_state`` makes room by ``total_limit`` while its checkpoints wait to be evaluated."""

import pytest
from conftest import House
from rotation import Scene, assert_undisturbed, rotate


def test_accelerate_keeps_the_checkpoints_that_it_keeps_without_a_watch(house: House) -> None:
    assert rotate(house, "accelerate") == ["checkpoint_2", "checkpoint_3"]


@pytest.mark.slow
def test_accelerate_trains_and_resumes_beside_what_a_watch_has_left(house: House) -> None:
    assert_undisturbed(*Scene(house, "accelerate").train_beside_evals())


@pytest.mark.slow
def test_accelerate_rotates_through_a_queue_longer_than_the_holds(house: House) -> None:
    assert rotate(house, "accelerate", 12) == ["checkpoint_10", "checkpoint_11"]


@pytest.mark.slow
def test_accelerate_is_not_disturbed_by_a_watch_of_its_folder_of_checkpoints(house: House) -> None:
    assert rotate(house, "accelerate", folder="checkpoints") == ["checkpoint_2", "checkpoint_3"]
    assert (house.runs / "evals" / "weigh" / "checkpoint_3.json").exists()
