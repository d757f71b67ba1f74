"""Parts of a data set are disjoint and together whole, and a scheduler's variables name them."""

from collections import Counter
from pathlib import Path

import pytest
from archives import make_tar

from trainer.data.datasets import read_dataset
from trainer.data.entry import DatasetError
from trainer.data.parts import WHOLE, DatasetPart


def uris(path: Path, part: DatasetPart) -> list[str]:
    return [entry.uri for entry in read_dataset(path, part=part)]


@pytest.mark.parametrize("count", [2, 3, 7])
def test_parts_of_folders_and_few_shards_share_the_images(image_folder: Path, tmp_path: Path, count: int) -> None:
    make_tar(tmp_path / "few/0.tar", {f"{name}.{kind}.png": b"x" for name in "abcdefgh" for kind in ("real", "gen_0")})
    for path in (image_folder, tmp_path / "few"):
        whole = [entry.uri for entry in read_dataset(path)]
        parts = [uris(path, DatasetPart(number, count)) for number in range(1, count + 1)]
        assert Counter(uri for part in parts for uri in part) == Counter(whole)
        assert max(map(len, parts)) < len(whole)


def test_parts_of_many_shards_are_whole_shards(tmp_path: Path) -> None:
    for shard in range(5):
        make_tar(tmp_path / f"{shard}.tar", {f"{shard}-{name}.real.png": b"x" for name in "ab"})
    parts = [uris(tmp_path, DatasetPart(number, 2)) for number in (1, 2)]
    shards = [sorted({uri.partition("#")[0].rpartition("/")[2] for uri in part}) for part in parts]
    assert shards == [["0.tar", "2.tar", "4.tar"], ["1.tar", "3.tar"]]
    assert list(map(len, parts)) == [6, 4]


def test_a_part_does_not_depend_on_what_came_later(image_folder: Path, tmp_path: Path) -> None:
    names = sorted(path.name for path in (image_folder / "real").iterdir())
    for name in names[::2]:
        (tmp_path / "real").mkdir(exist_ok=True)
        (tmp_path / "real" / name).write_bytes((image_folder / "real" / name).read_bytes())
    before = uris(tmp_path, DatasetPart(1, 2))
    for name in names[1::2]:
        (tmp_path / "real" / name).write_bytes((image_folder / "real" / name).read_bytes())
    assert set(before) < set(uris(tmp_path, DatasetPart(1, 2)))


def test_a_part_may_be_empty(tmp_path: Path) -> None:
    make_tar(tmp_path / "0.tar", {"a.real.png": b"x"})
    assert sorted(len(uris(tmp_path, DatasetPart(number, 3))) for number in (1, 2, 3)) == [0, 0, 1]


def test_a_part_of_nothing_is_refused_as_the_whole_is(image_folder: Path) -> None:
    for part in (WHOLE, DatasetPart(1, 2), DatasetPart(2, 2)):
        with pytest.raises(DatasetError, match="no images of split tset"):
            read_dataset(image_folder, split="tset", part=part)


@pytest.mark.parametrize("text", ["0/4", "5/4", "1/0", "-1/4", "1", "1/4/2", "a/b", ""])
def test_what_is_no_part_is_one_clear_line(text: str) -> None:
    with pytest.raises(DatasetError, match=r"expected I/N with I from 1 to N, or auto: set --part") as error:
        DatasetPart.parse(text, {})
    assert repr(text) in str(error.value)


def slurm(task: int, first: int, step: int, count: int) -> dict[str, str]:
    values = {"ID": task, "MIN": first, "STEP": step, "COUNT": count}
    return {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in values.items()}


@pytest.mark.parametrize(
    ("environment", "part"),
    [
        (slurm(0, 0, 1, 8), (1, 8)),
        (slurm(8, 1, 1, 8), (8, 8)),
        (slurm(14, 10, 2, 4), (3, 4)),
        ({"JOB_COMPLETION_INDEX": "0", "JOB_COMPLETIONS": "3"}, (1, 3)),
        ({"JOB_COMPLETION_INDEX": "2", "JOB_COMPLETIONS": "3"}, (3, 3)),
    ],
)
def test_a_scheduler_names_the_part(environment: dict[str, str], part: tuple[int, int]) -> None:
    assert DatasetPart.parse("auto", environment) == DatasetPart(*part)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({}, "'JOB_COMPLETION_INDEX' is not set"),
        ({"JOB_COMPLETION_INDEX": "0"}, "'JOB_COMPLETIONS' is not set"),
        ({"SLURM_ARRAY_TASK_ID": "3"}, "'SLURM_ARRAY_TASK_MIN' is not set"),
        (slurm(9, 1, 1, 3), "part '9/3' is none"),
        (slurm(3, 3, 1, 1), "task 3 is alone in its array"),
    ],
)
def test_a_scheduler_that_names_none_is_one_clear_line(environment: dict[str, str], message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        DatasetPart.parse("auto", environment)
