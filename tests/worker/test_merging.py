"""Sharded checkpoints in the eval job: merged once, handed over under their own name, gone from the scratch directory afterwards."""

import json
import os
import signal
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from conftest import REPOSITORY, House, until

EVALUATOR = """
import os
import torch
from assayer import load_state_dict
from safetensors.torch import load_file

def merged(checkpoint_path, original_path):
    held = load_file(os.path.join(checkpoint_path, "model.safetensors"))
    return {"mean": held["w"].float().mean(), "same_name": os.path.basename(checkpoint_path) == os.path.basename(original_path),
            "files": len(os.listdir(checkpoint_path)), "is_copy": checkpoint_path != original_path}

def other(checkpoint_path):
    return {"mean": load_file(os.path.join(checkpoint_path, "model.safetensors"))["w"].float().mean()}

def raw(checkpoint_path, original_path):
    return {"mean": load_state_dict(checkpoint_path)["w"].float().mean(),
            "is_merged": os.path.exists(os.path.join(checkpoint_path, "model.safetensors"))}

def chosen(checkpoint_path, weights):
    return {"mean": load_state_dict(checkpoint_path, weights)["w"].float().mean()}

def slow(checkpoint_path):
    import time
    while not os.path.exists(os.environ["TMPDIR"] + "/go"):
        time.sleep(0.05)
    return other(checkpoint_path)
"""


@pytest.fixture
def evaluator(house: House) -> str:
    return str(house.file("sharded.py", EVALUATOR))


def save_sharded(path: Path, value: float = 1.0, rows: int = 8) -> Path:
    """A distributed checkpoint by torch's own saver, the model beside an optimizer."""
    state = {"model": {"w": torch.full((rows, 8), value), "b": torch.zeros(3)}, "optim": {"w": torch.ones(rows, 8)}}
    with warnings.catch_warnings():
        # It says that this is one process; so it is.
        warnings.simplefilter("ignore")
        dcp.save(state, checkpoint_id=str(path), no_dist=True)
    return path


def save_ranks(path: Path, value: float, average: float) -> Path:
    """One rank's files as LMMs-Engine lays them, with a moving average."""
    for folder, number in (("pytorch_model_fsdp_0", value), ("pytorch_ema_model_fsdp_0", average)):
        (path / folder).mkdir(parents=True)
        torch.save({"w": torch.full((4, 4), number)}, path / folder / "model_world_size_1_rank_0.pt")
    (path / "config.json").write_text("{}")
    return path


def scratch(house: House) -> list[str]:
    folder = house.root / "tmp" / f"assayer-scratch-{os.getuid()}"
    return sorted(path.name for path in folder.iterdir() if path.name != "lock") if folder.exists() else []


def test_an_evaluator_of_a_sharded_checkpoint_gets_a_merged_directory(house: House, evaluator: str) -> None:
    save_sharded(house.runs / "step_100", 2.0)
    (house.runs / "step_100" / "tokenizer.json").write_text("{}")
    house.once(evaluator=f"{evaluator}:merged")
    record = house.record("step_100", "merged")
    assert record
    assert record["status"] == "finished"
    assert record["metrics"] == {"mean": 2.0, "same_name": 1, "files": 2, "is_copy": 1}
    assert (record["format"], record["weights"], record["step"]) == ("dcp", "regular", 100)
    merged = record["merged"]
    assert (merged["from"], merged["bytes"], merged["tensors"], merged["made_now"]) == ("dcp", 8 * 8 * 4 + 3 * 4, 2, True)
    assert record["seconds"].keys() == {"merge", "evaluate"}
    assert any("no config.json" in note for note in record["notes"])
    assert scratch(house) == []


def test_the_config_of_the_run_is_found_though_the_checkpoint_is_merged_from_its_hold(house: House, evaluator: str) -> None:
    save_sharded(house.runs / "step_100", 2.0)
    (house.runs / "config.json").write_text('{"model_type": "none-such"}')
    house.once(evaluator=f"{evaluator}:merged")
    record = house.record("step_100", "merged")
    assert record
    assert record["metrics"]["files"] == 2, "the weights and the config"
    assert not any("no config.json" in note for note in record["notes"])


def test_a_checkpoint_that_needs_no_merge_is_handed_over_as_it_lies(house: House) -> None:
    house.save("model_step1.pt")
    house.once()
    record = house.record("model_step1.pt")
    assert record
    assert record["merged"] is None
    assert record["seconds"].keys() == {"evaluate"}


def test_both_weights_give_two_records(house: House, evaluator: str) -> None:
    save_ranks(house.runs / "checkpoint-10", 1.0, 3.0)
    house.once("--weights", "both", evaluator=f"{evaluator}:other")
    told = {name: (record["weights"], record["metrics"]["mean"]) for name, record in house.records().items()}
    assert told == {"checkpoint-10.json": ("regular", 1.0), "checkpoint-10@ema.json": ("ema", 3.0)}


def test_what_holds_no_ema_weights_is_skipped_and_that_is_said(house: House, evaluator: str) -> None:
    save_sharded(house.runs / "step_100")
    done = house.once("--weights", "ema", evaluator=f"{evaluator}:other")
    assert "holds no EMA weights" in done.stdout
    assert house.records() == {}


def test_what_a_built_in_evaluator_is_given_is_looked_up_where_the_command_was_given(house: House) -> None:
    save_sharded(house.runs / "step_1")
    (house.runs / "config.json").write_text("{}")
    house.file("mine/held_out.txt", "some text")
    house.once("-E", "data=held_out.txt", evaluator="loss", cwd=house.root / "mine", env={"PYTHONPATH": str(REPOSITORY)}, check=False)
    record = house.record("step_1", "loss")
    assert record
    # The text was found, so that it is known to need a tokenizer.
    assert record["error"]["message"].startswith("there is no tokenizer in the checkpoint or its run's directory")


def test_with_merge_never_the_evaluator_reads_the_shards_itself(house: House, evaluator: str) -> None:
    save_sharded(house.runs / "step_100", 5.0)
    house.once("--merge", "never", evaluator=f"{evaluator}:raw")
    record = house.record("step_100", "raw")
    assert record
    assert record["metrics"] == {"mean": 5.0, "is_merged": 0}
    assert record["merged"] is None


def test_an_evaluator_of_raw_ema_weights_must_ask_which_weights_are_meant(house: House, evaluator: str) -> None:
    save_ranks(house.runs / "checkpoint-10", 1.0, 3.0)
    words = ["--evaluator", f"{evaluator}:raw", "--evaluator", f"{evaluator}:chosen", "--retries", 0]
    words += ["--merge", "never", "--weights", "ema"]
    house.command("watch", "--directory", house.runs, *words, "--polling_interval", 1, "--once", check=False)
    told = {name: house.record("checkpoint-10@ema", name) for name in ("raw", "chosen")}
    assert told["raw"] and told["chosen"]
    assert told["raw"]["status"] == "failed" and "takes no parameter called weights" in told["raw"]["error"]["message"]
    assert told["chosen"]["metrics"] == {"mean": 3.0}


def test_two_workers_that_need_the_same_merge_do_it_once(house: House, evaluator: str) -> None:
    save_sharded(house.runs / "step_100", 2.0, rows=4096)
    words = ["--evaluator", f"{evaluator}:other", "--evaluator", f"again={evaluator}:merged", "--num_eval_workers", 2]
    house.command("watch", "--directory", house.runs, *words, "--polling_interval", 1, "--once")
    records = [house.record("step_100", name) for name in ("other", "again")]
    assert sorted(bool(record and record["merged"]["made_now"]) for record in records) == [False, True]
    assert all(record and record["metrics"]["mean"] == 2.0 for record in records)
    assert scratch(house) == []


def test_too_little_scratch_is_a_failure_that_names_both_numbers(house: House, evaluator: str) -> None:
    save_sharded(house.runs / "step_100")
    house.once("--scratch_bytes", "100", evaluator=f"{evaluator}:other", check=False)
    record = house.record("step_100", "other")
    assert record
    assert (record["status"], record["attempts"], record["error"]["cause"]) == ("failed", 1, "merge")
    assert "takes 268 bytes, --scratch_bytes allows 100" in record["error"]["message"]
    assert scratch(house) == []


def test_a_damaged_shard_is_a_failure_that_names_file_and_tensor(house: House, evaluator: str) -> None:
    path = save_sharded(house.runs / "step_100", rows=512) / "__0_0.distcp"
    told = path.stat()
    data = bytearray(path.read_bytes())
    place = data.index(b"\x00\x00\x80\x3f" * 100)
    data[place + 50] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(told.st_atime_ns, told.st_mtime_ns))
    house.once(evaluator=f"{evaluator}:other", check=False)
    record = house.record("step_100", "other")
    assert record
    assert (record["status"], record["error"]["cause"]) == ("failed", "merge")
    assert "__0_0.distcp is damaged" in record["error"]["message"]
    assert scratch(house) == []


def test_weights_of_another_model_than_the_config_says_are_never_evaluated(house: House, evaluator: str) -> None:
    path = save_sharded(house.runs / "step_100")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 8}
    (path / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"], **sizes}))
    house.once(evaluator=f"{evaluator}:other", check=False)
    record = house.record("step_100", "other")
    assert record
    assert record["status"] == "failed"
    assert "LlamaForCausalLM" in record["error"]["message"]
    assert "unexpected (b, w)" in record["error"]["message"]


def test_a_checkpoint_saved_again_while_it_waits_is_superseded_and_the_new_one_evaluated(house: House, evaluator: str) -> None:
    path = save_sharded(house.runs / "step_100", 1.0)
    house.watch("--eval_existing", "--num_eval_workers", 1, evaluator=f"{evaluator}:slow")
    until(lambda: scratch(house) != [])
    save_sharded(path, 7.0)
    (house.root / "tmp" / "go").touch()

    def finished() -> bool:
        record: dict[str, Any] | None = house.record("step_100", "slow")
        return record is not None and record["status"] == "finished" and record["metrics"]["mean"] == 7.0

    until(finished)
    house.shutdown()
    assert scratch(house) == []


def test_a_worker_killed_while_it_evaluates_leaves_its_merge_to_the_next_one(house: House, evaluator: str) -> None:
    save_sharded(house.runs / "step_100", 4.0)
    house.watch("--eval_existing", "--num_eval_workers", 1, evaluator=f"{evaluator}:slow")
    until(lambda: any((house.root / "tmp").glob("assayer-scratch-*/*/step_100/model.safetensors")))
    (worker,) = house.workers("eval")
    os.kill(worker, signal.SIGKILL)
    until(lambda: house.workers("eval") not in ([], [worker]), 60)
    (house.root / "tmp" / "go").touch()
    until(lambda: house.record("step_100", "slow"), 60)
    record = house.record("step_100", "slow")
    assert record
    assert (record["status"], record["metrics"]["mean"]) == ("finished", 4.0)
    house.shutdown()
    assert scratch(house) == []


def test_waiting_for_room_in_the_scratch_directory_is_no_attempt(house: House, evaluator: str) -> None:
    for step in (1, 2):
        save_sharded(house.runs / f"step_{step}", float(step))
    words = ["--eval_existing", "--num_eval_workers", 2, "--scratch_bytes", "300"]
    house.watch(*words, evaluator=f"{evaluator}:slow")
    until(lambda: any("merge of" in path.read_text() for path in house.runs.glob("evals/slow/*.log")))
    time.sleep(1)
    assert len([name for name in scratch(house) if "." not in name]) < 3
    (house.root / "tmp" / "go").touch()
    until(lambda: len(house.records()) == 2)
    told = {(r["status"], r["attempts"], r["metrics"]["mean"]) for r in house.records().values()}
    assert told == {("finished", 1, 1.0), ("finished", 1, 2.0)}
    house.shutdown()
    assert scratch(house) == []


def test_what_could_not_be_read_this_time_is_tried_again(house: House, evaluator: str) -> None:
    (save_sharded(house.runs / "step_100") / "config.json").write_text("{")
    house.once("--retries", 1, evaluator=f"{evaluator}:other", check=False)
    record = house.record("step_100", "other")
    assert record
    assert (record["status"], record["attempts"], record["error"]["cause"]) == ("failed", 2, "read")
    assert "config.json" in record["error"]["message"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--hf_config", "nowhere"), "nowhere is not there"),
        (("--scratch_dir", "nowhere"), "nowhere is not there"),
        (("--scratch_bytes", "much"), "'much' is no size"),
        (("--key_map", "nowhere.json"), "kempnerforge, torchtitan-llama3"),
    ],
)
def test_a_merge_that_cannot_be_carried_out_is_refused_when_it_is_asked_for(house: House, words: tuple[str, str], told: str) -> None:
    done = house.watch(*words, check=False)
    assert done.returncode == 2
    assert told in done.stderr
    assert len(done.stderr.splitlines()) == 1
