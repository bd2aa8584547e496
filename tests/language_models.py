"""A small real language model and its tokenizer, made in a second; each test module that needs them makes its own once."""

from pathlib import Path

import torch

TEXT = "The quick brown fox jumps over the lazy dog. Ein Käfer krabbelt über die Straße; naïve café, 東京, 🦊!\n" * 8
END = "<|end|>"


def write_tokenizer(folder: Path, vocabulary: int = 320) -> None:
    """A byte-level BPE tokenizer trained on ``TEXT``, with an end-of-text token."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator([TEXT], vocab_size=vocabulary, min_frequency=1, special_tokens=[END], show_progress=False)
    PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, eos_token=END).save_pretrained(folder)


def write_llama(folder: Path, *, seed: int = 0, vocabulary: int = 320, tied: bool = False, dtype: torch.dtype = torch.float32) -> None:
    """A Llama of two layers with random weights: its config and a safetensors file."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    torch.nn.Module.to(model, dtype)
    model.save_pretrained(folder)
