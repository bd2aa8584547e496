"""The plain client of an LMMs-Eval server: upstream's methods by their names, on the standard library alone."""

import http.client
import json
import os
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Mapping
from typing import Any, Self
from urllib.parse import quote, urlencode, urlsplit

from assayer.errors import ServerError, UsageError
from assayer.files import printable
from assayer.protocol import IDEMPOTENCY_KEY, JobInfo, JobStatus, dump

__all__ = ["TOKEN_VARIABLE", "EvalClient"]

# Where the token is read from when none is given: it has no place in a training's YAML.
TOKEN_VARIABLE = "ASSAYER_TOKEN"

# Bytes of an answer that are read: a list of a thousand jobs with their metrics.
ANSWER_MAX = 64 << 20

# Seconds between two tries of ``wait`` and ``submit`` at a server that does not answer.
AGAIN = 2.0


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirection would carry the token to wherever it points."""

    def redirect_request(self, *_: Any) -> None:
        return None


class EvalClient:
    """A client of one evaluation server. It holds no connection, and may be used by several threads.

    Args:
        base_url: ``http://host:port``, or https; for another machine, proxies are those of the environment.
        token: sent as ``Authorization: Bearer``; default: the environment's ``ASSAYER_TOKEN``, else none.
        timeout: seconds for one request; None: for ever.

    Every method raises ``ServerError``; its ``status`` is None where no answer came.
    """

    def __init__(self, base_url: str = "http://localhost:8000", token: str | None = None, timeout: float | None = 60.0) -> None:
        parts = urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UsageError(f"{printable(base_url)!r} is no server's URL; it must be like http://host:8000")
        if token is not None and not isinstance(token, str):
            raise TypeError("token must be a string; a time-out is given as timeout=...")
        self.base_url = base_url.rstrip("/")
        self.timeout = timeout
        self._token = os.environ.get(TOKEN_VARIABLE) if token is None else token
        # This machine's own server is not asked by way of a proxy, which would look for it on its own machine.
        is_here = parts.hostname in ("localhost", "::1") or parts.hostname.startswith("127.")
        self._opener = urllib.request.build_opener(_NoRedirect, *([urllib.request.ProxyHandler({})] if is_here else []))

    def __reduce__(self) -> tuple[Any, ...]:
        return EvalClient, (self.base_url, self._token, self.timeout)

    def __repr__(self) -> str:
        return f"EvalClient({self.base_url!r})"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Nothing is open between two requests; here because upstream's client has it."""

    def health(self) -> dict[str, Any]:
        """``{"status": "healthy", "timestamp": ..., "queue_size": ...}``."""
        return self._request("GET", "/health")

    def is_healthy(self) -> bool:
        """True when the server answers that it is healthy."""
        try:
            return self.health().get("status") == "healthy"
        except ServerError:
            return False

    def list_tasks(self) -> list[str]:
        """The names of the tasks that can be evaluated."""
        return list(self._request("GET", "/tasks").get("tasks", []))

    def list_models(self) -> list[str]:
        """The names of the models that can be evaluated."""
        return list(self._request("GET", "/models").get("models", []))

    def evaluate(
        self,
        model: str,
        tasks: list[str],
        model_args: dict[str, Any] | None = None,
        num_fewshot: int | None = None,
        batch_size: int | str | None = None,
        device: str | None = None,
        limit: int | float | None = None,
        gen_kwargs: str | None = None,
        log_samples: bool = True,
        predict_only: bool = False,
        num_gpus: int = 1,
        output_dir: str | None = None,
        lmms_engine_kwargs: dict[str, Any] | None = None,
        *,
        idempotency_key: str | None = None,
    ) -> dict[str, Any]:
        """Queues an evaluation, and returns ``{"job_id", "status", "position_in_queue", "message"}``.

        Args:
            lmms_engine_kwargs: ``{"model_path", "checkpoint_type": "regular" | "ema", "output_path"}``: merge that checkpoint first.
            idempotency_key: two submissions under one key are one job; default: none is sent.
        """
        fields = {
            "model": model,
            "tasks": tasks,
            "model_args": model_args,
            "num_fewshot": num_fewshot,
            "batch_size": batch_size,
            "device": device,
            "limit": limit,
            "gen_kwargs": gen_kwargs,
            "log_samples": log_samples,
            "predict_only": predict_only,
            "num_gpus": num_gpus,
            "output_dir": output_dir,
            "lmms_engine_kwargs": lmms_engine_kwargs,
        }
        return self.post_evaluate({name: value for name, value in fields.items() if value is not None}, idempotency_key)

    def post_evaluate(self, fields: Mapping[str, Any], idempotency_key: str | None = None) -> dict[str, Any]:
        """``evaluate`` with the request's fields as they go over the wire."""
        headers = {IDEMPOTENCY_KEY: idempotency_key} if idempotency_key else {}
        return self._request("POST", "/evaluate", fields, headers=headers)

    def submit(self, model: str, tasks: list[str], *, timeout: float | None = None, **fields: Any) -> str:
        """Queues an evaluation as ``evaluate`` does, and returns its job's id; tried again while the server is away, and yet one job.

        Args:
            timeout: seconds after which it gives up; None: never.
        """
        key = str(uuid.uuid4())
        answer = self._patiently(lambda: self.evaluate(model, tasks, **fields, idempotency_key=key), timeout, "no answer to a submission")
        return str(answer["job_id"])

    def get_job(self, job_id: str) -> dict[str, Any]:
        """A job's fields, as JSON; ``protocol.JobInfo`` names them."""
        return self._request("GET", f"/jobs/{quote(job_id, safe='')}")

    def list_jobs(self, status: str | None = None, limit: int | None = None) -> list[dict[str, Any]]:
        """The jobs that the server knows, the newest first: those of one status, and at most so many."""
        query = urlencode({name: value for name, value in (("status", status), ("limit", limit)) if value is not None})
        return list(self._request("GET", f"/jobs?{query}" if query else "/jobs")["jobs"])

    def cancel_job(self, job_id: str, force: bool = False) -> dict[str, Any]:
        """Cancels a job that is queued, or, with ``force``, also one that runs."""
        return self._request("DELETE", f"/jobs/{quote(job_id, safe='')}" + ("?force=true" if force else ""))

    def wait_for_job(self, job_id: str, poll_interval: float = 5.0, timeout: float | None = None, verbose: bool = True) -> dict[str, Any]:
        """A completed job's fields, as JSON.

        Args:
            poll_interval: seconds between two questions.
            timeout: seconds; None: as long as it takes.
            verbose: whether how it goes is printed.

        Raises:
            RuntimeError: ``Job failed: ...``, or ``Job cancelled: ...`` (upstream's client waits for ever for a cancelled one).
            TimeoutError: it was still out after so many seconds.
            ServerError: the server did not answer; ``wait`` asks it again instead.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            job = self.get_job(job_id)
            if verbose:
                print(f"Job {job_id[:8]}... {_how(job)}")
            if _ended(job, job_id):
                return job
            if deadline is not None and time.monotonic() > deadline:
                raise TimeoutError(f"Timeout waiting for job {job_id}")
            time.sleep(poll_interval)

    def wait(self, job_id: str, timeout: float | None = None, poll_interval: float = 5.0) -> JobInfo:
        """``wait_for_job``, silently, over restarts of the server, and with the job as ``JobInfo``, whose ``metrics`` are the numbers."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            job = self._patiently(lambda: self.get_job(job_id), left, f"Timeout waiting for job {job_id}")
            if _ended(job, job_id):
                return JobInfo.from_json(job)
            if deadline is not None and time.monotonic() > deadline:
                raise TimeoutError(f"Timeout waiting for job {job_id}")
            time.sleep(poll_interval)

    def get_queue_status(self) -> dict[str, Any]:
        """``{"queue_size", "running_job", "queued_jobs", "completed_jobs", "failed_jobs"}``."""
        return self._request("GET", "/queue")

    def merge_checkpoint(self, checkpoint_path: str, output_path: str | None = None, checkpoint_type: str = "regular") -> dict[str, Any]:
        """Merges a sharded checkpoint, and returns ``{"success", "message", "merged_path"}``; waits as long as that takes."""
        fields = {"checkpoint_path": checkpoint_path, "output_path": output_path, "checkpoint_type": checkpoint_type}
        return self._request("POST", "/merge", fields, timeout=None)

    def notify(self, directory: str) -> dict[str, Any]:
        """Hints that something new lies in a directory: its watch looks now instead of at its next interval."""
        return self._request("POST", "/notify", {"directory": os.path.abspath(directory)})

    def _patiently(self, ask: Callable[[], dict[str, Any]], timeout: float | None, late: str) -> dict[str, Any]:
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            try:
                return ask()
            except ServerError as error:
                if not error.is_passing:
                    raise
                if deadline is not None and time.monotonic() + AGAIN > deadline:
                    raise TimeoutError(f"{late}: {error}") from None
            time.sleep(AGAIN)

    def _request(
        self,
        method: str,
        target: str,
        body: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
        timeout: float | None = -1.0,
    ) -> dict[str, Any]:
        """The JSON object of the answer.

        Raises:
            ServerError: no answer, one of another status than 200, or one that is no JSON object.
        """
        seconds = self.timeout if timeout == -1.0 else timeout
        request = urllib.request.Request(self.base_url + target, method=method, headers={"Accept": "application/json", **(headers or {})})
        if body is not None:
            request.data = dump(body)
            request.add_header("Content-Type", "application/json")
        if self._token:
            # Not for where a redirection leads.
            request.add_unredirected_header("Authorization", f"Bearer {self._token}")
        where = f"{method} {self.base_url}{target}"
        try:
            with self._opener.open(request, timeout=seconds) as answer:
                return _object(_read(answer, seconds), where)
        except urllib.error.HTTPError as error:
            with error:
                raise ServerError(f"{where}: {error.code}: {_detail(error, seconds)}", error.code) from None
        except urllib.error.URLError as error:
            raise ServerError(f"{where}: no answer: {error.reason}") from None
        except (OSError, http.client.HTTPException) as error:
            raise ServerError(f"{where}: no answer: {error or type(error).__name__}") from None


def _read(answer: Any, seconds: float | None) -> bytes:
    """The body: a server that sends a byte now and then is cut off, too, for a socket's time-out counts each read alone."""
    deadline = None if seconds is None else time.monotonic() + seconds
    data = b""
    while chunk := answer.read1(1 << 16):
        data += chunk
        if len(data) > ANSWER_MAX:
            raise OSError(f"an answer of more than {ANSWER_MAX >> 20} MiB")
        if deadline is not None and time.monotonic() > deadline:
            raise TimeoutError("timed out in the middle of the answer")
    left = getattr(answer, "length", None)
    if left:
        raise http.client.IncompleteRead(data, left)
    return data


def _object(data: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise ServerError(f"{where}: the answer is no JSON object: {printable(data[:100].decode(errors='replace'))}", 200)
    return value


def _detail(error: urllib.error.HTTPError, seconds: float | None) -> str:
    """What the server says of an error, on one line."""
    try:
        data = _read(error, seconds)
    except (OSError, http.client.HTTPException):
        return printable(str(error.reason))
    try:
        value = json.loads(data)["detail"]
    except (ValueError, RecursionError, TypeError, KeyError):
        return printable(data[:200].decode(errors="replace")) or printable(str(error.reason))
    if isinstance(value, list):
        value = "; ".join(f"{'.'.join(map(str, d.get('loc', [])))}: {d.get('msg')}" for d in value if isinstance(d, dict))
    return printable(str(value)[:500])


def _how(job: Mapping[str, Any]) -> str:
    status = str(job.get("status"))
    return f"{status} (position: {job.get('position_in_queue', '?')})" if status == JobStatus.QUEUED else status


def _ended(job: Mapping[str, Any], job_id: str) -> bool:
    status = job.get("status")
    if status == JobStatus.FAILED:
        raise RuntimeError(f"Job failed: {job.get('error') or 'Unknown error'}")
    if status == JobStatus.CANCELLED:
        raise RuntimeError(f"Job cancelled: {job_id}")
    return status == JobStatus.COMPLETED
