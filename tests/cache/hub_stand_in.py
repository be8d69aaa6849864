"""A server that speaks as much of the Hugging Face Hub's HTTP API as downloads need.

Repositories are directories of real files. `python -m tests.cache.hub_stand_in ROOT` serves every
ROOT/owner/name, and prints its address.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from typing import Any
from urllib.parse import unquote, urlsplit

_PIECE_BYTES = 1 << 18  # of an answer that is sent at a rate


@dataclass
class Repo:
    """A model repository with one commit."""

    directory: Path
    token: str = ""  # who may read it; empty = everyone
    is_gated: bool = False  # listed for everyone, files for `token` only
    status: int = 0  # answer everything with this status
    cut_bytes: int = 0  # bytes to leave out at the end of every file
    cut_file: str = ""  # of this one only
    num_cuts: int = -1  # answers to cut so; -1 = all
    has_ranges: bool = True
    has_checksums: bool = True
    is_corrupt: bool = False  # flip a bit of every file
    first_bytes: int = 0  # bytes of an answer that do not wait for the gate
    trickle_seconds: float = 0.0  # pause after every byte
    bytes_per_second: float = 0.0  # 0 = as fast as they are taken
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

    def read(self, path: Path) -> tuple[bytes | memoryview, str]:
        """A file's content and ETag."""
        content = path.read_bytes()
        if self.is_corrupt:
            content = content[:-1] + bytes([content[-1] ^ 1])
        return content, f'"{hashlib.sha1(content).hexdigest()}"'


class Hub:
    """The server's repositories, by owner/name, and the requests it got."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.requests: list[str] = []  # "METHOD path"
        self.ranges: list[str] = []  # one per request that had one
        self.tokens: list[str] = []  # one per request that had one
        self.endpoint = ""
        self.is_over = Event()

    @contextmanager
    def serve(self) -> Iterator[Hub]:
        """Serves on a free port until the block ends."""
        server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.endpoint = f"http://127.0.0.1:{server.server_port}"
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield self
        finally:
            self.is_over.set()
            for repo in self.repos.values():
                repo.gate.set()
            server.shutdown()
            thread.join()
            server.server_close()

    def count(self, text: str) -> int:
        """How many requests had this in their method and path."""
        return sum(text in request for request in self.requests)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that break off, which is what many tests are about, are no errors."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    """One connection; the hub that it belongs to makes a class of its own of this."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _answer(self) -> None:
        path = urlsplit(self.path).path
        self.hub.requests.append(f"{self.command} {path}")
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token:
            self.hub.tokens.append(token)
        api, _, rest = path.partition("/api/models/")
        if rest and not api:
            name, _, revision = rest.partition("/revision/")
            self._model(name, unquote(revision), token)
        else:
            name, _, rest = path.strip("/").partition("/resolve/")
            revision, _, file = rest.partition("/")
            self._file(name, unquote(revision), unquote(file), token)

    def _repo(self, name: str, revision: str, token: str, *, files: bool) -> Repo | None:
        repo = self.hub.repos.get(name)
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
            siblings = [_sibling(repo, path) for path in sorted(repo.directory.iterdir())]
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
        if not repo.first_bytes:
            repo.gate.wait()
        content, etag = repo.read(path)
        headers = {"ETag": etag, "X-Repo-Commit": repo.commit}
        start, status = 0, 200
        if repo.has_ranges and (asked := self.headers.get("Range", "")):
            self.hub.ranges.append(asked)
            start, status = int(asked.removeprefix("bytes=").removesuffix("-")), 206
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        cut = repo.cut_bytes if repo.num_cuts and repo.cut_file in ("", file) else 0
        repo.num_cuts -= 1 if cut and repo.num_cuts > 0 else 0
        self._send(status, content[start:], headers, repo, cut)

    def _fail(self, status: int, code: str, message: str = "no") -> None:
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self._send(status, b"", headers)

    def _send(
        self,
        status: int,
        body: bytes | memoryview,
        headers: dict[str, str],
        repo: Repo | None = None,
        cut: int = 0,
    ) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            with suppress(ConnectionError):  # a client that gives up or is killed
                self._write(repo, body[: max(0, len(body) - cut)])
        if cut:
            self.close_connection = True

    def _write(self, repo: Repo | None, body: bytes | memoryview) -> None:
        if repo is not None and repo.trickle_seconds:
            for byte in body:
                self.wfile.write(bytes([byte]))
                if self.hub.is_over.wait(repo.trickle_seconds):
                    return
        elif repo is not None and repo.bytes_per_second:
            self._write_at_rate(repo.bytes_per_second, memoryview(body))
        elif repo is not None and 0 < repo.first_bytes < len(body):
            self.wfile.write(body[: repo.first_bytes])
            repo.gate.wait()
            self.wfile.write(body[repo.first_bytes :])
        else:
            self.wfile.write(body)

    def _write_at_rate(self, bytes_per_second: float, body: memoryview) -> None:
        started = time.monotonic()
        for done in range(0, len(body), _PIECE_BYTES):
            early = done / bytes_per_second - (time.monotonic() - started)
            if early > 0 and self.hub.is_over.wait(early):
                return
            self.wfile.write(body[done : done + _PIECE_BYTES])


def _sibling(repo: Repo, path: Path) -> dict[str, object]:
    """A file as the API lists it: large ones with their sha256, small ones with git's name."""
    content = path.read_bytes()
    sibling: dict[str, object] = {"rfilename": path.name, "size": len(content)}
    if repo.has_checksums:
        sibling["blobId"] = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        if path.suffix == ".safetensors":
            digest = hashlib.sha256(content).hexdigest()
            sibling["lfs"] = {"size": len(content), "sha256": digest, "pointerSize": 134}
            sibling["blobId"] = "0" * 40  # the pointer's, which says nothing of the content
    return sibling


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
