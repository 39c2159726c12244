"""The paper's released code, run unchanged on small parents, as an oracle."""

import functools

import pytest
import torch

from benchmarks.reference_vectors import Difference, Vector, compare, oracle_folder, vectors
from fusionpl.errors import FusionError

FOUND = vectors(oracle_folder())
pytestmark = pytest.mark.skipif(not FOUND, reason=f"no reference vectors under {oracle_folder()}")


@functools.cache
def difference(name: str) -> Difference:
    vector = next(one for one in FOUND if one.name == name)
    with torch.no_grad():
        return compare(vector)


@pytest.fixture(params=FOUND, ids=lambda vector: vector.name)
def vector(request: pytest.FixtureRequest) -> Vector:
    found: Vector = request.param
    try:
        found.config  # noqa: B018
    except FusionError as error:
        pytest.skip(str(error))
    return found


def test_fused_weights_agree(vector: Vector) -> None:
    found = difference(vector.name)
    assert found.weights <= vector.weight_tolerance, found.weight


def test_maps_agree(vector: Vector) -> None:
    found = difference(vector.name)
    assert found.maps <= vector.map_tolerance, found.map


def test_solver_agrees_on_recorded_ground_metrics(vector: Vector) -> None:
    found = difference(vector.name)
    assert found.solver <= vector.solver_tolerance, found.problem
