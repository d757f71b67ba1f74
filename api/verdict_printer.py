"""A verdict as people read it in a terminal, in the page's words (`page/words.js`)."""

import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product

from rich.console import Console
from rich.table import Table
from rich.text import Text

from api.judge.judgement import decide
from api.schemas.problems import FailedFile
from api.schemas.verdicts import KnnHead, Neighbour, Stability, Verdict

HEADLINES = {"fake": "Probably generated", "real": "Probably a real photograph", "uncertain": "Cannot tell"}
WORDS = {"fake": "generated", "real": "real", "uncertain": "cannot tell"}
MOST_GENERATORS = 10
"""In a summary."""
SPACE = "\N{NO-BREAK SPACE}"
COLOURS = {"fake": "red", "real": "green", "uncertain": "yellow"}


def show(verdict: Verdict, console: Console) -> None:
    """Print a verdict: a sentence, the heads side by side, and the neighbours.

    Paths, and commands in a sentence, are left whole, so that they can be copied where the output is piped.
    """
    console.print(Text(verdict.file, style="bold"), soft_wrap=True)
    console.print(Text(in_words(verdict), style=COLOURS[verdict.verdict]), soft_wrap=True)
    for note in notes(verdict):
        console.print(Text(f"  {note}"), soft_wrap=True)
    console.print(heads_table(verdict))
    if verdict.neighbours:
        console.print(neighbours_table(verdict))
    console.print()


def in_a_line(verdict: Verdict) -> str:
    """The verdict, its score, the file and what it is closest to."""
    score = "-" if verdict.score is None else decimal(verdict.score, precision([verdict.score], cuts(verdict)))
    closest = ""
    if verdict.generators and verdict.verdict != "real":
        closest = f"  ({'if generated, ' if verdict.verdict == 'uncertain' else ''}{verdict.generators[0].name})"
    return f"{verdict.verdict:<9}  {score:<8}  {verdict.file}{closest}"


@dataclass(slots=True)
class Tally:
    """How the images of one command were judged.

    Attributes:
        before: Images that an earlier run judged.
        rejected: Files that could not be.
        verdicts: Images by verdict.
        generators: Images called fake, by the generator that they are closest to.
        start: When it began, seconds of `time.monotonic`.
    """

    before: int = 0
    rejected: int = 0
    verdicts: Counter[str] = field(default_factory=Counter)
    generators: Counter[str] = field(default_factory=Counter)
    start: float = field(default_factory=time.monotonic)

    @property
    def images(self) -> int:
        """All that was looked at."""
        return self.before + self.rejected + self.verdicts.total()

    def count(self, result: Verdict | FailedFile) -> None:
        """Take a result in."""
        if isinstance(result, FailedFile):
            self.rejected += 1
            return
        self.verdicts[result.verdict] += 1
        if result.verdict == "fake":
            self.generators[result.generators[0].name if result.generators else "unknown"] += 1

    def lines(self) -> list[str]:
        """The summary."""
        if self.before == self.images:
            return [f"{self.images:,} images, all judged before; another --output judges them by the references of now"]
        counts = [f"{self.verdicts[name]:,} {words}" for name, words in WORDS.items()]
        others = {"rejected": self.rejected, "judged before": self.before}
        counts += [f"{count:,} {name}" for name, count in others.items() if count]
        seconds = time.monotonic() - self.start
        speed = (self.images - self.before) / max(seconds, 1e-3)
        lines = [f"{self.images:,} images: {', '.join(counts)}; {seconds:.1f} s, {speed:,.1f} images/s"]
        if self.generators:
            names = ", ".join(f"{name} {count:,}" for name, count in self.generators.most_common(MOST_GENERATORS))
            lines.append(f"the generated ones are closest to {names}")
        return lines


def in_words(verdict: Verdict) -> str:
    """The verdict, its score, and what they mean."""
    score = None
    if verdict.score is not None:
        known = "Judged as if it were not known: score" if verdict.known else "Score"
        score = f"{known} {decimal(verdict.score, precision([verdict.score], cuts(verdict)))} of 1."
    sentences = (f"{headline(verdict)}.", score, rarity(verdict), meaning(verdict))
    return " ".join(sentence for sentence in sentences if sentence)


def headline(verdict: Verdict) -> str:
    """The verdict in two or three words."""
    if verdict.known:
        return "Known generated image" if verdict.known.label == "fake" else "Known real image"
    return HEADLINES[verdict.verdict]


def rarity(verdict: Verdict) -> str | None:
    """What the score means: how often real photographs score like that."""
    share, images = verdict.false_alarm, verdict.calibration and verdict.calibration.real
    if verdict.score is None or share is None:
        return None
    if not images:
        return f"{percent(share)} of real photos score this high or higher."
    alike = math.floor(share * images + 0.5)
    number = f"{alike:,} ({percent(share)})" if alike else "none"
    score = "score" if alike > 1 else "scores"
    return f"Of the {images:,} real photos that Lineup was calibrated with, {number} {score} this high or higher."


def meaning(verdict: Verdict) -> str:
    """What decided: the cuts, the known file, or why there is no answer."""
    score, reason = verdict.score, verdict.reason or ""
    fake, real = verdict.thresholds.fake, verdict.thresholds.real
    if verdict.known:
        origin = "a generated image" if verdict.known.label == "fake" else "a real image"
        by = f" by {verdict.known.generator}" if verdict.known.generator else ""
        known = f"This very file is in the reference set as {origin}{by}. It did not vote for itself."
        alone = WORDS[decide(score, verdict.thresholds)]
        return known if score is None else f"{known} On its score alone Lineup would say “{alone}”."
    if verdict.image.shortfall:
        return f"{sentence(verdict.image.shortfall)} Lineup says nothing rather than guess."
    if score is None:
        return f"No score: {reason}." if reason else "No head could give a calibrated score."
    digits = precision([score], cuts(verdict))
    if verdict.verdict == "fake":
        return f"Lineup says “generated” from {decimal(fake, digits)} on."
    if verdict.verdict == "real":
        return f"Lineup says “real” below {decimal(real, digits)}."
    if fake is not None and real is not None and "between the thresholds" in reason:
        between = f"“real” below {decimal(real, digits)} and “generated” from {decimal(fake, digits)} on"
        return f"Lineup says {between}. This lies between: it says nothing rather than guess."
    return f"{sentence(reason)} Lineup says nothing rather than guess.".strip()


def notes(verdict: Verdict) -> list[str]:
    """What else is worth a line."""
    lines = []
    if verdict.known:
        lines.append(f"its bytes are reference image {verdict.known.id}")
    shares = ", ".join(f"{generator.name} {percent(generator.share)}" for generator in verdict.generators[:4])
    if verdict.generators and verdict.verdict == "fake":
        lines.append(f"closest generators: {shares}")
    elif verdict.generators and verdict.verdict == "uncertain" and verdict.score is not None:
        lines.append(f"closest generators, if it was generated: {shares}")
    if verdict.unknown_generator:
        lines.append("unlike the fakes of every known generator")
    if verdict.novelty is not None and verdict.novelty < 0.05 and not verdict.known:
        lines.append(f"unlike everything known (novelty p = {verdict.novelty:.3f})")
    if verdict.stability and verdict.score is not None:
        lines.append(endurance(verdict.stability, known=verdict.known is not None))
    if verdict.regions:
        top = max(verdict.regions, key=lambda region: region.score)
        lines.append(f"{len(verdict.regions)} regions; highest score {top.score:.3f} at {list(top.box)}")
    if verdict.provenance.c2pa:
        lines.append(f"Content Credentials: {verdict.provenance.c2pa.state}")
    if verdict.provenance.says_generated:
        lines.append("the file itself says that it was generated")
    if verdict.degraded:
        lines.append("the database is away: judged from memory, not recorded")
    return lines


def endurance(stability: Stability, *, known: bool) -> str:
    """Whether a verdict by score survives re-encoding, as far as the copies have scores.

    Args:
        stability: Of an image with a score.
        known: Whether the image is a reference: its bytes decided, which no copy has.
    """
    if stability.spread is None:
        return "no re-encoded copy holds enough to be judged"
    flips, copies = "flips" if stability.flips else "holds", list(stability.scores.values())
    less = f"; {copies.count(None)} of {len(copies)} copies hold too little to be judged" if None in copies else ""
    subject = "by its score alone the verdict" if known else "the verdict"
    return f"{subject} {flips} under re-encoding (spread of the score {stability.spread:.3f}{less})"


def heads_table(verdict: Verdict) -> Table:
    """One row per head, a dash for one that cannot answer, and the sum that their contributions make."""
    table = Table("head", "label", "score", "probability", "contribution", "what it saw")
    heads, sum_ = verdict.heads, verdict.combination
    if knn := heads.knn:
        figures = _figures(knn.score, 0.5, knn.probability, knn.contribution)
        table.add_row("knn", knn.label, *figures, _votes(knn, verdict.neighbours))
    else:
        table.add_row("knn", *"----", "needs real and fake references")
    if nn1 := heads.nn1:
        table.add_row("nn1", nn1.label, *"---", f"reference {nn1.id} at similarity {nn1.similarity:.3f}")
    else:
        table.add_row("nn1", *"----", "needs references")
    for name, head, cut in (("linear", heads.linear, 0.5), ("svm", heads.svm, 0.0)):
        if head:
            figures = _figures(head.score, cut, head.probability, head.contribution)
            table.add_row(name, head.label, *figures, "the embedding")
        else:
            table.add_row(name, *"----", "the checkpoint has none")
    if sum_ and verdict.score is not None:
        table.add_section()
        table.add_row("bias", *"---", f"{sum_.bias:+.2f}", "the calibration images")
        digits = precision([verdict.score], cuts(verdict))
        label = decide(verdict.score, verdict.thresholds)
        score, probability = decimal(verdict.score, digits), decimal(verdict.probability, digits)
        table.add_row("score", label, score, probability, f"{sum_.logit:+.2f}", "the sum, as a share of 1")
    return table


def _figures(score: float, cut: float, probability: float | None, contribution: float | None) -> list[str]:
    """A head's own score, told from its cut, its probability, told from a half, and its contribution."""
    figures = [
        "-" if value is None else decimal(value, precision([value], [other], 3))
        for value, other in ((score, cut), (probability, 0.5))
    ]
    return [*figures, "-" if contribution is None else f"{contribution:+.2f}"]


def _votes(knn: KnnHead, neighbours: Sequence[Neighbour]) -> str:
    """How many of each label are among the nearest, and what they weigh: a single one may outweigh the rest."""
    count = knn.votes.fake + knn.votes.real
    voters = neighbours[:count]
    weights = [sum(near.weight or 0 for near in voters if near.label == label) for label in ("fake", "real")]
    nearest, all_ = (f"{decimal(fake)} and {decimal(real)}" for fake, real in (weights, (knn.score, 1 - knn.score)))
    further = "" if nearest == all_ else f"; with those further down {all_}"
    return f"{knn.votes.fake} fake and {knn.votes.real} real of the {count} nearest weigh {nearest}{further}"


def neighbours_table(verdict: Verdict) -> Table:
    """The nearest references, nearest first."""
    table = Table("neighbour", "label", "generator", "source", "similarity", "weight")
    for column in table.columns[2:4]:
        column.overflow = "fold"  # a name cut short may be that of several generators
    for column in table.columns[-2:]:
        column.justify = "right"
    for near in verdict.neighbours:
        table.add_row(
            str(near.id),
            Text(near.label, style=COLOURS[near.label]),
            Text(near.generator or "-"),
            Text(near.source or "-"),
            f"{near.similarity:.3f}",
            "-" if near.weight is None else f"{near.weight:.3f}",
        )
    return table


def cuts(verdict: Verdict) -> list[float]:
    """The thresholds there are."""
    return [cut for cut in (verdict.thresholds.fake, verdict.thresholds.real) if cut is not None]


def precision(scores: Sequence[float], others: Sequence[float], least: int = 2) -> int:
    """How many digits, up to 6, tell these scores from other figures that they do not equal."""

    def apart(digits: int) -> bool:
        pairs = product(scores, others)
        return all(one == other or decimal(one, digits) != decimal(other, digits) for one, other in pairs)

    return next(filter(apart, range(least, 6)), 6)


def decimal(value: float | None, digits: int = 2) -> str:
    """A score with so many digits; one that is not quite 1 or 0 is not rounded to it."""
    if value is None:
        return "-"
    last = 10.0**-digits
    if 1 - last / 2 < value < 1:
        return f"{1 - last:.{digits}f}"
    return f"<{SPACE}{last:.{digits}f}" if 0 < value < last / 2 else f"{value:.{digits}f}"


def percent(share: float) -> str:
    """A share as per cent."""
    if 0 < share < 0.005:
        return f"<{SPACE}1{SPACE}%"
    return f">{SPACE}99{SPACE}%" if 0.995 < share < 1 else f"{math.floor(100 * share + 0.5)}{SPACE}%"


def sentence(text: str) -> str:
    """A sentence from the service's words."""
    text = text.strip()
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "!", "?", "…")) or not text else ".")
