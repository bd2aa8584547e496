"""An evaluation that is killed goes on where it was: the same batches in the same order, the same counts, equal sums."""

import collections
import itertools
import json
import logging
import os
import random
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import REPOSITORY

from assayer.errors import EvaluatorError, StateError
from assayer.progress import Binding, Progress, choose_point, furthest, has_progress, remove

BINDING = Binding(
    identity="5e1f", weights="regular", evaluator="loss", source="a1b2", arguments={"limit": 5, "x": float("nan")}, world_size=1
)
TWO = replace(BINDING, world_size=2)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "step5.progress"


@pytest.fixture(autouse=True)
def heard(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "assayer")


def opened(folder: Path, **more: Any) -> Progress:
    return Progress(folder, BINDING, **more)


def ranks(folder: Path, world_size: int = 2) -> list[Progress]:
    """All ranks of an attempt, as who starts them would make them."""
    binding = replace(BINDING, world_size=world_size)
    point = choose_point(folder, binding, world_size)
    return [Progress(folder, binding, rank, world_size, point) for rank in range(world_size)]


def begin(progress: Progress, count: int, state: dict[str, Any] | None = None, every: int = 1, items: int = 100) -> dict[str, Any]:
    """Works at a loop until ``count`` items have been yielded, the last of which is not finished, as by one who is killed there."""
    state = {"sum": 0} if state is None else state
    for item in itertools.islice(progress.items(range(items), state, every), count):
        state["sum"] += item
    return state


# save and resume


def test_what_was_saved_is_there_for_the_next_attempt_and_a_new_copy_each_time(folder: Path) -> None:
    first = opened(folder)
    assert first.resume() is None
    first.save({"answers": [0.1, (2,)], "t": torch.ones(2)})
    for progress in (first, opened(folder)):
        progress.resume()["answers"].append("mine")
        assert progress.resume()["answers"] == [0.1, (2,)]
    opened(folder).save(None)
    assert opened(folder).resume() is None


def test_nothing_is_made_before_the_first_save_and_one_file_remains_of_many(folder: Path) -> None:
    progress = opened(folder)
    progress.report(1, 2)
    assert not folder.exists()
    for n in range(5):
        progress.save(n)
    assert os.listdir(folder) == ["000005-0of1.safetensors"]
    again = opened(folder)
    again.save(5)
    assert os.listdir(folder) == ["000006-0of1.safetensors"], "the count goes on"


def test_a_state_that_cannot_be_stored_is_an_error_and_the_saved_one_stays(folder: Path) -> None:
    progress = opened(folder)
    progress.save([1])
    with pytest.raises(TypeError, match=re.escape("state['a'] has the key 2")):
        progress.save({"a": {2: 3}})
    assert (progress.resume(), opened(folder).resume(), furthest(folder)) == ([1], [1], 1)


def test_how_far_it_has_come_can_be_asked_without_opening_anything(folder: Path) -> None:
    assert (furthest(folder), has_progress(folder)) == (0, False)
    folder.mkdir()
    for name in ("5-0of1.safetensors", "000005-0of1.safetensors.tmp-01234567", "000007-0of1.json", "x"):
        (folder / name).touch()
    assert (furthest(folder), has_progress(folder)) == (0, False)
    first, second = ranks(folder)
    first.save(1)
    first.save(2)
    second.save(1)
    assert (furthest(folder), has_progress(folder)) == (2, True)
    assert choose_point(folder, TWO, 2) == furthest(folder) == 1


# what a state is bound to


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"identity": "77aa"}, 'identity was "5e1f" and is "77aa"'),
        ({"weights": "ema"}, 'weights was "regular" and is "ema"'),
        ({"evaluator": "loss2"}, 'evaluator was "loss" and is "loss2"'),
        ({"source": "c3d4"}, 'source was "a1b2" and is "c3d4"'),
        ({"source": None}, 'source was "a1b2" and is null'),
        ({"arguments": {"limit": 6, "x": float("nan")}}, "the argument limit was 5 and is 6"),
        ({"arguments": {"limit": 5.0, "x": float("nan")}}, "the argument limit was 5 and is 5.0"),
        ({"arguments": {"limit": 5}}, "the argument x was NaN and is not given"),
        ({"arguments": {"limit": 5, "x": float("nan"), "y": None}}, "the argument y was not given and is null"),
        (
            {"arguments": {}, "source": "c3d4"},
            'source was "a1b2" and is "c3d4", the argument limit was 5 and is not given, the argument x was',
        ),
        ({"world_size": 2}, "world_size was 1 and is 2"),
    ],
    ids=lambda value: "" if isinstance(value, str) else str(value),
)
def test_whatever_else_it_was_saved_for_starts_over_and_one_line_says_what_differs(
    changed: dict[str, Any], words: str, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    opened(folder).save(1)
    caplog.clear()
    binding = replace(BINDING, **changed)
    assert choose_point(folder, binding, binding.world_size) is None
    (line,) = caplog.messages
    assert "starts over" in line
    assert words in line
    progress = Progress(folder, binding, 0, binding.world_size)
    assert progress.resume() is None
    assert len(caplog.messages) == 1
    assert os.listdir(folder) == []


def test_the_same_binding_goes_on_in_whatever_order_its_arguments_stand(folder: Path) -> None:
    opened(folder).save(1)
    assert Progress(folder, replace(BINDING, arguments=dict(reversed(list(BINDING.arguments.items()))))).resume() == 1


def test_a_file_that_was_renamed_does_not_count(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    opened(folder).save(1)
    (folder / "000001-0of1.safetensors").rename(folder / "000002-0of1.safetensors")
    assert opened(folder).resume() is None
    ranks(folder)[0].save(1)
    shutil.copyfile(folder / "000001-0of2.safetensors", folder / "000001-1of2.safetensors")
    assert choose_point(folder, TWO, 2) is None
    assert "point was 1 and is 2" in caplog.text
    assert "rank was 0 and is 1" in caplog.text


def test_impossible_ranks_are_an_error(folder: Path) -> None:
    for rank, world_size in ((1, 1), (-1, 1), (0, 2), (0, 0)):
        with pytest.raises(ValueError, match="and a binding of 1"):
            Progress(folder, BINDING, rank, world_size)
    with pytest.raises(ValueError, match="3 ranks, and a binding of 2"):
        choose_point(folder, TWO, 3)


# files that were cut, changed, or are somebody else's


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _emptied(path: Path) -> None:
    path.write_bytes(b"")


def _garbled(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def _text(path: Path) -> None:
    path.write_text("no safetensors")


def _pickle(path: Path) -> None:
    torch.save({"state": 1}, path)


def _folder(path: Path) -> None:
    path.unlink()
    (path / "below").mkdir(parents=True)
    (path / "below" / "file").touch()


def _link(path: Path) -> None:
    path.rename(path.parent.parent / "elsewhere")
    path.symlink_to(path.parent.parent / "elsewhere")


def _dangling(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


INJURIES = [_cut, _emptied, _garbled, _text, _pickle, _folder, _link, _dangling, _pipe]


@pytest.mark.parametrize("injure", INJURIES)
def test_a_damaged_point_starts_over_with_a_line_and_the_next_save_takes_its_place(
    injure: Any, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    opened(folder).save({"n": 1})
    injure(folder / "000001-0of1.safetensors")
    caplog.clear()
    progress = opened(folder)
    assert progress.resume() is None
    (line,) = caplog.messages
    assert "starts over: 000001-0of1.safetensors: " in line
    progress.save({"n": 2})
    assert opened(folder).resume() == {"n": 2}
    remove(folder)
    assert not os.path.lexists(folder)


@pytest.mark.parametrize("injure", INJURIES)
def test_of_a_damaged_point_and_an_earlier_one_the_earlier_is_taken(
    injure: Any, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    progress = opened(folder)
    progress.save("earlier")
    shutil.copyfile(folder / "000001-0of1.safetensors", tmp_path / "kept")
    progress.save("later")
    # So it lies there when the process is killed before it removes the older one.
    (tmp_path / "kept").rename(folder / "000001-0of1.safetensors")
    injure(folder / "000002-0of1.safetensors")
    progress = opened(folder)
    assert progress.resume() == "earlier"
    assert "goes on from point 1 (000002-0of1.safetensors: " in caplog.text
    progress.save("anew")
    assert os.listdir(folder) == ["000002-0of1.safetensors"]


def test_a_point_that_is_damaged_after_it_was_chosen_starts_over_alone_and_is_an_error_for_one_of_several(folder: Path) -> None:
    opened(folder).save(1)
    _cut(folder / "000001-0of1.safetensors")
    assert opened(folder, point=1).resume() is None
    for progress in ranks(folder):
        progress.save("both")
    point = choose_point(folder, TWO, 2)
    _cut(folder / "000001-1of2.safetensors")
    assert Progress(folder, TWO, 0, 2, point).resume() == "both"
    with pytest.raises(StateError, match="the point that was chosen for all ranks is gone: 000001-1of2"):
        Progress(folder, TWO, 1, 2, point)
    assert choose_point(folder, TWO, 2) is None, "the next attempt starts over, with both ranks"


def test_a_disk_that_takes_nothing_is_told_once_and_the_evaluation_goes_on(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    progress = opened(folder)
    state = begin(progress, 4)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        progress.save("a")
        progress.save("b")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [line for line in caplog.messages if "is not saved" in line] == [
        f"progress is not saved, the evaluation goes on: File too large ({folder})"
    ]
    assert os.listdir(folder) == ["000003-0of1.safetensors"], "the older one is kept"
    assert begin(opened(folder), 1)["sum"] == 3 + state["sum"] - 3
    progress.save("c")
    assert os.listdir(folder) == ["000006-0of1.safetensors"], "ranks agree on which point is which"
    assert opened(folder).resume() == "c"


def test_a_folder_that_cannot_be_made_kills_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "missing" / "progress", tmp_path / "file", tmp_path / "file" / "progress"):
        caplog.clear()
        progress = opened(folder)
        state = {"seen": 0}
        for _ in progress.items("abc", state, 1):
            state["seen"] += 1
        assert state["seen"] == 3
        assert len([line for line in caplog.messages if "is not saved" in line]) == 1
        assert not has_progress(folder)
    assert (tmp_path / "file").read_bytes() == b""
    assert not (tmp_path / "missing").exists()


def test_the_folder_goes_with_all_that_is_in_it_and_nothing_that_is_linked_to(tmp_path: Path) -> None:
    folder = tmp_path / "step5.progress"
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").touch()
    opened(folder).save(1)
    (folder / "link").symlink_to(precious)
    (folder / "000009-0of1.safetensors").mkdir()
    (folder / "strange \n name").touch()
    os.mkfifo(folder / "pipe")
    (tmp_path / "alias").symlink_to(precious)
    for path in (folder, tmp_path / "alias", tmp_path / "none"):
        remove(path)
        assert not os.path.lexists(path)
    assert os.listdir(precious) == ["file"]


def test_what_a_killed_writer_left_is_removed_by_the_next_attempt(folder: Path) -> None:
    opened(folder).save(1)
    (folder / "000002-0of1.safetensors.tmp-01234567").touch()
    opened(folder)
    assert os.listdir(folder) == ["000001-0of1.safetensors"]


# items


@pytest.mark.parametrize("every", [1, 3, 4, 10, 100])
@pytest.mark.parametrize("count", range(1, 12))
def test_a_loop_goes_on_after_its_last_save(every: int, count: int, folder: Path) -> None:
    begin(opened(folder), count, every=every, items=10)
    done = (min(count - 1, 10) // every) * every if count <= 10 else 10
    state = {"sum": 0}
    left = list(opened(folder).items(range(10), state, every))
    assert (left, state["sum"]) == (list(range(done, 10)), sum(range(done)))


def test_a_loop_saves_after_every_so_many_items_and_after_the_last(folder: Path) -> None:
    for items, every, saves in ((10, 3, 4), (9, 3, 3), (2, 3, 1), (3, 1, 3), (0, 3, 1)):
        progress = opened(folder)
        points = []
        for _ in progress.items(iter(range(items)), {}, every):
            points.append(furthest(folder))
        assert points == [n // every for n in range(items)]
        assert furthest(folder) == saves
        remove(folder)


class Indexed(Sequence[int]):
    """Items that tell when they are looked at, and cannot be iterated otherwise."""

    def __init__(self) -> None:
        self.looked_at: list[int] = []

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: Any) -> Any:
        self.looked_at.append(index)
        return index


def test_what_was_done_is_skipped_without_a_look_in_a_sequence_and_passed_over_elsewhere(folder: Path) -> None:
    begin(opened(folder), 8, every=3, items=10)
    items = Indexed()
    copy = folder.with_name("copy")
    shutil.copytree(folder, copy)
    assert list(opened(copy).items(items, {}, 3)) == items.looked_at == [6, 7, 8, 9]
    remove(folder)
    begin_any = opened(folder).items(iter("abcdefghij"), {}, 3)
    list(itertools.islice(begin_any, 8))
    shutil.rmtree(copy)
    shutil.copytree(folder, copy)
    assert "".join(opened(copy).items(iter("abcdefghij"), {}, 3)) == "ghij"


class Unlooked:
    """A stream of unknown length that must not be touched."""

    def __len__(self) -> int:
        raise TypeError("no length")

    def __iter__(self) -> Iterator[int]:
        raise AssertionError("it was iterated")


def test_a_loop_that_had_ended_is_skipped_whole_with_the_state_it_ended_with(folder: Path) -> None:
    def evaluate(first: Any, kill_after: int) -> tuple[dict[str, Any], list[Any], list[int]]:
        progress = opened(folder)
        shared: dict[str, Any] = {"seen": []}
        between: list[Any] = []
        for item in progress.items(first, shared, 2):
            shared["seen"].append(item)
        between.append((list(shared["seen"]), progress.resume()))
        progress.save({"between": len(shared["seen"])})
        yielded = []
        for item in itertools.islice(progress.items(iter(range(10, 16)), shared, 2), kill_after):
            yielded.append(item)
            shared["seen"].append(item)
        return shared, between, yielded

    shared, between, _ = evaluate(iter(range(3)), 4)
    assert between == [([0, 1, 2], None)]
    shared, between, yielded = evaluate(Unlooked(), 2)
    assert between == [([0, 1, 2], {"between": 3})], "code between the loops sees what it saw before"
    assert yielded == [12, 13]
    shared, between, yielded = evaluate(Unlooked(), 100)
    assert (shared["seen"], yielded) == ([0, 1, 2, *range(10, 16)], [12, 13, 14, 15])
    assert opened(folder).resume() == {"between": 3}


def test_a_kill_after_the_last_item_loses_nothing(folder: Path) -> None:
    state = begin(opened(folder), 1000, every=7, items=20)
    assert state["sum"] == sum(range(20))
    state = {"sum": 0}
    assert list(opened(folder).items(range(20), state, 7)) == []
    assert state["sum"] == sum(range(20))


def test_loops_are_told_from_each_other_by_name_in_whatever_order_they_come(folder: Path) -> None:
    progress = opened(folder)
    for name in ("arc", "piqa"):
        state = {"seen": ""}
        for item in itertools.islice(progress.items(name, state, 1, name=name), 3):
            state["seen"] += item
    progress = opened(folder)
    for name in ("piqa", "arc"):
        state = {"seen": ""}
        assert "".join(progress.items(name, state, 1, name=name)) == name[2:]
        assert state["seen"] == name[:2]


def test_loops_within_loops_need_names_of_their_own(folder: Path) -> None:
    def evaluate(progress: Progress, stop: int) -> list[str]:
        seen = []
        outer: dict[str, Any] = {"sum": 0}
        for group in progress.items(range(3), outer, 1, name="groups"):
            inner = {"sum": 0}
            for item in progress.items(range(4), inner, 2, name=f"group {group}"):
                seen.append(f"{group}{item}")
                if len(seen) == stop:
                    return seen
                inner["sum"] += item
            outer["sum"] += inner["sum"]
        assert outer["sum"] == 18
        return seen

    everything = [f"{group}{item}" for group in range(3) for item in range(4)]
    assert evaluate(opened(folder), 8) == everything[:8]
    assert evaluate(opened(folder), 100) == everything[6:]
    progress = opened(folder.with_name("other"))
    for _ in progress.items(range(3), {}, 1):
        with pytest.raises(ValueError, match="within another one, or after one that was left and not closed, needs a name="):
            progress.items(range(3), {}, 1)
    list(progress.items(range(3), {}, 1))


def test_the_dict_stays_the_same_and_keeps_its_kind(folder: Path) -> None:
    def count(letters: str, progress: Progress) -> collections.Counter[str]:
        counter: collections.Counter[str] = collections.Counter(stale=1)
        del counter["stale"]
        for letter in itertools.islice(progress.items("abracadabra", counter, 2), len(letters)):
            counter[letter] += 1
        return counter

    count("abraca", opened(folder))
    assert count("all of them", opened(folder)) == collections.Counter("abracadabra")


def test_a_tensor_goes_back_to_the_device_of_the_one_in_its_place(folder: Path) -> None:
    state: dict[str, Any] = {"a": [torch.ones(2), {"b": torch.ones(3)}], "c": torch.ones(1), "d": np.ones(1)}
    list(itertools.islice(opened(folder).items(range(3), state, 1), 2))
    fresh: dict[str, Any] = {"a": [torch.ones(2, device="meta"), {"b": torch.ones(3, device="meta")}, 5], "d": torch.ones(1)}
    next(opened(folder).items(range(3), fresh, 1))
    assert fresh["a"][0].is_meta
    assert fresh["a"][1]["b"].is_meta
    assert (fresh["c"].device.type, type(fresh["d"])) == ("cpu", np.ndarray)


def test_what_items_cannot_work_with_is_an_error_at_the_call(folder: Path) -> None:
    progress = opened(folder)
    with pytest.raises(ValueError, match="every 1 item or more, not 0"):
        progress.items([1], {}, 0)
    with pytest.raises(TypeError, match="a dict as its state, not a list"):
        progress.items([1], [], 1)  # type: ignore[arg-type]
    progress.items([1], {}, 1, name="a")
    with pytest.raises(ValueError, match="have the name 'a'"):
        progress.items([1], {}, 1, name="a")


@pytest.mark.parametrize(
    ("items", "words"),
    [(range(9), "9 items, which were 10"), ("abc", "3 items, which were 10"), (iter("abc"), "None items, which were 10")],
)
def test_another_number_of_items_is_an_error_and_the_next_attempt_starts_over(items: Any, words: str, folder: Path) -> None:
    begin(opened(folder), 8, every=3, items=10)
    with pytest.raises(EvaluatorError, match=f"given {words} when they were saved.*the next one starts over"):
        list(opened(folder).items(items, {}, 3))
    assert list(opened(folder).items("abc", {}, 3)) == ["a", "b", "c"]


def test_a_stream_that_has_become_shorter_is_an_error(folder: Path) -> None:
    list(itertools.islice(opened(folder).items(iter(range(10)), {}, 3), 8))
    with pytest.raises(EvaluatorError, match="given 2 items, of which 6 were done"):
        list(opened(folder).items(iter(range(2)), {}, 3))
    assert not has_progress(folder)


# report


def test_a_report_reaches_whoever_asked_and_never_raises(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    told: list[tuple[int, int | None]] = []
    progress = opened(folder, on_report=lambda done, total: told.append((done, total)))
    progress.report(1, 10)
    progress.report(2)
    assert told == [(1, 10), (2, None)]

    def broken(done: int, total: int | None) -> None:
        raise OSError("gone")

    progress = opened(folder, on_report=broken)
    progress.report(1, 10)
    progress.report(2, 10)
    assert caplog.messages == ["how far the evaluation is cannot be shown: OSError: gone"]


# several ranks


def test_a_point_counts_when_all_ranks_have_saved_it(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    first, second, _ = ranks(folder, 3)
    for n in range(4):
        first.save(f"first {n}")
    second.save("second 0")
    assert choose_point(folder.with_name("none"), replace(BINDING, world_size=3), 3) is None
    assert [p.resume() for p in ranks(folder, 3)] == [None] * 3
    assert "starts over: no point that all 3 ranks have saved" in caplog.text
    for progress, saves in zip(ranks(folder, 3), (2, 5, 3), strict=True):
        for n in range(saves):
            progress.save(n)
    assert [p.resume() for p in ranks(folder, 3)] == [1, 1, 1]


def test_a_rank_removes_what_is_older_than_the_newest_that_all_have_and_keeps_what_is_newer(folder: Path) -> None:
    first, second = ranks(folder)
    for n in range(4):
        first.save(n)
    assert len(os.listdir(folder)) == 4
    second.save(0)
    second.save(1)
    assert sorted(os.listdir(folder)) == [f"00000{n}-{r}of2.safetensors" for n, r in ((1, 0), (2, 0), (2, 1), (3, 0), (4, 0))]
    first.save(4)
    assert sorted(os.listdir(folder)) == [f"00000{n}-{r}of2.safetensors" for n, r in ((2, 0), (2, 1), (3, 0), (4, 0), (5, 0))]


def test_one_damaged_file_of_one_rank_takes_all_ranks_back(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    first, second = ranks(folder)
    first.save(1)
    first.save(2)
    second.save(1)
    shutil.copytree(folder, folder.with_name("before"))
    second.save(2)
    shutil.copyfile(folder.with_name("before") / "000001-1of2.safetensors", folder / "000001-1of2.safetensors")
    _garbled(folder / "000002-1of2.safetensors")
    assert [p.resume() for p in ranks(folder)] == [1, 1]
    assert "000002-1of2.safetensors: was damaged" in caplog.text


def test_another_world_size_starts_over(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    for progress in ranks(folder, 2):
        progress.save("two")
    assert opened(folder).resume() is None
    assert "starts over: world_size was 2 and is 1" in caplog.text
    assert os.listdir(folder) == []


def test_a_rank_that_opens_late_never_brings_its_old_points_back(folder: Path) -> None:
    first, second = ranks(folder)
    for n in range(1, 8):
        first.save(f"old {n}")
        if n <= 3:
            second.save(f"old {n}")
    # The second attempt: rank 0 is slow to start, rank 1 saves point 4 to 7, and both are killed.
    assert choose_point(folder, TWO, 2) == 3
    second = Progress(folder, TWO, 1, 2, 3)
    for n in range(4, 8):
        second.save(f"new {n}")
    assert [p.resume() for p in ranks(folder)] == ["old 3", "old 3"]


@pytest.mark.parametrize("seed", range(4))
def test_whatever_the_ranks_do_they_resume_from_states_of_the_same_attempts(seed: int, folder: Path) -> None:
    """Ranks open and save in a random order and are all killed; each state tells in which attempt each of its points was saved."""
    chance = random.Random(seed)
    world_size = chance.choice((2, 3))
    binding = replace(BINDING, world_size=world_size)
    furthest_of_all = 0
    for attempt in range(12):
        point = choose_point(folder, binding, world_size)
        assert (point or 0) == furthest(folder) >= furthest_of_all
        furthest_of_all = point or 0
        running: dict[int, tuple[Progress, list[int]]] = {}
        resumed = []
        for _ in range(chance.randrange(20)):
            rank = chance.randrange(world_size)
            if rank not in running:
                progress = Progress(folder, binding, rank, world_size, point)
                running[rank] = progress, progress.resume() or []
                resumed.append(list(running[rank][1]))
            else:
                progress, history = running[rank]
                history.append(attempt)
                progress.save(history)
        assert all(history == resumed[0] and len(history) == (point or 0) for history in resumed)
    assert furthest_of_all > 5


# real processes, killed

SCENE = r"""
import os, sys
from pathlib import Path
import numpy as np
from assayer.progress import Binding, Progress

folder, rank, world_size, point, items = Path(sys.argv[1]), *map(int, sys.argv[2:6])
binding = Binding("5e1f", "regular", "loss", "a1b2", {"limit": 5}, world_size)
progress = Progress(folder, binding, rank, world_size, point or None)
state = {"sum": np.zeros(4, np.float32), "count": 0, "losses": []}
for loop, batches in enumerate((range(items), iter(range(items // 2)))):
    for index in progress.items(batches, state, every=3):
        # In one piece: a kill cuts no line.
        os.write(1, f"{loop} {index}\n".encode())
        batch = np.random.default_rng((loop, rank, index)).normal(size=(7, 4)).astype(np.float32)
        state["sum"] += batch.sum(0)
        state["count"] += len(batch)
        state["losses"].append(float(batch.mean()))
    if progress.resume() is None:
        progress.save({"after the first": state["count"]})
os.write(1, f"end {progress.resume()} {state['count']} {state['losses']!r} {state['sum'].tolist()!r}\n".encode())
"""

SCENES = replace(BINDING, arguments={"limit": 5})


class Attempt:
    """One process of the scene, and the batches that it has printed."""

    def __init__(self, folder: Path, items: int, rank: int = 0, world_size: int = 1, point: int | None = None) -> None:
        words = [sys.executable, "-c", SCENE, folder, rank, world_size, point or 0, items]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        self.process = subprocess.Popen(list(map(str, words)), cwd=REPOSITORY, stdout=subprocess.PIPE, text=True, env=environment)
        self.lines: list[str] = []

    def until(self, lines: int) -> None:
        """Reads so many batches, or to the end."""
        assert self.process.stdout
        self.lines += itertools.islice(self.process.stdout, lines)

    def kill(self) -> list[str]:
        """Kills it, wherever it is by now, and returns all that it had printed."""
        self.process.kill()
        return self.rest()

    def rest(self) -> list[str]:
        with self.process:
            self.until(1_000_000)
        return self.lines


def batches_of(items: int) -> list[str]:
    return [f"0 {n}\n" for n in range(items)] + [f"1 {n}\n" for n in range(items // 2)]


def end_of(items: int, rank: int = 0) -> str:
    """What the scene prints last when nobody kills it: the same batches in a plain loop."""
    total, count, losses = np.zeros(4, np.float32), 0, []
    for loop, number in enumerate((items, items // 2)):
        for index in range(number):
            batch = np.random.default_rng((loop, rank, index)).normal(size=(7, 4)).astype(np.float32)
            total += batch.sum(0)
            count += len(batch)
            losses.append(float(batch.mean()))
    return f"end {{'after the first': {7 * items}}} {count} {losses!r} {total.tolist()!r}\n"


def saves_of(items: int, every: int = 3) -> list[int]:
    """The number of batches done at each of the scene's points, from point 0 on."""
    first = [n for n in range(items + 1) if n % every == 0 or n == items]
    second = [items + n for n in range(1, items // 2 + 1) if n % every == 0 or n == items // 2]
    return [*first, items, *second]


def went_on(attempts: list[list[str]], items: int) -> None:
    """Asserts that each attempt began after the last save of the one before, and went through the same batches in the same order."""
    everything = batches_of(items)
    done = 0
    for lines in attempts:
        batches = [line for line in lines if line[0] in "01"]
        if batches:
            begin = everything.index(batches[0])
            # The last batch that was printed may have been done and saved, or not.
            assert begin in [max(n for n in saves_of(items) if n <= at) for at in (max(done - 1, 0), done)]
            assert batches == everything[begin : begin + len(batches)]
            done = begin + len(batches)
    assert done == len(everything)


def killed_often(folder: Path, items: int, kills: int, chance: random.Random) -> list[list[str]]:
    """What each attempt has printed: all but the last are killed somewhere."""
    attempts: list[list[str]] = []
    while len(attempts) < kills and not (attempts and attempts[-1][-1:] == [end_of(items)]):
        attempt = Attempt(folder, items)
        attempt.until(chance.randrange(1, 9))
        attempts.append(attempt.kill())
    return [*attempts, Attempt(folder, items).rest()]


def test_an_evaluation_killed_at_any_moment_sees_the_same_batches_and_comes_to_equal_sums(folder: Path) -> None:
    undisturbed = Attempt(folder, 40).rest()
    assert undisturbed == [*batches_of(40), end_of(40)]
    remove(folder)
    attempts = killed_often(folder, 40, 5, random.Random(0))
    assert attempts[-1][-1] == end_of(40)
    went_on(attempts, 40)
    assert len(attempts) > 2, "it was killed in the middle"
    assert len(os.listdir(folder)) == 1
    remove(folder)
    assert os.listdir(folder.parent) == []


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_an_evaluation_killed_a_hundred_times_comes_to_equal_sums(folder: Path) -> None:
    kills = 0
    for seed in itertools.count():
        attempts = killed_often(folder, 100, 10, random.Random(seed))
        assert attempts[-1][-1] == end_of(100)
        went_on(attempts, 100)
        kills += len([lines for lines in attempts[:-1] if end_of(100) not in lines])
        remove(folder)
        if kills >= 100:
            break


WORST = """
import os, signal, sys
from pathlib import Path
from assayer.progress import Binding, Progress, remove

folder = Path(sys.argv[1])

def evaluate(kill_at):
    calls = 0

    def counted(function):
        def call(*words, **more):
            nonlocal calls
            calls += 1
            if calls == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*words, **more)

        return call

    for name in ("mkdir", "open", "replace", "unlink", "fsync", "listdir"):
        setattr(os, name, counted(getattr(os, name)))
    progress = Progress(folder, Binding("5e1f", "regular", "loss", "a1b2", {}, 1))
    state = {"seen": []}
    for item in progress.items(range(7), state, every=2):
        state["seen"].append(item)
    if state["seen"] != list(range(7)) or len(os.listdir(folder)) != 1:
        os._exit(3)

def ended_with(kill_at):
    pid = os.fork()
    if pid == 0:
        evaluate(kill_at)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

moment, ended = 0, -signal.SIGKILL
while ended == -signal.SIGKILL:
    moment += 1
    ended = ended_with(moment)
    # Once more at the same call, then to the end.
    print(moment, ended, ended_with(moment) in (0, -signal.SIGKILL), ended_with(0), flush=True)
    remove(folder)
"""


def test_a_kill_at_any_system_call_of_a_save_loses_no_batch_and_leaves_no_file(folder: Path) -> None:
    done = subprocess.run([sys.executable, "-c", WORST, str(folder)], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    *killed, last = done.stdout.splitlines()
    assert len(killed) > 20
    assert killed == [f"{moment} -9 True 0" for moment in range(1, len(killed) + 1)]
    assert last == f"{len(killed) + 1} 0 True 0"
    assert os.listdir(folder.parent) == []


def start_all(folder: Path, items: list[int], binding: Binding) -> tuple[int | None, list[Attempt]]:
    point = choose_point(folder, binding, binding.world_size)
    return point, [Attempt(folder, n, rank, len(items), point) for rank, n in enumerate(items)]


@pytest.mark.parametrize("items", [[24, 24], [24, 17, 20]], ids=str)
def test_ranks_killed_at_different_points_resume_from_the_same_one_and_never_wait(items: list[int], folder: Path) -> None:
    binding = replace(SCENES, world_size=len(items))
    chance = random.Random(len(items))
    points = []
    for turn in range(4):
        point, attempts = start_all(folder, items, binding)
        points.append(point or 0)
        for rank, (attempt, n) in enumerate(zip(attempts, items, strict=True)):
            # One after another comes to its own moment: were it to wait for another, it would never come there.
            attempt.until(chance.randrange(4, 12) if turn < 3 else 1_000_000)
            lines = attempt.kill() if turn < 3 else attempt.rest()
            everything = [*batches_of(n), end_of(n, rank)]
            assert not lines or lines[0] == everything[saves_of(n)[point or 0]], "each begins at the point that was chosen"
            assert turn < 3 or lines[-1] == everything[-1]
    assert points == sorted(points)
    assert points[-1] > 0, "all had saved something"
    remove(folder)
    assert os.listdir(folder.parent) == []


def test_when_one_rank_alone_is_killed_both_go_on_from_where_both_had_come(folder: Path) -> None:
    binding = replace(SCENES, world_size=2)
    expected = [end_of(20, rank) for rank in range(2)]
    _, (first, second) = start_all(folder, [20, 20], binding)
    second.until(8)
    second.kill()
    assert first.rest()[-1] == expected[0], "the other one does not notice"
    point, attempts = start_all(folder, [20, 20], binding)
    assert point is not None
    assert point >= 2
    ends = [attempt.rest() for attempt in attempts]
    assert [lines[-1] for lines in ends] == expected
    assert ends[0][0] == ends[1][0], "from the same batch"


def test_with_another_number_of_processes_it_starts_over(folder: Path) -> None:
    _, attempts = start_all(folder, [12, 12], replace(SCENES, world_size=2))
    for attempt in attempts:
        attempt.until(8)
        attempt.kill()
    assert has_progress(folder)
    lines = Attempt(folder, 12).rest()
    assert (lines[0], lines[-1]) == ("0 0\n", end_of(12))


# the README's evaluator


class Killed(BaseException):
    """What stands for a kill."""


def test_the_readmes_evaluator_goes_on_to_the_same_number(folder: Path, tmp_path: Path) -> None:
    section = (REPOSITORY / "README.md").read_text().split("### An evaluation that goes on where it was")[1]
    code = section.split("```python\n")[1].split("```")[0]
    names: dict[str, Any] = {}
    exec(code, names)
    torch.save({"w": torch.arange(8.0)}, tmp_path / "model.pt")
    checkpoint = str(tmp_path / "model.pt")
    expected = names["loss"](checkpoint, progress=opened(folder))
    remove(folder)
    assert expected["loss"] > 0

    def end_at(done: int, total: int | None) -> None:
        if done == 350:
            raise Killed

    with pytest.raises(Killed):
        names["loss"](checkpoint, progress=opened(folder, on_report=end_at))
    told: list[int] = []
    assert names["loss"](checkpoint, progress=opened(folder, on_report=lambda done, total: told.append(done))) == expected
    assert told[0] == 301
    json.dumps(expected)
