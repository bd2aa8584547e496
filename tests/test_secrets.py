"""A Redis behind a password and TLS serves like any other, and what opens it is shown to nobody."""

import contextlib
import os
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from conftest import REPOSITORY, House, until

from assayer.cli import without_secrets
from assayer.errors import RedisError, UsageError
from assayer.queues import Connection
from assayer.queues.connect import connect, target, without_password
from assayer.queues.embedded import find_binary

pytestmark = pytest.mark.usefixtures("without_torch")

# A user and a password with everything that has a meaning in a URL; no other text of a test holds either.
USER = "alice:w@nda"
PASSWORD = "s3cr:t/p@ss?w#rd%40[x] ü"
IN_URL = f"{quote(USER, safe='')}:{quote(PASSWORD, safe='')}"
SPELLINGS = [word.encode() for word in (USER, PASSWORD, quote(USER, safe=""), quote(PASSWORD, safe=""), "s3cr:t", "s3cr%3At")]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.fixture
def guarded() -> Iterator[tuple[int, Path]]:
    """A server that lets in one user (by name, and the nameless one) with the password: its port and its socket."""
    # The socket's path has at most 107 bytes.
    folder = Path(tempfile.mkdtemp(prefix="assayer-test-"))
    port, path = free_port(), folder / "guarded.sock"
    config = folder / "conf"
    hexed = "".join(f"\\x{byte:02x}" for byte in PASSWORD.encode())
    rules = "~* &* +@all"
    config.write_text(
        f'port {port}\nbind 127.0.0.1\nunixsocket {path}\nsave ""\ndir {folder}\n'
        f'requirepass "{hexed}"\nuser "{USER}" on ">{hexed}" {rules}\nuser reader on ">{hexed}" ~* -@all +ping\n'
    )
    config.chmod(0o600)
    with subprocess.Popen([find_binary(), config], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            until(path.exists)
            yield port, path
        finally:
            process.kill()
            process.wait()
            shutil.rmtree(folder)


def command_lines() -> dict[int, bytes]:
    """The command line of every process of this machine."""
    found = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError):
                found[int(name)] = Path("/proc", name, "cmdline").read_bytes()
    return found


def tells(data: bytes) -> list[bytes]:
    return [secret for secret in SPELLINGS if secret in data]


def held_in(connection: Connection) -> Iterator[bytes]:
    """Everything that a Redis holds, with what RQ has packed unpacked."""
    for key in connection.scan_iter(count=1000):
        yield key
        kind = connection.type(key)
        values: Any = {
            b"string": lambda k: [connection.get(k)],
            b"hash": lambda k: [part for pair in connection.hgetall(k).items() for part in pair],
            b"list": lambda k: connection.lrange(k, 0, -1),
            b"set": connection.smembers,
            b"zset": lambda k: connection.zrange(k, 0, -1),
            b"stream": lambda k: [repr(connection.xrange(k)).encode()],
            # It has gone since it was found.
            b"none": lambda k: [],
        }[kind](key)
        for value in values:
            yield value or b""
            with contextlib.suppress(zlib.error):
                yield zlib.decompress(value)


def shows_nothing(house: House, connection: Connection) -> None:
    """No process, record, log, plan or job of this house holds a secret where another user could read it."""
    # Of this house alone: others' tests of the same secrets run beside this one.
    ours = house.processes()
    assert not {pid: line for pid, line in command_lines().items() if tells(line) and pid in ours}
    # What is held comes and goes under the walk.
    for path in (Path(folder, name) for folder, _, names in os.walk(house.root) for name in names):
        try:
            found = path.is_file() and tells(path.read_bytes())
        except FileNotFoundError:
            continue
        if path.name == "wanted.json":
            assert found and path.stat().st_mode & 0o077 == 0 and path.parent.stat().st_mode & 0o077 == 0
        else:
            assert not found, path
    assert not [value for value in held_in(connection) if tells(value)]


CALLS = {
    "module": ([sys.executable, "-X", "utf8", "-W", "default::UserWarning", "-m", "assayer", "watch"], "--redis_url", False),
    "folder": ([sys.executable, "-m", "assayer.watch"], "--redis-url", True),
    "script": ([str(Path(sys.executable).parent / "assayer"), "watch"], "--redis-url", False),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_password_on_the_command_line_is_gone_while_the_watch_stands(house: House, guarded: tuple[int, Path], call: str) -> None:
    # Given: a URL with a password among the words of a watch in the foreground
    before, flag, joined = CALLS[call]
    url = f"redis://{IN_URL}@127.0.0.1:{guarded[0]}/0"
    named = [f"{flag}={url}"] if joined else [flag, url]
    words = ["--directory", "runs", *named, "--evaluator", "evaluator.py:mean", "--polling_interval", "1", "--num_eval_workers", "1"]
    environment = house.environment | {"PYTHONPATH": str(REPOSITORY)}
    # When: it runs in a directory of its own, and a checkpoint comes
    with subprocess.Popen([*before, *words], cwd=house.root, env=environment, stdin=subprocess.DEVNULL, stdout=-1, stderr=-2) as process:
        try:
            until(lambda: any(house.state.glob("workers/*/*/wanted.json")))
            house.save("model_step1.pt")
            until(lambda: house.record("model_step1.pt"))
            # Then: the process is the one that was started, with every other word, and nothing holds the secret
            line = command_lines()[process.pid].split(b"\0")[1:-1]
            kept = [*(before if call == "script" else before[1:]), *(word for word in words if word not in named)]
            assert line == [word.encode() for word in kept]
            shows_nothing(house, connect(url))
            for more in ([], ["--json"]):
                status = subprocess.run([sys.executable, "-m", "assayer", "status", *more, *named], capture_output=True, env=environment)
                assert b"model_step1.pt" in status.stdout
                assert not tells(status.stdout + status.stderr)
        finally:
            process.terminate()
            said, _ = process.communicate(timeout=60)
    assert not tells(said), said
    assert b"model_step1.pt mean finished" in said


@pytest.mark.parametrize(
    ("words", "left", "url"),
    [
        (["watch", "--redis_url", "redis://:p@h", "--once"], ["watch", "--once"], "redis://:p@h"),
        (["--redis-url=rediss://u:p@h/0?x=y=z"], [], "rediss://u:p@h/0?x=y=z"),
        (["--redis_url=unix:///s?password=p"], [], "unix:///s?password=p"),
        (["--redis_url", "redis://h", "--redis-url=redis://:p@i"], [], "redis://:p@i"),
        (["--redis_url", "redis://:p@h", "--redis-url=redis://i"], ["--redis-url=redis://i"], None),
        (["--redis_url", "redis://h:1/0"], ["--redis_url", "redis://h:1/0"], None),
        (["--redis_url"], ["--redis_url"], None),
        (["--", "--redis_url", "redis://:p@h"], ["--", "--redis_url", "redis://:p@h"], None),
        (["--redis_url", "redis://:p@h", "--redis_port", "1"], ["--redis_url", "redis://:p@h", "--redis_port", "1"], None),
    ],
)
def test_only_urls_with_a_password_leave_the_line_and_the_last_one_counts(words: list[str], left: list[str], url: str | None) -> None:
    assert without_secrets(words) == (left, url)
    assert without_secrets(left) == (left, None), "what is started anew is not started a third time"


def test_a_watch_with_the_url_in_the_environment_shows_nothing(house: House, guarded: tuple[int, Path]) -> None:
    house.environment["ASSAYER_REDIS_URL"] = f"unix://{IN_URL}@{guarded[1]}?db=1"
    house.save("model_step1.pt")
    said = house.watch("--eval_existing")
    until(lambda: house.record("model_step1.pt"))
    shows_nothing(house, connect(house.environment["ASSAYER_REDIS_URL"]))
    told = [said.stdout, said.stderr, house.command("status").stdout, house.command("status", "--json").stdout]
    assert f"unix://{guarded[1]}" in told[-1]
    told += [house.shutdown().stdout, house.log()]
    assert not tells("".join(told).encode())


WRONG = quote(PASSWORD + "x", safe="")


@pytest.mark.parametrize(
    ("command", "login"),
    [
        *((command, f"{quote(USER, safe='')}:{WRONG}") for command in ("watch", "status", "shutdown", "worker")),
        ("watch", f":{WRONG}"),
        ("status", f"reader:{quote(PASSWORD, safe='')}"),
        ("shutdown", f"reader:{quote(PASSWORD, safe='')}"),
    ],
    ids=[*("watch", "status", "shutdown", "worker"), "nameless", "status, no permission", "shutdown, no permission"],
)
def test_a_server_that_refuses_is_one_line_without_the_secret(house: House, guarded: tuple[int, Path], command: str, login: str) -> None:
    house.environment["ASSAYER_REDIS_URL"] = f"redis://{login}@127.0.0.1:{guarded[0]}/0"
    words = ["--directory", house.runs, "--evaluator", f"{house.evaluator}:mean"] if command == "watch" else []
    done = house.command(command, *words, check=False)
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith("assayer: error: ")
    assert done.stderr.count("\n") == 1
    assert not tells((done.stdout + done.stderr).encode())
    assert "reader" not in done.stderr


@pytest.mark.parametrize(
    "url",
    [
        *(f"redis://u:se{c}cret@127.0.0.1:1/0" for c in "/?#[]"),
        *(f"redis://u:secret@127.0.0.1:{port}/0" for port in ("x", "99999", "0", "1")),
        *("u:secret@h", "http://u:secret@h", "redis://u:secret@", "rediss://u:secret@127.0.0.1:1/0?ssl_ca_certs=/none", "redis://secret"),
        *("redis://h/0?password=sec@ret", "redis://127.0.0.1:1/0?password=secret", "redis://127.0.0.1:1?password=secret&nonsense=1"),
        *("unix://u:secret@/none", "unix:///none?password=secret", "redis://u:s\u2100cret@h", "redis://u:secret@127.0.0.1:1?db=secret"),
    ],
)
def test_no_mistake_in_a_url_prints_a_part_of_its_password(tmp_path: Path, url: str) -> None:
    with pytest.raises((UsageError, RedisError)) as caught:
        connect(target(url, None, None, tmp_path).url, patience=2, retries=0)
    said = str(caught.value)
    if url != "redis://secret":
        assert not [part for part in ("secret", "cret", "se/", "sec@", "@ret") if part in said.replace(without_password(url), "")], said
        assert not [part for part in ("u:", "secret", "cret") if part in without_password(url)]
    assert "\n" not in said


def test_the_word_for_a_client_holds_no_password(guarded: tuple[int, Path]) -> None:
    """What a traceback or a debugger may print of it."""
    with connect(f"redis://{IN_URL}@127.0.0.1:{guarded[0]}/0") as opened:
        assert PASSWORD not in repr(opened) + repr(opened.connection_pool)


def certificate(folder: Path, name: str) -> Path:
    """A certificate for localhost, signed by itself, with its key beside it."""
    program = shutil.which("openssl")
    if program is None:
        pytest.skip("no openssl program, which makes the certificate")
    path = folder / f"{name}.pem"
    words = [
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-days",
        "2",
        "-subj",
        "/CN=localhost",
        "-addext",
        "subjectAltName=DNS:localhost",
    ]
    subprocess.run([program, *words, "-keyout", f"{path}.key", "-out", path], check=True, capture_output=True)
    return path


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
    for end in (source, sink):
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


class Tunnel:
    """TLS in front of a server's unix socket; counts who came through."""

    def __init__(self, behind: Path, pem: Path) -> None:
        self.behind, self.served = behind, 0
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.load_cert_chain(pem, f"{pem}.key")
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self.listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                accepted, _ = self.listener.accept()
                threading.Thread(target=self._serve, args=(accepted,), daemon=True).start()

    def _serve(self, accepted: socket.socket) -> None:
        try:
            near = self.context.wrap_socket(accepted, server_side=True)
        except OSError:
            accepted.close()
            return
        self.served += 1
        far = socket.socket(socket.AF_UNIX)
        far.connect(str(self.behind))
        back = threading.Thread(target=_pump, args=(far, near), daemon=True)
        back.start()
        _pump(near, far)
        back.join(5)
        near.close()
        far.close()

    def close(self) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()


@pytest.fixture
def tunnel(guarded: tuple[int, Path]) -> Iterator[Tunnel]:
    made = Tunnel(guarded[1], certificate(guarded[1].parent, "right"))
    try:
        yield made
    finally:
        made.close()


def test_tls_carries_a_whole_watch(house: House, guarded: tuple[int, Path], tunnel: Tunnel) -> None:
    # Given: a server that speaks TLS, and a client that knows its certificate
    authority = guarded[1].parent / "right.pem"
    url = f"rediss://{IN_URL}@localhost:{tunnel.port}/0?ssl_ca_certs={authority}"
    house.environment["ASSAYER_REDIS_URL"] = url
    house.save("model_step1.pt")
    # When: a watch runs on it, with workers of its own
    done = house.once("--eval_existing")
    # Then: the result is there, everything went through TLS, and nothing tells the password
    record = house.record("model_step1.pt")
    assert record and record["status"] == "finished" and record["metrics"] == {"mean": 1.0}
    assert tunnel.served >= 3, "command, watch worker, eval worker"
    assert not tells((done.stdout + done.stderr + house.log()).encode())
    shows_nothing(house, connect(url))


def test_a_wrong_certificate_is_one_line(house: House, guarded: tuple[int, Path], tunnel: Tunnel) -> None:
    other = certificate(guarded[1].parent, "wrong")
    house.environment["ASSAYER_REDIS_URL"] = f"rediss://{IN_URL}@localhost:{tunnel.port}/0?ssl_ca_certs={other}"
    done = house.once(check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(f"assayer: error: no Redis answers at rediss://localhost:{tunnel.port}/0 (")
    assert "certificate" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not tells(done.stderr.encode())
    assert house.processes() == {}


def test_without_a_url_no_server_listens_on_a_port(house: House) -> None:
    house.save("model_step1.pt")
    house.watch()
    inodes = set()
    for path in Path(f"/proc/{house.server.pid()}/fd").iterdir():
        with contextlib.suppress(OSError):
            inodes.add(os.readlink(path))
    listening = {
        f"socket:[{line.split()[9]}]"
        for table in ("tcp", "tcp6")
        if Path("/proc/net", table).exists()
        for line in Path("/proc/net", table).read_text().splitlines()[1:]
        if line.split()[3] == "0A"
    }
    assert inodes and not inodes & listening
    assert house.connection().config_get("port") == {"port": "0"}
