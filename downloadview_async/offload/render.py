"""Shared by the configurations of all proxies: the values (`ProxySite`), and the functions that fill in templates."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources

from downloadview_async.errors import ConfigurationError
from downloadview_async.offload.rules import Rule

_TEMPLATES = resources.files("downloadview_async.offload") / "configs"
OF_ERRORS = (
    "Vary",
    "Access-Control-Allow-Origin",
    "Access-Control-Allow-Credentials",
    "Access-Control-Expose-Headers",
)
"""Headers without which a script of another site cannot read the status of an error."""

PORTS = {"http": 80, "https": 443}
"""The default port of each URL scheme."""

_SOCKET = re.compile("unix:(/[A-Za-z0-9_./@-]+)")
_UNWRITABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")  # not text, or a line break for some parser


@dataclass(frozen=True, slots=True)
class ProxySite:
    """The values of a proxy's configuration: the checked arguments of `proxy_config`.

    rules: the rules for directories. remotes: the rules for files of other servers, if the proxy fetches them.
    host, port: where the proxy listens. idle, stall: seconds. max_body: bytes.
    service: the address of the service. further: those of its other replicas. bound, probe: as in `balancer_config`.
    prefix, relative_to, private, public, headers, links, log: as in `proxy_config`.
    """

    rules: Sequence[Rule]
    remotes: "Sequence[RemoteRule]"
    service: str
    host: str
    port: int
    prefix: str
    relative_to: str | None
    idle: int
    stall: int
    max_body: int
    private: str
    public: Sequence[str]
    headers: Sequence[str]
    links: "Sequence[LinkLocation]" = ()
    log: str = ""
    further: Sequence[str] = ()
    bound: int = 0
    probe: str = "/"

    @property
    def services(self) -> Sequence[str]:
        """The addresses of all replicas of the service."""
        return (self.service, *self.further)

    @property
    def refused(self) -> str:
        """A regular expression for the paths that are not for clients, empty if there are none."""
        if not self.private:
            return ""
        names = "|".join(map(literal, self.public))
        return f"^{literal(self.prefix + self.private)}" + (f"(?!(?:{names})$)" if names else "")

    @property
    def address(self) -> tuple[str, int]:
        """The host and port of the service. Raises `ConfigurationError` if it has another form."""
        return host_and_port(self.service, "service")

    @property
    def socket(self) -> str | None:
        """The path of the service's Unix socket, or None."""
        return socket_of(self.service)

    @property
    def authority(self) -> str:
        """The service as HOST:PORT."""
        host, port = self.address
        return f"{host}:{port}"

    def seen(self, directory: str) -> tuple[bool, str]:
        """Return whether a directory is below `relative_to`, and its path, which ends with a slash.

        The path is relative if the directory is below `relative_to`, and empty for `relative_to` itself. Raises
        `ConfigurationError` for a path that no line of text can have.
        """
        if _UNWRITABLE.search(directory):
            raise ConfigurationError(f"no configuration can name the directory {directory!r}: use printable characters")
        path = f"/{os.path.normpath(directory).strip('/')}".rstrip("/") + "/"  # normpath keeps a leading double slash
        base = None if self.relative_to is None else f"{self.relative_to.rstrip('/')}/"
        if base is None or not path.startswith(base):
            return False, path
        return True, path[len(base) :]


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkLocation:
    """A path below which a proxy verifies links of the format `secure_link`, and sends the files itself.

    prefix: the path as clients send it, not percent-encoded, such as `/downloads/files/`. directory: where the files
    are, an absolute path. attachment: whether clients save the files, or show them inline. headers: further headers of
    the answers. hide: patterns of names that are hidden, as in `Download`. follows_symlinks: whether files may be
    symbolic links, or below one.
    """

    prefix: str
    directory: str
    attachment: bool = True
    headers: Mapping[str, str] = field(default_factory=dict)
    hide: Sequence[str] = ()
    follows_symlinks: bool = False


@dataclass(frozen=True, slots=True)
class RemoteRule:
    """A rule for files of another server. name: the name of that server in the configuration."""

    name: str
    target: str
    scheme: str
    host: str
    port: int

    @property
    def authority(self) -> str:
        """The server as in a URL, without the default port."""
        return self.host if self.port == PORTS[self.scheme] else f"{self.host}:{self.port}"


def template(file: str, /, **values: str) -> str:
    """Return a file of `configs/` with its values filled in."""
    return filled((_TEMPLATES / file).read_text(encoding="utf-8"), **values)


def filled(text: str, /, **values: str) -> str:
    """Return a text with each <<name>> replaced. `$name` and `{name}` mean something to proxies."""
    return re.sub("<<([a-z_]+)>>", lambda match: values[match[1]], text)


def log_line(
    *,
    request_id: str,
    method: str,
    status: str,
    sent: str,
    content_range: str,
    requested: str,
    connection: str = "",
    uuid: str = "",
) -> str:
    """Return a line of the log that `accounts/proxy_log.py` reads. Each value is the name that the proxy has for it.

    request_id: that of the answer. uuid: the one that the proxy itself has given to the request.
    All proxies have the same line. They escape the values in ways that differ from JSON at most for control characters.
    """
    return (
        f'{{"request_id":"{request_id}","method":"{method}","status":{status},"bytes":{sent},'
        f'"content_range":"{content_range}","range":"{requested}"'
        + (f',"connection":"{connection}"' if connection else "")
        + (f',"uuid":"{uuid}"}}' if uuid else "}")
    )


def literal(text: str) -> str:
    """Return a regular expression for a path, whose only special character may be a dot."""
    return text.replace(".", "\\.")


def escaped(text: str) -> str:
    """Return a text with backslashes before its backslashes and quotation marks."""
    return text.replace("\\", "\\\\").replace('"', '\\"')


def quoted(text: str) -> str:
    """Return a text between quotation marks, as most proxies read it."""
    return f'"{escaped(text)}"'


def directories(site: ProxySite) -> list[str]:
    """Return the directories as the proxy sees them, each once."""
    return list(dict.fromkeys(rule.target for rule in site.rules))


def socket_of(service: str) -> str | None:
    """Return the path of the Unix socket at which a service listens, or None. Raises `ConfigurationError`."""
    match = _SOCKET.fullmatch(service)
    if match is None and service.startswith(("unix:", "/")):
        raise ConfigurationError(
            f"{service!r}: write a Unix socket as unix:/run/downloadview.sock, of letters, digits and _.@/-"
        )
    return None if match is None else match[1]


def host_and_port(address: str, name: str) -> tuple[str, int]:
    """Return the host (IPv4 address, name or bracketed IPv6 address) and the port. Raises `ConfigurationError`."""
    match = re.fullmatch("([A-Za-z0-9._-]+|\\[[0-9A-Fa-f:.]+\\]):([0-9]{1,5})", address)
    if match is None or not 0 < int(match[2]) < 65_536:
        raise ConfigurationError(f"{name}: {address!r} is not an address: write it as 127.0.0.1:8080 or [::1]:8080")
    return match[1], int(match[2])
