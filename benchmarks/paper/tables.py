"""The tables: which cells each has."""

import copy
import re
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial

from benchmarks import text
from benchmarks.common import JOINT, PAPER, TRANSPORT, Maker
from benchmarks.paper import tasks
from benchmarks.paper.cells import Cell, Table
from benchmarks.paper.choices import ALIGNMENTS, BLOCKS
from benchmarks.paper.scales import SEEDS, Lab, Subject
from benchmarks.paper.shards import SHARES, places, write_shards
from benchmarks.paper.team import SHRINK, Team
from fusionpl.fusion.config import load_config


def of_seeds(subject: Subject, seeds: Sequence[int]) -> Team:
    return Team(subject, tuple((subject.parents, seed) for seed in seeds))


def pairs(subject: Subject) -> Iterator[tuple[str, Team]]:
    for pair in subject.scale.pairs:
        yield "-".join(map(str, pair)), of_seeds(subject, pair)


def one_shot(lab: Lab) -> Table:
    """Parents, ensemble, vanilla and every variant."""
    cells: list[Cell] = []
    for repeat, team in pairs(lab.images):
        cells += team.references(repeat)
        cells += [Cell(name, repeat, partial(team.one_shot, make)) for name, make in team.makers().items()]
    return Table("One-shot test accuracy: nothing is trained after the average.", cells)


def finetune(lab: Lab) -> Table:
    """The same models after epochs of finetuning, each number of epochs a run with its own schedule."""
    cells: list[Cell] = []
    for repeat, team in pairs(lab.images):
        cells += team.references(repeat, "0")
        starts: dict[str, Maker] = {"best parent": team.best, "best parent, head fitted": team.head_fitted}
        starts |= team.makers()
        starts[f"taught for {60 * lab.scale.minutes:g} s, start auto"] = _once(
            partial(team.taught_from, "auto", 60 * lab.scale.minutes)
        )
        cells += [Cell(name, f"{repeat}, 0", partial(team.one_shot, make, "0")) for name, make in starts.items()]
        for name in ("best parent", "one stream"):
            starts[f"{name}, weights times {SHRINK:g}"] = partial(team.shrunk, starts[name])
        cells += [
            Cell(name, f"{repeat}, {epochs}", partial(team.finetuned, make, epochs, str(epochs)))
            for name, make in starts.items()
            for epochs in lab.scale.finetuning
        ]
    return Table("Test accuracy by epochs of finetuning.", cells, curve=True)


def _once(make: Maker) -> Maker:
    """Makes a model when it is first asked for, and gives copies of it."""
    made = cache(make)
    return lambda: copy.deepcopy(made())


def worth(lab: Lab) -> Table:
    """What a fusion is worth beside what its user has for nothing: parents of the same data, and of disjoint parts."""
    return _worth(lab.images, lab.scale.teams, lab.scale.widths, "Test accuracy")


def worth_text(lab: Lab) -> Table:
    """The same for language models; classes are topics."""
    return _worth(lab.text, lab.scale.text_teams, lab.scale.text_widths, "Test loss in nats a token")


def _worth(subject: Subject, teams: Sequence[int], widths: Sequence[float], what: str) -> Table:
    cells: list[Cell] = []
    for column, found in _settings(subject, teams):
        for repeat, team in found:
            makers: dict[str, Maker] = {"best parent": team.best, "best parent, head fitted": team.head_fitted}
            makers |= {"all trunks, one head": team.side_by_side, "vanilla": team.vanilla}
            makers["transport + refit"] = partial(team.fused, load_config(TRANSPORT))
            for width in widths:
                name = "one stream" if width == 1 else f"one stream, {width:g} times as wide"
                makers[name] = partial(team.fused, load_config(JOINT, {"width": width}))
            for units in ("anchor", "even"):
                makers[f"one stream, units {units}"] = partial(team.fused, load_config(JOINT, {"units": units}))
            makers |= {"one stream, refined": team.refined, "best parent, distilled as long": team.distilled}
            cells += team.references(f"{repeat}, {column}", column)
            cells += [
                Cell(name, f"{repeat}, {column}", partial(team.one_shot, make, column), subject.metric)
                for name, make in makers.items()
            ]
    return Table(
        f"{what} of fusions beside what their user has for nothing; the last two rows are taught by the "
        f"ensemble, without labels, for {subject.scale.minutes:g} minutes.",
        cells,
        cost=cache(partial(_worth_cost, subject)),
    )


def _worth_cost(subject: Subject, row: str, column: str) -> float | None:
    """FLOPs in multiples of a parent's."""
    if row in ("ensemble", "all trunks, one head"):
        counted = re.search(r"(\d+) parents", column)
        return float(counted[1]) if counted else 2.0
    if row in ("best parent", "best parent, head fitted", "one stream"):
        return 1.0
    wide = re.fullmatch(r"one stream, ([\d.]+) times as wide", row)
    return subject.flops(float(wide[1])) if wide else None


def _settings(subject: Subject, teams: Sequence[int]) -> Iterator[tuple[str, list[tuple[str, Team]]]]:
    """What the parents of a team saw, and the teams."""
    yield "same data", list(pairs(subject))
    for count in teams:
        for kind in SHARES:
            if count == 2 or kind == "80:20":
                yield (
                    f"{kind}, {count} parents",
                    [(str(seed), _of_shards(subject, [seed + at for at in range(count)], kind)) for seed, _ in
                     subject.scale.pairs],
                )  # fmt: skip


def teach(lab: Lab) -> Table:
    """What seconds of teaching without labels make of a team, from either start and by `auto`."""
    cells: list[Cell] = []
    for column, teams in _settings(lab.images, lab.scale.teams):
        for repeat, team in teams:
            makers: dict[str, Maker] = {"best parent": team.best, "best parent, head fitted": team.head_fitted}
            makers |= {"all trunks, one head": team.side_by_side}
            makers["one stream"] = partial(team.fused, load_config(JOINT))
            for seconds in lab.scale.teaching:
                for start in ("fused", "parent", "auto"):
                    makers[f"taught for {seconds} s, start {start}"] = partial(team.taught_from, start, seconds)
            cells += [
                Cell(name, f"{repeat}, {column}", partial(team.divergence, make, column), "divergence")
                for name, make in makers.items()
            ]
    return Table("Divergence of test predictions from the mean of the parents', in nats.", cells)


def of_tasks(lab: Lab) -> Table:
    """Parents that know different things, each fused with its own data and labels."""
    return Table(
        "Test accuracy over the classes of all parents, each parent's data counting alike; own: when only the classes "
        "of the parent whose data they are may be answered, in the mean.",
        list(tasks.cells(lab)),
    )


def parents(lab: Lab) -> Table:
    """More than two parents."""
    cells: list[Cell] = []
    for count in lab.scale.many:
        for first in range(len(lab.scale.pairs)):
            seeds = [SEEDS[(first + index) % len(SEEDS)] for index in range(count)]
            team, repeat, column = of_seeds(lab.images, seeds), "-".join(map(str, seeds)), f"{count} parents"
            cells += team.references(repeat, column)
            cells += [Cell(name, repeat, partial(team.one_shot, make, column)) for name, make in team.makers().items()]
    return Table("One-shot test accuracy by number of parents.", cells)


def _epochs(lab: Lab) -> str:
    return f"{lab.scale.short} epoch{'s' if lab.scale.short > 1 else ''}"


def widths(lab: Lab) -> Table:
    """A wide and a narrow parent, fused into either; and what else the narrow one could have done."""
    cells: list[Cell] = []
    for wide, narrow in lab.scale.pairs:
        repeat = f"{wide}-{narrow}"
        team = Team(lab.images, ((lab.parents(), wide), (lab.narrow, narrow)))
        cells += _unlike(team, repeat, "wide", "narrow")
        for anchor, direction in ((1, "wide into narrow"), (0, "narrow into wide")):
            changes = {"anchor": anchor, "align.scaling": "two_sided"}
            for name, file in (("OT activations soft", PAPER), ("transport + refit", TRANSPORT)):
                make = partial(team.fused, load_config(file, changes))
                cells.append(Cell(f"{direction}, {name}", repeat, partial(team.both, make)))
    return Table(f"Parents of different width and their fusion: test accuracy, finetuned for {_epochs(lab)}.", cells)


def depths(lab: Lab) -> Table:
    """A deep and a shallow parent, fused into either; and what else their owner could have done."""
    cells: list[Cell] = []
    for first, second in lab.scale.pairs:
        repeat = f"{first}-{second}"
        team = Team(lab.images, tuple(zip(lab.depths, (first, second), strict=True)))
        cells += _unlike(team, repeat, "deep", "shallow")
        for anchor, direction in ((1, "deep into shallow"), (0, "shallow into deep")):
            for name, file in (("transport + refit", TRANSPORT), ("one stream", JOINT)):
                make = partial(team.fused, load_config(file, {"anchor": anchor}))
                cells.append(Cell(f"{direction}, {name}", repeat, partial(team.both_beside, anchor, make)))
        for family, kinds in lab.scale.text_depths.items():
            groups = [lab.language(family, folder, *options) for folder, options in kinds.items()]
            measures = text.of_depths(family, groups, (first, second))
            cells += [Cell(f"{family}: {name}", repeat, measure, "loss") for name, measure in measures.items()]
    return Table(
        f"Parents of different depth and their fusion: test accuracy, finetuned for {_epochs(lab)}; test loss in nats "
        f"a token of language models, finetuned for {text.EPOCHS} epochs.",
        cells,
    )


def _unlike(team: Team, repeat: str, first: str, second: str) -> list[Cell]:
    """The two parents of a team whose first is the larger, and what is known without fusing them."""
    return [
        Cell(f"{first} parent", repeat, partial(team.both, partial(team.parent, 0))),
        Cell(f"{second} parent", repeat, partial(team.both, partial(team.parent, 1))),
        Cell(f"{second} parent, taught by the {first} one", repeat, team.taught),
        Cell("ensemble", repeat, team.ensemble),
    ]


def ablation(lab: Lab) -> Table:
    """Every choice of the paper, and the calibration samples of the paper's setting and of ours."""
    cells: list[Cell] = []
    named = {f"{block}: {name}": load_config(PAPER, changes)
             for block, rows in BLOCKS.items() for name, changes in rows.items()}  # fmt: skip
    for preset, file in (("paper", PAPER), ("transport + refit", TRANSPORT)):
        for samples in lab.scale.samples:
            named[f"Calibration samples, {preset}: {samples}"] = load_config(file, {"calibration.samples": samples})
    for repeat, team in pairs(lab.images):
        cells += team.references(repeat)
        cells.append(Cell("vanilla", repeat, partial(team.one_shot, team.vanilla)))
        # several choices name the same setting
        measured = cache(lambda config, team=team: team.one_shot(partial(team.fused, config)))
        cells += [Cell(name, repeat, partial(measured, config)) for name, config in named.items()]
    return Table("One-shot test accuracy by every choice of the fusion.", cells)


def beyond(lab: Lab) -> Table:
    """Every alignment, averaged and refitted; the preset transport, and what learned refinement adds."""
    cells: list[Cell] = []
    after = f", after {_epochs(lab)}"

    def add(name: str, repeat: str, team: Team, make: Maker, column: str, *, finetune: bool = False) -> None:
        cells.append(Cell(name, f"{repeat}, {column}", partial(team.one_shot, make, column)))
        if finetune:
            column += after
            cells.append(Cell(name, f"{repeat}, {column}", partial(team.finetuned, make, lab.scale.short, column)))

    for repeat, team in pairs(lab.images):
        cells += team.references(repeat, "average")
        add("best parent", repeat, team, team.best, "average", finetune=True)
        add("vanilla", repeat, team, team.vanilla, "average", finetune=True)
        add("vanilla", repeat, team, team.refitted_vanilla, "refitted")
        for name, changes in ALIGNMENTS.items():
            for column, more in (("average", {}), ("refitted", {"refit.method": "ridge"})):
                make = partial(team.fused, load_config(PAPER, {**changes, **more}))
                add(name, repeat, team, make, column, finetune=column == "average" and name.startswith("paper"))
        for end, more in (("", {}), (" + refine", {"refine.method": "gradient", "refine.start": "fused"})):
            name, make = f"transport + refit{end}", partial(team.fused, load_config(TRANSPORT, more))
            add(name, repeat, team, make, "refitted", finetune=True)
    return Table(
        "Test accuracy of every alignment, averaged and refitted without labels or gradients from all calibration "
        f"samples (the preset: from {load_config(TRANSPORT).calibration.samples} at most).",
        cells,
    )


def shards(lab: Lab) -> Table:
    """Parents that saw disjoint halves of the data, fused and finetuned on the union."""
    cells: list[Cell] = []
    for kind in ("IID", "80:20"):
        for pair in lab.scale.pairs:
            repeat, team = f"{pair[0]}-{pair[1]}", _of_shards(lab.images, pair, kind)
            cells += [
                Cell(f"{kind}: parents, mean", repeat, team.mean),
                Cell(f"{kind}: ensemble", repeat, team.ensemble),
            ]
            makers = {"best parent": team.best, **team.makers()}
            cells += [
                Cell(f"{kind}: {name}", repeat, partial(team.both, makers[name]))
                for name in ("best parent", "vanilla", "OT activations soft", "transport + refit")
            ]
    for repeat, team in pairs(lab.images):
        cells.append(Cell("a parent of all the data", repeat, partial(team.one_shot, partial(team.parent, 0))))
    return Table(
        f"Parents of disjoint halves of the data: test accuracy, finetuned on the union for {_epochs(lab)}.", cells
    )


def _of_shards(subject: Subject, seeds: Sequence[int], kind: str) -> Team:
    """One parent for each part; the first seed decides which samples are in which."""
    name = f"{subject.shards}-{kind.replace(':', '-').replace(' ', '-')}-{seeds[0]}"
    folder = subject.parents.runs.parent / (name if len(seeds) == 2 else f"{name}-of-{len(seeds)}")

    def cut() -> None:
        write_shards(subject.data, folder, len(seeds), SHARES[kind], seeds[0])

    parents = [
        subject.of_data(f"{folder.name}/part-{index}", place) for index, place in enumerate(places(folder, len(seeds)))
    ]
    return Team(subject, tuple(zip(parents, seeds, strict=True)), cut)


def bert(lab: Lab) -> Table:
    """The language models: masked-LM loss, then SST-2 and TREC."""
    cells: list[Cell] = []
    for pair in lab.scale.pairs:
        repeat = "-".join(map(str, pair))
        cells += [Cell(name, repeat, measure, "loss") for name, measure in text.language(lab.language(), pair).items()]
        for task in ("sst2", "trec"):
            if task in lab.paths:
                task_of = text.Classifying(lab.language(), task, lab.paths[task], lab.scale.sentences)
                cells += [Cell(f"{task}: {name}", repeat, one) for name, one in task_of.measures(pair).items()]
    return Table("Masked-language-model loss, and accuracy of classifiers on the encoders.", cells)


def families(lab: Lab) -> Table:
    """Language models of several families, each on its own task."""
    cells = [
        Cell(f"{family}: {name}", "-".join(map(str, pair)), measure, "loss")
        for family in lab.scale.families
        for pair in lab.scale.pairs
        for name, measure in text.of_family(family, lab.language(family), pair).items()
    ]
    return Table("Test loss in nats a token of language models by family.", cells)


TABLES: dict[str, Callable[[Lab], Table]] = {
    "one-shot": one_shot,
    "finetune": finetune,
    "worth": worth,
    "worth-text": worth_text,
    "teach": teach,
    "tasks": of_tasks,
    "parents": parents,
    "widths": widths,
    "depths": depths,
    "ablation": ablation,
    "beyond": beyond,
    "shards": shards,
    "bert": bert,
    "families": families,
}
