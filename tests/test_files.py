"""Files whole or absent, locks, and safe names."""

import os
import socket
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import REPOSITORY

from assayer import files
from assayer.errors import StateError


def test_a_file_is_replaced_whole_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    files.write_json(path, {"n": 1})
    files.write_json(path, {"n": 2})
    assert files.read_json(path) == {"n": 2}
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    files.write_json(path, {"n": 1})

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        files.write_json(path, {"n": 2})
    assert files.read_json(path) == {"n": 1}
    assert os.listdir(tmp_path) == ["a.json"]


def test_what_a_killed_writer_left_is_removed_by_the_next_and_a_living_writers_file_is_not(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    source = "import os, sys, time; from pathlib import Path; from assayer import files; "
    source += "os.replace = lambda *_: (print(flush=True), time.sleep(60)); files.write_json(Path(sys.argv[1]), {})"
    with subprocess.Popen([sys.executable, "-c", source, str(path)], cwd=REPOSITORY, stdout=subprocess.PIPE) as writer:
        assert writer.stdout
        writer.stdout.readline()
        (unfinished,) = os.listdir(tmp_path)
        files.write_json(path, {"n": 1})
        assert sorted(os.listdir(tmp_path)) == ["a.json", unfinished], "its writer lives"
        writer.kill()
    files.write_json(tmp_path / "b.json", {"n": 2})
    assert unfinished in os.listdir(tmp_path), "it is not this name's"
    files.write_json(path, {"n": 3})
    assert sorted(os.listdir(tmp_path)) == ["a.json", "b.json"]


def test_a_folder_can_be_rid_of_all_that_killed_writers_left_and_loses_nothing_else(tmp_path: Path) -> None:
    kept = ["a.json", "b.json.tmp-0123456", "b.json.tmp-01234567.txt", "c.tmp"]
    for name in [*kept, "a.json.tmp-01234567", "b.json.tmp-89abcdef"]:
        (tmp_path / name).touch()
    files.remove_left_over(tmp_path)
    assert sorted(os.listdir(tmp_path)) == kept
    files.remove_left_over(tmp_path / "none")


def test_many_writers_of_one_name_at_a_time_take_nothing_from_each_other(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: files.write_json(path, {"n": n}), range(400)))
    assert set(files.read_json(path)) == {"n"}
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_name_that_is_no_utf_8_survives_the_way_through_json(tmp_path: Path) -> None:
    name = os.fsdecode(b"model_\xff.pt")
    files.write_json(tmp_path / "a.json", {"path": name})
    assert files.read_json(tmp_path / "a.json") == {"path": name}


def test_what_is_no_json_reads_as_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"half')
    assert files.read_json(tmp_path / "a.json") is None
    assert files.read_json(tmp_path / "none.json") is None


def test_a_lock_has_one_holder_and_looking_does_not_take_it(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    first, second = files.lock_file(path), files.lock_file(path)
    assert not files.is_locked(path)
    assert files.try_lock(first, path)
    assert files.is_locked(path)
    assert not files.try_lock(second, path)
    os.close(first)
    assert not files.is_locked(path)
    assert files.try_lock(second, path)
    os.close(second)


def test_two_lists_of_parts_never_share_a_digest_by_their_seams() -> None:
    assert files.digest("ab", "c") != files.digest("a", "bc")
    assert files.digest("a") == files.digest(b"a")


def test_natural_order_reads_numbers_as_numbers() -> None:
    assert sorted(["s10", "s9", "s1a", "a", "9"], key=files.natural_key) == ["9", "a", "s1a", "s9", "s10"]


def test_what_moves_a_cursor_is_shown_as_an_escape() -> None:
    assert files.printable("a\n\x1b[31mü \u202e") == "a\\n\\x1b[31mü \\u202e"


@pytest.mark.parametrize("name", ["x" * 255, "ü" * 127, "short"])
def test_a_long_name_leaves_room_and_stays_different_from_its_neighbours(name: str) -> None:
    short = files.short_name(name, 40)
    assert len(os.fsencode(short)) <= 215
    assert short == name if len(os.fsencode(name)) <= 215 else short != files.short_name(name[:-1] + "y", 40)


def test_a_private_directory_that_is_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(StateError, match="not a directory of this user"):
        files.private_directory(tmp_path / "link")


def test_a_private_directory_that_others_may_enter_is_closed(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    files.private_directory(tmp_path / "open")
    assert stat.S_IMODE((tmp_path / "open").stat().st_mode) == 0o700


def test_what_is_no_file_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind("socket")
    for name in ("pipe", "socket", "/dev/zero", "."):
        with pytest.raises(OSError, match="not a regular file"):
            files.open_file(Path(name))
        assert files.read_json(Path(name)) is None


def test_json_of_gigabytes_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("1")
    assert files.read_json(tmp_path / "a.json") == 1
    os.truncate(tmp_path / "a.json", 100 << 30)
    assert files.read_json(tmp_path / "a.json") is None
