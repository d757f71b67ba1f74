"""From evidence to a ruling: score, thresholds, verdict, novelty, and the heads' answers side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from api.judge.calibrator import Fitted
from api.judge.evidence import Evidence
from api.schemas import LABELS, Label
from api.schemas.verdicts import (
    CalibrationFacts,
    Combination,
    Decision,
    GeneratorShare,
    HeadAnswers,
    KnnHead,
    LinearHead,
    Nearest,
    Nn1Head,
    Stability,
    SvmHead,
    Thresholds,
    Verdict,
    Votes,
)
from api.service_settings import ServiceSettings
from trainer.heads.calibration import shift_prior
from trainer.heads.heads import Heads
from trainer.heads.logistic import sigmoid
from trainer.heads.vote import generator_shares


@dataclass(frozen=True, slots=True)
class Ruling:
    """What follows from the score of one image."""

    verdict: Decision
    reason: str | None
    score: float | None
    probability: float | None
    false_alarm: float | None
    thresholds: Thresholds
    novelty: float | None
    unknown_generator: bool


def decide(score: float | None, thresholds: Thresholds) -> Decision:
    """`fake` from the upper threshold on, else `real` below the lower one, else `uncertain`."""
    if score is None:
        return "uncertain"
    if thresholds.fake is not None and score >= thresholds.fake:
        return "fake"
    if thresholds.real is not None and score < thresholds.real:
        return "real"
    return "uncertain"


def thresholds_of(
    fitted: Fitted | None, max_false_alarm: float, max_miss: float, heads: list[str] | None = None
) -> Thresholds:
    """The cuts that promise these error rates."""
    if fitted is None:
        return Thresholds()
    fake, real = fitted.calibration.thresholds(max_false_alarm, max_miss, heads)
    return Thresholds(fake=fake, real=real)


def shortage(
    fitted: Fitted | None, max_false_alarm: float, max_miss: float, heads: list[str] | None = None
) -> str | None:
    """What keeps a rate from being promised, as one line."""
    if fitted is None or not fitted.calibration.maps:
        return None
    real, fake = fitted.calibration.more_images(max_false_alarm, max_miss, heads)
    parts = []
    if real:
        parts.append(f"a false alarm rate of {max_false_alarm:g} needs {real} more real calibration images")
    if fake:
        parts.append(f"a miss rate of {max_miss:g} needs {fake} more fake calibration images")
    return "; ".join(parts) or None


def rule(
    evidence: Evidence,
    fitted: Fitted | None,
    uncalibrated: str | None,
    settings: ServiceSettings,
    max_false_alarm: float | None = None,
) -> Ruling:
    """Rule on the first embedding of the evidence.

    Args:
        evidence: Of the calibrated k.
        fitted: The calibration in use.
        uncalibrated: Why there is none.
        settings: Error rates, prior and the p-value of an unknown generator.
        max_false_alarm: In place of the setting.
    """
    rate = max_false_alarm or settings.max_false_alarm
    score = none_if_nan(evidence.scores[0])
    if fitted is None or score is None:
        why = uncalibrated or "no head that answered is calibrated"
        return Ruling("uncertain", why, None, None, None, Thresholds(), None, False)
    calibration, answering = fitted.calibration, evidence.answering
    thresholds = thresholds_of(fitted, rate, settings.max_miss, answering)
    verdict = decide(score, thresholds)
    short = shortage(fitted, rate, settings.max_miss, answering) or "the score lies between the thresholds"
    reason = short if verdict == "uncertain" else None
    nearest_real, nearest_fake = evidence.votes.nearest_real[0], evidence.votes.nearest_fake[0]
    p_value = calibration.fake_novelty(float(nearest_fake))
    return Ruling(
        verdict,
        reason,
        score,
        shift_prior(score, settings.prior),
        calibration.false_alarm(score, answering),
        thresholds,
        calibration.novelty(float(np.fmax(nearest_real, nearest_fake))),
        verdict == "fake" and p_value is not None and p_value < settings.unknown,
    )


def combination(terms: Mapping[str, float]) -> Combination | None:
    """The sum that the terms of a score make."""
    return Combination(bias=terms["bias"], logit=sum(terms.values())) if terms else None


def heads_side_by_side(
    evidence: Evidence,
    fitted: Fitted | None,
    heads: Heads | None,
    settings: ServiceSettings,
    terms: Mapping[str, float],
) -> HeadAnswers:
    """Every head's own answer to the first embedding.

    Args:
        evidence: Of the k that was asked for; the vote's probability is given only where that is the calibrated k.
        fitted: The calibration in use.
        heads: Linear and SVM, and their maps.
        settings: The calibrated k, and the prior of the probabilities.
        terms: What each head adds to the score's logit, see `Calibration.terms`.
    """
    votes = evidence.votes
    answers = HeadAnswers()
    if not np.isnan(votes.score[0]):
        answers.knn = KnnHead(
            score=clip(votes.score[0]),
            probability=_probability("knn", evidence, fitted, heads, settings) if evidence.k == settings.k else None,
            contribution=terms.get("knn"),
            label=_label(votes.logit[0] >= 0),
            k=evidence.k,
            votes=Votes(real=int(votes.votes_real[0]), fake=int(votes.votes_fake[0])),
            nearest=Nearest(real=none_if_nan(votes.nearest_real[0]), fake=none_if_nan(votes.nearest_fake[0])),
        )
    nearest = [
        (float(found.similarities[0, 0]), label, int(found.ids[0, 0]))
        for label, found in enumerate((evidence.real, evidence.fake))
        if found.ids[0, 0] >= 0
    ]
    if nearest:
        similarity, label, reference = max(nearest)
        answers.nn1 = Nn1Head(label=LABELS[label], id=reference, similarity=similarity)
    if "linear" in evidence.logits:
        logit = float(evidence.logits["linear"][0])
        answers.linear = LinearHead(
            score=clip(sigmoid(np.array(logit))),
            probability=_probability("linear", evidence, fitted, heads, settings),
            contribution=terms.get("linear"),
            label=_label(logit >= 0),
        )
    if "svm" in evidence.logits:
        score = float(evidence.logits["svm"][0])
        answers.svm = SvmHead(
            score=score,
            probability=_probability("svm", evidence, fitted, heads, settings),
            contribution=terms.get("svm"),
            label=_label(score > 0),
        )
    return answers


def _probability(
    head: str, evidence: Evidence, fitted: Fitted | None, heads: Heads | None, settings: ServiceSettings
) -> float | None:
    """The head's calibrated probability at the operator's prior; linear's and svm's maps are the checkpoint's own."""
    value = evidence.logits[head][:1]  # (1,)
    if heads is not None and head in heads.maps:
        probability = float(sigmoid(heads.maps[head](value[:, None]))[0])
    elif fitted is not None:
        probability = float(fitted.calibration.probability(head, value)[0])
    else:
        return None
    return None if np.isnan(probability) else shift_prior(probability, settings.prior)


def shares(evidence: Evidence, names: dict[int, str]) -> list[GeneratorShare]:
    """How the fakes' weight is divided between generators, largest first."""
    found = generator_shares(evidence.votes.weights_fake[0], evidence.fake.generators[0])
    return [GeneratorShare(name=names.get(id, f"#{id}"), share=clip(share)) for id, share in found.items()]


def best_generator(evidence: Evidence, row: int, names: dict[int, str]) -> str | None:
    """The generator with the largest share for one embedding."""
    found = generator_shares(evidence.votes.weights_fake[row], evidence.fake.generators[row])
    return names.get(next(iter(found))) if found else None


def region_score(evidence: Evidence, row: int) -> float:
    """Score of one local crop, 0..1: the combination, else the vote, else the linear head, else 0.5.

    Thresholds are those of whole images, so none is applied.
    """
    linear = sigmoid(evidence.logits["linear"][row]) if "linear" in evidence.logits else np.nan
    for score in (evidence.scores[row], evidence.votes.score[row], linear):
        if not np.isnan(score):
            return clip(score)
    return 0.5


def stability(names: Sequence[str], scores: np.ndarray, verdict: Verdict) -> Stability:
    """How a verdict by score fares under re-encodings.

    Args:
        names: Of the variants, n of them.
        scores: Their combined scores, shape (n,), NaN for none.
        verdict: On the unchanged image, by score.
    """
    values = [none_if_nan(score) for score in scores]
    known = [value for value in (verdict.score, *values) if value is not None]
    return Stability(
        scores=dict(zip(names, values, strict=True)),
        spread=max(known) - min(known) if known else None,
        flips=any(decide(value, verdict.thresholds) != verdict.verdict for value in values),
    )


def calibration_facts(fitted: Fitted | None) -> CalibrationFacts | None:
    """The calibration in use, as told to the caller."""
    if fitted is None:
        return None
    return CalibrationFacts(revision=fitted.revision, real=fitted.calibration.n_real, fake=fitted.calibration.n_fake)


def none_if_nan(value: float) -> float | None:
    """JSON has no NaN."""
    return None if np.isnan(value) else float(value)


def clip(value: float | np.ndarray) -> float:
    """Rounding may leave 0..1 by a hair."""
    return min(1.0, max(0.0, float(value)))


def _label(fake: bool | np.bool_) -> Label:
    return "fake" if fake else "real"
