"""What is evaluated, and where: LMMs-Engine's ``eval_config``, as its YAML gives it."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Self

from assayer.errors import ProtocolError, UsageError
from assayer.protocol import CHECKPOINT_TYPES, EvaluateRequest, dump

__all__ = ["EvalConfig"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvalConfig:
    """One evaluation, to be made of every checkpoint.

    ``checkpoint_key`` names the entry of ``model_args`` that gets the checkpoint's path; ``poll_interval`` is in seconds. The others are
    the fields of the protocol's EvaluateRequest; None: the server's default.
    """

    server_url: str = "http://localhost:8000"
    model: str = ""
    tasks: tuple[str, ...] | None = None
    model_args: Mapping[str, Any] = field(default_factory=dict)
    checkpoint_key: str = "model"
    num_fewshot: int | None = None
    batch_size: int | str | None = None
    device: str | None = None
    limit: int | float | None = None
    gen_kwargs: str | None = None
    log_samples: bool = True
    predict_only: bool = False
    num_gpus: int = 1
    poll_interval: float = 10.0

    def __post_init__(self) -> None:
        if not self.model or self.tasks is None:
            raise UsageError("eval_config: 'model' and 'tasks' are required; they say what is evaluated")
        if isinstance(self.poll_interval, bool) or not isinstance(self.poll_interval, int | float) or not self.poll_interval > 0:
            raise UsageError(f"eval_config: poll_interval is {self.poll_interval!r}; it must be a number of seconds above 0")
        try:
            EvaluateRequest.from_json(self.request("/checkpoint", "regular"), ("eval_config",))
            dump(self.request("/checkpoint", "regular"))
        except (ProtocolError, TypeError) as error:
            # TypeError: what is in model_args is no JSON.
            raise UsageError(f"{error}; the fields are those of the LMMs-Eval server's protocol") from None

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """From the dictionary of the YAML; keys that are not known are named in a warning, and those that are null count as not given.

        Raises:
            UsageError: a value is none that the server would take.
        """
        known = {f.name for f in fields(cls)}
        unknown = sorted(map(str, values.keys() - known))
        if unknown:
            logger.warning("eval_config: not known here, and left out: %s; known are %s", ", ".join(unknown), ", ".join(sorted(known)))
        given = {name: value for name, value in values.items() if name in known and value is not None}
        if isinstance(given.get("tasks"), list):
            given["tasks"] = tuple(given["tasks"])
        return cls(**given)

    def request(self, checkpoint: str, weights: str) -> dict[str, Any]:
        """The body of the submission of one checkpoint (absolute path), with its ``regular`` or ``ema`` weights.

        No ``output_dir``: results inside a checkpoint, where LMMs-Engine asks for them, would keep it from being rotated.
        """
        if weights not in CHECKPOINT_TYPES:
            raise UsageError(f"weights {weights!r} are not known; allowed: {', '.join(CHECKPOINT_TYPES)}")
        args: Any = self.model_args
        body = {
            "model": self.model,
            "tasks": list(self.tasks) if isinstance(self.tasks, list | tuple) else self.tasks,
            "model_args": {**args, self.checkpoint_key: checkpoint} if isinstance(args, Mapping) else args,
            "num_fewshot": self.num_fewshot,
            "batch_size": self.batch_size,
            "device": self.device,
            "limit": self.limit,
            "gen_kwargs": self.gen_kwargs,
            "log_samples": self.log_samples,
            "predict_only": self.predict_only,
            "num_gpus": self.num_gpus,
            "lmms_engine_kwargs": {"model_path": checkpoint, "checkpoint_type": weights, "output_path": None},
        }
        return {name: value for name, value in body.items() if value is not None}
