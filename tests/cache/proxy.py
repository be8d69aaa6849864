"""Proxy: a TCP middleman that breaks off answers, or gives one of its own."""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import suppress
from threading import Event, Thread
from types import TracebackType
from urllib.parse import urlsplit

_CHUNK_BYTES = 1 << 16


class Proxy:
    """One HTTP request per connection goes to `target`, a base URL; or is answered `status`.

    `requests` has every request's head. Once `cut_after` bytes of an answer have passed, its
    connection is closed, `on_cut` called, and no later answer is cut. After `stall_after` bytes of
    any answer nothing more comes. Answers to who asks for the first byte only are left alone.
    """

    def __init__(self, target: str, status: int = 0) -> None:
        self._target, self._status = urlsplit(target), status
        self.requests: list[bytes] = []
        self.cut_after, self.num_cuts, self.stall_after = 0, 0, 0
        self.on_cut: Callable[[], object] = lambda: None
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread = Thread(target=self._accept, daemon=True)
        self._is_over = Event()

    @property
    def host(self) -> str:
        """Host and port."""
        return self.url.removeprefix("http://")

    def __enter__(self) -> Proxy:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._is_over.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, suppress(OSError):
            head = b""
            while b"\r\n\r\n" not in head:
                data = client.recv(_CHUNK_BYTES)
                if not data:
                    return
                head += data
            self.requests.append(head)
            if self._status:
                client.sendall(
                    b"HTTP/1.1 %d No\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
                    % self._status
                )
                return
            self._forward(client, head.replace(b"\r\n", b"\r\nConnection: close\r\n", 1))

    def _forward(self, client: socket.socket, head: bytes) -> None:
        address = (self._target.hostname or "", self._target.port or 80)
        with socket.create_connection(address) as server:
            server.sendall(head)
            passed, is_look = 0, b"bytes=0-0" in head
            while data := server.recv(_CHUNK_BYTES):
                if self.cut_after and not is_look and passed + len(data) > self.cut_after:
                    client.sendall(data[: self.cut_after - passed])
                    self.cut_after, self.num_cuts = 0, self.num_cuts + 1
                    self.on_cut()
                    return
                if self.stall_after and passed + len(data) > self.stall_after:
                    client.sendall(data[: self.stall_after - passed])
                    self._is_over.wait()
                    return
                passed += len(data)
                client.sendall(data)
