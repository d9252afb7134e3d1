"""uvicorn's own tests of HTTP, with our protocol in place of the one that it derives from."""

from pathlib import Path

import pytest

from tests.suites.released import run_suite

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

DIFFERENCES: dict[str, str] = {}
"""Tests that our protocol fails, each with the reason why it answers differently."""

SKIPS = {
    "test_http::test_keepalive_timeout_with_pipelined_websocket_upgrade[httptools-wsproto]": (
        "httptools never upgrades with the keep-alive timer armed"
    ),
}
"""Tests that uvicorn itself skips for httptools."""


def test_http(pytestconfig: pytest.Config, tmp_path: Path) -> None:
    outcomes = run_suite(
        "uvicorn",
        ["tests/protocols/test_http.py"],
        plugin="uvicorn_suite",
        cache=pytestconfig.cache.mkdir("suites"),
        directory=tmp_path,
    )
    outcomes.check(differences=DIFFERENCES, skips=SKIPS, at_least=90)
