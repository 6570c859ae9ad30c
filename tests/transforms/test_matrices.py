"""Rotations are orthogonal, for every width that models have."""

import pytest
import torch

from requanto.transforms.matrices import hadamard, random_rotation


@pytest.mark.parametrize("size", [1, 2, 4, 12, 20, 28, 36, 60, 64, 108, 144, 576, 640, 896])
def test_hadamard_matrices_hold_signs_in_orthogonal_rows(size):
    matrix = hadamard(size)
    assert matrix is not None
    assert bool((matrix.abs() == 1).all())
    assert torch.equal(matrix @ matrix.t(), size * torch.eye(size, dtype=torch.float64))


@pytest.mark.parametrize("size", [3, 6, 10, 36 * 2 + 2, 92])
def test_no_matrix_is_made_up_for_sizes_without_a_construction(size):
    assert hadamard(size) is None


@pytest.mark.parametrize("size", [1, 2, 3, 7, 18, 64, 74, 184, 576])
@pytest.mark.parametrize("keep_mean", [False, True])
def test_rotations_are_orthogonal_and_follow_their_seed(size, keep_mean):
    matrix = random_rotation(size, 3, keep_mean)
    assert torch.allclose(matrix @ matrix.t(), torch.eye(size, dtype=torch.float64), atol=1e-12)
    assert torch.equal(matrix, random_rotation(size, 3, keep_mean))
    if size > 3:
        assert not torch.allclose(matrix, random_rotation(size, 4, keep_mean))
    if keep_mean:  # what a LayerNorm needs
        x = torch.randn(5, size, dtype=torch.float64)
        assert torch.allclose((x @ matrix).mean(-1), x.mean(-1))
    elif size & (size - 1) == 0:
        assert torch.allclose(matrix.abs(), torch.full_like(matrix, size**-0.5))
