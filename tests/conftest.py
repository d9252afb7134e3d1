"""What tests of several rooms need."""

import gc
import logging
import os
from collections.abc import Generator, Iterator

import pytest
from hypothesis import settings

from downloadview_async.sources.local import open_file, open_file_cache
from tests.certificates import make_certificate
from tests.gcs import GCS, gcs_server
from tests.s3 import S3, s3_server

# The same examples in every run, and no timing as a verdict. HYPOTHESIS_PROFILE=explore looks for new ones.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.register_profile("explore", max_examples=5000, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Keep the garbage collector from the tests: it would look at thousands of them again and again to free none."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish() -> None:
    """Give the tests back to the garbage collector, of which hypothesis asks who holds what."""
    gc.unfreeze()


@pytest.fixture(autouse=True)
def no_refused_call_is_remembered() -> Iterator[None]:
    """Forget which devices refuse a system call: a test for one kind of file would slow down all later ones."""
    yield
    open_file._reads_of_cached_pages.devices.clear()


@pytest.fixture(autouse=True)
def no_setting_is_left_in_the_environment() -> Iterator[None]:
    """Restore the variables of the service: a command that is called in this process leaves them to its workers."""
    before = {name: value for name, value in os.environ.items() if name.startswith("DOWNLOADVIEW_")}
    yield
    for name in [name for name in os.environ if name.startswith("DOWNLOADVIEW_")]:
        del os.environ[name]
    os.environ.update(before)


_LOGGERS = [logging.getLogger(name) for name in ("downloadview_async", "uvicorn", "uvicorn.error", "uvicorn.access")]
_AS_THEY_ARE = [(one.level, one.propagate, one.disabled, one.handlers[:]) for one in _LOGGERS]


@pytest.fixture(autouse=True)
def loggers_are_as_at_the_start() -> None:
    """Restore the loggers: a command that was called in this process has configured them as for a service."""
    for one, (level, propagate, disabled, handlers) in zip(_LOGGERS, _AS_THEY_ARE, strict=True):
        if (one.level, one.propagate, one.disabled, one.handlers) != (level, propagate, disabled, handlers):
            one.setLevel(level)
            one.propagate, one.disabled, one.handlers = propagate, disabled, handlers[:]


@pytest.fixture
def files_are_kept_briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep files open for 0.1 s after requests, so that a test need not wait a second until all are closed."""
    monkeypatch.setattr(open_file_cache, "KEEP_SECONDS", 0.1)


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    """A real S3 server with an empty bucket."""
    with s3_server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture(scope="session")
def gcs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GCS]:
    """A server of Google Cloud Storage's protocol with an empty bucket."""
    with gcs_server(tmp_path_factory.mktemp("gcs") / "log") as server:
        yield server


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A certificate for localhost and its key, as the options of uvicorn."""
    return make_certificate(tmp_path_factory.mktemp("tls"))
