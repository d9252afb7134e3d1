"""Stale answers of a cache [RFC 5861], and what Cache-Status and Age say of each answer [RFC 9211, RFC 9111]."""

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.routing import Route

import downloadview_async as dv
from downloadview_async.asgi.server import DownloadProtocol
from downloadview_async.http.metadata import FileMetadata
from downloadview_async.sources.cache import index
from downloadview_async.sources.cache.freshness import stale_seconds
from tests.live import Answer, live
from tests.sources.test_cached import BIG, Origin, Served, origin, remote, serving

__all__ = ["origin"]  # a fixture

HIT = "downloadview; hit"
MISS = "downloadview; fwd=miss; stored"
SAME = "downloadview; fwd=stale; fwd-status=304"
WHILE = "; detail=stale-while-revalidate"
ON_ERROR = "downloadview; fwd=stale; detail=stale-if-error"


@pytest.mark.parametrize(
    "cache_control, expected",
    [
        ("", (10.0, 20.0)),
        ("max-age=5, stale-while-revalidate=30", (30.0, 20.0)),
        ("max-age=5, Stale-If-Error=40", (10.0, 40.0)),
        ("max-age=5, stale-while-revalidate=0, stale-if-error=0", (0.0, 0.0)),
        ("max-age=5, stale-while-revalidate=soon, stale-if-error=-1", (0.0, 0.0)),
        ("max-age=5, stale-if-error=5, stale-if-error=6", (10.0, 0.0)),
        ("stale-if-error=60, must-revalidate", (0.0, 0.0)),
        ("stale-if-error=60, proxy-revalidate", (0.0, 0.0)),
        ("stale-if-error=60, s-maxage=5", (0.0, 0.0)),
        ("stale-if-error=60, no-cache", (0.0, 0.0)),
        ("stale-if-error=60, x-s-maxage=5", (10.0, 60.0)),
    ],
)
def test_how_long_a_stale_copy_may_be_sent(cache_control: str, expected: tuple[float, float]) -> None:
    metadata = FileMetadata(headers=(("cache-control", cache_control),) if cache_control else ())
    assert stale_seconds(metadata, while_revalidate=10.0, if_error=20.0) == expected


@pytest.mark.parametrize("option", ["stale_while_revalidate", "stale_if_error"])
@pytest.mark.parametrize("value", [-1, True, "60", float("nan")])
def test_wrong_times_are_refused(tmp_path: Path, option: str, value: Any) -> None:
    options: dict[str, Any] = {option: value}
    with pytest.raises(dv.ConfigurationError, match=f"{option} must be a number of seconds"):
        dv.Cache(tmp_path, **options)


async def grow_old(served: Served, seconds: float, name: str = "a.bin") -> None:
    """Let the kept file have been validated so many seconds earlier."""
    kept = await served.cache.find(served.source.name, name)
    assert kept is not None
    entry = replace(kept.entry, validated=kept.entry.validated - seconds)
    served.cache.directory.renew(served.source.name, name, entry)
    served.cache.remember(served.source.name, name, entry)


async def filled(served: Served, *names: str) -> None:
    for name in names or ("a.bin",):
        assert (await served.get(f"/{name}")).status == 200
    await served.settled()


async def settled_in_the_background(served: Served) -> None:
    while tasks := list(served.cache._revalidating.values()):
        await asyncio.wait(tasks)
    await served.settled()


def status(answer: Answer) -> str:
    return answer.headers.get("cache-status", "")


@pytest.mark.asyncio
async def test_cache_status_and_age_of_each_answer(origin: Origin, tmp_path: Path) -> None:
    async with serving(remote(origin), tmp_path, max_age=100) as served:
        head = await served.get(method="HEAD")
        assert (status(head), "age" in head.headers) == ("downloadview; fwd=miss", False)
        first = await served.get()
        assert (status(first), "age" in first.headers) == (MISS, False)
        await served.settled()
        for method, fields, code in (
            ("GET", {}, 200),
            ("HEAD", {}, 200),
            ("GET", {"Range": "bytes=0-1"}, 206),
            ("GET", {"If_None_Match": '"v1"'}, 304),
            ("GET", {"Range": "bytes=99999999-"}, 416),
            ("GET", {"If_Match": '"v2"'}, 412),
        ):
            answer = await served.get(method=method, **fields)
            assert (answer.status, status(answer)) == (code, HIT)
        await grow_old(served, 150)
        again = await served.get()
        assert (status(again), again.headers["age"]) == (SAME, "0")
        kept = await served.get()
        assert (status(kept), int(kept.headers["age"]) < 100) == (HIT, True)
        await grow_old(served, 150)
        origin.headers[0] = 'ETag: "v2"'
        assert status(await served.get()) == "downloadview; fwd=stale; stored"
        await served.settled()
        assert status(await served.get()) == HIT


@pytest.mark.asyncio
async def test_clients_that_join_a_fill_are_collapsed(origin: Origin, tmp_path: Path) -> None:
    origin.held_from = 10
    async with serving(remote(origin), tmp_path) as served:
        answers = [asyncio.create_task(served.get()) for _ in range(5)]
        await origin.has_open(1)
        while [fill._clients for fill in served.cache._running] != [5]:
            await asyncio.sleep(0)
        origin.gate.set()
        told = sorted([status(await answer) for answer in answers])
        assert told == ["downloadview; fwd=miss; collapsed"] * 4 + [MISS]
        assert len(origin.requests) == 1


@pytest.mark.asyncio
async def test_what_the_upstream_says_of_its_caches_is_not_passed_on(origin: Origin, tmp_path: Path) -> None:
    origin.headers += ["Cache-Status: inner.example.net; hit", "Via: 1.1 inner.example.net", "Cache-Control: private"]
    async with serving(remote(origin), tmp_path) as served:
        for _ in range(2):
            answer = await served.get()
            assert status(answer) == "downloadview; fwd=miss"
            assert "inner" not in str(answer.headers)
        await served.settled()
        assert not served.files()


@pytest.mark.asyncio
async def test_our_protocol_sends_it_with_a_prepared_head(origin: Origin, tmp_path: Path) -> None:
    origin.content = b"small"
    async with serving(remote(origin), tmp_path) as served:
        app = Starlette(routes=[Route("/{path:path}", dv.Download(served.source))])
        async with live(app, http=DownloadProtocol) as port:
            served.port = port
            await filled(served)
            for _ in range(3):
                answer = await served.get()
                assert (answer.body, status(answer), answer.headers["age"].isdigit()) == (b"small", HIT, True)


@pytest.mark.asyncio
@pytest.mark.parametrize("is_of_origin", [True, False])
async def test_stale_while_revalidate(origin: Origin, tmp_path: Path, is_of_origin: bool) -> None:
    options = {} if is_of_origin else {"stale_while_revalidate": 60}
    if is_of_origin:
        origin.headers.append("Cache-Control: max-age=100, stale-while-revalidate=60")
    async with serving(remote(origin), tmp_path, max_age=100, **options) as served:
        await filled(served)
        await grow_old(served, 110)
        origin.content, origin.headers[0], origin.held_from = BIG[::-1], 'ETag: "v2"', 0
        answers = await asyncio.gather(*[served.get() for _ in range(20)])
        for answer in answers:  # at once, although the origin sends nothing
            assert (answer.body, answer.headers["etag"], answer.headers["age"][:1]) == (BIG, '"v1"', "1")
            assert status(answer) in [f"{HIT}; ttl={-late}{WHILE}" for late in range(10, 50)]
        await origin.has_open(1)
        origin.gate.set()
        await settled_in_the_background(served)
        assert len(origin.requests) == 2
        answer = await served.get()
        assert (answer.body, answer.headers["etag"], status(answer)) == (BIG[::-1], '"v2"', HIT)
        await grow_old(served, 161)  # beyond the time
        assert status(await served.get()) == SAME
        assert len(origin.requests) == 3


@pytest.mark.asyncio
async def test_background_revalidation_is_bounded(
    origin: Origin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index, "MAX_BACKGROUND", 3)
    origin.content = b"small"
    names = [f"{number}" for number in range(10)]
    async with serving(remote(origin), tmp_path, max_age=100, stale_while_revalidate=600) as served:
        await filled(served, *names)
        for name in names:
            await grow_old(served, 110, name)
        origin.headers[0], origin.held_from = 'ETag: "v2"', 0
        answers = [await served.get(f"/{name}") for name in names]
        assert all(status(answer).endswith(WHILE) for answer in answers)
        await origin.has_open(3)
        assert len(origin.requests) == 13
        origin.gate.set()
        await settled_in_the_background(served)


@pytest.mark.asyncio
@pytest.mark.parametrize("failure", ["500 Oops", "502 Bad Gateway", "503 Busy", "504 Late", "nonsense"])
async def test_stale_if_error(origin: Origin, tmp_path: Path, failure: str) -> None:
    async with serving(remote(origin), tmp_path, max_age=100, stale_if_error=600) as served:
        await filled(served)
        await grow_old(served, 200)
        origin.headers[0], origin.status = 'ETag: "v2"', failure
        answer = await served.get(Range="bytes=1-9")
        assert (answer.status, answer.body, answer.headers["etag"]) == (206, BIG[1:10], '"v1"')
        assert (status(answer), answer.headers["age"][:1]) == (ON_ERROR, "2")
        (kept,) = served.cache.kept.values()
        assert kept.retry > 0
        kept.retry += 1000
        asked = len(origin.requests)
        later = await served.get()  # for a few seconds, the failing source is left alone
        assert later.body == BIG
        assert status(later).startswith(f"{HIT}; ttl=-1")
        assert status(later).endswith("; detail=stale-if-error")
        assert len(origin.requests) == asked


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "age, code, expected", [(200, "404 Gone", 404), (200, "429 Slowly", 429), (701, "503 Busy", 503)]
)
async def test_other_errors_and_those_after_the_time_are_not_hidden(
    origin: Origin, tmp_path: Path, age: int, code: str, expected: int
) -> None:
    async with serving(remote(origin), tmp_path, max_age=100, stale_if_error=600) as served:
        await filled(served)
        await grow_old(served, age)
        origin.headers[0], origin.status = 'ETag: "v2"', code
        answer = await served.get()
        assert (answer.status, status(answer)) == (expected, "")


@pytest.mark.asyncio
@pytest.mark.parametrize("code", [401, 403, 404, 410, 451, 302, 204])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_a_file_that_is_withdrawn_is_never_sent_again(
    origin: Origin, tmp_path: Path, code: int, method: str
) -> None:
    async with serving(remote(origin), tmp_path, max_age=100, stale_if_error=600) as served:
        await filled(served)
        await grow_old(served, 200)
        origin.headers[0], origin.status = 'ETag: "v2"', f"{code} No"
        expected = 404 if code in (404, 410) else 502
        for _ in range(2):
            answer = await served.get(method=method)
            assert (answer.status, status(answer)) == (expected, "")
        assert await served.cache.find(served.source.name, "a.bin") is None
        origin.status = "503 Busy"  # nothing is left for it
        assert (await served.get()).status == 503


@pytest.mark.asyncio
@pytest.mark.parametrize("code", [408, 425, 429, 501, 505, 521])
async def test_other_answers_are_no_failures_but_remove_nothing(origin: Origin, tmp_path: Path, code: int) -> None:
    async with serving(remote(origin), tmp_path, max_age=100, stale_if_error=600, stale_while_revalidate=50) as served:
        await filled(served)
        await grow_old(served, 140)
        origin.headers[0], origin.status = 'ETag: "v2"', f"{code} No"
        assert status(await served.get()).endswith(WHILE)
        await settled_in_the_background(served)
        asked = len(origin.requests)
        assert status(await served.get()).endswith(WHILE)
        assert len(origin.requests) == asked  # not again at once
        await grow_old(served, 60)
        answer = await served.get()
        assert (answer.status, status(answer)) == (429 if code == 429 else 502, "")
        origin.status = "503 Busy"
        assert status(await served.get()) == ON_ERROR


@pytest.mark.asyncio
async def test_a_condition_of_a_client_removes_nothing(origin: Origin, tmp_path: Path) -> None:
    async with serving(remote(origin), tmp_path, max_age=100, stale_if_error=600) as served:
        await filled(served)
        await grow_old(served, 200)
        origin.status = "412 No"
        assert (await served.get(method="HEAD", If_Match='"v9"')).status == 412
        assert served.data()


@pytest.mark.asyncio
@pytest.mark.parametrize("option", ["stale_if_error", "stale_while_revalidate"])
@pytest.mark.parametrize("place", ["http://other.example/", "http://127.0.0.1:1/", "ftp://127.0.0.1/"])
async def test_a_host_that_is_not_allowed_is_no_failure(
    origin: Origin, tmp_path: Path, option: str, place: str
) -> None:
    times: dict[str, Any] = {option: 600}
    async with serving(remote(origin), tmp_path, max_age=100, **times) as served:
        await filled(served)
        await grow_old(served, 200)
        origin.headers[:1], origin.status = ['ETag: "v2"', f"Location: {place}"], "302 Found"
        if option == "stale_while_revalidate":
            assert (await served.get()).body == BIG  # the origin has not been asked yet
            await settled_in_the_background(served)
        answer = await served.get()
        assert (answer.status, status(answer)) == (502, "")
        assert await served.cache.find(served.source.name, "a.bin") is None


@pytest.mark.asyncio
async def test_an_address_that_is_not_allowed_is_no_failure(origin: Origin, tmp_path: Path) -> None:
    source = remote(origin)
    async with serving(source, tmp_path, max_age=100, stale_if_error=600) as served:
        await filled(served)
        await grow_old(served, 200)
        # as after a name server has begun to tell a private address
        served.source.source = dv.RemoteSource(source.url)
        assert (await served.get()).status == 502
        assert await served.cache.find(served.source.name, "a.bin") is None
        await source.aclose()


@pytest.mark.asyncio
@pytest.mark.parametrize("directive", ["must-revalidate", "proxy-revalidate", "s-maxage=100", "no-cache"])
async def test_what_the_origin_forbids_is_not_sent_stale(origin: Origin, tmp_path: Path, directive: str) -> None:
    origin.headers.append(f"Cache-Control: {directive}, stale-if-error=600, stale-while-revalidate=600")
    async with serving(remote(origin), tmp_path, max_age=100, stale_if_error=600, stale_while_revalidate=600) as served:
        await filled(served)
        await grow_old(served, 110)
        origin.headers[0], origin.status = 'ETag: "v2"', "500 Oops"
        assert (await served.get()).status == 502


@pytest.mark.asyncio
@pytest.mark.parametrize("news", ["private", "404 Not Found", "401 Who", "403 No", "451 Never"])
async def test_a_file_that_became_private_or_is_gone_is_removed(origin: Origin, tmp_path: Path, news: str) -> None:
    async with serving(remote(origin), tmp_path, max_age=100, stale_while_revalidate=600) as served:
        await filled(served)
        await grow_old(served, 110)
        origin.content, origin.headers = BIG[::-1], ['ETag: "v2"', "Cache-Control: private"]
        if news != "private":
            origin.status = news
        assert status(await served.get()).endswith(WHILE)  # the origin has not said it yet
        await settled_in_the_background(served)
        assert await served.cache.find(served.source.name, "a.bin") is None  # its bytes may still be being sent
        answer = await served.get()
        if news != "private":
            assert answer.status == (404 if news.startswith("404") else 502)
        else:
            assert (answer.body, status(answer)) == (BIG[::-1], "downloadview; fwd=miss")


@pytest.mark.asyncio
async def test_a_source_that_fails_before_it_names_a_file_is_replaced(tmp_path: Path) -> None:
    class Failing:
        is_down = False

        async def resolve(self, name: str) -> dv.AsyncFile:
            if self.is_down:
                raise dv.SourceUnavailable("down")
            return dv.VirtualFile("content", name="a.txt")

    source = Failing()
    async with serving(source, tmp_path, max_age=100, stale_if_error=600) as served:
        await filled(served)
        await grow_old(served, 200)
        source.is_down = True
        answer = await served.get()
        assert (answer.body, status(answer)) == (b"content", ON_ERROR)


@pytest.mark.asyncio
async def test_closing_ends_a_revalidation(origin: Origin, tmp_path: Path) -> None:
    async with serving(remote(origin), tmp_path, max_age=100, stale_while_revalidate=600) as served:
        await filled(served)
        await grow_old(served, 110)
        origin.headers[0], origin.held_from = 'ETag: "v2"', 0
        await served.get()
        await origin.has_open(1)
        await served.source.aclose()
        assert not served.cache._revalidating
        await origin.has_open(0)
