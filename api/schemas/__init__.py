"""What the API says: one pydantic model per JSON object, and the fields that they share."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from trainer.data.entry import GENERATOR

Label = Literal["real", "fake"]
LABELS: tuple[Label, Label] = ("real", "fake")
"""By the number that stands for each in index and tables."""
Scope = Literal["detect", "enrol", "admin"]
Unit = Annotated[float, Field(ge=0, le=1)]
Similarity = Annotated[float, Field(ge=-1.001, le=1.001)]
Text = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[^\x00]*$")]
GeneratorName = Annotated[str, Field(pattern=f"^{GENERATOR}$", examples=["SD-XL"])]


def absent(value: object) -> bool:
    """Whether a field that appears only when asked for was not asked for."""
    return value is None


class Model(BaseModel):
    """Docstrings under fields become descriptions in OpenAPI."""

    model_config = ConfigDict(use_attribute_docstrings=True, extra="forbid")
