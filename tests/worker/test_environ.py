"""What a job sees of the machine."""

from pathlib import Path

import pytest

from assayer.errors import UsageError
from assayer.queues.connect import Target
from assayer.worker.environ import evaluation_environment, gpu_uuids, parse_gpus, visible_gpus
from assayer.worker.launch import Crew, cpu_slots, eval_slots, gpu_slots, watch_slots

SMI = """#!/bin/sh
cat <<'END'
GPU 0: NVIDIA H100 (UUID: GPU-aaaa-0)
GPU 1: NVIDIA H100 (UUID: GPU-bbbb-1)
  MIG 1g.10gb     Device  0: (UUID: MIG-c1)
  MIG 1g.10gb     Device  1: (UUID: MIG-c2)
END
"""


@pytest.fixture
def two_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose nvidia-smi shows one whole GPU and one that is cut in two."""
    (tmp_path / "nvidia-smi").write_text(SMI)
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")


def test_the_launchers_ranks_are_gone_and_the_job_stays() -> None:
    launcher = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "MASTER_ADDR": "n1", "MASTER_PORT": "1", "TORCHELASTIC_RUN_ID": "x"}
    slurm = {
        "SLURM_PROCID": "3",
        "SLURM_LOCALID": "1",
        "SLURM_NTASKS": "8",
        "SLURM_NTASKS_PER_NODE": "4",
        "SLURM_NODEID": "0",
        "SLURM_STEP_ID": "0",
    }
    kept = {"SLURM_JOB_ID": "77", "PATH": "/bin", "HF_HOME": "/hf", "RANKING": "1"}
    seen = evaluation_environment({**launcher, **slurm, "OMPI_COMM_WORLD_RANK": "1", "PMI_RANK": "1", **kept}, None)
    assert seen == kept


def test_a_worker_sees_exactly_its_own_gpus() -> None:
    assert evaluation_environment({"CUDA_VISIBLE_DEVICES": "0,1,2"}, ("1",))["CUDA_VISIBLE_DEVICES"] == "1"
    assert evaluation_environment({}, ("GPU-a", "GPU-b"))["CUDA_VISIBLE_DEVICES"] == "GPU-a,GPU-b"
    assert evaluation_environment({}, ("0",))["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    assert "CUDA_VISIBLE_DEVICES" not in evaluation_environment({}, None)


@pytest.mark.parametrize(
    ("chosen", "gpus"),
    [
        ("0,2", ("0", "2")),
        ("GPU-1b,MIG-2c", ("GPU-1b", "MIG-2c")),
        ("", ()),
        ("-1", ()),
        ("1,-1,2", ("1",)),
        ("NoDevFiles", ()),
        (" 0 , 1 ", ("0", "1")),
    ],
)
def test_cuda_visible_devices_is_read_as_cuda_reads_it(chosen: str, gpus: tuple[str, ...]) -> None:
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": chosen}) == gpus


@pytest.mark.usefixtures("two_gpus")
def test_nvidia_smi_is_asked_where_nothing_is_chosen() -> None:
    assert visible_gpus({}) == ("0", "MIG-c1", "MIG-c2")
    assert gpu_uuids() == {"0": "GPU-aaaa-0", "1": "GPU-bbbb-1"}


@pytest.mark.usefixtures("two_gpus")
def test_a_gpu_by_id_and_by_uuid_is_one_slot() -> None:
    (by_id,) = gpu_slots("evaluation", ("0",))
    (by_uuid,) = gpu_slots("evaluation", ("GPU-aaaa-0",))
    assert by_id.locks == by_uuid.locks == ["gpu-GPU-aaaa-0"]


def test_several_gpus_an_evaluation_hold_a_lock_each() -> None:
    slots = gpu_slots("evaluation", ("GPU-a", "GPU-b", "GPU-c", "GPU-d", "GPU-e"), each=2)
    assert [slot.gpus for slot in slots] == [("GPU-a", "GPU-b"), ("GPU-c", "GPU-d")]
    assert slots[0].locks == ["gpu-GPU-a", "gpu-GPU-b"]


def test_the_default_is_one_worker_a_visible_gpu_and_one_without() -> None:
    assert len(eval_slots("q", None, "r", {"CUDA_VISIBLE_DEVICES": "GPU-a,GPU-b"})) == 2
    assert len(eval_slots("q", 1, "r", {"CUDA_VISIBLE_DEVICES": "GPU-a,GPU-b"})) == 1
    assert len(eval_slots("q", None, "r", {"CUDA_VISIBLE_DEVICES": ""})) == 1
    assert len(eval_slots("q", 3, "r", {"CUDA_VISIBLE_DEVICES": ""})) == 3
    assert eval_slots("q", 0, "r", {"CUDA_VISIBLE_DEVICES": "GPU-a"}) == []


def test_slots_of_different_queues_and_redis_stay_apart() -> None:
    keys = [slot.key for q in ("a", "b") for r in ("r", "s") for slot in [*watch_slots(q, 1, r), *cpu_slots(q, 2, r)]]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("text", ["a", "0,x", "0,0", "-1"])
def test_a_list_of_gpus_says_what_is_allowed(text: str) -> None:
    with pytest.raises(UsageError, match="GPU"):
        parse_gpus(text)


def test_a_slot_that_shares_a_gpu_with_another_one_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Crew, "start_supervisor", lambda crew: None)
    crew = Crew(tmp_path, Target("redis://localhost:1", False))
    crew.want(gpu_slots("q", ("GPU-a", "GPU-b")))
    pairs = gpu_slots("q", ("GPU-a", "GPU-b", "GPU-c", "GPU-d"), each=2)
    crew.want(pairs)

    (told,) = crew.conflicts(pairs)

    assert told.startswith("gpuGPU-a+GPU-b shares a GPU with gpuGPU-a, a worker's slot of 1")
