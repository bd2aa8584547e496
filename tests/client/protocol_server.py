"""A server that speaks the LMMs-Eval protocol over real sockets, and misbehaves on order."""

import json
import threading
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

from assayer.errors import ProtocolError
from assayer.protocol import EvaluateRequest, JobInfo, JobList, JobStatus, JobSubmitResponse, MergeRequest, MergeResponse, dump, parse


class EvaluationServer:
    """Jobs end when the test says so (``end``), or, with ``at_once``, with these metrics as soon as they are submitted."""

    def __init__(self, at_once: Any = None, token: str | None = None) -> None:
        self.at_once, self.token = at_once, token
        self.jobs: dict[str, JobInfo] = {}
        self.keys: dict[str, str] = {}
        # Every request that arrived: method and target.
        self.requests: list[tuple[str, str]] = []
        # Misbehaviour: statuses to answer next, answers to lose next, requests to leave without one.
        self.statuses: list[int] = []
        self.lose = 0
        self.refused_keys: set[str] = set()
        # What no checkpoint's path may hold.
        self.refuses: str | None = None
        self.hang = threading.Event()
        self.let_go = threading.Event()
        self.port = 0
        self.up()

    def up(self) -> None:
        server = self

        class Handler(BaseHTTPRequestHandler):
            def handle_one_request(self) -> None:
                try:
                    super().handle_one_request()
                except ConnectionError:
                    self.close_connection = True

            def log_message(self, *_: Any) -> None:
                pass

            def any(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                server.requests.append((self.command, self.path))
                if server.hang.is_set():
                    server.let_go.wait(60)
                if server.token and self.headers.get("Authorization") != f"Bearer {server.token}":
                    status, answer = 401, {"detail": "a token is needed"}
                elif server.statuses:
                    status, answer = server.statuses.pop(0), {"detail": "on order"}
                else:
                    status, answer = server.answer(self.command, self.path, body, self.headers.get("Idempotency-Key"))
                if server.lose:
                    server.lose -= 1
                    return
                data = dump(answer)
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST = do_DELETE = any

        self._http = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self.port = self._http.server_port
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()

    def down(self) -> None:
        self.let_go.set()
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.down()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def count(self, method: str, start: str) -> int:
        return sum(m == method and target.startswith(start) for m, target in self.requests)

    def end(self, status: JobStatus, metrics: Any = None, error: str | None = None, result: Any = None) -> None:
        """Ends every job that is not ended yet."""
        for job in list(self.jobs.values()):
            if job.status == JobStatus.QUEUED:
                values = {**job.to_json(), "status": status, "metrics": metrics, "error": error, "result": result}
                self.jobs[job.job_id] = JobInfo.from_json(values)

    def answer(self, method: str, path: str, body: bytes, key: str | None) -> tuple[int, Any]:
        target = urlsplit(path).path
        try:
            if (method, target) == ("POST", "/evaluate"):
                return 200, self.submit(EvaluateRequest.from_json(parse(body)), key).to_json()
            if (method, target) == ("POST", "/merge"):
                return 200, MergeResponse.merged(MergeRequest.from_json(parse(body)).checkpoint_path + "-merged").to_json()
        except ProtocolError as error:
            return error.status, error.to_json()
        job = self.jobs.get(target.removeprefix("/jobs/"))
        if target.startswith("/jobs/") and not job:
            return 404, {"detail": f"Job {target.removeprefix('/jobs/')} not found"}
        if job:
            return 200, {"message": f"Job {job.job_id} cancelled"} if method == "DELETE" else job.to_json()
        answers = {
            "/health": {"status": "healthy", "timestamp": "2026", "queue_size": 0},
            "/tasks": {"tasks": ["t"]},
            "/models": {"models": ["m"]},
            "/queue": {"queue_size": 0, "running_job": None, "queued_jobs": [], "completed_jobs": 0, "failed_jobs": 0},
            "/jobs": JobList(tuple(self.jobs.values())).to_json(),
            "/notify": {"message": "looking", "watches": 1, "asked": json.loads(body or b"null")},
        }
        return (200, answers[target]) if target in answers else (404, {"detail": "Not Found"})

    def submit(self, request: EvaluateRequest, key: str | None) -> JobSubmitResponse:
        path = (request.model_args or {}).get("model", "")
        if self.refuses is not None and self.refuses in path:
            raise ProtocolError(f"{path} lies outside of the folders that this server may use (--root)", status=403)
        if key in self.refused_keys:
            raise ProtocolError("this Idempotency-Key was used for another request; give each request its own")
        if key not in self.keys:
            job_id = str(uuid.uuid4())
            self.keys[key or job_id] = job_id
            self.jobs[job_id] = JobInfo(job_id=job_id, status=JobStatus.QUEUED, created_at="2026", request=request)
            if self.at_once is not None:
                self.end(JobStatus.COMPLETED, self.at_once)
            return JobSubmitResponse.queued(job_id, 0)
        return JobSubmitResponse.queued(self.keys[key or ""], 0)
