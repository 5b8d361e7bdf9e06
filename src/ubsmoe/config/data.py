"""[data] of a run file: where examples come from, how they are split over clients, and how they are worded."""

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from ubsmoe.config.plug_ins import OrPlugIn
from ubsmoe.config.section import Settings


class SyntheticSettings(Settings):
    """[data.synthetic]: questions about invented facts, when train = "synthetic"."""

    seed: int | None = Field(None, description="which facts; the run's seed when left out")
    entities: PositiveInt = Field(48, description="entities that the facts are about; more are harder")
    train_examples: PositiveInt = Field(4000, description="questions to train on")
    test_examples: PositiveInt = Field(400, description="questions to test on, over all tasks")


class PartitionSettings(Settings):
    """[data.partition]: which client holds which example."""

    kind: Annotated[Literal["iid", "natural", "dirichlet", "quantity"], OrPlugIn()] = Field(
        "iid", description='rule of the split, or a plug-in "module:function"'
    )
    field: str = Field("task", description="the examples' field that natural and dirichlet group by")
    alpha: Annotated[float, Field(gt=0, le=1e6)] = Field(
        0.5, description="Dirichlet concentration; smaller is more unequal"
    )
    min_examples: PositiveInt = Field(1, description="a client with fewer examples is refused")


class DataSettings(Settings):
    """[data]: examples and how they are worded."""

    train: str = Field(
        "synthetic",
        description='"synthetic", a file (.json, .jsonl, .csv, .parquet), a Hugging Face data set id, or a plug-in',
    )
    test: str | None = Field(
        None, description="a file or a folder with one file per task; a held-out part when left out"
    )
    test_fraction: Annotated[float, Field(gt=0, lt=1)] = Field(0.1, description="held-out part when test is left out")
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None,
        description="part of the training prompts that no client gets, for train.patience; never a part of the test questions",
    )
    seed: int | None = Field(
        None,
        description="draws questions, held-out part and partition; the run's seed when left out, so that these vary with it",
    )
    synthetic: SyntheticSettings = SyntheticSettings()
    partition: PartitionSettings = PartitionSettings()
    template: Annotated[Literal["plain", "llm_adapters"], OrPlugIn()] = Field(
        "plain", description='prompt around an instruction, or a plug-in "module:function"'
    )
    loss_on_prompt: bool = Field(False, description="train on the prompt's tokens too (TRL: not completion_only_loss)")
    max_length: PositiveInt = Field(256, description="tokens; a longer prompt loses its left end, never the answer")
    too_long: Literal["refuse", "drop"] = Field(
        "refuse",
        description="an example whose answer alone exceeds max_length stops the run, or is left out and counted",
    )

    def drawn_with(self, seed: int) -> int:
        """The seed that data and partition are drawn with, of a run with this one."""
        return seed if self.seed is None else self.seed
