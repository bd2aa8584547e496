"""The built-in evaluator ``lm_eval``: any task, group or tag of lm-evaluation-harness, on one process or several.

Answers are saved as they come, so that a killed evaluation goes on where it was; requests are built once for all checkpoints. lm_eval
(0.4.13 or later), torch and transformers are imported when a function needs them.
"""

import contextlib
import logging
import os
import random
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from assayer import language_model
from assayer.distributed import Ranks, joined
from assayer.errors import EvaluatorError
from assayer.files import printable
from assayer.harness.answers import Answers, requests_of
from assayer.harness.index import default_index
from assayer.harness.model import check_model, describe, load_model, mark_of
from assayer.harness.requests import build
from assayer.harness.results import facts_of, metrics_of, write_samples
from assayer.harness.settings import DEFAULT_TASKS, Settings, settings_of
from assayer.harness.tasks import check_tasks, compiled_once, load_tasks

if TYPE_CHECKING:
    from assayer.progress import Progress

__all__ = ["check", "check_files", "evaluate", "warm"]

logger = logging.getLogger(__name__)


def evaluate(
    path: str,
    *,
    tasks: str | list[str] = DEFAULT_TASKS,
    num_fewshot: int | None = None,
    batch_size: int | str | None = None,
    limit: float | None = None,
    include_path: str | None = None,
    apply_chat_template: bool = False,
    log_samples: bool = False,
    predict_only: bool = False,
    model: str = "hf",
    model_args: str | dict[str, Any] | None = None,
    gen_kwargs: str | dict[str, Any] | None = None,
    tokenizer: str | None = None,
    dtype: str | None = None,
    device: str | None = None,
    config: str | None = None,
    trust_remote_code: bool = False,
    original_path: str | None = None,
    samples_path: str | None = None,
    progress: "Progress | None" = None,
    details: dict[str, Any] | None = None,
) -> dict[str, float]:
    """The metrics of a Hugging Face directory: ``<task>/<metric>`` and ``<task>/<metric>_stderr``.

    Args:
        path: the directory; its weights must be those of its config.
        tasks: names with commas between, or a list of them.
        num_fewshot: examples before each question; None is the task's own number.
        batch_size: a number, ``auto`` or ``auto:N``; None is 8, and ``auto`` for vllm and sglang.
        limit: documents a task, or a share of them below 1; None is all.
        include_path: a folder of more tasks (YAML).
        apply_chat_template: whether questions are put as the tokenizer's chat template says.
        log_samples: whether samples are written to ``samples_path``.
        predict_only: whether answers are only kept as samples, and not measured; the metric is then how many there are, ``predicted``.
        model: the kind of lm-eval's model: hf, vllm, ...
        model_args: more for that model, and ``gen_kwargs`` for generation: ``name=value`` with commas between, or a dict.
        gen_kwargs: see ``model_args``.
        tokenizer: a directory, or the name of one that the local cache holds; None is the checkpoint's own or its run's.
        dtype: such as bfloat16; None is the config's.
        device: as torch names it; None is a GPU where there is one.
        config: the Hugging Face config, or a directory with it, of a checkpoint that has none.
        trust_remote_code: whether Python code beside the config may be run.
        original_path: the checkpoint's own path, where ``path`` is a merged copy or a hold.
        samples_path: the file for samples.
        progress: where answers are saved.
        details: gets the facts for the record.

    Raises:
        EvaluatorError: an argument, a task's data, the tokenizer or the weights are not what they must be.
    """
    given = {name: value for name, value in locals().items() if name not in _NOT_ARGUMENTS}
    settings = settings_of(given)
    _import()
    with joined() as group, _quiet(), compiled_once():
        return _evaluate(path, settings, group, original_path, samples_path, progress, details if details is not None else {})


# What transformers imports on demand, and every evaluation with it asks for: 2 s of CPU.
_USED = ("AutoModelForCausalLM", "AutoTokenizer", "GenerationMixin", "LlamaForCausalLM", "PreTrainedModel", "PreTrainedTokenizerFast")
_NOT_ARGUMENTS = ("path", "original_path", "samples_path", "progress", "details")


def check(arguments: Mapping[str, Any]) -> None:
    """Nothing, when an evaluation with these arguments can work as far as can be told without a checkpoint.

    Raises:
        EvaluatorError: lm-eval is not installed, a value is of the wrong kind, or a task or model is not known (with the nearest names).
    """
    settings = settings_of(arguments)
    _import()
    check_model(settings)
    if settings.model in ("hf", "hf-auto", "huggingface"):
        language_model.check_dtype(settings.dtype)
    given = _given_tokenizer(settings)
    if given is not None:
        language_model.tokenizer_place("", None, given)
    if settings.config is not None and not os.path.exists(settings.config):
        raise EvaluatorError(f"config {printable(settings.config)} is not there; give a Hugging Face config, or a directory that holds one")
    check_tasks(settings)


def check_files(names: Collection[str], arguments: Mapping[str, Any]) -> None:
    """Nothing, when a tokenizer and a config are among the files, or given.

    Raises:
        EvaluatorError: one is neither there nor given.
    """
    settings = settings_of(arguments)
    if not language_model.has_tokenizer(names) and not _given_tokenizer(settings):
        raise EvaluatorError("the checkpoint has no tokenizer, nor has its run's directory; give one with -E tokenizer=DIRECTORY")
    if language_model.CONFIG not in names and settings.config is None:
        raise EvaluatorError("the checkpoint has no config.json, nor has its run's directory; give one with -E config=FILE")


def warm() -> None:
    """Imports what every evaluation needs, and reads the names of lm-eval's own tasks: 5 s of CPU, and 5 more the first time."""
    _import_ahead()
    default_index()


def _import_ahead() -> None:
    _import()
    import transformers

    for name in _USED:
        getattr(transformers, name)


def _import() -> None:
    try:
        import lm_eval.evaluator
        import lm_eval.models.huggingface  # noqa: F401
    except ImportError as error:
        raise EvaluatorError(
            f"the evaluator lm_eval needs lm-eval ({printable(str(error))}); install it: pip install 'assayer[lm-eval]'"
        ) from None


def _evaluate(
    path: str,
    settings: Settings,
    group: Ranks,
    original_path: str | None,
    samples_path: str | None,
    progress: "Progress | None",
    details: dict[str, Any],
) -> dict[str, float]:
    place = language_model.tokenizer_place(path, original_path, _given_tokenizer(settings))
    model = load_model(settings, path, place)
    facts = describe(model)
    details |= {"model": settings.model, **facts}
    mark = mark_of(model, facts)
    _seed()
    loaded = load_tasks(settings, place)
    if group.rank > 0:
        # Rank 0 builds the requests, the others find them built.
        group.wait()
    build(loaded["tasks"], settings, model, place)
    if group.rank == 0:
        group.wait()
    asked = requests_of(loaded["tasks"])
    answers = Answers(model, asked, progress, group, mark)
    if group.rank > 0:
        for kind, requests in asked.items():
            getattr(answers, kind)(requests)
        return {}
    return _measure(answers, loaded, settings, samples_path, details)


def _measure(
    answers: Answers, loaded: dict[str, Any], settings: Settings, samples_path: str | None, details: dict[str, Any]
) -> dict[str, float]:
    from lm_eval.evaluator import evaluate as measure

    wanted = (settings.log_samples or settings.predict_only) and samples_path is not None
    # Tasks that only collect answers have no other metric.
    collects = settings.predict_only or any("bypass" in getattr(task, "_metric_fn_list", {}) for task in loaded["tasks"].values())
    results = measure(
        answers, loaded, limit=settings.limit, log_samples=wanted or collects, apply_chat_template=settings.apply_chat_template
    )
    details |= facts_of(results)
    if wanted and samples_path is not None:
        write_samples(Path(samples_path), results["samples"])
        details["samples"] = Path(samples_path).name
    return (
        {f"{task}/predicted": float(len(found)) for task, found in results["samples"].items()}
        if settings.predict_only
        else metrics_of(results)
    )


def _given_tokenizer(settings: Settings) -> str | None:
    given: str | None = settings.model_args.get("tokenizer", settings.tokenizer)
    return given


def _seed() -> None:
    """The seeds that lm-eval's ``simple_evaluate`` sets."""
    import numpy
    import torch
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

    random.seed(DEFAULT_RANDOM_SEED)
    numpy.random.seed(DEFAULT_OTHER_SEED)
    torch.manual_seed(DEFAULT_OTHER_SEED)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """While it lasts, no bar is drawn: lm-eval would draw one for every batch."""
    from tqdm import tqdm

    own = tqdm.__init__

    def init(bar: Any, *arguments: Any, **words: Any) -> None:
        own(bar, *arguments, **words | {"disable": True})

    tqdm.__init__ = init
    try:
        yield
    finally:
        tqdm.__init__ = own
