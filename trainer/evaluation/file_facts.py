"""How far a label can be told without looking: a classifier on facts of the file alone, printed beside ours.

Where it does well, format, size or compression differ between real and fake images of the data set, and any detector
may have learned that instead of a generator's trace.
"""

from collections.abc import Sequence

import numpy as np

from trainer.images import FORMATS, FileFacts

FOREST_FOLDS = 5


def fact_table(facts: Sequence[FileFacts]) -> np.ndarray:
    """Numbers of each file, shape (n, 5 + formats), float64: logs of sides, bytes and bits per pixel, JPEG quality."""
    rows = [
        [
            np.log(fact.width),
            np.log(fact.height),
            np.log(fact.bytes),
            np.log(8 * fact.bytes / (fact.width * fact.height)),
            fact.jpeg_quality if fact.jpeg_quality is not None else -1,
            *(fact.format == name for name in FORMATS),
        ]
        for fact in facts
    ]
    return np.array(rows, np.float64).reshape(len(rows), 5 + len(FORMATS))


def file_fact_scores(facts: Sequence[FileFacts], labels: np.ndarray, groups: Sequence[str]) -> np.ndarray:
    """Probability of fake by a random forest on the facts alone, shape (n,); NaN where a label has too few groups.

    Each of n images, of labels (n,), is judged by a forest that has not seen its group, on the evaluated images
    themselves: the most that facts could tell here.
    """
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.model_selection import StratifiedGroupKFold

    scores = np.full(len(labels), np.nan)
    if (
        min(len({group for group, of in zip(groups, labels, strict=True) if of == label}) for label in (0, 1))
        < FOREST_FOLDS
    ):
        return scores
    table = fact_table(facts)
    folds = StratifiedGroupKFold(FOREST_FOLDS, shuffle=True, random_state=0)
    for inside, outside in folds.split(table, labels, groups):
        forest = RandomForestClassifier(100, min_samples_leaf=3, class_weight="balanced", random_state=0)
        scores[outside] = forest.fit(table[inside], labels[inside]).predict_proba(table[outside])[:, 1]
    return scores
