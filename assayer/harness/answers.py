"""Answers that survive a kill: a model that takes its requests in chunks of a fixed make-up and saves what it has answered.

Requests are put in an order that depends on them alone (longest first) and cut into chunks; each chunk goes to lm-eval's own model. A
resumed evaluation therefore makes the same batches as an undisturbed one, and so does each of several ranks, which take every n-th chunk.
"""

import json
import logging
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from assayer.distributed import Ranks
from assayer.files import digest

if TYPE_CHECKING:
    from assayer.progress import Progress

__all__ = ["KINDS", "Answers", "chunks_of", "requests_of"]

logger = logging.getLogger(__name__)

# What lm-eval asks of a model.
KINDS = ("loglikelihood", "loglikelihood_rolling", "generate_until")

# Batches a chunk: what a kill costs at most, against batches that are not full at a chunk's end.
_BATCHES = {"loglikelihood": 8, "loglikelihood_rolling": 8, "generate_until": 1}
# Requests a chunk of models that make up their batches by themselves.
_OWN_BATCHES = {"loglikelihood": 2048, "loglikelihood_rolling": 256, "generate_until": 256}
# Seconds between two saves at least, and how many times as long as a save takes.
_PAUSE, _SHARE = 2.0, 20.0
# Saves of one kind of request, at most, when several ranks save together.
_SAVES = 200
# The start of what is drawn at random after the answers.
_AFTER = 1234
# Bytes of text a token, roughly: enough to guess into how many windows a text falls.
_BYTES_A_TOKEN = 4


def requests_of(tasks: dict[str, Any]) -> dict[str, list[Any]]:
    """All requests by kind, each as often as it is repeated, in the order in which lm-eval's ``evaluate`` asks them."""
    found: dict[str, list[Any]] = {}
    for task in tasks.values():
        for request in task.instances:
            found.setdefault(request.request_type, []).extend([request] * request.repeats)
    return found


class Answers:
    """In the place of lm-eval's model: answers by chunks, from what was saved or by the model itself.

    Args:
        model: lm-eval's ``LM``.
        requests: all that will be asked, by kind.
        progress: the evaluation's progress, or None.
        ranks: the processes that share the work; only rank 0 gets all answers.
        mark: names the model as loaded; answers that one with another mark gave are not taken.
    """

    # For lm-eval each process is alone: which chunks it answers is decided here.
    rank, world_size = 0, 1

    def __init__(self, model: Any, requests: dict[str, list[Any]], progress: "Progress | None", ranks: Ranks, mark: str = "") -> None:
        self._model, self._progress, self._ranks = model, progress, ranks
        self._automatic = str(getattr(model, "batch_size", "")).startswith("auto") and hasattr(model, "_detect_batch_size")
        self._chunks = {kind: chunks_of(kind, asked, self._size(kind), self._length()) for kind, asked in requests.items()}
        self._total = sum(len(chunk) for kind in requests for chunk in self._own(kind))
        self._saved = _Saved(progress, digest(mark, _key(requests, self._chunks)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """``(log-likelihood, is greedy)`` of each continuation; an empty list on other ranks than 0."""
        return [(value[0], value[1]) for value in self._answer("loglikelihood", requests)]

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """The log-likelihood of each text; an empty list on other ranks than 0."""
        return self._answer("loglikelihood_rolling", requests)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """What follows each context; an empty list on other ranks than 0."""
        return self._answer("generate_until", requests)

    def _answer(self, kind: str, requests: Sequence[Any]) -> list[Any]:
        chunks = self._own(kind)
        answers = self._saved.answers.setdefault(kind, [])
        before = 0
        for number, chunk in enumerate(chunks):
            if before >= len(answers):
                self._prepare(kind, number, chunks, requests)
                asked = [requests[i] for i in chunk]
                if kind == "generate_until":
                    # It may draw at random: each chunk from a start of its own, so that a resumed one draws the same.
                    _seed(int(digest(*(_text(list(r.args)) for r in asked))[:8], 16))
                answers += [_plain(kind, answer) for answer in _call(getattr(self._model, kind), asked)]
                self._save(kind, number)
            before += len(chunk)
        for number in range(len(chunks), self._rounds(kind)):
            # Another rank has one more: points agree when all have saved equally often.
            self._save(kind, number)
        # What a task draws of its own when it looks at the answers must not depend on how many of them were saved.
        _seed(_AFTER)
        return self._gathered(kind, len(requests))

    def _save(self, kind: str, number: int) -> None:
        rounds = self._rounds(kind)
        is_last = number + 1 == rounds
        if self._ranks.world_size > 1:
            # By the count, which is the same on all ranks, and not by the clock.
            wanted = is_last or (number + 1) % max(1, rounds // _SAVES) == 0
        else:
            wanted = is_last or self._saved.is_due()
        if wanted:
            self._saved.save()
        if self._progress is not None:
            self._progress.report(sum(map(len, self._saved.answers.values())), self._total)

    def _rounds(self, kind: str) -> int:
        """Chunks of the rank that has most."""
        return -(-len(self._chunks[kind]) // self._ranks.world_size)

    def _own(self, kind: str) -> list[list[int]]:
        return self._chunks[kind][self._ranks.rank :: self._ranks.world_size]

    def _gathered(self, kind: str, count: int) -> list[Any]:
        """All answers in the order of the requests, on rank 0."""
        numbers = [number for chunk in self._own(kind) for number in chunk]
        own = list(zip(numbers, self._saved.answers[kind], strict=True))
        found = {number: answer for pairs in self._ranks.gather(own) for number, answer in pairs}
        return [found[number] for number in range(count)] if self._ranks.rank == 0 else []

    def _size(self, kind: str) -> int:
        """Requests a chunk; with an automatic batch size it may not depend on what a machine's memory holds today."""
        batch = self._model.max_batch_size if self._automatic else getattr(self._model, "batch_size", None)
        return batch * _BATCHES[kind] if isinstance(batch, int) else _OWN_BATCHES[kind]

    def _length(self) -> int:
        length = getattr(self._model, "max_length", None)
        return length if isinstance(length, int) and length > 0 else 2048

    def _prepare(self, kind: str, number: int, chunks: list[list[int]], requests: Sequence[Any]) -> None:
        """Sets the batch size before a chunk where it is to be found out: once, or N times, and never again after a resume."""
        if not self._automatic:
            return
        parts = int(getattr(self._model, "batch_schedule", 1)) if kind == "loglikelihood" else 1
        part = number * parts // len(chunks)
        known = self._saved.batch_sizes
        name = f"{kind}:{part}"
        if name not in known:
            known[name] = self._detect(kind, [requests[i] for i in chunks[number]])
        self._model.batch_size_per_gpu = known[name]

    def _detect(self, kind: str, longest: list[Any]) -> int:
        if kind != "loglikelihood":
            return int(self._model._detect_batch_size())
        tokens = max((self._model.tok_encode(r.args[0] + r.args[1]) for r in longest), key=len)
        return int(self._model._detect_batch_size([("", tokens[:-1], tokens[-1:])]))


class _Saved:
    """What was answered before, and where more of it goes: by kind, in the order of this rank's chunks."""

    def __init__(self, progress: "Progress | None", key: str) -> None:
        self._progress, self._key = progress, key
        self.answers: dict[str, list[Any]] = {}
        self.batch_sizes: dict[str, int] = {}
        self._next = time.monotonic() + _PAUSE
        state = progress.resume() if progress is not None else None
        if isinstance(state, dict) and state.get("requests") == key:
            self.answers = {kind: _unpack(kind, packed) for kind, packed in state["answers"].items()}
            self.batch_sizes = dict(state["batch_sizes"])
        elif state is not None:
            logger.warning("the requests, or the model's config, are not those that were saved: their answers start over")

    def is_due(self) -> bool:
        """True when the last save was some time ago."""
        return time.monotonic() >= self._next

    def save(self) -> None:
        """Saves all answers so far."""
        if self._progress is None:
            return
        began = time.monotonic()
        packed = {kind: _pack(kind, answers) for kind, answers in self.answers.items()}
        self._progress.save({"requests": self._key, "answers": packed, "batch_sizes": dict(self.batch_sizes)})
        now = time.monotonic()
        self._next = now + max(_PAUSE, _SHARE * (now - began))


def chunks_of(kind: str, requests: Sequence[Any], size: int, length: int = 2048) -> list[list[int]]:
    """The requests' numbers, longest first, cut into chunks of at most ``size`` (of windows of ``length`` tokens, for whole texts).

    Continuations of the same context stay together, as far as they fit, since a model reads the context once for them; so do
    generations with the same arguments. It depends on nothing but the requests.
    """
    groups: dict[str, list[int]] = {}
    for number, request in enumerate(requests):
        groups.setdefault(_group(kind, number, request), []).append(number)
    for members in groups.values():
        members.sort(key=lambda number: (-_bytes(requests[number]), number))
    ordered = sorted(groups.values(), key=lambda members: (-_bytes(requests[members[0]]), members[0]))

    def weight(number: int) -> int:
        return 1 + _bytes(requests[number]) // (length * _BYTES_A_TOKEN) if kind == "loglikelihood_rolling" else 1

    # Generations with other arguments never share a batch.
    return list(_cut(ordered, weight, size, apart=kind == "generate_until"))


def _cut(groups: Iterable[list[int]], weight: Callable[[int], int], size: int, apart: bool) -> Iterator[list[int]]:
    chunk: list[int] = []
    room = size
    for members in groups:
        heavy = sum(weight(number) for number in members)
        if chunk and (apart or heavy > room):
            yield chunk
            chunk, room = [], size
        for number in members:
            if chunk and weight(number) > room:
                yield chunk
                chunk, room = [], size
            chunk.append(number)
            room -= weight(number)
    if chunk:
        yield chunk


def _group(kind: str, number: int, request: Any) -> str:
    if kind == "loglikelihood":
        return str(request.args[0])
    return _text(request.args[1]) if kind == "generate_until" else str(number)


def _bytes(request: Any) -> int:
    return sum(len(argument) for argument in request.args if isinstance(argument, str))


def _key(requests: dict[str, list[Any]], chunks: dict[str, list[list[int]]]) -> str:
    """A digest of all that is asked and of how it is cut."""
    asked = (part for kind, found in requests.items() for part in (kind, *(_text(list(r.args)) for r in found)))
    return digest(_text(chunks), *asked)


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=_content)


def _content(value: Any) -> str:
    """What stands for a picture or a sound in a digest."""
    return digest(value.tobytes()) if hasattr(value, "tobytes") else repr(value)


def _call(method: Callable[..., Any], asked: list[Any]) -> list[Any]:
    answers: list[Any] = method(asked)
    if len(answers) != len(asked):
        raise RuntimeError(f"the model gave {len(answers)} answers to {len(asked)} requests")
    return answers


def _seed(seed: int) -> None:
    import numpy
    import torch

    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)


def _plain(kind: str, answer: Any) -> Any:
    if kind == "loglikelihood":
        return (float(answer[0]), bool(answer[1]))
    return float(answer) if kind == "loglikelihood_rolling" else str(answer)


def _pack(kind: str, answers: list[Any]) -> Any:
    """Answers as they are saved: numbers as arrays, 9 bytes an answer."""
    import numpy

    if kind == "loglikelihood":
        return [numpy.array([a[0] for a in answers], numpy.float64), numpy.array([a[1] for a in answers], numpy.bool_)]
    return numpy.array(answers, numpy.float64) if kind == "loglikelihood_rolling" else list(answers)


def _unpack(kind: str, packed: Any) -> list[Any]:
    if kind == "loglikelihood":
        return list(zip(packed[0].tolist(), packed[1].tolist(), strict=True))
    return packed.tolist() if kind == "loglikelihood_rolling" else list(packed)
