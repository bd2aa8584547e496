"""Lightning's ``ModelCheckpoint`` keeps the best two while its checkpoints wait to be evaluated."""

import pytest
from conftest import House
from rotation import Scene, assert_undisturbed, rotate


def test_lightning_keeps_the_checkpoints_that_it_keeps_without_a_watch(house: House) -> None:
    assert rotate(house, "lightning") == ["epoch=2-step=3.ckpt", "epoch=3-step=4.ckpt", "last.ckpt"]


@pytest.mark.slow
def test_lightning_trains_and_resumes_beside_what_a_watch_has_left(house: House) -> None:
    assert_undisturbed(*Scene(house, "lightning").train_beside_evals())


@pytest.mark.slow
def test_lightning_rotates_through_a_queue_longer_than_the_holds(house: House) -> None:
    assert rotate(house, "lightning", 12) == ["epoch=10-step=11.ckpt", "epoch=11-step=12.ckpt", "last.ckpt"]
