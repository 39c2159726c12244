"""What an architecture is: axis grammar, binding to a model, application of maps, and the permutation proof."""

from fusionpl.families.apply import (
    State,
    aligned_state,
    copy_rows,
    in_float32,
    load_parameters,
    move,
    own_state,
    with_parameters,
)
from fusionpl.families.axes import Axis, Binding, Index, Join, Slot, Tap, boundary, section_of
from fusionpl.families.binding import bind
from fusionpl.families.canonical import canonical, inseparable, unrotatable, without_scales
from fusionpl.families.compatible import check_compatible, check_finite, check_tied
from fusionpl.families.draft import draft
from fusionpl.families.family import (
    STEM,
    TAIL,
    VOCABULARY,
    Family,
    attribute,
    family_of,
    is_bare,
    library,
    parse_family,
    read_family,
)
from fusionpl.families.grammar import GrammarError, parse
from fusionpl.families.proof import PROOF_TOLERANCE, allowed, permutation_error, permuted, random_permutations

__all__ = [
    "Axis",
    "Binding",
    "Family",
    "GrammarError",
    "Index",
    "Join",
    "PROOF_TOLERANCE",
    "STEM",
    "Slot",
    "State",
    "TAIL",
    "VOCABULARY",
    "Tap",
    "aligned_state",
    "attribute",
    "allowed",
    "bind",
    "boundary",
    "canonical",
    "check_compatible",
    "check_finite",
    "check_tied",
    "copy_rows",
    "draft",
    "family_of",
    "is_bare",
    "in_float32",
    "library",
    "load_parameters",
    "move",
    "own_state",
    "parse",
    "parse_family",
    "permutation_error",
    "permuted",
    "random_permutations",
    "read_family",
    "section_of",
    "with_parameters",
    "inseparable",
    "unrotatable",
    "without_scales",
]
