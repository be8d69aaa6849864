"""A server that speaks as much of the Hugging Face Hub's HTTP API as downloads need.

Repositories are directories of real files. `python -m tests.cache.hub_stand_in ROOT` serves every
ROOT/owner/name, and prints its address.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from urllib.parse import unquote, urlsplit


@dataclass
class Repo:
    """A model repository with one commit."""

    directory: Path
    token: str = ""  # who may read it; empty = everyone
    is_gated: bool = False  # listed for everyone, files for `token` only
    status: int = 0  # answer everything with this status
    cut_bytes: int = 0  # bytes to leave out at the end of every file
    gate: Event = field(default_factory=Event)  # files wait for it
    branches: tuple[str, ...] = ("main",)

    def __post_init__(self) -> None:
        self.gate.set()

    @property
    def commit(self) -> str:
        """Stands for the content, as the hub's commits do."""
        paths = sorted(self.directory.iterdir())
        content = b"".join(path.name.encode() + path.read_bytes() for path in paths)
        return hashlib.sha1(content).hexdigest()


class Hub:
    """The server's repositories, by owner/name, and the requests it got."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.requests: list[str] = []  # "METHOD path"
        self.tokens: list[str] = []  # one per request that had one
        self.endpoint = ""

    @contextmanager
    def serve(self) -> Iterator[Hub]:
        """Serves on a free port until the block ends."""
        server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{server.server_port}"
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield self
        finally:
            for repo in self.repos.values():
                repo.gate.set()
            server.shutdown()
            thread.join()
            server.server_close()

    def count(self, text: str) -> int:
        """How many requests had this in their method and path."""
        return sum(text in request for request in self.requests)


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._answer()

        def do_HEAD(self) -> None:
            self._answer()

        def log_message(self, format: str, *args: object) -> None:
            pass

        def _answer(self) -> None:
            path = urlsplit(self.path).path
            hub.requests.append(f"{self.command} {path}")
            token = self.headers.get("Authorization", "").removeprefix("Bearer ")
            if token:
                hub.tokens.append(token)
            api, _, rest = path.partition("/api/models/")
            if rest and not api:
                name, _, revision = rest.partition("/revision/")
                self._model(name, unquote(revision), token)
            else:
                name, _, rest = path.strip("/").partition("/resolve/")
                revision, _, file = rest.partition("/")
                self._file(name, unquote(revision), unquote(file), token)

        def _repo(self, name: str, revision: str, token: str, *, files: bool) -> Repo | None:
            repo = hub.repos.get(name)
            private = repo is not None and repo.token and not repo.is_gated
            if token == "invalid":
                self._fail(401, "", "Invalid credentials in Authorization header")
            elif repo is None or (private and token != repo.token):
                self._fail(404 if token else 401, "RepoNotFound")
            elif repo.status:
                self._fail(repo.status, "")
            elif files and repo.is_gated and token != repo.token:
                self._fail(403 if token else 401, "GatedRepo")
            elif revision and revision not in (*repo.branches, repo.commit):
                self._fail(404, "RevisionNotFound")
            else:
                return repo
            return None

        def _model(self, name: str, revision: str, token: str) -> None:
            repo = self._repo(name, revision, token, files=False)
            if repo is not None:
                files = sorted(repo.directory.iterdir())
                siblings = [{"rfilename": f.name, "size": f.stat().st_size} for f in files]
                model = {
                    "id": name,
                    "sha": repo.commit,
                    "private": bool(repo.token) and not repo.is_gated,
                    "gated": "auto" if repo.is_gated else False,
                    "tags": [],
                    "downloads": 0,
                    "siblings": siblings,
                }
                self._send(200, json.dumps(model).encode(), {"Content-Type": "application/json"})

        def _file(self, name: str, revision: str, file: str, token: str) -> None:
            repo = self._repo(name, revision, token, files=True)
            if repo is None:
                return
            path = repo.directory / file
            if not path.is_file():
                self._fail(404, "EntryNotFound")
                return
            repo.gate.wait()
            content = path.read_bytes()
            etag = f'"{hashlib.sha1(content).hexdigest()}"'
            self._send(200, content, {"ETag": etag, "X-Repo-Commit": repo.commit}, repo.cut_bytes)

        def _fail(self, status: int, code: str, message: str = "no") -> None:
            headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
            self._send(status, b"", headers)

        def _send(self, status: int, body: bytes, headers: dict[str, str], cut: int = 0) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body[: len(body) - cut])
            if cut:
                self.close_connection = True

    return Handler


def main(root: Path) -> None:
    """Serves every directory two levels under `root` until stdin ends."""
    hub = Hub()
    for directory in root.glob("*/*"):
        hub.repos[directory.relative_to(root).as_posix()] = Repo(directory)
    with hub.serve():
        print(hub.endpoint, flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
