"""The alternative to fusing parents of different width: one learns from the other."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from fusionpl.calibration import eval_mode, logits
from fusionpl.training import ClassificationModule, OptimConfig


class Distillation(ClassificationModule):
    """Training on the labels and on a teacher's probabilities, half each.

    Source: Hinton et al., "Distilling the Knowledge in a Neural Network", 2015, at temperature 1.

    Args:
        model, optim, num_classes, metrics: see ClassificationModule.
        teacher: a model with the same classes.
    """

    def __init__(
        self, model: nn.Module, optim: OptimConfig, num_classes: int, metrics: Sequence[str], *, teacher: nn.Module
    ) -> None:
        super().__init__(model, optim, num_classes, metrics)
        self.teacher = [teacher]  # in a list, so that it is neither trained nor saved

    def on_fit_start(self) -> None:
        """Brings the teacher to where the model is."""
        self.teacher[0].to(self.device)

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        """The mean of the two losses."""
        with torch.no_grad(), eval_mode(self.teacher[0]):
            probabilities = logits(self.teacher[0], batch).softmax(-1)
        scores = self(batch)
        loss = functional.cross_entropy(scores, batch["labels"]) + functional.cross_entropy(scores, probabilities)
        return loss / 2
