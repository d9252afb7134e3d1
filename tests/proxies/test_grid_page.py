"""The grid as the documentation shows it is the one that `test_grid.py` has proven."""

import pytest

from tests.proxies import grid
from tests.proxies.servers import KINDS


@pytest.mark.parametrize("name", grid.PAGES)
def test_a_page_shows_the_grid_as_it_is(name: str) -> None:
    assert (grid.PROJECT / name).read_text() == grid.page(name), "run python -m tests.proxies.grid"


def test_every_proxy_with_a_configuration_is_started_by_the_tests() -> None:
    assert set(grid.KINDS) == set(KINDS), "say in tests/proxies/servers.py how it is started"


def test_every_place_of_the_grid_is_claimed_or_has_no_meaning() -> None:
    """Signed URLs are those of stores; everything else can be sent by everybody."""
    empty = {(row, column) for row in grid.ROWS for column in grid.COLUMNS if grid.marks(row, column) == "-"}
    assert empty == {(row, "redirect") for row in grid.ROWS if row not in grid.LAKE}
