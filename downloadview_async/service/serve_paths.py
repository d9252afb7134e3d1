"""`downloadview serve PATH...`: the settings for files and directories without a file, and the URLs that work."""

import atexit
import json
import os
import secrets
import socket
import tempfile
from collections.abc import Iterator, Sequence
from urllib.parse import quote

from downloadview_async import ConfigurationError
from downloadview_async.service.access import sign_path
from downloadview_async.service.settings import Settings
from downloadview_async.service.values import seconds_of

_PREFIX = "/files/"
_WILDCARDS = {"0.0.0.0": (socket.AF_INET, "192.0.2.1"), "::": (socket.AF_INET6, "2001:db8::1")}  # noqa: S104
"""The addresses that stand for all of this machine, with an address that is nowhere, for finding the one in use."""


def variables_of(
    paths: Sequence[str], *, hidden: bool, title: str | None, users: Sequence[str], share: str | None
) -> dict[str, str]:
    """Return the variables with the settings, where worker processes also read them.

    users: each `NAME:PASSWORD`. share: how long the links are valid that alone lead to the files.

    Raises `ConfigurationError`.
    """
    directory = paths[0] if len(paths) == 1 and os.path.isdir(paths[0]) else None
    names = [os.path.basename(os.path.abspath(path)) for path in paths]
    if directory is not None:
        source: dict[str, object] = {"type": "path", "root": os.path.abspath(directory), "names": "any"}
    else:
        source = {"type": "chosen", "paths": [os.path.abspath(path) for path in paths]}
        if not hidden and (dotted := [name for name in names if name.startswith(".")]):
            raise ConfigurationError(f"{dotted[0]!r} begins with a dot: add --hidden to serve it")
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigurationError(f"two of the paths have the name {repeated[0]!r}: rename one, or leave it out")
    if title is not None and not title.isprintable():
        raise ConfigurationError(f"--title is {title!r}: give a text without control characters")
    title = title or (names[0] if directory is not None and names[0] else "Files")
    route = {
        "path": f"{_PREFIX}{{path:path}}",
        "source": "files",
        "name": title,
        "hide": [] if hidden else [".*"],
        "list": True,
        "archive": True,
    }
    variables: dict[str, object] = {"SOURCES": {"files": source}, "PAGES": {"title": title}}
    access = []
    if share is not None:
        if not seconds_of(share) or share[-1].isdigit():
            raise ConfigurationError(f"--share is {share!r}: give a time such as 90s, 10m, 2h or 7d")
        access.append("signed")
        variables["LINKS"] = {"keys": f"share {secrets.token_urlsafe(32)}", "max_age": share}
    if users:
        access.append("user:*")
        variables["USERS"] = {"file": _password_file(users)}
    if access:
        route["access"] = access
    return {
        **{f"DOWNLOADVIEW_{name}": json.dumps(value) for name, value in variables.items()},
        "DOWNLOADVIEW_ROUTES": json.dumps([route]),
    }


def _password_file(users: Sequence[str]) -> str:
    """Return the path of a new file with the hashes of the passwords, which is removed when this process ends."""
    try:
        import bcrypt
    except ModuleNotFoundError as exc:
        raise ConfigurationError("--user needs bcrypt: install downloadview_async with its extra `auth`") from exc
    lines: dict[str, str] = {}
    for user in users:
        name, _, password = user.partition(":")
        if not name or not password or len(os.fsencode(password)) > 72:
            raise ConfigurationError("--user takes NAME:PASSWORD, with a password of at most 72 bytes")
        if not name.isprintable() or name != name.strip() or name.startswith("#"):
            raise ConfigurationError(
                f"--user has the name {name!r}: give one of printable characters that begins neither with # nor with a "
                "space, and does not end with a space"
            )
        if name in lines:
            raise ConfigurationError(f"--user has the name {name!r} twice: leave one out")
        lines[name] = f"{name}:{bcrypt.hashpw(os.fsencode(password), bcrypt.gensalt(10)).decode()}\n"
    descriptor, path = tempfile.mkstemp(prefix="downloadview-")
    atexit.register(os.unlink, path)
    with open(descriptor, "w", encoding="utf-8") as file:
        file.writelines(lines.values())
    return path


def free_port(host: str) -> int:
    """Return a port on which nobody listens, so that its URL is known before the server starts.

    It is 0 for an address that is not of this machine, which is refused later.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.bind(address)
            return int(probe.getsockname()[1])
    except (OSError, ValueError):  # ValueError: not a host name, such as 300 characters
        return 0


def urls_of(settings: Settings, paths: Sequence[str], *, share: bool) -> list[str]:
    """Return the URLs at which the files can be reached: those of the loopback before those of the network.

    They do not have the `root_path`, which only a proxy in front knows and removes.

    share: whether they are signed links, each to a file, or to a directory and all that is below it. Nothing is
    returned for a Unix socket or a descriptor.
    """
    server = settings.server
    if server.uds is not None or server.fd is not None:
        return []
    scheme = "https" if server.ssl_certfile else "http"
    bases = [f"{scheme}://{host}:{server.port}" for host in _hosts(server.host)]
    is_listed = os.path.isdir(paths[0]) if len(paths) == 1 else not share
    places = [f"{_PREFIX}{os.path.basename(os.path.abspath(path))}{'/' * os.path.isdir(path)}" for path in paths]
    if is_listed:
        places = [_PREFIX]
    if share:
        links = [
            sign_path(settings, place, below=place.endswith("/")).removeprefix(server.root_path) for place in places
        ]
    else:
        links = [quote(place) for place in places]
    return [base + link for base in bases for link in links]


def _hosts(host: str) -> Iterator[str]:
    if host not in _WILDCARDS:
        yield f"[{host}]" if ":" in host else host
        return
    family, elsewhere = _WILDCARDS[host]
    yield "127.0.0.1" if family == socket.AF_INET else "[::1]"
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((elsewhere, 9))  # which sends nothing, but chooses the address
            address = probe.getsockname()[0]
    except OSError:
        return  # this machine has no network
    if address not in ("127.0.0.1", "::1"):
        yield f"[{address}]" if ":" in address else address
