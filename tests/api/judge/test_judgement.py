"""Decisions at their boundaries, and how a verdict fares under re-encoding."""

import io
import json
import logging
import sys

import numpy as np
import pytest
from rich.console import Console
from rich.table import Table

from api.http.server import JsonFormatter
from api.judge.judgement import clip, decide, none_if_nan, stability
from api.schemas.verdicts import EXAMPLE_VERDICT, Decision, Thresholds, Verdict
from api.verdict_log import changes
from api.verdict_printer import heads_table, in_a_line, in_words, neighbours_table, notes, precision


@pytest.mark.parametrize(
    ("score", "fake", "real", "verdict"),
    [
        (0.7, 0.7, 0.2, "fake"),
        (0.6999, 0.7, 0.2, "uncertain"),
        (0.2, 0.7, 0.2, "uncertain"),
        (0.1999, 0.7, 0.2, "real"),
        (0.5, 0.4, 0.6, "fake"),  # thresholds that overlap: fake comes first
        (0.99, None, 0.2, "uncertain"),
        (0.01, 0.7, None, "uncertain"),
        (None, 0.7, 0.2, "uncertain"),
    ],
)
def test_the_decision(score: float | None, fake: float | None, real: float | None, verdict: Decision) -> None:
    assert decide(score, Thresholds(fake=fake, real=real)) == verdict


def example(**changed: object) -> Verdict:
    return Verdict.model_validate(EXAMPLE_VERDICT | changed)


def test_stability_counts_the_unchanged_image_and_leaves_out_what_has_no_score() -> None:
    held = stability({"a": 0.9, "b": 0.8, "c": None, "d": np.nan}, example())
    assert (held.scores, held.flips) == ({"a": 0.9, "b": 0.8, "c": None, "d": None}, False)
    assert held.spread == pytest.approx(0.17)
    assert stability({"a": 0.3, "b": None}, example()).flips
    nothing = {"a": None, "b": np.nan}
    for verdict in (example(), example(score=None, verdict="uncertain")):
        assert (stability(nothing, verdict).spread, stability(nothing, verdict).flips) == (None, False)


def test_numbers_for_json() -> None:
    assert none_if_nan(np.nan) is None
    assert none_if_nan(float(np.float32(0.5))) == 0.5
    assert (clip(1.0000001), clip(-1e-9), clip(0.25)) == (1.0, 0.0, 0.25)


def test_changes_name_what_differs_and_forgive_rounding() -> None:
    before = example().model_dump(mode="json")
    after = example(score=0.97 * (1 + 1e-9), novelty=0.1, index={"revision": 4712, "size": 50000})
    assert [(item.field, item.before, item.after) for item in changes(before, after)] == [
        ("novelty", 0.42, 0.1),
        ("index.revision", 4711, 4712),
    ]
    gone = example(heads=EXAMPLE_VERDICT["heads"] | {"knn": None}, generators=[])
    assert {item.field for item in changes(before, gone)} == {"heads.knn.score", "heads.knn.label", "generators.0.name"}


def test_words_for_people() -> None:
    assert in_words(example()) == (
        "Probably generated. Score 0.97 of 1. Of the 1,000 real photos that Lineup was calibrated with, "
        "4 (<\N{NO-BREAK SPACE}1\N{NO-BREAK SPACE}%) score this high or higher. Lineup says “generated” from 0.71 on."
    )
    for share, number in ((0.0, "none"), (0.001, "1 (<\N{NO-BREAK SPACE}1\N{NO-BREAK SPACE}%)")):
        assert f"with, {number} scores this high or higher." in in_words(example(false_alarm=share))
    unsure = example(verdict="uncertain", score=None, false_alarm=None, reason="nothing is calibrated")
    assert in_words(unsure) == "Cannot tell. No score: nothing is calibrated."
    known = example(verdict="real", basis="known", known={"id": 7, "label": "real", "generator": None})
    assert in_words(known).startswith("Known real image. Judged as if it were not known: score 0.97 of 1.")
    assert in_words(known).endswith("On its score alone Lineup would say “generated”.")
    assert notes(known)[0] == "its bytes are reference image 7"
    unsure = example(verdict="uncertain")
    assert notes(unsure)[0].startswith("closest generators, if it was generated: SD-XL 70")
    assert notes(example(verdict="real")) == []
    odd = example(novelty=0.01, unknown_generator=True, degraded=True, provenance={"says_generated": True})
    assert notes(odd) == [
        "closest generators: SD-XL 70\N{NO-BREAK SPACE}%, DF-IF 30\N{NO-BREAK SPACE}%",
        "unlike the fakes of every known generator",
        "unlike everything known (novelty p = 0.010)",
        "the file itself says that it was generated",
        "the database is away: judged from memory, not recorded",
    ]


@pytest.mark.parametrize(
    ("verdict", "closest"), [("fake", "  (SD-XL)"), ("uncertain", "  (if generated, SD-XL)"), ("real", "")]
)
def test_a_line_names_the_closest_generator_of_what_may_be_generated(verdict: str, closest: str) -> None:
    image = example(verdict=verdict)
    assert in_a_line(image) == f"{verdict:<9}  0.97      {image.file}{closest}"


def test_the_terminal_says_which_copies_hold_too_little() -> None:
    def said(*scores: float | None, **changed: object) -> list[str]:
        verdict = example(**changed)
        verdict.stability = stability({str(number): score for number, score in enumerate(scores)}, verdict)
        return [note for note in notes(verdict) if "re-encod" in note]

    assert said(0.9, 0.8) == ["the verdict holds under re-encoding (spread of the score 0.170)"]
    less = "the verdict flips under re-encoding (spread of the score 0.470; 1 of 2 copies hold too little to be judged)"
    assert said(0.5, None) == [less]
    known = {"id": 7, "label": "fake", "generator": None}
    by_score = ["by its score alone the verdict flips under re-encoding (spread of the score 0.470)"]
    assert said(0.5, basis="known", known=known) == by_score
    assert said(None, None) == ["no re-encoded copy holds enough to be judged"]
    assert said(None, score=None, verdict="uncertain") == []


def test_figures_near_a_cut_get_the_digits_that_tell_them_apart() -> None:
    near = example(verdict="uncertain", score=0.8478, thresholds={"fake": 0.8479, "real": 0.14})
    near.reason = "the score lies between the thresholds"
    assert "Score 0.8478 of 1." in in_words(near)
    assert "“real” below 0.1400 and “generated” from 0.8479 on" in in_words(near)
    assert precision([0.5], [0.9]) == 2
    assert precision([0.9999], [0.995]) == 3  # neither is rounded to 1
    assert precision([0.3], [0.3, 0.30000000001]) == 6  # at most
    assert precision([0.7], [0.7]) == 2  # a score that is the cut


def text_of(table: Table, width: int = 200) -> str:
    written = io.StringIO()
    Console(file=written, width=width).print(table)
    return written.getvalue()


def test_the_terminal_shows_what_made_the_score() -> None:
    near = EXAMPLE_VERDICT["neighbours"][0]
    neighbours = [near | {"weight": 0.05}] * 9 + [near | {"label": "real", "generator": None, "weight": 0.5}]
    heads = EXAMPLE_VERDICT["heads"] | {"knn": EXAMPLE_VERDICT["heads"]["knn"] | {"score": 0.5}}
    told = text_of(heads_table(example(neighbours=neighbours, heads=heads)))
    assert "9 fake and 1 real of the 10 nearest weigh 0.45 and 0.50; with those further down 0.50 and 0.50" in told
    for head, adds in (("knn", "+1.20"), ("linear", "+2.10"), ("svm", "+0.70"), ("bias", "-0.50"), ("score", "+3.50")):
        assert adds in next(line for line in told.splitlines() if line.startswith(f"│ {head}"))


def test_a_narrow_terminal_shows_whole_names_of_generators() -> None:
    near = EXAMPLE_VERDICT["neighbours"][0]
    names = [f"stable-diffusion-1.5-finetune-{letter}" for letter in "ab"]
    told = text_of(neighbours_table(example(neighbours=[near | {"generator": name} for name in names])), width=60)
    column = [line.split("│")[3].strip() for line in told.splitlines() if "│" in line]
    assert "".join(column) == "".join(names)


def test_a_log_line_is_one_json_object_with_its_extras() -> None:
    try:
        raise ValueError("broken")
    except ValueError:
        record = logging.LogRecord("x", logging.ERROR, __file__, 1, "it %s", ("failed",), sys.exc_info())
    record.status = 500
    line = JsonFormatter().format(record)
    assert "\n" not in line
    shown = json.loads(line)
    assert (shown["level"], shown["logger"], shown["message"], shown["status"]) == ("error", "x", "it failed", 500)
    assert "ValueError: broken" in shown["error"]
