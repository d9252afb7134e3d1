"""Starlette's own tests of responses and static files, whose applications a server with our protocol runs."""

import os
from pathlib import Path

import pytest

from tests.suites.released import run_suite

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

_TABS = "test_staticfiles::test_staticfiles_304_with_if_none_match_wildcard[asyncio- \\t* \\t-{}]"
_UNREADABLE = "test_staticfiles::test_staticfiles_with_invalid_dir_permissions_returns_401[asyncio]"
DIFFERENCES = {
    "test_responses::test_response_phrase[asyncio]": "123 is an interim response: the client waits for a final one",
    "test_staticfiles::test_staticfiles_websocket[asyncio]": "the client over a socket speaks HTTP alone",
    _TABS.format("GET"): "httpx2 does not send a field value with blanks around it",
    _TABS.format("HEAD"): "httpx2 does not send a field value with blanks around it",
    **({_UNREADABLE: "root may read what nobody else may"} if os.geteuid() == 0 else {}),
}
"""Tests that fail over a socket, each with the reason."""


def test_responses_and_static_files(pytestconfig: pytest.Config, tmp_path: Path) -> None:
    outcomes = run_suite(
        "starlette",
        ["tests/test_responses.py", "tests/test_staticfiles.py"],
        plugin="starlette_suite",
        cache=pytestconfig.cache.mkdir("suites"),
        directory=tmp_path,
    )
    outcomes.check(differences=DIFFERENCES, skips={}, at_least=130)
