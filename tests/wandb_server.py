"""As much of a W&B server as its client needs to write a run and to read it back, on a free port of this machine.

A run takes rows of a second process only when it was opened in shared mode, and none whose step (W&B's own) is not later than the last one:
as the real one does, it answers like always, and drops them.
"""

import gzip
import json
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Runs:
    """The runs of the server: rows of history by name, groups, and which of them take rows from elsewhere."""

    def __init__(self) -> None:
        self.url = ""
        self.clear()

    def clear(self) -> None:
        self.rows: dict[str, list[dict[str, Any]]] = {}
        self.groups: dict[str, str | None] = {}
        self.shared: set[str] = set()
        # Names of runs of a trainer's, which are not ours.
        self.trainers: set[str] = set()
        self.summaries: set[str] = set()
        self.states: set[tuple[str, str]] = set()

    def add_trainer(self, name: str, group: str | None, is_shared: bool) -> None:
        self.rows[name] = [{"loss": 2.0, "global_step": 7, "_step": 0, "_timestamp": 1.0}]
        self.groups[name] = group
        self.trainers.add(name)
        self.shared |= {name} if is_shared else set()

    def steps(self, name: str) -> list[int]:
        """The steps of the rows that are an evaluation's."""
        return sorted(row["global_step"] for row in self.rows.get(name, []) if any(key.startswith("eval") for key in row))

    def graphql(self, query: str, given: dict[str, Any]) -> dict[str, Any]:
        if "upsertBucket" in query:
            name = given.get("name") or given.get("id") or ""
            if given.get("state"):
                self.states.add((name, given["state"]))
            is_new = name not in self.rows
            self.rows.setdefault(name, [])
            self.groups.setdefault(name, given.get("groupName"))
            return {"upsertBucket": {"bucket": self._bucket(name), "inserted": is_new}}
        if "RunResumeStatus" in query:
            return {"model": {"id": "p", "name": "p", "entity": {"id": "e", "name": "e"}, "bucket": self._resumed(given["name"])}}
        if "sampledHistory" in query:
            keys = json.loads(given["spec"] if "spec" in given else given["specs"][0])["keys"]
            rows = [
                {key: row[key] for key in keys} for row in self.rows[given.get("run") or given["name"]] if all(key in row for key in keys)
            ]
            return {"project": {"run": {"sampledHistory": [rows]}}}
        if "createRunFiles" in query:
            files = [{"name": name, "uploadUrl": f"{self.url}/put"} for name in given.get("files", [])]
            return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}
        if "viewer" in query:
            return {"viewer": {"id": "u", "entity": "e", "username": "u", "flags": "{}", "teams": {"edges": []}}}
        if "RunFragment" in query:
            return {"project": {"internalId": "1", "run": self._bucket(given["name"])}}
        return {}

    def _resumed(self, name: str) -> dict[str, Any] | None:
        bucket = self._bucket(name)
        if bucket is None:
            return None
        tails = {f"{kind}Tail": "[]" for kind in ("history", "events", "logs")}
        # The last row, as text in a list as text.
        tails["historyTail"] = json.dumps([json.dumps(row) for row in self.rows[name][-1:]])
        counts = {f"{kind}LineCount": 0 for kind in ("events", "logLine", "history")}
        return {
            **bucket,
            **tails,
            **counts,
            "logLineCount": 0,
            "historyLineCount": len(self.rows[name]),
            "wandbConfig": '{"t": 1}',
        }

    def _bucket(self, name: str) -> dict[str, Any] | None:
        if name not in self.rows:
            return None
        project = {"id": "p", "name": "p", "entity": {"id": "e", "name": "e"}}
        words: dict[str, Any] = dict.fromkeys(["sweepName", "jobType", "commit", "heartbeatAt", "description", "notes", "tags"])
        words |= {"config": "{}", "summaryMetrics": "{}", "systemMetrics": "{}", "historyKeys": {}, "state": "finished", "readOnly": False}
        words |= {"createdAt": "2026-11-20T04:00:00", "user": {"name": "u", "username": "u"}, "projectId": "1", "internalId": "1"}
        return {
            "id": name, "name": name, "displayName": name, "group": self.groups.get(name), "project": project,
            "historyLineCount": len(self.rows[name]), **words,
        }  # fmt: skip

    def stream(self, name: str, sent: dict[str, Any]) -> None:
        files = sent.get("files", {})
        if "wandb-summary.json" in files:
            self.summaries.add(name)
        kept = self.rows.setdefault(name, [])
        for line in files.get("wandb-history.jsonl", {}).get("content", []):
            row = json.loads(line)
            if name in self.trainers and name not in self.shared:
                continue
            if name in self.shared or row["_step"] > max((known["_step"] for known in kept), default=-1):
                kept.append(row)


@contextmanager
def serving() -> Iterator[Runs]:
    """The runs of a server that answers while the block runs."""
    runs = Runs()

    class Answers(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *words: Any) -> None:
            pass

        def do_GET(self) -> None:
            self.answer({})

        def do_PUT(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.answer({})

        def do_POST(self) -> None:
            data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.headers.get("Content-Encoding") == "gzip":
                data = gzip.decompress(data)
            if self.path.endswith("/graphql"):
                asked = json.loads(data)
                return self.answer({"data": runs.graphql(asked["query"], asked.get("variables") or {})})
            if match := re.search(r"/files/[^/]+/[^/]+/([^/]+)/file_stream$", self.path):
                runs.stream(match[1], json.loads(data))
            return self.answer({})

        def answer(self, value: object) -> None:
            data = json.dumps(value).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    class Server(ThreadingHTTPServer):
        def handle_error(self, request: Any, client_address: Any) -> None:
            # W&B's process hangs up when it ends.
            if not isinstance(sys.exception(), ConnectionError):
                super().handle_error(request, client_address)

    server = Server(("127.0.0.1", 0), Answers)
    runs.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield runs
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
