"""Completed downloads, counted by the service alone and behind each proxy: 1 for each file had whole, 0 for others."""

import os
from collections.abc import Iterator

import pytest

from tests.accounts.site import SIZE, Site, site_of
from tests.proxies.servers import EACH_KIND, readable_directory

CONTENT = os.urandom(SIZE)
SMALL = CONTENT[:200_000]


@pytest.fixture(scope="module", params=[None, *EACH_KIND])
def site(request: pytest.FixtureRequest) -> Iterator[Site]:
    """The service alone, and behind each proxy."""
    with readable_directory() as directory, site_of(directory, request.param) as running:
        yield running


def test_each_file_that_was_had_whole_counts_once(site: Site) -> None:
    names = ["whole", "twice", "head", "first", "missing-byte", "parts", "ranges", "strange", "unsatisfiable"]
    for name in names:
        site.put(name, SMALL)
    site.put("empty", b"")
    for name in ("left", "cut"):
        site.put(name, CONTENT)

    whole = site.get("whole")
    assert whole.endswith(SMALL)
    etag = next(line for line in whole.split(b"\r\n") if line.lower().startswith(b"etag:")).decode().partition(": ")[2]
    for _ in range(2):
        site.get("twice")
    site.get("head", method="HEAD")
    site.get("whole", f"If-None-Match: {etag}\r\n")
    site.get("first", "Range: bytes=0-999\r\n")
    site.get("missing-byte", "Range: bytes=0-99999\r\n")
    site.get("missing-byte", "Range: bytes=100001-\r\n")
    site.get("parts", "Range: bytes=100000-199999\r\n")
    site.get("parts", "Range: bytes=0-99999\r\n")
    site.get("ranges", "Range: bytes=0-49999,100000-149999\r\n")
    site.get("ranges", "Range: bytes=50000-99999,150000-199999\r\n")
    strange = site.get("strange", 'Range: bytes="0\\-\t,é\r\n')[:20]
    assert b" 416 " in site.get("unsatisfiable", "Range: bytes=200000-\r\n")[:20]
    site.get("empty")
    site.get("left", take=SIZE // 3)
    received = b""
    for number in range(11):
        answer = site.get("cut", f"Range: bytes={len(received)}-\r\n", take=None if number == 10 else 100_000)
        received += answer.partition(b"\r\n\r\n")[2]
    assert received == CONTENT
    site.wait_for(
        {
            "whole": (1, 1),
            "twice": (2, 2),
            "head": (0, 0),
            "first": (0, 1),
            "missing-byte": (0, 2),
            "parts": (1, 2),
            "ranges": (1, 2),
            "strange": (1, 1) if b" 200 " in strange else (0, 0),  # some proxies answer 416
            "unsatisfiable": (0, 0),
            "empty": (1, 1),
            "left": (0, 1),
            "cut": (1, 11),
        }
    )
