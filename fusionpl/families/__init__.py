"""What an architecture is: axis grammar, binding to a model, application of maps, and the permutation proof."""

from fusionpl.families.apply import State, aligned_state, load_parameters, move
from fusionpl.families.binding import Axis, Binding, Join, Slot, Tap, bind, check_compatible, check_finite
from fusionpl.families.canonical import canonical, without_scales
from fusionpl.families.family import Family, family_of, library, parse_family
from fusionpl.families.grammar import GrammarError, parse
from fusionpl.families.proof import permutation_error, permuted, random_permutations

__all__ = [
    "Axis",
    "Binding",
    "Family",
    "GrammarError",
    "Join",
    "Slot",
    "State",
    "Tap",
    "aligned_state",
    "bind",
    "canonical",
    "check_compatible",
    "check_finite",
    "family_of",
    "library",
    "load_parameters",
    "move",
    "parse",
    "parse_family",
    "permutation_error",
    "permuted",
    "random_permutations",
    "without_scales",
]
