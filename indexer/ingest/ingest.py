"""From the entries of a data set to rows: skip what is known, decode, embed, write, all at the same time."""

import hashlib
import math
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from operator import itemgetter
from typing import Any, TypeVar

import numpy as np

from indexer.database.transactions import TRANSACTION_IMAGES
from indexer.ingest.decoded import decode, decode_thumbnail
from indexer.ingest.prefetch import map_batches, prefetch
from indexer.store import Store
from indexer.store.reference_facts import LABEL_NAMES, NewReference, kind
from indexer.store.references import Known
from trainer.cores import usable_cores
from trainer.data.entry import Entry
from trainer.images import UnreadableImage, decoding_memory
from trainer.model.embedder import Embedder
from trainer.process_pool import DeadlinePassed, LimitExceeded, decoding_pool

T = TypeVar("T")

WRITE_IMAGES = 256
WRITE_SECONDS = 2.0
BULK_IMAGES = TRANSACTION_IMAGES
BULK_SECONDS = 30.0
"""Many workers write seldom and much: each waits for the others' turns with the revision."""
FORGOTTEN = "was removed with --forget"

File = tuple[Entry, bytes, str]  # with its hash
Embedded = tuple[Entry, NewReference]


@dataclass(slots=True)
class Report:
    """What `lineup index add` did. Integers count images.

    Attributes:
        images: Entries that were read.
        added: New rows.
        known: Rows that were there, with their embedding.
        embedded: Rows that were there and got their embedding for this checkpoint.
        conflicts: {"file", "sha256", "has", "wants"}: same bytes, other label or generator; nothing was changed.
        rejected: {"file", "reason"}.
        generators: New rows by generator, "real" for real images.
        sources: New rows by source, where that is known.
        revision: Of the checkpoint's index, at the end.
        enrolment: Its id, null when nothing was written.
        seconds: From start to end.
    """

    images: int = 0
    added: int = 0
    known: int = 0
    embedded: int = 0
    conflicts: list[dict[str, str]] = field(default_factory=list)
    rejected: list[dict[str, str]] = field(default_factory=list)
    generators: dict[str, int] = field(default_factory=dict)
    sources: dict[str, int] = field(default_factory=dict)
    revision: int = 0
    enrolment: int | None = None
    seconds: float = 0.0

    def reject(self, file: str, reason: str) -> None:
        """Note a file that is skipped."""
        self.rejected.append({"file": file, "reason": reason})

    def conflict(self, file: str, sha256: str, has: str, wants: str) -> None:
        """Note bytes that stay as they are."""
        self.conflicts.append({"file": file, "sha256": sha256, "has": has, "wants": wants})

    def count_new(self, entry: Entry) -> None:
        """Note a new row."""
        self.added += 1
        name = entry.generator or LABEL_NAMES[entry.label]
        self.generators[name] = self.generators.get(name, 0) + 1
        if entry.source:
            self.sources[entry.source] = self.sources.get(entry.source, 0) + 1


@dataclass(frozen=True, slots=True)
class Prepared:
    """An entry that was read: its row, still without a vector, and its windows, shape (w, 3, s, s), uint8."""

    entry: Entry
    reference: NewReference
    windows: np.ndarray


def ingest(
    entries: Iterable[Entry],
    embedder: Embedder,
    store: Store,
    *,
    max_pixels: int = 50_000_000,
    image_seconds: float = 20.0,
    deadline: float = math.inf,
    generator: str | None = None,
    source: str | None = None,
    enrolment: int | None = None,
    dry_run: bool = False,
    keep_bytes: bool = False,
    while_active: bool = False,
    batch_size: int = 32,
    on_image: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Add every entry that is not known yet; safe to end at any point and to run again.

    Files known by uri, size and time are not opened; bytes known by their hash are not decoded, unless their row lacks
    the thumbnail. An image with a public uri is stored with that one, so that its file is read again each time.

    Args:
        entries: Images to add; read, decoded and embedded a bounded number ahead.
        embedder: The checkpoint; it becomes known to the store (and active, if it is the first).
        store: Where to.
        max_pixels: Larger images are rejected.
        image_seconds: Images that take longer to decode are rejected.
        deadline: When nobody waits any more, by `time.monotonic`.
        generator: Written on the enrolment; the entries carry their own.
        source: Written on the enrolment too.
        enrolment: One that other workers fill too, in large transactions; whoever opened it finishes it. By default one
            is opened when something is to be written.
        dry_run: Read and decode, but embed and write nothing; `added` is what would be added.
        keep_bytes: Keep the files themselves and no uri (uploads), also those of rows that can be read nowhere.
        while_active: Add nothing once another checkpoint is the active one.
        batch_size: Images per forward pass.
        on_image: Called once for each entry that is done, from several threads.

    Returns:
        `Report` as a dict, which is what `lineup index add --json` prints.

    Raises:
        DeadlinePassed: Nobody waits any more; it names the enrolment of what was added by then, which is reported.
        CheckpointSwitched: Another checkpoint is the active one, though `while_active`; what was added has been
            embedded with that one too.
        BlobsAway: Pictures are to be kept in object storage, which cannot be used; what was added before stays.
    """
    start = time.monotonic()
    workers = min(32, usable_cores())
    if not dry_run:
        store.blobs.claim()
        register(embedder, store)
    try:
        with ThreadPoolExecutor(workers, thread_name_prefix="decode") as pool:
            run = _Ingestion(
                embedder=embedder,
                store=store,
                pool=pool,
                chunk=16 * workers,
                max_pixels=max_pixels,
                image_seconds=image_seconds,
                deadline=deadline,
                keep_bytes=keep_bytes,
                generator=generator,
                source=source,
                enrolment=enrolment,
                write_images=WRITE_IMAGES if enrolment is None else BULK_IMAGES,
                write_seconds=WRITE_SECONDS if enrolment is None else BULK_SECONDS,
                while_active=while_active,
                dry_run=dry_run,
                on_image=on_image,
            )
            prepared = prefetch(run.prepare(entries), 2 * batch_size)
            if dry_run:
                run.count(prepared)
            else:
                with closing(prefetch(run.embed(prepared, batch_size), 4)) as embedded:
                    run.write(embedded)
                run.report.revision = store.checkpoints.revision(embedder.id)
    except DeadlinePassed as error:
        if run.report.enrolment is None:
            raise
        report = run.finish(start)
        detail = f"{error}; {report.added} images were added before, as enrolment {report.enrolment}"
        raise DeadlinePassed(detail) from error
    return asdict(run.finish(start))


@dataclass(slots=True, kw_only=True)
class _Ingestion:
    """The stages of one call, each in a thread of its own: `prepare`, then `embed` and `write`, or `count`.

    `prepare` counts in `images` and `known` and not in the report, whose numbers `write` changes meanwhile.
    """

    embedder: Embedder
    store: Store
    pool: Executor
    chunk: int
    max_pixels: int
    image_seconds: float
    deadline: float
    keep_bytes: bool
    generator: str | None
    source: str | None
    enrolment: int | None
    write_images: int
    write_seconds: float
    while_active: bool
    dry_run: bool
    on_image: Callable[[], None]
    report: Report = field(default_factory=Report)
    images: int = 0
    known: int = 0

    def prepare(self, entries: Iterable[Entry]) -> Generator[Prepared, None, None]:
        rest = iter(entries)
        while chunk := list(islice(rest, self.chunk)):
            self.images += len(chunk)
            unknown = list(self._without_known_files(chunk))
            files = [file for file in self.pool.map(self._read, unknown) if file is not None]
            new_files = list(self._without_known_hashes(files))
            yield from (prepared for prepared in self.pool.map(self._decode, new_files) if prepared is not None)

    def _without_known_files(self, chunk: Sequence[Entry]) -> Iterator[Entry]:
        """Leave out entries whose own uri, size and time are a row's; a public uri may be that of several images."""
        known = self.store.references.known_files([entry.uri for entry in chunk if entry.uri], self.embedder.id)
        for entry in chunk:
            if not self._is_settled(entry, known.get((entry.uri, entry.size, entry.mtime))):
                yield entry

    def _without_known_hashes(self, files: Sequence[File]) -> Iterator[File]:
        hashes = [sha256 for _, _, sha256 in files]
        known = self.store.references.known_hashes(hashes, self.embedder.id)
        blocked = self.store.references.blocked_hashes(hashes)
        for entry, data, sha256 in files:
            if sha256 in blocked:
                self._reject(entry, UnreadableImage(FORGOTTEN))
            elif not self._is_settled(entry, known.get(sha256), data):
                yield entry, data, sha256

    def _is_settled(self, entry: Entry, known: Known | None, data: bytes | None = None) -> bool:
        """Whether nothing is left to do for this entry, given the row of its bytes and, once they are read, these."""
        if known is None:
            return False
        has, wants = kind(known.label, known.generator), kind(entry.label, entry.generator)
        if has.lower() != wants.lower():
            self.report.conflict(entry.key, known.sha256, has, wants)
        elif known.embedded and (known.pictured or data is not None):
            if data is not None and not self.dry_run:
                self._complete(known, data)
            self.known += 1
        else:
            return False
        self.on_image()
        return True

    def _complete(self, known: Known, data: bytes) -> None:
        """Let a row have the thumbnail and the file that it lacks."""
        if not known.pictured:
            with suppress(UnreadableImage, LimitExceeded):
                self.store.references.add_thumbnail(known.id, self._in_process(decode_thumbnail, data, self.max_pixels))
        if self.keep_bytes:
            self.store.references.add_file(known.id, data)

    def _read(self, entry: Entry) -> File | None:
        try:
            data = entry.read()
        except (UnreadableImage, OSError) as error:
            self._reject(entry, error)
            return None
        return entry, data, hashlib.sha256(data).hexdigest()

    def _decode(self, file: File) -> Prepared | None:
        entry, data, sha256 = file
        try:
            decoded = self._in_process(decode, data, sha256, self.max_pixels, self.embedder.preprocess)
            facts = decoded.facts
            reference = NewReference(
                sha256=facts.sha256,
                label=entry.label,
                generator=entry.generator,
                source=entry.source,
                group=entry.group or facts.sha256,
                uri=None if self.keep_bytes else entry.public_uri or entry.uri,
                file_bytes=facts.bytes,
                mtime=entry.mtime,
                width=facts.width,
                height=facts.height,
                format=facts.format,
                jpeg_quality=facts.jpeg_quality,
                fingerprint=decoded.fingerprint,
                thumbnail=decoded.thumbnail,
                attributes=entry.attributes,
                data=data if self.keep_bytes else None,
            )
            return Prepared(entry, reference, decoded.windows)
        except (UnreadableImage, LimitExceeded) as error:
            self._reject(entry, error)
            return None

    def _in_process(self, work: Callable[..., T], *args: object) -> T:
        memory = decoding_memory(self.max_pixels)
        return decoding_pool().call(work, *args, seconds=self.image_seconds, memory=memory, deadline=self.deadline)

    def _reject(self, entry: Entry, error: Exception) -> None:
        self.report.reject(entry.key, str(error) or type(error).__name__)
        self.on_image()

    def embed(
        self, prepared: Generator[Prepared, None, None], batch_size: int
    ) -> Generator[list[Embedded], None, None]:
        def embed(batch: Sequence[Prepared]) -> list[Embedded]:
            vectors = self.embedder.embed_windows([item.windows for item in batch], batch_size)  # (n, d)
            return [
                (item.entry, replace(item.reference, vector=vector))
                for item, vector in zip(batch, vectors, strict=True)
            ]

        return map_batches(embed, prepared, batch_size)

    def write(self, embedded: Iterable[list[Embedded]]) -> None:
        """Write some hundred images or some seconds at a time; the first of them open an enrolment."""
        waiting: list[Embedded] = []
        first = 0.0
        for batch in embedded:
            if not waiting:
                first = time.monotonic()
            waiting += batch
            if len(waiting) >= self.write_images or time.monotonic() - first > self.write_seconds:
                self._add(waiting)
                waiting = []
        self._add(waiting)

    def finish(self, start: float) -> Report:
        """The report, which an enrolment keeps, since this time by `time.monotonic`."""
        report = self.report
        report.images = self.images
        report.known += self.known
        report.rejected.sort(key=itemgetter("file"))
        report.seconds = round(time.monotonic() - start, 3)
        if report.enrolment is not None and self.enrolment is None:
            self.store.enrolments.finish(report.enrolment, asdict(report))
        return report

    def _add(self, rows: Sequence[Embedded]) -> None:
        report = self.report
        if not rows:
            return
        if time.monotonic() > self.deadline:
            raise DeadlinePassed("nobody waits for the images that are left")
        if report.enrolment is None:
            report.enrolment = self.enrolment or self.store.enrolments.open(self.generator, self.source)
        for start in range(0, len(rows), self.write_images):
            entries, batch = zip(*rows[start : start + self.write_images], strict=True)
            added = self.store.references.add(batch, self.embedder.id, report.enrolment, while_active=self.while_active)
            report.known += added.known
            report.embedded += added.embedded
            for position in added.new:
                report.count_new(entries[position])
            for conflict in added.conflicts:
                report.conflict(entries[conflict.position].key, conflict.sha256, conflict.has, conflict.wants)
            for entry, image_id in zip(entries, added.ids, strict=True):
                if image_id is None:
                    report.reject(entry.key, FORGOTTEN)
                self.on_image()

    def count(self, prepared: Generator[Prepared, None, None]) -> None:
        """Report what writing would add."""
        hashes: set[str] = set()
        with closing(prepared):
            for item in prepared:
                sha256 = item.reference.sha256
                if sha256 in hashes:
                    self.report.known += 1
                elif self.store.references.find(sha256):
                    self.report.embedded += 1
                else:
                    self.report.count_new(item.entry)
                hashes.add(sha256)
                self.on_image()


def register(embedder: Embedder, store: Store) -> None:
    """Make a checkpoint known to the store, and where it lies.

    Raises:
        ValueError: It is known with another dimension.
    """
    store.checkpoints.register(embedder.id, embedder.name, embedder.dim, embedder.config.to_json(), embedder.folder)
