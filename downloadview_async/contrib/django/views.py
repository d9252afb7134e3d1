"""The views: class-based views for files of every kind, and `sendfile`.

Each view works under ASGI and WSGI: it returns a coroutine where an event loop runs, and a response elsewhere. A
subclass that adds only attributes and coroutine functions runs on the event loop. A subclass that adds plain functions,
as classes for django-downloadview do, runs in a thread as a whole.
"""

import calendar
import os
import re
from collections.abc import Callable, Iterable, Mapping
from functools import update_wrapper
from typing import TYPE_CHECKING, Any

from asgiref.sync import async_to_sync, iscoroutinefunction, sync_to_async
from django.core.exceptions import ImproperlyConfigured
from django.core.files.storage import default_storage
from django.core.handlers.asgi import ASGIRequest
from django.http import Http404, HttpRequest, HttpResponseNotModified
from django.http.response import HttpResponseBase
from django.utils.decorators import classonlymethod
from django.utils.functional import classproperty
from django.views.generic.base import View
from django.views.generic.detail import SingleObjectMixin
from django.views.static import was_modified_since

from downloadview_async.contrib.django.deferral import note_receivers
from downloadview_async.contrib.django.dual import DualView, has_running_loop
from downloadview_async.contrib.django.file_errors import answer_to, note_missing
from downloadview_async.contrib.django.files import FileNotFound, HTTPFile, PathFile, StorageFile
from downloadview_async.contrib.django.responses import DownloadResponse, is_due
from downloadview_async.errors import FileError

if TYPE_CHECKING:
    _SingleObjectMixin = SingleObjectMixin[Any]  # only the stubs have it generic
else:
    _SingleObjectMixin = SingleObjectMixin

_OURS = "downloadview_async.contrib.django."
_OF_DJANGO = ("django.views.generic.", _OURS)
# They take precedence over If-Modified-Since [RFC 9110 13.2.2].
_STRONGER = frozenset({"if-match", "if-none-match", "if-unmodified-since"})
# An absolute path and `..` would lead out of a directory to which they are joined. NUL ends a path in C.
_LEADS_OUT = re.compile(r"\A/|(?:\A|/)\.\.(?:/|\Z)|\0")


class DownloadMixin:
    """A mixin for views that answer with a file, which `get_file` returns. It has no `as_view`."""

    request: HttpRequest

    response_class: type[Any] = DownloadResponse
    """The class of the response that `download_response` returns."""

    attachment = True
    """Whether the client saves the file. False: it shows the file inline."""

    basename: str | None = None
    """The name under which the client saves the file. None: the file's name."""

    mimetype: str | None = None
    """The MIME type. None: the type for the name."""

    encoding: str | None = None
    """The encoding, for `DownloadResponse.get_encoding`."""

    allow_unsafe_arguments = False
    """Whether the URL's arguments may lead out of a directory to which the view joins them.

    False: an argument that is absolute, or contains `..` as a segment or NUL, gives a 404. Backslashes count as
    slashes. True: the view checks its arguments itself.
    """

    file_instance: Any = None

    def get_file(self) -> Any:
        """Return the file. Raises `FileNotFound`, or a `FileError` such as that of `source.resolve`."""
        if type(self).aget_file is not DownloadMixin.aget_file:
            return async_to_sync(self.aget_file)()
        raise NotImplementedError(f"{type(self).__name__} needs get_file() or async def aget_file()")

    async def aget_file(self) -> Any:
        """Do what `get_file` does, on the event loop. Override one of the two."""
        return self.get_file()

    def get_basename(self) -> str | None:
        """Return the name under which the client saves the file."""
        return self.basename

    def get_mimetype(self) -> str | None:
        """Return the MIME type."""
        return self.mimetype

    def get_encoding(self) -> str | None:
        """Return the encoding."""
        return self.encoding

    def was_modified_since(self, file_instance: Any, since: Any) -> Any:
        """Return whether the file was modified since the value of If-Modified-Since.

        The file's method of this name decides, else its `modified_time`. A file without both counts as modified.
        """
        try:
            return file_instance.was_modified_since(since)
        except (AttributeError, NotImplementedError):
            pass
        try:
            modified = calendar.timegm(file_instance.modified_time.utctimetuple())
        except (AttributeError, NotImplementedError, OSError):
            return True
        return was_modified_since(since, modified)

    def not_modified_response(self, *args: Any, **kwargs: Any) -> HttpResponseBase:
        """Return a response with the status 304."""
        return HttpResponseNotModified(*args, **kwargs)

    def download_response(self, *args: Any, **kwargs: Any) -> Any:
        """Return the response with the file."""
        defaults = {
            "file_instance": self.file_instance,
            "attachment": self.attachment,
            "basename": self.get_basename(),
            "file_mimetype": self.get_mimetype(),
            "file_encoding": self.get_encoding(),
        }
        response = self.response_class(*args, **{**defaults, **kwargs})
        if isinstance(response, DownloadResponse):
            response.file_not_found_response = self.file_not_found_response
        return response

    def file_not_found_response(self) -> HttpResponseBase:
        """Return the response for a missing file, or raise `Http404`, as here."""
        raise Http404

    def _failed(self, exc: FileError | FileNotFound) -> HttpResponseBase:
        if isinstance(exc, FileError) and exc.status != 404:
            return answer_to(exc, self.request)
        note_missing(exc, self.request)
        return self.file_not_found_response()

    def render_to_response(self, *args: Any, **kwargs: Any) -> Any:
        """Return the response to a GET or HEAD, by the methods above.

        Conditions and ranges are evaluated when the response is finished. Only a view that overrides
        `was_modified_since` or `not_modified_response`, and a file with `was_modified_since`, decide before that.
        """
        try:
            self._check_arguments()
            self.file_instance = self.get_file()
        except (FileError, FileNotFound) as exc:
            return self._failed(exc)
        since = self.request.headers.get("if-modified-since")
        decides = (
            since is not None
            and _STRONGER.isdisjoint(header.lower() for header in self.request.headers)
            and self._decides_itself()
        )
        if decides and not self.was_modified_since(self.file_instance, since):
            return self.not_modified_response(**kwargs)
        response = self.download_response(*args, **kwargs)
        if decides and isinstance(response, DownloadResponse):
            response.ignores_modified_since = True
        return response

    def _check_arguments(self) -> None:
        """Raise `FileNotFound` for an argument of the URL that would lead out of a directory."""
        match = getattr(self.request, "resolver_match", None)
        if match is None or self.allow_unsafe_arguments:
            return
        named = [value for name, value in match.kwargs.items() if match.extra_kwargs.get(name) != value]
        for value in (*match.args, *named):
            # a converter of the project may make paths of them
            if isinstance(value, str | bytes | os.PathLike) and leads_out(os.fsdecode(value)):
                raise FileNotFound(f"the argument {value!r} of the URL may lead out of its directory")

    def _decides_itself(self) -> bool:
        """Return whether the project decides about If-Modified-Since itself, by a method of the view or the file."""
        hooks = (self.was_modified_since, self.not_modified_response)
        return hasattr(self.file_instance, "was_modified_since") or any(
            not getattr(hook, "__module__", "").startswith(_OURS) for hook in hooks
        )

    async def _arender_to_response(self) -> Any:
        """Do what `render_to_response` does, on the event loop."""
        try:
            self._check_arguments()
            self.file_instance = await self.aget_file()
        except (FileError, FileNotFound) as exc:
            return self._failed(exc)
        return self.download_response()


class BaseDownloadView(DownloadMixin, View):
    """A view that answers GET and HEAD with a file."""

    @classproperty
    def view_is_async(cls) -> bool:  # noqa: N805 - a property of the class
        """Return False, so that Django's `as_view` makes a plain function: our `as_view` handles coroutines."""
        return False

    @classonlymethod
    def as_view(cls, **initkwargs: Any) -> Callable[..., Any]:  # noqa: N805 - as in Django
        """Return the view, as a `DualView`."""
        blocking_view = super().as_view(**initkwargs)
        is_blocking = _adds_functions(cls)

        def view(request: HttpRequest, *args: Any, **kwargs: Any) -> Any:
            note_receivers(request)
            return (on_loop if has_running_loop() else in_thread)(request, *args, **kwargs)

        def in_thread(request: HttpRequest, *args: Any, **kwargs: Any) -> Any:
            response: Any
            try:
                response = blocking_view(request, *args, **kwargs)
                if hasattr(response, "__await__"):  # from an `async def get`
                    response = async_to_sync(_awaited)(response)
            except FileError as exc:  # such as that of `get_object`
                return answer_to(exc, request)
            return response.finish(request) if is_due(response, request) else response

        async def on_loop(request: HttpRequest, *args: Any, **kwargs: Any) -> Any:
            if not isinstance(request, ASGIRequest):
                return await sync_to_async(in_thread)(request, *args, **kwargs)
            response: Any
            try:
                if is_blocking:
                    response = await sync_to_async(blocking_view)(request, *args, **kwargs)
                else:
                    self = cls(**initkwargs)
                    self.setup(request, *args, **kwargs)
                    response = self._adispatch(request, *args, **kwargs)
                if hasattr(response, "__await__"):
                    response = await response
            except FileError as exc:
                return answer_to(exc, request)
            return await response.afinish(request) if is_due(response, request) else response

        update_wrapper(view, blocking_view)
        return DualView(view)

    def get(self, request: HttpRequest, *args: Any, **kwargs: Any) -> Any:
        """Answer a GET or HEAD."""
        return self.render_to_response()

    async def _aget(self, request: HttpRequest, *args: Any, **kwargs: Any) -> Any:
        """Do what `get` does, on the event loop."""
        return await self._arender_to_response()

    async def _adispatch(self, request: HttpRequest, *args: Any, **kwargs: Any) -> Any:
        method = str(request.method).lower()
        is_allowed = method in self.http_method_names
        if is_allowed and method in ("get", "head") and type(self).get in _GETS:
            return await self._aget(request, *args, **kwargs)
        if is_allowed and not iscoroutinefunction(getattr(self, method, None)):
            return await sync_to_async(self.dispatch)(request, *args, **kwargs)  # it may be one of Django's
        response = self.dispatch(request, *args, **kwargs)
        return await response if hasattr(response, "__await__") else response


class PathDownloadView(BaseDownloadView):
    """Sends a file on a local disk.

    root: a directory. Paths are names beneath it, and symbolic links cannot lead out of it. Without a root, the
    project's own code has to choose the path: `path`, or the result of an overridden `get_path`. A path from the URL
    that is absolute, or has `..` or empty segments, then gives a 404, see `allow_unsafe_arguments`.
    """

    root: str | os.PathLike[str] | None = None
    path: str | os.PathLike[str] | None = None
    path_url_kwarg = "path"
    kwargs: dict[str, Any]

    def get_path(self) -> Any:
        """Return the path: the URL's argument `path_url_kwarg`, else `path`.

        Raises `FileNotFound` for an argument that may lead out of its directory, or has empty segments, unless there is
        a root, or `allow_unsafe_arguments`.
        """
        self._check_arguments()
        return self.kwargs.get(self.path_url_kwarg, self.path)

    def _check_arguments(self) -> None:
        if self._has_root or self.allow_unsafe_arguments:
            return
        if self._lacks_root and all(_is_of_path_view(self, hook) for hook in ("get_file", "aget_file")):
            return  # `_file` raises ImproperlyConfigured
        super()._check_arguments()
        path, match = self.kwargs.get(self.path_url_kwarg, ""), getattr(self.request, "resolver_match", None)
        if match is None or match.extra_kwargs.get(self.path_url_kwarg) != path:
            name = str(path)
            if leads_out(name) or "//" in name or name.endswith("/"):
                raise FileNotFound(f"the path from the URL is not the name of a file: {name!r}")

    def get_file(self) -> Any:
        """Return the file. Raises `FileNotFound` where there is none."""
        file = self._file()
        if not file.exists():
            raise FileNotFound(f"there is no file {file.path!r}")
        return file

    async def aget_file(self) -> Any:
        """Return the file, which is opened when the response is finished."""
        return self._file()

    @property
    def _has_root(self) -> bool:
        return self.root is not None

    @property
    def _lacks_root(self) -> bool:
        """Whether the view takes any path from the URL, which is a mistake of the project."""
        return not self._has_root and self.path_url_kwarg in self.kwargs and _is_of_path_view(self, "get_path")

    def _file(self) -> PathFile:
        if self._lacks_root:
            raise ImproperlyConfigured(
                f"{type(self).__name__} takes its path from the URL and has no root, so a client could request every "
                "file of this machine: set root to the directory that has the files"
            )
        self._check_arguments()  # an overridden get_path may use them without calling ours
        path = self.get_path()
        if path is None:
            raise ImproperlyConfigured(f"{type(self).__name__} needs path or get_path()")
        return PathFile(path, root=self.root)


def _is_of_path_view(view: PathDownloadView, method: str) -> bool:
    return getattr(type(view), method) is getattr(PathDownloadView, method)


class StorageDownloadView(PathDownloadView):
    """Sends a file in a Django storage, by its name there, which `get_path` returns. The storage checks it, too."""

    storage: Any = default_storage
    _has_root = False  # a storage knows no root
    _lacks_root = False

    def get_file(self) -> Any:
        """Return the file, which is opened when the response is finished."""
        self._check_arguments()
        return StorageFile(self.storage, self.get_path())

    async def aget_file(self) -> Any:
        """Do what `get_file` does."""
        return self.get_file()


class HTTPDownloadView(BaseDownloadView):
    """Sends a file of another HTTP server. This process fetches it, so the client does not see that server.

    url: the project's own code has to choose it. allow_hosts: further hosts to which redirects may lead, and hosts
    whose addresses may be private. request_kwargs: `headers`. With `get_request_factory`, also others.
    """

    url = ""
    allow_hosts: Iterable[str] = ()
    request_kwargs: Mapping[str, Any] = {}

    def get_request_factory(self) -> Callable[..., Any] | None:
        """Return a function such as `requests.get` that fetches the file, or None: this library fetches it."""
        return None

    def get_request_kwargs(self) -> Mapping[str, Any]:
        """Return further arguments for `HTTPFile`."""
        return self.request_kwargs

    def get_url(self) -> str:
        """Return the URL of the file."""
        return self.url

    def get_file(self) -> Any:
        """Return the file, which is fetched when the response is finished."""
        return HTTPFile(
            request_factory=self.get_request_factory(),
            name=self.get_basename(),
            url=self.get_url(),
            allow_hosts=self.allow_hosts,
            **self.get_request_kwargs(),
        )

    async def aget_file(self) -> Any:
        """Do what `get_file` does."""
        return self.get_file()


class ObjectDownloadView(_SingleObjectMixin, BaseDownloadView):
    """Sends the file of a model's instance, which is looked up as in Django's `DetailView`.

    file_field: the name of the FileField. The other attributes are the names of fields with metadata of the file.
    """

    file_field = "file"
    basename_field: str | None = None
    encoding_field: str | None = None
    mime_type_field: str | None = None
    charset_field: str | None = None
    modification_time_field: str | None = None
    size_field: str | None = None

    async def aget_object(self) -> Any:
        """Do what `get_object` does, on the event loop. Override one of the two."""
        return await sync_to_async(self.get_object)()

    def get_file(self) -> Any:
        """Return the file of the object. Raises `FileNotFound` if the field is empty."""
        file = getattr(self.object, self.file_field)
        if not file:
            raise FileNotFound(f"the field {self.file_field!r} of {self.object!r} is empty")
        for attribute in ("encoding", "mime_type", "charset", "modification_time", "size"):
            if (field := getattr(self, f"{attribute}_field")) is not None:
                setattr(file, attribute, getattr(self.object, field))
        return file

    async def aget_file(self) -> Any:
        """Do what `get_file` does."""
        return await sync_to_async(self.get_file)()

    def get_basename(self) -> str | None:
        """Return `basename`, else the value of `basename_field`."""
        name = super().get_basename()
        return getattr(self.object, self.basename_field) if name is None and self.basename_field else name

    def get(self, request: HttpRequest, *args: Any, **kwargs: Any) -> Any:
        """Answer a GET or HEAD."""
        overridden = type(self).aget_object is not ObjectDownloadView.aget_object
        self.object = async_to_sync(self.aget_object)() if overridden else self.get_object()
        return super().get(request, *args, **kwargs)

    async def _aget(self, request: HttpRequest, *args: Any, **kwargs: Any) -> Any:
        """Do what `get` does, on the event loop."""
        if type(self).aget_object is not ObjectDownloadView.aget_object:
            self.object = await self.aget_object()
            return await self._arender_to_response()
        return await sync_to_async(self.get)(request, *args, **kwargs)  # one thread for all database queries


class VirtualDownloadView(BaseDownloadView):
    """Sends a file that `get_file` makes: from memory, or while it is sent."""

    def was_modified_since(self, file_instance: Any, since: Any) -> Any:
        """Return the result of the file's method of this name, or True if it has none."""
        try:
            return file_instance.was_modified_since(since)
        except (AttributeError, NotImplementedError):
            return True


async def _awaited(response: Any) -> Any:
    return await response


def leads_out(argument: str) -> bool:
    """Return whether an argument may lead out of a directory to which it is joined."""
    return _LEADS_OUT.search(argument.replace("\\", "/")) is not None


_GETS = {BaseDownloadView.get, ObjectDownloadView.get}


def _adds_functions(cls: type) -> bool:
    """Return whether a class, or a base class outside Django and this package, has functions that may block."""
    return any(
        name not in ("__dict__", "__weakref__")
        and (callable(value) or hasattr(value, "__get__"))
        and not isinstance(value, type)
        and not iscoroutinefunction(value)
        for base in cls.__mro__
        if base is not object and not f"{base.__module__}.".startswith(_OF_DJANGO)
        for name, value in vars(base).items()
    )


def sendfile(
    request: HttpRequest,
    filename: str | os.PathLike[str],
    attachment: bool = False,
    attachment_filename: str | None = None,
    mimetype: str | None = None,
    encoding: str | None = None,
) -> Any:
    """Return the response with the file at a path, as django-sendfile does. Where an event loop runs, `await` it.

    The project's own code has to choose the path. Raises `Http404` if there is no such file, and if an argument of the
    URL may lead out of a directory, see `DownloadMixin.allow_unsafe_arguments`.
    """
    return PathDownloadView.as_view(
        path=filename, attachment=attachment, basename=attachment_filename, mimetype=mimetype, encoding=encoding
    )(request)
