"""What outlives what: jobs a restart of the server, of a worker, and of both; and what ends with a shutdown."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
from asking import save_ranks, served
from conftest import House, until

from assayer.client import AsyncEvaluation
from assayer.client.courier import Patience

pytestmark = pytest.mark.usefixtures("without_torch")


def test_jobs_outlive_the_server_and_its_worker(house: House) -> None:
    """One runs on while no server stands; its worker is killed; what waited is evaluated under the next server."""
    first, second = str(house.root / "a"), str(house.root / "b")
    path = house.save("run/model_step5.pt")
    with served(house, workers=1) as server:
        done = server.wait(server.submit("mine", ["x"]))
        running = server.submit("slow", [first], model_args={"pretrained": str(path)})
        server.until_running(running)
        waiting = server.tell("POST", "/evaluate", {"model": "slow", "tasks": [second]}, Idempotency_Key="k")[1]["job_id"]
        began = time.monotonic()
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(10) == 0
        print(f"ended within {time.monotonic() - began:.2f} s")
    assert house.workers("eval"), "what runs is evaluated to its end"
    with served(house, workers=1) as server:
        assert server.get(f"/jobs/{done['job_id']}") == done
        assert server.get(f"/jobs/{running}")["status"] == "running"
        assert server.get(f"/jobs/{waiting}")["status"] == "queued"
        body = {"model": "slow", "tasks": [second]}
        assert server.tell("POST", "/evaluate", body, Idempotency_Key="k")[1]["job_id"] == waiting
        (pid,) = house.workers("eval")
        os.kill(pid, signal.SIGKILL)
        until(lambda: Path(first + ".begun").stat().st_size == 2, what="it is begun again")
        for name in (first, second):
            Path(name).touch()
        assert server.wait(running)["metrics"] == {"slow": {"m,none": 1}}
        assert server.wait(waiting)["status"] == "completed"
        record = json.loads((path.parent / "evals" / "slow" / f"model_step5.pt@job-{running[:8]}.json").read_text())
        assert record["attempts"] == 1, "a lost worker is nobody's fault"
        assert Path(first + ".attempts").read_text() == "2", "what it had saved was taken up"
        # All at once, as when a machine's memory runs out; the server stays, and starts them again.
        for one, line in house.processes().items():
            if "assayer server" not in line:
                os.kill(one, signal.SIGKILL)

        def answers() -> bool:
            status, told = server.tell("GET", f"/jobs/{waiting}")
            assert status in (200, 503), told
            return status == 200

        until(answers, what="Redis is back")
        assert server.wait(server.submit("mine", ["x"]))["status"] == "completed"


def test_a_shutdown_ends_the_server_and_cancels_what_waits(house: House) -> None:
    with served(house, workers=1) as server:
        running = server.submit("slow", [str(house.root / "a")])
        server.until_running(running)
        path = house.save("run/model_step5.pt")
        waiting = server.submit("mine", ["x"], model_args={"pretrained": str(path)})
        assert house.status()["servers"][0]["url"].endswith(f":{server.port}")
        told = house.command("shutdown", "--now").stdout
        assert f"ended the server at http://127.0.0.1:{server.port}" in told
        assert "cancelled 1 job of clients" in told
        assert server.process.wait(10) == 0
    assert house.processes() == {}
    record = json.loads((path.parent / "evals" / "mine" / f"model_step5.pt@job-{waiting[:8]}.json").read_text())
    assert record["status"] == "cancelled"
    assert not (path.parent / "evals" / ".hold").exists()
    with served(house, workers=0) as server:
        assert server.get(f"/jobs/{waiting}")["status"] == "cancelled"


@pytest.fixture
def token(house: House) -> str:
    path = house.file("token", "a-token-of-the-house\n")
    path.chmod(0o600)
    return str(path)


def test_a_token_and_roots_keep_others_out(house: House, token: str) -> None:
    root = house.runs / "root"
    path = house.save("root/run/model_step5.pt")
    other = house.save("other/model_step5.pt")
    (root / "link").symlink_to(house.runs / "other")
    with served(house, "--token_file", token, "--root", root, workers=0) as server:
        assert server.tell("GET", "/health")[0] == 401
        assert server.answered["www-authenticate"] == "Bearer"
        assert server.tell("GET", "/openapi.json")[0] == 401
        assert server.tell("GET", "/queue", Authorization="Bearer a-token-of-the-mouse")[0] == 401
        server.headers["Authorization"] = "Bearer a-token-of-the-house"
        assert server.tell("GET", "/queue", Host="gpu7:8000")[0] == 200, "a token needs no host of its own"

        def ask(**fields: object) -> int:
            return server.tell("POST", "/evaluate", {"model": "mine", "tasks": ["x"], **fields})[0]

        assert ask(model_args={"pretrained": str(path)}) == 200
        assert ask(model_args={"pretrained": str(path), "tokenizer": "org/name"}) == 200
        assert ask(model_args={"pretrained": str(other)}) == 403
        assert ask(model_args={"pretrained": f"{root}/../other/model_step5.pt"}) == 403
        assert ask(model_args={"pretrained": f"{root}/link/model_step5.pt"}) == 403
        assert ask(model_args={"pretrained": str(path), "tokenizer": "/etc"}) == 403
        assert ask(model_args={"pretrained": str(path), "model": str(other)}) == 403
        assert ask(model_args={"x": {"y": ["~/.ssh/id"]}}) == 403
        assert ask(output_dir="/tmp/none") == 403
        assert ask(output_dir=f"{root}/link/new/er") == 403, "also where it is not there yet"
        assert ask(lmms_engine_kwargs={"model_path": str(other)}) == 403
        assert server.tell("POST", "/merge", {"checkpoint_path": str(other)})[0] == 403
        assert server.tell("POST", "/merge", {"checkpoint_path": str(path), "output_path": str(house.runs / "o")})[0] == 403
        assert server.tell("POST", "/notify", {"directory": str(house.runs)})[0] == 403


def refused(house: House, *words: object) -> str:
    done = house.command("server", "--port", 0, *words, check=False)
    assert done.returncode == 2, done
    assert len(done.stderr.strip().splitlines()) == 1
    return done.stderr


def test_words_that_are_not_safe_or_lead_nowhere_are_refused_at_the_start(house: House, token: str) -> None:
    assert "give --token_file and --root, too" in refused(house, "--host", "0.0.0.0")
    assert "give --token_file and --root, too" in refused(house, "--host", "0.0.0.0", "--token_file", token)
    Path(token).chmod(0o644)
    assert "can be read by other users" in refused(house, "--token_file", token)
    assert "no function 'none'" in refused(house, "--model", f"x={house.evaluator}:none")
    assert "must be NAME=REF" in refused(house, "--model", "x")
    assert "is no directory" in refused(house, "--root", house.root / "none")
    with served(house, workers=0) as server:
        done = house.command("server", "--port", server.port, check=False)
        assert done.returncode == 1
        assert "cannot listen on" in done.stderr


LMMS_EVAL = """
import argparse, json, os, pathlib, sys
parser = argparse.ArgumentParser()
for name in ("model", "tasks", "output_path", "model_args", "batch_size", "limit", "num_fewshot", "gen_kwargs"):
    parser.add_argument("--" + name)
for name in ("log_samples", "predict_only"):
    parser.add_argument("--" + name, action="store_true")
told = vars(parser.parse_args())
print("evaluating", told)
if told["tasks"] == "broken":
    sys.exit("the task is broken")
folder = pathlib.Path(told["output_path"], "the__model")
folder.mkdir(parents=True)
(folder / "20260101_000000_results.json").write_text(json.dumps({"results": {told["tasks"]: {
    "alias": told["tasks"], "acc,none": 0.75, "acc_stderr,none": "N/A", "told": json.dumps(told)}}}))
(folder / "20260101_000000_samples_x.jsonl").write_text("{}")
"""


def test_an_installed_lmms_eval_is_run_for_its_models(house: House) -> None:
    """A package of its name stands in for it."""
    house.file("site/lmms_eval/__main__.py", LMMS_EVAL)
    house.file("site/lmms_eval/models/__init__.py", 'AVAILABLE_SIMPLE_MODELS = {"qwen_vl": "QwenVL"}\n')
    house.file("site/lmms_eval/__init__.py", "")
    house.environment["PYTHONPATH"] = str(house.root / "site")
    path = house.runs / "run" / "checkpoint-5"
    path.mkdir(parents=True)
    for name, text in (("config.json", "{}"), ("model.safetensors", "")):
        (path / name).write_text(text)
    import torch
    from safetensors.torch import save_file

    save_file({"w": torch.ones(2)}, path / "model.safetensors")
    with served(house, workers=1) as server:
        assert "qwen_vl" in server.get("/models")["models"]
        args = {"model": str(path), "num_gpus": 8, "batch_size": 256}
        job = server.wait(server.submit("qwen_vl", ["mmmu_val"], model_args=args, num_fewshot=0, batch_size=1, output_dir=f"{path}/eval"))
        assert job["error"] is None
        assert job["metrics"] == {"mmmu_val": {"acc,none": 0.75}}
        result = job["result"]["the__model"]
        assert Path(result["results"]).is_relative_to(path.parent / "evals" / "qwen_vl")
        (samples,) = result["samples"]
        assert Path(samples).read_text() == "{}"
        told = json.loads(json.loads(Path(result["results"]).read_text())["results"]["mmmu_val"]["told"])
        held = told["model_args"].split(",")[0].removeprefix("model=")
        assert Path(held).name == path.name, "the checkpoint, or its hold"
        assert told["model_args"].split(",")[1:] == ["num_gpus=8", "batch_size=256"]
        assert (told["num_fewshot"], told["batch_size"], told["log_samples"], told["predict_only"]) == ("0", "1", True, False)
        job = server.wait(server.submit("qwen_vl", ["broken"]))
        assert job["error"] == "lmms_eval ended with code 1: the task is broken"
        for tasks, more in ((["--help"], {}), (["a/b.yaml"], {}), (["x"], {"model_args": {"a": "b,c=d"}})):
            status, _ = server.tell("POST", "/evaluate", {"model": "qwen_vl", "tasks": tasks, **more})
            assert status == 422


def test_what_a_training_keeps_while_no_server_stands_is_evaluated_by_the_next_one(house: House, tmp_path: Path) -> None:
    """Sharded and single checkpoints, submitted to nobody and rotated away; records lie where those of their first names would."""
    del house.environment["PYTHONPATH"]  # A merge has its weights checked, with torch.
    single = house.save("run/model_step5.pt")
    sharded = save_ranks(house.runs / "run" / "checkpoint-10")
    with served(house, workers=1) as server:
        pass
    config = {"server_url": f"http://127.0.0.1:{server.port}", "model": "mine", "tasks": ["a"], "poll_interval": 0.1}
    evaluation = AsyncEvaluation(config, house.runs / "run", rank=0, patience=Patience(first=0.05, most=0.2))
    evaluation.submit(single, 5)
    evaluation.submit(sharded, 10)
    until(lambda: len(list((house.runs / "run" / "evals" / ".hold").glob("client*/*[0-9t]"))) == 2)
    single.unlink()
    shutil.rmtree(sharded)
    with served(house, port=server.port, workers=1) as server:
        points = evaluation.finish(60)
        evaluation.close()
    assert [(point.step, point.metrics["eval/a/merged"]) for point in points] == [(5, 0), (10, 1)]
    folder = house.runs / "run" / "evals" / "mine"
    records = {path.name.partition("@")[0]: json.loads(path.read_text()) for path in folder.glob("*.json")}
    assert {name: (r["checkpoint"], r["status"], r["step"]) for name, r in records.items()} == {
        "model_step5.pt": (str(single), "finished", 5),
        "checkpoint-10": (str(sharded), "finished", 10),
    }
    assert not (house.runs / "run" / "evals" / ".hold").exists()


def test_a_merge_that_a_client_keeps_is_its_jobs_own_after_a_lost_worker(house: House) -> None:
    del house.environment["PYTHONPATH"]
    sharded = save_ranks(house.runs / "run" / "checkpoint-10")
    gate, kept = str(house.root / "gate"), house.root / "kept"
    with served(house, workers=1) as server:
        engine = {"model_path": str(sharded), "output_path": str(kept)}
        job = server.submit("slow", [gate], lmms_engine_kwargs=engine)
        until(Path(gate + ".begun").exists)
        (pid,) = house.workers("eval")
        os.kill(pid, signal.SIGKILL)
        until(lambda: Path(gate + ".begun").stat().st_size == 2, what="it is begun again")
        Path(gate).touch()
        assert server.wait(job)["error"] is None
        assert (kept / "model.safetensors").exists()
        again = server.tell("POST", "/evaluate", {"model": "slow", "tasks": [gate], "lmms_engine_kwargs": engine})
        assert again[0] == 422, "a later job's it is not"


def test_what_cannot_be_held_is_said_and_held_when_others_are_let_go(house: House) -> None:
    """Clients that keep nothing themselves submit more than the server holds."""
    gate = house.root / "gate"
    paths = [house.save(f"run/model_step{step}.pt", step) for step in (1, 2, 3)]
    folder = house.runs / "run" / "evals" / ".hold"

    def held() -> list[str]:
        return sorted(path.name for path in folder.glob("*/*.pt"))

    with served(house, "--hold", 2, workers=1) as server:
        busy = server.submit("slow", [str(gate)])
        server.until_running(busy)
        first, *_, last = [server.submit("mine", ["a"], model_args={"pretrained": str(path)}) for path in paths]
        assert held() == ["model_step1.pt", "model_step2.pt"], "the oldest are what rotation deletes first"
        assert "model_step3.pt waits unprotected from deletion: 2 others are held (--hold)" in (house.root / "server.log").read_text()
        server.tell("DELETE", f"/jobs/{first}")
        until(lambda: held() == ["model_step2.pt", "model_step3.pt"])
        paths[2].unlink()
        gate.touch()
        assert server.wait(last)["status"] == "completed"


def test_one_that_vanishes_unheld_says_why_it_was_not_held(house: House) -> None:
    gate = house.root / "gate"
    path = house.save("run/model_step1.pt")
    with served(house, "--hold", 0, workers=1) as server:
        server.until_running(server.submit("slow", [str(gate)]))
        job = server.submit("mine", ["a"], model_args={"pretrained": str(path)})
        path.unlink()
        gate.touch()
        assert "was deleted before it could be evaluated; it was not protected from deletion: --hold 0" in server.wait(job)["error"]


def test_until_file_a_server_evaluates_what_is_left_and_frees_the_workers(house: House) -> None:
    gate, done = house.root / "gate", house.root / "done"
    done.touch()  # An earlier training's.
    with served(house, "--until_file", done, workers=1) as server:
        running = server.submit("slow", [str(gate)])
        waiting = server.submit("mine", ["a"])
        time.sleep(4)
        server.until_running(running)
        done.touch()
        time.sleep(3)
        assert server.get(f"/jobs/{waiting}")["status"] == "queued"
        gate.touch()
        assert server.process.wait(30) == 0
    assert "ended: " in (house.root / "server.log").read_text()
    until(lambda: not house.workers("eval"), what="the workers have ended")
    with served(house, workers=0) as server:
        assert server.get(f"/jobs/{waiting}")["status"] == "completed"


def test_until_idle_a_server_ends_by_itself(house: House) -> None:
    with served(house, "--until_idle", 2, workers=1) as server:
        assert server.wait(server.submit("mine", ["a"]))["status"] == "completed"
        assert server.process.wait(30) == 0
    assert "nothing has waited or run for 2 s" in (house.root / "server.log").read_text()
    until(lambda: not house.workers("eval"))
