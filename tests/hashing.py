"""An embedder without a network, for tests: the vector is drawn from a hash of the pixels.

Run as a program it is the indexer's command line with this embedder in the place of every checkpoint, and has a
command of its own: `follow`, which keeps index and snapshot up to date until it is killed.
"""

import hashlib
import os
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from PIL import Image

from trainer.images import Preprocess
from trainer.model.checkpoint import CheckpointConfig
from trainer.model.embedder import Embedder


class HashingEmbedder(Embedder):
    """Equal pixels get equal vectors, others unrelated ones; `calls` counts the images it was given."""

    def __init__(self, name: str = "hashing", dim: int = 8, image_size: int = 16) -> None:
        preprocess = Preprocess(image_size=image_size)
        super().__init__(
            id=hashlib.md5(name.encode()).hexdigest(),
            name=name,
            dim=dim,
            preprocess=preprocess,
            config=CheckpointConfig(
                name=name,
                architecture="none",
                image_size=image_size,
                dim=dim,
                preprocess=preprocess,
                architecture_args={},
                training={},
                provenance={},
                licence="none",
            ),
            engine="hashing",
            device="cpu",
            folder=Path(name),
            forward=self.embed_pixels,
        )
        self.calls, self._counting = 0, threading.Lock()

    __setattr__ = object.__setattr__  # the count changes

    @classmethod
    def load(cls, folder: Path, **_: Any) -> Self:
        return cls(folder.name)

    def embed(self, images: Sequence[Image.Image], batch_size: int = 32) -> np.ndarray:
        return self.embed_pixels(self.preprocess(images), batch_size)

    def embed_pixels(self, pixels: np.ndarray, batch_size: int = 32) -> np.ndarray:
        assert len(pixels) <= batch_size
        with self._counting:
            self.calls += len(pixels)
        time.sleep(float(os.environ.get("HASHING_SECONDS", "0")))
        vectors = []
        for image in pixels:
            seed = hashlib.blake2b(self.name.encode() + image.tobytes(), digest_size=8).digest()
            vectors.append(np.random.default_rng(int.from_bytes(seed, "big")).normal(size=self.dim))
        return np.array(vectors, np.float32)  # (n, d)


def follow() -> None:
    """What a service does beside searching, with a snapshot at every chance."""
    from indexer import follower, memory_copy
    from indexer.database.connection import connect
    from indexer.settings import Settings
    from indexer.store import Store

    follower.POLL, memory_copy.QUIET = 0.02, 0.0
    settings = Settings()
    store = Store(connect(settings))
    while not (checkpoints := store.checkpoints.list()):
        time.sleep(0.02)
    one = follower.Follower(settings, store, checkpoints[0].id, checkpoints[0].dim)
    one.load()
    one.start()
    threading.Event().wait()


if __name__ == "__main__":
    import trainer.model.embedder
    from indexer.__main__ import app
    from indexer.commands import expected_failures

    app.command()(expected_failures()(follow))
    trainer.model.embedder.Embedder = HashingEmbedder  # type: ignore[misc,assignment]
    print("ready", file=sys.stderr, flush=True)  # imports are over, a kill from here on hits something
    app()
