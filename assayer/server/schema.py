"""The OpenAPI document, made of the protocol's own dataclasses, and a page of it that needs no other machine."""

import html
import json
from typing import Any

from assayer import __version__
from assayer.protocol import (
    IDEMPOTENCY_KEY,
    EvaluateRequest,
    HealthResponse,
    JobInfo,
    JobList,
    JobStatus,
    JobSubmitResponse,
    MergeRequest,
    MergeResponse,
    MessageResponse,
    NotifyRequest,
    NotifyResponse,
    QueueStatusResponse,
)

__all__ = ["openapi", "page"]

_DETAIL = {"type": "object", "properties": {"detail": {"type": "string"}}, "required": ["detail"]}
_INVALID = {
    "type": "object",
    "properties": {"detail": {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}]}},
    "required": ["detail"],
}
_WHY = {
    400: "It cannot be done",
    401: "The token is missing",
    403: "It may not be done",
    404: "It is not known",
    408: "The request did not come to its end",
    413: "The body is too large",
    415: "The body is no JSON",
    422: "The request is not what it must be",
    500: "It failed",
    503: "Not now; Retry-After says when",
}


def _names(key: str) -> dict[str, Any]:
    return {"type": "object", "properties": {key: {"type": "array", "items": {"type": "string"}}}, "required": [key]}


def _operation(
    text: str, answer: dict[str, Any], errors: tuple[int, ...], body: type[Any] | None = None, *parameters: Any
) -> dict[str, Any]:
    told: dict[str, Any] = {"200": {"description": "Done", "content": {"application/json": {"schema": answer}}}}
    for status in sorted({*errors, 401, 403, 503}):
        shape = _INVALID if status == 422 else _DETAIL
        told[str(status)] = {"description": _WHY[status], "content": {"application/json": {"schema": shape}}}
    operation: dict[str, Any] = {"summary": text, "responses": told}
    if body is not None:
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": body.schema()}}}
    if parameters:
        operation["parameters"] = list(parameters)
    return operation


def _parameter(name: str, where: str, schema: dict[str, Any], text: str) -> dict[str, Any]:
    return {"name": name, "in": where, "required": where == "path", "schema": schema, "description": text}


_BODY = (400, 408, 413, 415, 422)
_JOB = _parameter("job_id", "path", {"type": "string"}, "The job's id")
_KEY = _parameter(IDEMPOTENCY_KEY, "header", {"type": "string", "maxLength": 255}, "A second submission under the same key is the same job")
_STATE = _parameter("status", "query", {"type": "string", "enum": [str(word) for word in JobStatus]}, "Only jobs of this status")
_LIMIT = _parameter("limit", "query", {"type": "integer", "minimum": 1, "maximum": 1000, "default": 100}, "At most so many")
_FORCE = _parameter("force", "query", {"type": "boolean", "default": False}, "Also a job that runs")


def openapi(has_token: bool) -> dict[str, Any]:
    """The document, in OpenAPI 3.1."""
    paths: dict[str, Any] = {
        "/health": {"get": _operation("Whether the server answers", HealthResponse.schema(), ())},
        "/evaluate": {"post": _operation("Queue an evaluation", JobSubmitResponse.schema(), _BODY, EvaluateRequest, _KEY)},
        "/jobs": {"get": _operation("The newest jobs", JobList.schema(), (422,), None, _STATE, _LIMIT)},
        "/jobs/{job_id}": {
            "get": _operation("One job", JobInfo.schema(), (404,), None, _JOB),
            "delete": _operation("Cancel a job", MessageResponse.schema(), (400, 404, 422), None, _JOB, _FORCE),
        },
        "/queue": {"get": _operation("The queue", QueueStatusResponse.schema(), ())},
        "/tasks": {"get": _operation("Names of the tasks", _names("tasks"), ())},
        "/models": {"get": _operation("Names of the models", _names("models"), ())},
        "/merge": {"post": _operation("Merge a checkpoint", MergeResponse.schema(), (*_BODY, 404, 500), MergeRequest)},
        "/notify": {"post": _operation("Make a directory's watches look now", NotifyResponse.schema(), (*_BODY, 404), NotifyRequest)},
    }
    told: dict[str, Any] = {"openapi": "3.1.0", "info": {"title": "assayer", "version": __version__}, "paths": paths}
    if has_token:
        told["components"] = {"securitySchemes": {"token": {"type": "http", "scheme": "bearer"}}}
        told["security"] = [{"token": []}]
    return told


_STYLE = (
    "body{font:15px sans-serif;max-width:60em;margin:2em auto;padding:0 1em}code,pre{background:#8882;padding:.1em .3em}pre{overflow:auto}"
)


def page(document: dict[str, Any]) -> str:
    """The document as a page: plain HTML, nothing is fetched from anywhere."""
    parts = ["<!doctype html><html lang=en><meta charset=utf-8><title>assayer</title>", f"<style>{_STYLE}</style><h1>assayer</h1>"]
    parts.append("<p>The LMMs-Eval protocol. <a href=/openapi.json>openapi.json</a></p>")
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            parts.append(f"<h2><code>{method.upper()} {html.escape(path)}</code></h2><p>{html.escape(operation['summary'])}.</p>")
            for parameter in operation.get("parameters", ()):
                name, text = html.escape(parameter["name"]), html.escape(parameter["description"])
                parts.append(f"<p><code>{name}</code> ({parameter['in']}): {text}.</p>")
            body = operation.get("requestBody")
            shapes = [("Request", body["content"])] if body else []
            shapes += [(status, answer["content"]) for status, answer in operation["responses"].items() if status == "200"]
            for name, content in shapes:
                text = html.escape(json.dumps(content["application/json"]["schema"], indent=1))
                parts.append(f"<details><summary>{name}</summary><pre>{text}</pre></details>")
            errors = [
                f"{status} {html.escape(answer['description'])}" for status, answer in operation["responses"].items() if status != "200"
            ]
            parts.append(f"<p>Errors: {'; '.join(errors)}.</p>")
    return "".join(parts)
