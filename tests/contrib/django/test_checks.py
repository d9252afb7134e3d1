"""System checks: real faults are named with what to write instead, and a project without faults hears nothing."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from django.conf import settings
from django.contrib.auth.mixins import LoginRequiredMixin
from django.core.checks import CheckMessage, run_checks
from django.core.files.base import ContentFile
from django.core.files.storage import FileSystemStorage
from django.http import HttpRequest, HttpResponse
from django.test import override_settings
from django.urls import include, path, re_path
from django.utils.decorators import sync_and_async_middleware

from downloadview_async.contrib.django.nginx import x_accel_redirect
from downloadview_async.contrib.django.views import PathDownloadView, StorageDownloadView

HERE = "tests.contrib.django.test_checks"
SMART = "downloadview_async.contrib.django.middleware.SmartDownloadMiddleware"
DISPATCHER = "downloadview_async.contrib.django.middleware.DownloadDispatcherMiddleware"
OF_STARTPROJECT = [
    "django.middleware.security.SecurityMiddleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
    "django.middleware.clickjacking.XFrameOptionsMiddleware",
]
NGINX = {"source_url": "/media/", "destination_url": "/_media/"}
APACHE = {"source_url": "/media/", "destination_dir": "/srv/media/"}


def old_middleware(get_response: Callable[[HttpRequest], HttpResponse]) -> Callable[[HttpRequest], HttpResponse]:
    """As many projects have one."""
    return get_response


class OldMiddleware:
    def __init__(self, get_response: Callable[[HttpRequest], HttpResponse]) -> None:
        self.get_response = get_response


@sync_and_async_middleware
def new_middleware(get_response: Callable[[HttpRequest], Any]) -> Callable[[HttpRequest], Any]:
    return get_response


class Urls:
    """A URLconf of the test's own."""

    def __init__(self, *patterns: Any) -> None:
        self.urlpatterns = list(patterns)


def faults(**changes: Any) -> list[CheckMessage]:
    with override_settings(**changes):
        return run_checks(tags=["downloadview"])


def test_a_default_project_has_none() -> None:
    assert faults(MIDDLEWARE=OF_STARTPROJECT) == []
    assert faults() == []


RIGHT: list[dict[str, Any]] = [
    {"DOWNLOADVIEW": {"BACKEND": "nginx", "RULES": [NGINX]}},
    {"DOWNLOADVIEW": {"BACKEND": "nginx", "RULES": [{**NGINX, "source_url": "/media/private/"}]}},
    {"DOWNLOADVIEW": {"BACKEND": "nginx", "RULES": [{**NGINX, "source_url": "/"}]}},
    {"DOWNLOADVIEW": {"BACKEND": "nginx", "RULES": [{**NGINX, "source_url": "https://files.example.org/"}]}},
    {"DOWNLOADVIEW": {"BACKEND": "apache", "LIMIT_RATE": 1, "RULES": [{**NGINX, "backend": "nginx"}]}},
    {"DOWNLOADVIEW": {"BACKEND": "apache", "RULES": [{"source_dir": settings.MEDIA_ROOT, "destination_dir": "/srv"}]}},
    {
        "DOWNLOADVIEW_BACKEND": "django_downloadview.nginx.XAccelRedirectMiddleware",
        "DOWNLOADVIEW_RULES": [NGINX, {**APACHE, "backend": "django_downloadview.apache.XSendfileMiddleware"}],
    },
    {
        "STORAGES": {
            "default": {
                "BACKEND": "django.core.files.storage.FileSystemStorage",
                "OPTIONS": {"base_url": "/elsewhere/"},
            },
        },
        "DOWNLOADVIEW": {"BACKEND": "nginx", "RULES": [{**NGINX, "source_url": "/elsewhere/x/"}]},
    },
    {
        "ROOT_URLCONF": Urls(
            path("a/<path:path>", StorageDownloadView.as_view(storage=FileSystemStorage(base_url="/of-a-view/")))
        ),
        "DOWNLOADVIEW": {"BACKEND": "nginx", "RULES": [{**NGINX, "source_url": "/of-a-view/"}]},
    },
    {"MIDDLEWARE": [DISPATCHER]},
    {"MIDDLEWARE": [SMART, f"{HERE}.new_middleware"], "DOWNLOADVIEW": {"BACKEND": "nginx", "RULES": []}},
]


@pytest.mark.parametrize("changes", RIGHT)
def test_what_is_right(changes: dict[str, Any]) -> None:
    assert faults(**{"MIDDLEWARE": [*OF_STARTPROJECT, SMART], **changes}) == []


WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"MIDDLEWARE": [SMART]}, "E001", r"needs settings.DOWNLOADVIEW\['BACKEND'\]"),
    ({"DOWNLOADVIEW": {"BACKEND": "ngnix"}}, "E001", "'ngnix', which is not known: write 'nginx', 'apache', 'light"),
    ({"DOWNLOADVIEW": {"BACKEND": "os.curdir"}}, "E001", "which is not a middleware: write"),
    ({"DOWNLOADVIEW_BACKEND": "no.such.module"}, "E001", "settings.DOWNLOADVIEW_BACKEND is .* cannot be imported"),
    ({"DOWNLOADVIEW": {"BACKEND": "nginx", "RULES": [{**NGINX, "backend": "x"}]}}, "E001", r"\[0\]\['backend'\]"),
    ({"MIDDLEWARE": [DISPATCHER], "DOWNLOADVIEW_MIDDLEWARES": [("a", "x.y", {})]}, "E001", r"MIDDLEWARES\[0\]"),
    ({"DOWNLOADVIEW": {"BACKEND": "nginx"}}, "E002", r"needs settings.DOWNLOADVIEW\['RULES'\]"),
    ({"DOWNLOADVIEW": {"BACKEND": "nginx", "RULES": "/media/"}}, "E002", "list of rules"),
    (
        {"DOWNLOADVIEW": {"BACKEND": "nginx", "RULES": [APACHE]}},
        "E002",
        r"\[0\]: unknown key 'destination_dir': did you m",
    ),
    (
        {"DOWNLOADVIEW": {"BACKEND": "nginx", "RULES": [{"sourcedir": "/srv", "destination_url": "/_srv/"}]}},
        "E002",
        r"\[0\]: unknown key 'sourcedir': did you mean 'source_dir'\?",
    ),
    ({"DOWNLOADVIEW": {"BACKEND": "nginx", "RULES": [{**NGINX, "x": 1}]}}, "E002", "unknown key 'x': use source_dir, "),
    ({"DOWNLOADVIEW": {"BACKEND": "nginx", "RULES": [[None] * 20]}}, "E002", r"\[0\] does not fit"),
    ({"DOWNLOADVIEW": {"BACKEND": "nginx", "RULES": [NGINX, {"source_url": "/m/"}]}}, "E002", r"\[1\].*destination"),
    ({"DOWNLOADVIEW": {"BACKEND": "nginx", "RULES": [{**NGINX, "destination_url": "/"}]}}, "E002", "internal"),
    ({"MIDDLEWARE": [DISPATCHER], "DOWNLOADVIEW_MIDDLEWARES": ["x"]}, "E002", "has to be a tuple"),
    ({"DOWNLOADVIEW": {"BACKEND": "nginx", "RULES": [{**NGINX, "source_url": "/medai/"}]}}, "W003", "'/medai/'"),
    ({"DOWNLOADVIEW": {"BACKEND": "nginx", "RULES": [{**NGINX, "source_url": "/med"}]}}, "W003", "'/med'"),
    (
        {"DOWNLOADVIEW": {"BACKEND": "nginx", "RULES": [{**NGINX, "source_dir": "/no/such/directory"}]}},
        "W003",
        "'/no/such/directory'",
    ),
    ({"DOWNLOADVIEW": {"BACKEND": "nginx", "RULES": [{"destination_url": "/_m/"}]}}, "W003", "neither"),
    ({"MIDDLEWARE": [f"{HERE}.old_middleware"]}, "W004", f"{HERE}.old_middleware"),
    ({"MIDDLEWARE": [*OF_STARTPROJECT, f"{HERE}.OldMiddleware"]}, "W004", f"{HERE}.OldMiddleware"),
]


@pytest.mark.parametrize("changes, number, message", WRONG)
def test_what_is_wrong(changes: dict[str, Any], number: str, message: str) -> None:
    (fault,) = faults(**changes)
    assert fault.id == f"downloadview_async.{number}"
    assert fault.is_serious() is (number.startswith("E"))
    assert re.search(message, fault.msg)
    assert fault.hint


class Rooted(PathDownloadView):
    root = "/srv"


class Computed(PathDownloadView):
    def get_path(self) -> str:
        return "/srv/report.pdf"


class Private(LoginRequiredMixin, PathDownloadView):
    path_url_kwarg = "name"


class Joined(PathDownloadView):
    """The pattern of django-downloadview's demo."""

    def get_path(self) -> str:
        return os.path.join("/srv", super().get_path())


class JoinedByItself(PathDownloadView):
    async def aget_object(self) -> None: ...

    def get_path(self) -> str:
        return os.path.join("/srv", self.kwargs["path"])


class JoinedByName(PathDownloadView):
    def get_path(self) -> str:
        return os.path.join("/srv", self.kwargs["name"])


class JoinedByPosition(PathDownloadView):
    def get_path(self) -> str:
        return os.path.join("/srv", self.args[0])


class JoinedByQuery(PathDownloadView):
    def get_path(self) -> str:
        return os.path.join("/srv", self.request.GET["name"])


class OfUser(PathDownloadView):
    def get_path(self) -> str:
        return os.path.join("/srv", str(self.request.user.pk))


class JoinedBeneath(Joined):
    root = "/srv"


class Encrypted(FileSystemStorage):
    def _open(self, name: str, mode: str = "rb") -> Any:
        return ContentFile(b"plain text")


class Told(Encrypted):
    is_sent_as_stored = False


JOINED: list[tuple[Any, bool]] = [
    (path("f/<path:path>", Joined.as_view()), True),
    (path("f/<str:path>", JoinedByItself.as_view()), True),
    (path("f/<path:name>", Joined.as_view(path_url_kwarg="name")), True),
    (path("f/<path:path>", x_accel_redirect(Joined.as_view(), source_dir="/srv", destination_url="/_srv/")), True),
    (path("f/<path:path>", Joined.as_view(root="/srv")), False),
    (path("f/<path:path>", JoinedBeneath.as_view()), False),
    (path("f/<path:path>", Joined.as_view(allow_unsafe_arguments=True)), False),
    (path("f/<int:pk>", Joined.as_view()), False),
    (path("f/<path:name>", JoinedByName.as_view()), True),
    (path("<str:name>/f", JoinedByName.as_view()), True),
    (path("<path:name>/", include([path("f", JoinedByName.as_view())])), True),
    (re_path("^f/(?P<name>.+)$", JoinedByName.as_view()), True),
    (re_path(r"^f/(?P<name>[\w.]+)$", JoinedByName.as_view()), True),
    (re_path("^f/(?P<name>(a|..)/b)$", JoinedByName.as_view()), True),
    (re_path("^f/(.+)$", JoinedByPosition.as_view()), True),
    (path("f", JoinedByQuery.as_view()), True),
    (path("f/<slug:name>", JoinedByName.as_view()), False),
    (path("f/<int:name>", JoinedByName.as_view()), False),
    (path("f/<uuid:name>", JoinedByName.as_view()), False),
    (re_path(r"^f/(?P<name>\d+)$", JoinedByName.as_view()), False),
    (re_path(r"^f/(?P<name>[a-z]+)\.pdf$", JoinedByName.as_view()), False),
    (path("f/<path:name>", JoinedByName.as_view(root="/srv")), False),
    (path("f", OfUser.as_view()), False),
    (path("f/<path:name>", Computed.as_view()), False),
    (path("f/<path:path>", Computed.as_view()), False),
]


@pytest.mark.parametrize("pattern, found", JOINED)
def test_a_path_that_is_joined_to_a_directory_is_found(pattern: Any, found: bool) -> None:
    warnings = faults(ROOT_URLCONF=Urls(pattern))
    assert [warning.id for warning in warnings] == (["downloadview_async.W006"] if found else [])
    for warning in warnings:
        assert "get_path" in warning.msg
        assert "root = " in str(warning.hint)


@pytest.mark.parametrize("source", ["source_url", "source_dir"])
@pytest.mark.parametrize("storage, found", [(Encrypted, True), (Told, False), (FileSystemStorage, False)])
def test_a_storage_whose_files_no_rule_offloads_is_found(
    tmp_path: Path, storage: type[FileSystemStorage], source: str, found: bool
) -> None:
    view = StorageDownloadView.as_view(storage=storage(tmp_path / "x", base_url="/own/x/"))
    rule = {source: "/own/" if source == "source_url" else str(tmp_path), "destination_url": "/_own/"}
    warnings = faults(ROOT_URLCONF=Urls(path("f", view)), DOWNLOADVIEW={"BACKEND": "nginx", "RULES": [rule]})
    assert [warning.id for warning in warnings] == (["downloadview_async.W007"] if found else [])
    for warning in warnings:
        assert "Encrypted" in warning.msg
        assert "is_sent_as_stored" in str(warning.hint)


PATHS: list[tuple[Any, str | None]] = [
    (path("f/<path:path>", PathDownloadView.as_view()), "PathDownloadView at 'f/<path:path>'"),
    (path("f/<path:name>", Private.as_view()), "Private at 'f/<path:name>'"),
    (re_path(r"^f/(?P<path>.+)$", PathDownloadView.as_view()), "PathDownloadView"),
    (path("<path:path>/", include([path("f", PathDownloadView.as_view())])), "'<path:path>/f'"),
    (
        path(
            "f/<path:path>",
            x_accel_redirect(PathDownloadView.as_view(), source_dir="/srv", destination_url="/_srv/"),
        ),
        "PathDownloadView",
    ),
    (path("f/<path:path>", PathDownloadView.as_view(path_url_kwarg="path")), "PathDownloadView"),
    (path("f/<path:path>", PathDownloadView.as_view(root=Path("/srv"))), None),
    (path("f/<path:path>", PathDownloadView.as_view(path_url_kwarg="other")), None),
    (path("f/<path:path>", Rooted.as_view()), None),
    (path("f/<path:path>", Computed.as_view()), None),
    (path("f/<path:path>", Private.as_view()), None),
    (path("f/<path:path>", StorageDownloadView.as_view()), None),
    (path("f", PathDownloadView.as_view(path="/srv/a.txt")), None),
    (path("f", PathDownloadView.as_view(), {"path": "/srv/a.txt"}), None),
]


@pytest.mark.parametrize("pattern, message", PATHS)
def test_a_path_from_the_url_needs_a_root(pattern: Any, message: str | None) -> None:
    found = faults(ROOT_URLCONF=Urls(pattern))
    assert [fault.id for fault in found] == ([] if message is None else ["downloadview_async.E005"])
    if message is not None:
        assert message in found[0].msg
        assert "root=" in str(found[0].hint)


def test_a_urlconf_that_cannot_be_imported_is_not_our_business() -> None:
    assert faults(ROOT_URLCONF="no.such.module") == []
    assert faults(MIDDLEWARE=["no.such.Middleware"]) == []


ABSOLUTE = f"sqlite:{settings.MEDIA_ROOT}/links.db"


@pytest.mark.parametrize(
    "changes, fault, message",
    [
        ({"DOWNLOADVIEW_LINKS": {"STORE": ABSOLUTE, "WHEN_STORE_FAILS": "allow", "SESSION_SECONDS": 60}}, None, ""),
        ({"DOWNLOADVIEW_LINKS": {"KEYS": {"2026a": "x" * 32}, "CLIENT_OF": f"{HERE}.new_middleware"}}, None, ""),
        ({"DOWNLOADVIEW_LINKS": {"STORE": "memory:"}, "DEBUG": True}, None, ""),
        ({"DOWNLOADVIEW_LINKS": {"STORE": "memory:"}}, "W009", "may not share memory:"),
        ({"DOWNLOADVIEW_LINKS": {"STORE": "sqlite:links.db"}}, "W009", "may not share sqlite:links.db"),
        ({"DOWNLOADVIEW_LINKS": {"STORE": "sqlite:/nowhere/links.db"}}, "E008", "'/nowhere/links.db' does not exist"),
        ({"DOWNLOADVIEW_LINKS": {"STORE": "postgres:x"}}, "E008", "there is no such store"),
        ({"DOWNLOADVIEW_LINKS": {"STORE": 5}}, "E008", "store is 5: give a GrantStore"),
        ({"DOWNLOADVIEW_LINKS": {"KEYS": {"2026a": "short"}}}, "E008", "has 5 bytes: give 32 random bytes or more"),
        ({"DOWNLOADVIEW_LINKS": {"STOER": ABSOLUTE}}, "E008", "some of these keys: CLIENT_OF, KEYS"),
        ({"DOWNLOADVIEW_LINKS": ABSOLUTE}, "E008", "has to be a dictionary"),
        ({"DOWNLOADVIEW_LINKS": {"CLIENT_OF": "nowhere.at_all"}}, "E008", "No module named 'nowhere'"),
        ({"DOWNLOADVIEW_LINKS": {"WHEN_STORE_FAILS": "pray", "STORE": ABSOLUTE}}, "E008", 'give "refuse" or "allow"'),
        ({"DOWNLOADVIEW_URL_EXPIRATION": 0}, "E008", "give one second or more"),
        ({"DOWNLOADVIEW_URL_EXPIRATION": "1h"}, "E008", "DOWNLOADVIEW_URL_EXPIRATION"),
    ],
)
def test_links(changes: dict[str, Any], fault: str | None, message: str) -> None:
    messages = faults(**changes)
    assert [each.id for each in messages] == ([] if fault is None else [f"downloadview_async.{fault}"])
    assert all(message in each.msg for each in messages)


LIMITS = "downloadview_async.contrib.django.LimitsMiddleware"
AUTH = "django.contrib.auth.middleware.AuthenticationMiddleware"


@pytest.mark.parametrize(
    ("limits", "middleware", "fault", "message"),
    [
        ({"RATE": "20MB/s", "CLIENT": "user"}, [AUTH, LIMITS], None, ""),
        ({"RATE": "20MB/s", "CLIENT": "user"}, [LIMITS], None, ""),  # another middleware may look users up
        ({"RATE": "20MB/s"}, [LIMITS, AUTH], None, ""),
        ({"RATE": "20MB/s", "CLIENT": "user"}, [LIMITS, AUTH], "W011", "so it knows no user"),
        ({"RATE": "fast"}, [LIMITS], "E010", "'fast' is not a rate"),
        ({"RAET": "20MB/s"}, [], "E010", "some of these keys: CLIENT, CONCURRENT"),
        ({"CLIENT": "link"}, [LIMITS], "E010", "give a function"),
        ({"CLIENT": "nowhere.at_all"}, [LIMITS], "E010", "No module named 'nowhere'"),
        (None, [LIMITS], "E010", "has to be a dictionary"),
        (None, [AUTH], None, ""),
    ],
)
def test_limits(limits: Any, middleware: list[str], fault: str | None, message: str) -> None:
    changes = {} if limits is None else {"DOWNLOADVIEW_LIMITS": limits}
    messages = faults(MIDDLEWARE=middleware, **changes)
    assert [each.id for each in messages] == ([] if fault is None else [f"downloadview_async.{fault}"])
    assert all(message in each.msg for each in messages)
