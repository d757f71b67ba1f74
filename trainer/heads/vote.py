"""The weighted vote of the nearest reference images: real and fake neighbours in, score and weights out.

Both labels are asked equally deep, by share of their references: where there are four fakes to a real image, 4k fakes
answer beside k reals. The k nearest of each would lean to the label with more references, whose k nearest are nearer
for their number alone (measured in BENCHMARKS.md, the vote).
"""

from dataclasses import dataclass

import numpy as np

TEMPERATURE = 0.1
"""Similarities are divided by this. The loss's own; between 0.05 and 0.5 no measure moved (BENCHMARKS.md, the vote)."""
CAP = 0.5
"""One generator counts as at most this share of the k fake neighbours, so that a large one does not drown a new one.

Measured as harmless: a tenth of a point either way on the benchmark (BENCHMARKS.md, the vote)."""
DEEPEST = 256
"""Neighbours of one label that are asked at most; beyond that ratio of references the lean comes back, slowly."""


@dataclass(frozen=True, slots=True)
class Votes:
    """The vote on q queries. Where one label has no neighbour, score and logit are NaN and every weight is 0."""

    score: np.ndarray
    """Weight of the fakes, shape (q,), 0..1."""
    logit: np.ndarray
    """log(weight of fakes / weight of reals), shape (q,), finite also where the score rounds to 0 or 1."""
    votes_real: np.ndarray
    """Reals among the k nearest overall, shape (q,), int."""
    votes_fake: np.ndarray
    """Fakes among the k nearest overall, shape (q,), int."""
    weights_real: np.ndarray
    """Of the nearest reals, shape (q, at most k), 0 for a missing one. With `weights_fake` they sum to 1: neighbours
    further down vote as well, and these carry the whole weight of their label."""
    weights_fake: np.ndarray
    """Of the nearest fakes, shape (q, at most k), 0 for a missing one; they sum to `score`."""
    nearest_real: np.ndarray
    """Highest similarity to a real reference, shape (q,), NaN where there is none."""
    nearest_fake: np.ndarray
    """Highest similarity to a fake reference, shape (q,), NaN where there is none."""


def depths(k: int, reals: int, fakes: int) -> tuple[int, int]:
    """How many nearest reals and fakes to ask: the same share of each label's references, k of the fewer.

    Where a label has fewer references than k, which is at least 1, all of them are asked.
    """
    fewer, more = min(reals, fakes), max(reals, fakes)
    if not fewer:
        return k, k
    share = min(k / fewer, 1.0, DEEPEST / more)
    return max(min(k, reals), round(share * reals)), max(min(k, fakes), round(share * fakes))


def vote(
    similarity_real: np.ndarray,
    similarity_fake: np.ndarray,
    generators_fake: np.ndarray,
    k: int,
    *,
    temperature: float = TEMPERATURE,
    cap: float = CAP,
) -> Votes:
    """Weigh the neighbours: softmax of similarity over both labels, each label with the same prior mass.

    logit = log mean over fakes of exp(s / T) - log mean over reals of exp(s / T). The mean over fakes counts the
    neighbours of one generator together as at most `cap` * (fakes found), at least one.

    Args:
        similarity_real: Cosine similarity of the nearest real references, descending, shape (q, kr); NaN is missing.
            For kr and kf see `depths`.
        similarity_fake: Of the nearest fake references, descending, shape (q, kf); NaN is missing.
        generators_fake: Generator of each fake neighbour, shape (q, kf), int; -1 is missing.
        k: How many of each label get a weight of their own, and how many of the nearest overall are counted.
        temperature: Similarities are divided by this.
        cap: Largest share of one generator among the fakes, 0..1; 1 is no cap.
    """
    real = np.asarray(similarity_real, np.float64)
    fake = np.asarray(similarity_fake, np.float64)
    there_real = ~np.isnan(real)
    there_fake = ~np.isnan(fake)
    mass_real = _normalised(there_real.astype(np.float64))  # (q, kr)
    mass_fake = _normalised(_capped(there_fake, generators_fake, cap))  # (q, kf)

    log_real = _log_weights(real, mass_real, temperature)  # (q, kr)
    log_fake = _log_weights(fake, mass_fake, temperature)  # (q, kf)
    both = there_real.any(1) & there_fake.any(1)  # (q,)
    total_real, total_fake = _logsumexp(log_real), _logsumexp(log_fake)  # (q,)
    logit = np.full(len(real), np.nan)
    logit[both] = total_fake[both] - total_real[both]
    whole = np.where(both, np.logaddexp(total_real, total_fake), np.inf)  # (q,), inf makes all weights 0
    score = np.exp(total_fake - whole)

    both_labels = np.concatenate([real, fake], axis=1)  # (q, kr + kf)
    nearest = np.argsort(-both_labels, axis=1, kind="stable")[:, :k]  # NaN sorts last
    there = ~np.isnan(np.take_along_axis(both_labels, nearest, axis=1))
    is_fake = nearest >= real.shape[1]
    return Votes(
        score=np.where(both, score, np.nan),
        logit=logit,
        votes_real=(there & ~is_fake).sum(1),
        votes_fake=(there & is_fake).sum(1),
        weights_real=_label_weights(log_real[:, :k], np.exp(total_real - whole)),
        weights_fake=_label_weights(log_fake[:, :k], score),
        nearest_real=_nearest(real),
        nearest_fake=_nearest(fake),
    )


def generator_shares(weights: np.ndarray, generators: np.ndarray) -> dict[int, float]:
    """Each generator's share of the fakes' weight for one query, largest first, summing to 1.

    Args:
        weights: One row of `Votes.weights_fake`, shape (k,).
        generators: The neighbours' generators, shape (kf,); -1 is missing. Those without a weight are passed over.
    """
    generators = generators[: len(weights)]
    total = float(weights[generators >= 0].sum())
    if total <= 0:
        return {}
    shares = {int(g): float(weights[generators == g].sum()) / total for g in np.unique(generators[generators >= 0])}
    return dict(sorted(shares.items(), key=lambda item: -item[1]))


def _capped(there: np.ndarray, generators: np.ndarray, cap: float) -> np.ndarray:
    """Mass of each fake neighbour, shape (q, kf): 1, or less where its generator has more than its share."""
    numbers = np.unique(generators, return_inverse=True)[1].reshape(generators.shape)
    cells = numbers + np.arange(len(generators))[:, None] * (numbers.max(initial=0) + 1)  # (q, kf), query and generator
    count = np.bincount(cells[there], minlength=cells.max(initial=0) + 1)[cells]  # (q, kf)
    most = np.maximum(1.0, cap * there.sum(1, keepdims=True))  # (q, 1)
    return np.where(there, np.minimum(1.0, most / np.maximum(count, 1)), 0.0)


def _label_weights(log_weights: np.ndarray, total: np.ndarray) -> np.ndarray:
    """Weights of the nearest k of a label, shape (q, k), summing to the weight of their label, shape (q,)."""
    relative = np.exp(log_weights - _logsumexp(log_weights)[:, None].clip(-1e300))  # (q, k), rows of -inf become 0
    return np.asarray(relative * total[:, None])


def _normalised(mass: np.ndarray) -> np.ndarray:
    """Rows that sum to 1, or to 0 where nothing is there."""
    return np.asarray(mass / np.maximum(mass.sum(1, keepdims=True), 1e-300))


def _log_weights(similarity: np.ndarray, mass: np.ndarray, temperature: float) -> np.ndarray:
    """Logarithm of unnormalised weights, -inf for a missing neighbour."""
    log_mass = np.log(mass, out=np.full_like(mass, -np.inf), where=mass > 0)
    return np.asarray(np.where(mass > 0, np.nan_to_num(similarity) / temperature, 0.0) + log_mass)


def _logsumexp(x: np.ndarray) -> np.ndarray:
    """Over the last axis; -inf where a row is empty or all -inf."""
    top = x.max(1, initial=-np.inf)
    safe = np.where(np.isfinite(top), top, 0.0)
    total = np.exp(x - safe[:, None]).sum(1)
    return np.asarray(safe + np.log(total, out=np.full_like(total, -np.inf), where=total > 0))


def _nearest(similarity: np.ndarray) -> np.ndarray:
    """Row maxima, NaN for a row without neighbours."""
    top = np.nan_to_num(similarity, nan=-np.inf).max(1, initial=-np.inf)
    return np.where(np.isfinite(top), top, np.nan)
