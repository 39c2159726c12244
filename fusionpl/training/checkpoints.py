"""How checkpoints get onto the disk."""

import io
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from fusionpl.files import whole


class WholeCheckpoints(TorchCheckpointIO):
    """Writes a checkpoint beside the one that it replaces, then renames it: a run that is killed has one or the other.

    Lightning writes it to $TMPDIR, which may be full and is often another file system: then the move is a copy, and
    a kill in the middle of it leaves a damaged checkpoint and no other.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Saves a checkpoint to a new file, then gives it its name.

        Raises:
            OSError: there is no room; what was there stays.
        """
        # torch.save to a file would turn a full disk into an error of its zip writer
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        with whole(Path(path)) as new:
            new.write_bytes(buffer.getbuffer())
