"""The pictures of a report. Each function draws one figure; nothing is shown or written here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from trainer.evaluation.embedded_set import EmbeddedSet
from trainer.evaluation.metrics import auroc, roc_curve
from trainer.heads.heads import unit_length

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {"combined": "#b5b5b5", "linear": "#0072B2", "nn1": "#D55E00", "svm": "#009E73", "knn": "#CC79A7"}
"""Of the heads (Okabe and Ito's palette, told apart by colour-blind readers)."""
NAMES = {"linear": "linear", "nn1": "1-NN", "svm": "one-class SVM", "combined": "linear + SVM", "knn": "k-NN vote"}
WIDTHS = {"combined": 3.2}
"""In points, 1.4 for the others: the combination often lies under one of its heads, and is drawn first."""
CAPTIONS = {
    "roc": "ROC curves. Left the images as they are, right with both labels recompressed alike.",
    "map": "t-SNE of the embeddings; hollow where the generator trained nothing. Distances between groups mean little.",
    "generators": "Whose image is nearest, images of the same group left out. The last row is what chance would give.",
    "robustness": "AUROC after decay of both labels; the thin line is the level without. A curve that stays flat where "
    "fine detail is gone says that the model does not look at fine detail.",
    "enrolment": "Recall of an unseen generator on images that were not enrolled, with its 95 % interval, and false "
    "alarms on the real images.",
    "reliability": "Share of fakes over calibrated probability, both labels weighted alike; each point is an eighth of "
    "the images, so that with a few hundred images it scatters by a tenth and more.",
}
"""What a picture shows, in a sentence, by its name."""
MARKERS = "osv^DP*Xh<>p"
TSNE_IMAGES = 1500
"""Points of a map, at most."""
CONFUSION_IMAGES = 5000
"""Images whose nearest other image is looked for, at most."""


def figure(columns: int = 1, rows: int = 1, width: float = 4.2, height: float = 3.4) -> tuple[Figure, list[Axes]]:
    """A figure with its axes in one list; drawn without a display."""
    from matplotlib.figure import Figure

    made = Figure(figsize=(columns * width, rows * height), layout="constrained")
    axes = made.subplots(rows, columns, squeeze=False)
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
    return made, list(axes.flat)


def in_order(scores: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Heads in the order in which they are drawn."""
    return {head: scores[head] for head in COLOURS if head in scores}


def roc(panels: Mapping[str, tuple[np.ndarray, Mapping[str, np.ndarray]]]) -> Figure:
    """ROC curves of every head.

    Args:
        panels: By title: labels (n,) and scores by head, each (n,).
    """
    made, axes = figure(min(2, len(panels)), -(-len(panels) // 2))
    for ax, (title, (labels, scores)) in zip(axes, panels.items(), strict=False):
        ax.plot([0, 1], [0, 1], color="0.8", lw=1)
        for head, values in in_order(scores).items():
            ax.plot(
                *roc_curve(values, labels),
                color=COLOURS[head],
                lw=WIDTHS.get(head, 1.4),
                label=f"{NAMES[head]} {float(auroc(values, labels)):.3f}",
            )
        ax.set(title=title, xlabel="false alarms", ylabel="recall", xlim=(0, 1), ylim=(0, 1.01), aspect="equal")
        ax.legend(frameon=False, fontsize=8, loc="lower right", title="AUROC", title_fontsize=8)
    return made


def robustness(rows: Sequence[Mapping[str, Any]], plain: Sequence[Mapping[str, Any]]) -> Figure:
    """AUROC over the strength of each kind of decay; solid for the first split, dashed for the second.

    Args:
        rows: Rows with `curve` and `strength`.
        plain: The rows of the tables, for the level without decay.
    """
    curves = list(dict.fromkeys(row["curve"] for row in rows))
    splits = list(dict.fromkeys(row["split"] for row in rows))
    heads = [head for head in COLOURS if any(row["head"] == head for row in rows)]
    made, axes = figure(min(3, len(curves)), -(-len(curves) // 3), height=3.0)
    for ax in axes[len(curves) :]:
        ax.set_visible(False)
    for ax, curve in zip(axes, curves, strict=False):
        strengths = sorted({row["strength"] for row in rows if row["curve"] == curve})
        named = curve == "social network"
        for head in heads:
            for split, style in zip(splits, ("-", "--", ":", "-."), strict=False):
                points = {
                    row["strength"]: row["auroc"]
                    for row in rows
                    if (row["curve"], row["head"], row["split"], row["generator"]) == (curve, head, split, "all")
                }
                base = [
                    row["auroc"]
                    for row in plain
                    if (row["transform"], row["head"], row["split"], row["generator"]) == ("none", head, split, "all")
                ]
                x = range(1, len(strengths) + 1) if named else strengths
                y = [np.nan if (value := points.get(s)) is None else value for s in strengths]
                ax.plot(
                    x,
                    y,
                    style,
                    color=COLOURS[head],
                    marker="o",
                    ms=3,
                    lw=WIDTHS.get(head, 1.4),
                    label=f"{NAMES[head]}, {split}",
                )
                if base and base[0] is not None:
                    ax.axhline(base[0], color=COLOURS[head], ls=style, lw=0.5, alpha=0.5)
        ax.axhline(0.5, color="0.8", lw=1)
        ax.set(title=curve, ylabel="AUROC", ylim=(0.35, 1.01))
        if named:
            ax.set_xticks(
                range(1, len(strengths) + 1), ["2048 px\nq 85", "1080 px\nq 75", "640 px\nq 65", "640 px\ntwice"]
            )
        elif curve in ("jpeg quality", "crop side"):
            ax.invert_xaxis()  # towards the right it gets worse
    handles, labels = axes[0].get_legend_handles_labels()
    made.legend(
        handles, labels, frameon=False, fontsize=8, loc="outside lower center", ncols=min(len(heads), len(labels))
    )
    return made


def embedding_map(images: EmbeddedSet, unseen: frozenset[str], seed: int = 0) -> Figure:
    """t-SNE of the embeddings by cosine; reals grey, one colour a generator, hollow where it was never trained on.

    Args:
        images: Plain; a random part of more than 1,500.
        unseen: Generators that trained nothing.
        seed: Of the part and the map.
    """
    from matplotlib import colormaps
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    rng = np.random.default_rng(seed)
    images = images.take(np.sort(rng.permutation(len(images))[:TSNE_IMAGES]))
    perplexity = max(2.0, min(30.0, (len(images) - 1) / 4))
    model = TSNE(metric="cosine", init="random", perplexity=perplexity, random_state=seed)
    with threadpool_limits(1):  # its OpenMP threads wait by spinning: on a busy machine minutes for a second's work
        points = model.fit_transform(unit_length(images.embeddings))  # (n, 2)
    made, (ax,) = figure(width=7.5, height=5.5)
    names = np.array(images.generators)
    real = images.labels == 0
    ax.scatter(points[real, 0], points[real, 1], s=9, color="0.65", label="real", lw=0)
    colours = colormaps["tab10"].colors  # type: ignore[attr-defined]
    for number, name in enumerate(sorted(set(names[images.labels == 1].tolist()))):
        colour, marker = colours[number % 10], MARKERS[number % len(MARKERS)]
        face = "none" if name in unseen else colour
        label = f"{name} (unseen)" if name in unseen else name
        own = names == name
        ax.scatter(
            points[own, 0], points[own, 1], s=18, marker=marker, facecolors=face, edgecolors=colour, lw=0.9, label=label
        )
    ax.set(xticks=[], yticks=[], title="t-SNE of the embeddings (cosine)")
    ax.spines[:].set_visible(False)
    made.legend(frameon=False, fontsize=8, loc="outside right upper")
    return made


def generator_confusion(images: EmbeddedSet, seed: int = 0) -> Figure:
    """Whose image is the nearest: row = an image's own generator, column = that of its nearest other image, in %.

    Args:
        images: Plain; images of the same group are not asked. A random part of more than 5,000.
        seed: Of the part.
    """
    images = images.take(np.sort(np.random.default_rng(seed).permutation(len(images))[:CONFUSION_IMAGES]))
    names = np.array([name or "real" for name in images.generators])
    order = ["real", *sorted(set(names.tolist()) - {"real"})]
    queries = unit_length(images.embeddings)
    groups = np.array(images.groups)
    counts = np.zeros((len(order), len(order)))
    for i, query in enumerate(queries):
        similarity = np.where(groups == groups[i], -2.0, queries @ query)  # (n,)
        if similarity.max() > -2:
            counts[order.index(names[i]), order.index(names[similarity.argmax()])] += 1
    every = np.array([(names == name).sum() for name in order])
    counts = np.vstack([counts, every])  # what an image drawn at random would be
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    made, (ax,) = figure(width=2 + 0.62 * len(order), height=2.1 + 0.5 * len(order))
    ax.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for (y, x), share in np.ndenumerate(shares):
        ax.text(
            x, y, f"{100 * share:.0f}", ha="center", va="center", fontsize=8, color="white" if share > 0.6 else "0.2"
        )
    ax.set_xticks(range(len(order)), order, rotation=40, ha="right", fontsize=8)
    rows = [*order, "all images"]
    ax.set_yticks(range(len(rows)), [f"{name} ({int(n)})" for name, n in zip(rows, counts.sum(1), strict=True)])
    ax.tick_params("y", labelsize=8)
    ax.axhline(len(order) - 0.5, color="white", lw=4)
    ax.set(
        xlabel="generator of the nearest other image",
        ylabel="own generator (images)",
        title="Nearest neighbour, % of a row",
    )
    ax.spines[:].set_visible(False)
    return made


def enrolment(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Recall of each unseen generator and false alarms over the images enrolled of it."""
    heads = list(dict.fromkeys(row["head"] for row in rows))
    made, axes = figure(len(heads), width=4.6)
    generators = sorted({row["generator"] for row in rows})
    from matplotlib import colormaps

    for ax, head in zip(axes, heads, strict=True):
        for number, name in enumerate(generators):
            points = [row for row in rows if (row["head"], row["generator"]) == (head, name)]
            x = [row["enrolled"] for row in points]
            colour = colormaps["tab10"].colors[number % 10]  # type: ignore[attr-defined]
            ax.plot(x, [row["recall"] for row in points], color=colour, marker="o", ms=4, label=f"recall, {name}")
            if points[0]["recall_low"] is not None:
                low, high = ([row[f"recall{end}"] for row in points] for end in ("_low", "_high"))
                ax.fill_between(x, low, high, color=colour, alpha=0.12, lw=0)
            ax.plot(x, [row["false_alarms"] for row in points], color=colour, ls=":", label=f"false alarms, {name}")
        ax.set(title=f"{NAMES[head]}", xlabel="images enrolled", ylabel="share", ylim=(0, 1.01))
        ax.set_xticks(sorted({row["enrolled"] for row in rows}))
    handles, labels = axes[0].get_legend_handles_labels()
    made.legend(handles, labels, frameon=False, fontsize=8, loc="outside lower center", ncols=min(4, len(labels)))
    return made


def reliability(panels: Mapping[str, tuple[np.ndarray, Mapping[str, np.ndarray]]], bins: int = 8) -> Figure:
    """Share of fakes over probability at prior 0.5, equally filled bins.

    Args:
        panels: By title: labels (n,) and probabilities by head, each (n,).
        bins: Points of a curve.
    """
    made, axes = figure(min(2, len(panels)), -(-len(panels) // 2))
    for ax, (title, (labels, probabilities)) in zip(axes, panels.items(), strict=False):
        ax.plot([0, 1], [0, 1], color="0.8", lw=1)
        weights = np.where(labels == 1, 0.5 / max(1, labels.sum()), 0.5 / max(1, (labels == 0).sum()))
        for head, values in in_order(probabilities).items():
            parts = [part for part in np.array_split(np.argsort(values, kind="stable"), bins) if len(part)]
            x = [np.average(values[part], weights=weights[part]) for part in parts]
            y = [np.average(labels[part], weights=weights[part]) for part in parts]
            ax.plot(x, y, color=COLOURS[head], marker="o", ms=4, lw=WIDTHS.get(head, 1.4), label=NAMES[head])
        ax.set(
            title=title, xlabel="probability of fake", ylabel="share of fakes", xlim=(0, 1), ylim=(0, 1), aspect="equal"
        )
        ax.legend(frameon=False, fontsize=8)
    return made
