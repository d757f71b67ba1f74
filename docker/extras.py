"""Print what an image needs of pyproject.toml: what building and running need, and the extras that are named."""

import sys
import tomllib
from pathlib import Path


def requirements(extras: list[str], pyproject: Path = Path("pyproject.toml")) -> list[str]:
    """Names and ranges; the lock pins them.

    Args:
        extras: Of the project, beside what it always needs.
        pyproject: The project's file.

    Raises:
        KeyError: The project has no such extra.
    """
    content = tomllib.loads(pyproject.read_text())
    project = content["project"]
    optional = [name for extra in extras for name in project["optional-dependencies"][extra]]
    return [*content["build-system"]["requires"], *project["dependencies"], *optional]


if __name__ == "__main__":
    print(*requirements(sys.argv[1:]), sep="\n")
