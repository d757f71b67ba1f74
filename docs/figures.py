"""Draw docs/scores.png from a running service: `python docs/figures.py LINK IMAGE...`.

LINK is what `lineup serve` printed.
"""

import sys
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import matplotlib.pyplot as plt
import numpy as np

from api.client import Client
from api.schemas.verdicts import Verdict

PAGE = Path(__file__).with_name("scores.png")


def main(link: str, *images: str) -> None:
    """How the calibration images score, where the thresholds lie between them, and where some images fall."""
    parts = urlsplit(link)
    with Client(f"{parts.scheme}://{parts.netloc}", parse_qs(parts.query).get("token", [None])[0]) as lineup:
        state = lineup.calibration()
        verdicts = [verdict for verdict in lineup.detect(*map(Path, images)) if isinstance(verdict, Verdict)]
    assert state.histogram is not None
    figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
    edges = np.linspace(0, 1, len(state.histogram.real) + 1)
    for name, counts, colour in (("real", state.histogram.real, "#2a7f62"), ("fake", state.histogram.fake, "#b5483a")):
        shares = np.array(counts) / max(1, sum(counts))
        axes.stairs(shares, edges, fill=True, alpha=0.5, color=colour, label=f"{sum(counts)} {name} calibration images")
    top = axes.get_ylim()[1]
    for name, cut in (("real below", state.thresholds.real), ("fake from", state.thresholds.fake)):
        if cut is not None:
            axes.axvline(cut, color="black", linestyle="--", linewidth=1)
            axes.annotate(f"{name} {cut:.2f}", (cut, top * 0.97), ha="center", va="top", backgroundcolor="white")
    for height, verdict in enumerate(sorted(verdicts, key=lambda one: one.score or 0), 1):
        if verdict.score is not None:
            place = (verdict.score, top * 0.13 * height)
            axes.plot(*place, marker="v", color="black")
            axes.annotate(f"  {verdict.file}: {verdict.verdict}", place, va="center", fontsize="small")
    axes.set(xlabel="score", ylabel="share of the images", xlim=(0, 1))
    axes.legend(loc="upper center", frameon=False)
    figure.savefig(PAGE, dpi=110)


if __name__ == "__main__":
    main(*sys.argv[1:])
