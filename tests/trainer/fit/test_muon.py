"""Muon against a singular value decomposition, and its state."""

import copy

import pytest
import torch
from torch import Tensor, nn

from trainer.fit.muon import MOMENTUM, Muon, orthogonal


@pytest.mark.parametrize("shape", [(24, 24), (24, 96), (72, 24)])
def test_an_update_has_the_singular_vectors_of_its_matrix_and_values_near_one(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    inside = left.T @ orthogonal(matrix) @ right.T
    off = inside - torch.diag(inside.diagonal())
    torch.testing.assert_close(off, torch.zeros_like(off), atol=1e-6, rtol=0)
    wide = inside.diagonal()[values > 0.1 * values[0]]
    assert wide.min() > 0.6
    assert wide.max() < 1.3


@pytest.mark.parametrize(("shape", "scale"), [((4, 16), 1.0), ((16, 4), 2.0)])
def test_a_first_step_is_the_orthogonal_gradient(shape: tuple[int, int], scale: float) -> None:
    matrix = nn.Parameter(torch.ones(shape))
    matrix.grad = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    expected = 0.98 * torch.ones(shape) - 0.2 * scale * orthogonal(matrix.grad)
    Muon([matrix], lr=0.01, weight_decay=0.1).step()
    torch.testing.assert_close(matrix.detach(), expected)


def gradients(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in ((8, 8), (8, 24), (32, 8))]


def test_state_and_threads_change_nothing() -> None:
    start = [nn.Parameter(gradient.clone()) for gradient in gradients(0)]
    alone, shared = copy.deepcopy(start), copy.deepcopy(start)
    one, two = (Muon(matrices, lr=0.05, weight_decay=0.0, threads=t) for t, matrices in ((1, alone), (2, shared)))
    for seed in (1, 2):
        state = two.state_dict()
        two = Muon(shared, lr=0.05, weight_decay=0.0, threads=2)
        two.load_state_dict(state)
        for optimiser, matrices in ((one, alone), (two, shared)):
            for matrix, gradient in zip(matrices, gradients(seed), strict=True):
                matrix.grad = gradient.clone()
            optimiser.step()
    for first, second, begin in zip(alone, shared, start, strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=0)
        assert not torch.equal(first, begin)
    momentum = one.state[alone[0]]["momentum"]
    before, last = gradients(1)[0], gradients(2)[0]
    torch.testing.assert_close(momentum, (1 - MOMENTUM) * (MOMENTUM * before + last))
