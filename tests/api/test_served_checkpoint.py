"""One checkpoint at work for many uploads."""

import asyncio
import io
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import numpy as np
import pytest
from PIL import Image

from api.admission import Admission
from api.judge.detector import Detector
from api.judge.uploads import Upload, prepare
from api.monitoring import Metrics
from api.served_checkpoint import CAPACITY, CAPACITY_PER_WINDOW, Serving
from api.service_settings import ServiceSettings
from trainer.model.embedder import Embedder


class Unindexed:
    """Stands for a detector of which nothing but the embedding is asked."""

    def __init__(self, embedder: Embedder) -> None:
        self.embedder, self.settings = embedder, ServiceSettings()

    def prepare(self, upload: Upload, question: Any) -> Any:
        return prepare(upload, question, self.embedder.preprocess, self.settings)

    def answer(self, cases: Any) -> Any:
        raise AssertionError("nothing is judged here")

    def start(self) -> None: ...

    stop = start


def test_every_window_counts_in_the_queue_and_an_upload_is_embedded_as_everywhere(
    windowed: Embedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 70, 3), dtype=np.uint8))
    file, weights = io.BytesIO(), []
    image.save(file, "PNG")
    with ThreadPoolExecutor(1) as decoders:
        serving = Serving(cast(Detector, Unindexed(windowed)), decoders, Admission(1, 9, "images"), Metrics())
        submit = serving.embedding.submit

        def weighed(item: Any, weight: int = 1) -> Any:
            weights.append(weight)
            return submit(item, weight)

        monkeypatch.setattr(serving.embedding, "submit", weighed)
        case = asyncio.run(serving.embed(Upload("a.png", file.getvalue())))
        serving.stop()
    assert weights == [5]
    assert serving.embedding._capacity == CAPACITY + 4 * CAPACITY_PER_WINDOW
    assert case.prepared.views == []  # a case that waits to be judged holds no pixels
    np.testing.assert_allclose(case.embeddings, windowed.embed([image]), atol=1e-5)
