"""Every format is asked everything, and every other sample is still known for what it is."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from assayer import formats
from assayer.checkpoint import Position, identity, list_path

State = dict[str, torch.Tensor]


def state() -> State:
    return {"w": torch.arange(12.0).reshape(3, 4), "b": torch.zeros(2)}


def torch_zip(folder: Path) -> Path:
    torch.save(state(), folder / "model_step5.pt")
    return folder / "model_step5.pt"


def torch_legacy(folder: Path) -> Path:
    torch.save(state(), folder / "epoch=3-step=120.ckpt", _use_new_zipfile_serialization=False)
    return folder / "epoch=3-step=120.ckpt"


def safetensors_file(folder: Path) -> Path:
    save_file(state(), folder / "model_000070.safetensors")
    return folder / "model_000070.safetensors"


def model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=32,
        )
    )


def hf_export(folder: Path) -> Path:
    model().save_pretrained(folder / "export")
    return folder / "export"


def hf_sharded(folder: Path) -> Path:
    model().save_pretrained(folder / "checkpoint-40", max_shard_size="5KB")
    (folder / "checkpoint-40" / "trainer_state.json").write_text(
        json.dumps({"global_step": 40, "epoch": 0.5, "num_input_tokens_seen": 8192})
    )
    return folder / "checkpoint-40"


def hf_bin(folder: Path) -> Path:
    # transformers 5 writes safetensors alone; this is what its version 4 wrote with safe_serialization=False.
    path = folder / "checkpoint-7"
    path.mkdir()
    (path / "config.json").write_text("{}")
    torch.save(state(), path / "pytorch_model.bin")
    return path


def peft_adapter(folder: Path) -> Path:
    # As peft's save_pretrained lays it down (peft/peft_model.py): weights first, config second.
    path = folder / "lora-9"
    path.mkdir()
    save_file(state(), path / "adapter_model.safetensors")
    (path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    return path


SAMPLES: list[tuple[Callable[[Path], Path], str, Position, bool]] = [
    (torch_zip, "single_file", Position(step=5), True),
    (torch_legacy, "lightning_file", Position(step=120, epoch=3), False),
    (safetensors_file, "single_file", Position(step=70), True),
    (hf_export, "hf_dir", Position(), False),
    (hf_sharded, "hf_dir", Position(step=40, epoch=0.5, tokens=8192), True),
    (hf_bin, "hf_dir", Position(step=7), False),
    (peft_adapter, "hf_dir", Position(step=9), False),
]


@pytest.mark.parametrize(("write", "name", "position", "marked"), SAMPLES, ids=[s[0].__name__ for s in SAMPLES])
def test_each_sample_is_known_whole_and_placed(
    tmp_path: Path, write: Callable[[Path], Path], name: str, position: Position, marked: bool
) -> None:
    found = formats.identify_path(str(write(tmp_path)))
    assert found
    checkpoint, listing = found.checkpoint, found.listing
    assert (checkpoint.format, checkpoint.position) == (name, position)
    form = formats.of(checkpoint)
    assert form.missing(listing) is None
    assert (form.unmarked(listing) is None) is marked
    weights = form.weights(listing)
    assert weights
    assert set(weights) <= listing.names
    assert len(identity(listing, weights)) == 32


@pytest.mark.parametrize("write", [s[0] for s in SAMPLES if s[0] is not torch_legacy], ids=lambda w: w.__name__)
def test_a_sample_whose_weights_are_cut_short_is_not_whole(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    path = str(write(tmp_path))
    listing = list_path(path)
    found = formats.identify(listing)
    assert found
    form = formats.of(found.checkpoint)
    for name in form.weights(listing):
        file = listing.file(name)
        whole = file.read_bytes()
        file.write_bytes(whole[:-1])
        assert form.missing(list_path(path)), name
        file.write_bytes(whole)
    assert form.missing(list_path(path)) is None


def test_every_format_answers_every_question() -> None:
    for name, form in formats.all_formats().items():
        for question in ("REFINES", "FOLDERS", "SHARDED", "claims", "missing", "unmarked", "position", "weights", "variants", "tensors"):
            assert hasattr(form, question), f"{name} does not answer {question}"
        assert set(form.REFINES) <= set(formats.all_formats())


def test_missing_shards_and_a_growing_index_are_named(tmp_path: Path) -> None:
    path = hf_sharded(tmp_path)
    form = formats.all_formats()["hf_dir"]
    index = path / "model.safetensors.index.json"
    whole = index.read_text()
    shard = sorted(path.glob("model-*.safetensors"))[0]
    kept = shard.read_bytes()
    shard.unlink()
    assert form.missing(list_path(str(path))) == f"{shard.name} is missing"
    shard.write_bytes(kept)
    index.write_text(whole[:50])
    assert form.missing(list_path(str(path))) == "model.safetensors.index.json is being written"
    index.unlink()
    assert form.missing(list_path(str(path))) == "no model.safetensors.index.json yet"


def test_an_adapter_without_its_config_is_not_whole(tmp_path: Path) -> None:
    path = peft_adapter(tmp_path)
    (path / "adapter_config.json").unlink()
    listing = list_path(str(path))
    assert formats.identify(listing)
    assert formats.all_formats()["hf_dir"].missing(listing) == "no adapter_config.json yet"


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "{",
        '{"global_step": true, "epoch": NaN}',
        '{"global_step": -1, "epoch": 1e999}',
        '{"global_step": "x", "epoch": []}',
        "1" * 5000,
    ],
)
def test_what_a_damaged_trainer_state_holds_is_no_position(tmp_path: Path, text: str) -> None:
    path = hf_sharded(tmp_path)
    (path / "trainer_state.json").write_text(text)
    found = formats.identify(list_path(str(path)))
    assert found
    assert found.checkpoint.position == Position(step=40)


@pytest.mark.parametrize(
    "name",
    [
        *(
            "optimizer.pt",
            "scheduler.pt",
            "scaler.pt",
            "rng_state.pth",
            "rng_state_0.pth",
            "training_args.bin",
            "optimizer.bin",
            "random_states_0.pkl",
        ),
        *(
            "model_world_size_4_rank_0.pt",
            "mp_rank_00_model_states.pt",
            "zero_pp_rank_0_mp_rank_00_optim_states.pt",
            "metadata_000000500.pt",
        ),
        *(
            "per_rank_metadata_0_000000500.pt",
            "common.pt",
            "train_state.pt",
            "adapter_model.safetensors",
            "model-00001-of-00002.safetensors",
        ),
        *("pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "notes.txt", "config.json", "optimizer_1.bin", "custom_checkpoint_0.pt"),
    ],
)
def test_what_trainers_lay_beside_a_model_is_no_checkpoint(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    assert formats.identify(list_path(str(tmp_path / name))) is None


@pytest.mark.parametrize(
    ("stem", "position"),
    [
        ("model_step5", Position(step=5)),
        ("checkpoint-500", Position(step=500)),
        ("model_epoch3", Position(epoch=3)),
        ("epoch=2-step=40", Position(step=40, epoch=2)),
        ("ep1-ba2000", Position(step=2000, epoch=1)),
        ("iter_0000500", Position(step=500)),
        ("global_step12", Position(step=12)),
        ("ckpt_000120", Position(step=120)),
        ("step-7", Position(step=7)),
        ("model_v2_final", Position()),
        ("llama3", Position()),
        ("last", Position()),
    ],
)
def test_a_name_tells_the_position(stem: str, position: Position) -> None:
    from assayer.formats.single_file import position_in

    assert position_in(stem) == position


@pytest.mark.parametrize(
    ("path", "position"),
    [
        ("step_500/model.pt", Position(step=500)),
        ("checkpoint-7/weights.safetensors", Position(step=7)),
        ("epoch3/model.pt", Position(epoch=3)),
        # A run, whose checkpoints tell their own; and folders that are called after something else.
        ("iter1/model_step100.pt", Position(step=100)),
        ("iter1/best.pt", Position()),
        ("step_7/ema.pt", Position()),
        ("lr_step_500_b/model.pt", Position()),
        ("exp1/model.pt", Position()),
    ],
)
def test_a_file_in_a_folder_of_its_own_stands_where_that_says(tmp_path: Path, path: str, position: Position) -> None:
    file = tmp_path / path
    file.parent.mkdir()
    torch.save({"w": torch.zeros(1)}, file) if file.suffix == ".pt" else save_file({"w": torch.zeros(1)}, file)
    found = formats.identify_path(str(file))
    assert found is not None
    assert found.checkpoint.position == position


def test_while_transformers_saves_it_is_never_whole_too_early(tmp_path: Path) -> None:
    """Polled between all steps of the trainer's own saver: once reported whole, the weights do not change any more."""
    import threading

    from transformers import Trainer, TrainingArguments

    class Rows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
        def __len__(self) -> int:
            return 8

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            return {"input_ids": torch.arange(8), "labels": torch.arange(8)}

    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=3,
        save_steps=1,
        per_device_train_batch_size=4,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        logging_steps=99,
    )
    seen: dict[str, str] = {}
    broken: list[str] = []
    done = threading.Event()

    def poll() -> None:
        while not done.is_set():
            for path in tmp_path.glob("checkpoint-*"):
                try:
                    listing = list_path(str(path))
                    found = formats.identify(listing)
                    form = formats.all_formats()["hf_dir"]
                    if found is None or form.missing(listing) or form.unmarked(listing):
                        continue
                    read = identity(listing, form.weights(listing))
                except OSError:
                    continue
                if seen.setdefault(path.name, read) != read:
                    broken.append(path.name)
            time.sleep(0.001)

    thread = threading.Thread(target=poll)
    thread.start()
    try:
        Trainer(model=model(), args=arguments, train_dataset=Rows()).train()
        time.sleep(0.1)
    finally:
        done.set()
        thread.join()
    assert broken == []
    assert sorted(seen) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    for name, read in seen.items():
        listing = list_path(os.path.join(tmp_path, name))
        assert identity(listing, formats.all_formats()["hf_dir"].weights(listing)) == read
