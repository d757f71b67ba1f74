"""What a search costs in Milvus, and how soon it sees what is committed, beside the index in memory.

Rows are simulated (`benchmarks.growth.fill`) in an embedded database, and shipped to an engine of their own: the server
of `pip install milvus` will do, in another environment, and `pip install pymilvus` in this one.

    python -m benchmarks.milvus_search --index milvus+http://localhost:19530 --sizes 200000
"""

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.growth import CHECKPOINT, applied, fill, following, seconds, writer
from benchmarks.search import DIM, K, embeddings, recall
from indexer.database.connection import connect
from indexer.database.embedded import EmbeddedServer
from indexer.follower import POLL, Follower
from indexer.settings import Settings
from indexer.store import Store
from trainer.heads.vote import vote

BATCH = 256
SAME = 0.05
"""Difference of the vote's score up to which two verdicts by it cannot differ but at a threshold."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Print what was measured at each size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--index", required=True, help="as LINEUP_INDEX")
    parser.add_argument("--sizes", default="200000", help="comma list of reference counts, ascending")
    parser.add_argument("--home", type=Path, help="folder that is kept; a temporary one otherwise")
    parser.add_argument("--rounds", type=int, default=9, help="timed turns")
    options = parser.parse_args(arguments)
    home = options.home or Path(tempfile.mkdtemp(prefix="lineup-"))
    settings = Settings(home=home, database_url=None)
    store = Store(connect(settings))
    store.checkpoints.register(CHECKPOINT, "simulated", DIM, {})
    try:
        for size in map(int, options.sizes.split(",")):
            fill(store, size)
            table = Table("", "", title=f"{size:,} references")
            for name, value in measure(settings, options.index, store, options.rounds).items():
                table.add_row(name, f"{value:.4g}")
            Console(width=120, highlight=False).print(table)
    finally:
        store.engine.dispose()
        EmbeddedServer(home).stop()
        if options.home is None:
            shutil.rmtree(home)


def measure(settings: Settings, index: str, store: Store, rounds: int) -> dict[str, float]:
    """Everything at the present size."""
    memory = following(settings, store)
    memory.load()
    engine = following(settings.model_copy(update={"index": index}), store)
    row = {"loading a new collection, s": seconds(lambda: engine.load(anew=True))}
    row["references"] = len(engine.index)
    row["start of another process, s"] = seconds(lambda: following(engine.settings, store).load())
    queries = embeddings(BATCH, 2)
    row |= searches(engine, memory, queries, rounds)
    row |= {f"in memory: {name}": value for name, value in searches(memory, memory, queries, rounds).items()}
    row["votes with the same answer, %"] = 100 * agreement(engine, memory, queries)
    return row | freshness(engine, rounds)


def searches(follower: Follower, exact: Follower, queries: np.ndarray, rounds: int) -> dict[str, float]:
    """Milliseconds of searches, and the share of the exact neighbours that they find."""
    index = follower.index
    nearest = exact.index.search(queries, K).ids
    excluded = [ids[:5] for ids in nearest]
    many = np.unique(exact.index.search(queries, 50).ids)[:1_000]

    def ms(work: Callable[[], object], turns: int = rounds) -> float:
        work()
        return 1e3 * median(seconds(work) for _ in range(turns))

    by_generator = exact.index.search(queries, K, generator=2).ids
    return {
        "both labels, 1 query, ms": ms(lambda: index.search_both(queries[:1], (K, K))),
        f"both labels, {BATCH} queries, ms each": ms(lambda: index.search_both(queries, (K, K)), 3) / BATCH,
        "10 % of the references by a filter, 1 query, ms": ms(lambda: index.search(queries[:1], K, generator=2)),
        "5 excluded for each query, 1 query, ms": ms(
            lambda: index.search_both(queries[:1], (K, K), exclude_each=excluded[:1])
        ),
        f"{len(many):,} excluded for all, 1 query, ms": ms(
            lambda: index.search_both(queries[:1], (K, K), exclude_ids=many)
        ),
        f"recall@{K}": recall(index.search(queries, K).ids, nearest),
        f"recall@{K} by a filter": recall(index.search(queries, K, generator=2).ids, by_generator),
    }


def agreement(follower: Follower, exact: Follower, queries: np.ndarray) -> float:
    """The share of queries on which the votes of both say the same label with nearly the same score."""
    scores = []
    for one in (follower, exact):
        real, fake = one.voters(queries, 10)
        scores.append(vote(real.similarities, fake.similarities, fake.generators, 10).score)
    same = ((scores[0] > 0.5) == (scores[1] > 0.5)) & (np.abs(scores[0] - scores[1]) < SAME)
    return float(same.mean())


def freshness(follower: Follower, rounds: int) -> dict[str, float]:
    """Milliseconds from a commit in another process until this one's searches see it."""
    query = embeddings(1, 7)
    follower.start()  # it ships, as no other process does
    times: dict[str, list[float]] = {}
    with writer(Settings(home=follower.settings.home, database_url=None)) as write:
        time.sleep(2 * POLL)  # until it leads
        for turn in range(rounds):
            for name, command in (("1 reference", f"add 1 {turn}"), ("256 references", f"add 256 {turn}")):
                revision, _, done = write(command)
                published = applied(follower, revision) - done
                follower.index.search(query, 1)
                times.setdefault(f"commit to published, {name}, ms", []).append(1e3 * published)
                times.setdefault(f"commit to the first answer, {name}, ms", []).append(1e3 * (time.monotonic() - done))
            write("remove")
    follower.stop()
    return {name: median(values) for name, values in times.items()} | {
        "commit to the first answer at worst, ms": max(
            value for name, values in times.items() if "answer" in name for value in values
        )
    }


if __name__ == "__main__":
    main()
