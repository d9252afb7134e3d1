"""The project as real servers serve it: by our handler, by Django's own, and as a WSGI application.

SERVED_ROOT: the directory of the files. SERVED_PORT: where this is served, for the remote kind. SERVED_DATABASE: the
file of the database. SERVED_LINKS: the store of links, if there is one. TABLE_SMALL: how long a file is that goes in
one message. SERVED_KEEP: how many seconds a file is kept open after a request. SERVED_OUTCOMES: the file for the
outcomes, if they are wanted.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from starlette.types import ASGIApp

KINDS = [
    "path",
    "blocking",
    "function",
    "blocking-function",
    "object",
    "async-object",
    "storage",
    "memory",
    "custom",
    "remote",
    "fileobject",
    "generated",
]


def _set_up() -> None:
    """Set Django up for the environment, and fill the database."""
    import django

    from downloadview_async.asgi import transfer
    from downloadview_async.sources.local import open_file_cache
    from tests.contrib.django import project

    if "TABLE_SMALL" in os.environ:
        vars(transfer)["SMALL"] = int(os.environ["TABLE_SMALL"])
    if "SERVED_KEEP" in os.environ:
        vars(open_file_cache)["KEEP_SECONDS"] = float(os.environ["SERVED_KEEP"])
    project.ROOT_URLCONF = "tests.contrib.django.documents.urls"
    project.MEDIA_ROOT = os.environ["SERVED_ROOT"]
    project.DATABASES["default"]["NAME"] = os.environ["SERVED_DATABASE"]
    if "SERVED_LINKS" in os.environ:
        links = {"STORE": os.environ["SERVED_LINKS"], "CLIENT_OF": "tests.contrib.django.served_app.client_of"}
        vars(project)["DOWNLOADVIEW_LINKS"] = links
    if "SERVED_OUTCOMES" in os.environ:
        project.MIDDLEWARE = ["downloadview_async.contrib.django.AccountsMiddleware"]
    os.environ["DJANGO_SETTINGS_MODULE"] = "tests.contrib.django.project"
    django.setup()
    if "SERVED_OUTCOMES" in os.environ:
        _note_outcomes()

    with ThreadPoolExecutor() as thread:  # uvicorn calls us where its event loop runs
        thread.submit(_fill_the_database).result()


def _note_outcomes() -> None:
    from downloadview_async.contrib.django import download_finished
    from tests.asgi.accounts_app import Lines

    lines = Lines(os.environ["SERVED_OUTCOMES"])

    def note(sender: Any, outcome: Any, **_: Any) -> None:
        lines(outcome)

    download_finished.connect(note, weak=False)


def _fill_the_database() -> None:
    from django.core.management import call_command
    from django.db import connections

    from tests.contrib.django.documents.models import Document

    call_command("migrate", run_syncdb=True, verbosity=0)
    for name in os.listdir(os.environ["SERVED_ROOT"]):
        Document.objects.get_or_create(name=name, defaults={"file": name})
    connections.close_all()


def client_of(request: Any) -> str:
    """Return the client of a request, as a test names it."""
    return str(request.headers.get("X-Client", ""))


def ours() -> ASGIApp:
    """Return the project as our handler serves it."""
    _set_up()
    from downloadview_async.contrib.django import get_asgi_application
    from tests.asgi.table_app import Watch

    return Watch(get_asgi_application())


def offloaded() -> ASGIApp:
    """Return the project within the middleware that has nginx send the files."""
    import downloadview_async as dv

    return dv.OffloadMiddleware(ours(), dv.XAccelRedirect([dv.Rule(os.environ["SERVED_ROOT"], "/internal/")]))


def stock() -> ASGIApp:
    """Return the project as Django's own handler serves it."""
    _set_up()
    from django.core.asgi import get_asgi_application

    from tests.asgi.table_app import Watch

    application: Any = get_asgi_application()
    return Watch(application)


def wsgi() -> Any:
    """Return the project as Django's handler for WSGI serves it."""
    _set_up()
    from django.core.wsgi import get_wsgi_application

    return get_wsgi_application()


if __name__ == "__main__":
    from socketserver import ThreadingMixIn
    from wsgiref.simple_server import WSGIServer, make_server

    class Threads(ThreadingMixIn, WSGIServer):
        """A thread for each request."""

        daemon_threads = True

    make_server("127.0.0.1", int(os.environ["SERVED_PORT"]), wsgi(), server_class=Threads).serve_forever()
