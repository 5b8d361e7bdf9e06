"""What every section of a run file is, and kinds of numbers that several sections share."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Budget = Annotated[float, Field(gt=0, le=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Rank = Annotated[int, Field(ge=1, le=4096)]  # sanity limit: a typo must not exhaust memory


class Settings(BaseModel):
    """A section of the run file: frozen; unknown keys, NaN and infinities are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
