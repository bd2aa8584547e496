"""What the server calls for each checkpoint: how well the model foretells bytes that training never saw."""

import math
import os
from typing import Any

import torch
from text import task
from transformers import AutoModelForCausalLM

BATCH = 32


def score(path: str, tasks: list[str], original_path: str, details: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Loss (nats a byte), bits per byte, and the share of bytes that the model foretells, for each task.

    Args:
        path: of the checkpoint, or of what is kept of it.
        tasks: of the request: ``manual``, ``code``.
        original_path: where the trainer saved it.
        details: goes into the record.
    """
    # The other core is the training's.
    torch.set_num_threads(1)
    details["rotated_away"] = not os.path.exists(original_path)
    data = {name: task(name) for name in tasks}
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    return {name: measured(model, rows) for name, rows in data.items()}


@torch.inference_mode()
def measured(model: Any, rows: torch.Tensor) -> dict[str, float]:
    """The metrics over these rows, (rows, length): each byte but the first is foretold from those before it."""
    loss, right, count = 0.0, 0, 0
    for batch in rows.split(BATCH):
        logits, targets = model(input_ids=batch).logits[:, :-1], batch[:, 1:]
        loss += torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="sum").item()
        right += int((logits.argmax(-1) == targets).sum())
        count += targets.numel()
    return {"loss": loss / count, "bits_per_byte": loss / count / math.log(2), "accuracy": right / count}
