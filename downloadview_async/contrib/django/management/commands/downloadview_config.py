"""`manage.py downloadview_config`: prints the configuration of a proxy that sends the files of the project's rules."""

import os
from typing import Any
from urllib.parse import unquote

from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.utils.module_loading import import_string

from downloadview_async.contrib.django.middleware import BACKENDS, ProxiedDownloadMiddleware, SmartDownloadMiddleware
from downloadview_async.errors import ConfigurationError
from downloadview_async.offload.config import proxy_config
from downloadview_async.offload.rules import Rule

PROXIES = {"nginx": "nginx", "caddy": "nginx", "apache": "apache", "lighttpd": "lighttpd"}
"""The proxies, each with the backend that the rules have to be for."""

HEADERS = (
    "Content-Language",
    "Content-Security-Policy",
    "Content-Security-Policy-Report-Only",
    "Cross-Origin-Opener-Policy",
    "Referrer-Policy",
    "Strict-Transport-Security",
    "X-Frame-Options",
)
"""Those that Django's own middlewares add to each answer, and proxies drop where they send a file."""


class Command(BaseCommand):
    """Prints the configuration of a proxy in front of the project."""

    help = "Print the configuration of a proxy that sends the files of the rules in settings.DOWNLOADVIEW."
    requires_system_checks = ("downloadview",)

    def add_arguments(self, parser: CommandParser) -> None:
        """Add the arguments, which are those of `downloadview config`."""
        parser.add_argument("proxy", choices=[*PROXIES])
        parser.add_argument(
            "--listen", default="127.0.0.1:8080", metavar="HOST:PORT", help="where the proxy listens; %(default)s"
        )
        parser.add_argument(
            "--service",
            default="127.0.0.1:8000",
            metavar="ADDRESS",
            help="where the server of the project listens: HOST:PORT, or unix:/PATH of a socket; %(default)s",
        )
        parser.add_argument(
            "--header",
            action="append",
            dest="headers",
            default=[],
            metavar="NAME",
            help="a further header that the project adds to downloads, such as X-Robots-Tag; may be repeated",
        )
        parser.add_argument(
            "--max-body",
            type=int,
            default=settings.DATA_UPLOAD_MAX_MEMORY_SIZE or 2_621_440,
            metavar="BYTES",
            help="the longest request body, such as the largest upload in the admin; "
            "DATA_UPLOAD_MAX_MEMORY_SIZE, here %(default)s",
        )

    def handle(self, *args: Any, proxy: str, **options: Any) -> None:
        """Print the configuration."""
        try:
            text = proxy_config(
                proxy,
                _rules_for(PROXIES[proxy]),
                listen=options["listen"],
                service=options["service"],
                prefix=(settings.FORCE_SCRIPT_NAME or "").rstrip("/"),
                headers=[*HEADERS, *options["headers"]],
                max_body_bytes=options["max_body"],
            )
        except (ConfigurationError, ImproperlyConfigured) as exc:
            raise CommandError(str(exc), returncode=2) from exc
        self.stdout.write(text, ending="")


def _rules_for(backend: str) -> list[Rule]:
    """Return the rules of the settings, each with its directory. Raises `ConfigurationError`."""
    kind = import_string(BACKENDS[backend])
    rules = []
    for _, middleware in SmartDownloadMiddleware().dispatcher.middlewares:
        if not isinstance(middleware, kind):
            raise ConfigurationError(
                f"settings.DOWNLOADVIEW has a rule of {type(middleware).__name__}, and this proxy needs the backend "
                f"{backend!r}: set BACKEND to it, or print the configuration of another proxy"
            )
        rules.append(_rule_of(middleware))
    if not rules:
        raise ConfigurationError("there is no rule in settings.DOWNLOADVIEW: write RULES, each with a source_dir")
    return rules


def _rule_of(middleware: ProxiedDownloadMiddleware) -> Rule:
    target = f"{os.fspath(middleware.destination_url or '').rstrip('/')}/"
    if middleware.source_dir and os.path.isabs(middleware.source_dir):
        return Rule(os.fspath(middleware.source_dir), target)
    url, media = f"{str(middleware.source_url).rstrip('/')}/", f"{str(settings.MEDIA_URL).rstrip('/')}/"
    if settings.MEDIA_ROOT and not middleware.source_dir and url.startswith(media):
        return Rule(os.path.join(os.path.abspath(settings.MEDIA_ROOT), unquote(url.removeprefix(media))), target)
    rule = f"source_dir={middleware.source_dir!r}" if middleware.source_dir else f"source_url={middleware.source_url!r}"
    raise ConfigurationError(
        f"the rule with {rule} does not say in which directory its files are: give it an absolute source_dir, or write "
        "this part of the proxy's configuration yourself"
    )
