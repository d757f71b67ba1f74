"""Search time, recall and memory of the index beside plain FAISS and scikit-learn; ratios of one run.

Times on a busy machine are rough, therefore all searches of a table take turns, and a ratio is the median of the
ratios of the turns. Vectors are simulated: 200 clusters of 24 inner dimensions, as embeddings have.

    python -m benchmarks.search --sizes 50000,1000000
    python -m benchmarks.search --sizes 5000000 --alone
    python -m benchmarks.search --sizes 50000,100000,200000,500000,1000000 --lists
"""

import argparse
import ctypes
import gc
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import faiss
import numpy as np
import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.targets import Target
from indexer.index import growing
from indexer.index.inverted import Inverted
from indexer.index.vector_index import VectorIndex

DIM, K = 192, 20
QUERIES = 32


def embeddings(n: int, seed: int) -> np.ndarray:
    """Simulated embeddings of unit length, shape (n, DIM), float32."""
    x = np.empty((n, DIM), np.float32)
    for first, block in blocks(n, seed):
        x[first : first + len(block)] = block
    return x


def blocks(n: int, seed: int) -> Iterator[tuple[int, np.ndarray]]:
    """The same in parts: row of the first, shape (m, DIM)."""
    fixed, rng = np.random.default_rng(0), np.random.default_rng(seed)
    centres = fixed.standard_normal((200, DIM), dtype=np.float32)
    basis = fixed.standard_normal((24, DIM), dtype=np.float32)
    for first in range(0, n, 100_000):
        m = min(100_000, n - first)
        inner = rng.standard_normal((m, 24), dtype=np.float32) @ basis  # (m, DIM)
        noise = rng.standard_normal((m, DIM), dtype=np.float32)
        x = centres[rng.integers(0, 200, m)] + 0.2 * inner + 0.3 * noise  # (m, DIM)
        yield first, x / np.linalg.norm(x, axis=1, keepdims=True)


def turns(searches: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, np.ndarray]:
    """Seconds of each search in each round, after one round that does not count.

    The order changes, and a turn is the best of three calls, after a pause: the one before leaves its caches, and
    threads (OpenBLAS's) that spin on the cores for some 30 ms in wait of more work.
    """
    seconds: dict[str, list[float]] = {name: [] for name in searches}
    rng = np.random.default_rng(0)
    for _ in range(rounds + 1):
        for name in rng.permutation(list(searches)).tolist():
            calls = []
            time.sleep(0.05)
            for _ in range(3):
                start = time.perf_counter()
                searches[name]()
                calls.append(time.perf_counter() - start)
            seconds[name].append(min(calls))
    return {name: np.array(values[1:]) for name, values in seconds.items()}


def recall(found: np.ndarray, exact: np.ndarray) -> float:
    """Share of the exact neighbours that were found."""
    return float(np.mean([len(set(a) & set(b)) / len(b) for a, b in zip(found.tolist(), exact.tolist(), strict=True)]))


def built(n: int, real: float = 0.5, device: str = "cpu") -> tuple[VectorIndex, float]:
    """The index as a follower fills it, part by part, and the bytes of resident memory for each reference."""
    rng = np.random.default_rng(1)
    labels = np.where(rng.random(n) < real, 0, 1)
    generators = np.where(labels == 1, rng.choice([1, 2, 3, 4], n, p=[0.9, 0.079, 0.001, 0.02]), -1)
    sources = rng.integers(0, 2, n)
    before = resident()
    index = VectorIndex(DIM, device)
    for first, vectors in blocks(n, 1):
        part = slice(first, first + len(vectors))
        index.add(first + np.arange(len(vectors)), vectors, labels[part], generators[part], sources[part])
    return index, (resident() - before) / n


def resident() -> int:
    """Bytes of resident memory that are in use; what was freed is given back first."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return int(psutil.Process().memory_info().rss)


def compare(n: int, rounds: int, alone: bool, console: Console) -> list[Target]:
    """Print the tables of one size, with others beside us or not; what is wanted of them."""
    queries = embeddings(QUERIES, 2)
    index, memory = built(n)
    answers: dict[str, Callable[[np.ndarray], np.ndarray]] = {"Lineup": lambda q: index.search(q, K).ids}
    if not alone:
        from sklearn.neighbors import NearestNeighbors

        vectors = embeddings(n, 1)
        bare = faiss.IndexScalarQuantizer(DIM, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)
        bare.add(vectors)
        flat = faiss.IndexFlatIP(DIM)
        flat.add(vectors)
        brute = NearestNeighbors(n_neighbors=K, algorithm="brute", metric="cosine").fit(vectors)
        answers |= {
            "faiss fp16, the bare call": lambda q: bare.search(q, K)[1],
            "faiss.IndexFlatIP": lambda q: flat.search(q, K)[1],
            "scikit-learn brute force": lambda q: brute.kneighbors(q, return_distance=False),
        }
    base = list(answers)[0 if alone else 1]
    exact = list(answers.values())[0 if alone else 2](queries)
    lists, _ = built(n)
    if lists.grow():
        engines = [one.engine for one in lists._labels if isinstance(one.engine, Inverted)]
        answers["Lineup, lists"] = lambda q: lists.search(q, K).ids
        answers["faiss lists, the bare calls"] = lambda q: bare_lists(engines, q)
    one = turns({name: partial(answer, queries[:1]) for name, answer in answers.items()}, rounds)
    batch = turns({name: partial(answer, queries) for name, answer in answers.items()}, max(2, rounds // 4))
    table = Table(
        "", "1 query, ms", "ratio", f"{QUERIES} queries, ms each", "ratio", f"recall@{K}", title=f"{n:,} references"
    )
    for name, answer in answers.items():
        table.add_row(
            name,
            f"{1e3 * np.median(one[name]):.2f}",
            f"{np.median(one[name] / one[base]):.2f}",
            f"{1e3 * np.median(batch[name]) / QUERIES:.2f}",
            f"{np.median(batch[name] / batch[base]):.2f}",
            "-" if name == "faiss lists, the bare calls" else f"{recall(answer(queries), exact):.4f}",
        )
    console.print(table)
    console.print(f"memory {memory:.0f} bytes per reference\n")
    filtered, slowest = filters(index, queries[:1], n, rounds)
    console.print(filtered)
    targets = [Target(f"filters over {n:,}, flat, times the plain search", slowest, 4, True)]
    if not alone:
        for name, times in (("1 query", one), (f"{QUERIES} queries", batch)):
            longer = float(np.median(times["Lineup"] / times[base]))
            targets.append(Target(f"{name} among {n:,}, times the bare call", longer, 1.2, True))
    if "Lineup, lists" in answers:
        filtered, slowest = filters(lists, queries[:1], n, rounds)
        console.print(f"\nlists: kept recall {lists.recall:.4f}", filtered)
        targets += [
            Target(f"recall@{K} of lists of {n:,}", recall(answers["Lineup, lists"](queries), exact), 0.99),
            Target(f"filters over {n:,}, lists, times the plain search", slowest, 4, True),
        ]
    return targets


def bare_lists(engines: Sequence[Inverted], queries: np.ndarray) -> np.ndarray:
    """FAISS's part of a search in lists: rows of each label one after the other, shape (q, 2 K)."""
    return np.hstack([engine._search(queries, K, None, engine.nprobe)[1] for engine in engines])


def lists(n: int, rounds: int, console: Console) -> list[str]:
    """A row on one label of n references, searched flat and through inverted lists; prints the latter's filters."""
    queries, fresh = embeddings(8, 2), embeddings(256, 3)
    flat, _ = built(n, real=0)
    inverted, _ = built(n, real=0)
    growing.LARGE = 1
    start = time.perf_counter()
    moved = inverted.grow()
    took = time.perf_counter() - start
    seconds = turns(
        {
            name: lambda index=index: [index.search(query[None], K) for query in queries]  # type: ignore[misc]
            for name, index in (("flat", flat), ("lists", inverted))
        },
        rounds,
    )
    console.print(filters(inverted, queries[:1], n, rounds)[0], f"{n:,}, {inverted.kind}")
    engine = inverted._labels[1].engine
    looked = f"{engine.nprobe} of {len(engine.centroids)}" if isinstance(engine, Inverted) else "all"
    return [
        f"{n:,}",
        *(f"{1e3 * np.median(seconds[name]) / len(queries):.2f}" for name in ("flat", "lists")),
        f"{np.median(seconds['flat'] / seconds['lists']):.1f}" if moved else "-",
        looked,
        f"{inverted.recall:.4f}",
        f"{recall(inverted.search(fresh, K).ids, flat.search(fresh, K).ids):.4f}",
        f"{took:.0f}",
    ]


def filters(index: VectorIndex, query: np.ndarray, n: int, rounds: int) -> tuple[Table, float]:
    """How long filtered searches take beside the plain one, and how many times as long the slowest filter."""
    some = np.random.default_rng(3).choice(n, 1_000, replace=False)
    searches: dict[str, Callable[[], object]] = {
        "none": lambda: index.search(query, K),
        "label": lambda: index.search(query, K, label=1),
        "source, one half": lambda: index.search(query, K, source=1),
        "generator, 45 %": lambda: index.search(query, K, generator=1),
        "generator, 4 %": lambda: index.search(query, K, generator=2),
        "generator, 1 %": lambda: index.search(query, K, generator=4),
        "generator, 0.05 %": lambda: index.search(query, K, generator=3),
        "both labels, 20 each": lambda: index.search_both(query, (K, K)),
        "both labels, without 1,000 ids": lambda: index.search_both(query, (K, K), exclude_ids=some),
        "both labels, without 10 for this query": lambda: index.search_both(query, (K, K), exclude_each=[some[:10]]),
    }
    seconds = turns(searches, rounds)
    table = Table("filter", "ms", "times the plain search")
    for name, values in seconds.items():
        table.add_row(name, f"{1e3 * np.median(values):.2f}", f"{np.median(values / seconds['none']):.2f}")
    return table, max(float(np.median(values / seconds["none"])) for values in seconds.values())


def main(arguments: Sequence[str] = ()) -> list[Target]:
    """Print the tables of each size; what is wanted of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="50000,1000000", help="comma list of reference counts")
    parser.add_argument("--rounds", type=int, default=31, help="timed turns; a quarter above 100,000")
    parser.add_argument("--alone", action="store_true", help="without FAISS and scikit-learn beside it")
    parser.add_argument("--lists", action="store_true", help="flat search beside inverted lists, of one label")
    options = parser.parse_args(arguments)
    console = Console(width=120, highlight=False)
    faiss.omp_set_num_threads(faiss.omp_get_max_threads())
    table = Table("one label", "flat, ms", "lists, ms", "ratio", "looks into", "recall, kept", "fresh", "making, s")
    targets: list[Target] = []
    for size in map(int, options.sizes.split(",")):
        rounds = options.rounds if size <= 100_000 else -(-options.rounds // 4)
        if options.lists:
            table.add_row(*lists(size, rounds, console))
        else:
            targets += compare(size, rounds, options.alone, console)
    if options.lists:
        console.print(table)
    return targets


if __name__ == "__main__":
    main(sys.argv[1:])
