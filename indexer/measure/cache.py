"""An evaluation kept in a file, so that the same question is not measured twice."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from hashlib import blake2b
from pathlib import Path
from typing import Any

from indexer.follower import Follower
from indexer.measure.index_evaluation import Evaluation
from indexer.settings import Settings
from trainer.data.datasets import read_dataset
from trainer.evaluation.embedded_set import Rejected
from trainer.heads.calibration import METHOD
from trainer.heads.heads import Heads
from trainer.model.embedder import Embedder
from trainer.model.seen_images import LeftOut, SeenImages


def question(
    settings: Settings, follower: Follower, embedder: Embedder, data: Path, split: str, seed: int
) -> dict[str, Any]:
    """What an evaluation's figures depend on: two equal ones have one answer.

    Of the images it takes address, size and time of the last change, not their bytes.

    Raises:
        CheckpointError: The heads are missing or broken.
        DatasetError: The data cannot be read.
    """
    images = blake2b(digest_size=16)
    for entry in read_dataset(data):
        facts = (entry.uri, entry.size, entry.mtime, entry.label, entry.generator, entry.group, entry.split)
        images.update(repr(facts).encode())
    return {
        "images": images.hexdigest(),
        "method": METHOD,
        "split": split,
        "seed": seed,
        "checkpoint": follower.checkpoint_id,
        "engine": embedder.engine,
        "heads": Heads.load(settings.checkpoint_folder).id,
        "seen": SeenImages.load(settings.checkpoint_folder).digest,
        "store": str(follower.store.id()),
        "revision": follower.revision,
        "k": settings.k,
        "max_false_alarm": settings.max_false_alarm,
        "max_miss": settings.max_miss,
    }


def kept(file: Path, asked: Mapping[str, Any]) -> Evaluation | None:
    """The answer that lies in a file; none where there is no file, or one of another question."""
    try:
        found = json.loads(file.read_text())
        if found["question"] != asked:
            return None
        answer = found["answer"]
        rejected = [Rejected(**one) for one in answer["rejected"]]
        return Evaluation(**answer | {"rejected": rejected, "left_out": LeftOut(**answer["left_out"])})
    except (OSError, ValueError, KeyError, TypeError):
        return None


def keep(file: Path, asked: Mapping[str, Any], evaluation: Evaluation) -> None:
    """Write question and answer aside, then in place of what was there."""
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_name(f"{file.name}.part")
    aside.write_text(json.dumps({"question": asked, "answer": asdict(evaluation)}))
    aside.replace(file)
