"""The error tree: as drawn, and complete against the errors of the HTTP clients."""

import pickle
import re
from collections.abc import Callable
from copy import copy
from http import HTTPStatus

import httpx2
import pytest

from downloadview_async import errors
from downloadview_async.sources.remote.httpx_client import ERRORS, client_error

CLASSES = {
    name: value for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, BaseException)
}
NODE = re.compile(r"    ([│├└─ ]*)([A-Z]\w+)(?: +([0-9]{3}) )?")


def drawn() -> list[tuple[int, str, int | None]]:
    """The tree in the docstring: the depth, the name and the status of every node in it."""
    assert errors.__doc__ is not None
    nodes = filter(None, map(NODE.match, errors.__doc__.splitlines()))
    return [(len(node[1]) // 4, node[2], int(node[3]) if node[3] else None) for node in nodes]


def test_every_error_is_drawn_once() -> None:
    assert sorted(name for _, name, _ in drawn()) == sorted(CLASSES)


def test_the_tree_is_drawn_as_it_is() -> None:
    path: list[str] = []
    for depth, name, status in drawn():
        del path[depth:]
        parent = CLASSES[path[-1]] if path else Exception
        assert parent in CLASSES[name].__bases__, f"{name} is drawn below {parent.__name__}"
        if status is not None:
            assert CLASSES[name].__dict__["status"] == HTTPStatus(status)
        path.append(name)


def test_the_drawing_gives_the_status_of_everything_that_becomes_one() -> None:
    with_status = {name for _, name, status in drawn() if status is not None}
    assert with_status == {name for name, cls in CLASSES.items() if issubclass(cls, errors.FileError)} - {"FileError"}


def test_what_a_client_may_not_see_has_the_status_of_what_is_not_there() -> None:
    assert errors.AccessDenied.status == errors.FileMissing.status


def test_a_configuration_error_is_a_value_error_and_no_answer() -> None:
    assert issubclass(errors.ConfigurationError, ValueError)
    assert not issubclass(errors.ConfigurationError, errors.FileError)


def test_what_aborts_a_connection_is_no_answer() -> None:
    assert not issubclass(errors.TransferAborted, errors.FileError)


class OwnError(errors.FileError):
    """An error of an application, made in its own way."""

    def __init__(self, *, quota: int) -> None:
        super().__init__(f"the quota is {quota}")
        self.quota = quota


MADE = [
    errors.FileMissing("why"),
    errors.AuthenticationRequired("why", challenge="Basic"),
    errors.ArchiveTooLarge("why", "the limit"),
    errors.LimitExceeded("1 MB/h", wait=7.5),
    errors.UpstreamBusy("why", status=429, retry_after="9"),
    errors.TransferAborted("why", reason="file-changed"),
    errors.ConfigurationError("why"),
    OwnError(quota=3),
]


@pytest.mark.parametrize("exc", MADE, ids=lambda exc: type(exc).__name__)
@pytest.mark.parametrize("again", [copy, lambda exc: pickle.loads(pickle.dumps(exc))], ids=["copy", "pickle"])
def test_an_error_can_be_copied(exc: errors.DownloadError, again: Callable[[Exception], Exception]) -> None:
    """A cache raises the failure of one fetch once for each client that waits for it."""
    other = again(exc)
    assert other is not exc
    assert (type(other), str(other), other.args, vars(other)) == (type(exc), str(exc), exc.args, vars(exc))


def test_a_class_of_an_application_may_have_a_number_for_its_status() -> None:
    class Unpaid(errors.FileError):
        status = 402  # type: ignore[assignment]

    exc = Unpaid("account 7 has not paid")
    assert (exc.status_code, exc.detail, exc.text) == (402, "Payment Required", "Payment Required")


CLIENT_ERRORS = [value for value in vars(httpx2).values() if isinstance(value, type) and issubclass(value, Exception)]


def raised(cls: type[Exception]) -> Exception:
    """An exception of this class, made without the arguments that each of them wants in its own way."""
    exc = cls.__new__(cls)
    Exception.__init__(exc, "why")
    return exc


@pytest.mark.parametrize("cls", CLIENT_ERRORS, ids=lambda cls: cls.__name__)
def test_every_error_of_the_http_client_is_one_of_ours(cls: type[Exception]) -> None:
    error = client_error(raised(cls))
    assert isinstance(error, errors.FileError)
    if issubclass(cls, httpx2.PoolTimeout):
        expected: type[errors.FileError] = errors.SourceUnavailable
    elif issubclass(cls, httpx2.TimeoutException):
        expected = errors.UpstreamTimeout
    else:
        expected = errors.UpstreamError
    assert type(error) is expected
    assert str(error) == f"{cls.__name__}: why"


def test_the_client_has_errors_of_every_kind_in_the_table() -> None:
    assert len(CLIENT_ERRORS) > 20
    assert ERRORS.keys() <= {cls.__name__ for cls in CLIENT_ERRORS}


@pytest.mark.parametrize("exc", [ValueError("x"), OSError("x"), KeyError("x"), TimeoutError("x")])
def test_an_error_of_no_client_is_not_the_upstreams_fault(exc: Exception) -> None:
    assert client_error(exc) is None


def test_a_class_of_another_library_is_not_taken_for_the_clients_by_its_name() -> None:
    assert client_error(type("HTTPError", (Exception,), {"__module__": "elsewhere"})("x")) is None
