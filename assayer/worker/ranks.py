"""Several processes for one evaluation: started by torchrun or accelerate on a port of their own, and one outcome of them all.

Each rank leaves word of how it ended in a private folder. The outcome is rank 0's; where one has ended badly, it is that rank's error, and
not that of those who missed it, nor the launcher's "exit code 1".
"""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from assayer.errors import EvaluatorError
from assayer.files import private_folder, read_json, write_json
from assayer.refs import PACKAGE_PARENT
from assayer.worker.call import Call, Outcome, make
from assayer.worker.child import EndedBadly, Ending, die_with_parent
from assayer.worker.environ import evaluation_environment

__all__ = ["called", "launch", "refuse_missing"]

# Each launcher's package, by which its extra is called, too.
_PACKAGES = {"torchrun": "torch", "accelerate": "accelerate"}

# Variables that torchrun's own parser reads as its flags; accelerate hands on only some of those, and asks the same parser for the rest.
FROM_ENVIRONMENT = "PET_"

# Seconds by which the word of a rank that ended without raising anything may come later than that of a peer that missed it.
_SILENT_AHEAD = 1.0
# How the launcher, or a library that has lost its peer, ends a rank for another one's sake.
_FOR_ANOTHER = ("SIGTERM", "SIGABRT")

_RANK = "assayer.worker.rank"


def refuse_missing(launcher: str) -> None:
    """Refuses a launcher that is not installed.

    Raises:
        EvaluatorError: it is not; names the extra.
    """
    package = _PACKAGES[launcher]
    if find_spec(package) is None:
        raise EvaluatorError(f"--launcher {launcher} needs {package}, which is not installed here: pip install 'assayer[{package}]'")


def called(call: Call, launcher: str | None, processes: int, point: int | None) -> Outcome:
    """What the evaluator returns, called in this process, or with a launcher in so many processes below it.

    ``point``, from which it goes on, is ``call.point(processes)``, asked by whoever wants to know whether it got further.
    """
    return make(call, point=point) if launcher is None else launch(call, launcher, processes, point)


def launch(call: Call, launcher: str, processes: int, point: int | None) -> Outcome:
    """Makes the call in so many processes, and returns what rank 0 returned.

    To be called in a process that ends with the evaluation: whatever is left of the ranks then is ended by whoever ends what is below it.

    Args:
        call: what every rank calls.
        launcher: ``torchrun`` or ``accelerate``.
        processes: how many; all see the GPUs that this process sees, and LOCAL_RANK tells them apart.
        point: from which all of them go on.

    Raises:
        EvaluatorError: the launcher is not installed.
        EndedBadly: a rank ended badly, the first of them; or the launcher did.
    """
    refuse_missing(launcher)
    with private_folder("ranks") as folder:
        orders = folder / "orders.json"
        write_json(orders, {"call": call.to_json(), "point": point, "launcher": launcher}, 0o600)
        code = _wait_for(_command(launcher, processes, orders), _environment(processes))
        words = {rank: word for rank in range(processes) if (word := read_json(word_of(folder, rank))) is not None}
    return _outcome(words, launcher, processes, code)


def word_of(folder: Path, rank: int) -> Path:
    """The file in which a rank leaves word of how it ended."""
    return folder / f"rank-{rank}.json"


def _command(launcher: str, processes: int, orders: Path) -> list[str]:
    # The launcher's own files go with the folder.
    log = ["--log_dir", str(orders.with_name("log"))]
    if launcher == "torchrun":
        return [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes), *log, "-m", _RANK, str(orders)]
    # Without a file of ours it would read the user's own, with any number of machines, a precision and DeepSpeed in it.
    config = orders.with_name("accelerate.json")
    # By this name it starts ranks through torchrun, also on other devices and on none; else it would start one process, which is no rank.
    facts = {"distributed_type": "MULTI_GPU", "num_processes": processes, "num_machines": 1, "machine_rank": 0, "main_process_port": 0}
    facts |= {"compute_environment": "LOCAL_MACHINE", "mixed_precision": "no", "use_cpu": False, "debug": False}
    write_json(config, facts, 0o600)
    words = ["--config_file", str(config), "--dynamo_backend", "no", *log, "--module", _RANK, str(orders)]
    return [sys.executable, "-m", "accelerate.commands.launch", *words]


def _environment(processes: int) -> dict[str, str]:
    """This process's environment without a launcher's variables, and with those that give these ranks a meeting place of their own."""
    environment = evaluation_environment(os.environ, None)
    environment.setdefault("OMP_NUM_THREADS", str(max(1, _processors() // processes)))
    # A store on a port that the kernel chooses, by an address that every machine has.
    meeting = {"STANDALONE": "1", "LOCAL_ADDR": "127.0.0.1"}
    return environment | {f"{FROM_ENVIRONMENT}{name}": value for name, value in meeting.items()}


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _wait_for(command: list[str], environment: Mapping[str, str]) -> int:
    """Runs the launcher to its end, and returns its exit code; it ends with this process, and each rank with it."""
    parent = os.getpid()
    process = subprocess.Popen(
        command,
        cwd=PACKAGE_PARENT,
        env=environment,
        stdin=subprocess.DEVNULL,
        # A Ctrl-C is for whoever waits here to act on.
        start_new_session=True,
        preexec_fn=lambda: die_with_parent(parent),
    )
    try:
        return process.wait()
    except BaseException:
        process.kill()
        process.wait()
        raise


def _outcome(words: dict[int, dict[str, Any]], launcher: str, processes: int, code: int) -> Outcome:
    endings = {rank: Ending(**word["ending"]) for rank, word in words.items()}
    bad = [rank for rank, ending in endings.items() if ending.cause is not None]
    if bad:
        first = min(bad, key=lambda rank: words[rank]["moment"] - (_SILENT_AHEAD if _fell_silent(endings[rank]) else 0.0))
        ending = endings[first]
        raise EndedBadly(Ending(None, ending.cause, f"rank {first} of {processes}: {ending.message}", ending.traceback))
    if code < 0:
        raise EndedBadly(Ending(None, "signal", f"{launcher} was ended by signal {_name(-code)}"))
    if code > 0 or 0 not in endings:
        raise EndedBadly(Ending(None, "exit", f"{launcher} ended with code {code} before the evaluation had; what it printed says why"))
    return Outcome(**endings[0].value)


def _fell_silent(ending: Ending) -> bool:
    """True for a rank that ended by itself and could not say so: only who waited for it noticed, perhaps after a peer had."""
    return ending.traceback is None and ending.cause != "evaluator" and not ending.message.endswith(_FOR_ANOTHER)


def _name(number: int) -> str:
    return signal.Signals(number).name if number in set(signal.Signals) else str(number)
