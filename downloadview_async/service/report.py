"""`downloadview account` and `downloadview report`: count the log of a proxy, and print how often files were sent."""

import csv
import io
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import anyio

from downloadview_async import ConfigurationError, ProxyLog
from downloadview_async.service.accounts import check_completions, required_store
from downloadview_async.service.logs import one_line
from downloadview_async.service.settings import Settings

_COUNTS = ("downloads", "answers", "bytes")


async def account(settings: Settings, log: str, *, follow: bool) -> int:
    """Count what a log of the proxy says, and return how many answers that were. follow: go on until this is cancelled.

    Raises `ConfigurationError` if the log cannot be read, or the database cannot be used.
    """
    store = required_store(settings)
    await check_completions(settings, store)
    try:
        proxy_log = ProxyLog(log, store)
        if follow:
            await proxy_log.follow()
        try:
            return await proxy_log.add()
        except OSError as exc:
            raise ConfigurationError(
                f"{log}: the log cannot be read ({exc.strerror}): give a file that exists"
            ) from exc
    finally:
        with anyio.CancelScope(shield=True):
            await store.aclose()


async def report(
    settings: Settings, *, by: Sequence[Any], since: timedelta | None, top: int | None
) -> list[dict[str, Any]]:
    """Return the rows of `CompletionStore.report`. Raises `ConfigurationError` if the database cannot be used."""
    store = required_store(settings)
    await check_completions(settings, store)
    try:
        return await store.report(by, since=since, top=top)
    finally:
        await store.aclose()


def table_of(rows: Sequence[Mapping[str, Any]], by: Sequence[str]) -> str:
    """Return the rows of a report as a table for people, a line each."""
    texts = [[one_line(row[unit] or "-") for unit in by] for row in rows]
    counts = [[str(row[name]) for name in _COUNTS] for row in rows]
    cells = [[*_COUNTS, *by], *(numbers + units for numbers, units in zip(counts, texts, strict=True))]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "".join(
        "  ".join(
            cell.rjust(width) if column < len(_COUNTS) else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        + "\n"
        for line in cells
    )


def csv_of(rows: Sequence[Mapping[str, Any]], by: Sequence[str]) -> str:
    """Return the rows of a report as CSV [RFC 4180], with a header."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [*by, *_COUNTS])
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
