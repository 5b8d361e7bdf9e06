"""What an exported adapter needs said beside its weights: its base, its budget, and how its routers are to be bent.

The file formats of PEFT and transformers cannot hold most of it, so it is JSON beside them (`ubsmoe.json`).
"""

from typing import Any, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from ubsmoe.config import Settings, validated
from ubsmoe.costs.workload import ExpertFormat

Format = Literal["peft", "merged", "native"]


class Sidecar(Settings):
    """The facts of one export. Per-layer values are lists, SMoE layers in order."""

    format: Format
    base: str = Field(description="the run's model.base")
    base_sha256: str = Field(description="hash over the base's weights, in `dtype`")
    dtype: Literal["float32", "bfloat16"]
    experts: ExpertFormat | None = Field(
        None, description="what the base's frozen experts were quantised to in training"
    )
    family: str = Field(description="transformers' model_type")
    method: str
    tier: PositiveInt | None = Field(description="counted from 1; None if no tier was asked for")
    top_k: NonNegativeInt = Field(description="experts per token; 0 where a compensation stands for all")
    k_max: PositiveInt = Field(description="experts per token at budget 1")
    rank: PositiveInt
    alpha: PositiveFloat
    rescale: Literal["none", "mass", "k_max"] = Field(description="the run's tiers.rescale, if it has an effect")
    num_candidates: PositiveInt = Field(description="experts per token that phi may move")
    phi: list[list[float]] | None = Field(None, description="[L, M], added to the routers' logits")
    selection_bias: list[list[float]] | None = Field(None, description="[L, M], added to scores for the choice alone")
    output_scale: list[float] | None = Field(None, description="[L], times the sum over experts")
    compensated: bool = Field(False, description="compensation.safetensors holds what stands for skipped experts")
    untouched: dict[str, list[int]] | None = Field(
        None, description="by matrix, the experts to which the adapter adds nothing; None before 0.3, which named none"
    )


def parse_sidecar(facts: dict[str, Any]) -> Sidecar:
    """Validate the facts of an export. Raises ConfigError with one sentence per fault."""
    return validated(Sidecar, facts)


def beyond_stock(sidecar: Sidecar, stock_top_k: int) -> list[str]:
    """What plain transformers, PEFT, vLLM or llama.cpp cannot do of this export, one sentence each.

    Args:
        sidecar: after whatever could be put into weights and config has been taken out of it.
        stock_top_k: experts per token of the unchanged base.
    """
    said = []
    if sidecar.experts:
        base = "merged into" if sidecar.format == "merged" else "loaded on"
        said.append(
            f"Quantisation: it was trained on experts in {sidecar.experts}, and is {base} the plain ones, which differ a "
            "little. Scores of the run are those of the quantised experts."
        )
    if sidecar.format == "peft" and sidecar.top_k != stock_top_k:
        said.append(
            f"K: an adapter cannot set the number of experts. Load the base with `num_experts_per_tok={sidecar.top_k}`; "
            f"left alone it uses {stock_top_k}."
        )
    if sidecar.phi:
        said.append(
            f"φ: the routers' logits are shifted on each token's {sidecar.num_candidates} best experts. Plain "
            "transformers has no such term, and chooses other experts for some tokens."
        )
    if sidecar.compensated and sidecar.top_k != sidecar.k_max:
        said.append(
            f"Compensation: at K = {sidecar.top_k} experts keep the gate weights of K = {sidecar.k_max}, and small maps stand for "
            "the skipped ones. Plain transformers has neither; run K_max experts there instead."
        )
    elif sidecar.rescale == "k_max" and sidecar.top_k != sidecar.k_max:
        said.append(
            f"Gate weights: at K = {sidecar.top_k} experts keep the gate weights that they have at K = {sidecar.k_max}. Plain "
            "transformers renormalises them over the experts that run."
        )
    elif sidecar.rescale != "none" and sidecar.top_k != sidecar.k_max:
        said.append(
            f'Output scale ("{sidecar.rescale}"): at K = {sidecar.top_k} the experts\' sum is brought back to the size it '
            f"has at K = {sidecar.k_max}. Plain transformers leaves it smaller."
        )
    if sidecar.selection_bias:
        said.append(
            "Selection bias: experts are chosen by score plus a bias. The routers of this family have none in transformers."
        )
    if sidecar.output_scale:
        said.append("Learned output scale: one factor per layer on the experts' sum. An adapter cannot hold it.")
    return said
