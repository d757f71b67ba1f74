"""References in Milvus (https://milvus.io, 2.3 or later): the calls that are made of it, and a search of them.

A collection holds the references of one store and one checkpoint: vectors of unit length under their primary keys, in
one partition for each label. One more row, outside these partitions, is its mark: how far it was filled. Milvus stamps
each upsert with a time; a search that names the stamp of a mark sees everything that was written before it, and need
not wait for what is being written (`Strong` consistency costs about 200 ms).
"""

import json
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit
from uuid import uuid4

import numpy as np

from indexer.index.index import Contents, Neighbours
from indexer.index.vector_checks import BadVectors, unit_vectors
from indexer.settings import SettingsError

log = logging.getLogger(__name__)

PARTITIONS = ("real", "fake")
MARK = -1
"""Id of the row that says how far a collection is filled."""
LISTED = "vector"
"""Name of the index over the vectors, which is their field's."""
OLDEST = (2, 3)
LISTS, PROBED, OVERSAMPLED = 1024, 64, 4
"""Lists of each of the engine's segments, those that a query looks into, and how many times k are scored again."""
ROWS = 2_000
"""Rows of one call."""
QUERIES = 256
"""Queries of one call."""
FETCH = 1_000
"""References that one query may exclude before it is asked alone; fewer are fetched and dropped."""
DEEPEST = 16_384
"""Results that the engine gives to one query."""
SEARCH_SECONDS, CALL_SECONDS, LOAD_SECONDS = 5.0, 30.0, 600.0
"""Longest wait for a search of one query, for another call, and for a collection to be made, stored or loaded."""
SETTLE_SECONDS = 0.5
"""Between two looks at how many rows have no lists yet."""
SECONDS_PER_QUERY = 0.05
"""Added to it for each query: of a batch, such as a calibration's."""
SAMPLE, NEAREST = 32, 20
"""Queries by which the recall is measured, and how many neighbours of each."""


class EngineAway(RuntimeError):
    """The engine does not answer, or not as it should. The message is one line."""


class WrongEngine(SettingsError):
    """What LINEUP_INDEX names is no engine that can be used; the message is one line and says what to do."""


class Stamp(NamedTuple):
    """What a search is asked of: a collection that holds so many references, once the engine has got to this time."""

    collection: str
    timestamp: int
    real: int
    fake: int
    recall: float


@dataclass(frozen=True, slots=True)
class EngineUrl:
    """LINEUP_INDEX taken apart: where the engine is, who asks, and how it keeps vectors."""

    address: str
    token: str
    index: str

    @classmethod
    def parse(cls, url: str) -> "EngineUrl":
        """Read `milvus+http://[user:password@]host:port[?index=IVF_FLAT|IVF_SQ8]`.

        Raises:
            WrongEngine: It is not like that.
        """
        try:
            parts = urlsplit(url.removeprefix("milvus+"))
            port = parts.port or 19530
        except ValueError:
            parts = None
        if parts is None or not parts.hostname:  # any part may hold the password
            raise WrongEngine("LINEUP_INDEX is wrong: not a URL like milvus+http://user:password@host:19530")
        options = parse_qs(parts.query)
        index = options.pop("index", ["IVF_FLAT"])[-1]
        if index not in ("IVF_FLAT", "IVF_SQ8") or options:
            raise WrongEngine(f"LINEUP_INDEX ends in ?{parts.query}: only ?index=IVF_FLAT or ?index=IVF_SQ8 is known")
        token = f"{unquote(parts.username)}:{unquote(parts.password or '')}" if parts.username else ""
        return cls(f"{parts.scheme}://{parts.hostname}:{port}", token, index)


class Milvus:
    """One engine. Connects at the first call; threads may share it.

    Attributes:
        away: Whether the last call was not answered; searches are not even tried then, until `ping` is answered. One
            that was refused was answered.

    Args:
        url: As in LINEUP_INDEX.

    Raises:
        WrongEngine: The url cannot be read, or its client is not installed.
    """

    def __init__(self, url: str) -> None:
        try:
            import pymilvus
        except ModuleNotFoundError:
            advice = 'pip install "lineup[milvus]", or unset it'
            raise WrongEngine(f"LINEUP_INDEX names Milvus, whose client is not installed: {advice}") from None
        logging.getLogger("pymilvus").setLevel(logging.CRITICAL)  # it logs a traceback of each failure, which we raise
        self.url = EngineUrl.parse(url)
        self.away = False
        self._library: Any = pymilvus
        self._client: Any = None

    @property
    def quantises(self) -> bool:
        """Whether its similarities are of rounded vectors, so that the nearest have to be scored again."""
        return self.url.index == "IVF_SQ8"

    def check(self) -> None:
        """See that it is an engine whose answers are understood.

        Raises:
            WrongEngine: It is too old, or lets nobody in.
            EngineAway: It does not answer.
        """
        version = str(self._call("get_server_version", seconds=SEARCH_SECONDS))
        numbers = version.removeprefix("milvus_lite-").removeprefix("v").split("-")[0].split(".")[:2]
        if not all(number.isdigit() for number in numbers) or tuple(map(int, numbers)) < OLDEST:
            oldest = ".".join(map(str, OLDEST))
            raise WrongEngine(
                f"{self.url.address} is Milvus {version}, {oldest} or later is needed: update it, or unset LINEUP_INDEX"
            )

    def ping(self) -> None:
        """Learn whether it is back.

        Raises:
            EngineAway: It is not.
        """
        self._call("get_server_version", seconds=SEARCH_SECONDS)

    def collections(self, prefix: str) -> list[str]:
        """The names that begin like this."""
        return [name for name in self._call("list_collections") if name.startswith(prefix)]

    def create(self, prefix: str, dim: int) -> str:
        """Make an empty collection, and return its name."""
        types, name = self._library.DataType, f"{prefix}_{uuid4().hex[:8]}"
        schema = self._library.MilvusClient.create_schema(auto_id=False)
        schema.add_field("id", types.INT64, is_primary=True)
        schema.add_field("vector", types.FLOAT_VECTOR, dim=dim)
        schema.add_field("label", types.INT8)
        schema.add_field("generator", types.INT64)
        schema.add_field("source", types.VARCHAR, max_length=65_535)
        index = self._library.MilvusClient.prepare_index_params()
        index.add_index(
            "vector", index_name=LISTED, index_type=self.url.index, metric_type="IP", params={"nlist": LISTS}
        )
        self._call("create_collection", name, schema=schema, index_params=index, seconds=LOAD_SECONDS)
        for partition in PARTITIONS:
            self._call("create_partition", name, partition)
        self._call("load_collection", name, seconds=LOAD_SECONDS)
        return name

    def holds(self, collection: str, dim: int) -> bool:
        """Whether there is such a collection.

        Raises:
            WrongEngine: Its vectors have another length.
        """
        if not self._call("has_collection", collection):
            return False
        fields = self._call("describe_collection", collection)["fields"]
        held = next((int(field["params"]["dim"]) for field in fields if field["name"] == "vector"), 0)
        if held != dim:
            raise WrongEngine(
                f"collection {collection} of {self.url.address} holds vectors of {held} numbers, the checkpoint's have "
                f"{dim}: run lineup index rebuild"
            )
        return True

    def upsert(
        self,
        collection: str,
        label: int,
        ids: np.ndarray,
        vectors: np.ndarray,
        generators: np.ndarray,
        sources: Sequence[str],
        *,
        new: bool = False,
    ) -> None:
        """Put references of one label where those with the same ids were.

        Args:
            collection: Where to.
            label: 0 real, 1 fake.
            ids: Primary keys, shape (n,).
            vectors: Raw embeddings, shape (n, d).
            generators: Generator ids, shape (n,), -1 for none.
            sources: Names, n of them.
            new: None of the ids is there, which spares the engine half the work.
        """
        columns = zip(ids.tolist(), unit_vectors(vectors, vectors.shape[1]), generators.tolist(), sources, strict=True)
        rows = [
            {"id": id, "vector": vector, "label": label, "generator": generator, "source": source}
            for id, vector, generator, source in columns
        ]
        for first in range(0, len(rows), ROWS):
            part, partition = rows[first : first + ROWS], PARTITIONS[label]
            if new:
                self._call("insert", collection, part, partition_name=partition)
            else:
                self._upsert(collection, part, partition)

    def delete(self, collection: str, ids: np.ndarray) -> None:
        """Remove references; ids that are not there are passed over."""
        for first in range(0, len(ids), ROWS):
            self._call("delete", collection, ids=ids[first : first + ROWS].tolist())

    def mark(self, collection: str, text: str, dim: int) -> int:
        """Note how far the collection is filled; returns the time of that, and so of everything written before."""
        row = {"id": MARK, "vector": np.eye(1, dim, dtype=np.float32)[0], "label": -1, "generator": -1, "source": text}
        return self._upsert(collection, [row], None)

    def read_mark(self, collection: str) -> str | None:
        """What `mark` noted last; None before the first."""
        rows = self._query(collection, filter=f"id == {MARK}", output_fields=["source"])
        return str(rows[0]["source"]) if rows else None

    def counts(self, collection: str, label: int) -> int:
        """How many references of a label there are. The engine counts them."""
        # Some versions count other partitions in, some other rows: the filter and the partition together are right.
        rows = self._query(
            collection, filter=f"label == {label}", output_fields=["count(*)"], partition_names=[PARTITIONS[label]]
        )
        return int(rows[0]["count(*)"])

    def labels(self, collection: str, ids: np.ndarray) -> np.ndarray:
        """Labels of those of the ids that are there, in any order."""
        rows = [
            row
            for first in range(0, len(ids), ROWS)
            for row in self._query(
                collection, filter=f"id in {ids[first : first + ROWS].tolist()}", output_fields=["label"]
            )
        ]
        return np.array([row["label"] for row in rows], np.int8)

    def contents(self, collection: str, dim: int) -> Contents:
        """Everything in a collection but its mark."""
        fields = ["id", "vector", "label", "generator", "source"]
        pages = self._call(
            "query_iterator", collection, batch_size=ROWS, filter="id >= 0", output_fields=fields,
            consistency_level="Strong", seconds=CALL_SECONDS,
        )  # fmt: skip
        rows: list[Mapping[str, Any]] = []
        vectors = [np.empty((0, dim), np.float32)]
        while page := self._answered(pages.next):
            vectors.append(np.array([row["vector"] for row in page], np.float32))  # (m, d)
            rows += [{name: row[name] for name in fields if name != "vector"} for row in page]
        pages.close()
        ids, labels, generators = (
            np.array([row[name] for row in rows], np.int64) for name in ("id", "label", "generator")
        )
        order = np.argsort(ids)
        sources = np.array([row["source"] for row in rows], object)
        return Contents(ids[order], np.concatenate(vectors)[order], labels[order], generators[order], sources[order])

    def settle(self, collection: str, pause: Callable[[float], object] = time.sleep) -> None:
        """Have what was loaded stored and its lists made, without which a search reads every row.

        Args:
            collection: Where it was loaded.
            pause: Called with seconds between two looks; what it raises ends the wait.
        """
        self._call("flush", collection, seconds=LOAD_SECONDS)
        fewest, deadline = None, 0.0
        while rows := self._call("describe_index", collection, LISTED)["pending_index_rows"]:
            if fewest is None or rows < fewest:
                fewest, deadline = rows, time.monotonic() + LOAD_SECONDS
            elif time.monotonic() > deadline:
                log.warning("%d rows of %s still have no lists: its searches are slow until they do", rows, collection)
                return
            pause(SETTLE_SECONDS)

    def drop(self, collection: str) -> None:
        """Remove a collection."""
        self._call("drop_collection", collection, seconds=LOAD_SECONDS)

    def point(self, alias: str, collection: str) -> None:
        """Give the collection a name that stays the same when another takes its place, for other tools."""
        known = self._call("list_aliases", collection).get("aliases", [])
        if alias not in known:
            try:
                self._call("alter_alias", collection, alias)
            except EngineAway:  # there is none yet
                self._call("create_alias", collection, alias)

    def recall(self, collection: str, label: int, count: int) -> float:
        """Share of the nearest that a search finds, 0..1, by a few references that are asked for their neighbours."""
        rows = self._query(
            collection, filter="id >= 0", limit=SAMPLE, output_fields=["vector"], partition_names=[PARTITIONS[label]]
        )
        if not rows:
            return 1.0
        queries = np.array([row["vector"] for row in rows], np.float32)
        k = min(NEAREST, count)
        usual, exact = (
            [{hit["id"] for hit in hits} for hits in self.search(collection, queries, k, label, probed=probed)]
            for probed in (PROBED, LISTS)
        )
        return float(np.mean([len(a & b) / max(1, len(b)) for a, b in zip(usual, exact, strict=True)]))

    def search(
        self,
        collection: str,
        queries: np.ndarray,
        k: int,
        label: int,
        *,
        filter: str = "",
        timestamp: int | None = None,
        probed: int = PROBED,
    ) -> list[list[dict[str, Any]]]:
        """The k nearest references of one label to each query, nearest first, fewer where there are fewer.

        Args:
            collection: Where they are.
            queries: Of unit length, shape (q, d), float32.
            k: At least 1.
            label: 0 real, 1 fake.
            filter: What they must be like, in Milvus's language.
            timestamp: What was written by then is seen; None for everything.
            probed: Lists that are looked into.

        Returns:
            For each query its hits: id, similarity, generator and source.
        """
        fields = ["generator", "source", *(["vector"] if self.quantises else [])]
        options: dict[str, Any] = {"consistency_level": "Strong"}
        if timestamp is not None:
            options = {"consistency_level": "Customized", "guarantee_timestamp": timestamp}
        hits: list[list[dict[str, Any]]] = []
        for first in range(0, len(queries), QUERIES):
            part = queries[first : first + QUERIES]
            answers = self._call(
                "search",
                collection,
                part,
                limit=min(k * OVERSAMPLED if self.quantises else k, DEEPEST),
                filter=filter,
                partition_names=[PARTITIONS[label]],
                output_fields=fields,
                search_params={"metric_type": "IP", "params": {"nprobe": probed}},
                seconds=(CALL_SECONDS if timestamp is None else SEARCH_SECONDS) + SECONDS_PER_QUERY * len(part),
                **options,
            )
            hits += [self._scored(query, answer)[:k] for query, answer in zip(part, answers, strict=True)]
        return hits

    def _scored(self, query: np.ndarray, answer: Sequence[Any]) -> list[dict[str, Any]]:
        """The hits of one query; exactly scored where the engine rounds vectors."""
        hits = [
            {"id": hit["id"], "similarity": hit["distance"]}
            | {name: hit["entity"][name] for name in ("generator", "source")}
            for hit in answer
        ]
        if self.quantises and hits:
            vectors = np.array([hit["entity"]["vector"] for hit in answer], np.float32)  # (m, d)
            for hit, similarity in zip(hits, (vectors @ query).tolist(), strict=True):
                hit["similarity"] = similarity
            hits.sort(key=lambda hit: -hit["similarity"])
        return hits

    def _query(self, collection: str, **options: Any) -> list[Mapping[str, Any]]:
        rows: list[Mapping[str, Any]] = self._call("query", collection, consistency_level="Strong", **options)
        return rows

    def _upsert(self, collection: str, rows: Sequence[Mapping[str, Any]], partition: str | None) -> int:
        """The time of an upsert, which the client's own method keeps to itself."""
        handler = self._connected()._get_connection()
        options: dict[str, Any] = {} if partition is None else {"partition_name": partition}
        result = self._answered(lambda: handler.upsert_rows(collection, list(rows), timeout=CALL_SECONDS, **options))
        return int(result.timestamp)

    def _call(self, name: str, *arguments: Any, seconds: float = CALL_SECONDS, **options: Any) -> Any:
        """What one method of the client returns."""
        client = self._connected()
        return self._answered(lambda: getattr(client, name)(*arguments, timeout=seconds, **options))

    def _connected(self) -> Any:
        """The client; it goes on by itself when an engine comes back."""
        if self._client is None:
            address, token = self.url.address, self.url.token
            self._client = self._answered(
                lambda: self._library.MilvusClient(address, token=token, timeout=SEARCH_SECONDS)
            )
        return self._client

    def _answered(self, work: Callable[[], Any]) -> Any:
        """What `work` returns.

        Raises:
            EngineAway: The engine failed, or refuses that.
        """
        try:
            result = work()
        except Exception as error:  # of the client, of gRPC below it, or of its own faults when a connection breaks off
            self.away = not _refused(error)
            reason = " ".join(str(getattr(error, "message", error)).split())[:200]
            fault = "does not answer" if self.away else "refuses that"
            raise EngineAway(
                f"the search engine at {self.url.address} {fault} ({reason}): see that it runs, and that "
                "LINEUP_INDEX names it"
            ) from error
        self.away = False
        return result


class MilvusIndex:
    """The references of one checkpoint as `Index`, in an engine that others fill.

    Attributes:
        engine: Where they are.
        stamp: What searches are asked of; None before anything was shipped.
        source_names: Names by the numbers that this process has given them.

    Args:
        engine: An engine.
        dim: Length of the vectors.
    """

    def __init__(self, engine: Milvus, dim: int) -> None:
        self.engine, self.dim = engine, dim
        self.stamp: Stamp | None = None
        self.source_names: dict[int, str] = {}
        self._numbers: dict[str, int] = {}
        self._numbering = threading.Lock()

    @property
    def kind(self) -> str:
        """Such as "milvus-ivf-flat"."""
        return "milvus-" + self.engine.url.index.lower().replace("_", "-")

    @property
    def device(self) -> str:
        """Another machine's."""
        return "engine"

    @property
    def recall(self) -> float:
        """As measured when the collection last reached twice its size."""
        return self.stamp.recall if self.stamp else 1.0

    def __len__(self) -> int:
        return sum(self.counts())

    def counts(self, exclude_ids: np.ndarray | None = None) -> tuple[int, int]:
        """See `Index.counts`."""
        if self.stamp is None:
            return 0, 0
        real, fake = self.stamp.real, self.stamp.fake
        if exclude_ids is not None and len(exclude_ids):
            labels = self.engine.labels(self.stamp.collection, exclude_ids)
            real, fake = real - int((labels == 0).sum()), fake - int((labels == 1).sum())
        return real, fake

    def search(
        self,
        vectors: np.ndarray,
        k: int,
        *,
        label: int | None = None,
        generator: int | None = None,
        source: int | None = None,
    ) -> Neighbours:
        """See `Index.search`."""
        terms = [] if generator is None else [f"generator == {generator}"]
        if source is not None:
            terms.append(f"source == {_quoted(self.source_names[source])}" if source in self.source_names else "id < 0")
        queries = self._queries(vectors, k)
        nearest = [self._nearest(queries, k, one, " and ".join(terms)) for one in (0, 1) if label in (None, one)]
        return nearest[0] if len(nearest) == 1 else Neighbours.joined(nearest, axis=1).nearest(k)

    def search_both(
        self,
        vectors: np.ndarray,
        k: tuple[int, int],
        *,
        exclude_ids: np.ndarray | None = None,
        exclude_each: Sequence[np.ndarray] | None = None,
    ) -> tuple[Neighbours, Neighbours]:
        """See `Index.search_both`."""
        if exclude_each is not None and len(exclude_each) != len(vectors):
            raise BadVectors(f"{len(vectors)} queries came with {len(exclude_each)} exclusions")
        queries = self._queries(vectors, min(k))
        for_all = np.empty(0, np.int64) if exclude_ids is None else np.asarray(exclude_ids, np.int64)
        each = [np.empty(0, np.int64)] * len(queries) if exclude_each is None else exclude_each
        real, fake = (self._nearest_without(queries, n, label, for_all, each) for label, n in enumerate(k))
        return real, fake

    def number(self, source: str) -> int:
        """The number of a source; -2, which none has, for one that nothing has come from.

        Raises:
            EngineAway: The engine has to be asked, and does not answer.
        """
        if source not in self._numbers and self.stamp is not None:
            rows = self.engine._query(
                self.stamp.collection, filter=f"source == {_quoted(source)} and id >= 0", limit=1, output_fields=["id"]
            )
            if rows:
                self._numbered(source)
        return self._numbers.get(source, -2)

    def _queries(self, vectors: np.ndarray, k: int) -> np.ndarray:
        if k < 1:
            raise BadVectors(f"k is {k}, must be at least 1")
        return unit_vectors(vectors, self.dim)

    def _nearest_without(
        self, queries: np.ndarray, k: int, label: int, for_all: np.ndarray, each: Sequence[np.ndarray]
    ) -> Neighbours:
        """The k nearest of a label, without the ids that no query and those that one query must not find."""
        term = f"id not in {for_all.tolist()}" if len(for_all) else ""
        few = max((len(ids) for ids in each if len(ids) <= FETCH), default=0)
        nearest = self._nearest(queries, k + few, label, term)
        kept = ~np.array([np.isin(row, ids) for row, ids in zip(nearest.ids, each, strict=True)]).reshape(
            nearest.ids.shape
        )
        nearest = nearest.where(kept).nearest(k)
        alone = [number for number, ids in enumerate(each) if len(ids) > FETCH]
        if not alone:
            return nearest
        parts = [nearest.row(number) for number in range(len(queries))]
        for number in alone:
            ids = np.union1d(for_all, each[number])
            parts[number] = self._nearest(queries[number : number + 1], k, label, f"id not in {ids.tolist()}")
        return Neighbours.joined(parts)

    def _nearest(self, queries: np.ndarray, k: int, label: int, filter: str) -> Neighbours:
        """The k nearest of a label that the filter lets pass."""
        stamp, nearest = self.stamp, Neighbours.none(len(queries), k)
        if self.engine.away:
            raise EngineAway(f"the search engine at {self.engine.url.address} is away")
        if stamp is None or not len(queries) or not (stamp.real, stamp.fake)[label]:
            return nearest
        hits = self.engine.search(stamp.collection, queries, k, label, filter=filter, timestamp=stamp.timestamp)
        for row, found in enumerate(hits):
            n = len(found)
            nearest.ids[row, :n] = [hit["id"] for hit in found]
            nearest.similarities[row, :n] = np.clip([hit["similarity"] for hit in found], -1, 1)
            nearest.labels[row, :n] = label
            nearest.generators[row, :n] = [hit["generator"] for hit in found]
            nearest.sources[row, :n] = [self._numbered(hit["source"]) for hit in found]
        return nearest

    def _numbered(self, source: str) -> int:
        """The number of a source that has references."""
        if source not in self._numbers:
            with self._numbering:
                number = self._numbers.setdefault(source, len(self._numbers))
                self.source_names = self.source_names | {number: source}  # replaced: a thread may be reading it
        return self._numbers[source]


def _refused(error: Exception) -> bool:
    """Whether the engine answered, and said no: 1 and 2 say not ready, or are the client's own."""
    code = getattr(error, "code", None)
    return isinstance(code, int) and code > 2


def _quoted(text: str) -> str:
    """A string in Milvus's language, which escapes as JSON does and takes no raw line break."""
    return json.dumps(text, ensure_ascii=False)
