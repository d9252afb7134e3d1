"""Links with uses, over real servers: which requests count, and what belongs to the same download."""

import asyncio
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import pytest
from fastapi import Depends, FastAPI
from starlette.applications import Starlette
from starlette.routing import Route
from starlette.types import ASGIApp

import downloadview_async as dv
from downloadview_async.asgi.server import DownloadProtocol
from tests.live import Answer, ask, live, make_old
from tests.observed import Observed

pytestmark = pytest.mark.asyncio
SIZE = 300_000
Served = Callable[[ASGIApp], AbstractAsyncContextManager[int]]
CONTENT = bytes(range(256)) * (SIZE // 256) + b"x" * (SIZE % 256)


@pytest.fixture(params=["auto", DownloadProtocol], ids=["uvicorn", "ours"])
def served(request: pytest.FixtureRequest) -> Served:
    """Serve an application by uvicorn's protocol, or by ours, which sends files by their descriptors."""
    return partial(live, http=request.param)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "a.bin").write_bytes(CONTENT)
    (tmp_path / "small.txt").write_bytes(b"0123456789")
    make_old(tmp_path)
    return tmp_path


def by_header(scope: Mapping[str, Any]) -> str:
    """The client, as a test names it."""
    return str(dict(scope["headers"]).get(b"x-client", b""), "ascii")


@pytest.fixture
def signer() -> dv.URLSigner:
    return dv.URLSigner({"2026a": bytes(range(32))}, store=dv.MemoryGrantStore(), client_of=by_header)


def application(source: dv.Source, signer: dv.URLSigner, **options: Any) -> ASGIApp:
    download = dv.Download(source, access=dv.SignedLinks(signer), **options)
    return Starlette(routes=[Route("/files/{path:path}", download)])


async def get(port: int, link: str, client: str = "ada", method: str = "GET", **headers: str) -> Answer:
    fields = {name.replace("_", "-"): value for name, value in headers.items()}
    return await ask(port, link, headers={"X-Client": client, **fields}, method=method)


@pytest.mark.parametrize("name", ["a.bin", "small.txt"])
async def test_a_once_only_link(served: Served, root: Path, signer: dv.URLSigner, name: str) -> None:
    link = signer.sign(f"/files/{name}", uses=1)
    content = (root / name).read_bytes()
    async with served(application(dv.PathSource(root), signer)) as port:
        answer = await get(port, link)
        assert (answer.status, answer.body, answer.headers["cache-control"]) == (200, content, "private, no-store")
        for client in ("ada", "bob"):
            again = await get(port, link, client)
            assert (again.status, again.body) == (410, b"Gone")
        assert (await get(port, link, method="HEAD")).status == 200


async def test_what_does_not_count(served: Served, root: Path, signer: dv.URLSigner) -> None:
    link = signer.sign("/files/a.bin", uses=1)
    missing = signer.sign("/files/no.bin", uses=1)
    async with served(application(dv.PathSource(root), signer)) as port:
        head = await get(port, link, "h", method="HEAD")
        etag = head.headers["etag"]
        for status, headers in [
            (304, {"If_None_Match": etag}),
            (304, {"If_Modified_Since": head.headers["last-modified"]}),
            (412, {"If_Match": '"other"'}),
            (416, {"Range": f"bytes={SIZE}-"}),
        ]:
            for method in ("GET", "HEAD") if status != 416 else ("GET",):
                assert (await get(port, link, str(status), method, **headers)).status == status
        assert (await get(port, missing)).status == 404
        assert (await get(port, link, "ada")).status == 200
        assert (await get(port, link, "bob")).status == 410
        assert (await get(port, link, "bob", If_None_Match=etag)).status == 304


@pytest.mark.parametrize("name", ["a.bin", "small.txt"])
@pytest.mark.parametrize("url", ["memory:", "sqlite:{root}/links.db"])
async def test_the_next_request_on_the_same_connection_is_a_new_use(
    served: Served, root: Path, name: str, url: str
) -> None:
    store = dv.grant_store_from_url(url.format(root=root))
    signer = dv.URLSigner({"2026a": bytes(32)}, store=store)
    request = f"GET {signer.sign(f'/files/{name}', uses=2)} HTTP/1.1\r\nHost: x\r\n"
    try:
        async with served(application(dv.PathSource(root), signer)) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(f"{request}\r\n{request}\r\n{request}Connection: close\r\n\r\n".encode())
            received = await reader.read(-1)
            writer.close()
    finally:
        await store.aclose()
    assert [status[:3] for status in received.split(b"HTTP/1.1 ")[1:]] == [b"200", b"200", b"410"]


async def test_parallel_clients_of_a_once_only_link(served: Served, root: Path, signer: dv.URLSigner) -> None:
    link = signer.sign("/files/a.bin", uses=1)
    async with served(application(dv.PathSource(root), signer)) as port:
        answers = await asyncio.gather(*(get(port, link, str(number)) for number in range(100)))
    assert sorted(answer.status for answer in answers) == [200] + [410] * 99


@pytest.mark.parametrize("order", [lambda parts: parts, lambda parts: parts[::-1]])
async def test_parts_are_one_download_until_the_last_is_sent(
    served: Served, root: Path, signer: dv.URLSigner, order: Callable[[Any], Any]
) -> None:
    link = signer.sign("/files/a.bin", uses=1)
    parts = order([f"bytes={start}-{start + 99_999}" for start in range(0, SIZE, 100_000)])
    async with served(application(dv.PathSource(root), signer)) as port:
        for part in parts:
            assert (await get(port, link, Range=part)).status == 206
        assert (await get(port, link)).status == 410
        assert (await get(port, link, Range="bytes=0-")).status == 410
        # What the kernel took may not have arrived.
        for part in ("bytes=0-9", "bytes=299999-"):
            assert (await get(port, link, Range=part)).status == 206
            assert (await get(port, link, "bob", Range=part)).status == 410


async def test_parallel_connections_are_one_download(served: Served, root: Path, signer: dv.URLSigner) -> None:
    link = signer.sign("/files/a.bin", uses=1)
    step = SIZE // 16 + 1
    spans = [f"bytes={start}-{min(start + step, SIZE) - 1}" for start in range(0, SIZE, step)]
    async with served(application(dv.PathSource(root), signer)) as port:
        answers = await asyncio.gather(*(get(port, link, Range=span) for span in spans))
        assert [answer.status for answer in answers] == [206] * 16
        assert b"".join(answer.body for answer in answers) == CONTENT
        assert (await get(port, link, "bob", Range="bytes=5-")).status == 410
        assert (await get(port, link)).status == 410


async def test_several_ranges_in_one_answer_count(served: Served, root: Path, signer: dv.URLSigner) -> None:
    link = signer.sign("/files/a.bin", uses=1)
    async with served(application(dv.PathSource(root), signer)) as port:
        assert (await get(port, link, Range="bytes=200000-299999, 0-99999")).status == 206
        assert (await get(port, link, Range="bytes=100000-199999")).status == 206
        assert (await get(port, link)).status == 410


async def test_a_new_version_of_the_file_is_another_use(served: Served, root: Path, signer: dv.URLSigner) -> None:
    link = signer.sign("/files/a.bin", uses=1)
    async with served(application(dv.PathSource(root), signer)) as port:
        assert (await get(port, link, Range="bytes=0-9")).status == 206
        (root / "new").write_bytes(CONTENT + b"y")
        (root / "new").replace(root / "a.bin")
        make_old(root)
        answers = [await get(port, link, Range="bytes=0-9") for _ in range(2)]
    assert answers[-1].status == 410


async def test_a_cut_download_goes_on(served: Served, root: Path, signer: dv.URLSigner) -> None:
    (root / "big.bin").write_bytes(bytes(8 << 20))
    make_old(root)
    link = signer.sign("/files/big.bin", uses=1)
    async with served(application(dv.PathSource(root), signer)) as port:
        for _ in range(10):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(f"GET {link} HTTP/1.1\r\nHost: x\r\nX-Client: ada\r\n\r\n".encode())
            assert (await reader.readexactly(15)) == b"HTTP/1.1 200 OK"
            writer.close()
        assert (await get(port, link, "bob")).status == 410
        assert (await get(port, link)).status == 200
        assert (await get(port, link)).status == 410


async def generated(name: str) -> Any:
    yield b"01234"
    yield b"56789"


async def test_a_file_of_unknown_size(served: Served, signer: dv.URLSigner) -> None:
    source = dv.VirtualSource(generated)
    link = signer.sign("/files/a.txt", uses=1)
    async with served(application(source, signer)) as port:
        first, second = await get(port, link), await get(port, link)
    assert (first.status, first.body, second.status) == (200, b"0123456789", 410)


@pytest.mark.parametrize("offload", [None, True])
async def test_an_offloaded_answer_counts_and_ends_by_its_time(
    served: Served, root: Path, signer: dv.URLSigner, offload: bool | None
) -> None:
    app = dv.OffloadMiddleware(
        application(dv.PathSource(root), signer, offload=offload), dv.XAccelRedirect([dv.Rule(f"{root}/", "/_files/")])
    )
    link = signer.sign("/files/a.bin", uses=1)
    async with served(app) as port:
        head = await get(port, link, "bob", method="HEAD")
        assert head.status == 200
        for _ in range(3):
            assert "x-accel-redirect" in (await get(port, link)).headers
        refused = await get(port, link, "bob")
        assert (refused.status, "x-accel-redirect" in refused.headers) == (410, False)
        # The proxy decides about conditions and may disagree, so its answer counts.
        assert (await get(port, link, "bob", If_None_Match=head.headers.get("etag", "*"))).status == 410


class ToTheStore:
    """Redirects to another place."""

    async def headers_for(self, file: dv.AsyncFile, described: Mapping[str, str]) -> Mapping[str, str] | None:
        return {"location": "https://store.example.org/a.bin", "cache-control": "no-store"}


async def test_a_redirect_counts(served: Served, root: Path, signer: dv.URLSigner) -> None:
    link = signer.sign("/files/a.bin", uses=1)
    async with served(application(dv.PathSource(root), signer, redirect=ToTheStore())) as port:
        assert (await get(port, link, "bob", method="HEAD")).status == 200
        assert [(await get(port, link)).status for _ in range(2)] == [307, 307]
        refused = await get(port, link, "bob")
        assert (refused.status, "location" in refused.headers) == (410, False)


async def test_a_dependency_of_fastapi_counts(served: Served, root: Path, signer: dv.URLSigner) -> None:
    app = FastAPI(exception_handlers={dv.FileError: dv.download_error})
    source = dv.PathSource(root)

    @app.get("/files/{name}")
    async def download(name: str, grant: Annotated[dv.Grant, Depends(dv.signed_link(signer))]) -> dv.DownloadResponse:
        return dv.DownloadResponse(await source.resolve(name))

    link = signer.sign("/files/small.txt", uses=1)
    async with served(app) as port:
        assert [(await get(port, link)).status for _ in range(2)] == [200, 410]


async def test_outcomes_are_still_reported(served: Served, root: Path, signer: dv.URLSigner) -> None:
    observed = Observed(application(dv.PathSource(root), signer))
    link = signer.sign("/files/small.txt", uses=1)
    async with served(observed) as port:
        await get(port, link)
        await get(port, link)
    assert [(outcome.status, outcome.sent, outcome.reason) for outcome in observed.outcomes] == [
        (200, 10, None),
        (410, 4, None),
    ]


class Gone(dv.MemoryGrantStore):
    """A store that fails at the claim."""

    async def claim(self, *arguments: Any, **options: Any) -> bool:
        raise ConnectionError("gone")


@pytest.mark.parametrize("when, status", [("refuse", 503), ("allow", 200)])
async def test_a_store_that_fails(served: Served, root: Path, when: Any, status: int) -> None:
    signer = dv.URLSigner({"2026a": bytes(32)}, store=Gone(), when_store_fails=when)
    async with served(application(dv.PathSource(root), signer)) as port:
        answer = await get(port, signer.sign("/files/a.bin", uses=1))
        assert (answer.status, answer.headers.get("retry-after")) == (status, "5" if status == 503 else None)
        assert (await get(port, signer.sign("/files/a.bin"))).status == 200
