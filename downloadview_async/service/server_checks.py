"""Checks the address, the socket and the certificate in the settings before the server starts."""

import contextlib
import errno
import os
import re
import socket
import ssl
import stat
from collections.abc import Iterator

from downloadview_async.service.settings import Settings, Unavailable

_LONGEST_SOCKET_PATH = 107  # bytes; Linux allows 108 with the final NUL
_NO_SUCH_ADDRESS = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)


def check_server(settings: Settings) -> None:
    """Check that the service can listen, and has its certificate.

    Raises `ConfigurationError` for mistakes that uvicorn would report with a traceback, and `Unavailable` for what may
    be different later.
    """
    check_certificate(settings)  # first: a taken port may be free later, but a wrong certificate stays wrong
    server = settings.server
    if server.uds is not None:
        _check_unix_socket(settings, server.uds)
    elif server.fd is None:
        _check_address(settings)
    if server.fd is not None:
        try:
            problem = None if stat.S_ISSOCK(os.fstat(server.fd).st_mode) else "not a socket"
        except OSError as exc:
            problem = str(exc.strerror)
        if problem is not None:
            raise settings.error(
                "server.fd",
                f"{server.fd} is not an open socket ({problem}): give the descriptor of one that this process inherits",
            )


def _check_unix_socket(settings: Settings, path: str) -> None:
    """Raise `ConfigurationError` if a Unix socket cannot be created, or is another process's without `reuse_port`."""
    directory = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(directory):
        raise settings.error("server.uds", f"the directory of {path!r} is missing: create it")
    if len(os.fsencode(path)) > _LONGEST_SOCKET_PATH:
        raise settings.error("server.uds", f"{path!r} is longer than {_LONGEST_SOCKET_PATH} bytes: give a shorter path")
    if not os.path.lexists(path):
        _try_to_bind(settings, path)
        return
    if not stat.S_ISSOCK(os.lstat(path).st_mode):
        raise settings.error("server.uds", f"{path!r} exists and is not a socket: give another path")
    if settings.server.reuse_port:
        return
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        if probe.connect_ex(path) != errno.ECONNREFUSED:
            problem = f"another process listens on {path!r}: stop it, or set reuse_port to take its place"
            raise Unavailable(str(settings.error("server.uds", problem)))


def _try_to_bind(settings: Settings, path: str) -> None:
    try:
        with socket.socket(socket.AF_UNIX) as probe:
            probe.bind(path)
        os.unlink(path)
    except OSError as exc:
        problem = (
            f"the socket {path!r} cannot be created ({exc.strerror}): give a path where this user may create files"
        )
        raise settings.error("server.uds", problem) from exc


def _check_address(settings: Settings) -> None:
    """Raise `ConfigurationError` if the service cannot listen on the address; `Unavailable` if that may change."""
    server = settings.server
    try:
        addresses = socket.getaddrinfo(
            server.host or None, server.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except (OSError, ValueError) as exc:  # ValueError: not a host name, such as 300 characters
        reason = exc.strerror if isinstance(exc, OSError) else str(exc)
        instead = "give an address of this machine, such as 127.0.0.1"
        if "/" in server.host or re.search(r":[0-9]+\Z", server.host):
            instead = "give the address alone, such as 127.0.0.1, and the port as server.port"
        problem = f"{server.host!r} has no address ({reason}): {instead}"
        error = settings.error("server.host", problem)
        raise (Unavailable(str(error)) if isinstance(exc, OSError) else error) from exc
    problems: list[OSError] = []
    for family, kind, protocol, _, address in addresses:
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, server.reuse_port)
                if family == socket.AF_INET6:
                    probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                probe.bind(address)
        except OSError as exc:
            problems.append(exc)
    # a name may also have an address of a family, such as IPv6, that this machine does not support
    failed = [exc for exc in problems if exc.errno not in _NO_SUCH_ADDRESS] or problems[len(addresses) - 1 :]
    if not failed:
        return
    reason = os.strerror(failed[0].errno or 0).lower()
    key = "server.host" if failed[0].errno in _NO_SUCH_ADDRESS else "server.port"
    remedy = "give another, or stop the process that uses it"
    if key == "server.host":
        remedy = "give an address of this machine, such as 127.0.0.1, or 0.0.0.0 for all"
    elif failed[0].errno == errno.EACCES:
        remedy = "this user may not use so low a port: give a higher one, such as 8000"
    error = settings.error(key, f"cannot listen on {server.host}:{server.port} ({reason}): {remedy}")
    if failed[0].errno in (errno.EADDRINUSE, *_NO_SUCH_ADDRESS):
        raise Unavailable(str(error)) from failed[0]
    raise error from failed[0]


def check_certificate(settings: Settings) -> None:
    """Raise `ConfigurationError` if there is a certificate or a key, and they cannot be loaded."""
    server = settings.server
    if not server.ssl_certfile and not server.ssl_keyfile:
        return
    if not server.ssl_certfile:
        raise settings.error("server.ssl_keyfile", "a key without a certificate: give ssl_certfile too")
    for key, path in (("ssl_certfile", server.ssl_certfile), ("ssl_keyfile", server.ssl_keyfile)):
        try:
            if path:
                open(path, "rb").close()
        except OSError as exc:  # load_cert_chain does not say which file it is
            raise settings.error(
                f"server.{key}", f"{path!r} cannot be read ({exc.strerror}): give a file that this user may read"
            ) from exc
    password = server.ssl_keyfile_password or ""  # never None: OpenSSL would ask at the terminal
    with blaming_certificate(settings):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(server.ssl_certfile, server.ssl_keyfile or None, password)


@contextlib.contextmanager
def blaming_certificate(settings: Settings) -> Iterator[None]:
    """Raise `ConfigurationError` for the certificate if loading it fails."""
    try:
        yield
    except (OSError, ValueError) as exc:  # ValueError: a password that is too long
        if not settings.server.ssl_certfile:
            raise
        reason = getattr(exc, "reason", None) or str(exc)
        raise settings.error(
            "server.ssl_certfile",
            f"the certificate and its key cannot be loaded ({reason}): give a matching pair in PEM format, and "
            "ssl_keyfile_password if the key has a password",
        ) from exc
