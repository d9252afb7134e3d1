"""What the configurations of all proxies have in common: what they are for, and how a template is filled in."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

from downloadview_async.errors import ConfigurationError
from downloadview_async.offload.rules import Rule

_TEMPLATES = resources.files("downloadview_async.offload") / "configs"
PORTS = {"http": 80, "https": 443}
"""The port of a URL that has none, by its scheme."""

_SOCKET = re.compile("unix:(/[A-Za-z0-9_./@-]+)")
_UNWRITABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")  # no text, or a new line for somebody


@dataclass(frozen=True, slots=True)
class ProxySite:
    """What a proxy's configuration is for: the checked arguments of `proxy_config`.

    rules: the rules for directories. remotes: those for files of other servers, for a proxy that fetches them.
    host, port: where the proxy listens. idle, stall: seconds. max_body: bytes.
    service, prefix, relative_to, private, public: as `proxy_config` has them.
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

    @property
    def refused(self) -> str:
        """A regular expression of the paths that are not for clients; empty where there are none."""
        if not self.private:
            return ""
        names = "|".join(map(literal, self.public))
        return f"^{literal(self.prefix + self.private)}" + (f"(?!(?:{names})$)" if names else "")

    @property
    def address(self) -> tuple[str, int]:
        """The host and port of the service; raises `ConfigurationError` for anything else."""
        return host_and_port(self.service, "service")

    @property
    def socket(self) -> str | None:
        """The path of the service's Unix socket, or None."""
        match = _SOCKET.fullmatch(self.service)
        if match is None and self.service.startswith(("unix:", "/")):
            raise ConfigurationError(
                f"{self.service!r}: write a Unix socket as unix:/run/downloadview.sock, of letters, digits and _.@/-"
            )
        return None if match is None else match[1]

    @property
    def authority(self) -> str:
        """The service as HOST:PORT."""
        host, port = self.address
        return f"{host}:{port}"

    def seen(self, directory: str) -> tuple[bool, str]:
        """Return whether a directory is below `relative_to`, and its path with a slash at its end: from there, if so.

        The path is empty for `relative_to` itself.
        Raises `ConfigurationError` for one that cannot be written in a file of lines of text.
        """
        if _UNWRITABLE.search(directory):
            raise ConfigurationError(f"{directory!r}: no configuration can name this: use printable text")
        path = f"/{os.path.normpath(directory).strip('/')}".rstrip("/") + "/"  # normpath keeps two slashes at the start
        base = None if self.relative_to is None else f"{self.relative_to.rstrip('/')}/"
        if base is None or not path.startswith(base):
            return False, path
        return True, path[len(base) :]


@dataclass(frozen=True, slots=True)
class RemoteRule:
    """A rule for files of another server: `name` is what the configuration calls that."""

    name: str
    target: str
    scheme: str
    host: str
    port: int

    @property
    def authority(self) -> str:
        """The server as a URL has it, without a port that goes without saying."""
        return self.host if self.port == PORTS[self.scheme] else f"{self.host}:{self.port}"


def template(file: str, /, **values: str) -> str:
    """Return a file of `configs/`, filled in."""
    return filled((_TEMPLATES / file).read_text(encoding="utf-8"), **values)


def filled(text: str, /, **values: str) -> str:
    """Return a text with each <<name>> replaced. Proxies give other meanings to `$name` and `{name}`."""
    return re.sub("<<([a-z_]+)>>", lambda match: values[match[1]], text)


def literal(text: str) -> str:
    """Return a path of plain characters as a regular expression."""
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


def host_and_port(address: str, name: str) -> tuple[str, int]:
    """Return an IPv4 address, name or bracketed IPv6 address, and a port. Raises `ConfigurationError` for others."""
    match = re.fullmatch("([A-Za-z0-9._-]+|\\[[0-9A-Fa-f:.]+\\]):([0-9]{1,5})", address)
    if match is None or not 0 < int(match[2]) < 65_536:
        raise ConfigurationError(f"{name}: {address!r} is no address: write it as 127.0.0.1:8080 or [::1]:8080")
    return match[1], int(match[2])
