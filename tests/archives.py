"""Archives that tests read from."""

import io
import tarfile
from pathlib import Path


def make_tar(path: Path, members: dict[str, bytes]) -> Path:
    """An uncompressed tar of these members, in this order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path
