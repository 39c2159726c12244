"""Parents and data that a command line names, opened, with no weight read."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fusionpl.cli.fuse import Asked
from fusionpl.cli.jobs.data import check_known, common_tokenizer, data_module, data_of_each, follow, sets_of_each
from fusionpl.datamodules.base import FixedSplits
from fusionpl.datamodules.config import AUTO
from fusionpl.datamodules.joint import OwnSplits
from fusionpl.datamodules.separate import SeparateSplits
from fusionpl.families.family import VOCABULARY, Family, read_family
from fusionpl.fusion.config import FuseConfig, mixing_weights, resolve_anchor
from fusionpl.fusion.fuse import Fusion, prepare_team
from fusionpl.fusion.prepare import open_team
from fusionpl.fusion.team import Team
from fusionpl.fusion.voting import Voting, votings_apart, votings_of
from fusionpl.models.classes import missing_classes
from fusionpl.models.pipelines import check_tokenizers
from fusionpl.models.preprocessing import ImageProcessing
from fusionpl.models.tokenizers import load_tokenizer
from fusionpl.models.vocabulary import Vocabulary, load_parent


@dataclass(frozen=True)
class Job:
    """What a command line asks for, with parents and data.

    Attributes:
        asked: the command line, read.
        team: the parents.
        device: where they are fused.
        data: to calibrate and test on.
        tokenizer: that the parents share, or None.
        family: the user's own, or None.
    """

    asked: Asked
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
        team = _open(asked, config, device, decreed, family)
        if args.own_data:
            data: FixedSplits = (
                SeparateSplits(sets_of_each(args, parents, tokenizer), team.heads, team.reference.name, family)
                if team.heads
                else data_of_each(args, parents, tokenizer, team.reference.name)
            )
        else:
            data = data_module(args.task, args.data, 0, tokenizer, args.parents)
            check_known({network.name: network.module for network in team.networks}, data)
        follow(data, team.reference.module, list(parents.values())[anchor])
        check_tokenizers(tokenizers, texts=data.texts())
        data.check_reads(team.reference.module)
        return cls(asked, team, device, data, tokenizer, family)

    def prepared(self, config: FuseConfig) -> Fusion:
        """The fusion under a configuration.

        Raises:
            FusionError: options that don't fit the parents.
        """
        team = self.team
        if resolve_anchor(config, len(team)) != team.anchor:
            team = _open(self.asked, config, self.device, self.data.processing, self.family)
        return prepare_team(team, config, self.data.processing)

    @property
    def remarks(self) -> list[str]:
        """What would help, a line each."""
        apart = any(missing_classes(network.module) is not None for network in self.team.networks)
        if isinstance(self.data, OwnSplits) or not apart:
            return []
        return [
            "parents know other classes, and nothing says whose data these are: with the data of each parent "
            "(--data.path A B, a path for each, in their order) the fused model learns who knows what"
        ]

    @property
    def votings(self) -> list[Voting]:
        """Who says what a model is to predict."""
        weights = mixing_weights(self.asked.config.weights, len(self.team))
        if self.team.heads:
            return votings_apart(self.team.heads, weights)
        return votings_of([network.module for network in self.team.networks], weights)

    def check_room(self, fusion: Fusion, output: Any = None) -> str:
        """What a fusion needs, in a line; `output` is where its model goes.

        Raises:
            FusionError: there is not so much memory or disk.
        """
        batch = self.data.calibration_batch(fusion.plan.config.calibration.batch_size)
        needs = fusion.needs(batch, self.data.calibration_sizes(), self.device)
        if not self.asked.args.dry_run:
            needs.check(self.device, output)
        return needs.summary(self.device)

    def load(self, name: str) -> nn.Module:
        """A whole parent, with the anchor's vocabulary and its size and preparation of images; where heads are kept
        apart, with an output for those of all."""
        if self.team.heads:
            return self.team.networks[list(self.asked.parents).index(name)].original.whole()
        axis, like = self.team.binding.axes.get(VOCABULARY), self.team.reference.module
        vocabulary = Vocabulary(self.tokenizer, axis.size) if axis and self.tokenizer is not None else None
        model = load_parent(
            self.asked.parents[name], vocabulary, like, processing=self.data.processing,
            allow_pickle=self.asked.args.allow_pickle, family=self.family,
        )  # fmt: skip
        self.data.follow(model)
        return model


def _open(
    asked: Asked, config: FuseConfig, device: torch.device, processing: ImageProcessing | None, family: Family | None
) -> Team:
    return open_team(
        list(asked.parents.values()), config, names=list(asked.parents), device=device, processing=processing,
        allow_pickle=asked.args.allow_pickle, family=family,
    )  # fmt: skip
