"""Which words of a request may reach a model, a task or a command line: none by which a client would have code run that it names.

What lm-eval's models take is a list of names that say how a model is run; whoever owns the server may add to it. What the hundred models of
lmms-eval take nobody can list: there, the values tell. An evaluator of one's own gets what it was sent, for its own function to judge.
"""

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from assayer.errors import EvaluatorError, ProtocolError
from assayer.files import printable, read_json
from assayer.harness.settings import pairs_of
from assayer.protocol import EvaluateRequest
from assayer.server.paths import Roots, is_path, strings_in
from assayer.worker.answer import PATH_KEYS, paths_in

__all__ = ["OF_THE_REQUEST", "is_false", "refuse", "refuse_code_beside", "refused"]

# What belongs to the request, to a launcher or to the checkpoint, and is no argument of lm-eval's models.
OF_THE_REQUEST = ("num_gpus", "batch_size", "config", "tokenizer", "dtype", "trust_remote_code", *PATH_KEYS)

# How lm-eval's hf, vllm and sglang are run (their constructors in lm-eval 0.4.13, and the plain settings of the engines): numbers,
# switches, and names from lists of the library's own.
_OF_HF = """
add_bos_token attn_implementation backend chat_template_args device device_map dtype enable_thinking load_in_4bit load_in_8bit logits_cache
low_cpu_mem_usage max_batch_size max_cpu_memory max_length max_memory_per_gpu mixed_precision_dtype parallelize prefix_token_id
softmax_dtype think_end_token torch_dtype tp_plan truncation use_cache use_fast_tokenizer
"""
_OF_ENGINES = """
chunked_prefill_size context_length data_parallel_size disable_custom_all_reduce disable_log_stats dp_size enable_prefix_caching
enforce_eager gpu_memory_utilization kv_cache_dtype max_gen_toks max_lora_rank max_model_len max_num_batched_tokens max_num_seqs
mem_fraction_static pipeline_parallel_size quantization seed swap_space tensor_parallel_size tokenizer_mode tp_size truncation_side
"""
_RUNNING = frozenset([*_OF_HF.split(), *_OF_ENGINES.split()])
# What generation takes: of transformers, of vLLM's and SGLang's sampling, of lm-eval and lmms-eval themselves.
_OF_GENERATION = """
best_of diversity_penalty do_sample early_stopping frequency_penalty ignore_eos image_aspect_ratio length_penalty max_gen_toks
max_length max_new_tokens max_tokens min_length min_new_tokens min_p min_tokens n no_repeat_ngram_size num_beam_groups num_beams
num_return_sequences penalty_alpha presence_penalty repetition_penalty seed skip_special_tokens stop temperature top_k top_p
typical_p until use_cache
"""
_GENERATING = frozenset(_OF_GENERATION.split())
# What transformers takes by these names; others are those of kernels on a hub.
_ATTENTION = {"eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention", "flash_attn", "triton", "fa3", "flashinfer"}

# Words of names by which libraries import something.
_CODE = re.compile(
    r"(include_path|custom_generate|steer_path|logits_processors|scheduler_config)"
    r"|(^|.*_)(cls|class|module|plugins?|script|root|code|import|middleware|connector|backend|executor|parser|kernels?)(_.*|$)"
)
# A dotted name, a path, a name on a hub, a structure: what could be imported, or hold what could.
_LEADS_AWAY = re.compile(r"[/\\{}\[\]()~$%]|^[A-Za-z_]\w*(\.[A-Za-z_]\w*)+$")


def refused(loc: tuple[str | int, ...], text: str, value: object = None) -> ProtocolError:
    """A refusal of what stands at this place of the body, in pydantic's form."""
    detail = {"type": "value_error", "loc": ["body", *loc], "msg": f"Value error, {text}", "input": value, "ctx": {"error": text}}
    return ProtocolError([detail])


def refuse(request: EvaluateRequest, kind: str, roots: Roots, trust_remote_code: bool, more: frozenset[str]) -> None:
    """Refuses a request that holds a word which no client may give.

    Args:
        request: as the client sent it.
        kind: of the model: ``own``, ``lm_eval`` or ``lmms_eval``.
        roots: the folders in which a client may name paths.
        trust_remote_code: the server's owner lets clients ask for code beside a model's config.
        more: names of arguments that the owner lets clients give besides.

    Raises:
        ProtocolError: it may not be done (403), or cannot be (422).
    """
    given = dict(request.model_args or {})
    for text in strings_in(given):
        if is_path(text):
            roots.resolve(text)
    if not trust_remote_code and any(key == "trust_remote_code" and not is_false(value) for key, value in _pairs(given)):
        raise refused(("model_args", "trust_remote_code"), "this server does not allow it (but with --trust_remote_code)", True)
    if kind == "own":
        return
    _refuse_tasks(request)
    if not trust_remote_code:
        _refuse_generating(request.gen_kwargs, more)
    where = paths_in(request.to_json())
    names = [name for name in given if name not in where and name not in more]
    if kind == "lm_eval":
        _refuse_unlisted({name: given[name] for name in names})
    else:
        _refuse_unfit(given, request)
        if not trust_remote_code:
            _refuse_leading({name: given[name] for name in names}, given, where)


def _refuse_tasks(request: EvaluateRequest) -> None:
    if not request.tasks:
        raise refused(("tasks",), "at least one task is needed", [])
    for i, task in enumerate(request.tasks):
        if not re.fullmatch(r"\w[^/\\,\x00-\x1f]{,299}", task) or task.endswith((".yaml", ".yml", ".json", ".py")):
            raise refused(("tasks", i), "a task is given by its name", task)


def _refuse_generating(gen_kwargs: str | None, more: frozenset[str]) -> None:
    """Of generation: what is not on the list, in whichever form it is written."""
    try:
        pairs = pairs_of("gen_kwargs", gen_kwargs or "")
    except EvaluatorError as error:
        raise refused(("gen_kwargs",), str(error).removeprefix("-E "), gen_kwargs) from None
    for name, value in pairs.items():
        if name not in more and (name not in _GENERATING or not all(map(_is_plain, value if isinstance(value, list) else [value]))):
            text = f"{printable(name)[:100]} may not be given like this by a client (but with --model_arg {printable(name)[:100]})"
            raise refused(("gen_kwargs",), text, gen_kwargs)


def _is_plain(value: object) -> bool:
    return value is None or isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))


def _refuse_unlisted(given: Mapping[str, Any]) -> None:
    """Of lm-eval's models: names that are not on the list, and values that are no plain ones."""
    for name, value in given.items():
        if name in OF_THE_REQUEST:
            continue
        if name not in _RUNNING:
            raise refused(("model_args", name), f"{printable(name)[:100]} may not be given by a client (but with --model_arg)", None)
        inner = value.values() if name == "chat_template_args" and isinstance(value, Mapping) else [value]
        if any(isinstance(part, dict | list) for part in inner):
            raise refused(("model_args", name), f"{name} must be a word, a number or a truth value", None)
        if name == "attn_implementation" and value is not None and value not in _ATTENTION:
            raise refused(("model_args", name), f"{name} must be one of {', '.join(sorted(_ATTENTION))}", None)


def _refuse_unfit(given: Mapping[str, Any], request: EvaluateRequest) -> None:
    """Of lmms-eval's models: what its command line would take for something else."""
    for name, value in given.items():
        if not re.fullmatch(r"[A-Za-z_]\w*", name) or re.search(r"[,\x00-\x1f]", str(value)):
            raise refused(("model_args", name), "for lmms-eval a name is a word, and a value holds no comma", None)
    for name in ("batch_size", "gen_kwargs"):
        if re.search(r"[\x00-\x1f]", str(getattr(request, name))):
            raise refused((name,), "it holds control characters", None)


def _refuse_leading(given: Mapping[str, Any], all_given: Mapping[str, Any], where: list[str]) -> None:
    """Of lmms-eval's models: names and values that could lead to code, and weights from a hub, whose code many of them trust."""
    for name, value in given.items():
        if name == "trust_remote_code" and str(value) not in ("False", "false"):
            raise refused(("model_args", name), "trust_remote_code must be false (but with --trust_remote_code)", None)
        if name != "trust_remote_code" and (_CODE.fullmatch(name) or _LEADS_AWAY.search(str(value))):
            raise refused(("model_args", name), f"{name} may not be given like this by a client (but with --model_arg {name})", None)
    for name in where:
        if _CODE.fullmatch(name):
            raise refused(("model_args", name), f"{name} is no name for a checkpoint's path", None)
        if isinstance(all_given[name], str) and not is_path(all_given[name]):
            text = "models of lmms-eval run code that lies beside weights on a hub: give a path (but with --trust_remote_code)"
            raise refused(("model_args", name), text, all_given[name])


def refuse_code_beside(path: str) -> None:
    """Refuses a directory whose configs name code of their own: many of lmms-eval's models run that unasked.

    Raises:
        ProtocolError: it does (422).
    """
    try:
        names = [name for name in os.listdir(path) if name.endswith(".json")]
    except NotADirectoryError:
        return
    except OSError as error:
        raise refused(("model_args",), f"{printable(path)} cannot be read: {error.strerror}", path) from None
    for name in names:
        if name.endswith(("config.json", "auto_map.json")):
            told = read_json(Path(path) / name)
            if isinstance(told, dict) and ("auto_map" in told or "custom_pipelines" in told):
                text = (
                    f"{printable(name)} in {printable(path)} names code of its own; start the server with --trust_remote_code to let it run"
                )
                raise refused(("model_args",), text, path)


def _pairs(value: Any) -> list[tuple[str, Any]]:
    """Every key of a JSON value, at any depth, with what it holds."""
    if isinstance(value, dict):
        return [*value.items(), *(pair for inner in value.values() for pair in _pairs(inner))]
    return [pair for inner in value for pair in _pairs(inner)] if isinstance(value, list) else []


def is_false(value: Any) -> bool:
    """True for what stands for no."""
    return value in (False, None, 0) or str(value).strip().lower() in ("", "false", "no", "0", "none")
