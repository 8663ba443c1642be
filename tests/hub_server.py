"""A Hugging Face hub of model repositories on this machine, as far as uploading a folder needs one."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_secretsecretsecret"


@dataclass
class Repository:
    """A repository and the commits pushed to it."""

    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)


@dataclass
class Hub:
    """The server's memory.

    Attributes:
      repositories: by full name.
      readonly: whether tokens may not write.
    """

    endpoint: str = ""
    readonly: bool = False
    repositories: dict[str, Repository] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)

    def answer(self, method: str, path: str, body: bytes, token: str | None) -> tuple[int, Any]:
        """Returns (status, JSON) for a request."""
        if method == "PUT":  # the hub's storage
            self.blobs[path.rpartition("/")[2]] = body
            return 200, {}
        if token != f"Bearer {TOKEN}":
            return 401, {"error": "Invalid credentials in Authorization header"}
        if path == "/api/whoami-v2":
            return 200, {"name": "me", "type": "user", "auth": {"accessToken": {"role": "write"}}}
        if path == "/api/validate-yaml":  # of a model card
            return 200, {"errors": [], "warnings": []}
        if self.readonly:
            return 403, {"error": "Forbidden: you must use a write token"}
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        owner, name, *rest = path.removeprefix("/api/models/").removeprefix("/").split("/")
        repo_id = f"{owner}/{name.removesuffix('.git')}"
        repository = self.repositories.get(repo_id)
        if repository is None:
            return 404, {"error": "Repository not found"}
        if not rest or rest[0] == "revision":
            return 200, {"id": repo_id, "private": repository.private, "sha": "1" * 40, "siblings": []}
        if rest[0] == "tree":
            return 200, [
                {"type": "file", "path": path, "size": len(content), "oid": "3" * 40}
                for path, content in repository.files.items()
            ]
        if rest[0] == "preupload":
            files = [
                {
                    "path": asked["path"],
                    "uploadMode": "lfs" if asked["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for asked in json.loads(body)["files"]
            ]
            return 200, {"files": files}
        if rest == ["info", "lfs", "objects", "batch"]:
            objects = [
                {**asked, "actions": {"upload": {"href": f"{self.endpoint}/storage/{asked['oid']}"}}}
                for asked in json.loads(body)["objects"]
            ]
            return 200, {"transfer": "basic", "objects": objects}
        if rest[0] == "commit":
            self._commit(repository, [json.loads(line) for line in body.splitlines()])
            return 200, {"success": True, "commitOid": "2" * 40, "commitUrl": f"{self.endpoint}/{repo_id}/commit/2"}
        return 404, {"error": f"{method} {path}"}

    def _create(self, asked: dict[str, Any]) -> tuple[int, Any]:
        repo_id = f"{asked.get('organization') or 'me'}/{asked['name']}"
        url = {"url": f"{self.endpoint}/{repo_id}"}
        if repo_id in self.repositories:
            return 409, url | {"error": "You already created this model repo"}
        private = asked["private"] if "private" in asked else asked.get("visibility") == "private"
        self.repositories[repo_id] = Repository(private)
        return 200, url

    def _commit(self, repository: Repository, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                repository.commits.append(value["summary"])
            elif line["key"] == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "deletedFile":
                del repository.files[value["path"]]
            elif line["key"] == "lfsFile":
                content = self.blobs[value["oid"]]
                assert hashlib.sha256(content).hexdigest() == value["oid"]
                repository.files[value["path"]] = content


@contextlib.contextmanager
def serving_hub() -> Iterator[Hub]:
    """A hub that answers while the block runs."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def _answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, answer = hub.answer(
                self.command, self.path.partition("?")[0], body, self.headers.get("Authorization")
            )
            text = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_POST = do_PUT = _answer

        def log_message(self, format: str, *args: object) -> None:
            """Keeps the test's output free of requests."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        hub.endpoint = f"http://127.0.0.1:{server.server_port}"
        yield hub
        server.shutdown()
