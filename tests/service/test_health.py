"""`/-/readyz` and `/-/livez`: what askers get costs the service the same, however many they are."""

import asyncio

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.routing import Route
from starlette.testclient import TestClient

from downloadview_async.service import health
from downloadview_async.service.health import LIVEZ, MAX_PADDING, PADDING, Health

_PATH = "/-/readyz"


def request() -> Request:
    return Request({"type": "http", "method": "GET", "path": _PATH, "query_string": b"", "headers": []})


async def ask(of: Health) -> tuple[int, bytes]:
    answer = await of.readyz(request())
    return answer.status_code, bytes(answer.body)


class Disk:
    """A check that ends when it is told to, and counts how often it has begun."""

    def __init__(self) -> None:
        self.begun = 0
        self.answers = asyncio.Event()
        self.is_stubborn = False

    async def check(self) -> None:
        self.begun += 1
        while not self.answers.is_set():
            try:
                await self.answers.wait()
            except asyncio.CancelledError:
                if not self.is_stubborn:
                    raise


@pytest.mark.asyncio
async def test_all_askers_share_one_round_and_so_do_those_of_the_next_second(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "_PATIENCE", 60.0)
    monkeypatch.setattr(health, "_KEPT", 60.0)
    disk = Disk()
    of = Health({"disk": disk.check})
    asking = [asyncio.create_task(ask(of)) for _ in range(60)]
    while disk.begun == 0:
        await asyncio.sleep(0)
    disk.answers.set()
    assert await asyncio.gather(*asking) == [(200, b"ready\n")] * 60
    assert await ask(of) == (200, b"ready\n")
    assert disk.begun == 1


@pytest.mark.asyncio
async def test_a_result_counts_for_its_time_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "_KEPT", 0.0)
    disk = Disk()
    disk.answers.set()
    of = Health({"disk": disk.check})
    for _ in range(3):
        assert await ask(of) == (200, b"ready\n")
    assert disk.begun == 3


@pytest.mark.asyncio
async def test_an_asker_that_leaves_takes_nothing_from_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "_PATIENCE", 60.0)
    disk = Disk()
    of = Health({"disk": disk.check})
    first, second = (asyncio.create_task(ask(of)) for _ in range(2))
    while disk.begun == 0:
        await asyncio.sleep(0)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    disk.answers.set()
    assert await second == (200, b"ready\n")
    assert disk.begun == 1


@pytest.mark.asyncio
@pytest.mark.parametrize("is_stubborn", [False, True])
async def test_a_check_that_hangs_is_given_up_and_begun_again_when_it_has_ended(
    monkeypatch: pytest.MonkeyPatch, is_stubborn: bool
) -> None:
    monkeypatch.setattr(health, "_PATIENCE", 0.05)
    monkeypatch.setattr(health, "_KEPT", 0.0)
    disk = Disk()
    disk.is_stubborn = is_stubborn
    fine = Disk()
    fine.answers.set()
    of = Health({"disk": disk.check, "fine": fine.check})
    for _ in range(3):
        assert await ask(of) == (503, b"disk\n")
    assert disk.begun == (1 if is_stubborn else 3)
    assert fine.begun == 3
    disk.answers.set()
    while await ask(of) != (200, b"ready\n"):
        await asyncio.sleep(0)


@pytest.mark.asyncio
async def test_without_checks_it_is_ready() -> None:
    assert await ask(Health({})) == (200, b"ready\n")


async def _fails() -> None:
    raise OSError("the bucket is called so and so")


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_names_alone_are_told(method: str) -> None:
    of = Health({"lake": _fails, "disk": _fails})
    client = TestClient(Starlette(routes=[Route(_PATH, of.readyz)]))
    answer = client.request(method, _PATH)
    assert (answer.status_code, answer.text) == (503, "disk\nlake\n" if method == "GET" else "")
    assert answer.headers["cache-control"] == "no-store"


@pytest.mark.parametrize(
    "query, length",
    [
        ("", None),
        ("?header=", None),
        ("?header=-1", None),
        ("?header=1e3", None),
        ("?header=٣", None),
        ("?header=100000", None),
        ("?header=0", 0),
        ("?header=12285", 12285),
        ("?header=99999", MAX_PADDING),
    ],
)
def test_livez_has_a_header_of_the_length_that_a_check_asks_for(query: str, length: int | None) -> None:
    answer = TestClient(Starlette(routes=[Route(LIVEZ, Health({}).livez)])).get(f"{LIVEZ}{query}")
    assert (answer.status_code, answer.text) == (200, "alive\n")
    assert answer.headers.get(PADDING) == (None if length is None else "a" * length)
