"""Bits per byte on the topics that training never saw; the sharded checkpoint arrives merged, as a Hugging Face directory."""

import math

import torch
from train import LENGTH, text
from transformers import AutoModelForCausalLM


def bits_per_byte(checkpoint_path: str, windows: int = 64) -> dict[str, float]:
    model = AutoModelForCausalLM.from_pretrained(checkpoint_path)
    model.eval()
    data = text(held_out=True)
    tokens = data[: windows * LENGTH].reshape(windows, LENGTH)
    with torch.no_grad():
        loss = model(input_ids=tokens, labels=tokens).loss.item()
    return {"loss": loss, "bits_per_byte": loss / math.log(2)}
