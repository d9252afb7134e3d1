"""`manage.py downloadview_check`: checks a project and the proxy in front of it, as `downloadview check --app` does."""

import json
import logging
import sys
from argparse import RawDescriptionHelpFormatter
from contextlib import aclosing
from functools import partial
from typing import Any

import anyio
from django.conf import settings
from django.core.management.base import BaseCommand, CommandError, CommandParser, DjangoHelpFormatter
from django.utils.module_loading import import_string

from downloadview_async.check.application import check_application
from downloadview_async.check.http import headers_of
from downloadview_async.check.site import Line, counts_of, report_of
from downloadview_async.contrib.django.asgi import get_asgi_application
from downloadview_async.contrib.django.middleware import BaseDownloadMiddleware
from downloadview_async.errors import ConfigurationError

_WRONG = 2
_EXAMPLE = """\
Example:
  python manage.py downloadview_check https://example.org \\
      --header "Cookie: sessionid=..." --file /documents/1/=media/1.txt
"""


class _Help(RawDescriptionHelpFormatter, DjangoHelpFormatter):
    """Puts the arguments of the command before those of all commands, and leaves the example as it is."""


class Command(BaseCommand):
    """Compares the answers of the project with those that clients get through the proxy."""

    help = (
        "Check that clients get the files of this project through the proxy in front of it.\n"
        "URL is the one below which clients reach the project. The exit status is 0 if\n"
        "nothing fails, 1 if something fails, and 2 if nothing can be checked."
    )
    requires_system_checks = ("downloadview",)

    def create_parser(self, prog_name: str, subcommand: str, **kwargs: Any) -> CommandParser:
        """Return the parser of the arguments, whose help ends with an example."""
        kwargs = {"epilog": _EXAMPLE, "formatter_class": _Help, **kwargs}
        return super().create_parser(prog_name, subcommand, **kwargs)

    def add_arguments(self, parser: CommandParser) -> None:
        """Add the arguments of `downloadview check`."""
        parser.add_argument("url", metavar="URL", help="such as https://example.org")
        parser.add_argument(
            "--file",
            action="append",
            dest="files",
            metavar="PATH[=FILE]",
            help="a path to request, and the local file that is sent for it; may be repeated",
        )
        parser.add_argument(
            "--header",
            action="append",
            dest="headers",
            metavar="HEADER",
            help="a header of every request, such as the cookie of a user who may have the files; may be repeated",
        )
        parser.add_argument("--direct", metavar="URL", help="where the server of the project itself listens")
        parser.add_argument("--timeout", type=float, default=10.0, metavar="SECONDS", help="for each request")
        parser.add_argument(
            "--app",
            metavar="MODULE.NAME",
            help="the ASGI application that is served, if it is not that of get_asgi_application or ASGI_APPLICATION",
        )
        parser.add_argument("--json", action="store_true", dest="as_json", help="print one JSON object")

    def handle(self, *args: Any, as_json: bool, **options: Any) -> None:
        """Make the checks, and print each result."""
        lines: list[Line] = []
        log = logging.getLogger("django.request")
        log.addFilter(_is_error)  # a level would be reset by `get_asgi_application`
        try:
            anyio.run(partial(self._check, lines, as_json, options))
        except ConfigurationError as exc:
            raise CommandError(str(exc), returncode=_WRONG) from exc
        finally:
            log.removeFilter(_is_error)
        counts = counts_of(lines)
        if as_json:
            self.stdout.write(json.dumps(report_of(lines), indent=1))
        else:
            self.stdout.write(", ".join(f"{count} {result}" for result, count in counts.items()))
        if counts["FAIL"]:
            sys.exit(1)

    async def _check(self, lines: list[Line], as_json: bool, options: dict[str, Any]) -> None:
        results = check_application(
            _application(options["app"]),
            options["files"] or (),
            url=options["url"],
            direct=options["direct"],
            timeout=options["timeout"],
            headers=headers_of(options["headers"] or ()),
            root_path=settings.FORCE_SCRIPT_NAME,
            unoffered=_why_unoffered(),
        )
        async with aclosing(results):
            async for line in results:
                lines.append(line)
                if not as_json:
                    self.stdout.write(line.as_text())


def _is_error(record: logging.LogRecord) -> bool:
    """Return whether a line of the log is of an error. The check requests missing files, and its rows say what came."""
    return record.levelno >= logging.ERROR


def _application(path: str | None) -> Any:
    """Return the ASGI application that is served. Raises `ConfigurationError`."""
    path = path or getattr(settings, "ASGI_APPLICATION", None)
    if path is None:
        return get_asgi_application()
    try:
        return import_string(path.replace(":", "."))
    except Exception as exc:  # importing a module may raise anything
        raise ConfigurationError(f"{path} cannot be imported ({type(exc).__name__}: {exc}): give MODULE.NAME") from exc


def _why_unoffered() -> str:
    """Return why the project sends a file itself for which no proxy was offered."""
    kinds = (import_string(path) for path in settings.MIDDLEWARE)
    if any(isinstance(kind, type) and issubclass(kind, BaseDownloadMiddleware) for kind in kinds):
        return "no rule in the settings covers it"
    return "there is no SmartDownloadMiddleware in MIDDLEWARE"
