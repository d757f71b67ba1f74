"""Files that are replaced as a whole."""

import resource
from pathlib import Path

import pytest

from trainer.files import whole_file, write_atomically


@pytest.fixture(params=["linked", "copied", "named"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How the system lets a file take its place."""

    def refuse(*args: object, **options: object) -> None:
        raise FileNotFoundError("no /proc")

    if request.param == "copied":
        monkeypatch.setattr("os.link", refuse)
    elif request.param == "named":
        monkeypatch.delattr("os.O_TMPFILE")
    return str(request.param)


def test_a_file_is_there_when_it_is_whole(tmp_path: Path, way: str) -> None:
    path = tmp_path / "folder/file"
    for content in (b"old", b"new"):
        with whole_file(path) as file:
            file.write(content)
            others = [entry for entry in path.parent.iterdir() if entry != path]
            assert len(others) == (1 if way == "named" else 0)
        assert path.read_bytes() == content

    def fail() -> None:
        with whole_file(path) as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert path.read_bytes() == b"new"
    assert list(path.parent.iterdir()) == [path]


def test_no_writer_takes_the_half_of_another(tmp_path: Path, way: str) -> None:
    path = tmp_path / "file"
    with whole_file(path) as first:
        first.write(b"half, ")
        first.flush()
        with whole_file(path) as second:
            second.write(b"of another")
        assert path.read_bytes() == b"of another"
        first.write(b"whole")
    assert path.read_bytes() == b"half, whole"
    assert list(tmp_path.iterdir()) == [path]


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def fail(self: Path, target: Path) -> Path:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_file_that_the_disk_does_not_take_is_named(tmp_path: Path) -> None:
    path, limits = tmp_path / "file", resource.getrlimit(resource.RLIMIT_FSIZE)
    path.write_bytes(b"old")
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        with pytest.raises(OSError, match=f"File too large: '{path}'"):
            write_atomically(path, bytes(2000))
        with pytest.raises(OSError, match=f"File too large: '{path}'"), whole_file(path) as file:
            file.write(bytes(2000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
