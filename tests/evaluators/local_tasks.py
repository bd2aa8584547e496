"""A tiny Llama with a tokenizer of its own, and tasks whose data lie on this disk: what lm-eval's evaluator is tried with."""

import json
import random
from pathlib import Path
from typing import Any

WORDS = [
    "the",
    "a",
    "cat",
    "dog",
    "sun",
    "moon",
    "runs",
    "sleeps",
    "sings",
    "under",
    "over",
    "red",
    "blue",
    "old",
    "new",
    "tree",
    "house",
    "river",
    "stone",
    "bird",
]

MULTIPLE_CHOICE = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
    train: {train}
test_split: test
training_split: train
fewshot_split: train
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: acc_norm
    aggregation: mean
    higher_is_better: true
metadata:
  version: 2.0
"""

PERPLEXITY = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - metric: word_perplexity
  - metric: byte_perplexity
  - metric: bits_per_byte
metadata:
  version: 1.0
"""

GENERATION = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[answer][0]}}}}"
generation_kwargs:
  until: ["\\n"]
  max_gen_toks: 6
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
filter_list:
  - name: first-letter
    filter:
      - function: regex
        regex_pattern: "(\\\\w)"
      - function: take_first
  - name: whole
    filter:
      - function: take_first
metadata:
  version: 1.0
"""

GROUP = """
group: {name}
task: [{members}]
aggregate_metric_list:
  - metric: acc
    weight_by_size: true
metadata:
  version: 1.0
"""


def sentence(chance: random.Random, words: int) -> str:
    return " ".join(chance.choices(WORDS, k=words))


def questions(count: int, seed: int, choices: int = 4) -> list[dict[str, Any]]:
    chance = random.Random(seed)
    return [
        {
            "question": sentence(chance, chance.randint(3, 20)),
            "choices": [sentence(chance, chance.randint(1, 3)) for _ in range(choices)],
            "answer": chance.randrange(choices),
        }
        for _ in range(count)
    ]


def texts(count: int, seed: int) -> list[dict[str, Any]]:
    chance = random.Random(seed)
    return [{"text": sentence(chance, chance.randint(5, 120))} for _ in range(count)]


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_tasks(folder: Path, size: int = 24) -> Path:
    """A folder with ``colours`` and ``animals`` (choices), their group ``things``, ``prose`` (perplexity), ``answers`` (generation)."""
    folder.mkdir(parents=True, exist_ok=True)
    train = write_lines(folder / "train.jsonl", questions(8, seed=9))
    for seed, (name, count) in enumerate({"colours": size, "animals": size // 2}.items()):
        data = write_lines(folder / f"{name}.jsonl", questions(count, seed))
        (folder / f"{name}.yaml").write_text(MULTIPLE_CHOICE.format(name=name, data=data, train=train))
    data = write_lines(folder / "prose.jsonl", texts(size // 2, seed=3))
    (folder / "prose.yaml").write_text(PERPLEXITY.format(name="prose", data=data))
    data = write_lines(folder / "answers.jsonl", questions(size // 2, seed=4))
    (folder / "answers.yaml").write_text(GENERATION.format(name="answers", data=data))
    (folder / "things.yaml").write_text(GROUP.format(name="things", members="colours, animals"))
    return folder


def save_model(folder: Path, seed: int = 0, **config: Any) -> Path:
    """A Llama of two layers (32 dimensions, 128 positions) with random weights, and a byte-level BPE tokenizer of the tasks' words."""
    import torch
    import transformers
    from tokenizers import ByteLevelBPETokenizer

    folder.mkdir(parents=True, exist_ok=True)
    chance = random.Random(0)
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(
        [sentence(chance, 50) for _ in range(50)], vocab_size=320, special_tokens=["<s>", "</s>"], show_progress=False
    )
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    torch.manual_seed(seed)
    described = transformers.LlamaConfig(
        vocab_size=len(tokenizer), max_position_embeddings=128, bos_token_id=0, eos_token_id=1, tie_word_embeddings=False, **shape | config
    )
    model = transformers.LlamaForCausalLM(described)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
