"""Write docs/fields.md, every field of a verdict with its meaning, from the classes: `python docs/fields.py`."""

import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from api.schemas.verdicts import Verdict

PAGE = Path(__file__).with_name("fields.md")
INTRODUCTION = """# Every field of a verdict

`POST /v1/detect` answers `{"results": [...]}` with one of these for each image, `lineup detect --json` prints one a
line, and `--output` writes them to a `.jsonl`, with the most used ones in a table. `/docs` of a running service has the
fields of every other call. `?` means that the field may be null.
"""


def kind(annotation: Any) -> str:
    """A type as readers of JSON know it."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " \\| ".join(f"`{value}`" for value in arguments)
    if origin in (Union, types.UnionType):
        rest = [kind(one) for one in arguments if one is not type(None)]
        return " or ".join(rest) + ("?" if type(None) in arguments else "")
    if origin is list:
        return f"list of {kind(arguments[0])}"
    if origin is tuple:
        return f"{len(arguments)} numbers"
    if origin is dict:
        return f"object of {kind(arguments[1])}"
    if hasattr(annotation, "__metadata__"):
        return kind(annotation.__origin__)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "object"
    return {str: "text", int: "integer", float: "number", bool: "true or false"}.get(annotation, "any")


def models(annotation: Any) -> Iterator[type[BaseModel]]:
    """The classes within a type."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from models(argument)


def rows(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """A row of the table for each field, those within an object after it."""
    for name, field in model.model_fields.items():
        meaning = " ".join((field.description or "").split())
        inner = list(models(field.annotation))
        if not meaning and inner:
            meaning = " ".join((inner[0].__doc__ or "").split())
        limits = [
            str(getattr(limit, name)) for limit in field.metadata for name in ("ge", "le") if hasattr(limit, name)
        ]
        span = f", {'..'.join(limits)}" if len(limits) == 2 else ""
        yield f"| `{prefix}{name}` | {kind(field.annotation)}{span} | {meaning} |"
        mark = "[]" if get_origin(field.annotation) is list or "list" in str(field.annotation)[:30] else ""
        for one in inner:
            yield from rows(one, f"{prefix}{name}{mark}.")


def text() -> str:
    """The page."""
    return "\n".join([INTRODUCTION, "| field | type | meaning |", "|---|---|---|", *rows(Verdict), ""])


if __name__ == "__main__":
    PAGE.write_text(text())
