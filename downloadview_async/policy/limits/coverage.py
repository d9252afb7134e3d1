"""`Coverage`: how often each byte of one version of a file has been sent to a client, or is being sent."""

from collections.abc import Iterable
from dataclasses import dataclass

MAX_EDGES = 2000
"""Where parts of a file begin or end, at most. With more, a further part counts as the whole file."""


@dataclass(frozen=True, slots=True)
class Parts:
    """Parts of one version of a file: each from its first byte to before its last number.

    session: a short name for the version. size: of the file, in bytes. A file of unknown size has one byte.
    """

    session: str
    spans: tuple[tuple[int, int], ...]
    size: int

    def after(self, sent: int) -> "Parts":
        """Return what is left of the parts after so many bytes, which were sent in their order."""
        left = []
        for start, stop in self.spans:
            taken = min(sent, stop - start)
            sent -= taken
            if start + taken < stop:
                left.append((start + taken, stop))
        return Parts(self.session, tuple(left), self.size)


class Coverage:
    """Counts for each byte how many parts have it.

    It keeps by how much this number changes at each place where it does. So parts that touch become one.
    """

    __slots__ = ("edges",)

    def __init__(self) -> None:
        self.edges: dict[int, int] = {}

    def add(self, spans: Iterable[tuple[int, int]], times: int = 1) -> None:
        """Add parts. times: -1 takes them away again."""
        for start, stop in spans:
            for edge, change in ((start, times), (stop, -times)):
                changed = self.edges.get(edge, 0) + change
                if changed:
                    self.edges[edge] = changed
                else:
                    self.edges.pop(edge, None)

    def least(self, size: int) -> int:
        """Return how often the file is covered as a whole: how many parts the byte has that has the fewest."""
        edges = sorted(edge for edge in self.edges if edge < size)
        if not edges or edges[0] > 0:
            return 0
        depth, depths = 0, []
        for edge in edges:
            depth += self.edges[edge]
            depths.append(depth)
        return min(depths)
