"""What a finished training run writes: weights, heads, calibration images, metrics and a model card, in one folder."""

import shutil
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from trainer.data.entry import Entry, role
from trainer.data.manifest import GITHUB
from trainer.evaluation.embedded_set import EmbeddedSet, embed_entries
from trainer.fit.fit_heads import PLAIN, VIEWS, embed_for_heads, spread, write_heads
from trainer.fit.image_roles import Roles
from trainer.fit.run import Run
from trainer.fit.state import SUMMARY_FILE, EpochSummary, state_folder, write_table
from trainer.heads.calibration_set import CALIBRATION_IMAGES
from trainer.heads.heads import Heads, LinearHead
from trainer.images import FileFacts
from trainer.model.checkpoint import CheckpointConfig, save_checkpoint
from trainer.model.embedder import Embedder
from trainer.model.model_card import write_card, write_metrics
from trainer.model.seen_images import SeenImages


def write_checkpoint(run: Run, config: CheckpointConfig, roles: Roles, deadline: float) -> dict[str, Any]:
    """Write the checkpoint folder: aside first, then renamed, so that no half-made checkpoint is ever seen.

    Args:
        run: What was trained; the folder that its settings name is replaced when it is there, its state removed.
        config: What rebuilds the backbone.
        roles: Pictures by role: training, calibration, validation.
        deadline: On the clock `time.monotonic()`; the heads get fewer views where it comes near.

    Returns:
        The metrics.
    """
    folder = run.settings.output
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside, old = (folder.with_name(f".{folder.name}.{age}") for age in ("new", "old"))
    for leftover in (aside, old):  # of a run that was killed here
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        metrics = _fill(aside, run, config, roles, deadline)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)  # of a full disk above all
        raise
    if folder.exists():
        folder.replace(old)
    aside.replace(folder)
    for leftover in (old, state_folder(folder)):
        shutil.rmtree(leftover, ignore_errors=True)
    return metrics


def _fill(folder: Path, run: Run, config: CheckpointConfig, roles: Roles, deadline: float) -> dict[str, Any]:
    """What `write_checkpoint` does, but in this folder."""
    settings, state, weights = run.settings, run.state, run.weights()
    backbone = {key.removeprefix("backbone."): value for key, value in weights.items() if key.startswith("backbone.")}
    save_checkpoint(folder, backbone, config, half=settings.half)
    embedder = Embedder.load(folder, device=run.device)

    def decode(entry: Entry) -> tuple[Image.Image, FileFacts]:
        decoded = roles[role(entry.group)].read(entry)
        return Image.fromarray(decoded.image), decoded.facts

    training, calibration, _ = embed_for_heads(
        embedder,
        [*roles["training"].entries, *roles["calibration"].entries],
        images=settings.head_images,
        views=max(1, min(VIEWS, settings.head_images // len(roles["training"]))),
        seed=settings.seed,
        decode=decode,
        deadline=deadline,
    )
    classifier = None
    if "classifier.weight" in weights and settings.windows == 1:  # it knows no embeddings of several windows
        weight, bias = weights["classifier.weight"].cpu(), weights["classifier.bias"].cpu()
        classifier = LinearHead(weight[0].double().numpy(), float(bias[0]))
    generators = {entry.generator or "" for entry in roles["training"].entries}
    heads = write_heads(folder, training, calibration, seed=settings.seed, generators=generators, classifier=classifier)
    judged = spread(roles["validation"].entries, {("validation", label): CALIBRATION_IMAGES // 2 for label in (0, 1)})
    sets, _ = embed_entries(embedder, [(entry, [PLAIN]) for entry in judged], seed=settings.seed, decode=decode)
    validation = sets.get(PLAIN.name)
    unreadable = dict(run.unreadable)  # complete only now: a file may go while the heads are fitted
    for pictures in roles.values():
        unreadable |= pictures.unreadable
    metrics = {
        "checkpoint": embedder.id,
        "heads": heads.id,
        "images": {
            name: dict(sorted(Counter(entry.generator or "real" for entry in pictures.entries).items()))
            for name, pictures in roles.items()
        },
        "sources": sources(entry for pictures in roles.values() for entry in pictures.entries),
        "validation": head_quality(heads, validation.embeddings, validation.labels) if validation else {},
        "validation_groups": linear_quality(heads, validation) if validation else [],
        "training": {"updates": state.updates, "epochs": state.epoch, "seconds": round(state.seconds, 1)},
        "unreadable": len(unreadable),
    }
    SeenImages.joined([run.seen, *(pictures.seen for pictures in roles.values())]).save(folder)
    write_table(folder / SUMMARY_FILE, list(EpochSummary.__dataclass_fields__), state.history)
    if unreadable:
        rows = [{"uri": uri, "reason": reason} for uri, reason in sorted(unreadable.items())]
        write_table(folder / "unreadable.csv", ["uri", "reason"], rows)
    write_metrics(folder, metrics)
    write_card(folder)
    return metrics


def head_quality(heads: Heads, embeddings: np.ndarray, labels: np.ndarray) -> dict[str, dict[str, float]]:
    """Balanced accuracy and AUROC of each head; empty without both labels.

    Args:
        heads: What is measured.
        embeddings: Raw, shape (n, d).
        labels: 0 real, 1 fake, shape (n,).
    """
    from sklearn.metrics import balanced_accuracy_score, roc_auc_score

    if len(set(labels.tolist())) < 2:
        return {}
    scores = heads.logits(embeddings) | ({"nn1": heads.nearest.margin(embeddings)} if heads.nearest else {})
    return {
        name: {
            "accuracy": float(balanced_accuracy_score(labels, score > 0)),
            "auroc": float(roc_auc_score(labels, score)),
        }
        for name, score in scores.items()
    }


def linear_quality(heads: Heads, images: EmbeddedSet) -> list[dict[str, Any]]:
    """How well the linear head judges each generator and each source.

    Returns:
        {"generator", "source", "images", "accuracy", "auroc"}, one of the first two and the last null; the AUROC of a
        generator is against all real images.
    """
    from sklearn.metrics import roc_auc_score

    logit, labels = heads.linear.logit(images.embeddings), images.labels
    right = (logit > 0) == (labels == 1)
    generators, source_names = np.array(images.generators), np.array(images.sources)
    rows: list[dict[str, Any]] = []
    for name in sorted({*images.generators} - {""}):
        mask, pair = generators == name, (generators == name) | (labels == 0)
        area = float(roc_auc_score(labels[pair], logit[pair])) if (labels == 0).any() else None
        rows.append({"generator": name, "source": None, "auroc": area} | _share(right[mask]))
    return rows + [
        {"generator": None, "source": name, "auroc": None} | _share(right[source_names == name])
        for name in sorted({*images.sources})
    ]


def _share(right: np.ndarray) -> dict[str, Any]:
    return {"images": len(right), "accuracy": float(right.mean())}


def sources(entries: Iterable[Entry]) -> list[dict[str, Any]]:
    """What the data set says of each source: {"source", "real", "fake", "repositories", "licences"}, by name."""
    rows: dict[str, dict[str, Any]] = {}
    for entry in entries:
        row = rows.setdefault(entry.source, {"real": 0, "fake": 0, "repositories": set(), "licences": set()})
        row["fake" if entry.label else "real"] += 1
        if entry.public_uri and entry.public_uri.startswith(GITHUB):
            row["repositories"].add("/".join(entry.public_uri.removeprefix(GITHUB).split("/")[:2]))
        row["licences"] |= {entry.attributes[name] for name in ("licence", "license") if name in entry.attributes}
    texts = ("repositories", "licences")
    return [{"source": name} | row | {key: sorted(row[key]) for key in texts} for name, row in sorted(rows.items())]
