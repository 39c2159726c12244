"""What a first walk through the parents alone has seen."""

from collections.abc import Iterator, Mapping

from torch import Tensor

from fusionpl.calibration.kept import Kept
from fusionpl.calibration.moments import Key, Moments
from fusionpl.calibration.observe import Statistics


class Survey:
    """Moments of whole networks, kept as they are found, and the magnitudes of the anchor's axes.

    Args:
        kept: where.

    Attributes:
        magnitudes: anchor's axis -> mean absolute activation, [n].
        streams: first axis of a stream -> the products of its units with those of all parents' side by side, added up
            over its joins, those of each join with unit energy.
    """

    def __init__(self, kept: Kept) -> None:
        self._kept = kept
        self._places: dict[tuple[int, Key], None] = {}
        self.magnitudes: dict[str, Tensor] = {}
        self.streams: dict[str, Tensor] = {}

    def has(self, key: Key) -> bool:
        """Whether the moments of `key` are known."""
        return any(known == key for _, known in self._places)

    def of(self, parent: int) -> Mapping[Key, Moments]:
        """Key -> the moments of a parent with the anchor."""
        return _OfParent(self._kept, parent, [key for index, key in self._places if index == parent])

    def add(self, found: Statistics, streams: Mapping[str, str]) -> None:
        """Keeps the statistics of a section.

        Args:
            found: the statistics.
            streams: join -> the first axis of its stream.
        """
        for index, moments in enumerate(found.moments):
            for key, one in moments.items():
                self._kept["moments", index, key] = vars(one)
                self._places[index, key] = None
        self.magnitudes |= found.magnitudes
        for join, products in found.together.items():
            self.streams[streams[join]] = self.streams.get(streams[join], 0) + products / products.trace()


class _OfParent(Mapping[Key, Moments]):
    """Reads moments when they are asked for."""

    def __init__(self, kept: Kept, parent: int, keys: list[Key]) -> None:
        self._kept, self._parent, self._keys = kept, parent, dict.fromkeys(keys)

    def __getitem__(self, key: Key) -> Moments:
        if key not in self._keys:
            raise KeyError(key)
        return Moments(**self._kept["moments", self._parent, key])

    def __iter__(self) -> Iterator[Key]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)
