"""torch's DCP under torchtitan's retention: the latest two are kept, and a step is saved again in place after a resume."""

import pytest
from conftest import House
from rotation import Scene, assert_undisturbed, rotate


def test_torchtitan_keeps_the_checkpoints_that_it_keeps_without_a_watch(house: House) -> None:
    assert rotate(house, "torchtitan") == ["step-3", "step-4"]


@pytest.mark.slow
def test_torchtitan_trains_and_resumes_beside_what_a_watch_has_left(house: House) -> None:
    assert_undisturbed(*Scene(house, "torchtitan").train_beside_evals())


@pytest.mark.slow
def test_torchtitan_rotates_through_a_queue_longer_than_the_holds(house: House) -> None:
    assert rotate(house, "torchtitan", 12) == ["step-11", "step-12"]


def test_a_torchtitan_that_counts_every_entry_of_its_folder_trains_on(house: House) -> None:
    assert_undisturbed(*Scene(house, "early_torchtitan").train_beside_evals())


@pytest.mark.slow
def test_a_torchtitan_that_counts_every_entry_of_its_folder_rotates_as_without_a_watch(house: House) -> None:
    assert rotate(house, "early_torchtitan") == ["step-3", "step-4"]
