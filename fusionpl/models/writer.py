"""Writes a model folder parameter by parameter, with the configuration of one that is there."""

import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from torch import Tensor, nn

from fusionpl.files import beside, put_in_place
from fusionpl.models.adapters import CONFIG
from fusionpl.models.hub import SMALL_FILES
from fusionpl.models.load import load_model
from fusionpl.models.opened import ModelFolder
from fusionpl.models.save import forget_places, library_of, write_card
from fusionpl.models.sentence import copy_modules, width_of
from fusionpl.models.tensors import TensorFile
from fusionpl.models.token_settings import keep_padding


class ModelWriter:
    """A new model folder with the architecture of another, whose weights come one after the other.

    It grows beside its place (or above, where there is no such folder yet) and moves there when it is finished; `close`
    leaves nothing of what is not.

    Args:
        like: the model whose configuration and tokenizer it takes.
        folder: where it goes; what is there is replaced.
    """

    def __init__(self, like: ModelFolder, folder: Path) -> None:
        self.like, self.folder = like, folder
        self._held = ExitStack()
        self._new = self._held.enter_context(beside(folder)) / "new"
        self._new.mkdir()
        for file in (file for pattern in SMALL_FILES for file in like.path.glob(pattern)):
            if not file.name.endswith(".index.json") and file.name != CONFIG:  # without its adapter it is no good
                shutil.copy(file, self._new)
        names = [*dict.fromkeys(like.names.values()), *like.buffers]
        layout = {name: (like.tensors.entries[name].shape, like.tensors.entries[name].dtype) for name in names}
        self._file = TensorFile(self._new / "model.safetensors", layout)
        for name in like.buffers:
            self._file.write(name, like.tensors[name])

    def write(self, state: Mapping[str, Tensor]) -> None:
        """Writes some of the parameters, by their names in memory."""
        for name, tensor in state.items():
            self._file.write(self.like.names[name], tensor)

    def read(self, name: str) -> Tensor:
        """A parameter that was written."""
        return self._file.read(self.like.names[name])

    def finish(self) -> None:
        """Moves the folder into its place."""
        assert not self._file.missing, self._file.missing
        copy_modules(self.like.path, self._new, width_of(self.like.module))
        keep_padding(self._new, self.like.module)
        forget_places(self._new)
        write_card(self._new, library_of(self.like.module), f"# {self.folder.parent.name}")
        put_in_place(self._new, self.folder)

    def close(self) -> None:
        """Removes what was not finished."""
        self._held.close()

    def model(self) -> nn.Module:
        """The finished model: see `load_model`."""
        return load_model(self.folder)
