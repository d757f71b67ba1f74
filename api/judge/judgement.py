"""From evidence to a ruling: score, thresholds, verdict, novelty, and the heads' answers side by side."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from api.judge.calibrator import IndexCalibration
from api.judge.evidence import Evidence
from api.schemas import LABELS, Label, verdicts
from api.service_settings import ServiceSettings
from trainer.heads.calibration import shift_prior
from trainer.heads.heads import Heads
from trainer.heads.logistic import sigmoid
from trainer.heads.vote import generator_shares
from trainer.images import Box


@dataclass(frozen=True, slots=True)
class Ruling:
    """What follows from the score of one image; without one, as where there is too little to judge, nothing does."""

    verdict: verdicts.Decision
    reason: str | None
    score: float | None = None
    probability: float | None = None
    false_alarm: float | None = None
    thresholds: verdicts.Thresholds = field(default_factory=verdicts.Thresholds)
    novelty: float | None = None
    unknown_generator: bool = False


def decide(score: float | None, thresholds: verdicts.Thresholds) -> verdicts.Decision:
    """`fake` from the upper threshold on, else `real` below the lower one, else `uncertain`."""
    if score is None:
        return "uncertain"
    if thresholds.fake is not None and score >= thresholds.fake:
        return "fake"
    return "real" if thresholds.real is not None and score < thresholds.real else "uncertain"


def rule(
    evidence: Evidence,
    fitted: IndexCalibration,
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
    score = none_if_nan(evidence.scores[0])
    if score is None:
        return Ruling("uncertain", uncalibrated or "no head that answered is calibrated")
    rates = (max_false_alarm or settings.max_false_alarm, settings.max_miss)
    answering = [head for head, logit in evidence.first_logits.items() if not np.isnan(logit)]
    calibration, thresholds = fitted.calibration, fitted.thresholds(*rates, answering)
    verdict, reason = decide(score, thresholds), None
    if verdict == "uncertain":
        reason = fitted.shortage(*rates, answering) or "the score lies between the thresholds"
    nearest_real, nearest_fake = float(evidence.votes.nearest_real[0]), float(evidence.votes.nearest_fake[0])
    p_value = None
    if verdict == "fake" and thresholds.fake is not None:
        p_value = calibration.fake_novelty(nearest_fake, thresholds.fake, answering)
    return Ruling(
        verdict=verdict,
        reason=reason,
        score=score,
        probability=shift_prior(score, settings.prior),
        false_alarm=calibration.false_alarm(score, answering),
        thresholds=thresholds,
        novelty=calibration.novelty(float(np.fmax(nearest_real, nearest_fake))),
        unknown_generator=p_value is not None and p_value < settings.unknown,
    )


def combination(terms: Mapping[str, float]) -> verdicts.Combination | None:
    """The sum that the terms of a score make."""
    return verdicts.Combination(bias=terms["bias"], logit=sum(terms.values())) if terms else None


def heads_side_by_side(
    evidence: Evidence,
    fitted: IndexCalibration,
    heads: Heads | None,
    settings: ServiceSettings,
    terms: Mapping[str, float],
) -> verdicts.HeadAnswers:
    """Every head's own answer to the first embedding.

    Args:
        evidence: Of the k that was asked for; the vote's probability is given only where that is the calibrated k.
        fitted: The calibration in use.
        heads: Linear and SVM, and their maps.
        settings: The calibrated k, and the prior of the probabilities.
        terms: What each head adds to the score's logit, see `Calibration.terms`.
    """
    votes, logits, answers = evidence.votes, evidence.first_logits, verdicts.HeadAnswers()

    def probability(head: str) -> float | None:
        """Calibrated, at the operator's prior; linear's and svm's maps are the checkpoint's own."""
        if heads is not None and head in heads.maps:
            value = float(sigmoid(heads.maps[head](np.array([[logits[head]]])))[0])
        else:
            value = float(fitted.calibration.probability(head, logits[head]))
        return None if np.isnan(value) else shift_prior(value, settings.prior)

    if not np.isnan(votes.score[0]):
        answers.knn = verdicts.KnnHead(
            score=clip(votes.score[0]),
            probability=probability("knn") if evidence.k == settings.k else None,
            contribution=terms.get("knn"),
            label=_label(logits["knn"] >= 0),
            k=evidence.k,
            votes=verdicts.Votes(real=int(votes.votes_real[0]), fake=int(votes.votes_fake[0])),
            nearest=verdicts.Nearest(real=none_if_nan(votes.nearest_real[0]), fake=none_if_nan(votes.nearest_fake[0])),
        )
    nearest = [
        (float(near.similarities[0, 0]), label, int(near.ids[0, 0]))
        for label, near in enumerate((evidence.real, evidence.fake))
        if near.ids[0, 0] >= 0
    ]
    if nearest:
        similarity, label, reference = max(nearest)
        answers.nn1 = verdicts.Nn1Head(label=LABELS[label], id=reference, similarity=similarity)
    if "linear" in logits:
        answers.linear = verdicts.LinearHead(
            score=clip(sigmoid(np.array(logits["linear"]))),
            probability=probability("linear"),
            contribution=terms.get("linear"),
            label=_label(logits["linear"] >= 0),
        )
    if "svm" in logits:
        answers.svm = verdicts.SvmHead(
            score=logits["svm"],
            probability=probability("svm"),
            contribution=terms.get("svm"),
            label=_label(logits["svm"] > 0),
        )
    return answers


def shares(evidence: Evidence, names: Mapping[int, str]) -> list[verdicts.GeneratorShare]:
    """How the fakes' weight for the first embedding is divided between generators, largest first."""
    by_id = generator_shares(evidence.votes.weights_fake[0], evidence.fake.generators[0])
    return [verdicts.GeneratorShare(name=names.get(id, f"#{id}"), share=clip(share)) for id, share in by_id.items()]


def regions(boxes: Sequence[Box], evidence: Evidence, names: Mapping[int, str]) -> list[verdicts.Region]:
    """What each local crop says, whose embeddings follow the plain view's.

    The score is the combination, else the vote, else the linear head, else 0.5. Thresholds are those of whole images,
    so none is applied.
    """
    crops = []
    for row, box in enumerate(boxes, start=1):
        linear = sigmoid(evidence.logits["linear"][row]) if "linear" in evidence.logits else np.nan
        scores = (evidence.scores[row], evidence.votes.score[row], linear)
        by_id = generator_shares(evidence.votes.weights_fake[row], evidence.fake.generators[row])
        score = next((clip(score) for score in scores if not np.isnan(score)), 0.5)
        crops.append(verdicts.Region(box=box, score=score, generator=names.get(next(iter(by_id), -1))))
    return crops


def stability(scores: Mapping[str, float | None], verdict: verdicts.Verdict) -> verdicts.Stability:
    """How a verdict by score fares under re-encodings; a copy without a score says nothing of that.

    Args:
        scores: Combined, of each variant; NaN or None for none.
        verdict: On the unchanged image, by score.
    """
    values = {name: none_if_nan(score) for name, score in scores.items()}
    known = [value for value in values.values() if value is not None]
    compared = known if verdict.score is None else [verdict.score, *known]
    return verdicts.Stability(
        scores=values,
        spread=max(compared) - min(compared) if known else None,
        flips=any(decide(value, verdict.thresholds) != verdict.verdict for value in known),
    )


def none_if_nan(value: float | None) -> float | None:
    """JSON has no NaN."""
    return None if value is None or np.isnan(value) else float(value)


def clip(value: float | np.ndarray) -> float:
    """Rounding may leave 0..1 by a hair."""
    return min(1.0, max(0.0, float(value)))


def _label(fake: bool) -> Label:
    return "fake" if fake else "real"
