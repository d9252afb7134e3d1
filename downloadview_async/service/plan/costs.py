"""The measured costs: medians of a benchmark, by the row that was measured and the name of the figure."""

from collections.abc import Mapping
from pathlib import Path

import msgspec
from msgspec import Struct

from downloadview_async import ConfigurationError

MEASURED = Path(__file__).with_name("costs.json")
"""The costs that come with this package. `make bench` and `make costs` write them; do not edit them."""


class Costs(Struct, frozen=True, kw_only=True):
    """The medians of a run. CPU is in seconds, memory in bytes.

    run: the date, the machine in general words, the number of rounds. figures: a row such as `serve`, a figure such as
    `cpu_10k`, and its median.
    """

    run: dict[str, str]
    figures: dict[str, dict[str, float]]

    def of(self, row: str, figure: str) -> float:
        """Return a figure, at least 0. Raises `ConfigurationError` if it was not measured."""
        try:
            return max(self.figures[row][figure], 0.0)
        except KeyError:
            raise ConfigurationError(f"the costs have no {figure} of {row}: measure them with `make costs`") from None


def load_costs(path: Path = MEASURED) -> Costs:
    """Read measured costs. Raises `ConfigurationError`."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Costs)
    except OSError as exc:
        raise ConfigurationError(f"{str(path)!r} cannot be read: {exc.strerror}") from None
    except msgspec.MsgspecError as exc:
        raise ConfigurationError(f"{str(path)!r} does not have costs that `make costs` has written: {exc}") from None


def written(run: Mapping[str, str], figures: Mapping[str, Mapping[str, float]]) -> bytes:
    """Return the text of such a file."""
    costs = Costs(run=dict(run), figures={row: dict(values) for row, values in figures.items()})
    return msgspec.json.format(msgspec.json.encode(costs), indent=1) + b"\n"
