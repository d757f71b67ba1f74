"""Calibration: maps against scikit-learn, thresholds by their definition, promised rates on fresh images."""

import json
import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression

from trainer.heads.calibration import MINIMUM, Calibration, fit_calibration, group_folds, shift_prior, subset
from trainer.heads.logistic import APART, RIDGE, LogisticMap, fit_logistic, sigmoid

FAR_TO_NEAR = np.array([0.5, 0.6, 0.7, 0.8, 0.9], np.float32)
"""Similarities to the nearest fake reference."""


def head_scores(labels: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Three heads of different strength and scale."""
    return {
        "knn": 4 * labels + rng.normal(size=len(labels)) * 3,
        "linear": 2 * labels - 1 + rng.normal(size=len(labels)),
        "svm": 0.1 * labels + 0.2 * rng.normal(size=len(labels)),
    }


def calibrate(n_real: int, n_fake: int, seed: int, groups: list[str] | None = None) -> Calibration:
    rng = np.random.default_rng(seed)
    labels = np.r_[np.zeros(n_real, int), np.ones(n_fake, int)]
    nearest = rng.uniform(0.5, 1, n_real + n_fake)
    names = groups or [str(i) for i in range(len(labels))]
    return fit_calibration(head_scores(labels, rng), nearest, nearest, labels, names, [""] * len(names))


def combine(fitted: Calibration, logits: Mapping[str, float | None]) -> float | None:
    """The combined probability of one image; None where no head that answered is calibrated."""
    there = {head: np.array([value]) for head, value in logits.items() if value is not None}
    score = float(fitted.combine_many(there)[0]) if there else math.nan
    return None if math.isnan(score) else score


def table(real: list[float], fake: list[float]) -> Calibration:
    """A calibration of the linear head alone with these calibrated logits."""
    return Calibration(
        maps={"linear": LogisticMap(("linear",), (1.0,), 0.0)},
        real={"linear": np.sort(np.array(real, np.float32))},
        fake={"linear": np.sort(np.array(fake, np.float32))},
        sources={"linear": np.zeros(len(real), np.int32)},
        generators={"linear": np.zeros(len(fake), np.int32)},
        nearest_fake={"linear": np.full(len(fake), np.nan, np.float32)},
        nearest=np.array([], np.float32),
        n_real=len(real),
        n_fake=len(fake),
    )


@pytest.mark.parametrize("columns", [1, 3])
def test_fit_equals_scikit_learn(columns: int) -> None:
    rng = np.random.default_rng(0)
    labels = (np.arange(400) % 5 > 0).astype(int)
    x = np.column_stack(list(head_scores(labels, rng).values()))[:, :columns]
    weights = np.where(labels == 1, 0.5 / labels.mean(), 0.5 / (1 - labels.mean()))
    mean = np.average(x, axis=0, weights=weights)
    standard = (x - mean) / np.sqrt(np.average((x - mean) ** 2, axis=0, weights=weights))
    # The penalty is plain in directions of its own: the common weight, and what sets weights apart.
    directions = np.linalg.qr(np.column_stack([np.ones(columns), np.eye(columns)[:, 1:]]))[0]
    standard = standard @ directions / np.sqrt([RIDGE] + [APART] * (columns - 1))  # (n, columns)
    oracle = LogisticRegression(C=1.0, class_weight="balanced", tol=1e-10, max_iter=10_000).fit(standard, labels)
    logistic = fit_logistic(("knn", "linear", "svm")[:columns], x, labels)
    np.testing.assert_allclose(logistic(x), oracle.decision_function(standard), atol=1e-4)


def test_balanced_classes_put_the_prior_at_one_half() -> None:
    rng = np.random.default_rng(1)
    labels = (np.arange(2000) % 10 > 0).astype(int)
    logistic = fit_logistic(("linear",), rng.normal(size=(2000, 1)), labels)
    assert sigmoid(logistic(np.zeros((1, 1))))[0] == pytest.approx(0.5, abs=0.1)


def test_a_head_that_points_the_wrong_way_is_left_out() -> None:
    rng = np.random.default_rng(2)
    labels = np.arange(200) % 2
    good, bad = labels + rng.normal(size=200), -labels + rng.normal(size=200)
    both = fit_logistic(("knn", "linear"), np.column_stack([good, bad]), labels)
    assert both.weights[0] > 0
    assert both.weights[1] == 0
    alone = fit_logistic(("linear",), bad[:, None], labels)
    assert (alone.weights, alone.intercept) == ((0.0,), 0.0)


def test_separable_and_constant_scores_stay_finite() -> None:
    labels = np.arange(40) % 2
    for x in (labels * 1e6, np.ones(40), labels * 1e-9):
        logits = fit_logistic(("linear",), np.asarray(x, float)[:, None], labels)(np.asarray(x, float)[:, None])
        assert np.isfinite(logits).all()
        assert (logits[labels == 1] >= logits[labels == 0]).all()


def test_calibrated_logits_stay_within_thirty() -> None:
    logits = LogisticMap(("linear",), (2.0,), 1.0)(np.array([[1.0], [1e9], [-1e9], [np.nan]]))
    np.testing.assert_array_equal(logits, [3, 30, -30, np.nan])


def test_every_subset_of_heads_is_calibrated() -> None:
    names = {"knn", "linear", "svm", "knn+linear", "knn+svm", "linear+svm", "knn+linear+svm"}
    fitted = calibrate(100, 100, 0)
    assert set(fitted.maps) == set(fitted.real) == set(fitted.fake) == names
    assert subset(["svm", "knn"]) == "knn+svm"
    assert [fitted.largest(heads) for heads in (None, ["svm", "knn", "other"], ["svm"], [])] == [
        "knn+linear+svm",
        "knn+svm",
        "svm",
        None,
    ]


def test_a_head_that_cannot_answer_is_left_to_the_rest() -> None:
    fitted = calibrate(100, 100, 0)
    assert combine(fitted, {"knn": None, "linear": 1.0, "svm": float("nan")}) == pytest.approx(
        float(fitted.probability("linear", 1.0))
    )
    some = fitted.probability("linear", np.array([[1.0, 2.0, np.nan]]))
    assert some[0, :2].tolist() == [combine(fitted, {"linear": score}) for score in (1.0, 2.0)]
    assert some.shape == (1, 3)
    assert np.isnan(some[0, 2])
    assert combine(fitted, {"knn": None, "linear": None, "svm": None}) is None
    assert combine(fitted, {}) is None


def test_combining_many_equals_combining_each() -> None:
    fitted = calibrate(100, 100, 0)
    logits = {"knn": np.array([1.0, np.nan, 2.0, np.nan]), "linear": np.array([0.0, 1.0, np.nan, np.nan])}
    many = fitted.combine_many(logits)
    for i, value in enumerate(many):
        one = combine(fitted, {head: float(values[i]) for head, values in logits.items()})
        assert (math.isnan(value) and one is None) or value == pytest.approx(one)


def test_the_terms_add_up_to_the_logit_of_the_score() -> None:
    fitted = calibrate(100, 100, 0)
    for logits in ({"knn": 1.0, "linear": -0.5, "svm": 0.3}, {"knn": math.nan, "linear": 2.0, "svm": -0.1}):
        terms = fitted.terms(logits)
        assert set(terms) == {head for head, value in logits.items() if not math.isnan(value)} | {"bias"}
        assert sigmoid(np.array(sum(terms.values()))) == pytest.approx(combine(fitted, logits))
    assert fitted.terms({"knn": math.nan}) == {}


def test_too_few_images_calibrate_nothing() -> None:
    fitted = calibrate(9, 100, 0)
    assert fitted.maps == {}
    assert combine(fitted, {"linear": 1.0}) is None
    assert fitted.thresholds(0.05, 0.05) == (None, None)
    assert fitted.more_images(0.05, 0.1) == (19, 9)
    assert fitted.false_alarm(0.5) is None
    assert np.isnan(fitted.probability("linear", 1.0))


def test_groups_are_held_out_whole() -> None:
    """Scores that know each group's labels by heart must not pass as honest: folds never split a group."""
    labels = np.arange(200) % 2
    groups = [str(i // 10) for i in range(200)]
    folds = group_folds(groups, labels)
    assert all(len({int(folds[i]) for i in range(200) if groups[i] == group}) == 1 for group in set(groups))
    assert len(set(folds.tolist())) == 5
    rare = [int(i % 5 == 0) for i in range(100)]  # in the order of names every fifth group is fake
    dealt = group_folds([f"{i:03}" for i in range(100)], np.array(rare))
    assert [sum(rare[i] for i in np.flatnonzero(dealt == fold)) for fold in range(5)] == [4] * 5


@pytest.mark.parametrize("label", [0, 1])
@pytest.mark.parametrize("apart", [0, 1, 20])
def test_tables_hold_scores_of_maps_that_have_not_seen_the_group(apart: int, label: int) -> None:
    """All images of a label but so many are of one group; where the rest has none, all images have to do."""
    labels, rng = np.arange(60) % 2, np.random.default_rng(4)
    groups, raw = [str(i // 4) for i in range(60)], labels + rng.normal(size=60)
    for i in np.flatnonzero(labels == label)[apart:]:
        groups[i] = "large"
    fitted = fit_calibration({"linear": raw}, raw, raw, labels, groups, groups)
    scores, folds = np.empty(60), group_folds(groups, labels)
    for fold in range(5):
        held = folds == fold
        seen = ~held if len(set(labels[~held])) == 2 else np.ones(60, bool)
        scores[held] = fit_logistic(("linear",), raw[seen, None], labels[seen])(raw[held, None])
    np.testing.assert_array_equal(fitted.real["linear"], np.sort(scores[labels == 0]))
    np.testing.assert_array_equal(fitted.fake["linear"], np.sort(scores[labels == 1]))


def test_what_could_not_be_answered_is_left_out_of_the_fit() -> None:
    labels, rng = np.arange(90) % 2, np.random.default_rng(6)
    logits, groups, nowhere = head_scores(labels, rng), [str(i) for i in range(90)], np.full(90, np.nan)
    logits["knn"][18:] = np.nan  # which leaves fewer than 10 of each label
    logits["svm"][80:] = np.nan
    fitted = fit_calibration(logits, nowhere, nowhere, labels, groups, groups)
    assert set(fitted.maps) == {"linear", "svm", "linear+svm"}
    assert fitted.maps["svm"] == fit_logistic(("svm",), logits["svm"][:80, None], labels[:80])
    assert (len(fitted.real["linear"]), len(fitted.real["svm"])) == (45, 40)


def test_enrolled_references_count_for_what_depends_on_the_index_alone() -> None:
    labels, rng = np.arange(90) % 2, np.random.default_rng(5)
    logits = head_scores(labels, rng)
    enrolled = (labels == 1) & (np.arange(90) > 60)
    nearest, groups = rng.uniform(size=90), [str(i) for i in range(90)]
    own = np.flatnonzero(~enrolled)
    both = fit_calibration(logits, nearest, nearest, labels, groups, groups, enrolled)
    without = fit_calibration(
        {head: values[own] for head, values in logits.items()},
        nearest[own],
        nearest[own],
        labels[own],
        [groups[i] for i in own],
        [groups[i] for i in own],
    )
    assert {name for name in both.maps if both.maps[name] == without.maps[name]} == {"linear", "svm", "linear+svm"}
    assert (both.n_fake, len(both.fake["linear"]), len(both.fake["knn"])) == (45, 30, 45)
    assert (len(both.nearest), len(both.nearest_fake["linear"]), len(both.nearest_fake["knn"])) == (90, 30, 45)


def test_one_group_of_everything_still_calibrates() -> None:
    assert calibrate(30, 30, 0, ["one"] * 60).thresholds(0.05, 0.05)[0] is not None


logits = st.lists(st.floats(-5, 5, width=32), min_size=1, max_size=60)


@given(logits, logits, st.floats(0.01, 0.9), st.floats(0.01, 0.9))
def test_thresholds_meet_their_definition(real: list[float], fake: list[float], alarm: float, miss: float) -> None:
    t_fake, t_real = table(real, fake).thresholds(alarm, miss)
    reals, fakes = sigmoid(np.array(real, np.float32)), sigmoid(np.array(fake, np.float32))

    def alarms(t: float) -> float:
        return float(1 + (reals >= t).sum()) / (len(reals) + 1)

    def misses(t: float) -> float:
        return float(1 + (fakes < t).sum()) / (len(fakes) + 1)

    if t_fake is None:
        assert 1 / (len(reals) + 1) > alarm
    else:
        assert alarms(t_fake) <= alarm + 1e-9
        assert t_fake == 0 or alarms(float(np.nextafter(t_fake, -1))) > alarm - 1e-9
    if t_real is None:
        assert 1 / (len(fakes) + 1) > miss
    else:
        assert misses(t_real) <= miss + 1e-9
        assert t_real == 1 or misses(float(np.nextafter(t_real, 2))) > miss - 1e-9


def test_thresholds_by_hand() -> None:
    """19 reals promise 5 % only above the highest; 39 allow one to lie above."""
    t_fake, _ = table([float(i) for i in range(-19, 0)], [0.0]).thresholds(0.05, 0.05)
    assert t_fake == np.nextafter(sigmoid(np.array(-1.0)), 2.0)
    t_fake, _ = table([float(i) for i in range(-39, 0)], [0.0]).thresholds(0.05, 0.05)
    assert t_fake == np.nextafter(sigmoid(np.array(-2.0)), 2.0)
    assert table([0.0], [0.0]).thresholds(1.0, 1.0) == (0.0, 1.0)  # everything may go wrong


@pytest.mark.parametrize("logit", [0.1, 0.7])  # float32 rounds one up, the other down
def test_a_tie_lies_on_the_side_of_the_promise(logit: float) -> None:
    """An image that scores as the highest real of 19 is no false alarm of 5 %, as the lowest of 19 fakes no miss."""
    fitted = table([-1.0] * 18 + [logit], [logit] + [1.0] * 18)
    score = combine(fitted, {"linear": logit})
    t_fake, t_real = fitted.thresholds(0.05, 0.05)
    assert score is not None
    assert t_fake is not None
    assert t_real is not None
    assert t_real <= score < t_fake
    assert fitted.false_alarm(score) == 1 / 19


raw_scores = st.lists(st.floats(-40, 40), min_size=MINIMUM, max_size=60)


@given(raw_scores, raw_scores, st.floats(0.01, 0.9))
def test_a_stored_calibration_keeps_its_rates_where_scores_tie(
    real: list[float], fake: list[float], rate: float
) -> None:
    """Images that score exactly as the calibration images do, each judged alone, by a map that no fit changes."""
    same = LogisticMap(("linear",), (0.1,), 0.7)
    labels = np.repeat([0, 1], [len(real), len(fake)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trainer.heads.calibration.fit_logistic", lambda *_: same)
        raw, nowhere = np.array(real + fake), np.full(len(labels), np.nan)
        names = [str(i) for i in range(len(labels))]
        fitted = fit_calibration({"linear": raw}, nowhere, nowhere, labels, names, [""] * len(labels))
    stored = Calibration.from_json(json.loads(json.dumps(fitted.to_json())))
    reals, fakes = (np.array([combine(stored, {"linear": score}) for score in scores]) for scores in (real, fake))
    t_fake, t_real = stored.thresholds(rate, rate)
    assert t_fake is None or (1 + (reals >= t_fake).sum()) / (len(reals) + 1) <= rate + 1e-9
    assert t_real is None or (1 + (fakes < t_real).sum()) / (len(fakes) + 1) <= rate + 1e-9
    for score in reals:
        assert stored.false_alarm(score) == (reals >= score).mean()


def test_a_rate_too_low_says_how_many_more_images_it_needs() -> None:
    fitted = table([0.0] * 18, [0.0] * 99)
    assert fitted.thresholds(0.05, 0.01) == (None, 0.5)
    assert fitted.more_images(0.05, 0.01) == (1, 0)
    assert fitted.more_images(0.01, 0.001) == (81, 900)
    assert fitted.more_images(0.0, 0.5) == (0, 0)  # no number of images promises that nothing ever fails


def test_false_alarm_is_the_share_of_reals_at_or_above() -> None:
    fitted = table([-1.0, 0.0, 0.0, 1.0], [2.0])
    assert fitted.false_alarm(0.5) == 0.75
    assert fitted.false_alarm(1.0) == 0.0
    assert fitted.false_alarm(0.0) == 1.0


def test_novelty_by_hand_and_only_from_fifty_images() -> None:
    nearest = np.linspace(0.51, 1.0, 50).astype(np.float32)
    labels = np.r_[np.zeros(25, int), np.ones(25, int)]
    names = [str(i) for i in range(50)]
    fitted = fit_calibration({}, nearest, nearest, labels, names, names)
    assert fitted.novelty(0.4) == pytest.approx(1 / 51)
    assert fitted.novelty(0.755) == pytest.approx(26 / 51)
    assert fitted.novelty(1.0) == 1.0
    assert fitted.novelty(float("nan")) is None
    assert fitted.fake_novelty(0.4, 0.5) is None
    fewer = fit_calibration({}, nearest[:49], nearest[:49], labels[:49], names[:49], names[:49])
    assert fewer.novelty(0.4) is None


def test_an_unknown_generator_is_told_among_fakes_that_are_called_fake() -> None:
    """Fakes that are called real lie farthest from all: among them nothing that is called fake would look new."""
    fitted = replace(table([-3.0], [-2.0, -1.0, 1.0, 2.0, 3.0]), nearest_fake={"linear": FAR_TO_NEAR})
    assert fitted.fake_novelty(0.65, 0.5) == pytest.approx(1 / 4)
    assert fitted.fake_novelty(0.7, 0.5) == pytest.approx(2 / 4)  # a tie is not farther
    assert fitted.fake_novelty(0.65, float(sigmoid(np.array(-1.0)))) == pytest.approx(2 / 5)
    assert fitted.fake_novelty(0.65, 0.0) == pytest.approx(3 / 6)
    assert fitted.fake_novelty(0.65, 0.99) is None
    assert fitted.fake_novelty(float("nan"), 0.5) is None
    assert fitted.fake_novelty(0.65, 0.5, ["svm"]) is None


def test_similarities_and_sources_stay_with_their_scores() -> None:
    """Each table is sorted by score, and what belongs to an image goes along."""
    labels, rng = np.arange(60) % 2, np.random.default_rng(4)
    raw, names = labels + rng.normal(size=60), [str(i) for i in range(60)]
    origins = [f"origin {i % 7}" for i in range(60)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trainer.heads.calibration.fit_logistic", lambda *_: LogisticMap(("linear",), (1.0,), 0.0))
        fitted = fit_calibration({"linear": raw}, raw, np.where(raw > 2, np.nan, raw), labels, names, origins)
    fakes = np.where(fitted.fake["linear"] > 2, np.nan, fitted.fake["linear"])
    np.testing.assert_array_equal(fitted.nearest_fake["linear"], fakes)
    for label, numbers in enumerate((fitted.sources["linear"], fitted.generators["linear"])):
        rows = np.flatnonzero(labels == label)
        np.testing.assert_array_equal(numbers, [i % 7 for i in rows[np.argsort(raw[rows])]])


def test_what_verdicts_read_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The logistic function of thousands of scores and the sources' numbers are not computed for each verdict."""
    fitted = replace(
        table([float(i) for i in range(-60, 0)], [-2.0, -1.0, 1.0, 2.0, 3.0]),
        sources={"linear": np.arange(60, dtype=np.int32) % 12},
        nearest_fake={"linear": FAR_TO_NEAR},
    )
    monkeypatch.setattr("trainer.heads.calibration.sigmoid", None)
    monkeypatch.setattr(np, "unique", None)
    t_fake, t_real = fitted.thresholds(0.1, 0.2)
    assert t_fake == np.nextafter(sigmoid(np.array(-1.0)), 2.0)  # 5 images of a source leave none of ten above
    assert t_real == sigmoid(np.array(-2.0))
    assert fitted.new_sources() == 12
    assert fitted.false_alarm(float(sigmoid(np.array(-6.0)))) == 0.1
    assert fitted.fake_novelty(0.65, 0.5) == pytest.approx(1 / 4)


@settings(max_examples=50)
@given(st.integers(0, 10_000), st.integers(2, 30), st.floats(0.02, 0.9))
def test_nine_of_ten_new_sources_hold_the_rate(seed: int, count: int, rate: float) -> None:
    """The threshold is the smallest that both definitions allow, as counting over all candidates finds it."""
    rng = np.random.default_rng(seed)
    sources = rng.integers(0, count, 150)
    scores = np.sort(np.round(rng.normal(size=150) + rng.normal(size=count)[sources], 1)).astype(np.float32)
    fitted = replace(table(scores.tolist(), [0.0]), sources={"linear": sources.astype(np.int32)})
    t_fake, _ = fitted.thresholds(rate, 0.5)
    reals, numbers = sigmoid(scores), np.unique(sources)
    mirrored = replace(table([0.0], (-scores).tolist()), generators={"linear": sources[::-1].astype(np.int32)})
    _, t_real = mirrored.thresholds(0.5, rate)

    def promised(t: float) -> bool:
        alarms = reals >= t
        above = sum(alarms[sources == number].mean() > rate + 1e-9 for number in numbers)
        by_source = (1 + above) / (len(numbers) + 1) <= 0.1 + 1e-9 or len(numbers) < 9
        return by_source and bool((1 + alarms.sum()) / 151 <= rate + 1e-9)

    candidates = [0.0, *np.nextafter(np.unique(reals), 2.0)]
    assert t_fake == next(t for t in candidates if promised(t))
    # Upside down a new generator is a new source, but for the side on which a tie lies.
    assert t_real == (1.0 if t_fake == 0 else sigmoid(-scores)[reals < t_fake][-1])
    assert fitted.new_sources() == (len(numbers) if len(numbers) >= 9 else 0)


@pytest.mark.parametrize(("known", "held"), [(30, (0.88, 0.92)), (1, (0.5, 0.8))])
def test_new_sources_hold_the_rate_where_sources_are_known(known: int, held: tuple[float, float]) -> None:
    """Of new sources, exchangeable with 30 others, nine of ten hold the rate; by single images far fewer do."""
    rng, shares = np.random.default_rng(7), []
    for _ in range(150):
        scores = rng.normal(size=(60, 1)) + rng.normal(size=(60, 20))  # (source, image)
        reals, sources = scores[:30].ravel(), np.repeat(np.arange(30, dtype=np.int32) % known, 20)
        fitted = replace(table(reals.tolist(), [0.0]), sources={"linear": sources[np.argsort(reals)]})
        t_fake, _ = fitted.thresholds(0.05, 0.5)
        assert t_fake is not None
        shares.append(((sigmoid(scores[30:].astype(np.float32)) >= t_fake).mean(1) <= 0.05).mean())
    assert held[0] <= np.mean(shares) <= held[1]


def test_json_round_trip() -> None:
    fitted = calibrate(100, 120, 3)
    again = Calibration.from_json(json.loads(json.dumps(fitted.to_json(), allow_nan=False)))
    assert again.maps == fitted.maps
    for name in fitted.maps:
        np.testing.assert_array_equal(again.real[name], fitted.real[name])
        np.testing.assert_array_equal(again.fake[name], fitted.fake[name])
        np.testing.assert_array_equal(again.sources[name], fitted.sources[name])
        np.testing.assert_array_equal(again.generators[name], fitted.generators[name])
        np.testing.assert_array_equal(again.nearest_fake[name], fitted.nearest_fake[name])
    np.testing.assert_array_equal(again.nearest, fitted.nearest)
    assert (again.n_real, again.n_fake) == (100, 120)
    assert again.thresholds(0.05, 0.05) == fitted.thresholds(0.05, 0.05)


@given(st.floats(0.001, 0.999), st.floats(0.001, 0.999))
def test_a_prior_shifts_the_logit(score: float, prior: float) -> None:
    def logit(p: float) -> float:
        return math.log(p / (1 - p))

    assert shift_prior(score, 0.5) == pytest.approx(score)
    assert logit(shift_prior(score, prior)) == pytest.approx(logit(score) + logit(prior), abs=1e-6)


def test_promised_rates_hold_on_fresh_exchangeable_images() -> None:
    """Mean over 200 calibrations of the false alarms and misses among fresh images: at most what was promised.

    The mean's standard error is below 0.003; cross-fitting rather than a split costs exactness but no more than that.
    """
    rng = np.random.default_rng(7)
    rates = (0.05, 0.2)
    alarms, misses = np.empty((200, len(rates))), np.empty((200, len(rates)))
    for seed in range(200):
        fitted = calibrate(60, 60, seed)
        fresh = np.arange(400) % 2
        scores = fitted.combine_many(head_scores(fresh, rng))
        for column, rate in enumerate(rates):
            t_fake, t_real = fitted.thresholds(rate, rate)
            assert t_fake is not None
            assert t_real is not None
            alarms[seed, column] = (scores[fresh == 0] >= t_fake).mean()
            misses[seed, column] = (scores[fresh == 1] < t_real).mean()
    for mean in (alarms.mean(0), misses.mean(0)):
        assert (mean <= np.add(rates, 0.01)).all()
        assert (mean >= np.multiply(rates, 0.5)).all()


@settings(max_examples=20)
@given(st.integers(0, 10_000))
def test_novelty_p_values_are_conservative(seed: int) -> None:
    """Among fresh exchangeable similarities the share with p <= 0.1 is 0.1 up to chance."""
    rng = np.random.default_rng(seed)
    labels = np.arange(200) % 2
    nearest = rng.beta(5, 2, 200)
    names = [str(i) for i in range(200)]
    fitted = fit_calibration({}, nearest, nearest, labels, names, names)
    fresh = [fitted.novelty(similarity) for similarity in rng.beta(5, 2, 400)]
    assert np.mean([p is not None and p <= 0.1 for p in fresh]) < 0.1 + 0.12


@pytest.mark.parametrize("prevalence", [0.1, 0.5])
def test_probabilities_are_calibrated_at_prior_one_half(prevalence: float) -> None:
    rng = np.random.default_rng(11)
    n = 4000
    labels = (rng.random(n) < prevalence).astype(int)
    names = [str(i) for i in range(n)]
    fitted = fit_calibration(head_scores(labels, rng), np.ones(n), np.ones(n), labels, names, [""] * n)
    fresh = np.arange(20_000) % 2
    scores = fitted.combine_many(head_scores(fresh, rng))
    for low in (0.1, 0.4, 0.7):
        chosen = (scores >= low) & (scores < low + 0.2)
        assert fresh[chosen].mean() == pytest.approx(scores[chosen].mean(), abs=0.06)


def test_few_images_weigh_the_heads_alike_and_many_as_they_deserve() -> None:
    def weights(n: int) -> np.ndarray:
        rng = np.random.default_rng(n)
        labels = np.arange(n) % 2
        good, poor = labels + 0.3 * rng.standard_normal(n), labels + 3.0 * rng.standard_normal(n)
        x = np.column_stack([good, poor])
        weights: np.ndarray = np.array(fit_logistic(("knn", "linear"), x, labels).weights) * x.std(0)
        return weights

    few, many = weights(12), weights(20_000)
    assert few[1] > 0.3 * few[0]
    assert many[1] < 0.1 * many[0]
