"""`Traces`: a span of OpenTelemetry for each request, which ends with its outcome."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from downloadview_async.accounts.facts import request_id_of
from downloadview_async.accounts.outcome import Outcome
from downloadview_async.errors import ConfigurationError
from downloadview_async.sources.tracing import Note, Value, follow

_NAME = "downloadview_async"
_METHODS = frozenset({"CONNECT", "DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "TRACE"})
_BY_CLIENT = ("client-left", "stalled")


class Traces:
    """Makes a span of OpenTelemetry for each request: `Accounts(traces.around(app), observers=[traces.observe])`.

    A span has the semantic conventions for HTTP servers, the bytes of the body that were sent, and the result, the kind
    and the source of the outcome. Below it are spans for requests to other servers and to object stores, and for
    questions to the store of links. No span has a query, or a header of the request but the user agent.

    provider: a `TracerProvider`, by default the global one. There is one `Traces` in a process.

    Raises `ConfigurationError` if the API of OpenTelemetry is not installed.
    """

    def __init__(self, provider: Any = None) -> None:
        try:
            from opentelemetry import context, propagate, trace
        except ModuleNotFoundError as exc:
            raise ConfigurationError(
                "traces need opentelemetry-api: install downloadview_async with its extra `otel`"
            ) from exc
        self._context, self._propagate, self._trace = context, propagate, trace
        self._tracer = trace.get_tracer(_NAME, tracer_provider=provider)
        self._spans: dict[str, list[tuple[object, Any]]] = {}  # with the headers of the request, which tell it apart
        follow(self._below)

    def around(self, app: ASGIApp) -> ASGIApp:
        """Return an application that begins a span for each request. `Accounts` has to be around it."""

        async def traced(scope: Scope, receive: Receive, send: Send) -> None:
            request_id = request_id_of(scope) if scope["type"] == "http" else None
            begun = () if request_id is None else self._spans.get(request_id, ())
            if request_id is None or any(headers is scope["headers"] for headers, _ in begun):
                await app(scope, receive, send)
                return
            fields = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
            parent = self._propagate.extract(fields)
            span = self._tracer.start_span(
                _name_of(scope["method"]),
                context=parent,
                kind=self._trace.SpanKind.SERVER,
                attributes=_attributes_of(scope, fields),
            )
            self._spans.setdefault(request_id, []).append((scope["headers"], span))
            token = self._context.attach(self._trace.set_span_in_context(span, parent))
            try:
                await app(scope, receive, send)
            finally:
                self._context.detach(token)

        return traced

    def observe(self, outcome: Outcome) -> None:
        """End the span of a request. This is an observer of `Accounts`."""
        span = self._pop(outcome)
        if span is None:
            return
        known = {
            "http.response.status_code": outcome.status or None,
            "http.response.body.size": outcome.sent,
            "http.route": outcome.route,
            "client.address": outcome.client,
            "downloadview.request_id": outcome.request_id,
            "downloadview.result": outcome.result,
            "downloadview.kind": outcome.kind,
            "downloadview.source": outcome.source,
        }
        span.set_attributes({name: value for name, value in known.items() if value is not None})
        if outcome.route is not None:
            span.update_name(f"{_name_of(outcome.method)} {outcome.route}")
        error = outcome.reason or (str(outcome.status) if outcome.status >= 500 else None)
        if error is not None:
            span.set_attribute("error.type", error)
            if error not in _BY_CLIENT:
                span.set_status(self._trace.StatusCode.ERROR)
        span.end()

    def _pop(self, outcome: Outcome) -> Any:
        """Return the span of a request, and forget it; None if it has none. A proxy may send the same id twice."""
        begun = self._spans.pop(outcome.request_id, [])
        if not begun:
            return None
        at = next((at for at, (headers, _) in enumerate(begun) if headers is outcome.headers), -1)
        _, span = begun.pop(at)
        if begun:
            self._spans[outcome.request_id] = begun
        return span

    def _below(self, name: str, attributes: Mapping[str, Value]) -> AbstractContextManager[Note]:
        return _client_span(self._tracer, self._trace, name, attributes)


@contextmanager
def _client_span(tracer: Any, trace: Any, name: str, attributes: Mapping[str, Value]) -> Iterator[Note]:
    # exceptions are not recorded: their texts may have a query
    kind = trace.SpanKind.CLIENT
    with tracer.start_as_current_span(
        name, kind=kind, attributes=attributes, record_exception=False, set_status_on_exception=False
    ) as span:

        def note(attribute: str, value: Value) -> None:
            span.set_attribute(attribute, value)
            if attribute == "http.response.status_code" and isinstance(value, int) and value >= 400:
                span.set_attribute("error.type", str(value))
                span.set_status(trace.StatusCode.ERROR)

        try:
            yield note
        except BaseException as exc:
            span.set_attribute("error.type", type(exc).__name__)
            if isinstance(exc, Exception):
                span.set_status(trace.StatusCode.ERROR)
            raise


def _method(method: str) -> str:
    return method if method in _METHODS else "_OTHER"


def _name_of(method: str) -> str:
    """Return what the conventions put into the name of a span for a method."""
    return method if method in _METHODS else "HTTP"


def _attributes_of(scope: Scope, fields: Mapping[str, str]) -> dict[str, Any]:
    attributes = {
        "http.request.method": _method(scope["method"]),
        "url.path": scope["path"],
        "url.scheme": scope.get("scheme", "http"),
        "network.protocol.version": scope.get("http_version", "1.1"),
    }
    if "user-agent" in fields:
        attributes["user_agent.original"] = fields["user-agent"]
    if server := scope.get("server"):
        attributes["server.address"] = server[0]
        if server[1] is not None:
            attributes["server.port"] = server[1]
    return attributes
