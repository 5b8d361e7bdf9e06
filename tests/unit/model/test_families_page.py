"""The table of docs/families.md is what the code observes, not what somebody remembers."""

from pathlib import Path

from ubsmoe.model.surgery import SparseModel
from unit.model.families import FAMILIES, tiny

PAGE = Path(__file__).parents[3] / "docs" / "families.md"


def row(family: str) -> str:
    sparse = SparseModel(tiny(family))
    layer = sparse.layers[0]
    router = type(layer.router).__mro__[2].__name__
    rule, experts = layer.convention, layer.experts
    cells = [
        family,
        router,
        rule.scoring,
        "stays: K needs no scale" if rule.renormalises else "falls: see tiers.rescale",
        "the K best scores" if rule.by_score else "groups or a bias of its own",
        "[in, out]" if experts.is_transposed else "[out, in]",
        "yes" if experts.has_bias else "no",
    ]
    return "| " + " | ".join(cells) + " |"


def test_the_page_holds_a_row_for_every_family_as_it_is_observed() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for family in FAMILIES:
        assert row(family) in page, f"docs/families.md needs this row:\n{row(family)}"
