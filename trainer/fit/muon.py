"""The optimiser Muon: the momentum of a matrix is made orthogonal before it moves it, which learns from fewer updates.

K. Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/. PyTorch's and timm's own compute in bfloat16, which
many CPUs emulate, and one matrix after another.
"""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic iteration; in few steps they bring singular values near 1, rather than to it in many."""
STEPS = 5
MOMENTUM = 0.95
FACTOR = 20.0
"""How many times AdamW's learning rate moves matrices: the authors' 0.02 beside 0.001. At 4 times AdamW's usual rate
AdamW itself no longer learnt (see BENCHMARKS.md, The optimiser)."""


class Muon(torch.optim.Optimizer):
    """Moves matrices; whatever else is trained needs another optimiser."""

    def __init__(self, matrices: Iterable[nn.Parameter], *, lr: float, weight_decay: float, threads: int = 1) -> None:
        """Take the matrices.

        Args:
            matrices: Parameters of two axes.
            lr: Learning rate of AdamW for the rest of the network; matrices move at `FACTOR` times as much.
            weight_decay: As of AdamW.
            threads: How many share the matrices between them.
        """
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay})
        self.pool = ThreadPoolExecutor(threads)

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Move all matrices once."""
        moves = [(group, matrix) for group in self.param_groups for matrix in group["params"]]
        list(self.pool.map(lambda move: self._move(*move), moves))

    @torch.no_grad()  # holds within a thread
    def _move(self, group: dict[str, Any], matrix: Tensor) -> None:
        if matrix.grad is None:
            return
        state = self.state[matrix]
        if not state:
            state["momentum"] = torch.zeros_like(matrix)
        momentum: Tensor = state["momentum"]
        momentum.lerp_(matrix.grad, 1 - MOMENTUM)
        update = orthogonal(matrix.grad.lerp(momentum, MOMENTUM))
        rate, (out, into) = FACTOR * group["lr"], matrix.shape
        matrix.mul_(1 - rate * group["weight_decay"])
        matrix.add_(update, alpha=-rate * max(1.0, out / into) ** 0.5)


def orthogonal(matrix: Tensor) -> Tensor:
    """Nearly U V^T of a matrix U S V^T, by the iteration of Newton and Schulz: its singular values are near 1."""
    upright = matrix.shape[0] > matrix.shape[1]
    x: Tensor = matrix.T if upright else matrix  # (m, n), m <= n
    x = x / x.norm().clamp(min=1e-12)
    a, b, c = COEFFICIENTS
    for _ in range(STEPS):
        gram = x @ x.T  # (m, m)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if upright else x
