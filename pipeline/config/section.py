"""What every section of the configuration is made of: frozen groups of fields, kinds of numbers, kinds of fields."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PositiveFloat

from grappa.core.home import expanded

UNCHANGED = object()
PLUGINS = "PYDANTIC_DISABLE_PLUGINS"
Place = Annotated[str, AfterValidator(expanded)]  # of a file, a folder, a URL or a name on the hub
LARGEST = 2**53  # an integer that every reader of JSON holds exactly
PositiveInt = Annotated[int, Field(gt=0, le=LARGEST)]
NonNegativeInt = Annotated[int, Field(ge=0, le=LARGEST)]
Precision = Literal["auto", "float32", "bfloat16"]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
CropFraction = Annotated[float, Field(gt=0.0, le=1.0)]
Triple = tuple[float, float, float]
PositiveTriple = tuple[PositiveFloat, PositiveFloat, PositiveFloat]


class Section(BaseModel):
    """A frozen group of fields; unknown fields are refused.

    What checks a section by itself is built where one is made by itself: a file is checked by the one check of all.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, defer_build=True)

    def to_json(self) -> dict[str, Any]:
        """Return the fields of a section as JSON has them; ``model_dump`` needs a serializer, which takes as long as
        the rest of `grappa status`."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in self.__dict__.items()}


@contextmanager
def without_plugins() -> Iterator[None]:
    """Let pydantic build checks without plugins, for which it reads the metadata of all packages that are installed."""
    before = os.environ.get(PLUGINS)
    os.environ[PLUGINS] = "__all__"
    try:
        yield
    finally:
        if before is None:
            del os.environ[PLUGINS]
        else:
            os.environ[PLUGINS] = before


def provenance(default: Any, description: str) -> Any:
    """Return a field that is recorded in the provenance but is no part of any fingerprint."""
    return Field(default=default, description=description, json_schema_extra={"identity": False})


def later(default: Any, description: str, *, before: Any = UNCHANGED) -> Any:
    """Return a field that came after runs had been made: with the value ``before``, by default the default, the result
    is that without the field.

    Such a value is left out of fingerprints, so that older artifacts stay fresh. Where it is not the default, older
    runs get it by ``FORMER`` of ``grappa.pipeline.config.yaml_file``.
    """
    as_before = default if before is UNCHANGED else before
    return Field(default=default, description=description, json_schema_extra={"later": True, "before": as_before})
