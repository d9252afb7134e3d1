"""`/-/metrics`: the numbers of all worker processes, if the settings have a `[metrics]` table."""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Self

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from downloadview_async import Cache, Metrics, Source, SourceUnavailable, URLSigner
from downloadview_async.service.limits import ServiceLimits
from downloadview_async.service.settings import Settings

PAGE = "metrics"
"""The name of the page below `/-/`. Printed proxy configurations hide it from clients, unless `metrics.public`."""

_PREFIX, _OWNER = "downloadview-metrics-", "owner"
_MEMORY = "/dev/shm"  # noqa: S108  # a new directory is made in it, for this user alone


def metrics_of(
    settings: Settings,
    sources: Mapping[str, Source],
    caches: Mapping[str, Cache],
    signer: URLSigner | None,
    limits: ServiceLimits,
) -> Metrics | None:
    """Return the metrics of the service, or None without a `[metrics]` table. Raises `ConfigurationError`."""
    if settings.metrics is None:
        return None
    with settings.blaming("metrics"):
        metrics = Metrics(settings.metrics.directory)
    for name, source in sources.items():
        metrics.add_source(name, source)
    for name, cache in caches.items():
        metrics.add_cache(name, cache)
    for name, of_source in limits.sources.items():
        metrics.add_source(f"{name}.max_requests", of_source)
    if limits.common is not None:
        metrics.add_limits("all", limits.common)
    for index, of_route in limits.routes.items():
        metrics.add_limits(settings.routes[index].path, of_route)
    if signer is not None:
        metrics.add_links(signer)
    return metrics


class MetricsPage:
    """Answers `/-/metrics`, in the text format that the client accepts."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    async def answer(self, request: Request) -> Response:
        """Answer 200 with OpenMetrics if the client accepts that, else with the text format of Prometheus.

        Raises `SourceUnavailable`, which is answered by 503, if the numbers of the processes cannot be added up.
        """
        try:
            text, media_type = await self._metrics.render(request.headers.get("accept", ""))
        except OSError as exc:
            raise SourceUnavailable(f"the numbers of the processes cannot be added up: {exc}") from exc
        headers = {"Content-Type": media_type, "Cache-Control": "no-store", "Vary": "Accept"}
        return Response(text, headers=headers | {"X-Content-Type-Options": "nosniff"})


class SharedDirectory:
    """The directory in which several workers add up their numbers: made when they need one, and removed at the end."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._directory: str | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def added_to(self, settings: Settings) -> Settings:
        """Return the settings of workers: with the directory, if they have metrics and no directory of the user.

        Raises `OSError`.
        """
        if settings.metrics is None or settings.metrics.directory is not None:
            return settings
        if self._directory is None:
            self._directory = self._stack.enter_context(_temporary_directory())
        return replace(settings, metrics=msgspec.structs.replace(settings.metrics, directory=self._directory))


@contextmanager
def _temporary_directory() -> Iterator[str]:
    """Make a directory, and remove it at the end, and now those that killed processes of this user have left."""
    place = _MEMORY if os.access(_MEMORY, os.W_OK) else tempfile.gettempdir()
    for old in Path(place).glob(f"{_PREFIX}*"):
        _remove_left(old)
    with tempfile.TemporaryDirectory(prefix=_PREFIX, dir=place, ignore_cleanup_errors=True) as directory:
        owner = os.open(os.path.join(directory, _OWNER), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(owner, fcntl.LOCK_EX)
            yield directory
        finally:
            os.close(owner)


def _remove_left(directory: Path) -> None:
    """Remove a directory whose process has ended."""
    try:
        if directory.lstat().st_uid != os.geteuid():
            return
        owner = os.open(directory / _OWNER, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:  # another process removes it, or has just made it
        return
    try:
        fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(directory, ignore_errors=True)
    except BlockingIOError:
        pass
    finally:
        os.close(owner)
