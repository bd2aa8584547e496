"""The plain client, against a server over real sockets."""

import inspect
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
from protocol_server import EvaluationServer

from assayer.client import EvalClient, ServerError
from assayer.errors import UsageError
from assayer.protocol import JobStatus


@pytest.fixture
def server() -> Iterator[EvaluationServer]:
    with EvaluationServer() as server:
        yield server


def test_the_client_needs_nothing_but_the_standard_library() -> None:
    # What the environment's .pth files load is there before.
    code = """
import sys
before = set(sys.modules)
import assayer.client, assayer.client.callback
others = {name.split(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names) - {"assayer"}
print(sorted(others))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_the_methods_are_upstreams_with_upstreams_parameters() -> None:
    # lmms_eval/entrypoints/client.py of 0.7.
    upstream = {
        "health": "",
        "is_healthy": "",
        "list_tasks": "",
        "list_models": "",
        "evaluate": "model tasks model_args num_fewshot batch_size device limit gen_kwargs log_samples predict_only num_gpus output_dir",
        "get_job": "job_id",
        "cancel_job": "job_id",
        "wait_for_job": "job_id poll_interval timeout verbose",
        "get_queue_status": "",
        "merge_checkpoint": "checkpoint_path output_path checkpoint_type",
        "close": "",
    }
    for name, parameters in upstream.items():
        ours = list(inspect.signature(getattr(EvalClient, name)).parameters)[1:]
        assert ours[: len(parameters.split())] == parameters.split(), name


def test_every_endpoint_is_asked(server: EvaluationServer) -> None:
    with EvalClient(server.url + "/") as client:
        assert client.is_healthy()
        assert (client.list_tasks(), client.list_models()) == (["t"], ["m"])
        assert client.get_queue_status()["completed_jobs"] == 0
        answer = client.evaluate("m", ["t"], {"pretrained": "/c"}, limit=0.5)
        assert answer["message"] == "Job queued successfully. Position in queue: 0"
        job = client.get_job(answer["job_id"])
        assert job["request"]["limit"] == 0.5
        assert [j["job_id"] for j in client.list_jobs(status="queued", limit=5)] == [answer["job_id"]]
        assert client.cancel_job(answer["job_id"], force=True) == {"message": f"Job {answer['job_id']} cancelled"}
        assert client.merge_checkpoint("/c")["merged_path"] == "/c-merged"
        assert client.notify("/runs/a")["asked"] == {"directory": "/runs/a"}
    assert ("GET", "/jobs?status=queued&limit=5") in server.requests
    assert server.requests[-3][1].endswith("?force=true")


def test_a_job_that_completes_is_waited_for_and_another_raises(server: EvaluationServer, capsys: pytest.CaptureFixture[str]) -> None:
    client = EvalClient(server.url)
    job_id = client.submit("m", ["t"])
    with pytest.raises(TimeoutError, match=f"Timeout waiting for job {job_id}"):
        client.wait_for_job(job_id, poll_interval=0.01, timeout=0.0)
    server.end(JobStatus.COMPLETED, {"t": {"acc,none": 0.5}})
    assert client.wait_for_job(job_id)["status"] == "completed"
    assert client.wait(job_id).metrics == {"t": {"acc,none": 0.5}}
    assert "queued" in capsys.readouterr().out

    failing, cancelled = client.submit("m", ["t"]), client.submit("m", ["t"])
    server.end(JobStatus.FAILED, error="out of memory")
    with pytest.raises(RuntimeError, match=r"^Job failed: out of memory$"):
        client.wait_for_job(failing, verbose=False)
    server.jobs[cancelled] = type(server.jobs[cancelled]).from_json({**server.jobs[cancelled].to_json(), "status": "cancelled"})
    # Upstream's client would ask for ever.
    with pytest.raises(RuntimeError, match="Job cancelled"):
        client.wait_for_job(cancelled, verbose=False)


def test_a_submission_whose_answer_is_lost_is_one_job(server: EvaluationServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("assayer.client.connection.AGAIN", 0.01)
    server.lose = 2
    job_id = EvalClient(server.url).submit("m", ["t"], timeout=60)
    assert list(server.jobs) == [job_id]
    assert server.count("POST", "/evaluate") == 3


def test_wait_outlasts_a_restart_of_the_server(server: EvaluationServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("assayer.client.connection.AGAIN", 0.01)
    client = EvalClient(server.url)
    job_id = client.submit("m", ["t"])
    server.down()
    with pytest.raises(TimeoutError, match="no answer"):
        client.wait(job_id, timeout=0.05)
    server.end(JobStatus.COMPLETED, {"t": {"acc,none": 1.0}})
    waiting = threading.Timer(0.1, server.up)
    waiting.start()
    assert client.wait(job_id, timeout=60).status is JobStatus.COMPLETED
    waiting.join()


def test_errors_are_one_line_with_status_and_what_the_server_says(server: EvaluationServer) -> None:
    client = EvalClient(server.url)
    with pytest.raises(ServerError, match=rf"^GET {server.url}/jobs/a%2Fb: 404: Job a%2Fb not found$") as caught:
        client.get_job("a/b")
    assert (caught.value.status, caught.value.is_passing) == (404, False)
    with pytest.raises(ServerError, match=r"422: body\.tasks: Input should be a valid list"):
        client.evaluate("m", "t")  # type: ignore[arg-type]
    server.statuses = [503]
    with pytest.raises(ServerError, match="503: on order") as caught:
        client.health()
    assert caught.value.is_passing


def test_a_server_that_does_not_answer_is_an_error_in_time(server: EvaluationServer) -> None:
    client = EvalClient(server.url, timeout=0.1)
    server.hang.set()
    with pytest.raises(ServerError, match="no answer: timed out") as caught:
        client.health()
    assert caught.value.status is None
    assert not client.is_healthy()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        with pytest.raises(ServerError, match=r"no answer: .*refused"):
            EvalClient(f"http://127.0.0.1:{free.getsockname()[1]}").health()


def test_the_token_is_sent_and_not_carried_to_where_a_redirection_leads(monkeypatch: pytest.MonkeyPatch) -> None:
    with EvaluationServer(token="secret") as server:
        assert EvalClient(server.url, "secret").is_healthy()
        assert not EvalClient(server.url).is_healthy()
        monkeypatch.setenv("ASSAYER_TOKEN", "secret")
        assert EvalClient(server.url).is_healthy()
        server.statuses = [307]
        with pytest.raises(ServerError, match="307"):
            EvalClient(server.url).health()
        assert "secret" not in repr(EvalClient(server.url))


def test_a_server_on_this_machine_is_not_looked_for_behind_a_proxy(server: EvaluationServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.delenv("no_proxy", raising=False)
    assert EvalClient(server.url).is_healthy()
    with pytest.raises(ServerError, match="refused"):
        EvalClient("http://nowhere.invalid").health()


@pytest.mark.parametrize("url", ["", "localhost:8000", "ftp://host", "http://"])
def test_what_is_no_url_is_said_at_once(url: str) -> None:
    with pytest.raises(UsageError, match="is no server's URL"):
        EvalClient(url)


def test_a_timeout_in_the_tokens_place_is_said() -> None:
    with pytest.raises(TypeError, match="timeout="):
        EvalClient("http://h", 30.0)  # type: ignore[arg-type]
