"""`Traces`: the spans of requests, and those below them, by the SDK of OpenTelemetry."""

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from downloadview_async import (
    Accounts,
    Download,
    MemoryGrantStore,
    PathSource,
    RemoteSource,
    SignedLinks,
    StorageSource,
    Traces,
    URLSigner,
)
from downloadview_async.sources import tracing
from downloadview_async.testing import call
from tests.live import live
from tests.s3 import S3
from tests.servers import free_port

PARENT = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}


class Traced:
    """An application with `Traces`, and the spans that have ended."""

    def __init__(self) -> None:
        self.exporter = InMemorySpanExporter()
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.traces = Traces(provider)

    def app(self, *routes: Route) -> ASGIApp:
        return Accounts(self.traces.around(Starlette(routes=routes)), observers=[self.traces.observe])

    @property
    def spans(self) -> tuple[ReadableSpan, ...]:
        ended: tuple[ReadableSpan, ...] = self.exporter.get_finished_spans()
        self.exporter.clear()
        return ended


@pytest.fixture
def traced() -> Iterator[Traced]:
    yield Traced()
    tracing._tracers.clear()


def attributes_of(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


@pytest.mark.asyncio
async def test_a_span_for_each_request(traced: Traced, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"0123456789")
    app = traced.app(Route("/files/{path:path}", Download(PathSource(tmp_path), source_name="files")))
    secret = {"authorization": "Basic secret", "cookie": "a=secret", "user-agent": "curl/8"}
    await call(app, "/files/a.txt", query="token=secret", headers={**PARENT, **secret, "range": "bytes=0-3"})
    await call(app, "/files/none")
    first, missing = traced.spans
    attributes = attributes_of(first)
    expected = {
        "http.request.method": "GET",
        "http.route": "/files/{path:path}",
        "http.response.status_code": 206,
        "http.response.body.size": 4,
        "url.path": "/files/a.txt",
        "user_agent.original": "curl/8",
        "downloadview.result": "completed",
        "downloadview.source": "files",
    }
    assert expected.items() <= attributes.items()
    assert "secret" not in str(attributes)
    assert (first.name, first.kind) == ("GET /files/{path:path}", SpanKind.SERVER)
    assert first.parent is not None
    assert f"{first.parent.span_id:016x}" == "b7ad6b7169203331"
    assert first.status.status_code is missing.status.status_code is StatusCode.UNSET
    assert attributes_of(missing)["http.response.status_code"] == 404
    assert missing.parent is None


@pytest.mark.asyncio
async def test_errors_and_clients_that_leave(traced: Traced, tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(bytes(1 << 20))

    async def fails(request: object) -> None:
        raise ValueError("secret")

    app = traced.app(Route("/large", fails), Route("/{path:path}", Download(PathSource(tmp_path))))
    await call(app, "/large", raise_errors=False)
    app = traced.app(Route("/{path:path}", Download(PathSource(tmp_path))))
    await call(app, "/large", leave_after_bytes=1000, raise_errors=False)
    failed, left = traced.spans
    assert attributes_of(failed)["error.type"] == "500"
    assert failed.status.status_code is StatusCode.ERROR
    assert attributes_of(left)["error.type"] == "client-left"
    assert left.status.status_code is StatusCode.UNSET
    assert "secret" not in f"{failed.to_json()}"


@pytest.mark.asyncio
async def test_requests_to_other_servers_and_the_store_are_below(traced: Traced, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"0123456789")
    async with live(Starlette(routes=[Route("/{path:path}", Download(PathSource(tmp_path)))])) as port:
        source = RemoteSource(f"http://127.0.0.1:{port}/", allow_hosts=["127.0.0.1"])
        signer = URLSigner({"k": "s" * 32}, store=MemoryGrantStore())
        app = traced.app(Route("/{path:path}", Download(source, access=SignedLinks(signer))))
        link = signer.sign("/a.txt", uses=1).partition("?")[2]
        assert (await call(app, "/a.txt", query=link)).body == b"0123456789"
        await source.aclose()
    each = traced.spans
    (request,) = (span for span in each if span.kind is SpanKind.SERVER)
    below = [span for span in each if span is not request]
    assert {span.name for span in below} == {"store of links", "GET"}
    assert {span.parent and span.parent.span_id for span in below} == {request.context and request.context.span_id}
    (upstream,) = (span for span in below if span.name == "GET")
    expected = {"server.address": "127.0.0.1", "server.port": port, "http.response.status_code": 200}
    assert expected.items() <= attributes_of(upstream).items()
    assert upstream.kind is SpanKind.CLIENT


@pytest.mark.asyncio
async def test_requests_with_the_same_id_have_a_span_each(traced: Traced, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"0123456789")
    has_begun, may_end = asyncio.Event(), asyncio.Event()

    async def slow(request: object) -> Response:
        has_begun.set()
        await may_end.wait()
        return Response(b"12345")

    routes = [Route("/slow", slow), Route("/{path:path}", Download(PathSource(tmp_path)))]
    app = Accounts(
        traced.traces.around(Starlette(routes=routes)), observers=[traced.traces.observe], trusted_proxies=["*"]
    )
    same = {"x-request-id": "the-same"}
    first = asyncio.create_task(call(app, "/slow", headers=same))
    await has_begun.wait()
    await call(app, "/a.txt", headers=same)
    may_end.set()
    await first
    assert [(span.name, attributes_of(span)["http.response.body.size"]) for span in traced.spans] == [
        ("GET /{path:path}", 10),
        ("GET /slow", 5),
    ]
    assert not traced.traces._spans


@pytest.mark.asyncio
async def test_an_unknown_method_is_not_in_the_name_of_a_span(traced: Traced, tmp_path: Path) -> None:
    await call(traced.app(Route("/{path:path}", Download(PathSource(tmp_path)))), "/a.txt", method="BREW")
    (span,) = traced.spans
    assert (span.name, attributes_of(span)["http.request.method"]) == ("HTTP /{path:path}", "_OTHER")


@pytest.mark.asyncio
async def test_a_request_that_another_server_refuses_is_an_error_below(traced: Traced, tmp_path: Path) -> None:
    async with live(Starlette(routes=[Route("/{path:path}", Download(PathSource(tmp_path)))])) as port:
        source = RemoteSource(f"http://127.0.0.1:{port}/", allow_hosts=["127.0.0.1"])
        assert (await call(traced.app(Route("/{path:path}", Download(source))), "/none")).status == 404
        await source.aclose()
    upstream, request = traced.spans
    assert (upstream.status.status_code, attributes_of(upstream)["error.type"]) == (StatusCode.ERROR, "404")
    assert request.status.status_code is StatusCode.UNSET


@pytest.mark.asyncio
async def test_requests_to_an_object_store_are_below(traced: Traced, s3: S3) -> None:
    s3.put("traced/a.txt", b"0123456789")
    storage = s3.storage("traced/")
    app = traced.app(Route("/{path:path}", Download(StorageSource(storage))))
    assert [(await call(app, path)).status for path in ("/a.txt", "/none")] == [200, 404]
    await storage.aclose()
    store, request, missing, _ = traced.spans
    assert (store.name, attributes_of(store)["downloadview.store"]) == ("object store", "s3")
    assert missing.name == store.name
    assert store.parent is not None
    assert request.context is not None
    assert store.parent.span_id == request.context.span_id


@pytest.mark.asyncio
async def test_an_error_of_another_server_is_on_its_span(traced: Traced) -> None:
    source = RemoteSource(f"http://127.0.0.1:{free_port()}/", allow_hosts=["127.0.0.1"])
    app = traced.app(Route("/{path:path}", Download(source)))
    assert (await call(app, "/a.txt", query="token=secret")).status == 502
    below, request = traced.spans
    assert below.status.status_code is request.status.status_code is StatusCode.ERROR
    assert "secret" not in str(below.to_json()) + str(request.to_json())
    await source.aclose()


@pytest.mark.asyncio
async def test_requests_at_once_have_their_own_spans(traced: Traced, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"0123456789")
    app = traced.app(Route("/{path:path}", Download(PathSource(tmp_path))))
    await asyncio.gather(*(call(app, "/a.txt", headers={"range": f"bytes=0-{end}"}) for end in range(9)))
    assert sorted(attributes_of(span)["http.response.body.size"] for span in traced.spans) == list(range(1, 10))
    assert not traced.traces._spans


def test_without_traces_a_span_is_nothing() -> None:
    assert tracing.span("a") is tracing.span("b", server__address="x")
    with tracing.span("a") as note:
        note("http.response.status_code", 404)


def test_opentelemetry_is_not_imported_without_traces() -> None:
    script = "import sys, downloadview_async; sys.exit('opentelemetry' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], timeout=60).returncode == 0
