"""The loss of CoDE (arXiv 2407.20337, equations 1 to 5, in the paper's form), and losses that know the generator."""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from trainer.fit.fit_settings import Anchors, Terms

TEMPERATURE = 0.1
SMOOTHING = 0.1


def info_nce(anchor: Tensor, positive: Tensor, negatives: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """InfoNCE with one positive per anchor and one pool of negatives shared by all anchors.

    Args:
        anchor: Embeddings, shape (n, d), any norm.
        positive: Embeddings of the matching views, shape (n, d).
        negatives: Embeddings of the opposite class, shape (m, d).
        temperature: Cosine similarities are divided by this.

    Returns:
        Mean loss over the n anchors, a scalar in nats.
    """
    anchor, positive, negatives = (F.normalize(x.float(), dim=-1) for x in (anchor, positive, negatives))
    pos = (anchor * positive).sum(-1, keepdim=True)  # (n, 1)
    neg = anchor @ negatives.T  # (n, m)
    logits = torch.cat([pos, neg], dim=1) / temperature  # (n, 1 + m), column 0 is the positive
    return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long, device=logits.device))


def derangement(n: int, generator: torch.Generator) -> Tensor:
    """A random permutation without a fixed point, shape (n,), uniform among them.

    Raises:
        ValueError: n < 2, where there is none.
    """
    if n < 2:
        raise ValueError(
            f"a batch of {n} record has no other record to take a positive from: set --batch-size to 2 or more"
        )
    while True:  # a permutation has no fixed point with probability 1/e or more (n = 3: 1/3)
        order = torch.randperm(n, generator=generator)
        if not (order == torch.arange(n)).any():
            return order


def code_loss(
    plain: Tensor,
    augmented: Tensor,
    global_crop: Tensor,
    local_crop: Tensor,
    other: Tensor,
    *,
    temperature: float = TEMPERATURE,
    terms: Terms = "both",
    anchors: Anchors = "both",
    gather: bool = False,
) -> Tensor:
    """L = L_real + L_fake, each the mean of its global and its multi-scale term.

    Global: the plain view of record i is drawn to the augmented view of another record of its label. Multi-scale: the
    local crop of record i is drawn to the global crop of the same record. Both are driven away from the views of the
    other label.

    Args:
        plain: Embeddings of the plain views, shape (2, n, d); row 0 holds real images, row 1 fakes.
        augmented: Those of the augmented views.
        global_crop: Those of the global crops.
        local_crop: Those of the local crops.
        other: The record whose augmented view is record i's positive: a derangement of 0..n-1, shape (n,).
        temperature: Cosine similarities are divided by this.
        terms: `both`, or one of them alone (an ablation of the paper).
        anchors: `both`, or `real` for L_real alone.
        gather: Take negatives from every process of the group.

    Returns:
        A scalar in nats.

    Raises:
        ValueError: `other` has a fixed point or another length than n.
    """
    if other.shape != plain.shape[1:2] or bool((other == torch.arange(len(other), device=other.device)).any()):
        raise ValueError(f"`other` must be a derangement of {plain.shape[1]} records, got {other.tolist()}")
    losses = []
    for label in (0, 1) if anchors == "both" else (0,):
        parts = []
        if terms != "multi-scale":
            negatives = everyones(augmented[1 - label]) if gather else augmented[1 - label]  # (m, d)
            parts.append(info_nce(plain[label], augmented[label][other], negatives, temperature))
        if terms != "global":
            negatives = everyones(global_crop[1 - label]) if gather else global_crop[1 - label]  # (m, d)
            parts.append(info_nce(local_crop[label], global_crop[label], negatives, temperature))
        losses.append(torch.stack(parts).mean())
    return torch.stack(losses).sum()


def supervised_contrastive_loss(
    views: Tensor, classes: Tensor, *, temperature: float = TEMPERATURE, gather: bool = False
) -> Tensor:
    """Each view is drawn to all others of its class and driven away from the rest (arXiv 2004.11362, L_out, eq. 2).

    Args:
        views: Embeddings of any norm, shape (m, d).
        classes: Class of each view, shape (m,); every class has two views or more.
        temperature: Cosine similarities are divided by this.
        gather: Compare with the views of every process of the group.

    Returns:
        Mean over the m views, a scalar in nats.
    """
    views = F.normalize(views.float(), dim=-1)
    others, other_classes = (everyones(views), everyones(classes)) if gather else (views, classes)
    first = len(views) * dist.get_rank() if len(others) > len(views) else 0
    themselves = torch.zeros(len(views), len(others), dtype=torch.bool, device=views.device)  # (m, world * m)
    themselves[:, first : first + len(views)].fill_diagonal_(True)
    logits = (views @ others.T / temperature).masked_fill(themselves, -torch.inf)  # (m, world * m)
    positive = (classes[:, None] == other_classes) & ~themselves  # (m, world * m)
    chances = logits.log_softmax(1).masked_fill(~positive, 0)  # (m, world * m)
    return -(chances.sum(1) / positive.sum(1)).mean()


def proxy_loss(views: Tensor, classes: Tensor, proxies: Tensor, *, temperature: float = TEMPERATURE) -> Tensor:
    """Cross entropy of views over the cosine similarities to a learnt proxy of each class (Proxy-NCA, NormFace).

    Args:
        views: Embeddings of any norm, shape (m, d).
        classes: Class of each view, shape (m,).
        proxies: One of any norm per class, shape (c, d).
        temperature: Cosine similarities are divided by this.

    Returns:
        Mean over the m views with label smoothing of 0.1, a scalar in nats.
    """
    logits = F.normalize(views.float(), dim=-1) @ F.normalize(proxies, dim=-1).T / temperature  # (m, c)
    return F.cross_entropy(logits, classes, label_smoothing=SMOOTHING)


class _Gather(torch.autograd.Function):
    """All processes' rows, in rank order; the gradient of a row is summed over the processes that used it."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)  # (world * n, d)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]  # (n, d)


def everyones(rows: Tensor) -> Tensor:
    """The rows of every process, shape (world * n, d), differentiable; every process must bring as many.

    Averaged over processes, as DistributedDataParallel does, the gradients are those of the joint batch.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return rows
    gathered: Tensor = _Gather.apply(rows)
    return gathered
