"""The ways of sending: real servers, each started as its users start it."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.servers import Server, free_port, serving

OLDEST = Path(sys.prefix) / "oldest"
"""Where `make test` installs the oldest uvicorn that is supported: requirements/oldest.txt."""

OTHER_SERVERS = Path(sys.prefix) / "servers"
"""Where `make test` installs anycorn, nonecorn and zttp: requirements/servers.txt."""

_ZERO_COPY = "downloadview_async.asgi.server:DownloadProtocol"


def needs_the_oldest_uvicorn() -> None:
    """Skip the test where `make` has not installed it."""
    if not (OLDEST / "uvicorn").is_dir():
        pytest.skip(f"the oldest uvicorn is not installed in {OLDEST}: make test does that")


def needs_other_servers() -> None:
    """Skip the test where `make` has not installed them."""
    if not (OTHER_SERVERS / "anycorn").is_dir():
        pytest.skip(f"anycorn and nonecorn are not installed in {OTHER_SERVERS}: make test does that")


@dataclass(frozen=True)
class Way:
    """A server, and how its answers leave."""

    server: str
    messages: str
    """The type of the message that a whole local file of some length is sent by."""
    options: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)

    @contextmanager
    def serving(self, app: str, *, log: Path, env: Mapping[str, str] | None = None) -> Iterator[Server]:
        """Serve `app`, the path of a function that makes an application, with `env`; `{port}` in it is the port."""
        if self.env.get("PYTHONPATH") == str(OLDEST):
            needs_the_oldest_uvicorn()
        port = free_port()
        command = [sys.executable, "-m", self.server, *self.options, *_arguments(self.server, app, port)]
        settings = {name: value.replace("{port}", str(port)) for name, value in (env or {}).items()}
        with serving(command, port, log=log, env={**settings, **self.env}) as server:
            yield server


def _arguments(server: str, app: str, port: int) -> list[str]:
    if server == "hypercorn":
        return ["--bind", f"127.0.0.1:{port}", f"{app}()"]
    own = ["--interface", "asgi"] if server == "granian" else ["--no-access-log"]
    return [*own, "--factory", "--port", str(port), app]


BODY, PATH = "http.response.body", "http.response.pathsend"
WAYS = {
    "zero-copy, asyncio": Way("uvicorn", PATH, ("--http", _ZERO_COPY, "--loop", "asyncio")),
    "zero-copy, uvloop": Way("uvicorn", PATH, ("--http", _ZERO_COPY, "--loop", "uvloop")),
    "chunks, h11 on asyncio": Way("uvicorn", BODY, ("--http", "h11", "--loop", "asyncio")),
    "chunks, httptools on uvloop": Way("uvicorn", BODY, ("--http", "httptools", "--loop", "uvloop")),
    "zero-copy, oldest uvicorn": Way("uvicorn", PATH, ("--http", _ZERO_COPY), {"PYTHONPATH": str(OLDEST)}),
    "path send, granian": Way("granian", PATH),
    "chunks, hypercorn": Way("hypercorn", BODY),
}
