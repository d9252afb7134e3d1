"""Reloads and rolling restarts under load. `make restarts` runs every case, for 20 rounds."""

import pytest

from tests.service.restarts import Case, run


@pytest.mark.slow
@pytest.mark.asyncio
@pytest.mark.parametrize(
    "case, workers, behind_nginx",
    [("reload", 1, False), ("reload", 2, True), ("fd", 2, False), ("reuse_port", 1, False), ("uds", 2, True)],
)
async def test_nothing_is_refused_cut_or_wrong(case: Case, workers: int, behind_nginx: bool) -> None:
    load = await run(case, workers=workers, behind_nginx=behind_nginx, rounds=1, mebibytes=2)
    assert load.problems == []
    assert load.seen["answer"] > 100
    assert load.seen["download"] >= 50
