"""The protocol's endpoints: what each is asked and answers, and which status a refusal has."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from typing import Any, TypeVar

import redis
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from assayer.errors import AssayerError, ProtocolError
from assayer.fields import boolean, integer, one_of
from assayer.protocol import (
    IDEMPOTENCY_KEY,
    EvaluateRequest,
    HealthResponse,
    JobList,
    JobStatus,
    MergeRequest,
    MergeResponse,
    MessageResponse,
    NotifyRequest,
    NotifyResponse,
    dump,
    is_finished,
    parse,
)
from assayer.server.desk import Desk
from assayer.server.guard import Guard, TooLarge
from assayer.server.merging import Merger
from assayer.server.order import NotWholeError
from assayer.server.schema import openapi, page
from assayer.server.tasks import Tasks

__all__ = ["application"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Seconds: for a request's body to come, for the names of the tasks to be known, for a cancelled job to end.
BODY_TIMEOUT = 20.0
TASKS_TIMEOUT = 60.0
CANCEL_TIMEOUT = 15.0
# Seconds that a submission waits for a checkpoint that is still being written.
HALF_THERE = 3.0
# Seconds after which a client that was told 503 may ask again.
RETRY_AFTER = 5
LIST_DEFAULT, LIST_MAX = 100, 1000
# Threads for what touches files.
WITH_FILES = 16
KEY_MAX = 255


def _json(value: object, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(dump(value), status, headers, "application/json")


def _refused(error: ProtocolError) -> Response:
    return _json(error.to_json(), error.status, {"Retry-After": str(RETRY_AFTER)} if error.status == 503 else None)


async def _body(request: Request) -> Any:
    # A page of another site can send any other kind without being asked for leave.
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ProtocolError("the body must be application/json", status=415)
    try:
        async with asyncio.timeout(BODY_TIMEOUT):
            return parse(await request.body())
    except TimeoutError:
        raise ProtocolError(f"the body did not come within {BODY_TIMEOUT:g} s", status=408) from None
    except TooLarge:
        raise ProtocolError("the body is too large", status=413) from None


def _query(request: Request, name: str, read: Callable[[Any, tuple[str | int, ...]], Any], default: Any) -> Any:
    value = request.query_params.get(name)
    return default if value is None else read(value, ("query", name))


class Endpoints:
    """One method an endpoint. What touches files has threads of its own, so that a disk that hangs keeps nobody from asking."""

    def __init__(self, desk: Desk, merger: Merger, tasks: Tasks, has_token: bool) -> None:
        self.desk = desk
        self.merger = merger
        self.tasks = tasks
        self.document = openapi(has_token)
        self._with_files = ThreadPoolExecutor(WITH_FILES)

    async def _apart(self, function: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._with_files, function, *arguments)

    async def health(self, request: Request) -> Response:
        size = len(await asyncio.to_thread(self.desk.jobs.waiting))
        return _json(HealthResponse("healthy", datetime.now().isoformat(), size).to_json())

    async def evaluate(self, request: Request) -> Response:
        wanted = EvaluateRequest.from_json(await _body(request))
        key = request.headers.get(IDEMPOTENCY_KEY)
        if key is not None and not 1 <= len(key) <= KEY_MAX:
            raise ProtocolError(f"{IDEMPOTENCY_KEY} must have 1 to {KEY_MAX} characters")
        deadline = time.monotonic() + HALF_THERE
        while True:
            try:
                return _json((await self._apart(self.desk.submit, wanted, key)).to_json())
            except NotWholeError:
                # Waited for here: threads that wait would keep other submissions out.
                if time.monotonic() > deadline:
                    raise
            await asyncio.sleep(HALF_THERE / 10)

    async def job(self, request: Request) -> Response:
        return _json((await self.desk.ask(request.path_params["job_id"])).to_json())

    async def jobs(self, request: Request) -> Response:
        status = _query(request, "status", one_of(*JobStatus), None)
        limit = _query(request, "limit", integer, LIST_DEFAULT)
        if not 1 <= limit <= LIST_MAX:
            raise ProtocolError(f"limit must be 1 to {LIST_MAX}")
        # Many jobs are many bytes: to write them down, too, is done apart.
        return await asyncio.to_thread(lambda: _json(JobList(tuple(self.desk.list(status, limit))).to_json()))

    async def cancel(self, request: Request) -> Response:
        job = request.path_params["job_id"]
        force = _query(request, "force", boolean, False)
        told = await self._apart(self.desk.cancel, job, force)
        deadline = time.monotonic() + CANCEL_TIMEOUT
        while told == "running":
            await asyncio.sleep(0.2)
            status = (await self.desk.ask(job)).status
            if is_finished(status) and status != JobStatus.CANCELLED:
                raise ProtocolError("Job already finished or cancelled", status=400)
            if status == JobStatus.CANCELLED:
                break
            if time.monotonic() > deadline:
                # Its worker was lost, or cannot be reached; whoever takes the job next ends it.
                raise ProtocolError(f"Job {job} is told to end, and still runs; ask again", status=503)
        return _json(MessageResponse(f"Job {job} cancelled").to_json())

    async def queue(self, request: Request) -> Response:
        return _json((await asyncio.to_thread(self.desk.queue)).to_json())

    async def list_tasks(self, request: Request) -> Response:
        try:
            async with asyncio.timeout(TASKS_TIMEOUT):
                return _json({"tasks": await self.tasks.names()})
        except TimeoutError:
            raise ProtocolError("the names of the tasks are still being read; ask again", status=503) from None

    async def list_models(self, request: Request) -> Response:
        return _json({"models": self.desk.models.names})

    async def merge(self, request: Request) -> Response:
        wanted = MergeRequest.from_json(await _body(request))
        return _json(MergeResponse.merged(await self.merger.merge(wanted)).to_json())

    async def notify(self, request: Request) -> Response:
        wanted = NotifyRequest.from_json(await _body(request))
        count = await self._apart(self.desk.notify, wanted.directory)
        text = "1 watch looks now" if count == 1 else f"{count} watches look now"
        return _json(NotifyResponse(text, count).to_json())

    async def openapi(self, request: Request) -> Response:
        return _json(self.document)

    async def docs(self, request: Request) -> Response:
        return HTMLResponse(page(self.document))


def _answers(endpoint: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
    """An endpoint whose errors are answers: never one with 200, never a traceback."""

    async def answer(request: Request) -> Response:
        try:
            return await endpoint(request)
        except ProtocolError as error:
            return _refused(error)
        except redis.RedisError as error:
            logger.warning("Redis does not answer: %s", error)
            return _refused(ProtocolError("the queue does not answer; try again", status=503))
        except AssayerError as error:
            return _json({"detail": str(error)}, 500)

    return answer


async def _not_routed(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _json({"detail": error.detail}, error.status_code, dict(error.headers or {}))


async def _broken(request: Request, error: Exception) -> Response:
    return _json({"detail": "Internal Server Error"}, 500)


async def _gone(request: Request, error: Exception) -> Response:
    # Nobody reads this.
    return Response(status_code=408)


def application(desk: Desk, merger: Merger, tasks: Tasks, token: str | None) -> ASGIApp:
    """The whole application, behind its guard."""
    ends = Endpoints(desk, merger, tasks, token is not None)
    routes: list[tuple[str, str, Callable[[Request], Awaitable[Response]]]] = [
        ("GET", "/health", ends.health),
        ("POST", "/evaluate", ends.evaluate),
        ("GET", "/jobs", ends.jobs),
        ("GET", "/jobs/{job_id}", ends.job),
        ("DELETE", "/jobs/{job_id}", ends.cancel),
        ("GET", "/queue", ends.queue),
        ("GET", "/tasks", ends.list_tasks),
        ("GET", "/models", ends.list_models),
        ("POST", "/merge", ends.merge),
        ("POST", "/notify", ends.notify),
        ("GET", "/openapi.json", ends.openapi),
        ("GET", "/docs", ends.docs),
    ]
    made = [Route(path, _answers(endpoint), methods=[method]) for method, path, endpoint in routes]
    handlers: dict[Any, Any] = {HTTPException: _not_routed, ClientDisconnect: _gone, Exception: _broken}
    return Guard(Starlette(routes=made, exception_handlers=handlers), token)
