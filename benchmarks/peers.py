"""Search time and recall beside vector databases: pgvector in the embedded PostgreSQL, and Milvus Lite.

All searches take turns, as in `benchmarks.search`; those of pgvector come one after the other on one connection, which
is how a service would ask. Milvus Lite runs in an environment of its own (`python -m venv E; E/bin/pip install pymilvus
milvus-lite`). What was loaded is kept in the home folder, if one is given: the next call finds it there.

    python -m benchmarks.peers --sizes 50000,200000 --milvus E/bin/python
"""

import argparse
import contextlib
import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import psycopg
from rich.console import Console
from rich.table import Table

from benchmarks.search import DIM, QUERIES, K, built, embeddings, recall, turns
from indexer.database.embedded import EmbeddedServer
from indexer.index import growing

NEAREST = "select id from {table} order by embedding <=> %s::vector limit %s"
EF = 400
"""pgvector's hnsw.ef_search and Milvus's ef; graphs are built with m 16 and ef_construction 64, pgvector's defaults."""

BATCHES = 200_000
"""Largest size at which batches are timed: exact search in a database takes minutes for them above."""

Answer = Callable[[int], list[list[int]]]
"""Ids found for the first so many queries."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Print one table per size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="50000,200000", help="comma list of reference counts")
    parser.add_argument("--graphs", type=int, default=200_000, help="HNSW graphs up to this size: they take minutes")
    parser.add_argument("--milvus", help="Python of the environment that has pymilvus and milvus-lite")
    parser.add_argument("--home", type=Path, help="folder that is kept; a temporary one otherwise")
    parser.add_argument("--rounds", type=int, default=7, help="timed turns of each search")
    options = parser.parse_args(arguments)
    home = options.home or Path(tempfile.mkdtemp(prefix="lineup-"))
    server = EmbeddedServer(home)
    url = server.start().set(drivername="postgresql").render_as_string()
    try:
        for size in map(int, options.sizes.split(",")):
            compare(size, size <= options.graphs, options.milvus, home, url, options.rounds)
    finally:
        server.stop()
        if options.home is None:
            shutil.rmtree(home)


def compare(n: int, graphs: bool, milvus: str | None, home: Path, url: str, rounds: int) -> None:
    """Print the table of one size."""
    vectors, queries = embeddings(n, 1), embeddings(QUERIES, 2)
    flat = faiss.IndexFlatIP(DIM)
    flat.add(vectors)
    exact = flat.search(queries, K)[1]
    del flat
    start = time.perf_counter()
    index, _ = built(n)
    loading = {"Lineup": time.perf_counter() - start}
    lists, _ = built(n)
    growing.LARGE = 1  # sooner than by default, to be compared with graphs
    lists.grow()
    loading["Lineup, lists"] = time.perf_counter() - start - loading["Lineup"]
    with ExitStack() as stack:
        answers: dict[str, Answer] = {
            "Lineup": lambda q: index.search(queries[:q], K).ids.tolist(),
            "Lineup, lists": lambda q: lists.search(queries[:q], K).ids.tolist(),
        }
        kinds = (("exact", False), ("HNSW", True))[: 1 + graphs]
        for kind, graph in kinds:
            name = f"pgvector, {kind}"
            answers[name], loading[name] = pgvector(stack.enter_context(psycopg.connect(url)), vectors, queries, graph)
            if milvus:
                name = f"Milvus Lite, {'HNSW' if graph else 'FLAT'}"
                arguments = (milvus, name.split()[-1], vectors, queries, home)
                answers[name], loading[name] = stack.enter_context(milvus_lite(*arguments))
        one = turns({name: partial(answer, 1) for name, answer in answers.items()}, rounds)
        batch = turns({name: partial(answer, QUERIES) for name, answer in answers.items() if n <= BATCHES}, 1)
        table = Table(
            "", "1 query, ms", "ratio", f"{QUERIES} queries, ms each", "ratio", f"recall@{K}", "loading, s",
            title=f"{n:,} references",
        )  # fmt: skip
        for name, answer in answers.items():
            table.add_row(
                name,
                f"{1e3 * np.median(one[name]):.2f}",
                f"{np.median(one[name] / one['Lineup']):.1f}",
                f"{1e3 * np.median(batch[name]) / QUERIES:.2f}" if batch else "-",
                f"{np.median(batch[name] / batch['Lineup']):.1f}" if batch else "-",
                f"{recall(np.array(answer(QUERIES)), exact):.4f}",
                "kept" if np.isnan(loading[name]) else f"{loading[name]:.0f}",
            )
    Console(width=120, highlight=False).print(table)


def pgvector(
    connection: psycopg.Connection[Any], vectors: np.ndarray, queries: np.ndarray, graph: bool
) -> tuple[Answer, float]:
    """Search by pgvector, and the seconds that loading took, NaN where the table was there (it is named by size)."""
    start = time.perf_counter()
    connection.autocommit = True
    connection.execute("create extension if not exists vector")
    table = f"{'hnsw' if graph else 'exact'}_{len(vectors)}"
    kept = connection.execute("select to_regclass(%s)", [table]).fetchone() != (None,)
    if not kept:
        with connection.transaction(), connection.cursor() as cursor:
            cursor.execute(f"create table {table} (id bigint, embedding vector({DIM}))")
            with cursor.copy(f"copy {table} from stdin (format binary)") as copy:
                copy.write(b"PGCOPY\n\xff\r\n\0" + bytes(8))
                for first in range(0, len(vectors), 10_000):
                    copy.write(_rows(first, vectors[first : first + 10_000]))
                copy.write(b"\xff\xff")
            if graph:
                cursor.execute("set local maintenance_work_mem = '2GB'")
                cursor.execute(f"create index on {table} using hnsw (embedding vector_cosine_ops)")
        connection.execute(f"vacuum analyze {table}")
    connection.execute(f"set hnsw.ef_search = {EF}")
    texts = [f"[{','.join(map(str, query))}]" for query in queries.tolist()]
    query: Any = NEAREST.format(table=table)

    def answer(q: int) -> list[list[int]]:
        found = [connection.execute(query, [one, K], prepare=True).fetchall() for one in texts[:q]]
        return [[number for (number,) in rows] for rows in found]

    return answer, float("nan") if kept else time.perf_counter() - start


def _rows(first: int, vectors: np.ndarray) -> bytes:
    """Rows of (id, vector) in PostgreSQL's binary form."""
    size = 4 + 4 * DIM
    kinds = [("columns", ">i2"), ("a", ">i4"), ("id", ">i8"), ("b", ">i4"), ("dim", ">i2"), ("none", ">i2")]
    rows = np.zeros(len(vectors), [*kinds, ("vector", ">f4", DIM)])
    rows["columns"], rows["a"], rows["b"], rows["dim"] = 2, 8, size, DIM
    rows["id"], rows["vector"] = first + np.arange(len(vectors)), vectors
    return rows.tobytes()


@contextmanager
def milvus_lite(
    python: str, kind: str, vectors: np.ndarray, queries: np.ndarray, home: Path
) -> Iterator[tuple[Answer, float]]:
    """Search by Milvus Lite in another process, and the seconds that loading took, NaN where it was there."""
    with tempfile.TemporaryDirectory(prefix="lineup-") as folder:
        files = [str(Path(folder) / "vectors.npy"), str(Path(folder) / "queries.npy")]
        for file, array in zip(files, (vectors, queries), strict=True):
            np.save(file, array)
        program = str(Path(__file__).with_name("milvus_lite.py"))
        arguments = [python, program, *files, kind, str(K), str(home / "milvus")]
        with subprocess.Popen(
            arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            given, taken = process.stdin, process.stdout

            def reply() -> dict[str, Any]:
                line = taken.readline()
                if not line:
                    raise RuntimeError(f"Milvus Lite ended with {process.wait()}: run {' '.join(arguments)}")
                answer: dict[str, Any] = json.loads(line)
                return answer

            def answer(q: int) -> list[list[int]]:
                print(q, file=given, flush=True)
                ids: list[list[int]] = reply()["ids"]
                return ids

            yield answer, reply()["seconds"]
            with contextlib.suppress(BrokenPipeError):
                given.close()


if __name__ == "__main__":
    main()
