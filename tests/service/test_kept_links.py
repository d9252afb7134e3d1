"""Answers that the server gives again to links and as redirects: those of the application, for valid links alone."""

import json
import random
import re
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from downloadview_async import Signed, URLSigner, add_content_types
from downloadview_async.asgi.kept_answers import KeptAnswer, KeptAnswers, KnownFields
from downloadview_async.asgi.server import DownloadProtocol
from downloadview_async.offload.signers import signer_kinds
from tests.live import make_old
from tests.service.loading import FILES
from tests.service.test_kept_answers import (
    CONTENT,
    LARGE,
    LIMITED,
    LOG,
    client_of,
    counted,
    directory,
    statuses,
    without_time,
    written,
)

pytestmark = pytest.mark.asyncio

__all__ = ["directory"]

KEY = "0123456789abcdef0123456789abcdef"
LINKS = f'[links]\nkeys = "one {KEY}"\nmax_age = "7d"\n'
SIGNED = f'{FILES}access = ["signed"]\n'
SIGNER = URLSigner({"one": KEY}, max_age=None)


def edge(more: str = "", of_route: str = "") -> str:
    """Return the settings of a route that redirects to a store."""
    source = (
        '[sources.files.edge]\nkind = "hmac"\nurl = "https://files.example.org/"\nsecret = "a secret of the store"\n'
        'text = "{path}{expires}"\ntoken = "{expires}~{signature}"\nparameter = "token"\norigin = "other"\n'
    )
    files, route = FILES.split("[[routes]]")
    return f'{files}{source}{more}[[routes]]{route}send = "redirect"\n{of_route}'


def link(path: str = "/files/a.txt", **options: Any) -> str:
    return SIGNER.sign(path, **{"expires_in": timedelta(hours=1), **options})


def without_place(head: bytes) -> bytes:
    return re.sub(rb"(token|public, max-age)=[^\r]*", rb"\1=", without_time(head))


def without_times(line: str) -> dict[str, Any]:
    differ = ("time", "request_id", "seconds", "first_byte")
    return {name: value for name, value in json.loads(line).items() if name not in differ}


TARGETS: list[tuple[Callable[[], str], bool]] = [
    (link, True),
    (lambda: link(client="127.0.0.1"), True),
    (lambda: link(client="127.0.0.0/8"), True),
    (lambda: link(expires_in=None), True),
    (lambda: link("/files/", below=True).replace("/files/?", "/files/a.txt?"), True),
    (lambda: link("/files/", below=True).replace("/files/?", "/files/a.txt?") + "&view", False),
    (lambda: link("/files/", below=True).replace("/files/?", "/files/a.txt?archive=zip&"), False),
    (lambda: link("/files/", below=True).replace("/files/?", "/files/%61.txt?"), False),
    (lambda: link("/files/folder/", below=True).replace("/files/folder/?", "/files/a.txt?"), False),
    (lambda: link(client="192.0.2.1"), False),
    (lambda: link(filename="other.txt"), False),
    (lambda: link(attachment=False), False),
    (lambda: link(attachment=True), False),
    (lambda: link(content_type="text/x-other"), False),
    (lambda: link(shareable=True), False),
    (lambda: link(query="version=3"), False),
    (lambda: link(query="k=one"), False),
    (lambda: link(query="view"), False),
    (lambda: link("/files/folder/b.txt").replace("folder/b", "a"), False),
    (lambda: (lambda url: url[:-1] + ("E" if url[-1] == "A" else "A"))(link()), False),
    (lambda: link() + "&a=b", False),
    (lambda: link().replace("?", "?a=b&"), False),
    (lambda: link().replace("&s=", "&S="), False),
    (lambda: link().replace("?", "??"), False),
    (lambda: link() + "#x", False),
    (lambda: link().replace("a.txt", "%61.txt"), False),
    (lambda: link().replace("/files/a", "//files/a"), False),
    (lambda: "/files/a.txt", False),
    (lambda: "/files/a.txt?", False),
    (lambda: "/files/a.txt?k=one", False),
    (lambda: "/files/a.txt?k=one&s=", False),
    (lambda: f"/files/a.txt?{'k=' * 5000}", False),
    (lambda: "http://y" + link(), True),
    (lambda: URLSigner({"one": "x" * 32}).sign("/files/a.txt"), False),
    (lambda: URLSigner({"two": KEY}).sign("/files/a.txt"), False),
]


PAGES = f"{SIGNED}list = true\narchive = true\n"
REDIRECTS = edge("checks = false\n", 'access = ["signed"]\n')
CHECKED = edge("", 'access = ["signed"]\n')


@pytest.mark.parametrize("text", [SIGNED, PAGES, CHECKED, REDIRECTS], ids=["files", "pages", "checked", "redirects"])
@pytest.mark.parametrize(("target", "is_kept"), TARGETS)
async def test_a_link_gets_the_answer_of_the_application(
    directory: Path, target: Callable[[], str], is_kept: bool, text: str
) -> None:
    url, first, other, found = target(), link(), link(), []
    for keeps in (True, False):
        async with client_of(directory, f"{text}{LINKS}{LOG}[metrics]\n", keeps=keeps) as client:
            await client.ask(target=first)
            assert await client.kept(target=other) is keeps
            before, answers = client.app.calls, []
            for _ in range(2):
                head, body = await client.ask(target=url)
                answers.append((without_place(head), body))
            assert (client.app.calls == before) == (keeps and is_kept)
            assert await client.kept(target=other) is keeps  # the others do not have it forgotten
            page = (await client.ask(target="/-/metrics"))[1].decode()
            lines = [without_times(line) for line in await written(directory, 6)][:5]
            assert [str(line["link_id"]) in other for line in lines] == [False, True, False, False, True]
            (directory / "log").unlink()
            counts = re.findall(r"(?m)^downloadview_links_total.*", page)
            assert counts
            found.append((answers, lines, counts))
    assert found[0] == found[1]


async def test_a_link_that_has_expired_gets_nothing(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with client_of(directory, SIGNED + LINKS) as client:
        url, longer = link(), link(expires_in=timedelta(hours=3))
        assert [await client.kept(target=url) for _ in range(3)] == [False, True, True]
        now = time.time()
        monkeypatch.setattr(time, "time", lambda: now + 3600)
        assert await statuses(client, [url, longer]) == ["410", "200"]


async def test_the_place_of_a_redirect_is_made_each_time(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with client_of(directory, REDIRECTS + LINKS) as client:
        url, places, now = link(), [], time.time()
        for seconds in (0, 0, 100, 100, 200):
            monkeypatch.setattr(time, "time", lambda later=now + seconds: later)
            head, body = await client.ask(target=url)
            assert body == b""
            expires, place = re.findall(rb"location: ([^\r]*token=([0-9]+)~[^\r]*)", head)[0][::-1]
            assert int(expires) == int(now + seconds) + 600
            places.append(place)
        assert client.app.calls == 1
        assert [places.index(place) for place in places] == [0, 0, 2, 2, 4]


@pytest.mark.parametrize("checks", [True, False])
async def test_a_redirect_without_access_is_kept(directory: Path, checks: bool) -> None:
    (directory / "files/page.html").write_text("<script>")
    make_old(directory)
    text = edge("" if checks else "checks = false\n") + LOG
    found = []
    for keeps in (True, False):
        async with client_of(directory, text, keeps=keeps) as client:
            names = ("a.txt", "a.txt", "page.html", "page.html", "a.txt?a=b")
            answers = [await client.ask(target=f"/files/{name}") for name in names]
            head, _ = await client.ask(target="/files/a.txt", method="HEAD")
            assert head.startswith(b"HTTP/1.1 200 ")
            (directory / "files/a.txt").rename(directory / "files/b.txt")
            answers.append(await client.ask(target="/files/a.txt"))
            (directory / "files/b.txt").rename(directory / "files/a.txt")
            lines = [without_times(line) for line in await written(directory, 7)]
            (directory / "log").unlink()
            found.append([[(without_place(head), body) for head, body in answers], lines])
            assert answers[0][0].startswith(b"HTTP/1.1 307 ")
            assert answers[2][0].startswith(b"HTTP/1.1 200 ")  # a browser might run it
            assert answers[-1][0].startswith(b"HTTP/1.1 404 " if checks else b"HTTP/1.1 307 ")
    assert found[0] == found[1]


@pytest.mark.parametrize("text", [CHECKED, REDIRECTS], ids=["checked", "redirects"])
async def test_a_redirect_is_made_anew_for_another_type(directory: Path, text: str) -> None:
    async with client_of(directory, text + LINKS) as client:
        assert [await client.kept(target=link()) for _ in range(2)] == [False, True]
        add_content_types({".txt": "text/html"})
        try:
            assert await statuses(client, [link()]) == ["200"]  # a browser might run it
        finally:
            add_content_types({".txt": None})
        assert [await client.kept(target=link()) for _ in range(2)] == [False, True]


async def test_a_redirect_is_made_anew_for_another_version(directory: Path) -> None:
    async with client_of(directory, CHECKED + LINKS) as client:
        assert [await client.kept(target=link()) for _ in range(2)] == [False, True]
        (directory / "files/a.txt").write_bytes(b"other")
        assert not await client.kept(target=link())
        assert await statuses(client, [link()]) == ["307"]


class Prepared:
    """In place of the signer of another package: gives URLs that are prepared, and fails when there are no more."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *cookies: str) -> None:
        self.urls: list[str] = []
        self.cookies = cookies
        monkeypatch.setattr(signer_kinds()["hmac"].signer, "sign", self.sign)

    def sign(self, path: str, headers: Mapping[str, str], *, now: float, seconds: int) -> Signed:
        return Signed(self.urls.pop(0), seconds, self.cookies)


@pytest.mark.parametrize("failing", [[], ["https://files.example.org/\u03c0"]], ids=["raises", "not Latin-1"])
async def test_a_signer_that_fails_gives_the_error_of_the_application(
    directory: Path, monkeypatch: pytest.MonkeyPatch, failing: list[str]
) -> None:
    signer = Prepared(monkeypatch)
    async with client_of(directory, edge()) as client:
        signer.urls = ["https://files.example.org/a", "https://files.example.org/b"]
        assert [await client.kept() for _ in range(2)] == [False, True]
        signer.urls = failing * 2
        assert (await client.ask())[0].startswith(b"HTTP/1.1 500 ")


async def test_a_redirect_with_a_cookie_is_not_kept(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    signer = Prepared(monkeypatch, "a=b")
    async with client_of(directory, edge()) as client:
        signer.urls = [f"https://files.example.org/{number}" for number in range(3)]
        for number in range(3):
            head, _ = await client.ask()
            assert b"location: https://files.example.org/%d\r\n" % number in head  # each one is signed once
            assert b"set-cookie: a=b\r\n" in head
        assert client.app.calls == 3


@pytest.mark.parametrize(
    "text",
    [
        f'{SIGNED}{LINKS}store = "sqlite:links.db"\n',
        f'{FILES}access = ["signed", "hook:rules:allowed"]\n{LINKS}',
        f'{FILES}access = ["signed", "secure_link"]\n{LINKS}',
        SIGNED.replace('root = "files"', 'root = "files"\ndigests = "known"')
        + f'{LINKS}[digests]\nstore = "digests.db"\n',
    ],
    ids=["store", "hook", "formats", "digests"],
)
async def test_what_needs_more_than_the_link_is_not_kept(
    directory: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (directory / "rules.py").write_text("async def allowed(request, name):\n    return False\n")
    monkeypatch.syspath_prepend(directory)
    async with client_of(directory, text) as client:
        assert await statuses(client, [link()] * 3) == ["200"] * 3
        assert client.app.calls == 3


async def test_a_link_to_another_answer_is_tried_once_before_the_application(directory: Path) -> None:
    tried: list[bool] = []

    class Noting(DownloadProtocol):
        def _has_given_again(
            self, answers: KeptAnswers, answer: KeptAnswer | None, known: KnownFields | None = None
        ) -> bool:
            tried.append(answer is not None)
            return super()._has_given_again(answers, answer, known)

    async with client_of(directory, SIGNED + LINKS, protocol=Noting) as client:
        assert [await client.kept(target=link()) for _ in range(3)] == [False, True, True]
        tried.clear()
        assert await statuses(client, [link(filename="other.txt"), link() + "&a=b"]) == ["200", "403"]
        assert tried == [True, True]


async def test_links_that_nginx_verifies_are_kept(directory: Path) -> None:
    async with client_of(directory, f'{FILES}access = ["secure_link"]\n{LINKS}') as client:
        url, complete = link(format="secure_link"), link()
        assert await statuses(client, [url, url, link(format="secure_link")]) == ["200"] * 3
        assert client.app.calls == 1
        wrong = url.replace("md5=", "md5=A")
        assert await statuses(client, [complete, wrong, url + "&a=b", "/files/a.txt"]) == ["403"] * 4
        assert client.app.calls == 5


async def test_a_large_file_by_a_link_is_sent_again(directory: Path) -> None:
    (directory / "files/large.bin").write_bytes(LARGE)
    make_old(directory)
    url, other = (link("/files/large.bin") for _ in range(2))
    wrong = link("/files/a.txt").replace("a.txt", "large.bin")
    found = []
    for keeps in (True, False):
        async with client_of(directory, f"{SIGNED}{LINKS}{LOG}[metrics]\n", keeps=keeps) as client:
            answers, kept = [], []
            for target in (url, other, wrong, url + "&a=b", "/files/large.bin", other):
                before = client.app.calls
                head, body = await client.ask(target=target)
                answers.append((without_time(head), body))
                kept.append(client.app.calls == before)
            assert kept == [False, keeps, False, False, False, keeps]
            page = (await client.ask(target="/-/metrics"))[1].decode()
            counts = re.findall(r"(?m)^downloadview_links_total.*", page)
            assert [count.split()[1] for count in sorted(counts)] == ["2.0", "3.0"]  # refused, verified
            lines = [without_times(line) for line in await written(directory, 7)][:6]
            (directory / "log").unlink()
            found.append((answers, lines, counts))
            assert [head[9:12] for head, _ in answers] == [b"200", b"200", b"403", b"403", b"403", b"200"]
    assert found[0] == found[1]


async def test_a_redirect_has_percent_signs_again(directory: Path) -> None:
    fields = '[routes.headers]\n"X%s-Name" = "a %s of 50%"\n'
    text = REDIRECTS.replace("files.example.org/", "files.example.org/a%25b/")
    found = []
    for keeps in (True, False):
        async with client_of(directory, text + fields + LINKS, keeps=keeps) as client:
            answers = [await client.ask(target=link()) for _ in range(3)]
            assert client.app.calls == (1 if keeps else 3)
            assert all(b"\r\nx%s-name: a %s of 50%\r\n" in head for head, _ in answers)
            assert all(b"https://files.example.org/a%25b/a.txt?" in head for head, _ in answers)
            found.append([(without_place(head), body) for head, body in answers])
    assert found[0] == found[1]


@pytest.mark.parametrize("text", [CHECKED, REDIRECTS], ids=["checked", "redirects"])
async def test_limits_count_a_redirect(directory: Path, text: str) -> None:
    async with client_of(directory, text + LINKS + LIMITED.format(limits='requests = "3/hour"')) as client:
        assert await statuses(client, [link() for _ in range(5)]) == ["307"] * 3 + ["429"] * 2


@pytest.mark.parametrize("name", ["a.txt", "large.bin"])
async def test_a_link_for_one_client_is_for_the_client_of_a_trusted_proxy(directory: Path, name: str) -> None:
    (directory / "files/large.bin").write_bytes(LARGE)
    make_old(directory)
    url = f"/files/{name}"
    one, two, peer = (link(url, client=address) for address in ("192.0.2.1", "192.0.2.2", "127.0.0.1"))
    asked = [(target, address) for target in (one, two, peer) for address in ("192.0.2.1", "192.0.2.2", None)]
    expected = [
        "200" if (target, address) in ((one, "192.0.2.1"), (two, "192.0.2.2"), (peer, None)) else "403"
        for target, address in asked
    ]
    for trusted in ("127.0.0.1", "192.0.2.9"):
        text = f'{SIGNED}{LINKS}[server]\nforwarded_allow_ips = "{trusted}"\n'
        if trusted != "127.0.0.1":
            expected = ["200" if target == peer else "403" for target, _ in asked]
        async with client_of(directory, text) as client:
            for address in ("192.0.2.1", "192.0.2.2", None):  # fields become known with an answer that is kept
                lines = [] if address is None else [f"X-Forwarded-For: {address}"]
                for _ in range(2):
                    await client.ask(*lines, target=link(url))
            for _ in range(2):
                before, found = client.app.calls, []
                for target, address in asked:
                    lines = [] if address is None else [f"X-Forwarded-For: {address}"]
                    head, _ = await client.ask(*lines, target=target)
                    found.append(head.split()[1].decode())
                assert found == expected
                assert client.app.calls - before == found.count("403")


async def test_answers_to_links_are_forgotten_beyond_a_number(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("downloadview_async.asgi.kept_answers.MAX_ANSWERS", 3)
    names = [f"/files/{number}.txt" for number in range(4)]
    for name in names:
        (directory / name[1:]).write_bytes(CONTENT)
    make_old(directory)
    async with client_of(directory, SIGNED + LINKS) as client:
        for name in names:
            assert [await client.kept(target=link(name)) for _ in range(2)] == [False, True]
        kept = client.app.service.kept_answers
        assert kept is not None
        assert len(kept) == 3
        assert [await client.kept(target=link(name)) for name in reversed(names)] == [True, True, True, False]


@pytest.mark.parametrize("limits", ['requests = "5/hour"', 'quota = ["8kB/day"]', 'quota = ["3 downloads/day"]'])
async def test_limits_count_links_as_any_other_request(directory: Path, limits: str) -> None:
    found = []
    targets = [link(), link(), link() + "&a=b", "/files/a.txt", *(link() for _ in range(5))]
    for keeps in (False, True):
        async with client_of(directory, SIGNED + LINKS + LIMITED.format(limits=limits), keeps=keeps) as client:
            found.append([await statuses(client, targets), counted(client)])
    assert found[0] == found[1]
    assert "429" in found[0][0]


@pytest.mark.parametrize("text", [SIGNED, PAGES, REDIRECTS, CHECKED], ids=["files", "pages", "redirects", "checked"])
@pytest.mark.parametrize("seed", range(2))
async def test_random_requests_get_the_answers_of_the_application(directory: Path, text: str, seed: int) -> None:
    """Links of every kind, mutated, to files that change, with and without fields that decide."""
    found, others = [], [target() for target, _ in TARGETS]
    good = [link(name) for name in ("/files/a.txt", "/files/folder/b.txt") for _ in range(9)]
    for keeps in (True, False):
        chosen, answers = random.Random(seed), []
        for name in ("a.txt", "folder/b.txt"):
            (directory / "files" / name).write_bytes(CONTENT)
        make_old(directory)
        async with client_of(directory, f"{text}{LINKS}{LOG}[metrics]\n", keeps=keeps) as client:
            for number in range(250):
                event = chosen.random()
                if event < 0.02:
                    (directory / "files/a.txt").write_bytes(str(number).encode() * 100)
                    make_old(directory)
                elif event < 0.025:
                    (directory / "files/a.txt").unlink(missing_ok=True)
                url = chosen.choice(others) if chosen.random() < 0.2 else chosen.choice(good)
                if chosen.random() < 0.1:
                    at = chosen.randrange(len(url))
                    url = url[:at] + chosen.choice("aA0&=?%/k") + url[at + chosen.choice((0, 1)) :]
                if not url.startswith("/"):
                    continue
                lines = [chosen.choice(["Range: bytes=1-3", "If-None-Match: *"])] if chosen.random() < 0.1 else []
                method = "HEAD" if chosen.random() < 0.05 else "GET"
                head, body = await client.ask(*lines, "Accept-Encoding: gzip", target=url, method=method)
                answers.append((url, lines, method, without_place(head), body))
            page = (await client.ask(target="/-/metrics"))[1].decode()
            told = [without_times(line) for line in await written(directory, len(answers) + 1)][:-1]
            (directory / "log").unlink()
            found.append((answers, told, re.findall(r"(?m)^downloadview_(?:links|requests)_total.*", page)))
            assert not keeps or client.app.calls < len(answers) * 0.8
    for kept, made in zip(*found, strict=True):
        for one, other in zip(kept, made, strict=True):
            assert one == other


async def test_a_route_that_comes_before_needs_no_link(directory: Path) -> None:
    source, route = FILES.split("[[routes]]")
    text = (
        f'{source}[sources.folder]\ntype = "path"\nroot = "files/folder"\n'
        '[[routes]]\npath = "/files/folder/{path:path}"\nsource = "folder"\n'
        f'[[routes]]{route}access = ["signed"]\n{LINKS}'
    )
    public, signed, found = link("/files/folder/b.txt"), link(), []
    targets = ["/files/folder/b.txt", public, "/files/a.txt", signed] * 3 + [public.replace("folder/b", "a")]
    for keeps in (True, False):
        async with client_of(directory, text, keeps=keeps) as client:
            found.append(await statuses(client, targets))
            assert client.app.calls == (13 - 2 - 2 if keeps else 13)
    assert found[0] == found[1] == ["200", "200", "403", "200"] * 3 + ["403"]
