"""Reloads and rolling restarts under load. `make restarts` runs every case for 20 rounds."""

from pathlib import Path

import pytest

from tests.service.restarts import Case, cases, run


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.asyncio
@pytest.mark.parametrize("case, workers, behind_nginx", cases())
async def test_nothing_is_refused_cut_or_wrong(tmp_path: Path, case: Case, workers: int, behind_nginx: bool) -> None:
    for directory in (tmp_path, *tmp_path.parents[:2]):  # the workers of nginx may have another user
        directory.chmod(0o755)
    load = await run(tmp_path, case, workers=workers, behind_nginx=behind_nginx, rounds=2)
    assert load.problems == []
    assert load.seen["answer"] > 100
    assert load.seen["download"] >= 50
