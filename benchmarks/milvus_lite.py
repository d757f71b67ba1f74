"""Milvus Lite for `benchmarks.peers`, in an environment of its own: its wheels and FAISS's overwrite each other.

    python benchmarks/milvus_lite.py VECTORS.npy QUERIES.npy KIND K FOLDER

Loads the vectors, unless the folder has them from an earlier call, and prints how long that took (NaN where it has).
Then answers each line "SIZE" (how many queries) with the seconds that the search took and the ids that it found, as
JSON.
"""

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

INSERT = 10_000
PARAMETERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "FLAT": ({}, {}),
    "HNSW": ({"M": 16, "efConstruction": 64}, {"ef": 400}),
}


def main(vectors_file: str, queries_file: str, kind: str, k: str, folder: str) -> None:
    """Serve until the input ends."""
    from pymilvus import DataType, MilvusClient

    vectors, queries = np.load(vectors_file, mmap_mode="r"), np.load(queries_file)
    build, search = PARAMETERS[kind]
    start = time.perf_counter()
    Path(folder).mkdir(parents=True, exist_ok=True)
    client = MilvusClient(str(Path(folder) / f"{kind}-{len(vectors)}.db"))
    kept = client.has_collection("peers")
    if not kept:
        schema = client.create_schema(auto_id=False)
        schema.add_field("id", DataType.INT64, is_primary=True)
        schema.add_field("vector", DataType.FLOAT_VECTOR, dim=vectors.shape[1])
        client.create_collection("peers", schema=schema)
        for first in range(0, len(vectors), INSERT):
            part = vectors[first : first + INSERT].tolist()
            client.insert("peers", [{"id": first + i, "vector": vector} for i, vector in enumerate(part)])
        client.flush("peers")
        index = client.prepare_index_params()
        index.add_index("vector", index_type=kind, metric_type="IP", params=build)
        client.create_index("peers", index)
    client.load_collection("peers")
    print(json.dumps({"seconds": math.nan if kept else time.perf_counter() - start}), flush=True)
    for line in sys.stdin:
        asked = queries[: int(line)]
        start = time.perf_counter()
        hits = client.search("peers", asked, limit=int(k), search_params={"metric_type": "IP", "params": search})
        took = time.perf_counter() - start
        print(json.dumps({"seconds": took, "ids": [[hit["id"] for hit in row] for row in hits]}), flush=True)
    client.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
