"""Answers to a `FileError` that a view raises, such as that of `source.resolve`."""

from django.core.exceptions import PermissionDenied
from django.http import Http404, HttpRequest, HttpResponse

from downloadview_async.asgi.errors import failed
from downloadview_async.errors import FileError, FileMissing


def error_response(exc: FileError, request: HttpRequest) -> HttpResponse:
    """Return the answer to a request whose file cannot be sent. The reason goes to the log alone."""
    headers = failed(exc, str(request.method), request.path)
    if exc.text != exc.status.phrase:
        return HttpResponse(exc.text, "text/plain", exc.status, headers=headers)
    response = HttpResponse(status=exc.status, headers={**headers, "Content-Length": "0"})
    del response["Content-Type"]
    return response


def note_missing(exc: Exception, request: HttpRequest) -> None:
    """Log why a file is missing. The project makes the answer."""
    failed(exc if isinstance(exc, FileError) else FileMissing(str(exc)), str(request.method), request.path)


def answer_to(exc: FileError, request: HttpRequest) -> HttpResponse:
    """Return the answer to a request whose file cannot be sent, or raise the exception for which the project has it.

    Raises `Http404` for a file that does not exist, or that the client may not see, so both get the 404 of the project;
    and `PermissionDenied` for a link that is invalid.
    """
    if exc.status == 403:
        raise PermissionDenied from exc  # without the reason: a page of the project may show the message
    if exc.status == 404:
        note_missing(exc, request)
        raise Http404 from exc
    return error_response(exc, request)
