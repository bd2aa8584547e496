"""Makes the data of a run from the text of Python's own standard library: nothing is downloaded.

``python corpus.py OUT`` writes into the run's directory

- the tokenizer (``tokenizer.json``, ``tokenizer_config.json``): a byte-level BPE, trained on the training files;
- ``train.npy``: the training files as token ids;
- ``heldout.txt``: the beginnings of the files that training never sees;
- ``choice.jsonl``, ``passages.jsonl``: the documents of the two tasks, from those same files;
- ``tasks/``: the two tasks for lm-eval, with the absolute paths of their documents.
"""

import argparse
import json
import random
import re
import sysconfig
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TASKS = Path(__file__).resolve().parent / "tasks"
END = "<|endoftext|>"
# Tests, packages that are no part of the library, and tables of characters.
LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "encodings"}
# One file in so many is held out of training.
HELD_OUT = 10
# Characters that ``heldout.txt`` takes of each file.
BEGINNING = 3000
# Characters of a passage that is to be continued, and of what follows it.
CONTEXT, CONTINUATION = 160, 40
# Characters of a passage whose perplexity is taken.
PASSAGE = 1000


def library() -> list[str]:
    """The texts of the standard library's modules, in the order of their paths."""
    root = Path(sysconfig.get_path("stdlib"))
    files = [path for path in sorted(root.rglob("*.py")) if not LEFT_OUT & set(path.relative_to(root).parts)]
    texts = [path.read_text(encoding="utf-8", errors="ignore") for path in files]
    return [text for text in texts if len(text) > PASSAGE]


def split(texts: list[str]) -> tuple[list[str], list[str]]:
    """What to train on, and what is held out: whole files."""
    train = [text for i, text in enumerate(texts) if i % HELD_OUT]
    return train, texts[::HELD_OUT]


def train_tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of this many tokens; any text can be said in it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END)


def token_ids(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> "np.ndarray[Any, np.dtype[np.uint16]]":
    """All texts as one row of tokens, each with the end token behind it."""
    backend = tokenizer.backend_tokenizer
    end, encoded = backend.token_to_id(END), backend.encode_batch(texts)
    return np.concatenate([np.array([*row.ids, end], dtype=np.uint16) for row in encoded])


def cut(text: str, chance: random.Random) -> tuple[str, str]:
    """A passage of the text and what follows it; they part before a space, where no token reaches across."""
    spaces = [match.start() for match in re.finditer(r"(?<=\S) (?=\S)", text) if CONTEXT <= match.start() < len(text) - CONTINUATION]
    middle = chance.choice(spaces)
    return text[middle - CONTEXT : middle], text[middle : middle + CONTINUATION]


def choices(texts: list[str], count: int) -> list[dict[str, Any]]:
    """Questions: which of four continuations follows this passage? The other three follow passages of other files."""
    chance = random.Random(0)
    questions: list[dict[str, Any]] = []
    for _ in range(count):
        (context, right), *others = (cut(text, chance) for text in chance.sample(texts, 4))
        options = [right, *(continuation for _, continuation in others)]
        chance.shuffle(options)
        questions.append({"context": context, "choices": options, "label": options.index(right)})
    return questions


def passages(texts: list[str], count: int) -> list[dict[str, Any]]:
    """Passages of the held-out files, one a file, from its middle."""
    return [{"text": text[len(text) // 2 :][:PASSAGE]} for text in texts[:count]]


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def prepare(out: Path, vocabulary: int = 1024, questions: int = 400) -> None:
    """Writes all of it into ``out``, the tasks last; does nothing where they are."""
    if (out / "tasks").exists():
        return
    out.mkdir(parents=True, exist_ok=True)
    train, held_out = split(library())
    tokenizer = train_tokenizer(train, vocabulary)
    tokenizer.save_pretrained(out)
    np.save(out / "train.npy", token_ids(tokenizer, train))
    (out / "heldout.txt").write_text("\n".join(text[:BEGINNING] for text in held_out))
    data = {"choice": out.resolve() / "choice.jsonl", "passages": out.resolve() / "passages.jsonl"}
    write_lines(data["choice"], choices(held_out, questions))
    write_lines(data["passages"], passages(held_out, 40))
    tasks = {path.name: Template(path.read_text()) for path in TASKS.glob("*.yaml")}
    (out / "tasks").mkdir()
    for name, template in tasks.items():
        # A string of JSON is one of YAML.
        (out / "tasks" / name).write_text(template.substitute({key: json.dumps(str(path)) for key, path in data.items()}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the run's directory")
    parser.add_argument("--vocabulary", type=int, default=1024)
    parser.add_argument("--questions", type=int, default=400, help="how many the multiple choice task has")
    options = parser.parse_args()
    prepare(options.out, options.vocabulary, options.questions)


if __name__ == "__main__":
    main()
