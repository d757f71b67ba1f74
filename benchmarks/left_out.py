"""How well a logistic regression on a checkpoint's embeddings tells sources and generators that its fit left out.

Both are left out of the images of one split, `train` say, so that a regularisation or a recipe can be chosen without a
look at `test` and `unseen`.
"""

from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold, cross_val_score

from benchmarks.new_sources import TITLES, embedded
from trainer.evaluation.transforms import table_transforms
from trainer.heads.heads import WEAKER
from trainer.model.embedder import Embedder

DRAWS, FOLDS = 4, 3


def main(
    checkpoint: Annotated[Path, typer.Option(envvar="LINEUP_CHECKPOINT")],
    data: Annotated[Path, typer.Option(help="With sources and generators.")],
    split: Annotated[str, typer.Option(help="Whose images are left out in turn.")] = "train",
) -> None:
    """Print a Markdown table: mean AUROC in percent of the folds of several draws, by regularisation."""
    embedder = Embedder.load(checkpoint)
    transforms = {one.name: one for one in table_transforms(embedder.preprocess.image_size)}
    judged = embedded(embedder, data, split, [transforms[name] for name in TITLES])
    print("| C | images | groups left out | sources and generators left out |\n|---:|---|---:|---:|")
    for c in WEAKER:
        for transform, title in TITLES.items():
            images = judged[transform]
            x = images.embeddings.astype(np.float64)
            logistic = LogisticRegression(C=c, class_weight="balanced", solver="newton-cholesky")
            cells = []
            for names in (images.groups, images.calibration_set().origins):
                draws = [StratifiedGroupKFold(FOLDS, shuffle=True, random_state=seed) for seed in range(DRAWS)]
                options = {"groups": np.array(names), "scoring": "roc_auc"}
                scores = [cross_val_score(logistic, x, images.labels, cv=draw, **options) for draw in draws]
                cells.append(f"{100 * np.mean(scores):.1f}")
            print(f"| {c:g} | {title} | {' | '.join(cells)} |")


if __name__ == "__main__":
    typer.run(main)
