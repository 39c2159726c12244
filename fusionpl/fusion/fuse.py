"""fuse(): plan, then one sweep through the networks."""

import sys
from collections.abc import Iterable, Sequence
from contextlib import closing
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fusionpl.calibration.batches import Progress, no_progress
from fusionpl.calibration.flow import CalibrationSet, sum_over_ranks
from fusionpl.calibration.forward import device_named, device_of, has_float64
from fusionpl.calibration.kept import Kept, budget
from fusionpl.calibration.network import Network
from fusionpl.errors import FusionError
from fusionpl.families import (
    VOCABULARY,
    Family,
    bind,
    check_compatible,
    check_tied,
    is_bare,
    own_state,
    read_family,
)
from fusionpl.fusion.config import FuseConfig, mixing_weights, resolve_anchor
from fusionpl.fusion.depth import Matching, levelled
from fusionpl.fusion.forms import check_forms, formed
from fusionpl.fusion.goal import goal_of, parted, settled, tied_alike
from fusionpl.fusion.heads import best_head
from fusionpl.fusion.kin import kinship
from fusionpl.fusion.matching import check_kinds, match_padding, match_tags
from fusionpl.fusion.parents import AlignedParent
from fusionpl.fusion.pixels import keep_pixels, match_pixels, said
from fusionpl.fusion.plan import Plan, left_out, make_plan
from fusionpl.fusion.refine import Taught, check_start, refine
from fusionpl.fusion.result import FusionResult, InMemory, Sink
from fusionpl.fusion.survey import Survey
from fusionpl.fusion.sweep import Sweep, Team, look
from fusionpl.fusion.teaching import Augment
from fusionpl.fusion.units import APART, TRIAL, candidates, knowledge, preferred, specialisation
from fusionpl.models.adapters import adapter_beside
from fusionpl.models.images import at_image_size, told
from fusionpl.models.labels import NUMBERS, TAGS, kind_of
from fusionpl.models.load import load_model
from fusionpl.models.opened import ModelFolder, open_model
from fusionpl.models.pipelines import check_tokenizers
from fusionpl.models.preprocessing import ImageProcessing
from fusionpl.models.save import class_names, save_model
from fusionpl.models.sentence import copy_modules, width_of
from fusionpl.models.settings import compare_settings
from fusionpl.models.token_settings import check_token_settings
from fusionpl.models.tokenizers import load_tokenizer
from fusionpl.models.vocabulary import Vocabulary, renumber
from fusionpl.models.writer import ModelWriter

Parent = nn.Module | str | Path


def fuse(
    parents: Sequence[Parent],
    calibration: Iterable[Any],
    config: FuseConfig | None = None,
    *,
    names: Sequence[str] | None = None,
    device: torch.device | str | None = None,
    output: str | Path | None = None,
    unlabelled: Iterable[Any] | None = None,
    augment: Augment | None = None,
    processing: ImageProcessing | None = None,
    seed: int = 0,
    allow_pickle: bool = False,
    family: Family | str | Path | None = None,
    progress: Progress = no_progress,
) -> FusionResult:
    """Aligns the parents to the anchor and averages them into one model.

    Source: Imfeld et al., "Transformer Fusion with Optimal Transport", ICLR 2024.

    Args:
        parents: two or more models of one family and set of classes, or anything `load_model` takes; widths and depths
            may differ. Models are used where they are; of what is named, one block at a time is in memory.
        calibration: any iterable of batches (mapping of model inputs, or image tensor [B, C, H, W]); labels are never
            read. With `align.evidence: weights` it may be empty. It is iterated once.
        config: see FuseConfig.
        names: how messages call the parents.
        device: where parents that are named are fused; by default where the others are, or the CPU.
        output: a run folder that gets model/, maps.safetensors and config.yaml; where the anchor is named, the fused
            model is written into it block by block, and loaded only when `FusionResult.model` is asked for.
        unlabelled: a DataLoader of more samples that learned refinement teaches on, beside the calibration set: its
            data set and collate function are used, in an order of its own; labels are never read.
        augment: changes a batch of model inputs at random, from torch's global RNG, where `refine.augment` asks for it.
        processing: how images of `calibration` are prepared, and the fused model takes them; by default as the anchor's
            folder says. A parent that is named, and whose folder says another mean or deviation, has its patch
            embedding rewritten for it.
        seed: decides what learned refinement draws: the order of the samples, augmentation, dropout; nothing else is
            random.
        allow_pickle: see `load_model`.
        family: what the parents are, where the library does not say (or not well): a YAML file as
            docs/families.md explains, or a Family.
        progress: wraps loops for a progress bar.

    Returns:
        FusionResult; its model is new, the parents are untouched.

    Raises:
        FusionError: parents that do not fit together, a family that does not fit them, NaN weights, an empty
            calibration set, options that don't fit, a device that is not there.
    """
    config = config or FuseConfig()
    ready = Calibrated(
        parents, calibration, [config], names=names, device=device, unlabelled=unlabelled, augment=augment,
        processing=processing, seed=seed,
        allow_pickle=allow_pickle, family=family, progress=progress,
    )  # fmt: skip
    return ready.fuse(config, output=output)


class Calibrated:
    """Parents that are ready for fusion under one or several configurations.

    For several, one walk through the parents collects what all of them compare; each fusion then runs the parents again
    only to refit.

    Args:
        parents, names, device, unlabelled, augment, processing, seed, allow_pickle, family, progress: see `fuse`.
        calibration: see `fuse`.
        configs: they share the anchor, what is collected (`calibration` but for its `scale`), `strategy`, `depth` and
            `align.stream`.

    Attributes:
        matchings: for parents of another depth than the fused model's, which of their blocks stand for which of its.

    Raises:
        FusionError: see `fuse`; configurations that can't share a calibration.
    """

    def __init__(
        self,
        parents: Sequence[Parent],
        calibration: Iterable[Any],
        configs: Sequence[FuseConfig],
        *,
        names: Sequence[str] | None = None,
        device: torch.device | str | None = None,
        unlabelled: Iterable[Any] | None = None,
        augment: Augment | None = None,
        processing: ImageProcessing | None = None,
        seed: int = 0,
        allow_pickle: bool = False,
        family: Family | str | Path | None = None,
        progress: Progress = no_progress,
    ) -> None:
        first = configs[0]
        self._unlabelled, self._augment, self._seed = unlabelled, augment, seed
        self.names = list(names or (f"parent {index}" for index in range(len(parents))))
        check_count(len(parents))
        anchor = resolve_anchor(first, len(parents))
        for config in configs:
            mixing_weights(config.weights, len(parents))
        opened = open_parents(parents, self.names, device, allow_pickle=allow_pickle, family=read_family(family))
        self._read = match_parents(parents, opened, anchor, processing)
        closed = opened[anchor][0].binding.closed
        networks = tied_alike([network for network, _ in opened])
        self._processing = processing or said(parents[anchor], networks[anchor])
        self._read += check_parents(networks, parents, anchor)
        taught = any(config.refine.asked for config in configs)
        if taught and is_bare(networks[anchor].module):
            raise FusionError("encoders without a head have no outputs to be taught; leave refine.method at none")
        for config in configs:
            check_start(config, [network.module for network in networks], networks[anchor].binding)
        self._source, self._folder = parents[anchor], opened[anchor][1]
        configs = [settled(config, networks, anchor) for config in configs]
        first = configs[0]
        level, self.matchings = ready(networks, anchor, first)
        check_tied({network.name: network.binding for network in level})
        self._parted = [
            f"'{name}' is no longer embedding and decoder in one: the fused model's decoder has parameters of its own, "
            "because what writes the stream and what reads it are moved apart"
            for name in closed - level[anchor].binding.closed
        ]
        plans = [plan_of(level, anchor, config, self.names)[1] for config in configs]
        self._limit = budget(first.calibration.memory, networks[anchor].device)
        kept = Kept(self._limit)
        observes = taught or first.strategy == "head" or any(plan.observes for plan in plans)
        data = CalibrationSet(calibration, first.calibration, kept) if observes else None
        if data is not None and self.matchings:
            level, self.matchings = ready(networks, anchor, first, data)
            plans = [plan_of(level, anchor, config, self.names)[1] for config in configs]
        self._team = Team([formed(network, configs) for network in level], anchor, data, Survey(kept), progress)
        if data is not None:
            check_forms(self._team.parents, first, data)
        keys = [key for plan in plans for key in plan.survey]
        magnitudes: list[str] = []
        if len(configs) > 1:
            keys += [key for plan in plans for section in plan.sections for key in section.keys]
            magnitudes = [axis for plan in plans for section in plan.sections for axis in section.magnitudes]
        together = {join: stream for plan in plans for join, stream in plan.together.items()}
        look(
            self._team, list(dict.fromkeys(keys)), list(dict.fromkeys(magnitudes)), first.calibration.tokens, together
        )  # fmt: skip
        joint = any(config.strategy == "joint" for config in configs)
        classifies = "classes" in networks[anchor].binding.axes and kind_of(networks[anchor].module) != NUMBERS
        self._specialised = specialisation(self._team) if joint and classifies else None
        self._team.apart = self._specialised is not None and self._specialised >= APART and self._team.kind != TAGS
        fitted = first.strategy == "head" or any(config.refit.method != "none" for config in configs)
        if self._team.kind == TAGS and (taught or fitted):
            self._team.known = knowledge(self._team)

    def fuse(self, config: FuseConfig, *, output: str | Path | None = None) -> FusionResult:
        """Fuses under one of the configurations; see `fuse`."""
        team = self._team
        config = settled(config, team.parents, team.anchor)
        notes = [one.told for one in self.matchings]
        if team.known is not None:
            notes.append("each tag is fitted to what the parents give it, mostly those that know it")
        if config.strategy == "head":
            return self._with_best_head(config, output)
        if config.strategy == "joint":
            configs, told = candidates(config, self._specialised)
            config, found = preferred(*map(self._trial, configs)) if len(configs) > 1 else (configs[0], [])
            notes += told + found
        goal, plan = plan_of(team.parents, team.anchor, config, self.names)
        weights = mixing_weights(config.weights, len(team.parents))
        sink: Sink = InMemory(goal, Kept(sys.maxsize))
        folder = self._folder if self._folder and self._folder.module is goal.module else None
        if output is not None and folder is not None:
            sink = ModelWriter(folder, Path(output) / "model")
        sweep = Sweep(team, plan, config, weights, goal, sink, Kept(self._limit))
        with closing(sink):
            sweep.run()
            sink.finish()
        result = FusionResult(sink, sweep.aligned, team.anchor, goal, config, plan.keep)
        foreign = [one.warning for one in self.matchings if one.warning]
        idle = [network.idle for network in team.parents]
        heads = left_out(plan, [network.binding for network in team.parents], goal.binding, self.names, idle)
        result.warnings = [*self._read, *self._parted, *foreign, *heads, *_unconverged(result, self.names)]
        result.matchings, result.notes = self.matchings, notes
        taught: Taught | None = None
        if config.refine.asked:
            taught = refine(
                result.model, goal.binding, sweep.aligned, team.data, config, more=self._unlabelled,
                augment=self._augment if config.refine.augment else None, seed=self._seed,
                tags=team.tag_weights(weights), progress=team.progress,
            )  # fmt: skip
            result.taught(taught)
        if output is not None:
            if folder is None or (taught is not None and taught.parent is not None):
                self._save(result.model, Path(output))
            elif taught is not None:
                with closing(ModelWriter(folder, Path(output) / "model")) as refined:
                    refined.write(dict(result.model.named_parameters()))
                    refined.finish()
            own = taught is not None and taught.parent is not None
            self._save_beside(result, result.model if own else goal.module, Path(output))
        return result

    def _with_best_head(self, config: FuseConfig, output: str | Path | None) -> FusionResult:
        """One parent, and its head fitted to what all predict."""
        team, weights = self._team, mixing_weights(config.weights, len(self._team.parents))
        samples = [(first, team.data[index]) for index, first in enumerate(team.data.firsts)]
        wholes = [network.whole() for network in team.parents]
        index, model, fit = best_head(
            wholes, team.tag_weights(weights) or weights, samples, family=team.binding.family,
            memory=config.calibration.memory, reduce=lambda sums: sum_over_ranks([*sums]),
        )  # fmt: skip
        family, device = team.binding.family, team.parents[index].device
        goal = Network(model, bind(model, family), "the fused model", device=device)
        sink = InMemory(goal, Kept(sys.maxsize))
        sink.write(own_state(model))
        parents = [AlignedParent(network, None, weight) for network, weight in zip(team.parents, weights, strict=True)]
        result = FusionResult(sink, parents, index, goal, config, frozenset())
        told = f"({fit.after:.4f} nats away on samples that were left out, {fit.before:.4f} before)"
        result.warnings = self._read
        result.notes = [f"head: {self.names[index]} is nearest to the mean of all with its head fitted {told}"]
        if output is not None:
            self._save(result.model, Path(output))
            self._save_beside(result, model, Path(output))
        return result

    def _save(self, model: nn.Module, output: Path) -> None:
        """Writes a model that is not the anchor's folder with other weights."""
        tokenizer = None if isinstance(self._source, nn.Module) else load_tokenizer(self._source)
        save_model(model, output / "model", tokenizer=tokenizer)
        if self._folder:
            copy_modules(self._folder.path, output / "model", width_of(model))

    def _save_beside(self, result: FusionResult, like: nn.Module, output: Path) -> None:
        """Writes what belongs to a model that is written; `like` takes images as it does."""
        if self._processing is not None:
            keep_pixels(output / "model", like, self._processing)
        result.save_maps(output)

    def _trial(self, config: FuseConfig) -> Sweep:
        """A fusion on a part of the samples, to be judged and thrown away."""
        team = self._team.head(TRIAL)
        goal, plan = plan_of(team.parents, team.anchor, config, self.names)
        weights = mixing_weights(config.weights, len(team.parents))
        kept = Kept(self._limit)
        return Sweep(team, plan, config, weights, goal, InMemory(goal, kept), kept, trial=True)


def ready(
    networks: Sequence[Network], anchor: int, config: FuseConfig, data: CalibrationSet | None = None
) -> tuple[list[Network], list[Matching]]:
    """Parents as a fusion takes them: decoders apart where that is needed, and all of one depth; see `levelled`."""
    return levelled([parted(network) for network in networks] if config.canonical else networks, anchor, config, data)


def plan_of(networks: Sequence[Network], anchor: int, config: FuseConfig, names: Sequence[str]) -> tuple[Network, Plan]:
    """What the fused network looks like, and the plan of the fusion, of parents that are `ready`: see `goal_of` and
    `make_plan`."""
    goal, idle = goal_of(networks[anchor], config), [network.idle for network in networks]
    return goal, make_plan([network.binding for network in networks], anchor, config, names, goal.binding, idle)


def open_parents(
    parents: Sequence[Parent],
    names: Sequence[str],
    device: torch.device | str | None = None,
    *,
    allow_pickle: bool = False,
    family: Family | None = None,
) -> list[tuple[Network, ModelFolder | None]]:
    """Binds each parent; of one that is named no weight is read where its library allows that.

    Args:
        parents: models, or anything `load_model` takes.
        names: how messages call them.
        device: where those that are named go; by default where the first model is, or the CPU.
        allow_pickle: see `load_model`.
        family: see `bind`.

    Raises:
        FusionError: see `load_model` and `bind`; there is no such device.
    """
    homes = [device_of(parent) for parent in parents if isinstance(parent, nn.Module)]
    home = next(iter(homes), torch.device("cpu")) if device is None else device_named(device)
    found: list[tuple[Network, ModelFolder | None]] = []
    for parent, name in zip(parents, names, strict=True):
        if isinstance(parent, nn.Module):
            found.append((Network(parent, bind(parent, family), name), None))
        elif (folder := open_model(parent, allow_pickle=allow_pickle)) is not None:
            for buffer_owner in folder.module.modules():
                for key, buffer in buffer_owner.named_buffers(recurse=False):
                    buffer_owner._buffers[key] = buffer.to(home)
            binding = bind(folder.module, family)
            found.append((Network(folder.module, binding, name, read=folder.read, device=home), folder))
        else:
            model = load_model(parent, allow_pickle=allow_pickle).to(home)
            found.append((Network(model, bind(model, family), name), None))
    return found


def match_parents(
    parents: Sequence[Parent],
    opened: list[tuple[Network, ModelFolder | None]],
    anchor: int,
    processing: ImageProcessing | None = None,
) -> list[str]:
    """Gives parents the anchor's size and preparation of images and its numbers of tokens, and the tags of all;
    `opened` holds them afterwards.

    Args:
        parents, opened, anchor: see `match_vocabularies`.
        processing: how images are prepared, in place of what the anchor's folder says.

    Returns:
        What a reader should know of how the parents are read, a line each.

    Raises:
        FusionError: parents that cut images into patches of different size, or can't take images as they are prepared;
            see `check_tokenizers`, `match_padding` and `check_token_settings`.
    """
    lines = [line for _, folder in opened if folder is not None and (line := adapter_beside(folder.path)) is not None]
    lines += _match_images(opened, anchor)
    lines += match_pixels(parents, [network for network, _ in opened], anchor, processing)
    lines += [*match_vocabularies(parents, opened, anchor), *match_tags(opened, anchor)]
    lines += match_padding(parents, [network for network, _ in opened], anchor)
    # The anchor first, whose settings the fused model has.
    modules = {network.name: network.module for network, _ in (opened[anchor], *opened)}
    return [*lines, *check_token_settings(modules)]


def _match_images(opened: list[tuple[Network, ModelFolder | None]], anchor: int) -> list[str]:
    reference = opened[anchor][0]
    family, lines = reference.binding.family, []
    for index, (network, folder) in enumerate(opened):
        names = network.name, reference.name
        if network.binding.family.name != family.name:  # which is refused later
            continue
        if (found := at_image_size(network.module, reference.module, family, names)) is not None:
            module, moved = found
            read = network.read
            opened[index] = (
                Network(
                    module, bind(module, family), network.name, device=network.device,
                    read=lambda name, read=read, moved=moved: moved(name, read(name)),  # type: ignore[misc]
                ),
                folder,
            )  # fmt: skip
            lines.append(told(network.name, network.module, reference.name, reference.module))
    return lines


def match_vocabularies(
    parents: Sequence[Parent], opened: Sequence[tuple[Network, ModelFolder | None]], anchor: int
) -> list[str]:
    """Gives parents that are named, and number the same tokens differently, the anchor's numbers.

    Args:
        parents: see `fuse`.
        opened: what `open_parents` made of them.
        anchor: index of the anchor; where it is a model, or has no tokenizer, nothing is matched.

    Returns:
        A line for each parent whose rows were matched.

    Raises:
        FusionError: see `check_tokenizers`.
    """
    reference, source = opened[anchor][0], parents[anchor]
    family = reference.binding.family
    vocabulary = None if isinstance(source, nn.Module) else Vocabulary.of(source, reference.module, family)
    lines = []
    for parent, (network, folder) in zip(parents, opened, strict=True):
        if VOCABULARY not in network.binding.axes or isinstance(parent, nn.Module) or isinstance(source, nn.Module):
            continue
        tokenizer = load_tokenizer(parent)
        if vocabulary is None or tokenizer is None:
            if vocabulary is not None or tokenizer is not None:
                has, lacks = (network, reference) if vocabulary is None else (reference, network)
                lines.append(
                    f"{lacks.name} has no tokenizer: its tokens are taken to be those of {has.name}, numbered and cut "
                    "as there; copy its own beside it to have that checked"
                )
            continue
        lines += check_tokenizers({reference.name: vocabulary.tokenizer, network.name: tokenizer})
        found = vocabulary.renumbering(tokenizer, network.binding.axes[VOCABULARY].size)
        if found is not None:
            moved = renumber(network.module, found, family, name=network.name)
            if folder is not None:
                network.read = lambda name, read=network.read, moved=moved: moved(name, read(name))  # type: ignore[misc]
            network.binding, network.absent = bind(network.module, family), found.absent if len(found.absent) else None
            lines.append(found.told(network.name, reference.name))
    return lines


def check_count(count: int) -> None:
    """Raises FusionError for fewer than two parents."""
    if count < 2:
        raise FusionError(f"fusion needs at least two parents, not {count}; give --parents A B")


def check_parents(networks: Sequence[Network], sources: Sequence[Parent], anchor: int) -> list[str]:
    """Checks that two or more parents can be fused.

    Args:
        networks: the parents.
        sources: where they come from.
        anchor: index of the anchor.

    Returns:
        What a reader should know of how they belong together, a line each.

    Raises:
        FusionError: naming the parents and what differs.
    """
    first = networks[0]
    for network in networks:
        if network.device != first.device:
            raise FusionError(
                f"{first.name} is on {first.device}, {network.name} on {network.device}; move them to one with "
                "parent.to(device)"
            )
    if not has_float64(first.device):
        raise FusionError(
            f"the parents are on {first.device}, which has no float64; fuse them on the CPU: parent.to('cpu')"
        )
    check_kinds({network.name: kind_of(network.module) for network in networks})
    check_compatible({network.name: network.binding for network in networks})
    classes = {network.name: labels for network in networks if (labels := class_names(network.module))}
    named, reference = next(iter(classes.items()), ("", ()))
    for name, labels in classes.items():
        if labels != reference:
            ours, theirs = next((a, b) for a, b in zip_longest(reference, labels) if a != b)
            raise FusionError(
                f"parents of different class names: where {named} has '{ours}', {name} has '{theirs}'; "
                "train both on the same classes"
            )
    differing = compare_settings({network.name: network.module for network in networks}, networks[anchor].name)
    return [*differing, *kinship(networks, sources, anchor)]


def _unconverged(result: FusionResult, names: Sequence[str]) -> list[str]:
    lines = []
    for alignment, name in zip(result.alignments, names, strict=True):
        bad = alignment.maps.unconverged() if alignment else {}
        if alignment and bad:
            axis, worst = max(bad.items(), key=lambda item: item[1].marginal_error)
            lines.append(
                f"{name}: {worst.solver} did not converge on {len(bad)} of {len(alignment.maps)} axes, worst '{axis}' "
                f"(marginal error {worst.marginal_error:.1e} after {worst.iterations} iterations); "
                "raise align.reg or use align.solver emd"
            )
    return lines
