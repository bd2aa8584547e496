"""The ledger of what was published: lines that count whole or not at all."""

import os
import threading
import time
from pathlib import Path

import pytest
from conftest import until

from assayer.errors import StateError
from assayer.ledger import opened
from assayer.points import Point

ONE = Point("k1", "i1", 5, 1.5, {"eval/acc": 0.5}, "accuracy", "/r/1.json")
TWO = Point("k2", "i2", 6, 2.5, {"eval/acc": 0.6, "eval/loss": 2.0}, "other", "/r/2.json")


def test_what_was_intended_and_not_done_is_doubtful(tmp_path: Path) -> None:
    path = tmp_path / "t.ledger"
    with opened(path, 1) as ledger:
        ledger.intend([ONE, TWO])
        ledger.done([ONE])
        ledger.remember({"run": "abc"})
        uid = ledger.uid
    with opened(path, 1) as ledger:
        assert list(ledger.pending.values()) == [Point(**TWO.to_json(), doubtful=True)]
        assert ledger.keys == {"k1", "k2"}
        assert ledger.ids == {"i1", "i2"}
        assert ledger.owners == {"eval/acc": "accuracy", "eval/loss": "other"}
        assert ledger.facts == {"uid": uid, "run": "abc"}


@pytest.mark.parametrize("cut", [1, 20, 60])
def test_a_torn_line_counts_as_none_and_the_next_one_counts(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "t.ledger"
    with opened(path, 1) as ledger:
        ledger.intend([ONE])
        whole = path.stat().st_size
        ledger.intend([TWO])
    os.truncate(path, path.stat().st_size - cut)
    if cut == 1:
        # All of it is there but its end: it counts.
        with opened(path, 1) as ledger:
            assert set(ledger.pending) == {"i1", "i2"}
        return
    with opened(path, 1) as ledger:
        assert set(ledger.pending) == {"i1"}
        ledger.done([ONE])
    with opened(path, 1) as ledger:
        assert not ledger.pending
        ledger.intend([TWO])
    with opened(path, 1) as ledger:
        assert set(ledger.pending) == {"i2"}
    assert path.stat().st_size > whole


@pytest.mark.parametrize(
    "garbage", [b"\0" * 4096 + b"\n", b"[]\n3\nnull\n", b'{"intend": [{"key": 1}]}\n', b'{"done": 3}\n{"facts": []}\n', b"\xff\xfe\n"]
)
def test_what_is_no_line_of_ours_is_passed_over(tmp_path: Path, garbage: bytes) -> None:
    path = tmp_path / "t.ledger"
    path.write_bytes(garbage)
    with opened(path, 1) as ledger:
        ledger.intend([ONE])
    with opened(path, 1) as ledger:
        assert set(ledger.pending) == {"i1"}


def test_a_second_publisher_waits_for_the_first_and_then_sees_what_it_did(tmp_path: Path) -> None:
    path = tmp_path / "t.ledger"
    seen: list[set[str]] = []

    def second() -> None:
        with opened(path, 30) as ledger:
            seen.append(set(ledger.ids))

    with opened(path, 1) as ledger:
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(0.2)
        assert not seen
        ledger.intend([ONE])
        ledger.done([ONE])
    until(lambda: seen == [{"i1"}])
    thread.join()


def test_one_that_waits_too_long_says_who_is_in_the_way(tmp_path: Path) -> None:
    path = tmp_path / "t.ledger"
    with (
        opened(path, 1),
        pytest.raises(StateError, match=r"t\.ledger is held by another publisher; publish again later"),
        opened(path, 0.1),
    ):
        pass


def test_a_ledger_that_was_removed_while_one_waited_is_made_anew(tmp_path: Path) -> None:
    path = tmp_path / "t.ledger"
    done: list[bool] = []

    def second() -> None:
        with opened(path, 30) as ledger:
            ledger.intend([ONE])
        done.append(True)

    with opened(path, 1):
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(0.2)
        path.unlink()
    until(lambda: done)
    thread.join()
    with opened(path, 1) as ledger:
        assert set(ledger.pending) == {"i1"}


def test_a_full_disk_is_one_line_and_nothing_is_intended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "t.ledger"
    with opened(path, 1) as ledger:
        before = path.read_bytes()

        def full(descriptor: int, data: bytes) -> int:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patched:
            patched.setattr(os, "write", full)
            with pytest.raises(StateError, match=r"cannot write .*t\.ledger: No space left on device"):
                ledger.intend([ONE])
        assert not ledger.pending
        assert path.read_bytes() == before
        ledger.intend([TWO])
    with opened(path, 1) as ledger:
        assert set(ledger.pending) == {"i2"}


def test_a_folder_that_is_away_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="cannot open"), opened(tmp_path / "none" / "t.ledger", 1):
        pass
