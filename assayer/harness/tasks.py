"""lm-eval's tasks by name: those that come with it, those of a folder, and how they are set up."""

import contextlib
import functools
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from assayer.errors import EvaluatorError
from assayer.files import printable
from assayer.harness.index import default_index
from assayer.harness.settings import Settings, nearest

__all__ = ["check_tasks", "compiled_once", "load_tasks"]

# What ``datasets`` reads by itself: the data are files.
_FILE_READERS = ("json", "csv", "text", "parquet", "arrow")
# Templates of tasks that are kept compiled.
_TEMPLATES = 1024
# Unknown names for which an error tells the nearest.
_NEAREST_TOLD = 3
# The seed that lm-eval's own command draws examples with.
_FEWSHOT_SEED = 1234


@contextlib.contextmanager
def compiled_once() -> Iterator[None]:
    """While it lasts, a template of a task is compiled once: lm-eval does it for every document, a quarter of a small evaluation."""
    from lm_eval.utils import env

    env.from_string = functools.lru_cache(_TEMPLATES)(env.from_string)
    try:
        yield
    finally:
        del env.from_string


def check_tasks(settings: Settings) -> None:
    """Nothing, when every name is known and data that lie in local files can be read.

    What lies on a hub is not fetched here: the machine that evaluates may be another.

    Raises:
        EvaluatorError: a name is not known (with the nearest), a task is asked for twice, or its files are not there.
    """
    manager = _manager(settings)
    index = manager.task_index
    leaves = list(_leaves(settings.tasks, index))
    local = [name for name in leaves if _is_local(_config(index[name]))]
    for name in local:
        _load(manager, [name])
    if len(local) == len(leaves):
        # Nothing is to be fetched: groups, and tasks named twice, can be tried as well.
        _load(manager, list(settings.tasks))


def load_tasks(settings: Settings, tokenizer: str | None) -> dict[str, Any]:
    """The tasks and groups as lm-eval's ``evaluate`` takes them, set up as its ``simple_evaluate`` does.

    Args:
        settings: which tasks, and what overrides their own YAML.
        tokenizer: where the tokenizer is; some tasks make their data with it.

    Raises:
        EvaluatorError: a name is not known, or a data set cannot be loaded.
    """
    loaded = _load(_manager(settings, tokenizer), list(settings.tasks))
    for name, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False):
            raise EvaluatorError(
                f"task {printable(name)} runs code that the model has written, which this evaluator does not do; leave it out"
            )
        _set_up(task, settings)
    return loaded


def _set_up(task: Any, settings: Settings) -> None:
    if settings.gen_kwargs and task.get_config("output_type") == "generate_until":
        task.set_config(key="generation_kwargs", value=settings.gen_kwargs, update=True)
    own = task.get_config("num_fewshot")
    # A task that sets 0 by itself cannot be given examples.
    if settings.num_fewshot is not None and own != 0:
        task.set_config(key="num_fewshot", value=settings.num_fewshot)
    elif own is None:
        task.set_config(key="num_fewshot", value=0)
    if settings.predict_only:
        task.override_metric(metric_name="bypass")
    task.set_fewshot_seed(seed=_FEWSHOT_SEED)


def _manager(settings: Settings, tokenizer: str | None = None) -> Any:
    """lm-eval's own manager, whose index has the names asked for; the default tasks are read only when a name needs them."""
    from lm_eval.tasks import TaskManager

    metadata = {**({"tokenizer": tokenizer} if tokenizer else {}), **settings.model_args}
    manager = TaskManager(include_path=settings.include_path, include_defaults=False, metadata=metadata)
    index = manager.task_index
    if not _is_closed(settings.tasks, index):
        for name, entry in default_index().items():
            index.setdefault(name, entry)
    unknown = [name for name in settings.tasks if name not in index]
    if unknown:
        raise EvaluatorError(_unknown(unknown, index, settings.include_path))
    return manager


def _unknown(names: list[str], index: Mapping[str, Any], folder: str | None) -> str:
    told = ", ".join(printable(name) for name in names)
    where = f"neither lm-eval nor {printable(folder)} has" if folder else "lm-eval does not have"
    near = "".join(nearest(name, index, f" to {printable(name)}" if len(names) > 1 else "") for name in names[:_NEAREST_TOLD])
    return f"{where} the task {told}{near}{_unreadable(folder)}"


def _unreadable(folder: str | None) -> str:
    """Which YAML of the folder cannot be read, if one: lm-eval passes over it in silence."""
    from lm_eval.tasks._yaml_loader import load_yaml

    for path in sorted(Path(folder).rglob("*.yaml")) if folder else []:
        try:
            load_yaml(path, resolve_func=False)
        except Exception as error:
            return f"; {printable(path.name)} cannot be read: {_line(error)}"
    return ""


def _is_closed(names: Iterable[str], index: Mapping[str, Any]) -> bool:
    """True when these names and all that they lead to are in the index."""
    todo, seen = list(names), set()
    while todo:
        name = todo.pop()
        if name not in index:
            return False
        if name not in seen:
            seen.add(name)
            todo += _members(index[name])
    return True


def _members(entry: Any) -> list[str]:
    """The names that a group or tag leads to."""
    members = (entry.cfg or {}).get("task") if entry.kind.name == "GROUP" else None
    if not isinstance(members, list):
        return sorted(entry.tags) if entry.kind.name == "TAG" else []
    return [name for member in members for name in _names_in(member)]


def _names_in(member: Any) -> list[str]:
    if isinstance(member, str):
        return [member]
    if isinstance(member.get("task"), list):
        # A group that is written inside this one.
        return [name for inner in member["task"] for name in _names_in(inner)]
    return [str(member.get("group") or member.get("task"))]


def _leaves(names: Iterable[str], index: Mapping[str, Any]) -> Iterator[str]:
    """The tasks that these names lead to; what a group defines inside itself is left out."""
    seen: set[str] = set()
    todo = list(names)
    while todo:
        name = todo.pop(0)
        if name in index and name not in seen:
            seen.add(name)
            members = _members(index[name])
            todo += members
            if not members:
                yield name


def _config(entry: Any) -> dict[str, Any]:
    return entry.cfg or {}


def _is_local(config: Mapping[str, Any]) -> bool:
    """True when the task's data are files of this machine."""
    files = (config.get("dataset_kwargs") or {}).get("data_files")
    return config.get("dataset_path") in _FILE_READERS and files is not None and "://" not in str(files)


def _load(manager: Any, names: list[str]) -> dict[str, Any]:
    try:
        loaded: dict[str, Any] = manager.load(names)
    except (MemoryError, EvaluatorError):
        raise
    except Exception as error:
        # A data set's loader, and the user's own functions, raise whatever they like.
        raise EvaluatorError(_why(error, names)) from error
    return loaded


def _why(error: Exception, names: list[str]) -> str:
    task, loading = _task_in(error.__traceback__)
    name = task.config.task if task is not None else ", ".join(names)
    if task is None or not loading:
        return f"task {printable(str(name))} cannot be set up: {_line(error)}"
    data = task.DATASET_PATH if task.DATASET_NAME is None else f"{task.DATASET_PATH} ({task.DATASET_NAME})"
    offline = " and HF_HUB_OFFLINE is set" if os.environ.get("HF_HUB_OFFLINE", "0").lower() not in ("", "0", "false") else ""
    return (
        f"task {printable(str(name))}: its data set {printable(str(data))} cannot be loaded{offline} ({_line(error)}); "
        "load it once where there is a network (HF_HOME says where it is kept), or give a task whose data are local with include_path"
    )


def _task_in(trace: TracebackType | None) -> tuple[Any, bool]:
    """The task that was being made when an error was raised, and whether it was loading its data."""
    from lm_eval.api.task import Task

    found, loading = None, False
    while trace is not None:
        own = trace.tb_frame.f_locals.get("self")
        if isinstance(own, Task):
            found, loading = own, loading or trace.tb_frame.f_code.co_name == "download"
        trace = trace.tb_next
    return found, loading


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return printable(f"{type(error).__name__}: {text[:300]}{'...' if len(text) > 300 else ''}")
