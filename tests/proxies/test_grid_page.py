"""The grid as the documentation shows it is the one that `test_grid.py` has proven. (This file runs after that one.)"""

import pytest

from tests.proxies import grid, test_grid


@pytest.mark.parametrize("name", grid.PAGES)
def test_a_page_shows_the_grid_as_it_is(name: str) -> None:
    assert (grid.PROJECT / name).read_text() == grid.page(name), "run python -m tests.proxies.grid"


def test_every_claim_was_proven_in_this_run(request: pytest.FixtureRequest) -> None:
    config = request.config
    is_part = any("::" in argument or argument.endswith(".py") for argument in config.args)
    if is_part or config.option.keyword or config.getoption("lf", False):
        return  # a part of the tests was asked for
    collected = [item.name for item in request.session.items if item.path.name == "test_grid.py"]
    claimed = {cell.id for cell in grid.CELLS if cell.column not in test_grid.unavailable}
    assert {f"test_a_cell[{cell.id}]" for cell in grid.CELLS} <= {*collected}
    assert claimed - test_grid.proven == set()


def test_every_place_of_the_grid_is_claimed_or_has_no_meaning() -> None:
    """Signed URLs are those of stores; everything else can be sent by everybody."""
    empty = {(row, column) for row in grid.ROWS for column in grid.COLUMNS if grid.marks(row, column) == "-"}
    assert empty == {(row, "redirect") for row in grid.ROWS if row not in grid.LAKE}
