"""The loss against hand values, a slow oracle and its own ablations; its gradient over processes and threads."""

import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from nodes import launcher
from torch import Tensor, nn

from trainer.fit.fit_settings import Anchors, FitSettings, Terms
from trainer.fit.loss import code_loss, derangement, everyones, info_nce, proxy_loss, supervised_contrastive_loss
from trainer.fit.objective import Objective, PatchSubset, Slices
from trainer.fit.run import Processes


def test_info_nce_of_a_perfect_positive_and_opposite_negative() -> None:
    a = torch.tensor([[1.0, 0.0]])
    expected = math.log(1 + math.exp(-2 / 0.1))  # similarities +1 and -1
    assert info_nce(a, a, -a).item() == pytest.approx(expected, abs=1e-6)


def test_info_nce_of_equal_similarities_is_log_of_their_number() -> None:
    a = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    negatives = torch.tensor([[1.0, 1.0], [3.0, 3.0], [0.5, 0.5]])
    positive = torch.tensor([[2.0, 2.0], [1.0, 1.0]])
    assert info_nce(a, positive, negatives, temperature=0.5).item() == pytest.approx(math.log(4), abs=1e-6)


def test_info_nce_by_hand_with_a_temperature() -> None:
    anchor, positive = torch.tensor([[3.0, 0.0]]), torch.tensor([[0.6, 0.8]])
    negatives = torch.tensor([[0.0, 5.0], [0.8, -0.6]])
    e = [math.exp(similarity / 0.2) for similarity in (0.6, 0.0, 0.8)]
    assert info_nce(anchor, positive, negatives, 0.2).item() == pytest.approx(-math.log(e[0] / sum(e)), abs=1e-6)


def cosine(a: Tensor, b: Tensor) -> float:
    return float((a @ b) / (a.norm() * b.norm()))


def slow_loss(views: Tensor, other: list[int], temperature: float) -> float:
    """Equations 1 to 5 of the paper, a record at a time."""
    plain, augmented, global_crop, local_crop = views
    n, total = plain.shape[1], 0.0
    for label in (0, 1):
        global_terms, scale_terms = 0.0, 0.0
        for i in range(n):
            positive = math.exp(cosine(plain[label, i], augmented[label, other[i]]) / temperature)
            negative = sum(math.exp(cosine(plain[label, i], augmented[1 - label, j]) / temperature) for j in range(n))
            global_terms -= math.log(positive / (positive + negative)) / n
            positive = math.exp(cosine(local_crop[label, i], global_crop[label, i]) / temperature)
            negative = sum(
                math.exp(cosine(local_crop[label, i], global_crop[1 - label, j]) / temperature) for j in range(n)
            )
            scale_terms -= math.log(positive / (positive + negative)) / n
        total += (global_terms + scale_terms) / 2
    return total


def random_views(n: int = 5, d: int = 8, seed: int = 0) -> Tensor:
    return torch.randn(4, 2, n, d, generator=torch.Generator().manual_seed(seed))


def loss_of(views: Tensor, other: Tensor, *, terms: Terms = "both", anchors: Anchors = "both") -> Tensor:
    plain, augmented, global_crop, local_crop = views
    return code_loss(plain, augmented, global_crop, local_crop, other, terms=terms, anchors=anchors)


@pytest.mark.parametrize("temperature", [0.1, 0.7])
def test_loss_agrees_with_the_slow_form_of_the_paper(temperature: float) -> None:
    views, other = random_views().double(), torch.tensor([1, 2, 3, 4, 0])
    plain, augmented, global_crop, local_crop = views
    fast = code_loss(plain, augmented, global_crop, local_crop, other, temperature=temperature)
    assert fast.item() == pytest.approx(slow_loss(views, other.tolist(), temperature), rel=1e-5)


def test_ablations_are_the_parts_of_the_whole() -> None:
    views, other = random_views(), torch.tensor([1, 2, 3, 4, 0])
    both = loss_of(views, other)
    swapped = views.flip(1)  # fakes take the place of real images
    assert both == pytest.approx(loss_of(views, other, anchors="real") + loss_of(swapped, other, anchors="real"))
    assert both == pytest.approx(
        (loss_of(views, other, terms="global") + loss_of(views, other, terms="multi-scale")) / 2
    )


@pytest.mark.parametrize(
    ("terms", "anchors", "moved"),
    [
        ("both", "both", {(view, label) for view in range(4) for label in range(2)}),
        ("global", "both", {(0, 0), (0, 1), (1, 0), (1, 1)}),
        ("multi-scale", "both", {(2, 0), (2, 1), (3, 0), (3, 1)}),
        ("global", "real", {(0, 0), (1, 0), (1, 1)}),
        ("multi-scale", "real", {(3, 0), (2, 0), (2, 1)}),
    ],
)
def test_every_term_moves_the_gradient(terms: Terms, anchors: Anchors, moved: set[tuple[int, int]]) -> None:
    views = random_views().requires_grad_()
    torch.autograd.backward(loss_of(views, torch.tensor([1, 2, 3, 4, 0]), terms=terms, anchors=anchors))
    assert views.grad is not None
    norms = views.grad.norm(dim=(2, 3))
    assert {(view, label) for view in range(4) for label in range(2) if norms[view, label] > 1e-6} == moved


def test_the_global_positive_is_another_record() -> None:
    """Of the augmented reals, the plain view of record 0 is drawn to that of record 1 alone, its positive."""
    views, other = random_views(n=3), torch.tensor([1, 2, 0])

    def pull(moved: int | None) -> Tensor:
        """The gradient at the plain real of record 0, after the augmented real of a record was moved."""
        changed = views.clone()
        if moved is not None:
            changed[1, 0, moved] += 1
        changed.requires_grad_()
        torch.autograd.backward(loss_of(changed, other))
        assert changed.grad is not None
        return changed.grad[0, 0, 0]

    assert [not torch.allclose(pull(record), pull(None)) for record in range(3)] == [False, True, False]


@pytest.mark.parametrize("other", [[0, 2, 1], [1, 0], [1, 2, 3, 0]])
def test_what_is_no_derangement_is_refused(other: list[int]) -> None:
    with pytest.raises(ValueError, match="derangement of 3 records"):
        loss_of(random_views(n=3), torch.tensor(other))


def test_derangements_have_no_fixed_point_and_all_occur() -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = {tuple(derangement(4, generator).tolist()) for _ in range(500)}
    assert len(drawn) == 9  # all of the subfactorial of 4
    assert all(place != value for order in drawn for place, value in enumerate(order))
    assert derangement(2, generator).tolist() == [1, 0]
    first, again = (derangement(20, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(first, again)
    with pytest.raises(ValueError, match="--batch-size to 2"):
        derangement(1, generator)


SETTINGS: dict[str, dict[str, Any]] = {
    "infonce": {},
    "bce": {"loss": "bce"},
    "generator": {"positives": "generator", "proxies": 0.5},
}


def tiny_objective(loss: str = "infonce") -> Objective:
    """A backbone small enough to differentiate in an instant: 8 x 8 pixels through two layers."""
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 16), nn.GELU(), nn.Linear(16, 8))
    settings = FitSettings(
        data=Path("none"),
        output=Path("none"),
        image_size=16,
        local_size=16,
        precision="float32",
        **SETTINGS[loss],
    )
    return Objective(backbone, 8, settings, 2)


@pytest.mark.parametrize(
    "change", [{"terms": "global"}, {"terms": "multi-scale"}, {"anchors": "real"}, {"temperature": 0.5}]
)
def test_the_objective_is_the_loss_of_its_settings(change: dict[str, Any]) -> None:
    objective, views, other = tiny_objective(), random_views(), torch.tensor([1, 2, 3, 4, 0])
    generators = torch.tensor([0, 1, 1, 0, 1])
    usual = objective.loss(views, other, generators)
    objective.settings = replace(objective.settings, **change)
    plain, augmented, global_crop, local_crop = views
    changed = objective.loss(views, other, generators)
    assert changed == code_loss(plain, augmented, global_crop, local_crop, other, **change)
    assert changed != usual


def test_the_reference_codes_loss_is_the_real_term_twice() -> None:
    objective, views, other = tiny_objective(), random_views(), torch.tensor([1, 2, 3, 4, 0])
    objective.settings = replace(objective.settings, loss="reference")
    changed = objective.loss(views, other, torch.zeros(5, dtype=torch.long))
    assert changed == 2 * loss_of(views, other, anchors="real")


def test_the_supervised_contrastive_loss_agrees_with_its_slow_form() -> None:
    views, classes = random_views(2, 4).flatten(0, 2).double(), [0, 1, 2, 2] * 4
    total = 0.0
    for i, view in enumerate(views):
        others = [j for j in range(16) if j != i]
        every = sum(math.exp(cosine(view, views[j]) / 0.3) for j in others)
        positives = [j for j in others if classes[j] == classes[i]]
        terms = [-math.log(math.exp(cosine(view, views[j]) / 0.3) / every) for j in positives]
        total += sum(terms) / len(positives) / 16
    fast = supervised_contrastive_loss(views, torch.tensor(classes), temperature=0.3)
    assert fast.item() == pytest.approx(total, rel=1e-5)


def test_the_proxy_loss_agrees_with_its_slow_form() -> None:
    views, proxies = random_views(1, 4).flatten(0, 2), torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    classes, total = [0, 1, 2, 0, 1, 2, 0, 1], 0.0
    for view, label in zip(views, classes, strict=True):
        similarities = [math.exp(cosine(view, proxy) / 0.3) for proxy in proxies]
        wanted = [0.1 / 3 + 0.9 * (place == label) for place in range(3)]
        total -= sum(
            want * math.log(value / sum(similarities)) for want, value in zip(wanted, similarities, strict=True)
        )
    fast = proxy_loss(views, torch.tensor(classes), proxies, temperature=0.3)
    assert fast.item() == pytest.approx(total / 8, rel=1e-5)


def test_the_classes_are_the_generators_and_real() -> None:
    objective, views, other = tiny_objective("generator"), random_views(), torch.tensor([1, 2, 3, 4, 0])
    assert objective.proxies is not None
    classes = torch.tensor([0, 0, 0, 0, 0, 1, 2, 2, 1, 2] * 4)
    flat = views.reshape(40, 8)
    expected = supervised_contrastive_loss(flat, classes) + 0.5 * proxy_loss(flat, classes, objective.proxies)
    loss = objective.loss(views, other, torch.tensor([0, 1, 1, 0, 1]))
    torch.testing.assert_close(loss, expected)


def joint_batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    whole = torch.randint(0, 256, (6, 3, 2, 8, 8, 3), generator=generator, dtype=torch.uint8)
    local = torch.randint(0, 256, (6, 2, 8, 8, 3), generator=generator, dtype=torch.uint8)
    other = torch.tensor([1, 2, 0, 4, 5, 3])  # a derangement within each half
    return whole, local, other, torch.tensor([0, 1, 1, 0, 0, 1])


def joint_gradient(loss: str = "infonce") -> dict[str, Tensor]:
    objective = tiny_objective(loss)
    torch.autograd.backward(objective(*joint_batch()))
    return {name: value.grad for name, value in objective.named_parameters() if value.grad is not None}


@pytest.mark.parametrize(("threads", "most"), [(3, None), (2, 4), (1, 1)])
@pytest.mark.parametrize("loss", list(SETTINGS))
def test_slices_in_threads_give_the_gradient_of_the_whole_batch(loss: str, threads: int, most: int | None) -> None:
    """Also where the embeddings of most of them are cached."""
    before = torch.get_num_threads()
    try:
        objective = tiny_objective(loss)
        value = Slices(objective, threads, most)(*joint_batch())
    finally:
        torch.set_num_threads(before)
    assert value == pytest.approx(tiny_objective(loss)(*joint_batch()).item())
    expected = joint_gradient(loss)
    assert len(expected) == len(list(objective.parameters()))
    for name, parameter in objective.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-6)


def test_patch_subsets_keep_the_class_token_and_repeat_by_seed() -> None:
    subset = PatchSubset(most=3, prefix=1)
    tokens = torch.arange(2 * 9.0).view(2, 9, 1)
    assert subset(tokens) is tokens  # nothing is dropped outside of training
    with subset.seeded(1):
        kept, others = subset(tokens), subset(tokens)
        assert subset(tokens[:, :4]).shape == (2, 4, 1)
    assert kept.shape == (2, 4, 1)
    assert kept[:, 0].flatten().tolist() == [0, 9]
    for row, all_of_it in zip(kept[..., 0].tolist(), tokens[..., 0].tolist(), strict=True):
        assert len(set(row)) == 4
        assert set(row) <= set(all_of_it)
    assert not torch.equal(kept, others)
    with subset.seeded(1):
        assert torch.equal(subset(tokens), kept)
    with subset.seeded(2):
        assert not torch.equal(subset(tokens), kept)
    assert subset(tokens) is tokens


def half_gradient(rank: int, port: int, folder: str) -> None:
    """What a process of two computes on its half of the batch under DistributedDataParallel."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "2"}
    processes = Processes.join("cpu")
    assert (processes.rank, processes.world) == (rank, 2)
    assert processes.agree(float(rank) + 0.5) == 0.5
    whole, local, other, generators = joint_batch()
    mine = slice(3 * rank, 3 * rank + 3)
    for loss in ("infonce", "generator", "cached"):
        objective = tiny_objective("generator" if loss == "cached" else loss)
        batch = whole[mine], local[mine], other[mine] - 3 * rank, generators[mine]
        if loss == "cached":
            Slices(objective, 1, most=2)(*batch)
        else:
            model = nn.parallel.DistributedDataParallel(objective)
            torch.autograd.backward(model(*batch))
        torch.save({name: value.grad for name, value in objective.named_parameters()}, f"{folder}/{loss}{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_give_the_gradient_of_one_on_the_joint_batch(tmp_path: Path) -> None:
    with launcher() as launch:
        assert launch(half_gradient, [(str(tmp_path),)] * 2) == [0, 0]
    for loss in ("infonce", "generator", "cached"):
        for rank in (0, 1):
            gradient = torch.load(tmp_path / f"{loss}{rank}.pt", weights_only=True)
            for name, value in joint_gradient("generator" if loss == "cached" else loss).items():
                torch.testing.assert_close(gradient[name], value, rtol=1e-3, atol=1e-6)


def test_gathering_in_one_process_is_nothing() -> None:
    rows = torch.ones(2, 3)
    assert everyones(rows) is rows
