"""The map of the references: principal components, and later references by the same projection."""

from collections.abc import Iterator

import numpy as np
import pytest
from numbered import CHECKPOINT, add, opened, vector
from sklearn.decomposition import PCA

from indexer.measure import reference_map
from indexer.measure.reference_map import ReferenceMap, draw_map
from indexer.settings import Settings
from indexer.store import Store
from indexer.store.relabelling import Kind


@pytest.fixture
def store(settings: Settings) -> Iterator[Store]:
    store = opened(settings)
    yield store
    store.engine.dispose()


def directions(*numbers: int) -> np.ndarray:
    vectors = np.stack([vector(number) for number in numbers])  # (n, d)
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))


def place(drawn: ReferenceMap, image_id: int) -> np.ndarray:
    [row] = np.flatnonzero(drawn.ids == image_id)
    return np.asarray(drawn.places[row])


def test_the_axes_are_principal_components_and_later_references_follow_them(store: Store) -> None:
    assert draw_map(store, CHECKPOINT).ids.tolist() == []
    two = add(store, 1, 2)
    assert draw_map(store, CHECKPOINT).projection is None  # two points have no second axis
    ids = two + add(store, *range(3, 21), generator="gen-a")
    drawn = draw_map(store, CHECKPOINT)
    oracle = PCA(2).fit(directions(*range(1, 21)))
    expected = oracle.transform(directions(*range(1, 21)))  # (20, 2)
    assert drawn.projection
    assert drawn.projection.explained == pytest.approx(oracle.explained_variance_ratio_, rel=1e-4)
    flips = np.sign(place(drawn, ids[0]) * expected[0])
    for number, image_id in enumerate(ids):
        np.testing.assert_allclose(place(drawn, image_id), flips * expected[number], atol=1e-5)
    assert drawn.revision == store.checkpoints.revision(CHECKPOINT)
    assert sorted(drawn.labels.tolist()) == [0] * 2 + [1] * 18

    [later] = add(store, 21)
    relabelled = store.references.relabel(Kind(1, "gen-b"), ids=[ids[4]]).ids
    store.references.remove(ids=[ids[7]])
    again = draw_map(store, CHECKPOINT, drawn)
    assert again.projection is drawn.projection
    np.testing.assert_allclose(place(again, later), flips * oracle.transform(directions(21))[0], atol=1e-5)
    np.testing.assert_array_equal(place(again, relabelled[ids[4]]), place(drawn, ids[4]))
    assert set(again.ids.tolist()) == {*ids, later, relabelled[ids[4]]} - {ids[4], ids[7]}
    names = store.generators.names()
    [moved] = np.flatnonzero(again.ids == relabelled[ids[4]])
    assert names[int(again.generators[moved])] == "gen-b"


def test_an_outgrown_map_finds_its_axes_anew_and_one_of_another_checkpoint_counts_for_nothing(store: Store) -> None:
    add(store, *range(10))
    drawn = draw_map(store, CHECKPOINT)
    store.checkpoints.register("e" * 32, "other", 6, {})
    assert draw_map(store, "e" * 32, drawn).ids.tolist() == []
    add(store, *range(10, 21))
    grown = draw_map(store, CHECKPOINT, drawn)
    assert grown.projection
    assert grown.projection.references == 21
    np.testing.assert_allclose(grown.places, draw_map(store, CHECKPOINT).places, atol=1e-5)


def test_axes_of_a_few_pages_are_outgrown_too(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference_map, "PAGE", 2)
    monkeypatch.setattr(reference_map, "FITTED_PAGES", 4)
    add(store, *range(10))
    drawn = draw_map(store, CHECKPOINT)
    assert drawn.projection
    assert drawn.projection.references == 10
    add(store, *range(10, 20))
    assert draw_map(store, CHECKPOINT, drawn).projection is drawn.projection
    add(store, 20)
    assert draw_map(store, CHECKPOINT, drawn).projection is not drawn.projection


def test_of_many_references_the_same_ones_are_drawn_each_time(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference_map, "MOST_POINTS", 8)
    monkeypatch.setattr(reference_map, "PAGE", 3)
    add(store, *range(20))
    drawn = draw_map(store, CHECKPOINT)
    assert len(drawn.ids) == 8
    assert draw_map(store, CHECKPOINT).ids.tolist() == drawn.ids.tolist()


def test_a_summary_has_whole_numbers_in_one_unit_for_both_axes() -> None:
    places = np.array([[-1, 4], [1, 5], [0, 4.5]], np.float32)
    kinds, generators = np.array([1, 0, 1], np.int8), np.array([7, -1, 7])
    drawn = ReferenceMap("c" * 32, 3, np.array([11, 12, 13]), kinds, generators, places, None)
    summary = drawn.summary({7: "gen-a"})
    assert summary["kinds"] == [{"label": "real", "generator": None}, {"label": "fake", "generator": "gen-a"}]
    assert (summary["id"], summary["kind"]) == ([11, 12, 13], [1, 0, 1])
    assert (summary["x"], summary["y"]) == ([0, 9999, 5000], [0, 5000, 2500])
    none = np.empty(0, int)
    nothing = ReferenceMap("c" * 32, 0, none, none, none, np.empty((0, 2), np.float32), None)
    assert nothing.summary({}) == {"kinds": [], "id": [], "kind": [], "x": [], "y": []}
