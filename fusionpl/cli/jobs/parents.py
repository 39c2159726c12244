"""Parents and data that a command line names, opened, with no weight read."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jsonargparse import Namespace
from torch import nn

from fusionpl.calibration.cursor import CalibrationSet
from fusionpl.calibration.kept import Kept, budget
from fusionpl.cli.fuse import Asked
from fusionpl.cli.jobs.data import common_tokenizer, data_module, follow
from fusionpl.datamodules.base import FixedSplits
from fusionpl.datamodules.config import AUTO
from fusionpl.families.family import VOCABULARY, Family, read_family
from fusionpl.fusion.config import FuseConfig, resolve_anchor
from fusionpl.fusion.fuse import Fusion, prepare_team
from fusionpl.fusion.prepare import open_team
from fusionpl.fusion.team import Team
from fusionpl.models.pipelines import check_tokenizers
from fusionpl.models.preprocessing import ImageProcessing
from fusionpl.models.tokenizers import load_tokenizer
from fusionpl.models.vocabulary import Vocabulary, load_parent


@dataclass(frozen=True)
class Job:
    """What a command line asks for.

    Attributes:
        args: the options.
        settings: those that decide the result, as plain values.
        config: how to fuse.
        parents: short name -> where the parent comes from.
        team: the parents.
        device: where they are fused.
        data: to calibrate and test on.
        tokenizer: that the parents share, or None.
        family: the user's own, or None.
    """

    args: Namespace
    settings: dict[str, Any]
    config: FuseConfig
    parents: Mapping[str, str]
    team: Team
    device: torch.device
    data: FixedSplits
    tokenizer: Any
    family: Family | None

    @classmethod
    def of(cls, asked: Asked, device: torch.device) -> "Job":
        """Reads configurations of models, and data.

        Raises:
            FusionError: a user's mistake.
        """
        args, config, parents = asked.args, asked.config, asked.parents
        family, anchor = read_family(args.family), resolve_anchor(config, len(parents))
        decreed = ImageProcessing(decreed=True) if getattr(args.data, "normalize", AUTO) != AUTO else None
        tokenizers = {name: load_tokenizer(path) for name, path in parents.items()}
        tokenizer = common_tokenizer(tokenizers, anchor)
        team = open_team(
            list(parents.values()), config, names=list(parents), device=device, processing=decreed,
            allow_pickle=args.allow_pickle, family=family,
        )  # fmt: skip
        data = data_module(args.task, args.data, 0, tokenizer, args.parents)
        follow(data, team.reference.module, list(parents.values())[anchor])
        check_tokenizers(tokenizers, texts=data.texts())
        data.check_reads(team.reference.module)
        return cls(args, asked.settings, config, parents, team, device, data, tokenizer, family)

    def prepared(self, config: FuseConfig) -> Fusion:
        """The fusion under a configuration.

        Raises:
            FusionError: options that don't fit the parents.
        """
        team = self.team
        if resolve_anchor(config, len(team)) != team.anchor:
            team = open_team(
                list(self.parents.values()), config, names=list(self.parents), device=self.device,
                processing=self.data.processing, allow_pickle=self.args.allow_pickle, family=self.family,
            )  # fmt: skip
        return prepare_team(team, config, self.data.processing)

    def check_room(self, fusion: Fusion, output: Any = None) -> str:
        """What a fusion needs, in a line; `output` is where its model goes.

        Raises:
            FusionError: there is not so much memory or disk.
        """
        loader = self.data.calibration_dataloader(fusion.plan.config.calibration.batch_size)
        needs = fusion.needs(next(iter(loader)), len(loader.dataset), self.device)  # type: ignore[arg-type]
        if not self.args.dry_run:
            needs.check(self.device, output)
        return needs.summary(self.device)

    def load(self, name: str) -> nn.Module:
        """A whole parent, with the anchor's vocabulary and its size and preparation of images."""
        axis, like = self.team.binding.axes.get(VOCABULARY), self.team.reference.module
        vocabulary = Vocabulary(self.tokenizer, axis.size) if axis and self.tokenizer is not None else None
        model = load_parent(
            self.parents[name], vocabulary, like, processing=self.data.processing,
            allow_pickle=self.args.allow_pickle, family=self.family,
        )  # fmt: skip
        self.data.follow(model)
        return model

    def calibration(self) -> CalibrationSet:
        """The calibration set, in this process."""
        config = self.config.calibration
        return CalibrationSet(self.data.calibration_dataloader(config.batch_size), config, Kept(budget(config.memory)))
