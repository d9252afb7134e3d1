"""`proxy_config`: the configuration of a proxy for some rules, made from the templates in `configs/`."""

import itertools
import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Literal

from downloadview_async.errors import ConfigurationError
from downloadview_async.offload.backends import XAccelRedirect, XReproxyURL, XSendfile, by_http
from downloadview_async.offload.rules import Rule
from downloadview_async.sources.object_store import ObjectStorage

Proxy = Literal["nginx", "apache", "lighttpd", "caddy", "h2o"]

_TEMPLATES = resources.files("downloadview_async.offload") / "configs"
_PLAIN = re.compile("[A-Za-z0-9_./-]+")
_PREFIX = re.compile("(?:/[A-Za-z0-9_~-][A-Za-z0-9_.~-]*)*")
_SOCKET = re.compile("unix:(/[A-Za-z0-9_./@-]+)")
_PORTS = {"http": 80, "https": 443}
_UNWRITABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")  # no text, or a new line for somebody
_WHOLE = "/_whole/"  # where H2O's configuration asks itself
_PRIVATE = re.compile("(?:/[A-Za-z0-9_~-][A-Za-z0-9_.~-]*)+/")
_PUBLIC = re.compile("[A-Za-z0-9_.~-]+")


def proxy_config(
    proxy: Proxy,
    rules: Iterable[Rule],
    *,
    storages: Iterable[ObjectStorage] = (),
    service: str = "127.0.0.1:8000",
    listen: str = "127.0.0.1:8080",
    prefix: str = "",
    relative_to: str | None = None,
    idle_seconds: float = 5,
    stall_seconds: float = 60,
    max_body_bytes: int = 16_384,
    private: str = "",
    public: Iterable[str] = (),
) -> str:
    """Return a whole configuration with which a proxy sends the files of some rules, and passes the rest on.

    rules, storages: those of the backend for this proxy.
    service: where the proxy finds the application: HOST:PORT, or unix:/PATH of a socket.
    listen: the HOST:PORT that the proxy listens on. TLS is left to the reader: "TLS:" marks the places.
    prefix: the path that the application is served below, such as /downloads; the proxy takes it off. Anything else is
    refused.
    relative_to: an absolute directory. Directories below it are written as they are seen from there, and the proxy is
    started in it. None: all are absolute.
    idle_seconds: how long the application keeps an idle connection, at least 2; the proxy keeps it for a second less.
    stall_seconds: a client that takes nothing for so long is dropped; Caddy and H2O cannot do that.
    max_body_bytes: what a request's body may have.
    private: a path such as /-/, below which the application has pages that are not for clients: the proxy refuses them.
    public: the names below it that the proxy passes on all the same, such as livez.

    Raises `ConfigurationError` for rules that the backend would not take, two of which one's target is the other's or
    below it, and whatever the proxy's grammar cannot express.
    """
    if proxy not in _MAKERS:
        raise ConfigurationError(f"there is no configuration for {proxy!r}: use one of {', '.join(_MAKERS)}")
    if not _PREFIX.fullmatch(prefix):
        raise ConfigurationError(f"{prefix!r} is no prefix: write it as /downloads, of letters, digits, _, ~, . and -")
    if idle_seconds < 2:
        raise ConfigurationError(
            f"the application keeps a connection for {idle_seconds!r} seconds, too short for a proxy: give it 2 or more"
        )
    if stall_seconds <= 0 or max_body_bytes <= 0:
        raise ConfigurationError("stall_seconds and max_body_bytes are more than 0")
    host, port = _host_and_port(listen, "listen")
    public = tuple(public)
    if private and not (_PRIVATE.fullmatch(private) and all(map(_PUBLIC.fullmatch, public))):
        raise ConfigurationError(f"{private!r} with {public!r}: write a private path as /-/, and public ones as livez")
    rules, storages = tuple(rules), tuple(storages)
    match proxy:
        case "nginx" | "caddy":
            XAccelRedirect(rules, storages=storages)
        case "h2o":
            XReproxyURL(rules)
        case _:
            XSendfile(rules, encoding="raw" if proxy == "apache" else "percent")
    site = _Site(
        rules=tuple(rule for rule in rules if rule.source.startswith("/")),
        remotes=_remotes((rule for rule in rules if not rule.source.startswith("/")), storages),
        service=service,
        host=host,
        port=port,
        prefix=prefix,
        relative_to=None if relative_to is None else os.path.normpath(relative_to),
        idle=math.floor(idle_seconds) - 1,
        stall=math.ceil(stall_seconds),
        max_body=max_body_bytes,
        private=private,
        public=public,
    )
    for rule in rules:
        if private and rule.target.startswith(f"{prefix}{private}") and proxy in ("nginx", "h2o"):
            raise ConfigurationError(
                f"the target {rule.target!r} is below {prefix}{private}, which the proxy refuses: choose another, such "
                "as /_files/"
            )
    return _MAKERS[proxy](site)


@dataclass(frozen=True, slots=True)
class _Site:
    """What a configuration is for: `proxy_config`'s arguments, looked over. `rules` are those of directories."""

    rules: Sequence[Rule]
    remotes: "Sequence[_Remote]"
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
        names = "|".join(map(_literal, self.public))
        return f"^{_literal(self.prefix + self.private)}" + (f"(?!(?:{names})$)" if names else "")

    @property
    def address(self) -> tuple[str, int]:
        """The host and port of the service; raises `ConfigurationError` for anything else."""
        return _host_and_port(self.service, "service")

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
class _Remote:
    """A rule for files of another server: `name` is what the configuration calls that."""

    name: str
    target: str
    scheme: str
    host: str
    port: int

    @property
    def authority(self) -> str:
        """The server as a URL has it, without a port that goes without saying."""
        return self.host if self.port == _PORTS[self.scheme] else f"{self.host}:{self.port}"


def _remotes(rules: Iterable[Rule], storages: Iterable[ObjectStorage]) -> list[_Remote]:
    found = []
    for number, rule in enumerate(rules):
        scheme, rest = by_http(rule, storages)[0].source.split("://")
        authority = rest.partition("/")[0]
        address = authority if re.search(":[0-9]+$", authority) else f"{authority}:{_PORTS[scheme]}"
        host, port = _host_and_port(address, f"the server of {rule.source!r}")
        found.append(_Remote(f"remote{number + 1 if number else ''}", rule.target, scheme, host, port))
    return found


# --- nginx: https://nginx.org/en/docs/http/ngx_http_core_module.html#internal


_NGINX_MAP = """\
    # The request target below the prefix, as the client spelled it.
    map $request_uri $below {
        "~^<<prefix>>(?<below_prefix>/.*)" $below_prefix;
    }
"""
_NGINX_PASS = """\
            proxy_pass http://service;  # without a path: the request target goes on as the client spelled it"""
_NGINX_PASS_BELOW = """\
            if ($below = "") {
                return 404;
            }
            proxy_pass http://service$below;"""


_NGINX_PRIVATE = """\
        # Pages of the application that are not for clients.
        location ~ "<<refused>>" {
            default_type text/plain;
            add_header X-Content-Type-Options nosniff always;
            return 404 "Not Found";
        }

"""
_NGINX_TLS = """\
            proxy_ssl_server_name on;
            proxy_ssl_name <<host>>;
            proxy_ssl_verify on;
            proxy_ssl_trusted_certificate /etc/ssl/certs/ca-certificates.crt;
"""


def _nginx(site: _Site) -> str:
    blocks = [
        _template("nginx-files.conf", target=rule.target, directory=_nginx_word(site.seen(rule.source)[1] or "./"))
        for rule in site.rules
    ]
    blocks += [
        _template(
            "nginx-remote.conf",
            name=remote.name,
            target=remote.target,
            scheme=remote.scheme,
            host=remote.authority,
            tls=_filled(_NGINX_TLS, host=remote.host) if remote.scheme == "https" else "",
        )
        for remote in site.remotes
    ]
    upstreams = [
        _template("nginx-remote-upstream.conf", name=remote.name, address=f"{remote.host}:{remote.port}")
        for remote in site.remotes
    ]
    return _template(
        "nginx.conf",
        below=_filled(_NGINX_MAP, prefix=re.escape(site.prefix)) if site.prefix else "",
        max_body=f"{site.max_body // 1024}k" if site.max_body % 1024 == 0 else str(site.max_body),
        stall=f"{site.stall}s",
        service=f"unix:{site.socket}" if site.socket else site.authority,
        idle=f"{site.idle}s",
        listen=f"{site.host}:{site.port}",
        proxy_pass=_NGINX_PASS_BELOW if site.prefix else _NGINX_PASS,
        private=_filled(_NGINX_PRIVATE, refused=site.refused) if site.private else "",
        upstreams="".join(upstreams),
        rules="\n".join(blocks).rstrip("\n"),
    )


def _nginx_word(text: str) -> str:
    if "$" in text:
        raise ConfigurationError(f"{text!r}: nginx cannot have a $ that is no variable: use another name")
    return text if re.fullmatch("[A-Za-z0-9_./:-]+", text) else _quoted(text)


# --- Apache: https://tn123.org/mod_xsendfile/


_APACHE_OUTSIDE = """
<LocationMatch "^(?!<<prefix>>/)">
    Require all denied
</LocationMatch>"""

_APACHE_PRIVATE = """
# Pages of the application that are not for clients.
<LocationMatch "<<refused>>">
    RedirectMatch 404 ".*"
</LocationMatch>"""
_APACHE_ALIAS = "LoadModule alias_module ${modules}/mod_alias.so\n"


def _apache(site: _Site) -> str:
    return _template(
        "httpd.conf",
        listen=f"{site.host}:{site.port}",
        stall=str(site.stall),
        max_body=str(site.max_body),
        prefix=site.prefix,
        service=f"unix:{site.socket}|http://localhost" if site.socket else f"http://{site.authority}",
        idle=str(site.idle),
        outside=_filled(_APACHE_OUTSIDE, prefix=re.escape(site.prefix)) if site.prefix else "",
        modules=_APACHE_ALIAS if site.private else "",
        private=_filled(_APACHE_PRIVATE, refused=_with_encoded_slashes(site)) if site.private else "",
        rules="\n".join(f"XSendFilePath {_apache_word(site, path)}" for path in _directories(site)),
    )


def _with_encoded_slashes(site: _Site) -> str:
    """Return `refused` for Apache, which leaves a %2F in the path where the application reads a slash."""
    before, after = f"^{_literal(site.prefix)}/", site.refused.partition(_literal(site.private))[2]
    return before + _literal(site.private[1:]).replace("/", "(?:/|%2[Ff])") + after


def _apache_word(site: _Site, directory: str) -> str:
    relative, path = site.seen(directory)
    if "${" in path:
        raise ConfigurationError(f"{path!r}: Apache cannot have a ${{ that is no variable: use another name")
    return f'"${{PWD}}/{_escaped(path)}"' if relative else _quoted(path)


# --- lighttpd: https://redmine.lighttpd.net/projects/lighttpd/wiki/X-LIGHTTPD-send-file


_LIGHTTPD_OUTSIDE = """\
$HTTP["url"] !~ "^<<prefix_pattern>>/" {
    url.access-deny = ("")
}
proxy.header = ("map-urlpath" => ("<<prefix>>/" => "/"))
"""
_LIGHTTPD_PRIVATE = """\
# Pages of the application that are not for clients.
$HTTP["url"] =~ "<<refused>>" {
    url.access-deny = ("")
}
"""


def _lighttpd(site: _Site) -> str:
    directories = [_lighttpd_word(site, path) for path in _directories(site)]
    if site.socket:
        service = f'    "host" => "{site.socket}",\n'
    else:
        host, port = site.address
        service = f'    "host" => "{host.strip("[]")}",\n    "port" => {port},\n'
    outside = _filled(_LIGHTTPD_OUTSIDE, prefix=site.prefix, prefix_pattern=re.escape(site.prefix))
    return _template(
        "lighttpd.conf",
        modules='"mod_access", ' if site.prefix or site.private else "",
        private=_filled(_LIGHTTPD_PRIVATE, refused=site.refused) if site.private else "",
        host=site.host,
        port=str(site.port),
        root=directories[0],
        outside=outside if site.prefix else "",
        max_body=str(math.ceil(site.max_body / 1024)),
        stall=str(site.stall),
        service=service,
        rules=", ".join(directories),
    )


def _lighttpd_word(site: _Site, directory: str) -> str:
    relative, path = site.seen(directory)
    escaped = path.replace('"', '\\"')  # a backslash is one already
    return f'env.PWD + "/{escaped}"' if relative else f'"{escaped}"'


# --- Caddy: https://caddyserver.com/docs/caddyfile/directives/reverse_proxy#intercepting-responses


_CADDY_OUTSIDE = """\
\t@outside not path <<prefix>>/*
\troute {
\t\terror @outside 404
\t\turi strip_prefix <<prefix>>
\t}

"""
_CADDY_PRIVATE = """\
\t# Pages of the application that are not for clients.
\t@private {
\t\tpath <<prefix>><<private>>*
<<public>>\t}
\troute {
\t\terror @private 404
\t}

"""
_CADDY_PUBLIC = "\t\tnot path <<paths>>\n"


def _caddy(site: _Site) -> str:
    folded = sorted(rule.target.lower() for rule in site.rules)
    for target, other in itertools.pairwise(folded):
        if other.startswith(target):
            raise ConfigurationError(
                f"{other!r} is below {target!r} for Caddy, which takes a for A: choose another name"
            )
    blocks = [
        _template("Caddyfile-files", target=rule.target, directory=_caddy_word(site.seen(rule.source)[1] or "./"))
        for rule in site.rules
    ]
    remotes = [
        _template(
            "Caddyfile-remote",
            name=remote.name,
            target=remote.target,
            origin=f"{remote.scheme}://{remote.authority}",
            host=remote.authority,
        )
        for remote in site.remotes
    ]
    public = " ".join(f"{site.prefix}{site.private}{name}" for name in site.public)
    return _template(
        "Caddyfile",
        host=site.host.strip("[]"),
        port=str(site.port),
        max_body=str(site.max_body),
        private=_filled(
            _CADDY_PRIVATE,
            prefix=site.prefix,
            private=site.private,
            public=_filled(_CADDY_PUBLIC, paths=public) if public else "",
        )
        if site.private
        else "",
        outside=_filled(_CADDY_OUTSIDE, prefix=site.prefix) if site.prefix else "",
        service=f"unix/{site.socket}" if site.socket else site.authority,
        idle=f"{site.idle}s",
        remotes="".join(remotes),
        rules="".join(blocks).rstrip("\n"),
    )


def _caddy_word(path: str) -> str:
    if _PLAIN.fullmatch(path):
        return path
    if "{" in path or "}" in path:
        raise ConfigurationError(f"{path!r}: Caddy cannot have braces that are no placeholder: use another name")
    if "`" not in path:
        return f"`{path}`"  # nothing is special in there
    if "\\" in path:
        raise ConfigurationError(f"{path!r}: Caddy cannot have both a backslash and a backtick: use another name")
    return _quoted(path)


# --- H2O: https://h2o.examp1e.net/configure/reproxy_directives.html


_H2O_FURTHER_RULE = """\
      <<target>>:
        - mruby.handler: *file
        - file.dir: <<directory>>
          file.etag: OFF
"""
_H2O_DIRECTORY = """\
      <<target>>:
        file.dir: <<directory>>
        file.etag: OFF
"""
_H2O_PRIVATE = """\
      # Pages of the application that are not for clients.
      <<prefix>><<private>>:
        - mruby.handler: |
            Proc.new do |env|
              public = [<<public>>].include?(env["SCRIPT_NAME"] + env["PATH_INFO"])
              said = {"content-type" => "text/plain; charset=utf-8", "x-content-type-options" => "nosniff"}
              public ? [399, {}, []] : [404, said, ["Not Found"]]
            end
        - proxy.reverse.url: "<<service>><<private>>"
          proxy.preserve-host: ON

"""


def _h2o(site: _Site) -> str:
    for rule in site.rules:
        if rule.target.startswith(_WHOLE):
            raise ConfigurationError(f"the target {rule.target!r} is H2O's own here: choose another, such as /_files/")
    service = f"http://[unix:{site.socket}]" if site.socket else f"http://{site.authority}"
    directories = [(rule.target, _quoted(site.seen(rule.source)[1] or "./")) for rule in site.rules]
    rules = ""
    for target, directory in directories:
        if not rules:
            rules = _template("h2o-files.conf", target=target, directory=directory, service=service)
        else:
            rules += _filled(_H2O_FURTHER_RULE, target=target, directory=directory)
    return _template(
        "h2o.conf",
        max_body=str(site.max_body),
        idle=str(1000 * site.idle),
        host=_quoted(site.host.strip("[]")),
        port=str(site.port),
        prefix=site.prefix,
        service=service,
        private=_filled(
            _H2O_PRIVATE,
            prefix=site.prefix,
            private=site.private,
            public=", ".join(f'"{site.prefix}{site.private}{name}"' for name in site.public),
            service=service,
        )
        if site.private
        else "",
        rules=rules.rstrip("\n"),
        directories="".join(
            _filled(_H2O_DIRECTORY, target=target, directory=directory) for target, directory in directories
        ).rstrip("\n"),
    )


_MAKERS: dict[str, Callable[[_Site], str]] = {
    "nginx": _nginx,
    "apache": _apache,
    "lighttpd": _lighttpd,
    "caddy": _caddy,
    "h2o": _h2o,
}


# --- what they have in common


def _template(file: str, /, **values: str) -> str:
    """Return a file of `configs/`, filled in."""
    return _filled((_TEMPLATES / file).read_text(encoding="utf-8"), **values)


def _filled(text: str, /, **values: str) -> str:
    """Return a text with each <<name>> replaced. Proxies give other meanings to `$name` and `{name}`."""
    return re.sub("<<([a-z_]+)>>", lambda found: values[found[1]], text)


def _literal(text: str) -> str:
    """Return a path of plain characters as a regular expression."""
    return text.replace(".", "\\.")


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')


def _quoted(text: str) -> str:
    return f'"{_escaped(text)}"'


def _directories(site: _Site) -> list[str]:
    """Return the directories as the proxy sees them, each once."""
    return list(dict.fromkeys(rule.target for rule in site.rules))


def _host_and_port(address: str, name: str) -> tuple[str, int]:
    """Return an IPv4 address, name or bracketed IPv6 address, and a port. Raises `ConfigurationError` for others."""
    match = re.fullmatch("([A-Za-z0-9._-]+|\\[[0-9A-Fa-f:.]+\\]):([0-9]{1,5})", address)
    if match is None or not 0 < int(match[2]) < 65_536:
        raise ConfigurationError(f"{name}: {address!r} is no address: write it as 127.0.0.1:8080 or [::1]:8080")
    return match[1], int(match[2])
