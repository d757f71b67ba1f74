"""How much better several windows of an image tell the labels apart than one, by the checkpoint's linear head."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from benchmarks.new_sources import TITLES, embedded
from trainer.evaluation.metrics import auroc, interval, resampled_weights
from trainer.evaluation.transforms import table_transforms
from trainer.heads.heads import Heads
from trainer.model.embedder import Embedder

COUNTS = (1, 2, 3, 5, 9)
RESAMPLES = 1000


def main(
    checkpoint: Annotated[Path, typer.Option(envvar="LINEUP_CHECKPOINT")],
    data: Annotated[Path, typer.Option(help="With splits test and unseen.")],
) -> None:
    """Print a Markdown table: AUROC in percent with 95 % bootstrap intervals over groups, by number of windows."""
    checkpoint_embedder, heads = Embedder.load(checkpoint), Heads.load(checkpoint)
    print("| windows | images | test | unseen |\n|---:|---|---:|---:|")
    for count in COUNTS:
        embedder = replace(checkpoint_embedder, preprocess=replace(checkpoint_embedder.preprocess, windows=count))
        transforms = {one.name: one for one in table_transforms(embedder.preprocess.image_size)}
        judged = embedded(embedder, data, "test,unseen", [transforms[name] for name in TITLES])
        for transform, title in TITLES.items():
            images = judged[transform]
            scores = heads.logits(images.embeddings)["linear"]
            cells = []
            for split in ("test", "unseen"):
                part = (images.labels == 0) | (np.array(images.splits) == split)
                labels, groups = images.labels[part], [images.groups[i] for i in np.flatnonzero(part)]
                weights = resampled_weights(labels, groups, RESAMPLES, np.random.default_rng(0))
                low, high = interval(auroc(scores[part], labels, weights))
                cells.append(f"{100 * auroc(scores[part], labels):.1f} ({100 * low:.0f}-{100 * high:.0f})")
            print(f"| {count} | {title} | {' | '.join(cells)} |")


if __name__ == "__main__":
    typer.run(main)
