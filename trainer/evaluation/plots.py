"""The pictures of a report. Each function draws one figure; nothing is shown or written here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from trainer.evaluation.embedded_set import EmbeddedSet
from trainer.evaluation.metrics import auroc, roc_curve
from trainer.heads.heads import unit_length
from trainer.heads.logistic import balanced_weights

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {"combined": "#b5b5b5", "linear": "#0072B2", "nn1": "#D55E00", "svm": "#009E73", "knn": "#CC79A7"}
"""Of the heads (Okabe and Ito's palette, told apart by colour-blind readers)."""
LEGEND = {"linear": "linear", "nn1": "1-NN", "svm": "one-class SVM", "combined": "linear + SVM", "knn": "k-NN vote"}
"""Names of the heads in a picture."""
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
POINT_MARKERS = "osv^DP*Xh<>p"
TSNE_IMAGES = 1500
"""Points of a map, at most."""
CONFUSION_IMAGES = 5000
"""Images whose nearest other image is looked for, at most."""
RELIABILITY_BINS = 8
Panels = Mapping[str, tuple[np.ndarray, Mapping[str, np.ndarray]]]
"""By title: labels (n,), and scores or probabilities by head, each (n,)."""


def new_figure(columns: int = 1, rows: int = 1, width: float = 4.2, height: float = 3.4) -> tuple[Figure, list[Axes]]:
    """A figure with its axes in one list; drawn without a display."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(columns * width, rows * height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
    return figure, list(axes.flat)


def panel_figure(panels: Panels) -> tuple[Figure, list[tuple[Axes, np.ndarray, dict[str, np.ndarray]]]]:
    """A figure with a square for each panel, its diagonal drawn; of each its axes, labels and values by head, in the
    order in which heads are drawn.
    """
    figure, axes = new_figure(min(2, len(panels)), -(-len(panels) // 2))
    squares = []
    for ax, (title, (labels, values)) in zip(axes, panels.items(), strict=False):
        ax.plot([0, 1], [0, 1], color="0.8", lw=1)
        ax.set(title=title, xlim=(0, 1), aspect="equal")
        squares.append((ax, labels, {head: values[head] for head in COLOURS if head in values}))
    return figure, squares


def roc(panels: Panels) -> Figure:
    """ROC curves of every head; `panels` hold scores."""
    figure, squares = panel_figure(panels)
    for ax, labels, scores in squares:
        for head, values in scores.items():
            label = f"{LEGEND[head]} {float(auroc(values, labels)):.3f}"
            ax.plot(*roc_curve(values, labels), color=COLOURS[head], lw=WIDTHS.get(head, 1.4), label=label)
        ax.set(xlabel="false alarms", ylabel="recall", ylim=(0, 1.01))
        ax.legend(frameon=False, fontsize=8, loc="lower right", title="AUROC", title_fontsize=8)
    return figure


def reliability(panels: Panels) -> Figure:
    """Share of fakes over probability at prior 0.5, equally filled bins; `panels` hold probabilities."""
    figure, squares = panel_figure(panels)
    for ax, labels, probabilities in squares:
        weights = balanced_weights(labels)
        for head, values in probabilities.items():
            bins = [rows for rows in np.array_split(np.argsort(values, kind="stable"), RELIABILITY_BINS) if len(rows)]
            x, y = ([np.average(of[rows], weights=weights[rows]) for rows in bins] for of in (values, labels))
            ax.plot(x, y, color=COLOURS[head], marker="o", ms=4, lw=WIDTHS.get(head, 1.4), label=LEGEND[head])
        ax.set(xlabel="probability of fake", ylabel="share of fakes", ylim=(0, 1))
        ax.legend(frameon=False, fontsize=8)
    return figure


def robustness(rows: Sequence[Mapping[str, Any]], plain: Sequence[Mapping[str, Any]]) -> Figure:
    """AUROC over the strength of each kind of decay; solid for the first split, dashed for the second.

    Args:
        rows: Rows with `curve` and `strength`.
        plain: The rows of the tables, for the level without decay.
    """
    levels = {
        (row["split"], row["head"]): row["auroc"]
        for row in plain
        if (row["transform"], row["generator"]) == ("none", "all")
    }
    lines: dict[str, dict[tuple[str, str], dict[float, float]]] = {}
    for row in rows:
        if row["generator"] == "all":
            points = lines.setdefault(row["curve"], {}).setdefault((row["split"], row["head"]), {})
            points[row["strength"]] = np.nan if row["auroc"] is None else row["auroc"]
    styles = dict(zip(dict.fromkeys(row["split"] for row in rows), ("-", "--", ":", "-."), strict=False))
    heads = [head for head in COLOURS if any(row["head"] == head for row in rows)]
    figure, axes = new_figure(min(3, len(lines)), -(-len(lines) // 3), height=3.0)
    for ax in axes[len(lines) :]:
        ax.set_visible(False)
    for ax, (curve, points_by_line) in zip(axes, lines.items(), strict=False):
        for head in heads:
            for split, style in styles.items():
                points = dict(sorted(points_by_line[split, head].items()))
                look: dict[str, Any] = {"color": COLOURS[head], "ls": style}
                label = f"{LEGEND[head]}, {split}"
                ax.plot([*points], [*points.values()], marker="o", ms=3, lw=WIDTHS.get(head, 1.4), label=label, **look)
                if (level := levels.get((split, head))) is not None:
                    ax.axhline(level, lw=0.5, alpha=0.5, **look)
        ax.axhline(0.5, color="0.8", lw=1)
        ax.set(title=curve, ylabel="AUROC", ylim=(0.35, 1.01))
        if curve == "social network":
            ax.set_xticks([1, 2, 3, 4], ["2048 px\nq 85", "1080 px\nq 75", "640 px\nq 65", "640 px\ntwice"])
        elif curve in ("jpeg quality", "crop side"):
            ax.invert_xaxis()  # towards the right it gets worse
    legend_below(figure, axes[0], columns=len(heads))
    return figure


def legend_below(figure: Figure, ax: Axes, columns: int) -> None:
    """Draw the legend of one of the figure's axes below them all, in at most so many columns."""
    handles, labels = ax.get_legend_handles_labels()
    ncols = min(columns, len(labels))
    figure.legend(handles, labels, frameon=False, fontsize=8, loc="outside lower center", ncols=ncols)


def embedding_map(images: EmbeddedSet, unseen: frozenset[str]) -> Figure:
    """t-SNE of the embeddings of plain images by cosine; reals grey, one colour a generator, hollow for the unseen.

    Of more than 1,500 images it shows a random part.
    """
    from matplotlib import colormaps
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    images = images.take(np.sort(np.random.default_rng(0).permutation(len(images))[:TSNE_IMAGES]))
    perplexity = max(2.0, min(30.0, (len(images) - 1) / 4))
    model = TSNE(metric="cosine", init="random", perplexity=perplexity, random_state=0)
    with threadpool_limits(1):  # its OpenMP threads wait by spinning: on a busy machine minutes for a second's work
        points = model.fit_transform(unit_length(images.embeddings))  # (n, 2)
    figure, (ax,) = new_figure(width=7.5, height=5.5)
    names = np.array(images.generators)
    real = images.labels == 0
    x, y = points[real].T
    ax.scatter(x, y, s=9, color="0.65", label="real", lw=0)
    colours = colormaps["tab10"].colors  # type: ignore[attr-defined]
    for number, name in enumerate(sorted(set(names[images.labels == 1].tolist()))):
        colour, marker = colours[number % 10], POINT_MARKERS[number % len(POINT_MARKERS)]
        face = "none" if name in unseen else colour
        label = f"{name} (unseen)" if name in unseen else name
        x, y = points[names == name].T
        ax.scatter(x, y, s=18, marker=marker, facecolors=face, edgecolors=colour, lw=0.9, label=label)
    ax.set(xticks=[], yticks=[], title="t-SNE of the embeddings (cosine)")
    ax.spines[:].set_visible(False)
    figure.legend(frameon=False, fontsize=8, loc="outside right upper")
    return figure


def generator_confusion(images: EmbeddedSet) -> Figure:
    """Whose image is the nearest: row = an image's own generator, column = that of its nearest other image, in %.

    Images of the same group do not answer. Of more than 5,000 plain images a random part is asked.
    """
    images = images.take(np.sort(np.random.default_rng(0).permutation(len(images))[:CONFUSION_IMAGES]))
    names = np.array([name or "real" for name in images.generators])
    order = ["real", *sorted(set(names.tolist()) - {"real"})]
    queries = unit_length(images.embeddings)
    groups = np.array(images.groups)
    counts = np.zeros((len(order), len(order)))
    for i, query in enumerate(queries):
        similarity = np.where(groups == groups[i], -2.0, queries @ query)  # (n,)
        if similarity.max() > -2:
            counts[order.index(names[i]), order.index(names[similarity.argmax()])] += 1
    counts = np.vstack([counts, [(names == name).sum() for name in order]])  # what an image drawn at random would be
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    figure, (ax,) = new_figure(width=2 + 0.62 * len(order), height=2.1 + 0.5 * len(order))
    ax.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for (y, x), share in np.ndenumerate(shares):
        colour = "white" if share > 0.6 else "0.2"
        ax.text(x, y, f"{100 * share:.0f}", ha="center", va="center", fontsize=8, color=colour)
    ax.set_xticks(range(len(order)), order, rotation=40, ha="right", fontsize=8)
    rows = [*order, "all images"]
    ax.set_yticks(range(len(rows)), [f"{name} ({int(n)})" for name, n in zip(rows, counts.sum(1), strict=True)])
    ax.tick_params("y", labelsize=8)
    ax.axhline(len(order) - 0.5, color="white", lw=4)
    ax.set_title("Nearest neighbour, % of a row")
    ax.set(xlabel="generator of the nearest other image", ylabel="own generator (images)")
    ax.spines[:].set_visible(False)
    return figure


def enrolment(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Recall of each unseen generator and false alarms over the images enrolled of it."""
    from matplotlib import colormaps

    heads = list(dict.fromkeys(row["head"] for row in rows))
    figure, axes = new_figure(len(heads), width=4.6)
    generators = sorted({row["generator"] for row in rows})
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
        ax.set(title=f"{LEGEND[head]}", xlabel="images enrolled", ylabel="share", ylim=(0, 1.01))
        ax.set_xticks(sorted({row["enrolled"] for row in rows}))
    legend_below(figure, axes[0], columns=4)
    return figure
