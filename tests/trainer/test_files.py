"""Files that are replaced as a whole."""

from pathlib import Path

import pytest

from trainer.files import whole_file, write_atomically


@pytest.mark.parametrize("unnamed", [True, False])
def test_a_file_is_there_when_it_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unnamed: bool) -> None:
    path = tmp_path / "folder/file"
    if not unnamed:
        monkeypatch.delattr("os.O_TMPFILE")
    for content in (b"old", b"new"):
        with whole_file(path) as file:
            file.write(content)
            others = [entry for entry in path.parent.iterdir() if entry != path]
            assert len(others) == (0 if unnamed else 1)
        assert path.read_bytes() == content

    def fail() -> None:
        with whole_file(path) as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert path.read_bytes() == b"new"
    assert list(path.parent.iterdir()) == [path]


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
