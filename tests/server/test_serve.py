"""What the server's process does for itself: slow clients, the names of the tasks."""

import asyncio
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn
from conftest import until
from starlette.types import Receive, Scope, Send

from assayer.errors import ProtocolError
from assayer.server import serve
from assayer.server.tasks import Tasks


async def application(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """A server that waits a fifth of a second for headers."""
    monkeypatch.setattr(serve, "HEADERS_TIMEOUT", 0.2)
    listening = serve.bind("127.0.0.1", 0)
    server = uvicorn.Server(serve._config(application))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listening])))
    thread.start()
    until(lambda: server.started)
    yield listening.getsockname()[1]
    server.should_exit = True
    thread.join()


def ended(connection: socket.socket, within: float) -> bool:
    """True when the server closes the connection in time."""
    connection.settimeout(within)
    try:
        return connection.recv(100) == b""
    except TimeoutError:
        return False


@pytest.mark.parametrize("sent", [b"", b"G", b"GET / HTTP/1.1\r\nHost: x\r\n"])
def test_a_client_that_never_ends_its_request_is_cut_off(port: int, sent: bytes) -> None:
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(sent)
        assert ended(connection, 10)


def test_so_is_one_that_never_ends_its_second_request(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port)) as connection:
        for _ in range(3):
            connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            answer = b""
            while not answer.endswith(b"ok"):
                answer += connection.recv(1000)
            assert not ended(connection, 0.5), "between two requests it may be silent for longer"
        connection.sendall(b"G")
        began = time.monotonic()
        assert ended(connection, 10)
        assert time.monotonic() - began < 5


def test_the_names_of_a_package_that_is_broken_are_asked_for_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    good = "class TaskManager:\n    all_tasks = ['a_task']\n    def __init__(self, **_): pass\n"
    for package, text in (("lm_eval", good), ("lmms_eval", "raise ImportError('no such luck')")):
        folder = tmp_path / "site" / package
        folder.mkdir(parents=True)
        (folder / "__init__.py").touch()
        (folder / "tasks.py").write_text(text)
    assert asyncio.run(Tasks(tmp_path, None).names()) == ["a_task"]
    assert not list(tmp_path.glob("tasks-*"))
    (tmp_path / "site" / "lmms_eval" / "tasks.py").write_text(good.replace("a_task", "another"))
    assert asyncio.run(Tasks(tmp_path, None).names()) == ["a_task", "another"]
    assert len(list(tmp_path.glob("tasks-*"))) == 1


def test_names_that_cannot_be_asked_for_are_no_empty_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(ProtocolError):
        asyncio.run(Tasks(tmp_path, None).names())
    assert os.listdir(tmp_path) == []
