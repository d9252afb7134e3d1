"""A cache as RFC 9111 wants it: how long an answer is fresh, how old it is, and who may have it without a question."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.routing import Route

import downloadview_async as dv
from downloadview_async import ETag, VirtualFile
from downloadview_async.asgi.server import DownloadProtocol
from downloadview_async.http.dates import format_http_date
from downloadview_async.http.metadata import FileMetadata
from downloadview_async.http.request import GET, DownloadRequest
from downloadview_async.http.upstream import Received
from downloadview_async.sources.cache.freshness import max_age_of
from downloadview_async.sources.memory_storage import OpenBytes
from tests.live import Answer, ask, live
from tests.sources.test_cached import BIG, DAY, Origin, Served, counted, origin, remote, served, serving

__all__ = ["origin", "served"]  # fixtures

NOW = 1_700_000_000


def date(seconds: float) -> str:
    return format_http_date(int(seconds))


HUGE = "9" * 40


@pytest.mark.parametrize(
    "headers, received, expected",
    [
        ({}, {}, DAY),
        ({"cache-control": "max-age=60"}, {}, 60.0),
        ({"cache-control": "max-age=60"}, {"age": 10.0}, 50.0),
        ({"cache-control": "max-age=60"}, {"age": 100.0}, 0.0),
        ({"cache-control": 'MAX-AGE="60"'}, {}, 60.0),
        ({"cache-control": f"max-age={HUGE}"}, {}, DAY),
        ({"cache-control": f"max-age={HUGE}"}, {"age": 2.0**31 - 60}, 60.0),
        ({"cache-control": "max-age=0000000000060"}, {}, 60.0),
        ({"cache-control": "s-maxage=99999999999"}, {"age": 2.0**31 - 60}, 60.0),
        ({"cache-control": f"max-age={HUGE}"}, {"age": 2.0**31}, 0.0),
        ({"cache-control": "max-age=60, max-age=60"}, {}, 60.0),
        ({"cache-control": "max-age=60, max-age=50"}, {}, 0.0),
        ({"cache-control": "max-age=0, s-maxage=60"}, {}, 60.0),
        ({"cache-control": "s-maxage=0, max-age=60"}, {}, 0.0),
        ({"cache-control": "s-maxage=soon, max-age=60"}, {}, 0.0),
        ({"cache-control": "max-age"}, {}, 0.0),
        ({"cache-control": "max-age=6.5"}, {}, 0.0),
        ({"cache-control": "max-age=\u0663"}, {}, 0.0),
        ({"cache-control": "max-age=60, must-revalidate"}, {}, 60.0),
        ({"cache-control": "no-cache, max-age=60"}, {}, 0.0),
        ({"cache-control": 'no-cache="set-cookie", max-age=60'}, {}, 0.0),
        ({"cache-control": "no-store, max-age=60"}, {}, None),
        ({"cache-control": 'private="x", s-maxage=60'}, {}, None),
        ({"cache-control": "x-max-age=5"}, {}, DAY),
        ({"vary": "accept, *"}, {}, None),
        ({"vary": "accept"}, {}, DAY),
        ({"expires": date(NOW + 60)}, {}, 60.0),
        ({"expires": date(NOW + 60)}, {"age": 20.0}, 40.0),
        # by the origin's clock, whatever ours says
        ({"expires": date(NOW + 60)}, {"date": NOW + 30.0}, 30.0),
        ({"expires": date(NOW + 60)}, {"date": NOW - 3600.0, "age": 3600.0}, 60.0),
        ({"expires": date(NOW + 60)}, {"date": NOW + 120.0}, 0.0),
        ({"expires": date(NOW + 60), "cache-control": "max-age=5"}, {}, 5.0),
        ({"expires": "0"}, {}, 0.0),
        ({"expires": "-1"}, {}, 0.0),
        ({"expires": f"{date(NOW + 60)}, {date(NOW + 60)}"}, {}, 0.0),
        ({"expires": date(NOW + 10 * DAY)}, {}, DAY),
    ],
)
def test_how_long_an_answer_is_fresh(headers: dict[str, str], received: Any, expected: float | None) -> None:
    metadata = FileMetadata(headers=tuple(headers.items()))
    answered = Received(**{"date": float(NOW), "at": float(NOW), **received})
    assert max_age_of(None, metadata, DAY, answered) == expected


async def ages(served: Served, times: int = 2) -> list[str | None]:
    found = []
    for _ in range(times):
        found.append((await served.get()).headers.get("age"))
        await served.settled()
    return found


@pytest.mark.asyncio
async def test_a_kept_answer_carries_its_age_and_the_first_one_does_not(origin: Origin, served: Served) -> None:
    assert await ages(served) == [None, "0"]
    kept = await served.cache.find(served.source.name, "a.bin")
    assert kept is not None
    served.cache.remember(served.source.name, "a.bin", replace(kept.entry, validated=kept.entry.validated - 100))
    for method, fields, status in (
        ("GET", {}, 200),
        ("HEAD", {}, 200),
        ("GET", {"Range": "bytes=0-1"}, 206),
        ("GET", {"Range": "bytes=0-1,9-10"}, 206),
        ("GET", {"If_None_Match": '"v1"'}, 304),
    ):
        for _ in range(2):
            answer = await served.get(method=method, **fields)
            assert (answer.status, int(answer.headers["age"]) // 10) == (status, 10)
    for fields, status in (({"If_Match": '"v2"'}, 412), ({"Range": "bytes=99999999-"}, 416)):
        answer = await served.get(**fields)
        assert (answer.status, "age" in answer.headers) == (status, False)
    assert len(origin.requests) == 1


@pytest.mark.asyncio
async def test_the_age_of_an_answer_that_is_prepared_goes_on(origin: Origin, tmp_path: Path) -> None:
    """Small files are sent by our protocol with a head that is kept."""
    origin.content = b"small"
    async with serving(remote(origin), tmp_path) as served:
        app = Starlette(routes=[Route("/{path:path}", dv.Download(served.source))])
        async with live(app, http=DownloadProtocol) as port:
            served.port = port
            await ages(served, 1)
            for past in (10, 20):
                kept = await served.cache.find(served.source.name, "a.bin")
                assert kept is not None
                past_entry = replace(kept.entry, validated=time.time() - past)
                served.cache.remember(served.source.name, "a.bin", past_entry)
                answer = await served.get()
                assert (answer.body, answer.headers["age"]) in [(b"small", str(past + late)) for late in range(5)]


@pytest.mark.asyncio
async def test_an_object_whose_file_is_kept_has_the_age_of_the_file(origin: Origin, served: Served) -> None:
    async def get(key: str) -> Any:
        return SimpleNamespace(file="a.bin")

    endpoint = dv.Download(dv.ObjectSource(get, source=served.source), key="path")
    app = Starlette(routes=[Route("/{path}", endpoint)])
    async with live(app) as port:
        assert "age" not in (await ask(port, "/k")).headers
        await served.settled()
        assert (await ask(port, "/k")).headers["age"].isdigit()
    assert len(origin.requests) == 1


@pytest.mark.asyncio
async def test_the_age_of_the_upstream_counts(origin: Origin, served: Served) -> None:
    origin.headers += ["Cache-Control: max-age=100", "Age: 90"]
    first, second = await ages(served)
    assert first in ("90", "91")
    assert second in ("90", "91", "92")
    kept = await served.cache.find(served.source.name, "a.bin")
    assert kept is not None
    assert 0 < kept.entry.fresh_for(DAY) <= 10
    assert len(origin.requests) == 1


@pytest.mark.parametrize(
    "headers, asked",
    [
        (["Cache-Control: max-age=100", "Age: 100"], 2),
        (["Cache-Control: max-age=100", "Age: 1, 100"], 1),
        (["Cache-Control: max-age=100", "Age: soon"], 1),
        (["Cache-Control: max-age=100", "Age: -100"], 1),
        ([f"Age: {HUGE}"], 1),
        (["Age: 9000000"], 1),  # how long a file without a word is kept counts from here
        ([f"Expires: {date(time.time() + 1000)}", f"Date: {date(time.time() + 2000)}"], 2),
        ([f"Expires: {date(time.time() + 3000)}", f"Date: {date(time.time() + 2000)}"], 1),
        ([f"Expires: {date(time.time() - 1000)}", f"Date: {date(time.time() - 2000)}"], 2),
        (["Cache-Control: max-age=1000", f"Date: {date(time.time() - 2000)}"], 2),
        (["Cache-Control: max-age=1000", f"Date: {date(time.time() + 2000)}"], 1),
        (["Cache-Control: max-age=1000", "Date: yesterday"], 1),
    ],
)
@pytest.mark.asyncio
async def test_what_an_upstream_says_of_time(origin: Origin, served: Served, headers: list[str], asked: int) -> None:
    origin.headers += headers
    await ages(served)
    assert len(origin.requests) == asked


@pytest.mark.asyncio
async def test_a_304_changes_what_is_known_of_the_file(origin: Origin, tmp_path: Path) -> None:
    origin.headers += ["Cache-Control: no-cache", "Content-Language: de"]
    async with serving(remote(origin), tmp_path) as served:
        await ages(served, 1)
        origin.headers[-2:] = ["Cache-Control: max-age=60", "Age: 7", "Vary: Accept", "Content-Language: en"]
        renewed = await served.get()
        assert (renewed.body, renewed.headers["cache-control"]) == (BIG, "max-age=60")
        assert (renewed.headers["vary"], renewed.headers["content-language"]) == ("Accept", "de")
        assert renewed.headers["age"] in ("7", "8")
        assert (await served.get()).body == BIG
        assert len(origin.requests) == 2
    async with serving(remote(origin), tmp_path) as served:  # it is on the disk, too
        assert (await served.get()).headers["cache-control"] == "max-age=60"
    assert len(origin.requests) == 2


@pytest.mark.asyncio
async def test_a_304_that_forbids_to_keep_the_file(origin: Origin, served: Served) -> None:
    origin.headers.append("Cache-Control: no-cache")
    await ages(served, 1)
    origin.headers[-1] = "Cache-Control: no-store"
    assert (await served.get()).body == BIG
    await served.settled()
    assert served.data() == []


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.asyncio
async def test_a_busy_upstream_is_passed_on_to_all_who_wait(origin: Origin, served: Served, status: int) -> None:
    origin.status = f"{status} Busy"
    origin.headers = ["Retry-After: 17"]
    answers = await asyncio.gather(*[served.get() for _ in range(3)])
    assert [(answer.status, answer.headers["retry-after"]) for answer in answers] == [(status, "17")] * 3


# Who joins what arrives


async def arriving(origin: Origin, served: Served, path: str = "/a.bin") -> "asyncio.Task[Answer]":
    """Begin a download that stops in the midst, and return when the source has answered."""
    origin.held_from = 1_000_000
    first = asyncio.create_task(served.get(path))
    await origin.has_open(1)
    while not any(fetch.arriving.arrived for fetch in served.cache._running):
        await asyncio.sleep(0)
    return first


@pytest.mark.parametrize(
    "header",
    ["Cache-Control: no-cache", "Cache-Control: max-age=0", "Expires: 0", "Cache-Control: s-maxage=5\r\nAge: 5"],
)
@pytest.mark.asyncio
async def test_one_who_joins_late_asks_whether_the_file_is_current(origin: Origin, served: Served, header: str) -> None:
    origin.headers.append(header)
    first = await arriving(origin, served)
    same = asyncio.create_task(served.get())
    while len(origin.requests) < 2:
        await asyncio.sleep(0.001)
    origin.gate.set()
    assert [answer.body == BIG for answer in await asyncio.gather(first, same)] == [True, True]
    assert len(origin.requests) == 2
    assert 'if-none-match: "v1"' in origin.requests[1].lower()


async def asked_before_it_is_complete(origin: Origin, served: Served, then: list[str] | None = None) -> Answer:
    """Ask for a file that arrives, and have the upstream answer when all of it has: with other headers, if `then`."""
    first = await arriving(origin, served)
    held = asyncio.Event()
    answer = origin._answer

    async def later(head: str, *arguments: Any) -> bool:
        if "if-none-match" in head.lower():
            await held.wait()
        return await answer(head, *arguments)

    origin._answer = later  # type: ignore[method-assign, assignment]
    fetching = [fetch.task for fetch in served.cache._running]
    late = asyncio.create_task(served.get())
    await origin.has_open(2)
    origin.gate.set()
    assert (await first).body == BIG
    await asyncio.wait(fetching)
    origin.headers, origin.held_from = then or origin.headers, None
    held.set()
    return await late


@pytest.mark.parametrize("has_length", [True, False], ids=["length", "chunked"])
@pytest.mark.asyncio
async def test_what_is_complete_by_the_time_it_is_confirmed_is_not_fetched_again(
    origin: Origin, served: Served, has_length: bool
) -> None:
    origin.is_chunked = not has_length
    origin.headers.append("Cache-Control: no-cache")
    renewed = ['ETag: "v1"', "Cache-Control: max-age=60"]
    late = await asked_before_it_is_complete(origin, served, renewed)
    assert (late.status, late.body, late.headers["cache-control"]) == (200, BIG, "max-age=60")
    assert (await served.get()).body == BIG  # it is fresh from then on
    assert len(origin.requests) == 2


@pytest.mark.parametrize("news", [['ETag: "v1"', "Cache-Control: no-store"], ['ETag: "v2"', "Cache-Control: no-cache"]])
@pytest.mark.asyncio
async def test_what_is_complete_and_not_confirmed_is_fetched_again(
    origin: Origin, served: Served, news: list[str]
) -> None:
    origin.headers.append("Cache-Control: no-cache")
    late = await asked_before_it_is_complete(origin, served, news)
    assert (late.status, late.body, late.headers["etag"]) == (200, BIG, news[0].partition(" ")[2])
    await served.settled()
    assert len(served.data()) == (0 if "no-store" in news[1] else 1)


@pytest.mark.parametrize("has_tag", [True, False])
@pytest.mark.asyncio
async def test_one_who_joins_late_gets_the_new_version(origin: Origin, served: Served, has_tag: bool) -> None:
    tag = origin.headers.pop(0)
    origin.headers += ["Cache-Control: no-cache", *([tag] if has_tag else [])]
    first = await arriving(origin, served)
    origin.content, origin.headers[-1] = b"the new one", 'ETag: "v2"' if has_tag else "Cache-Control: max-age=0"
    origin.held_from = None
    assert (await served.get()).body == b"the new one"
    origin.gate.set()
    assert (await first).body == BIG
    await served.settled()
    assert (await served.get()).body == b"the new one"


@pytest.mark.asyncio
async def test_those_who_have_asked_before_the_answer_share_it(origin: Origin, served: Served) -> None:
    origin.headers.append("Cache-Control: no-cache")
    origin.held_from = 0
    held = asyncio.Event()
    answer = origin._answer

    async def later(*arguments: Any) -> bool:
        await held.wait()
        return await answer(*arguments)

    origin._answer = later  # type: ignore[method-assign, assignment]
    clients = [asyncio.create_task(served.get()) for _ in range(5)]
    await origin.has_open(1)
    while sum(fetch._clients for fetch in served.cache._running) < 5:
        await asyncio.sleep(0.001)
    held.set()
    origin.gate.set()
    answers = await asyncio.gather(*clients)
    assert [answer.body == BIG for answer in answers] == [True] * 5
    assert ["age" in answer.headers for answer in answers] == [False] * 5
    assert len(origin.requests) == 1


@pytest.mark.asyncio
async def test_a_file_that_is_fresh_is_joined_without_a_question_and_has_an_age(origin: Origin, served: Served) -> None:
    origin.headers.append("Cache-Control: max-age=60")
    first = await arriving(origin, served)
    late = asyncio.create_task(served.get())
    while sum(fetch._clients for fetch in served.cache._running) < 2:
        await asyncio.sleep(0.001)
    origin.gate.set()
    assert "age" not in (await first).headers
    assert int((await late).headers["age"]) < 30
    assert len(origin.requests) == 1


@pytest.mark.asyncio
async def test_one_who_leaves_does_not_end_what_another_has_confirmed(origin: Origin, served: Served) -> None:
    origin.headers.append("Cache-Control: no-cache")
    first = await arriving(origin, served)
    late = asyncio.create_task(served.get())
    while len(origin.requests) < 2:
        await asyncio.sleep(0.001)
    first.cancel()
    origin.gate.set()
    assert (await late).body == BIG


@pytest.mark.parametrize("max_age, times", [(0, 2), (60, 1)])
@pytest.mark.asyncio
async def test_a_generated_file_that_is_being_made(tmp_path: Path, max_age: float, times: int) -> None:
    made: list[str] = []
    go_on = asyncio.Event()

    async def content() -> Any:
        made.append("")
        yield b"a" * 1000
        await go_on.wait()
        yield b"b"

    source = dv.VirtualSource(lambda name: VirtualFile(content, name=name, max_age=max_age))
    async with serving(source, tmp_path) as served:
        first = asyncio.create_task(served.get())
        while not any(fetch.arriving.arrived for fetch in served.cache._running):
            await asyncio.sleep(0.001)
        late = asyncio.create_task(served.get())
        while len(made) < times or sum(fetch._clients for fetch in served.cache._running) < 2:
            await asyncio.sleep(0.001)
        go_on.set()
        assert [answer.body for answer in (await first, await late)] == [b"a" * 1000 + b"b"] * 2
        assert len(made) == times


@pytest.mark.asyncio
async def test_a_late_asker_of_a_generated_file_with_a_tag_joins_it(tmp_path: Path) -> None:
    made: list[str] = []
    go_on = asyncio.Event()

    async def content() -> Any:
        made.append("")
        yield b"a" * 1000
        await go_on.wait()

    source = dv.VirtualSource(lambda name: VirtualFile(content, name=name, etag=ETag("v"), max_age=0))
    async with serving(source, tmp_path) as served:
        first = asyncio.create_task(served.get())
        while not any(fetch.arriving.arrived for fetch in served.cache._running):
            await asyncio.sleep(0.001)
        late = asyncio.create_task(served.get())
        while sum(fetch._clients for fetch in served.cache._running) < 3:  # the late one is there, and asks
            await asyncio.sleep(0.001)
        go_on.set()
        assert [len(answer.body) for answer in (await first, await late)] == [1000, 1000]
        assert len(made) == 1


# Validators of copies


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [f"Last-Modified: {date(0)}"],
        [f"Last-Modified: {date(1)}"],
        [f"Last-Modified: {date(315_532_800)}"],
        [f"Last-Modified: {date(499_162_500)}"],
        [f"Last-Modified: {date(NOW)}", f"Date: {date(NOW)}"],
        [f"Last-Modified: {date(NOW + 5)}", f"Date: {date(NOW)}"],
    ],
    ids=["none", "0", "1", "1980", "npm", "now", "future"],
)
@pytest.mark.asyncio
async def test_a_copy_of_a_version_without_a_strong_validator_is_never_taken_for_another(
    origin: Origin, tmp_path: Path, headers: list[str]
) -> None:
    origin.headers = headers
    async with serving(remote(origin), tmp_path, max_age=0) as served:
        first = await served.get()
        await served.settled()
        origin.content = BIG[::-1]
        second = await served.get(If_None_Match=first.headers["etag"])
        assert (second.status, second.body) == (200, BIG[::-1])
        await served.settled()
        origin.content = BIG
        resumed = await served.get(Range="bytes=5-", If_Range=first.headers["etag"])
        assert (resumed.status, resumed.body) == (200, BIG)
        assert "last-modified" not in resumed.headers
        assert not any("if-modified-since" in request.lower() for request in origin.requests)


class Constant:
    """A source of one version after another, all of which have the same Last-Modified."""

    def __init__(self, modified: int) -> None:
        self.content = b"one"
        self.modified = modified
        self.asked: list[DownloadRequest] = []
        self.name = "a.bin"
        self.location = None

    async def resolve(self, name: str) -> "Constant":
        return self

    @asynccontextmanager
    async def open(self, request: DownloadRequest = GET) -> AsyncIterator[OpenBytes]:
        self.asked.append(request)
        yield OpenBytes(self.content, FileMetadata(size=len(self.content), last_modified=self.modified))


@pytest.mark.parametrize("modified, is_kept", [(0, False), (1, False), (315_532_800, False), (NOW, True)])
@pytest.mark.asyncio
async def test_a_cache_believes_no_time_that_says_nothing_whoever_says_it(
    tmp_path: Path, modified: int, is_kept: bool
) -> None:
    source = Constant(modified)
    async with serving(source, tmp_path, max_age=0) as served:
        first = await served.get()
        await served.settled()
        source.content = b"two"
        again = await served.get(If_None_Match=first.headers.get("etag", '"x"'))
        assert (again.status, again.body) == (200, b"one" if is_kept else b"two")
        assert [request.if_modified_since for request in source.asked[1:]] == [date(NOW) if is_kept else None]


@pytest.mark.parametrize("modified, times", [(0, 3), (315_532_800, 3), (NOW, 1)])
@pytest.mark.asyncio
async def test_a_generated_file_of_a_time_that_says_nothing_is_not_kept(
    tmp_path: Path, modified: int, times: int
) -> None:
    made: list[str] = []
    async with serving(dv.VirtualSource(counted(made, last_modified=modified)), tmp_path) as served:
        for _ in range(3):
            assert (await served.get("/x")).complete
            await served.settled()
    assert len(made) == times
    found = max_age_of(
        VirtualFile(b"", name="a"), FileMetadata(last_modified=modified), DAY, Received(date=NOW, at=NOW)
    )
    assert found == (DAY if times == 1 else None)
