"""lm-eval's requests: built once for a task, its data and a tokenizer, and kept on disk for every other checkpoint.

lm-eval's own cache of requests is keyed by the task's name, not by its data, builds all documents even under a limit, gives each rank
other few-shot examples, and is a pickle. Here one JSON file a task lies in the cache's folder, under a digest of all that they depend on.
"""

import contextlib
import inspect
import json
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from assayer.errors import EvaluatorError
from assayer.files import digest, printable
from assayer.harness.cache import keep, kept, trim
from assayer.harness.settings import Settings

__all__ = ["build", "tokenizer_digest"]

logger = logging.getLogger(__name__)

# Changes when the files' form does.
_FORM = "1"
_TOKENIZER_FILES = re.compile(
    r"tokenizer.*|special_tokens_map\.json|added_tokens\.json|vocab.*|merges\.txt|chat_template.*|.*\.(model|tiktoken)"
)
_CODE = (".py", ".yaml", ".yml", ".jinja")


def build(tasks: dict[str, Any], settings: Settings, lm: Any, tokenizer: str) -> None:
    """Gives each task its requests, read from the cache where it has them, else built and put there.

    Afterwards lm-eval's ``evaluate`` takes them as they are. They are those of one process, whatever the number of processes.
    """
    from lm_eval.evaluator_utils import get_sample_size

    general = _general_key(settings, lm, tokenizer)
    folders: dict[str, str] = {}
    for task in tasks.values():
        limit = get_sample_size(task, settings.limit)
        name = _name_of(task, limit, general, settings, folders)
        if name is None or not _read(task, name, limit):
            _build(task, limit, settings, lm)
            if name is not None:
                _write(task, name, limit)
        # It is done; evaluate would build them anew.
        task.build_all_requests = lambda **_: None
    trim()


def _build(task: Any, limit: int | None, settings: Settings, lm: Any) -> None:
    chat = settings.apply_chat_template
    if chat and getattr(getattr(lm, "tokenizer", None), "chat_template", "") is None:
        raise EvaluatorError("apply_chat_template: the tokenizer has no chat template; give another tokenizer, or leave it out")
    try:
        task.build_all_requests(
            limit=limit,
            rank=0,
            world_size=1,
            apply_chat_template=chat,
            fewshot_as_multiturn=True,
            chat_template=lm.apply_chat_template if chat else None,
            tokenizer_name=lm.tokenizer_name if chat else "",
        )
    except ValueError as error:
        # No documents, or fewer than it has examples to draw.
        raise EvaluatorError(f"task {printable(task.task_name)}: its requests cannot be built: {printable(str(error))[:300]}") from error


def _general_key(settings: Settings, lm: Any, tokenizer: str) -> str:
    """What requests of every task depend on."""
    from lm_eval import __version__

    # How messages become text is the model's and its tokenizer's matter.
    chat = [settings.model, settings.model_args, getattr(getattr(lm, "tokenizer", None), "chat_template", None)]
    parts = [_FORM, __version__, tokenizer_digest(tokenizer), settings.apply_chat_template, chat if settings.apply_chat_template else None]
    return json.dumps(parts, default=str)


def tokenizer_digest(place: str) -> str:
    """A digest of a tokenizer's files by name and content, or of its name where the place is none on this disk."""
    if not os.path.isdir(place):
        return digest("name", place)
    names = sorted(name for name in os.listdir(place) if _TOKENIZER_FILES.fullmatch(name) and os.path.isfile(os.path.join(place, name)))
    return digest(*(part for name in names for part in (name, Path(place, name).read_bytes())))


def _name_of(task: Any, limit: int | None, general: str, settings: Settings, folders: dict[str, str]) -> str | None:
    """The name under which this task's requests are kept; None, with a line in the log, where they cannot be."""
    config = task.dump_config()
    metadata = dict(config.pop("metadata", None) or {})
    source = str(metadata.pop("config_source", ""))
    metadata.pop("tokenizer", None)
    code = [_code_digest(folder, folders) for folder in (os.path.dirname(source), settings.include_path) if folder]
    try:
        described = json.dumps([config, metadata], sort_keys=True, default=_source)
        data = [_data_digest(getattr(task, "task_docs", None) or task.eval_docs)]
        if config.get("num_fewshot"):
            data.append(_data_digest(task.fewshot_docs()))
        return f"{digest(general, described, str(limit), *code, *data)}.json.z"
    except TypeError as error:
        logger.info("requests of %s are not kept: %s", printable(str(config.get("task"))), error)
        return None


def _source(value: Any) -> str:
    """The source of a function that a task's configuration names; anything else has no form that lasts."""
    if callable(value):
        with contextlib.suppress(OSError, TypeError):
            return inspect.getsource(value)
    raise TypeError(f"its configuration holds a {type(value).__name__}")


def _code_digest(folder: str, known: dict[str, str]) -> str:
    """A digest of every piece of Python, YAML and Jinja below a folder."""
    if folder not in known:
        found = sorted(path for path in Path(folder).rglob("*") if path.suffix in _CODE and path.is_file())
        known[folder] = digest(*(part for path in found for part in (str(path.relative_to(folder)), path.read_bytes())))
    return known[folder]


def _data_digest(documents: Any) -> str:
    """A digest of documents by content: a ``datasets.Dataset``, or a list of what JSON can say.

    Raises:
        TypeError: they are neither.
    """
    if not hasattr(documents, "with_format"):
        return digest(json.dumps(list(documents)))
    import pyarrow

    parts = []
    for table in documents.with_format("arrow").iter(batch_size=10_000):
        sink = pyarrow.BufferOutputStream()
        # The schema's own metadata tell how the table was made.
        plain = table.replace_schema_metadata(None)
        with pyarrow.ipc.new_stream(sink, plain.schema) as stream:
            stream.write_table(plain)
        parts.append(digest(sink.getvalue().to_pybytes()))
    return digest(*parts)


def _documents(task: Any, limit: int | None) -> dict[int, Any]:
    return dict(task.doc_iterator(rank=0, limit=limit, world_size=1))


def _read(task: Any, name: str, limit: int | None) -> bool:
    """Gives the task the requests that are kept under a name; False where there are none that fit."""
    rows = kept(name)
    try:
        task._instances = list(_instances(rows or [], task, _documents(task, limit)))
    except (ValueError, TypeError, LookupError) as error:
        logger.warning("built requests in %s do not fit (%s) and are built anew", name, error)
        return False
    return bool(task._instances)


def _instances(rows: list[Any], task: Any, documents: dict[int, Any]) -> Iterator[Any]:
    from lm_eval.api.instance import Instance

    for kind, doc_id, idx, repeats, arguments in rows:
        metadata = (task.config["task"], doc_id, repeats)
        yield Instance(request_type=kind, doc=documents[doc_id], arguments=tuple(arguments), idx=idx, metadata=metadata)


def _write(task: Any, name: str, limit: int | None) -> None:
    """Keeps the task's requests, when they come back from JSON as they are."""
    try:
        rows = [[r.request_type, r.doc_id, r.idx, r.repeats, list(r.arguments)] for r in task.instances]
        text = json.dumps(rows)
        same = list(_instances(json.loads(text), task, _documents(task, limit))) == task.instances
    except (TypeError, ValueError, KeyError) as error:
        logger.info("requests of %s are not kept: %s", printable(task.task_name), error)
        return
    if not same:
        logger.info("requests of %s are not kept: they hold more than text", printable(task.task_name))
        return
    keep(name, text)
