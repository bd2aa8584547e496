"""The line, end to end, as scenes: real watches, workers and Redis, and checkpoints that ``torch.save`` wrote."""

import os
import re
import signal
import time
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, House, until

pytestmark = pytest.mark.usefixtures("without_torch")

# Slow unless a file says otherwise; slow, and telling that it has begun.
UNLESS_FAST = """
import os, time

def slow(checkpoint, original_path):
    time.sleep(0 if os.path.exists(original_path + '.fast') else 100)
    return {'m': 1}
"""
TELLING = """
import time

def slow(checkpoint, original_path):
    open(original_path + '.begun', 'a').write('x')
    time.sleep(3)
    return {'m': 1}
"""


def test_a_checkpoint_appears_and_its_metrics_lie_beside_it(house: House) -> None:
    house.watch()
    house.save("model_step5.pt", 0.25)
    record = until(lambda: house.record("model_step5.pt"))
    assert record["status"] == "finished"
    assert record["metrics"] == {"mean": 0.25}
    assert record["step"] == 5
    assert record["attempts"] == 1
    assert record["checkpoint"] == str(house.runs / "model_step5.pt")
    assert sorted(p.name for p in (house.runs / "evals" / "mean").iterdir()) == ["model_step5.pt.json", "model_step5.pt.log"]
    told = house.status()
    assert [w["queue"] for w in told["workers"]] == ["watch", "evaluation"]
    said = house.shutdown().stdout
    assert f"ended the watch of {house.runs} with mean" in said
    assert "the embedded Redis is stopped" in said
    assert house.processes() == {}


def test_a_half_written_file_is_not_evaluated_until_it_is_whole(house: House) -> None:
    whole = house.save("other/model_step1.pt", 3.0).read_bytes()
    house.watch("--quiet_period", 0)
    path = house.runs / "model_step2.pt"
    with path.open("wb") as file:
        file.write(whole[: len(whole) // 2])
        file.flush()
        until(lambda: any(c["state"] == "writing" for c in house.status()["watches"][0]["checkpoints"]))
        time.sleep(2)
        assert house.record("model_step2.pt") is None
        reason = house.status()["watches"][0]["checkpoints"][-1]["reason"]
        assert reason == "has no zip directory yet (it is written last)"
        file.write(whole[len(whole) // 2 :])
    assert until(lambda: house.record("model_step2.pt"))["metrics"] == {"mean": 3.0}


def test_a_checkpoint_half_written_when_the_watch_begins_is_new(house: House) -> None:
    whole = house.save("model_step1.pt").read_bytes()
    path = house.runs / "model_step2.pt"
    path.write_bytes(whole[:-100])
    house.watch()
    path.write_bytes(whole)
    until(lambda: house.record("model_step2.pt"))
    assert house.record("model_step1.pt") is None, "it was whole before: the baseline"


def test_a_restart_misses_nothing_that_appeared_meanwhile(house: House) -> None:
    house.save("model_step1.pt")
    house.watch()
    house.shutdown()
    house.save("model_step2.pt")
    house.watch()
    until(lambda: house.record("model_step2.pt"))
    house.shutdown()
    assert set(house.records()) == {"model_step2.pt.json"}


def test_a_redis_that_lost_everything_misses_nothing(house: House) -> None:
    house.save("model_step1.pt")
    house.watch()
    until(lambda: house.workers("eval"))
    house.connection().flushdb()
    house.save("model_step2.pt")
    until(lambda: house.record("model_step2.pt"))
    assert house.record("model_step1.pt") is None


def test_a_killed_embedded_redis_comes_back_with_its_data(house: House) -> None:
    house.watch()
    until(lambda: house.workers("eval"))
    pid = house.server.pid()
    assert pid
    os.kill(pid, signal.SIGKILL)
    house.save("model_step2.pt")
    until(lambda: house.record("model_step2.pt"), 60)
    assert house.server.pid() not in (pid, None)


def test_a_watch_worker_killed_in_mid_tick_is_replaced_and_the_chain_goes_on(house: House) -> None:
    """The first tick is made to stop before it schedules its successor; there it is killed."""
    source = f"""
import os, time
from assayer.queues import chain

go_on = chain.go_on

def stop_once(*words):
    if not os.path.exists({str(house.root / "reached")!r}):
        open({str(house.root / "reached")!r}, "w").close()
        time.sleep(100)
    return go_on(*words)

chain.go_on = stop_once
"""
    house.file("site/sitecustomize.py", source)
    house.environment["PYTHONPATH"] = f"{house.root / 'site'}:{REPOSITORY}"
    house.watch()
    until((house.root / "reached").exists)
    (pid,) = until(lambda: house.workers("watch"))
    os.kill(pid, signal.SIGKILL)
    house.save("model_step2.pt")
    until(lambda: house.record("model_step2.pt"))
    assert house.workers("watch") != [pid]


def test_a_watch_worker_killed_while_it_is_handed_a_tick_is_replaced(house: House) -> None:
    house.watch()
    (pid,) = until(lambda: house.workers("watch"))
    # Stopped first: the server hands the next tick to a worker that never begins it.
    os.kill(pid, signal.SIGSTOP)
    time.sleep(2.5)
    os.kill(pid, signal.SIGKILL)
    house.save("model_step2.pt")
    until(lambda: house.record("model_step2.pt"), 40)


def test_a_stand_by_watch_worker_goes_on_where_the_first_was_killed(house: House) -> None:
    house.watch("--num_watch_workers", 2)
    pids = until(lambda: len(house.workers("watch")) == 2 and house.workers("watch"))
    os.kill(pids[0], signal.SIGKILL)
    house.save("model_step2.pt")
    until(lambda: house.record("model_step2.pt"))


def test_a_killed_eval_worker_loses_no_evaluation_and_costs_no_attempt(house: House) -> None:
    slow = house.file(
        "slow.py",
        TELLING,
    )
    house.watch(evaluator=f"{slow}:slow")
    (pid,) = until(lambda: house.workers("eval"))
    house.save("model_step1.pt")
    until((house.runs / "model_step1.pt.begun").exists)
    os.kill(pid, signal.SIGKILL)
    record = until(lambda: house.record("model_step1.pt", "slow"), 60)
    assert record["status"] == "finished"
    assert record["attempts"] == 1
    assert (house.runs / "model_step1.pt.begun").read_text() == "xx"


def test_four_directories_are_watched_by_one_watch_worker(house: House) -> None:
    names = ["a", "b", "c", "d"]
    for name in names:
        (house.runs / name).mkdir()
    flags = [word for name in names for word in ("--directory", house.runs / name)]
    house.command("watch", *flags, "--evaluator", f"{house.evaluator}:mean", "--detach", "--polling_interval", 1)
    for i, name in enumerate(names):
        house.save(f"{name}/model_step1.pt", i)
    until(lambda: all(house.record(f"{name}/model_step1.pt") for name in names))
    assert len(house.workers("watch")) == 1
    assert len(house.workers("eval")) == 1


def test_two_commands_share_one_redis_and_start_no_second_worker(house: House) -> None:
    (house.runs / "a").mkdir()
    (house.runs / "b").mkdir()
    for name in ("a", "b"):
        house.command(
            "watch", "--directory", house.runs / name, "--evaluator", f"{house.evaluator}:mean", "--detach", "--polling_interval", 1
        )
    until(lambda: len(house.status()["workers"]) == 2)
    house.save("b/model_step1.pt")
    until(lambda: house.record("b/model_step1.pt"))
    assert len(house.status()["workers"]) == 2
    house.shutdown("--directory", house.runs / "a")
    told = house.status()
    assert [w["state"] for w in told["watches"]] == ["ended", "running"]


def test_two_watches_of_one_directory_are_one_watch_with_the_later_flags(house: House) -> None:
    house.watch()
    house.watch("--polling_interval", 7)
    (watch,) = house.status()["watches"]
    assert watch["polling_interval"] == 7
    refused = house.watch(evaluator=f"mean={house.file('b.py', 'def other(p): return {}')}:other", check=False)
    assert refused.returncode == 2
    assert "is watched with another evaluator called 'mean'" in refused.stderr


def test_subdirectories_are_watched_to_the_depth_asked_for(house: House) -> None:
    house.watch("--max_depth", 2)
    house.save("sub/model_step1.pt")
    house.save("sub/sub/model_step1.pt")
    until(lambda: house.record("sub/model_step1.pt"))
    time.sleep(1.5)
    assert house.record("sub/sub/model_step1.pt") is None
    assert (house.runs / "sub" / "evals" / "mean" / "model_step1.pt.json").exists()


def test_the_oldest_step_comes_first_in_natural_order(house: House) -> None:
    noted = house.file(
        "noted.py",
        f"def noted(path):\n    open({str(house.root / 'order')!r}, 'a').write(path.split('step')[1] + ' ')\n    return {{'m': 1}}\n",
    )
    for step in (10, 9, 100, 1):
        house.save(f"model_step{step}.pt", step)
    house.once("--eval_existing", evaluator=f"{noted}:noted")
    assert (house.root / "order").read_text().split() == ["1.pt", "9.pt", "10.pt", "100.pt"]


def test_with_newest_first_the_newest_step_comes_first(house: House) -> None:
    noted = house.file(
        "noted.py",
        f"def noted(path):\n    open({str(house.root / 'order')!r}, 'a').write(path.split('step')[1] + ' ')\n    return {{'m': 1}}\n",
    )
    for step in (10, 9, 100, 1):
        house.save(f"model_step{step}.pt", step)
    house.once("--order", "newest", evaluator=f"{noted}:noted")
    assert (house.root / "order").read_text().split() == ["100.pt", "10.pt", "9.pt", "1.pt"]


def test_every_takes_the_divisible_steps_and_always_the_last(house: House) -> None:
    for step in range(1, 6):
        house.save(f"model_step{step}.pt", step)
    house.once("--every", 2)
    assert set(house.records()) == {"model_step2.pt.json", "model_step4.pt.json", "model_step5.pt.json"}


def test_relative_paths_mean_the_same_from_two_working_directories(house: House) -> None:
    house.save("a/model_step1.pt", 1.0)
    house.save("b/model_step1.pt", 2.0)
    for name in ("a", "b"):
        words = ["--directory", ".", "--evaluator", "../../evaluator.py:mean", "--once", "--polling_interval", "1"]
        house.command("watch", *words, cwd=house.runs / name)
    assert house.record("a/model_step1.pt")["metrics"] == {"mean": 1.0}  # type: ignore[index]
    assert house.record("b/model_step1.pt")["metrics"] == {"mean": 2.0}  # type: ignore[index]


def test_a_directory_with_a_hostile_name_is_taken_literally(house: House) -> None:
    name = "g[1] ü '\""
    house.save(f"{name}/model_step1.pt", 4.0)
    house.command("watch", "--directory", house.runs / name, "--evaluator", f"{house.evaluator}:mean", "--once", "--polling_interval", 1)
    assert house.record(f"{name}/model_step1.pt")["metrics"] == {"mean": 4.0}  # type: ignore[index]


def test_a_pattern_lets_new_directories_join(house: House) -> None:
    (house.runs / "exp1").mkdir()
    words = ["--directory", f"{house.runs}/exp*", "--evaluator", f"{house.evaluator}:mean", "--detach", "--polling_interval", 1]
    house.command("watch", *words)
    house.save("exp2/model_step1.pt")
    until(lambda: house.record("exp2/model_step1.pt"))


def test_an_evaluator_may_import_its_neighbours_and_gets_what_it_names(house: House) -> None:
    house.file("kit/helper.py", "FACTOR = 10\n")
    source = """
import os
from helper import FACTOR

def scaled(checkpoint, factor, *, step, original_path, output_dir, label="none"):
    open(output_dir + "/note.json", "w").write("{}")
    assert os.path.basename(original_path) == os.path.basename(checkpoint) and label == "x=y"
    return {"group": {"scaled": FACTOR * factor * step}}
"""
    evaluator = house.file("kit/scaled.py", source)
    house.save("model_step3.pt")
    house.once("-E", "factor=2", "-E", "scaled:label=x=y", evaluator=f"{evaluator}:scaled")
    record = house.record("model_step3.pt", "scaled")
    assert record and record["metrics"] == {"group/scaled": 60}
    assert record["evaluator"]["arguments"] == {"factor": 2, "label": "x=y"}
    assert (house.runs / "evals" / "scaled" / "model_step3.pt.files" / "note.json").exists()


def test_safetensors_and_hugging_face_directories_are_evaluated(house: House) -> None:
    from safetensors.torch import save_file

    house.watch(
        "--quiet_period",
        1,
        evaluator=f"{house.file('size.py', 'import os' + chr(10) + 'def size(p): return dict(is_dir=os.path.isdir(p))')}:size",
    )
    save_file({"w": torch.zeros(3)}, house.runs / "model_7.safetensors")
    folder = house.runs / "checkpoint-500"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    save_file({"w": torch.zeros(3)}, folder / "model.safetensors")
    (folder / "trainer_state.json").write_text('{"global_step": 500, "epoch": 1.5}')
    record = until(lambda: house.record("checkpoint-500", "size"))
    assert (record["format"], record["step"], record["epoch"], record["metrics"]) == ("hf_dir", 500, 1.5, {"is_dir": 1})
    assert until(lambda: house.record("model_7.safetensors", "size"))["format"] == "single_file"
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors", "trainer_state.json"]


def test_until_file_evaluates_what_is_left_and_frees_the_workers(house: House) -> None:
    house.watch("--until_file", house.root / "done", "--every", 10)
    until(lambda: house.workers("eval"))
    house.save("model_step10.pt")
    house.save("model_step13.pt")
    until(lambda: house.record("model_step10.pt"))
    assert house.record("model_step13.pt") is None
    (house.root / "done").touch()
    until(lambda: house.record("model_step13.pt"))
    until(lambda: not house.processes(), what="all processes have ended by themselves")


def test_until_step_and_until_idle_end_the_watch(house: House) -> None:
    for step in (1, 2, 3):
        house.save(f"model_step{step}.pt")
    words = ["--directory", house.runs, "--evaluator", f"{house.evaluator}:mean", "--polling_interval", 1, "--eval_existing"]
    house.command("watch", *words, "--until_step", 3)
    assert len(house.records()) == 3
    house.save("model_step4.pt", 4)
    house.command("watch", *words, "--until_idle", 2)
    assert len(house.records()) == 4


def test_a_directory_that_disappears_is_waited_for_and_nothing_is_taken_for_new(house: House) -> None:
    house.save("model_step1.pt")
    house.watch()
    house.save("model_step2.pt", 2)
    until(lambda: house.record("model_step2.pt"))
    away = house.root / "away"
    house.runs.rename(away)
    until(lambda: "cannot be read" in house.status()["watches"][0]["problem"])
    away.rename(house.runs)
    until(lambda: house.status()["watches"][0]["problem"] == "")
    house.save("model_step3.pt", 3)
    until(lambda: house.record("model_step3.pt"))
    assert set(house.records()) == {"model_step2.pt.json", "model_step3.pt.json"}


def test_a_shutdown_during_a_tick_leaves_no_chain_behind(house: House) -> None:
    house.watch()
    (pid,) = until(lambda: house.workers("watch"))
    os.kill(pid, signal.SIGSTOP)
    time.sleep(1.5)
    connection = house.connection()
    with house.running("shutdown") as process:
        time.sleep(2)
        os.kill(pid, signal.SIGCONT)
        assert process.wait(60) == 0
    del connection
    house.watch("--num_watch_workers", 1)
    until(lambda: house.workers("watch"))
    time.sleep(2.5)
    connection = house.connection()
    jobs = [*connection.lrange("rq:queue:watch", 0, -1), *connection.zrange("rq:scheduled:watch", 0, -1)]
    assert len(jobs) <= 1


def test_shutdown_now_neither_loses_nor_fails_the_interrupted_evaluation(house: House) -> None:
    slow = house.file(
        "slow.py",
        UNLESS_FAST,
    )
    house.watch(evaluator=f"{slow}:slow")
    house.save("model_step1.pt")
    until(lambda: any(c["state"] == "running" for c in house.status()["watches"][0]["checkpoints"]))
    began = time.monotonic()
    house.shutdown("--now")
    assert time.monotonic() - began < 30
    assert house.records() == {}
    assert not house.server.has_work(), "nothing is left in its queue"
    (house.runs / "model_step1.pt.fast").touch()
    house.watch(evaluator=f"{slow}:slow")
    assert until(lambda: house.record("model_step1.pt", "slow"))["attempts"] == 1


def test_ctrl_c_ends_a_foreground_watch_its_workers_and_its_redis(house: House) -> None:
    words = ["--directory", house.runs, "--evaluator", f"{house.evaluator}:mean", "--polling_interval", 1]
    with house.running("watch", *words) as process:
        until(lambda: house.workers("eval"))
        house.save("model_step1.pt")
        until(lambda: house.record("model_step1.pt"))
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
        assert process.stdout
        said = process.stdout.read()
    assert re.search(r"<- model_step1\.pt mean finished in [0-9.]+ s: mean=1\n", said)
    assert "ended the watch" in said
    until(lambda: not house.processes())


def test_a_second_ctrl_c_returns_the_running_evaluation_to_the_queue(house: House) -> None:
    slow = house.file(
        "slow.py",
        UNLESS_FAST,
    )
    words = ["--directory", house.runs, "--evaluator", f"{slow}:slow", "--polling_interval", 1]
    with house.running("watch", *words) as process:
        until(lambda: house.workers("eval"))
        house.save("model_step1.pt")
        until(lambda: any(c["state"] == "running" for c in house.status()["watches"][0]["checkpoints"]))
        process.send_signal(signal.SIGINT)
        time.sleep(2)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
    until(lambda: not house.processes())
    assert house.status()["queues"]["evaluation"]["queued"] == 1, "status starts a Redis that was stopped with work"
    assert not house.server.is_running(), "for that look alone"
    (house.runs / "model_step1.pt.fast").touch()
    house.watch(evaluator=f"{slow}:slow")
    assert until(lambda: house.record("model_step1.pt", "slow"))["attempts"] == 1


def test_a_killed_foreground_command_leaves_nothing_running(house: House) -> None:
    words = ["--directory", house.runs, "--evaluator", f"{house.evaluator}:mean", "--polling_interval", 1]
    with house.running("watch", *words) as process:
        until(lambda: house.workers("eval"))
        process.kill()
        process.wait()
    until(lambda: not house.processes(), 40)


@pytest.mark.slow
def test_a_foreground_watch_brings_back_all_that_was_killed_around_it(house: House) -> None:
    words = ["--directory", house.runs, "--evaluator", f"{house.evaluator}:mean", "--polling_interval", 1]
    with house.running("watch", *words) as process:
        until(lambda: house.workers("eval"))
        for pid in house.processes():
            if pid != process.pid:
                os.kill(pid, signal.SIGKILL)
        house.save("model_step1.pt")
        until(lambda: house.record("model_step1.pt"), 60)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
    until(lambda: not house.processes())


def test_a_killed_supervisor_is_replaced_and_its_workers_go_on(house: House) -> None:
    house.watch()
    pids = until(lambda: house.workers("eval"))
    (supervisor,) = [pid for pid, line in house.processes().items() if "assayer.worker.supervise" in line]
    os.kill(supervisor, signal.SIGKILL)
    # A loaded machine shows the killed one for a while.
    until(lambda: any("assayer.worker.supervise" in line and pid != supervisor for pid, line in house.processes().items()), 40)
    for step in (1, 2):
        house.save(f"model_step{step}.pt", step)
        until(lambda step=step: house.record(f"model_step{step}.pt"))  # type: ignore[misc]
    assert house.workers("eval") == pids
    assert any("assayer.worker.supervise" in line for line in house.processes().values()), "no evaluation took it for a leftover"


def test_a_shutdown_ends_the_workers_of_a_dead_supervisor(house: House) -> None:
    house.watch()
    until(lambda: house.workers("eval"))
    (supervisor,) = [pid for pid, line in house.processes().items() if "assayer.worker.supervise" in line]
    os.kill(supervisor, signal.SIGKILL)
    house.shutdown()
    assert house.processes() == {}


@pytest.mark.slow
def test_a_run_that_moves_away_in_mid_evaluation_is_not_made_anew(house: House) -> None:
    source = """
import os, time

def slow(checkpoint, original_path):
    with open(os.path.dirname(__file__) + "/calls", "a") as file:
        file.write("x")
    time.sleep(2)
    return {"m": 1}
"""
    slow = house.file("slow.py", source)
    house.watch(evaluator=f"{slow}:slow")
    house.save("model_step1.pt")
    until(lambda: any(c["state"] == "running" for c in house.status()["watches"][0]["checkpoints"]))
    away = house.root / "away"
    house.runs.rename(away)
    until(lambda: not any(c["state"] == "running" for c in house.status()["watches"][0]["checkpoints"]))
    assert not house.runs.exists()
    assert "cannot be read" in house.status()["watches"][0]["problem"]
    away.rename(house.runs)
    assert until(lambda: house.record("model_step1.pt", "slow"), 60)["status"] == "finished"
    assert (house.root / "calls").read_text() == "x", "the outcome was kept"


def test_once_ends_with_1_when_results_cannot_be_written(house: House) -> None:
    house.save("model_step1.pt")
    (house.runs / "evals").write_text("in the way")
    done = house.once(check=False)
    assert done.returncode == 1
    assert "failing" in done.stdout
    assert "evals/mean: Not a directory" in done.stdout


def test_until_idle_counts_from_the_command_and_not_from_an_earlier_watch(house: House) -> None:
    house.watch("--until_idle", 2)
    until(lambda: not house.processes())
    time.sleep(1)
    began = time.monotonic()
    house.watch("--until_idle", 4)
    until(lambda: house.status()["watches"][0]["state"] != "running")
    assert time.monotonic() - began > 4


def test_another_rq_user_on_the_same_redis_is_left_alone(house: House) -> None:
    import subprocess
    import sys

    from rq import Queue

    house.watch()
    until(lambda: house.workers("eval"))
    connection = house.connection()
    other = Queue("other", connection=connection)
    evaluation = Queue("evaluation", connection=connection)
    url = f"unix://{house.server.socket}"
    with subprocess.Popen(
        [sys.executable, "-m", "rq.cli", "worker", "-u", url, "idle"],
        env=house.environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as worker:
        until(lambda: len(connection.smembers("rq:workers")) == 3)
        other.enqueue("math.sqrt", 4)
        house.shutdown("--directory", house.runs)
        until(lambda: len(connection.smembers("rq:workers")) == 1)
        evaluation.enqueue("math.sqrt", 9)
        said = house.shutdown().stdout
        assert "the embedded Redis still serves others" in said
        assert other.count == 1
        assert evaluation.count == 1
        assert worker.poll() is None
        worker.terminate()
        worker.wait(20)
    connection.flushdb()


def test_redis_elsewhere_is_used_when_it_is_named(house: House) -> None:
    from assayer.queues.embedded import Server

    mine = Server(house.root / "elsewhere")
    mine.start()
    try:
        url = f"unix://{mine.socket}"
        house.save("model_step1.pt")
        house.once("--redis_url", url)
        assert house.record("model_step1.pt")
        assert not (house.state / "redis").exists(), "no embedded server was made"
        house.command("shutdown", "--redis_url", url)
        assert mine.is_running()
    finally:
        mine.stop(work_left=False)


def test_each_worker_sees_exactly_its_own_gpu_and_no_gpu_has_two_workers(house: House) -> None:
    """Two GPUs by name only: what is asked for is the environment that a worker and its evaluation get."""
    source = """
import os, time

def gpu(path):
    time.sleep(0.5)
    return {os.environ["CUDA_VISIBLE_DEVICES"]: 1, "ranks": "RANK" in os.environ}
"""
    evaluator = house.file("gpu.py", source)
    house.environment |= {"CUDA_VISIBLE_DEVICES": "GPU-aa,MIG-bb", "RANK": "3", "WORLD_SIZE": "8"}
    house.watch(evaluator=f"{evaluator}:gpu")
    until(lambda: len(house.workers("eval")) == 2)
    house.watch("--num_eval_workers", 2, evaluator=f"{evaluator}:gpu")
    refused = house.command("worker", "--gpus", "GPU-aa", check=False)
    assert refused.returncode == 2
    assert "every slot has its worker" in refused.stderr
    for step in range(6):
        house.save(f"model_step{step}.pt", step)
    until(lambda: len(house.records()) == 6)
    records = house.records().values()
    assert {tuple(r["gpus"]) for r in records} == {("GPU-aa",), ("MIG-bb",)}
    assert all(r["metrics"] == {r["gpus"][0]: 1, "ranks": 0} for r in records)
    told = house.status()
    assert sorted(w["gpus"] for w in told["workers"] if w["queue"] == "evaluation") == ["GPU-aa", "MIG-bb"]


def test_a_redis_on_tcp_with_a_password_serves_workers_elsewhere_and_the_password_is_never_shown(house: House) -> None:
    import socket
    import subprocess

    from assayer.queues.embedded import find_binary

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        str(find_binary()),
        "--port",
        str(port),
        "--bind",
        "127.0.0.1",
        "--requirepass",
        "open-sesame",
        "--save",
        "",
        "--dir",
        str(house.root),
    ]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            house.environment["ASSAYER_REDIS_URL"] = f"redis://:open-sesame@127.0.0.1:{port}/0"
            until(lambda: house.command("status", check=False).returncode == 0)
            house.watch("--num_eval_workers", 0)
            with house.running("worker") as worker:
                house.save("model_step1.pt")
                until(lambda: house.record("model_step1.pt"))
                shown = house.command("status").stdout + house.command("status", "--json").stdout + house.log()
                assert "open-sesame" not in shown + str(list(house.processes().values()))
                assert f"redis://127.0.0.1:{port}/0" in shown
                house.shutdown()
                assert worker.wait(30) == 0
            assert server.poll() is None
            assert list(house.processes()) == []
        finally:
            server.terminate()


def test_a_failed_evaluation_is_not_repeated_until_asked(house: House) -> None:
    source = """
import os

def sick(checkpoint, original_path):
    open(original_path + '.tries', 'a').write('x')
    assert os.path.exists(original_path + '.well'), 'not well'
    return {'m': 1}
"""
    evaluator = house.file("sick.py", source)
    house.save("model_step1.pt")
    done = house.once("--retries", 1, evaluator=f"{evaluator}:sick", check=False)
    assert done.returncode == 1
    record = house.record("model_step1.pt", "sick")
    assert record and record["status"] == "failed"
    assert record["attempts"] == 2
    assert record["error"]["message"] == "AssertionError: not well"
    assert "line 6, in sick" in record["error"]["traceback"]
    house.once(evaluator=f"{evaluator}:sick", check=False)
    assert (house.runs / "model_step1.pt.tries").read_text() == "xx"
    (house.runs / "model_step1.pt.well").touch()
    house.once("--retry_failed", evaluator=f"{evaluator}:sick")
    assert house.record("model_step1.pt", "sick")["status"] == "finished"  # type: ignore[index]
    house.once("--reevaluate", evaluator=f"{evaluator}:sick")
    assert (house.runs / "model_step1.pt.tries").read_text() == "xxxx"


def test_a_touch_makes_nothing_new_and_a_new_save_does(house: House) -> None:
    path = house.save("model_step1.pt", 1.0)
    house.once()
    os.utime(path)
    house.once()
    assert len(house.records()) == 1
    house.save("model_step1.pt", 2.0)
    house.once()
    assert house.record("model_step1.pt")["metrics"] == {"mean": 2.0}  # type: ignore[index]
    assert len(house.records()) == 2, "the earlier record is kept"


def test_an_evaluation_runs_far_longer_than_rqs_default_limit(house: House) -> None:
    """RQ's default of 180 s is brought down to 1 s in the worker; the evaluation takes 3 s."""
    house.file("site/sitecustomize.py", "import rq.queue\nrq.queue.Queue.DEFAULT_TIMEOUT = 1\n")
    slow = house.file("slow.py", "import time\n\ndef slow(checkpoint, original_path):\n    time.sleep(3)\n    return {'m': 1}\n")
    house.environment["PYTHONPATH"] = str(house.root / "site")
    house.save("model_step1.pt")
    house.once(evaluator=f"{slow}:slow")
    assert house.record("model_step1.pt", "slow")["status"] == "finished"  # type: ignore[index]


def test_an_interval_of_190_seconds_keeps_the_chain_alive(house: House) -> None:
    house.watch("--polling_interval", 190)
    connection = house.connection()
    until(lambda: house.status()["watches"][0]["last_look"])
    (entry,) = until(lambda: connection.zrange("rq:scheduled:watch", 0, -1, withscores=True))
    assert 150 < entry[1] - time.time() < 195


def test_results_can_go_elsewhere_and_nothing_is_written_beside_the_checkpoints(house: House) -> None:
    house.save("model_step1.pt")
    house.once("--results_dir", house.root / "results")
    assert os.listdir(house.runs) == ["model_step1.pt"]
    (record,) = (house.root / "results").rglob("*.json")
    assert record.parent.name == "mean"
    assert record.parent.parent.name.startswith("runs-")


def test_worker_by_hand_takes_the_jobs_of_a_watch_without_workers(house: House) -> None:
    house.watch("--num_eval_workers", 0)
    house.save("model_step1.pt")
    until(lambda: house.status()["queues"]["evaluation"]["queued"] == 1)
    with house.running("worker", "--num_workers", 2) as process:
        until(lambda: len(house.workers("eval")) == 2)
        until(lambda: house.record("model_step1.pt"))
        house.shutdown()
        assert process.wait(30) == 0


def test_a_worker_by_hand_is_not_ended_by_the_watch_that_it_works_for(house: House) -> None:
    words = ["--directory", house.runs, "--evaluator", f"{house.evaluator}:mean", "--polling_interval", 1]
    with house.running("worker") as worker:
        pids = until(lambda: house.workers("eval"))
        with house.running("watch", *words) as watch:
            until(lambda: house.workers("watch"))
            house.save("model_step1.pt")
            until(lambda: house.record("model_step1.pt"))
            watch.send_signal(signal.SIGINT)
            assert watch.wait(30) == 0
        assert house.workers("eval") == pids
        worker.send_signal(signal.SIGINT)
        assert worker.wait(30) == 0
    until(lambda: not house.processes())


def test_a_shutdown_of_one_watch_queue_leaves_the_workers_that_another_needs(house: House) -> None:
    (house.runs / "a").mkdir()
    for name in ("a", "b"):
        (house.runs / name).mkdir(exist_ok=True)
        words = ["--directory", house.runs / name, "--evaluator", f"{house.evaluator}:mean", "--polling_interval", 1]
        house.command("watch", *words, "--watch_queue_name", f"q{name}", "--detach")
    until(lambda: house.workers("eval"))
    house.shutdown("--now", "--watch_queue_name", "qa")
    house.save("b/model_step1.pt")
    until(lambda: house.record("b/model_step1.pt"))
    house.shutdown("--watch_queue_name", "qb")
    assert house.processes() == {}


def test_one_directory_by_two_paths_is_one_watch(house: House) -> None:
    (house.root / "link").symlink_to(house.runs)
    house.save("model_step1.pt")
    house.watch()
    house.command(
        "watch", "--directory", house.root / "link", "--evaluator", f"{house.evaluator}:mean", "--detach", "--polling_interval", 1
    )
    assert [w["directory"] for w in house.status()["watches"]] == [str(house.root / "link")]
    house.save("model_step2.pt")
    until(lambda: house.record("model_step2.pt"))
    assert house.record("model_step1.pt") is None, "its baseline is known by both paths"
    other = house.file("b.py", "def mean(p): return {}")
    (house.root / "elsewhere").mkdir()
    house.command("watch", "--directory", f"{house.root}/elsew*", "--evaluator", f"{other}:mean", "--detach")
    (house.runs / "sub").mkdir()
    words = ["watch", "--directory", house.runs / "sub", "--evaluator", f"{other}:mean", "--detach"]
    refused = house.command(*words, check=False)
    assert refused.returncode == 2
    assert "is watched with another evaluator called 'mean'" in refused.stderr
    said = house.shutdown("--directory", house.runs).stdout
    assert f"ended the watch of {house.root / 'link'} with mean" in said


def test_the_repository_is_not_needed_in_the_working_directory(house: House, tmp_path: Path) -> None:
    house.save("model_step1.pt")
    house.once(cwd=tmp_path)
    assert house.record("model_step1.pt")
    assert REPOSITORY not in tmp_path.parents
