"""Draw the packages and what they import into `docs/architecture.md`: `python docs/imports.py`, or `make docs`."""

import sys
from pathlib import Path

import grimp

PROGRAMS = ("api", "indexer", "trainer")
PAGE = Path(__file__).parent / "architecture.md"
BEGIN, END = "<!-- imports -->\n", "<!-- end of imports -->\n"


def package_imports() -> dict[str, set[str]]:
    """What each package or module at the top of a program imports of the others, as the code says now."""
    graph = grimp.build_graph(*PROGRAMS)
    packages = {name for program in PROGRAMS for name in graph.find_children(program) if "__main__" not in name}
    for package in packages:
        graph.squash_module(package)
    return {name: graph.find_modules_directly_imported_by(name) & packages - {name} for name in packages}


def without_detours(imports: dict[str, set[str]]) -> dict[str, set[str]]:
    """The same without arrows that a longer way already says: where imports go one way, no more are needed."""

    def reach(package: str) -> set[str]:
        return imports[package].union(*map(reach, imports[package]))

    return {package: near - set().union(*map(reach, near)) for package, near in imports.items()}


def picture(imports: dict[str, set[str]]) -> str:
    """A Mermaid flowchart with a box for each program."""
    lines = ["```mermaid", "flowchart TD"]
    for program in PROGRAMS:
        names = sorted(package for package in imports if package.startswith(f"{program}."))
        lines += [
            f"    subgraph {program}",
            *(f"        {name}[{name.partition('.')[2]}]" for name in names),
            "    end",
        ]
    arrows = without_detours(imports)
    lines += [f"    {package} --> {near}" for package in sorted(arrows) for near in sorted(arrows[package])]
    return "\n".join([*lines, "```", ""])


def drawn(page: str) -> str:
    """The page with its picture as the code has it now."""
    before, _, rest = page.partition(BEGIN)
    return before + BEGIN + picture(package_imports()) + END + rest.partition(END)[2]


if __name__ == "__main__":
    sys.path.insert(0, str(PAGE.parents[1]))
    PAGE.write_text(drawn(PAGE.read_text()))
