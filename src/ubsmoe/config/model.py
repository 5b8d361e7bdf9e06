"""[model], [adapter] and [tiers]: what is frozen, what is trained on it, and how much of it each kind of machine carries."""

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from ubsmoe.config.section import Budget, Rank, Settings, Share
from ubsmoe.costs.workload import ExpertFormat, NamedFormat


class ModelSettings(Settings):
    """[model]: the frozen base."""

    base: str = Field("ubsmoe-tiny", description="the shipped base, a folder, or a Hugging Face model id")
    experts: ExpertFormat | None = Field(
        None, description="what the frozen experts are quantised to, int8 or nf4; as stored when left out"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description='precision of the base and of the activations; "auto": the checkpoint\'s own, float32 for the shipped base',
    )
    device: str = Field("cpu", description="torch device every client trains on")
    sha256: str | None = Field(
        None, description="of the base's weights, as `ubsmoe base hash` prints it; any other base is refused"
    )


class AdapterSettings(Settings):
    """[adapter]: what is trained on top of the base."""

    rank: Rank = Field(8, description="LoRA rank on every expert matrix")
    alpha: PositiveFloat = Field(16.0, description="the update is alpha / rank * B A (PEFT: lora_alpha)")
    # measured, like router: docs/tables.md, Screening, the rows of their names
    shared_a: bool = Field(True, description="start all experts of a layer from one A (pseudo-gradients need it)")
    router: Literal["frozen", "trained"] = Field("frozen", description="whether the routers' weights are trained too")
    attention: Literal["frozen", "trained"] = Field(
        "frozen", description="whether the attention projections of layers with experts have LoRA of that rank too"
    )
    start: str | None = Field(
        None,
        description="a PEFT adapter, or a finished run with its server state, to go on from; a fresh adapter when left out",
    )


class TierSettings(Settings):
    """[tiers]: how much each class of client can afford."""

    budgets: tuple[Budget, ...] = Field(
        (0.25, 0.5, 0.75, 1.0), min_length=1, description="beta of each tier, in (0, 1]"
    )
    ranks: tuple[Rank, ...] = Field(
        (4, 8, 16, 32), min_length=1, description="LoRA rank of each tier, for methods that vary the rank instead of K"
    )
    rank_top_k: Literal["k_max", "budget"] = Field(
        "k_max",
        description="experts per token under those methods: K_max as published, or as many as the tier's budget buys",
    )
    k_max: PositiveInt | None = Field(
        None, description="K_max, experts per token at budget 1; the base's own when left out"
    )
    rescale: Literal["none", "mass", "k_max"] = Field(
        "mass",  # measured: docs/decisions/0002-output-scale.md
        description="layer output at K < K_max: as it is, with the routing mass of K_max, or with the gate weights of K_max",
    )
    # off, since it is not the paper's; what it gains and costs: docs/tables.md, Screening and Confirmation, rows elastic_share
    elastic_share: Share = Field(0.0, description="share of local steps run at a smaller K: elastic budgets")
    elastic_draw: Literal["one", "uniform"] = Field("one", description="the smaller K: always 1, or uniform on 1..K_c")
    experts: tuple[NamedFormat, ...] | None = Field(
        None, description='model.experts of each tier, "plain" for none; the base\'s own for all when left out'
    )
    micro_batch: tuple[PositiveInt, ...] | None = Field(
        None, description="train.micro_batch of each tier; train's own for all when left out"
    )
    gradient_checkpointing: tuple[bool, ...] | None = Field(
        None, description="train.gradient_checkpointing of each tier; train's own for all when left out"
    )

    @model_validator(mode="after")
    def _one_per_tier(self) -> "TierSettings":
        for key in ("experts", "micro_batch", "gradient_checkpointing"):
            values = getattr(self, key)
            if values is not None and len(values) != len(self.budgets):
                raise ValueError(
                    f"{key} has {len(values)} entries and budgets {len(self.budgets)}; expected one per tier"
                )
        return self
