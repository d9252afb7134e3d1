"""The options of an object store, as obstore takes them."""

import re
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

from downloadview_async.errors import ConfigurationError, wrong_type

SCHEMES = {"s3": "s3", "gs": "gcs", "az": "azure"}
"""The schemes of remote stores, and the extra that each needs."""

# obstore's client options. Callers pass them together with those of the store, which have other names.
_CLIENT_OPTIONS = frozenset(
    {
        "allow_http",
        "allow_invalid_certificates",
        "connect_timeout",
        "default_headers",
        "http1_only",
        "http2_keep_alive_interval",
        "http2_keep_alive_timeout",
        "http2_keep_alive_while_idle",
        "http2_only",
        "pool_idle_timeout",
        "pool_max_idle_per_host",
        "proxy_ca_certificate",
        "proxy_excludes",
        "proxy_url",
        "randomize_addresses",
        "read_timeout",
        "root_certificate",
        "timeout",
        "user_agent",
    }
)
# `timeout` includes the body, which takes hours with a slow client. `read_timeout` runs only while we wait for the
# store. There are few retries, because the client is waiting and can try again itself.
_CLIENT_DEFAULTS = {"timeout": "7d", "connect_timeout": "10s", "read_timeout": "30s"}
_RETRIES = {"max_retries": 2, "retry_timeout": timedelta(days=7)}

# Other names that obstore accepts for the same option.
ALIASES = {
    "token": "session_token",
    "default_region": "region",
    "endpoint_url": "endpoint",
    "bucket_name": "bucket",
}
ENDPOINTS = frozenset({"endpoint", "base_url"})
_HTTP_URL = re.compile(r"https?://(\[[0-9A-Fa-f:.]+\]|[\w.-]+)(:[0-9]+)?(/[!-~]*)?\Z", re.ASCII | re.IGNORECASE)


def arguments_of(url: str, options: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of obstore's `from_url`. Raises `ConfigurationError`."""
    if not isinstance(url, str):
        raise wrong_type("ObjectStorage takes a URL, such as 's3://bucket/prefix'", url)
    parts = urlsplit(url)
    local = {
        "file": parts.netloc == "" and parts.path.startswith("/"),
        "memory": not parts.netloc + parts.path.strip("/"),
    }
    if not local.get(parts.scheme, parts.scheme in SCHEMES and parts.netloc) or parts.query or parts.fragment:
        raise ConfigurationError(
            f"{url!r} is not the URL of an object store: give s3://BUCKET/PREFIX, gs://BUCKET/PREFIX or az://CONTAINER/PREFIX"
        )
    if parts.scheme in local:
        if options:
            raise ConfigurationError(f"{url!r} takes no options: remove {', '.join(sorted(options))}")
        return {}
    for name, value in options.items():
        if plain_name(name) in ENDPOINTS and not _HTTP_URL.match(str(value)):
            raise ConfigurationError(
                f"{name} is {value!r}, which is not the URL of a store: give one such as https://HOST"
            )
    client = dict(_CLIENT_DEFAULTS)
    if any(plain_name(name) in ENDPOINTS and str(value).startswith("http://") for name, value in options.items()):
        client["allow_http"] = "true"
    client |= options.pop("client_options", None) or {}
    client |= {name: _text(options.pop(name)) for name in list(options) if name in _CLIENT_OPTIONS}
    options = {name: _text(value) for name, value in options.items()}
    return {"retry_config": _RETRIES, **options, "client_options": client}


def _text(value: Any) -> Any:
    """Return a value for obstore, which does not accept numbers."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def plain_name(name: str) -> str:
    """Return the name of an option in obstore's documentation, for any name that obstore takes for it."""
    name = name.lower().removeprefix("aws_")
    return ALIASES.get(name, name)
