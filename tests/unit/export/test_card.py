"""The card says what is lost, and says that nothing is where nothing is."""

from typing import Any

import pytest

from ubsmoe.export.card import export_card
from ubsmoe.export.sidecar import Sidecar, beyond_stock, parse_sidecar

FACTS: dict[str, Any] = dict(
    format="peft", base="owner/name", base_sha256="ab" * 32, dtype="float32", family="olmoe", method="ubsmoe", tier=2,
    top_k=4, k_max=8, rank=3, alpha=6.0, rescale="mass", num_candidates=16,
)  # fmt: skip


def sidecar(**changes: Any) -> Sidecar:
    return parse_sidecar({**FACTS, **changes})


@pytest.mark.parametrize(
    ("changes", "starts"),
    [
        ({}, ["K: ", 'Output scale ("mass")']),
        ({"format": "merged"}, ['Output scale ("mass")']),
        ({"format": "merged", "rescale": "none"}, []),
        ({"top_k": 8}, []),
        ({"top_k": 8, "phi": [[0.5]]}, ["φ: "]),
        ({"top_k": 8, "selection_bias": [[0.5]], "output_scale": [1.5]}, ["Selection bias", "Learned output scale"]),
    ],
)
def test_each_thing_that_stock_software_lacks_is_named(changes: dict, starts: list[str]) -> None:
    said = beyond_stock(sidecar(**changes), stock_top_k=8)
    assert len(said) == len(starts) and all(one.startswith(start) for one, start in zip(said, starts, strict=True))


def test_the_card_names_base_method_budget_and_how_to_load() -> None:
    card = export_card(sidecar().model_dump(), ["φ: lost."])
    assert "num_experts_per_tok=4" in card and "ubsmoe, tier 2 of its run" in card and "rank 3, alpha 6" in card
    assert "It leaves out:\n\n- φ: lost." in card
    assert "nothing is left out" in export_card(sidecar(top_k=8).model_dump(), [])
    assert "leaves out" not in export_card(sidecar(format="native").model_dump(), ["φ: lost."])
