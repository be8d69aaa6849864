"""WebServer: aiohttp serving a folder from a thread, and routes that misbehave."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from threading import Event, Thread
from types import TracebackType
from typing import Any

from aiohttp import web


class WebServer:
    """`/files/NAME` is a file with ETag and ranges; every request is in `requests`.

    `/redirect/NAME` goes where `redirects` says, `/status/N` answers N, `/chunked/NAME` does not
    say its size, `/plain/NAME` has neither ranges nor tags, `/trickle/NAME` sends byte by byte.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self.requests: list[web.BaseRequest] = []
        self.redirects: dict[str, str] = {}
        self.url = ""
        self._loop = asyncio.new_event_loop()
        self._ready = Event()
        self._thread = Thread(target=self._run, daemon=True)

    @property
    def host(self) -> str:
        """As --adapter-http-hosts would have it."""
        return self.url.removeprefix("http://")

    def __enter__(self) -> WebServer:
        self._thread.start()
        assert self._ready.wait(20)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    def paths(self) -> list[str]:
        """What was asked for, in order."""
        return [request.path for request in self.requests]

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._serve())
        finally:
            self._loop.close()

    async def _serve(self) -> None:
        self._stop = asyncio.Event()
        app = web.Application(middlewares=[self._note])
        app.router.add_get("/files/{name}", self._file)
        app.router.add_get("/redirect/{name}", self._redirect)
        app.router.add_get("/status/{number}", self._status)
        app.router.add_get("/chunked/{name}", self._chunked)
        app.router.add_get("/plain/{name}", self._plain)
        app.router.add_get("/trickle/{name}", self._trickle)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        self._ready.set()
        await self._stop.wait()
        await runner.cleanup()

    @web.middleware
    async def _note(self, request: web.Request, handler: Any) -> web.StreamResponse:
        self.requests.append(request)
        answer: Coroutine[Any, Any, web.StreamResponse] = handler(request)
        return await answer

    def _path(self, request: web.Request) -> Path:
        return self._root / request.match_info["name"]

    async def _file(self, request: web.Request) -> web.StreamResponse:
        return web.FileResponse(self._path(request))

    async def _redirect(self, request: web.Request) -> web.StreamResponse:
        location = self.redirects[request.match_info["name"]]
        return web.Response(status=302, headers={"Location": location})

    async def _status(self, request: web.Request) -> web.StreamResponse:
        return web.Response(status=int(request.match_info["number"]), text="no")

    async def _chunked(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(self._path(request).read_bytes())
        return response

    async def _plain(self, request: web.Request) -> web.StreamResponse:
        return web.Response(body=self._path(request).read_bytes())

    async def _trickle(self, request: web.Request) -> web.StreamResponse:
        content = self._path(request).read_bytes()
        response = web.StreamResponse(headers={"Content-Length": str(len(content))})
        await response.prepare(request)
        for byte in content:
            await response.write(bytes([byte]))
            await asyncio.sleep(0.02)
        return response
