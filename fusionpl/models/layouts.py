"""What files of weights are called."""

import fnmatch
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    """How transformers names files of weights: one file, or shards and an index of them."""

    stem: str
    suffix: str

    @property
    def whole(self) -> str:
        """The name of a single file."""
        return f"{self.stem}.{self.suffix}"

    @property
    def index(self) -> str:
        """The name of the index of shards."""
        return f"{self.whole}.index.json"

    @property
    def patterns(self) -> tuple[str, str]:
        """Names of files of weights, as glob patterns."""
        return self.whole, f"{self.stem}-*.{self.suffix}"

    def held(self, names: Iterable[str]) -> list[str]:
        """The names, among those given, that are files of weights in this layout."""
        return sorted(name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in self.patterns))


SAFETENSORS, PICKLES = Layout("model", "safetensors"), Layout("pytorch_model", "bin")
MODELS, ADAPTERS = (SAFETENSORS, PICKLES), (Layout("adapter_model", "safetensors"), Layout("adapter_model", "bin"))


def pickle_hint(name: str) -> str:
    """Says how a pickle can be read."""
    return f"{name} is a pickle: --allow-pickle (allow_pickle=True) reads the tensors in it and nothing else"
