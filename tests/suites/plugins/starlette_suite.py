"""Has Starlette's own tests talk HTTP, over a socket, to a server with our protocol, which runs their applications."""

import asyncio
import contextlib
import socket
import threading
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
import starlette.testclient
import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from downloadview_async.asgi.server import DownloadProtocol

_PATIENCE = 5.0  # seconds; only an application that hangs takes as long


class SocketClient(httpx2.Client):
    """What Starlette's TestClient promises its users, with a real server and real connections."""

    __test__ = False
    running: "list[SocketClient]" = []

    def __init__(
        self,
        app: ASGIApp,
        base_url: str = "http://testserver",
        raise_server_exceptions: bool = True,
        root_path: str = "",
        backend: str = "asyncio",
        backend_options: Any = None,
        cookies: Any = None,
        headers: dict[str, str] | None = None,
        follow_redirects: bool = True,
    ) -> None:
        assert backend == "asyncio"
        self._app = app
        self._raises = raise_server_exceptions
        self._ended = threading.Condition()
        self._ends: list[Exception | None] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._server = uvicorn.Server(
            uvicorn.Config(
                self._run,
                interface="asgi3",
                http=DownloadProtocol,
                root_path=root_path,
                lifespan="off",
                log_config=None,
                access_log=False,
            )
        )
        serving = self._server.serve(sockets=[self._listener])
        threading.Thread(target=asyncio.run, args=(serving,), daemon=True).start()
        super().__init__(
            base_url=base_url,
            cookies=cookies,
            headers={"user-agent": "testclient", **(headers or {})},
            follow_redirects=follow_redirects,
            transport=_To(self._listener.getsockname()[1]),
            timeout=_PATIENCE,
        )
        self.running.append(self)

    def send(self, request: httpx2.Request, **options: Any) -> httpx2.Response:
        """Send a request, and return when the application has ended, as TestClient does. Raises what it raised."""
        self._ends.clear()
        response: httpx2.Response | None = None
        with contextlib.suppress(httpx2.RemoteProtocolError):  # an application has raised in the midst of its answer
            response = super().send(request, **options)
        with self._ended:
            count = 1 if response is None else 1 + len(response.history)
            assert self._ended.wait_for(lambda: len(self._ends) == count, _PATIENCE)
        error = self._ends[-1]
        if error is not None and self._raises:
            raise error
        assert response is not None
        return response

    def stop(self) -> None:
        """Have the server end by itself."""
        self.close()
        self._server.should_exit = True

    async def _run(self, scope: Scope, receive: Receive, send: Send) -> None:
        error: Exception | None = None
        try:
            await self._app(scope, receive, send)
        except Exception as exc:
            error = exc
            raise
        finally:
            with self._ended:
                self._ends.append(error)
                self._ended.notify_all()


class _To(httpx2.HTTPTransport):
    """Connects to the server whatever host a URL names."""

    def __init__(self, port: int) -> None:
        super().__init__()
        self._port = port

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        where = request.url.copy_with(scheme="http", host="127.0.0.1", port=self._port)
        return super().handle_request(
            httpx2.Request(
                request.method, where, headers=request.headers, stream=request.stream, extensions=request.extensions
            )
        )


starlette.testclient.TestClient = SocketClient  # type: ignore[assignment, misc]


@pytest.fixture(autouse=True)
def stopped_clients() -> Iterator[None]:
    """End the servers of a test with it."""
    yield
    while SocketClient.running:
        SocketClient.running.pop().stop()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave out the tests on trio, on which uvicorn does not run."""
    items[:] = [item for item in items if not item.name.partition("[")[2].startswith("trio")]
