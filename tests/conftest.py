"""What tests of several rooms need."""

import gc
from collections.abc import Generator, Iterator

import pytest

from tests.gcs import GCS, gcs_server
from tests.s3 import S3, s3_server


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Collect without the garbage collector, which would look at thousands of tests again and again to free none."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


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
