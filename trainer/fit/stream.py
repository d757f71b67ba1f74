"""D3's shards as an endless stream of records, read in place by every node and worker (webdataset)."""

import random
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from trainer.data.entry import default_split, plain, role
from trainer.data.shards import D3_GENERATORS
from trainer.fit.batches import Origin, Sample
from trainer.fit.fit_settings import FitError
from trainer.images import UnreadableImage, decode_image
from trainer.views.views import Views

SHUFFLE = 200
"""Records held back and drawn from at random; a record of D3 has about 0.3 MB."""
MOST_USELESS = 10_000
"""Records in a row that may be of another role, or broken, before the stream gives up."""
GENERATORS = {f"gen_{number}": name for number, name in enumerate(D3_GENERATORS)}
_MEMBER = re.compile(r"(real|gen_\d+)\.(jpe?g|png|webp)")


@dataclass(slots=True)
class ShardRecords(IterableDataset[Sample]):
    """Records of the role "training", drawn with replacement of shards, without end.

    Every worker of every process draws shards by its own seed, so there may be fewer shards than workers. What worker
    w of process r yields in epoch e follows from (seed, e, r, w).
    """

    paths: list[Path]
    views: Views
    seed: int
    split: str = "train"
    rank: int = 0
    epoch: int = 0

    def __iter__(self) -> Iterator[Sample]:
        import webdataset as wds
        from webdataset.tariterators import group_by_keys, tar_file_expander

        worker = get_worker_info()
        rng = np.random.default_rng((self.seed, self.epoch, self.rank, worker.id if worker else 0))
        shard_seed, order_seed = (int(value) for value in rng.integers(2**31, size=2))
        unreadable: list[str] = []

        def note(error: Exception) -> bool:
            unreadable.append(f"{error.args[-1] if error.args else 'a shard'}\t{type(error).__name__}: {error}")
            return True  # go on with the next shard

        def opened(shards: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
            for shard in shards:
                try:
                    with Path(shard["url"]).open("rb") as stream:  # closed also where the stream is left half-way
                        yield shard | {"stream": stream}
                except OSError as error:
                    note(OSError(str(error), shard["url"]))

        urls = [str(path) for path in self.paths]
        shards = wds.ResampledShards(urls, seed=0, worker_seed=lambda: shard_seed, deterministic=True)
        members = tar_file_expander(opened(shards), handler=note, select_files=is_image_member)
        shuffle = wds.shuffle(SHUFFLE, rng=random.Random(order_seed))
        records = shuffle(group_by_keys(members, handler=note))
        useless = 0
        for record in records:
            sample = self.make(record, rng, unreadable) if self.trains(record["__key__"]) else None
            useless = 0 if sample else useless + 1
            if sample:
                yield sample
                unreadable.clear()
            if useless == MOST_USELESS:
                raise FitError(
                    f"{useless} records in a row of {self.paths[0]} were not usable, lastly {unreadable[-1:]}"
                )

    def trains(self, group: str) -> bool:
        """Whether a record trains: its role, and its split."""
        splits = {part.strip() for part in self.split.split(",")}
        return role(group) == "training" and default_split(group) in splits

    def make(self, record: Mapping[str, Any], rng: np.random.Generator, unreadable: list[str]) -> Sample | None:
        """The views of a record with one of its fakes drawn at random, or None where an image is missing or broken."""
        fakes = [key for key in sorted(record) if key.startswith("gen_")]
        reals = [key for key in record if key.startswith("real.")]
        if not fakes or not reals:
            return None
        decoded, origins = [], []
        for key in (reals[0], fakes[int(rng.integers(len(fakes)))]):
            try:
                image, facts = decode_image(record[key])
            except UnreadableImage as error:
                unreadable.append(f"{record['__url__']}#{record['__key__']}.{key}\t{error}")
                return None
            decoded.append((np.asarray(image), np.asarray(self.views.preprocess.crop(image))))
            generator = "" if key in reals else GENERATORS.get(key.partition(".")[0], key)
            origins.append(Origin(facts.sha256, plain(record["__key__"]), generator))
        return *self.views.record(decoded[0], decoded[1], rng), unreadable.copy(), origins


def is_image_member(name: str) -> bool:
    """Whether a member of a shard is the real or a generated image of its record."""
    return bool(_MEMBER.fullmatch(name.rpartition("/")[2].partition(".")[2].lower()))
