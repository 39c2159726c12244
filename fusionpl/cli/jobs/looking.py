"""What `fuse.py --dry-run`, `--check` and `--advise` show of parents; nothing is fused."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from fusionpl.calibration.embeddings import embed
from fusionpl.calibration.forward import device_of, logits
from fusionpl.cli.jobs.parents import Job
from fusionpl.datamodules.base import calibration_of
from fusionpl.errors import FusionError
from fusionpl.families.proof import PROOF_TOLERANCE, allowed, permutation_error
from fusionpl.fusion.advice import ADVISED, Advice, advise
from fusionpl.fusion.forms import folding_error
from fusionpl.fusion.fuse import Fusion
from fusionpl.fusion.kin import ALIKE, weights_alike
from fusionpl.models.classes import missing_classes


def show_plan(job: Job, fusion: Fusion) -> None:
    """Says what would be done, and what it needs: `--dry-run`."""
    fusion = fusion.matched(calibration_of(job.data, job.asked.config.calibration)) if fusion.matchings else fusion
    print(fusion.describe(), job.check_room(fusion), *(f"warning: {line}" for line in job.team.lines), sep="\n")


def advised(job: Job) -> Advice:
    """What the parents are to each other, and what a minute is best spent on: `--advise`."""
    names, config = list(job.asked.parents), job.asked.config
    few = replace(config.calibration, samples=min(ADVISED, config.calibration.samples))
    data = calibration_of(job.data, few)
    others = [network for index, network in enumerate(job.team.networks) if index != job.team.anchor]
    alike = max(weights_alike(job.team.reference, other) or 0.0 for other in others)
    return advise([job.load(name) for name in names], names, job.votings, data, base=alike >= ALIKE, family=job.family)


def check(job: Job) -> None:
    """Proves the family on the parents: `--check`.

    Raises:
        FusionError: it does not describe one of them.
    """
    batch, pooling = job.data.calibration_batch(16), job.data.pooling

    def shown(model: nn.Module) -> Tensor:
        """Its outputs, or the inner products of its embeddings, whose units may be renumbered."""
        if pooling is None:
            missing = missing_classes(model)  # which are never given, whatever is moved
            return logits(model, batch) if missing is None else logits(model, batch)[..., ~missing.to(device_of(model))]
        embedded = embed(model, batch, pooling)
        return embedded @ embedded.T

    print(f"what may be done to the units of {job.team.reference.name}, and keeps its function:\n")
    print(allowed(job.team.reference.binding), end="\n\n")
    for name in job.asked.parents:
        model = job.load(name)
        with torch.inference_mode():
            size = float(shown(model).abs().max())
        error = permutation_error(model, shown, family=job.family)
        if not error <= PROOF_TOLERANCE * size:
            raise FusionError(
                f"{name}: moving its units at random changes outputs by {error:.1e} (outputs are up to {size:.1f}); "
                "its family file does not describe this model"
            )
        change, size, what = folding_error(model, shown, family=job.family)
        if not change <= PROOF_TOLERANCE * size:
            raise FusionError(
                f"{name}: folding {what} changes outputs by {change:.1e} (outputs are up to {size:.1f}), so its "
                "canonical form is not the same function; use strategy transport, or mend its family file"
            )
        print(f"{name}: ok; renumbering all units at random changes outputs by {error:.1e} (outputs up to {size:.1f})")
