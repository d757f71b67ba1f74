"""Which references an image must not be compared with when something is measured: those too close to be evidence."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import faiss
import numpy as np
from sqlalchemy import text

from indexer.database.tables import FINGERPRINT_BANDS
from indexer.index.engine import use_threads_for
from indexer.store import Store
from indexer.store.changes import unpacked
from indexer.store.reference_facts import NEAR_BITS

FINGERPRINTS_AT_ONCE = 100_000
READ_PER_LOOKUP = 200
"""References whose fingerprints are read in the time, 0.3 ms, in which those similar to one image are looked up."""

# Two look-ups, each by its own index.
SAME_GROUP_OR_BYTES = text("""
select id, "group", encode(sha256, 'hex') as sha256, fingerprint from reference_image where sha256 = any(:hashes)
union
select id, "group", encode(sha256, 'hex') as sha256, fingerprint from reference_image
where "group" in (select unnest(cast(:groups as text[])))
""")
BAND_RADII = (1, 1, 0)
"""Bits in which bands of near duplicates differ: of `NEAR_BITS` = 4, two in the first and two in the second band leave
none for the third."""
# Keys are made there, and rows come packed, some of them twice: sending, sorting and reading them would take longer.
KEYS = """select (image & cast({band} as bigint)) # flip
    from (select unnest(cast(:images as bigint[])) as image) images
    cross join (select unnest(cast(:flips_{number} as bigint[])) as flip) flips"""
CANDIDATES = text(
    "select string_agg(int8send(id), ''), string_agg(int8send(fingerprint), '') from ("
    + " union all ".join(
        f"select id, fingerprint from reference_image where nullif(fingerprint, 0) & cast({band} as bigint)"
        f" = any(array({KEYS.format(band=band, number=number)}))"
        for number, band in enumerate(FINGERPRINT_BANDS)
    )
    + ") candidates"
)
FINGERPRINTS = text("""
select string_agg(int8send(id), ''), string_agg(int8send(fingerprint), ''), max(id), count(*) from (
    select id, fingerprint from reference_image where id > :after and fingerprint is not null order by id limit :page
) page
""")


def related_references(store: Store, sha256: Sequence[str], groups: Sequence[str]) -> list[np.ndarray]:
    """For each of n images, the ids of references of its group, with its bytes, or that are near duplicates of it.

    Near duplicates are found for images that are references themselves: for others there is no fingerprint to compare.

    Args:
        store: The references.
        sha256: Hashes of the images' bytes, hexadecimal.
        groups: The images' groups.

    Returns:
        n arrays of ids, int64.
    """
    by_group: dict[str, set[int]] = defaultdict(set)
    by_hash: dict[str, set[int]] = defaultdict(set)
    fingerprint: dict[str, int] = {}
    values: dict[str, Any] = {"groups": list(set(groups)), "hashes": [bytes.fromhex(one) for one in set(sha256)]}
    with store.engine.connect() as connection:
        for row in connection.execute(SAME_GROUP_OR_BYTES, values):
            by_group[row.group].add(row.id)
            by_hash[row.sha256].add(row.id)
            if row.fingerprint is not None:
                fingerprint[row.sha256] = row.fingerprint
    related = [by_group[group] | by_hash[digest] for digest, group in zip(sha256, groups, strict=True)]
    known = [number for number, digest in enumerate(sha256) if digest in fingerprint]
    if known:
        images = np.array([fingerprint[sha256[number]] for number in known])
        few = sum(store.references.counts().values()) < READ_PER_LOOKUP * len(images)
        ids, fingerprints = all_fingerprints(store) if few else similar_fingerprints(store, images)
        for reference, image, _ in near_duplicates(fingerprints, images).tolist():
            related[known[image]].add(int(ids[reference]))
    return [np.array(sorted(one), np.int64) for one in related]


def similar_fingerprints(store: Store, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ids and fingerprints of the references that may be near duplicates of images, and of few others.

    Each of several parts of a code has an index (Norouzi et al., "Fast exact search in Hamming space with multi-index
    hashing", 2014), and thresholds add up to `NEAR_BITS` + 1 - parts (Qin et al., "GPH: similarity search in Hamming
    space", 2018). Of a million pictures that finds about 90 for each image.

    Args:
        store: The references.
        images: Fingerprints, shape (m,), int64; those that are 0, of flat pictures, find nothing.

    Returns:
        Both shape (n,), int64; a reference comes up to three times.
    """
    bands = zip(FINGERPRINT_BANDS, BAND_RADII, strict=True)
    values = {f"flips_{number}": _flips(band, radius) for number, (band, radius) in enumerate(bands)}
    with store.engine.connect() as connection:
        ids, fingerprints = connection.execute(CANDIDATES, values | {"images": images[images != 0].tolist()}).one()
    return unpacked(ids), unpacked(fingerprints)


def all_fingerprints(store: Store) -> tuple[np.ndarray, np.ndarray]:
    """Ids and fingerprints of all references that have one, both shape (n,), int64."""
    ids, fingerprints = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    after, count = 0, FINGERPRINTS_AT_ONCE
    with store.engine.connect() as connection:
        while count == FINGERPRINTS_AT_ONCE:
            place = {"after": after, "page": FINGERPRINTS_AT_ONCE}
            page_ids, page, after, count = connection.execute(FINGERPRINTS, place).one()
            ids.append(unpacked(page_ids))
            fingerprints.append(unpacked(page))
    return np.concatenate(ids), np.concatenate(fingerprints)


def near_duplicates(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Pairs of fingerprints that differ in at most `NEAR_BITS` bits, flat pictures left out (their fingerprint is 0).

    Of five parts of 12 bits at least one is untouched by four changed bits: FAISS's multi-hash finds every pair.

    Args:
        one: Fingerprints, shape (n,), int64; the longer list.
        other: Fingerprints, shape (m,), int64.

    Returns:
        Row in one, row in other and bits that differ, shape (pairs, 3), int64, in that order.
    """
    rows, other_rows = np.flatnonzero(one), np.flatnonzero(other)
    if not len(rows) or not len(other_rows):
        return np.empty((0, 3), np.int64)
    table = faiss.IndexBinaryMultiHash(64, NEAR_BITS + 1, 64 // (NEAR_BITS + 1))
    table.add(_bytes(other[other_rows]))
    use_threads_for(1)
    limits, bits, near = table.range_search(_bytes(one[rows]), NEAR_BITS + 1)  # nearer than that
    pairs = [np.repeat(rows, np.diff(limits.astype(np.int64))), other_rows[near], bits.astype(np.int64)]
    unique: np.ndarray = np.unique(np.stack(pairs, axis=1), axis=0)  # (pairs, 3)
    return unique


def _flips(band: int, radius: int) -> list[int]:
    """What changes at most `radius` bits, 0 or 1, of a band, as signed masks."""
    bits = [bit for bit in range(64) if band >> bit & 1] if radius else []
    masks: list[int] = np.array([0, *(1 << bit for bit in bits)], np.uint64).view(np.int64).tolist()
    return masks


def _bytes(fingerprints: np.ndarray) -> np.ndarray:
    """Shape (n, 8), uint8."""
    data: np.ndarray = np.ascontiguousarray(fingerprints, np.int64).view(np.uint8).reshape(-1, 8)
    return data
