"""A double of Milvus and its client: the few calls that are made of it, on dictionaries, exact and consistent."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import numpy as np


class Refused(Exception):
    """`MilvusException` with one of the server's own codes: it answered, and said no."""

    code = 1100


class Engine:
    """What outlives its clients.

    Attributes:
        version: As `get_server_version` answers.
        collections: Partitions by collection; each holds its rows by id.
        dims: Length of the vectors by collection.
        indexes: Name of the index by collection.
        aliases: Collections by alias.
        clock: The time of the last write.
        down: Whether it answers nothing.
        writes_left: Writes until it goes down; None for never.
        guarantees: The times that searches named.
        pending: Rows without lists, as the next looks at an index tell them; none after these.
        settled: Whether the last look saw none.
        log: Writes in their order: the call, the collection and ids.
    """

    def __init__(self) -> None:
        self.version = "v2.3.5"
        self.collections: dict[str, dict[str, dict[int, dict[str, Any]]]] = {}
        self.dims: dict[str, int] = {}
        self.indexes: dict[str, str] = {}
        self.aliases: dict[str, str] = {}
        self.clock = 0
        self.down = False
        self.writes_left: int | None = None
        self.guarantees: list[int] = []
        self.pending: list[int] = []
        self.settled = False
        self.log: list[tuple[str, str, list[int]]] = []

    @property
    def library(self) -> Any:
        """What `import pymilvus` gives."""

        class Client(DoubleClient):
            engine = self

        types = SimpleNamespace(INT64="int64", FLOAT_VECTOR="vector", INT8="int8", VARCHAR="varchar")
        return SimpleNamespace(MilvusClient=Client, DataType=types)

    def rows(self, collection: str) -> dict[int, dict[str, Any]]:
        """References of a collection by id, without its mark."""
        partitions = self.collections[collection]
        return partitions["real"] | partitions["fake"]

    def written(self, call: str, collection: str, ids: Iterable[int]) -> None:
        """One write begins."""
        if self.writes_left is not None:
            self.writes_left -= 1
            self.down = self.down or self.writes_left < 0
        self.answer()
        self.clock += 1
        self.log.append((call, collection, list(ids)))

    def answer(self) -> None:
        """Fail where it is down."""
        if self.down:
            raise ConnectionError("the double is down")


class DoubleClient:
    """`MilvusClient`, and the handler below it."""

    engine: Engine

    def __init__(self, uri: str, *, token: str, timeout: float) -> None:
        self.engine.answer()

    @staticmethod
    def create_schema(**options: Any) -> Any:
        fields: dict[str, Any] = {}
        return SimpleNamespace(fields=fields, add_field=lambda name, kind, **params: fields.update({name: params}))

    @staticmethod
    def prepare_index_params() -> Any:
        names: list[str] = []
        return SimpleNamespace(names=names, add_index=lambda *args, index_name, **options: names.append(index_name))

    def __getattribute__(self, name: str) -> Any:
        found = object.__getattribute__(self, name)
        if name not in ("engine", "_get_connection") and not name.startswith("__"):
            object.__getattribute__(self, "engine").answer()
        return found

    def _get_connection(self) -> "DoubleClient":
        return self

    def get_server_version(self, *, timeout: float) -> str:
        return self.engine.version

    def list_collections(self, *, timeout: float) -> list[str]:
        return list(self.engine.collections)

    def has_collection(self, name: str, *, timeout: float) -> bool:
        return name in self.engine.collections

    def create_collection(self, name: str, *, schema: Any, index_params: Any, timeout: float) -> None:
        self.engine.collections[name] = {"_default": {}}
        self.engine.dims[name] = schema.fields["vector"]["dim"]
        [self.engine.indexes[name]] = index_params.names

    def create_partition(self, name: str, partition: str, *, timeout: float) -> None:
        self.engine.collections[name][partition] = {}

    def load_collection(self, name: str, *, timeout: float) -> None: ...

    def flush(self, name: str, *, timeout: float) -> None: ...

    def describe_index(self, name: str, index: str, *, timeout: float) -> dict[str, int]:
        assert index == self.engine.indexes[name]
        pending = self.engine.pending.pop(0) if self.engine.pending else 0
        self.engine.settled = not pending
        return {"pending_index_rows": pending}

    def describe_collection(self, name: str, *, timeout: float) -> dict[str, Any]:
        return {"fields": [{"name": "vector", "params": {"dim": self.engine.dims[name]}}]}

    def drop_collection(self, name: str, *, timeout: float) -> None:
        self.engine.collections.pop(name, None)

    def list_aliases(self, name: str, *, timeout: float) -> dict[str, list[str]]:
        return {"aliases": [alias for alias, target in self.engine.aliases.items() if target == name]}

    def alter_alias(self, name: str, alias: str, *, timeout: float) -> None:
        if alias not in self.engine.aliases:
            raise ValueError("no such alias")
        self.engine.aliases[alias] = name

    def create_alias(self, name: str, alias: str, *, timeout: float) -> None:
        self.engine.aliases[alias] = name

    def upsert_rows(
        self, name: str, rows: Sequence[Mapping[str, Any]], *, timeout: float, partition_name: str = "_default"
    ) -> Any:
        self.engine.written("upsert", name, [row["id"] for row in rows])
        for row in rows:
            for others in self.engine.collections[name].values():
                others.pop(row["id"], None)
            self.engine.collections[name][partition_name][row["id"]] = dict(row)
        return SimpleNamespace(timestamp=self.engine.clock)

    def insert(self, name: str, rows: Sequence[Mapping[str, Any]], *, timeout: float, partition_name: str) -> None:
        """As the engine does, it takes an id twice; the double refuses it."""
        assert not self.engine.rows(name).keys() & {row["id"] for row in rows}
        self.upsert_rows(name, rows, timeout=timeout, partition_name=partition_name)

    def delete(self, name: str, *, ids: Sequence[int], timeout: float) -> None:
        self.engine.written("delete", name, ids)
        for rows in self.engine.collections[name].values():
            for id in ids:
                with suppress(KeyError):
                    del rows[id]

    def _passing(self, name: str, filter: str, partitions: Sequence[str] | None) -> list[dict[str, Any]]:
        """Rows that a filter lets pass; the part of Milvus's language that is used is Python's too."""
        try:
            term = compile(filter or "True", "filter", "eval")
        except SyntaxError as error:
            raise Refused(f"cannot parse expression: {error}") from error
        return [
            row
            for partition, rows in self.engine.collections[name].items()
            if partitions is None or partition in partitions
            for row in rows.values()
            if eval(term, {}, dict(row))
        ]

    def query(
        self,
        name: str,
        *,
        filter: str,
        output_fields: Sequence[str],
        consistency_level: str,
        timeout: float,
        limit: int | None = None,
        partition_names: Sequence[str] | None = None,
    ) -> list[dict[str, Any]]:
        rows = self._passing(name, filter, partition_names)[:limit]
        return [{"count(*)": len(rows)}] if output_fields == ["count(*)"] else rows

    def query_iterator(self, name: str, *, batch_size: int, filter: str, **options: Any) -> Any:
        rows = self._passing(name, filter, None)
        pages = [rows[first : first + batch_size] for first in range(0, len(rows), batch_size)]
        return SimpleNamespace(next=lambda: pages.pop(0) if pages else [], close=lambda: None)

    def search(
        self,
        name: str,
        queries: np.ndarray,
        *,
        limit: int,
        filter: str,
        partition_names: Sequence[str],
        guarantee_timestamp: int = 0,
        **options: Any,
    ) -> list[list[dict[str, Any]]]:
        assert guarantee_timestamp <= self.engine.clock, "a time that has not come yet"
        self.engine.guarantees.append(guarantee_timestamp)
        rows = self._passing(name, filter, partition_names)
        answers = []
        for query in queries:
            hits = [{"id": row["id"], "distance": self._distance(query, row["vector"]), "entity": row} for row in rows]
            answers.append(sorted(hits, key=lambda hit: -hit["distance"])[:limit])
        return answers

    def _distance(self, query: np.ndarray, vector: np.ndarray) -> float:
        return float(query @ vector)
