"""H2O: X-Reproxy-URL with an internal URI. See https://h2o.examp1e.net/configure/reproxy_directives.html."""

from collections.abc import Iterable

from downloadview_async.errors import ConfigurationError
from downloadview_async.offload.base import ProxyKind
from downloadview_async.offload.places import LocalFiles, RateHeader, percent_encoded
from downloadview_async.offload.render import ProxySite, filled, log_line, quoted, template
from downloadview_async.offload.rules import Rule

_RATE = RateHeader("X-Traffic")
_WHOLE = "/_whole/"  # below this path, the configuration makes H2O send requests to itself


class XReproxyURL(LocalFiles):
    """The backend for H2O: X-Reproxy-URL with an internal URI, percent-encoded.

    rules: their sources are directories, such as that of a `Cache`. Their targets are URIs that begin and end with a
    slash, the paths in H2O's configuration. H2O drops all our headers unless it is configured as in
    `deploy/h2o/h2o.conf`.

    Raises `ConfigurationError` for another source or target.
    """

    def __init__(self, rules: Iterable[Rule]) -> None:
        super().__init__(
            rules,
            title="H2O",
            header="x-reproxy-url",
            targets="uri",
            encode=percent_encoded,
            rate_header=_RATE,
            hint="H2O breaks off a file of another server if the client is slower than that server. Keep these files "
            "in a cache, and write the directory of the cache in the rule",
        )


_FURTHER_RULE = """\
      <<target>>:
        - mruby.handler: *file
        - file.dir: <<directory>>
          file.etag: OFF
"""
_DIRECTORY = """\
      <<target>>:
        file.dir: <<directory>>
        file.etag: OFF
"""
_LOG = """\
    # By this the service counts what H2O has sent. To rotate it, rename it, and restart H2O.
    access-log:
      path: <<path>>
      escape: json
      format: '<<line>>'
"""
_LINE = log_line(
    method="%m",
    request_id="%{x-request-id}o",
    status="%>s",
    sent="%b",
    content_range="%{content-range}o",
    requested="%{range}i",
)
_PRIVATE = """\
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


def _configuration(site: ProxySite) -> str:
    for rule in site.rules:
        if rule.target.startswith(_WHOLE):
            raise ConfigurationError(
                f"H2O's configuration needs the target {rule.target!r} itself: choose another, such as /_files/"
            )
    service = f"http://[unix:{site.socket}]" if site.socket else f"http://{site.authority}"
    directories = [(rule.target, quoted(site.seen(rule.source)[1] or "./")) for rule in site.rules]
    rules = ""
    for target, directory in directories:
        if not rules:
            rules = template("h2o-files.conf", target=target, directory=directory, service=service)
        else:
            rules += filled(_FURTHER_RULE, target=target, directory=directory)
    return template(
        "h2o.conf",
        max_body=str(site.max_body),
        log=filled(_LOG, path=site.log, line=_LINE) if site.log else "",
        idle=str(1000 * site.idle),
        host=quoted(site.host.strip("[]")),
        port=str(site.port),
        prefix=site.prefix,
        service=service,
        private=filled(
            _PRIVATE,
            prefix=site.prefix,
            private=site.private,
            public=", ".join(f'"{site.prefix}{site.private}{name}"' for name in site.public),
            service=service,
        )
        if site.private
        else "",
        rules=rules.rstrip("\n"),
        directories="".join(
            filled(_DIRECTORY, target=target, directory=directory) for target, directory in directories
        ).rstrip("\n"),
    )


H2O = ProxyKind(
    name="h2o",
    title="H2O",
    header="X-Reproxy-URL",
    targets="uri",
    encode=percent_encoded,
    controls=("x-traffic",),
    rate_header=_RATE,
    backend=XReproxyURL,
    hides_targets=True,
    replaced_headers=("Content-Type",),  # H2O makes it from the name of the file
    configuration=_configuration,
    remedies={
        "not obeyed": "`reproxy: ON` in the host",
        "leaked": "`header.unset: <header>`",
        "not found": "`<target>:` with `file.dir: <directory>`: the directory as H2O sees it, readable for its user",
        "other bytes": "`file.dir: <directory>` below `<target>:`",
        "open": 'in `<target>:`, begin with a mruby.handler that answers 404 unless env["DOWNLOADVIEW_TARGET"] is set',
        "unreached": "`proxy.reverse.url: <service>/`",
        "not passed on": "`proxy.reverse.url: <service>/` below `/:`",
        "header": "keep <header> among what the mruby.handler of `<target>:` passes on, and no header.set for it",
        "streamed header": "no header.set or header.unset for <header>",
        "ranges": "no proxy.header.unset of Range, and no `compress: ON`",
        "streamed ranges": "no proxy.header.unset of Range or If-Range, and `compress: OFF`",
        "conditions": "`file.etag: OFF`, and the mruby.handler of `<target>:` as in deploy/h2o/h2o.conf",
        "encoded": "`compress: OFF`",
        "order": "`proxy.header.unset: X-Sendfile`, likewise X-Accel-Redirect, X-Accel-Mapping and X-Sendfile-Type",
        "socket": "`owner: nobody` beside `permission: 600` of H2O's own socket, where root starts it",
    },
)
