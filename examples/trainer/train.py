"""Trains a small Llama on bytes of English with transformers' Trainer, on the CPU; its checkpoints are evaluated by a server meanwhile.

Two checkpoints are kept. The evaluations' metrics come back into the training's own TensorBoard run, beside its loss.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from text import LENGTH, manual, windows
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

from assayer.client import AsyncEvaluation
from assayer.client.callback import attach_to_trainer

CONFIG = LlamaConfig(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    max_position_embeddings=LENGTH,
    bos_token_id=None,
    eos_token_id=None,
)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "checkpoints")
    parser.add_argument("--server", default="http://127.0.0.1:8000")
    parser.add_argument("--steps", type=int, default=720)
    parser.add_argument("--save_every", type=int, default=60)
    options = parser.parse_args(words)
    if any(options.output.glob("checkpoint-*")):
        parser.error(f"{options.output} holds the checkpoints of an earlier run; remove it, or give another --output")
    set_seed(0)
    # The other core is the evaluations'.
    torch.set_num_threads(1)
    rows = windows(manual(held_out=False))
    trainer = Trainer(
        model=LlamaForCausalLM(CONFIG),
        args=TrainingArguments(
            str(options.output),
            max_steps=options.steps,
            save_steps=options.save_every,
            save_total_limit=2,
            per_device_train_batch_size=8,
            learning_rate=3e-3,
            warmup_steps=options.steps // 20,
            logging_steps=10,
            report_to=["tensorboard"],
            use_cpu=True,
            dataloader_pin_memory=False,
            disable_tqdm=True,
        ),
        train_dataset=[{"input_ids": row, "labels": row} for row in rows],
    )
    evaluation = AsyncEvaluation(
        {"server_url": options.server, "model": "bytes", "tasks": ["manual", "code"], "poll_interval": 1.0},
        output_dir=options.output,
        hold=12,
    )
    attach_to_trainer(trainer, evaluation, finish_timeout=600)
    trainer.train()


if __name__ == "__main__":
    main()
