"""The inner parts of uvicorn that DownloadProtocol builds on, and the versions that it is tested with.

uvicorn documents none of them. tests/asgi/test_uvicorn_internals.py compares this list with what the modules of this
package use, and tests on uvicorn itself that each name means what is said here.

    imported                          | meaning
    RequestResponseCycle              | a request and its answer; another class may be assigned to `__class__`
    STATUS_LINE                       | the status line of each status as bytes, by the number
    ServerState                       | what the connections of a server share

    of a protocol                     | meaning
    loop logger                       | the event loop, and the log of uvicorn's errors
    transport                         | the transport, from `connection_made` on
    flow                              | its `FlowControl`, made in `connection_made`; another object may be assigned
    flow.is_full                      | ours, not uvicorn's: reading does not resume while it is True
    flow.pause_reading                | pauses reading
    flow.resume_reading               | resumes reading; uvicorn calls it when an application waits for a message
    flow.write_paused                 | whether the transport has too much to send
    server_state                      | the `ServerState`
    server_state.default_headers      | the server's own fields; a new list each second
    server_state.total_requests       | counts answers
    parser                            | httptools' parser, which calls `on_` methods; None when the connection is lost
    parser.get_http_version           | "1.1", or what the client claims
    parser.get_method                 | the method as bytes
    parser.set_dangerous_leniencies   | lets versions pass that are checked here
    parser.should_keep_alive          | whether the client lets the connection stay open after this request
    parser.should_upgrade             | whether another protocol is to answer
    url headers scope                 | those of the head that is being read; `headers` is also the scope's list
    cycle                             | the newest cycle, assigned before its task is made; None before the first
    pipeline                          | cycles that wait; it stays empty here
    on_message_begin                  | the parser: a head begins
    on_headers_complete               | the parser: a head is complete; makes the cycle, and starts the application
    on_body on_message_complete       | the parser: a piece of a body, the end of a request
    send_400_response                 | called for input that the parser refuses
    on_response_complete              | called once at the end of an answer
    handle_websocket_upgrade          | called where another protocol takes over
    shutdown                          | called when the server shuts down
    timeout_keep_alive                | seconds
    timeout_keep_alive_task           | the idle timer, or None
    timeout_keep_alive_task.cancel    | ends it
    timeout_keep_alive_handler        | called when it rings; closes the transport
    _unset_keepalive_if_required      | called when input comes; ends the timer

    of a cycle                        | meaning
    cycle.__class__                   | may be changed as soon as the cycle is made
    cycle.scope cycle.send            | the scope, and the `send` that the application gets
    cycle.transport cycle.flow        | those of the protocol; another transport may be assigned
    cycle.access_log                  | whether each answer is logged
    cycle.default_headers             | those of the server state when the head was read
    cycle.keep_alive                  | whether the connection may stay open; if not, `send` closes the transport
    cycle.waiting_for_100_continue    | whether the client waits for a 100
    cycle.more_body                   | whether more of the request's body is to come
    cycle.message_event               | wakes `receive`
    cycle.disconnected                | whether the client has left: `send` drops everything
    cycle.response_started            | whether the head has been sent
    cycle.response_complete           | whether the whole answer has been sent
    cycle.chunked_encoding            | whether the body is chunked; None before the head
    cycle.expected_content_length     | bytes that Content-Length promises still
    cycle.on_response                 | `on_response_complete` of the protocol; replaced when the application returns
    on_response.__self__              | the protocol
"""

import logging
import re
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

__all__ = [
    "KNOWN_UVICORN",
    "STATUS_LINE",
    "HttpToolsProtocol",
    "RequestResponseCycle",
    "ServerState",
    "protocol_of",
    "uvicorn_warning",
]

KNOWN_UVICORN = ("0.38.0", "0.54.0")
"""The oldest and the newest version of uvicorn that this package is tested with."""


def uvicorn_warning(version: str) -> str | None:
    """Return the warning to log at start-up about a version of uvicorn, or None if it is between the tested ones."""
    oldest, newest, installed = ([int(n) for n in re.findall("[0-9]+", text)[:2]] for text in (*KNOWN_UVICORN, version))
    if oldest <= installed <= newest:
        return None
    return (
        f"uvicorn {version} is not known to DownloadProtocol, which uses undocumented parts of uvicorn and is tested "
        f"with {KNOWN_UVICORN[0]} to {KNOWN_UVICORN[1]}. If downloads fail, install one of these versions, or use "
        "uvicorn's own protocol: --http httptools"
    )


if (_warning := uvicorn_warning(uvicorn.__version__)) is not None:
    logging.getLogger("downloadview_async").warning(_warning)


def protocol_of(cycle: RequestResponseCycle) -> Any:
    """Return the protocol of a cycle. The cycle only refers to one of its methods, `on_response_complete`."""
    return cycle.on_response.__self__  # type: ignore[attr-defined]
