"""The server as its clients see it: real processes, a real Redis, real workers, one server for all scenes that do not end it."""

import importlib.util
import json
import shutil
import socket
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any
from uuid import UUID, uuid4

import pytest
from asking import Server, a_house, save_ranks, served
from conftest import until
from samples_of_trainers import TWO, expected, sample

from assayer.merge.state_dict import load_state_dict


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with a_house() as house, served(house) as one:
        yield one


def checkpoint(server: Server, value: float = 1.0) -> Path:
    return server.house.save(f"run{uuid4().hex[:8]}/model_step5.pt", value)


def test_a_submission_is_answered_in_upstreams_words(server: Server) -> None:
    status, told = server.tell("POST", "/evaluate", {"model": "mine", "tasks": ["mmmu_val"], "unknown": 1})
    assert status == 200
    assert UUID(told["job_id"]).version == 4
    assert told == {
        "job_id": told["job_id"],
        "status": "queued",
        "position_in_queue": 0,
        "message": "Job queued successfully. Position in queue: 0",
    }
    job = server.wait(told["job_id"])
    assert list(job) == [
        *("job_id", "status", "created_at", "started_at", "completed_at", "request", "result", "error", "position_in_queue", "metrics")
    ]
    assert job["request"] == {
        "model": "mine",
        "tasks": ["mmmu_val"],
        **dict.fromkeys(["model_args", "num_fewshot", "batch_size", "device", "limit", "gen_kwargs", "output_dir"]),
        "log_samples": True,
        "predict_only": False,
        "num_gpus": 1,
    }
    assert job["created_at"] <= job["started_at"] <= job["completed_at"]
    assert job["metrics"] == {"mmmu_val": {"acc,none": 0.25, "has_path,none": 0, "merged,none": 0, "args,none": 0}}


def test_results_are_in_lmms_evals_form_and_the_record_lies_beside_the_checkpoint(server: Server) -> None:
    path = checkpoint(server)
    id_ = server.submit("mine", ["a", "b"], model_args={"pretrained": str(path), "max_length": 8})
    job = server.wait(id_)
    (name,) = job["result"]
    results = json.loads(Path(job["result"][name]["results"]).read_text())
    assert results["results"]["b"] == {"alias": "b", "acc,none": 0.5, "has_path,none": 1, "merged,none": 0, "args,none": 2}
    assert job["result"][name]["samples"] == []
    assert Path(job["result"][name]["results"]).is_relative_to(path.parent / "evals")
    record = json.loads((path.parent / "evals" / "mine" / f"model_step5.pt@job-{id_[:8]}.json").read_text())
    assert (record["status"], record["step"], record["details"]["job"]) == ("finished", 5, id_)
    assert record["metrics"]["b/acc,none"] == 0.5


def test_flat_numbers_belong_to_the_task_and_nan_is_null(server: Server) -> None:
    job = server.wait(server.submit("flat", ["one"], num_fewshot=3, gen_kwargs="t=1"))
    assert job["metrics"] == {"one": {"acc,none": 0.5, "shots,none": 3, "nan,none": None, "has_progress,none": 1}}
    job = server.wait(server.submit("flat", ["one", "two"]))
    assert list(job["metrics"]) == ["flat"]


def test_jobs_run_side_by_side_and_the_others_wait_in_their_order(server: Server, tmp_path: Path) -> None:
    first, second, third = (server.submit("slow", [str(tmp_path / name)]) for name in "abc")
    server.until_running(first)
    server.until_running(second)
    fourth = server.tell("POST", "/evaluate", {"model": "slow", "tasks": [str(tmp_path / "d")]})[1]
    assert fourth["position_in_queue"] == 1
    assert server.get(f"/jobs/{third}")["position_in_queue"] == 0
    queue = server.get("/queue")
    assert (queue["queue_size"], queue["queued_jobs"]) == (2, [third, fourth["job_id"]])
    assert queue["running_job"] in (first, second)
    assert server.get("/health")["queue_size"] == 2
    told = server.house.status()
    assert told["queues"]["evaluation"] == {"queued": 2, "started": 2, "scheduled": 0}
    assert any("for a client" in str(worker["job"]) for worker in told["workers"])
    waiting = server.get("/jobs?status=queued&limit=1")["jobs"]
    assert [job["job_id"] for job in waiting] == [fourth["job_id"]], "the newest first"
    # One that waits is cancelled, one that runs only by force.
    assert server.tell("DELETE", f"/jobs/{third}") == (200, {"message": f"Job {third} cancelled"})
    assert server.tell("DELETE", f"/jobs/{third}") == (400, {"detail": "Job already finished or cancelled"})
    assert server.tell("DELETE", f"/jobs/{first}") == (400, {"detail": "Cannot cancel a running job"})
    assert server.tell("DELETE", f"/jobs/{first}?force=true") == (200, {"message": f"Job {first} cancelled"})
    for job in (first, third):
        ended = server.get(f"/jobs/{job}")
        assert (ended["status"], ended["result"], ended["error"]) == ("cancelled", None, None)
        (record,) = server.house.state.glob(f"server/slow/job-{job}.json")
        assert json.loads(record.read_text())["status"] == "cancelled"
    server.until_running(fourth["job_id"])
    for name in "bd":
        (tmp_path / name).touch()
    assert {server.wait(job)["status"] for job in (second, fourth["job_id"])} == {"completed"}


def test_a_failed_job_says_why_in_one_line(server: Server) -> None:
    failed = server.get("/queue")["failed_jobs"]
    job = server.wait(server.submit("fails", ["x"]))
    assert (job["status"], job["result"]) == ("failed", None)
    assert job["error"] == "RuntimeError: no such luck in two lines"
    assert server.get("/queue")["failed_jobs"] == failed + 1


def test_an_outcome_that_cannot_be_recorded_is_answered_and_recorded_later(server: Server, tmp_path: Path) -> None:
    path, calls = checkpoint(server), tmp_path / "calls"
    id_ = server.submit("blocks", [str(calls)], model_args={"pretrained": str(path)})
    job = server.wait(id_)
    assert (job["status"], job["metrics"], job["error"]) == ("completed", {str(calls): {"m,none": 1}}, None)
    record = path.parent / "evals" / "blocks" / f"model_step5.pt@job-{id_[:8]}.json"
    record.rmdir()
    until(record.is_file, what="the server has it tried again")
    assert json.loads(record.read_text())["status"] == "finished"
    assert server.get(f"/jobs/{id_}") == job
    assert calls.read_text() == "x", "it is not evaluated again"


def test_what_is_not_known_or_not_allowed_is_refused_in_upstreams_words(server: Server) -> None:
    assert server.tell("GET", "/jobs/none") == (404, {"detail": "Job none not found"})
    assert server.tell("DELETE", "/jobs/none") == (404, {"detail": "Job none not found"})
    assert server.tell("GET", "/none") == (404, {"detail": "Not Found"})
    assert server.tell("PUT", "/queue") == (405, {"detail": "Method Not Allowed"})
    assert server.tell("POST", "/evaluate", {"tasks": "x"}) == (
        422,
        {
            "detail": [
                {"type": "missing", "loc": ["body", "model"], "msg": "Field required", "input": {"tasks": "x"}},
                {"type": "list_type", "loc": ["body", "tasks"], "msg": "Input should be a valid list", "input": "x"},
            ]
        },
    )
    status, told = server.tell("POST", "/evaluate", b"{")
    assert (status, told["detail"][0]["type"]) == (422, "json_invalid")
    status, told = server.tell("POST", "/evaluate", {"model": "qwen", "tasks": ["x"]})
    assert (status, told["detail"][0]["loc"]) == (422, ["body", "model"])
    status, told = server.tell("POST", "/evaluate", {"model": "os.system", "tasks": ["x"]})
    assert status == 422, "a name is looked up, never a reference"
    assert server.tell("POST", "/evaluate", b"x" * (2 << 20))[0] == 413
    assert server.tell("POST", "/evaluate", {}, Content_Type="text/plain")[0] == 415
    assert server.tell("GET", "/queue", Host="evil.example:8000")[0] == 403
    assert server.tell("POST", "/evaluate", {}, Origin="http://evil.example")[0] == 403
    assert server.tell("GET", "/jobs?status=odd")[0] == 422


def test_a_key_makes_two_submissions_one_job(server: Server) -> None:
    body = {"model": "mine", "tasks": ["x"]}
    with ThreadPoolExecutor(4) as pool:
        told = list(pool.map(lambda _: server.tell("POST", "/evaluate", body, Idempotency_Key="k1"), range(8)))
    assert {status for status, _ in told} == {200}
    (job,) = {answer["job_id"] for _, answer in told}
    server.wait(job)
    assert server.tell("POST", "/evaluate", body, Idempotency_Key="k1")[1]["job_id"] == job, "also once it has ended"
    assert server.tell("POST", "/evaluate", {**body, "tasks": ["y"]}, Idempotency_Key="k1")[0] == 422
    assert server.submit("mine", ["x"]) != server.submit("mine", ["x"]), "without one, nothing is the same"


def test_a_reused_output_directory_never_returns_an_earlier_jobs_results(server: Server, tmp_path: Path) -> None:
    path, output = checkpoint(server), tmp_path / "out"
    jobs = [server.wait(server.submit("mine", tasks, model_args={"model": str(path)}, output_dir=str(output))) for tasks in (["a"], ["b"])]
    files = [Path(job["result"]["model_step5.pt"]["results"]) for job in jobs]
    assert [file.parent for file in files] == [output / "model_step5.pt"] * 2
    assert [list(json.loads(file.read_text())["results"]) for file in files] == [["a"], ["b"]]


def test_lmms_engines_own_request_merges_the_ranks_files_first(server: Server, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Its body as its trainer sends it; the results would lie inside the checkpoint, and do not."""
    one = sample(tmp_path_factory, TWO, "lmms_engine_ema")
    run = server.house.runs / "engine"
    path = run / one.path.name
    shutil.copytree(one.path, path)
    before = sorted(path.rglob("*"))
    sums = {}
    for weights in ("regular", "ema"):
        body = {
            "model": "mean",
            "tasks": ["mmmu_val"],
            "model_args": {"num_gpus": 8, "batch_size": 256, "model": str(path)},
            "num_fewshot": 0,
            "batch_size": 1,
            "device": "cuda",
            "log_samples": True,
            "predict_only": False,
            "num_gpus": 1,
            "output_dir": f"{path}/eval",
            "lmms_engine_kwargs": {"model_path": str(path), "checkpoint_type": weights, "output_path": None},
        }
        status, told = server.tell("POST", "/evaluate", body)
        assert status == 200, told
        job = server.wait(told["job_id"])
        assert job["error"] is None
        assert job["request"]["lmms_engine_kwargs"] == body["lmms_engine_kwargs"]
        assert Path(job["result"][path.name]["results"]).is_relative_to(run / "evals" / "mean")
        sums[weights] = job["metrics"]["mmmu_val"]["sum,none"]
    assert sorted(path.rglob("*")) == before, "nothing is written inside a checkpoint"
    for weights, found in sums.items():
        held = load_state_dict(path, weights)
        assert held.keys() == expected(one, ema=weights == "ema").keys()
        assert found == pytest.approx(float(sum(t.double().sum() for t in held.values())))
    assert sums["regular"] != sums["ema"]


def test_a_merge_is_kept_where_the_request_asks_for_it(server: Server) -> None:
    path = save_ranks(server.house.runs / f"ranks{uuid4().hex[:6]}" / "checkpoint-10")
    target = path.parent / "kept"
    engine = {"model_path": str(path), "output_path": str(target)}
    job = server.wait(server.submit("mean", ["t"], lmms_engine_kwargs=engine))
    assert job["metrics"] == {"t": {"sum,none": 16.0, "tensors,none": 1}}
    assert (target / "model.safetensors").exists()
    status, told = server.tell("POST", "/evaluate", {"model": "mean", "tasks": ["t"], "lmms_engine_kwargs": engine})
    assert (status, told["detail"][0]["loc"]) == (422, ["body", "lmms_engine_kwargs", "output_path"])


def test_a_merge_by_itself(server: Server) -> None:
    path = save_ranks(server.house.runs / f"ranks{uuid4().hex[:6]}" / "checkpoint-10")
    status, told = server.tell("POST", "/merge", {"checkpoint_path": str(path)})
    merged = str(path.parent / "merged" / path.name)
    assert (status, told) == (200, {"success": True, "message": "Checkpoint merged successfully", "merged_path": merged})
    assert load_state_dict(merged)["w"].sum() == 16
    assert server.tell("POST", "/merge", {"checkpoint_path": str(path), "checkpoint_type": "ema"})[0] == 400
    assert server.tell("POST", "/merge", {"checkpoint_path": str(path / "none")})[0] == 404
    assert server.tell("POST", "/merge", {"checkpoint_path": str(server.house.root / "served.py")})[0] == 400
    assert server.tell("POST", "/merge", {"checkpoint_path": str(path), "checkpoint_type": "best"})[0] == 422
    assert server.tell("POST", "/merge", {"checkpoint_path": str(path), "output_path": f"{path}/inside"})[0] == 400
    for inside in (path, path / "config.json"):
        status, told = server.tell("POST", "/merge", {"checkpoint_path": str(path), "output_path": str(inside)})
        assert (status, "lies inside a checkpoint" in told["detail"]) == (400, True)
    # What a merge has left is a checkpoint, too, and no place inside one.
    status, told = server.tell("POST", "/merge", {"checkpoint_path": str(path), "output_path": merged})
    assert (status, told["detail"]) == (400, f"{merged} is there already; remove it, or give another output_path")


def test_what_waits_is_protected_from_its_trainers_rotation(server: Server, tmp_path: Path) -> None:
    busy = [server.submit("slow", [str(tmp_path / name)]) for name in "ab"]
    for job in busy:
        server.until_running(job)
    path = save_ranks(server.house.runs / f"ranks{uuid4().hex[:6]}" / "checkpoint-10")
    waiting = server.submit("mean", ["t"], model_args={"pretrained": str(path)})
    held = path.parent / "evals" / ".hold"
    assert held.is_dir()
    shutil.rmtree(path)
    for name in "ab":
        (tmp_path / name).touch()
    assert server.wait(waiting)["metrics"] == {"t": {"sum,none": 16.0, "tensors,none": 1}}
    until(lambda: not held.exists(), what="the hold is released")
    gone = server.tell("POST", "/evaluate", {"model": "mean", "tasks": ["t"], "model_args": {"pretrained": str(path)}})
    assert gone[0] == 422


def test_a_slow_client_keeps_nobody_waiting(server: Server) -> None:
    silent = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(50)]
    for one in silent[::2]:
        one.sendall(b"POST /evaluate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{")
    assert server.get("/health")["status"] == "healthy"
    for one in silent:
        one.close()


def test_models_and_pages_need_nothing_from_elsewhere(server: Server) -> None:
    assert "mine" in server.get("/models")["models"]
    assert server.get("/tasks") == {"tasks": ["a_task"]}
    document = server.get("/openapi.json")
    assert set(document["paths"]["/jobs/{job_id}"]) == {"get", "delete"}
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(b"GET /docs HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        text = b"".join(iter(lambda: connection.recv(65536), b"")).decode()
    assert "200 OK" in text
    assert "/evaluate" in text
    assert "http://" not in text.replace("http://localhost", "")
    assert "<script" not in text


def test_a_hint_makes_the_watch_look_now(server: Server) -> None:
    """Its own next look would be an hour away."""
    house = server.house
    folder = house.runs / "hinted"
    folder.mkdir()
    house.command("watch", "--directory", folder, "--evaluator", f"{house.evaluator}:mean", "--polling_interval", 3600, "--detach")
    until(lambda: any(w["last_look"] for w in house.status()["watches"]))
    path = house.save("hinted/model_step1.pt")
    until(lambda: server.tell("POST", "/notify", {"directory": str(path)}) == (200, {"message": "1 watch looks now", "watches": 1}))
    until(lambda: server.tell("POST", "/notify", {"directory": str(folder)})[0] == 200 and house.record("hinted/model_step1.pt"))
    assert server.tell("POST", "/notify", {"directory": str(house.root)})[0] == 404
    house.command("shutdown", "--directory", folder)
    assert server.get("/health")["status"] == "healthy", "the end of a watch is not the server's"


def test_a_fuzz_of_the_schema_finds_no_error_of_the_server(server: Server) -> None:
    schemathesis = pytest.importorskip("schemathesis")
    import hypothesis

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        schema = schemathesis.openapi.from_url(f"http://127.0.0.1:{server.port}/openapi.json")
        seen: list[int] = []

        @hypothesis.settings(
            max_examples=12, deadline=None, database=None, derandomize=True, suppress_health_check=list(hypothesis.HealthCheck)
        )
        @hypothesis.given(data=hypothesis.strategies.data())
        def ask_all(data: Any) -> None:
            for operation in schema.get_all_operations():
                case = data.draw(operation.ok().as_strategy())
                answer = case.call(base_url=f"http://127.0.0.1:{server.port}", timeout=30)
                assert answer.status_code < 500 or answer.status_code == 503, (case, answer.text)
                seen.append(answer.status_code)

        ask_all()
    assert {200, 422} <= set(seen)
    for job in server.get("/jobs?status=queued&limit=1000")["jobs"]:
        server.tell("DELETE", f"/jobs/{job['job_id']}")


def upstream() -> ModuleType:
    """The client module of lmms-eval as it is installed, without the package's own imports."""
    spec = importlib.util.find_spec("lmms_eval")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("lmms-eval is not installed")
    path = Path(spec.submodule_search_locations[0]) / "entrypoints" / "client.py"
    made = importlib.util.spec_from_file_location("upstream_client", path)
    assert made is not None
    assert made.loader is not None
    module = importlib.util.module_from_spec(made)
    made.loader.exec_module(module)
    return module


def test_an_unmodified_client_of_lmms_eval_works(server: Server, tmp_path: Path) -> None:
    module = upstream()
    path = checkpoint(server)
    with module.EvalClient(f"http://127.0.0.1:{server.port}") as client:
        assert client.is_healthy()
        assert "mine" in client.list_models()
        job = client.evaluate(model="mine", tasks=["a"], model_args={"pretrained": str(path)}, output_dir=str(tmp_path))
        done = client.wait_for_job(job["job_id"], poll_interval=0.1, timeout=60, verbose=False)
        assert Path(done["result"]["model_step5.pt"]["results"]).is_relative_to(tmp_path)
        failed = client.evaluate(model="fails", tasks=["a"])
        with pytest.raises(RuntimeError, match="Job failed: RuntimeError: no such luck"):
            client.wait_for_job(failed["job_id"], poll_interval=0.1, timeout=60, verbose=False)
        waits = client.evaluate(model="slow", tasks=[str(tmp_path / "go")])
        with pytest.raises(TimeoutError):
            client.wait_for_job(waits["job_id"], poll_interval=0.1, timeout=0.2, verbose=False)
        (tmp_path / "go").touch()
        assert client.get_queue_status()["queue_size"] >= 0
        ranks = save_ranks(server.house.runs / f"ranks{uuid4().hex[:6]}" / "checkpoint-10")
        assert client.merge_checkpoint(str(ranks))["success"]


def test_an_unmodified_asynchronous_client_works(server: Server) -> None:
    import asyncio

    module = upstream()

    async def ask() -> Any:
        async with module.AsyncEvalClient(f"http://127.0.0.1:{server.port}") as client:
            job = await client.evaluate("mine", ["a"])
            return await client.wait_for_job(job["job_id"], poll_interval=0.1, timeout=60, verbose=False)

    assert asyncio.run(ask())["metrics"]["a"]["acc,none"] == 0.25
