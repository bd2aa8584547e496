"""A stranger's function in a child: whatever it does, it ends, and nothing stays behind."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

# The caller reaps everything below itself: hence a process of its own for each case, never the test's.
CASE = """
import json, os, sys, time
from pathlib import Path
from assayer.worker import child

def function():
{body}

began = time.monotonic()
ending = child.run(function, Path({log!r}), {timeout}, "heading")
print(json.dumps([ending.value, ending.cause, ending.message, child.descendants(os.getpid()), time.monotonic() - began]))
"""


class Case:
    def __init__(self, folder: Path) -> None:
        self.log = folder / "log"

    def run(self, body: str, timeout: float = 30) -> "Case":
        lines = "\n".join(f"    {line}" for line in body.splitlines())
        source = CASE.format(body=lines, log=str(self.log), timeout=timeout)
        done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        answer: list[Any] = json.loads(done.stdout.splitlines()[-1])
        self.value, self.cause, self.message, self.left, self.seconds = answer
        assert self.left == [], "processes were left"
        return self


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(tmp_path)


def test_a_value_comes_back_and_output_lies_in_the_log(case: Case) -> None:
    case.run("print('out'); print('err', file=sys.stderr); os.system('echo from a program'); return {'m': 1}")
    assert (case.value, case.cause) == ({"m": 1}, None)
    assert case.log.read_text() == "--- heading\nout\nerr\nfrom a program\n"


@pytest.mark.parametrize(
    ("body", "cause", "message"),
    [
        ("raise ValueError('no\\nway')", "exception", "ValueError: no way"),
        ("sys.exit(3)", "exit", "the evaluator called sys.exit(3)"),
        ("os._exit(0)", "exit", "the evaluation ended its process with code 0 before it returned"),
        ("os._exit(9)", "exit", "the evaluation ended its process with code 9 before it returned"),
        ("os.kill(os.getpid(), 9)", "signal", "the evaluation was ended by signal SIGKILL"),
        ("import ctypes; ctypes.string_at(0)", "signal", "the evaluation was ended by signal SIGSEGV"),
        ("os.abort()", "signal", "the evaluation was ended by signal SIGABRT"),
        ("raise MemoryError('big')", "out of memory", "MemoryError: big"),
        (
            "import resource; resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30)); bytearray(2 << 30)",
            "out of memory",
            "MemoryError",
        ),
        ("raise KeyboardInterrupt", "exception", "KeyboardInterrupt"),
        (
            "raise type('OutOfMemoryError', (RuntimeError,), {})('CUDA out of memory')",
            "out of memory",
            "OutOfMemoryError: CUDA out of memory",
        ),
        ("sys.stderr.close(); raise ValueError('true cause')", "exception", "ValueError: true cause"),
        ("return {1, 2}", "exception", "TypeError: Object of type set is not JSON serializable"),
    ],
)
def test_every_bad_end_has_a_cause(case: Case, body: str, cause: str, message: str) -> None:
    case.run(body)
    assert (case.cause, case.message) == (cause, message)


@pytest.mark.parametrize("body", ["time.sleep(100)", "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\nwhile True: pass"])
def test_a_hang_ends_at_the_time_limit(case: Case, body: str) -> None:
    case.run(body, timeout=0.5)
    assert (case.cause, case.message) == ("timeout", "did not end within 0.5 s")
    assert case.seconds < 10


def test_a_hang_in_c_ends_at_the_time_limit(case: Case) -> None:
    case.run("import ctypes; ctypes.PyDLL(None).sleep(100)", timeout=0.5)
    assert case.cause == "timeout"


def test_every_descendant_ends_also_one_in_a_session_of_its_own(case: Case, tmp_path: Path) -> None:
    stray = tmp_path / "stray.py"
    stray.write_text("import os, sys, time\nos.setsid()\nos.fork()\nopen(f'{sys.argv[1]}/{os.getpid()}', 'w')\ntime.sleep(100)\n")
    body = f"""
import subprocess
for i in range(3):
    p = subprocess.Popen([sys.executable, {str(stray)!r}, {str(tmp_path)!r}])
while sum(name.isdigit() for name in os.listdir({str(tmp_path)!r})) < 6:
    time.sleep(0.05)
return 1"""
    case.run(body)
    assert case.value == 1
    pids = [int(name) for name in os.listdir(tmp_path) if name.isdigit()]
    assert len(pids) == 6
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def test_a_flood_of_output_is_cut_in_the_middle(case: Case) -> None:
    case.run("line = 'x' * 1023 + '\\n'\nfor i in range(40 * 1024): sys.stdout.write(line)\nprint('the end')\nreturn 1")
    assert case.value == 1
    text = case.log.read_text()
    assert len(text) < 11 << 20
    assert "bytes of output are left out here" in text
    assert text.endswith("the end\n")


def test_a_child_that_forks_and_lets_its_child_return_answers_once(case: Case) -> None:
    case.run("pid = os.fork()\nif pid: os.waitpid(pid, 0)\nreturn 'parent' if pid else 'child'")
    assert case.value == "parent"


def test_a_large_value_comes_back_whole(case: Case) -> None:
    case.run("return 'x' * 5_000_000")
    assert len(case.value) == 5_000_000


def test_nothing_can_be_read_from_the_terminal(case: Case) -> None:
    case.run("return sys.stdin.read()")
    assert case.value == ""


def test_where_memory_runs_out_the_evaluation_goes_first(case: Case) -> None:
    case.run("return Path('/proc/self/oom_score_adj').read_text()")
    assert case.value == "1000\n"


def test_the_child_dies_with_its_caller(tmp_path: Path) -> None:
    body = f"    open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\n    time.sleep(100)"
    source = CASE.format(body=body, log=str(tmp_path / "log"), timeout=100)
    with subprocess.Popen([sys.executable, "-c", source]) as process:
        deadline = time.monotonic() + 20
        while not ((tmp_path / "pid").exists() and (tmp_path / "pid").read_text()) and time.monotonic() < deadline:
            time.sleep(0.02)
        process.kill()
        process.wait()
    pid = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 5
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not Path(f"/proc/{pid}").exists()
