"""Alignment: a TransportMap for every axis of a parent, from evidence about its units."""

from fusionpl.alignment.aligner import Aligner
from fusionpl.alignment.blocks import likeness, matched, spread, telling
from fusionpl.alignment.config import AlignConfig, Residual
from fusionpl.alignment.evidence import ActivationEvidence, Evidence, WeightEvidence
from fusionpl.alignment.joint import ChosenUnits, JointStream, check_choice, choose, joint_problems, joint_stream
from fusionpl.alignment.maps import Alignment, Maps
from fusionpl.alignment.problem import Problem
from fusionpl.alignment.problems import problems

__all__ = [
    "ActivationEvidence",
    "AlignConfig",
    "Aligner",
    "Alignment",
    "ChosenUnits",
    "Evidence",
    "JointStream",
    "Maps",
    "Problem",
    "Residual",
    "WeightEvidence",
    "check_choice",
    "choose",
    "joint_problems",
    "joint_stream",
    "likeness",
    "matched",
    "problems",
    "spread",
    "telling",
]
