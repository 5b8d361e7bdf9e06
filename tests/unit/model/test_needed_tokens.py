"""What nobody reads is not computed: padding anywhere, and in the last layer all but the asked positions. Nothing else changes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ubsmoe.client.train import language_loss
from ubsmoe.data.tokens import IGNORED
from ubsmoe.maths.pseudo_gradient import PseudoGradient
from ubsmoe.model import experts
from ubsmoe.model.conventions import answers_stay_put, find_blocks
from ubsmoe.model.layer import SparseLayer
from ubsmoe.model.surgery import SparseModel
from unit.model.families import FAMILIES, tiny, words

every_family = pytest.mark.parametrize("family", FAMILIES)
ROWS, LENGTH, TOP_K = 3, 9, 2
REAL, LABELLED = (9, 5, 7), (2, 1, 4)  # tokens of each row, and how many of them, at its end, have a label


def batch() -> dict[str, Tensor]:
    """Padded on the right, prompts masked."""
    ids = words(ROWS, LENGTH)
    column = torch.arange(LENGTH)
    mask = column < torch.tensor(REAL)[:, None]
    answer = mask & (column >= torch.tensor(REAL)[:, None] - torch.tensor(LABELLED)[:, None])
    return {
        "input_ids": ids.masked_fill(~mask, 0),
        "attention_mask": mask.long(),
        "labels": ids.masked_fill(~answer, IGNORED),
    }


def operated(family: str) -> SparseModel:
    """K = 2, an adapter without a zero and trained routers."""
    sparse = SparseModel(tiny(family))
    generator = torch.Generator().manual_seed(5)
    fresh = sparse.fresh_adapter(3, generator, shared_a=False, router=True)
    sparse.load_adapter({name: 0.3 * torch.randn(v.shape, generator=generator) for name, v in fresh.items()}, alpha=2.0)
    sparse.set_top_k(TOP_K)
    return sparse


def measured(sparse: SparseModel) -> dict[str, Tensor]:
    """Loss, counts, masses and all gradients of one step on the batch."""
    with sparse.counting():
        loss = language_loss(sparse, batch())
        loss.backward()
    found = {"loss": loss.detach(), "counts": sparse.expert_tokens()}
    found |= {name: value.grad for name, value in sparse.adapter.items() if value.grad is not None}
    for layer in sparse.layers:
        if layer.observed.mass is not None:
            found |= {f"mass.{layer.index}.{name}": value for name, value in vars(layer.observed.mass).items()}
    return found


def pseudo(*arguments: Any, **settings: Any) -> Callable[[SparseModel], None]:
    return lambda sparse: sparse.set_pseudo_gradient(
        PseudoGradient(*arguments, **settings), torch.Generator().manual_seed(3)
    )


def every_other_expert(scores: Tensor, chosen: Tensor, real: Tensor | None) -> Tensor:
    return torch.arange(scores.shape[1]) % 2 == 0


def record(sparse: SparseModel) -> None:
    sparse.record()


SETTINGS: dict[str, Callable[[SparseModel], None]] = {
    "plain": lambda sparse: None,
    "client_mean": pseudo("client_mean"),
    "self_ipw, hidden too": pseudo("self_ipw", scope=("experts", "router", "hidden")),
    "sampled": pseudo("sampled", fraction=0.5, scope=("experts", "router", "hidden")),
    "oracle": pseudo("oracle"),
    "partly learning": lambda sparse: sparse.set_trainable_experts([every_other_expert] * len(sparse.layers)),
    "output scale": lambda sparse: sparse.set_output_scale(torch.linspace(0.5, 1.5, len(sparse.layers))),
    "recording": record,
}


@every_family
@pytest.mark.parametrize("setting", SETTINGS)
def test_a_step_is_what_computing_everything_gives(family: str, setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sparse = operated(family)
    SETTINGS[setting](sparse)
    ours = measured(sparse)
    scores = [layer.scores() for layer in sparse.layers] if setting == "recording" else []
    sparse = operated(family)
    SETTINGS[setting](sparse)
    monkeypatch.setattr(SparseLayer, "needed_tokens", lambda layer: None)
    full = measured(sparse)
    assert ours.keys() == full.keys()
    assert torch.equal(ours["counts"], full["counts"]) and (ours["counts"].sum(1) == sum(REAL) * TOP_K).all()
    for name, value in full.items():
        torch.testing.assert_close(
            ours[name], value, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )
    mask = batch()["attention_mask"].reshape(-1).bool()
    for mine, layer in zip(scores, sparse.layers, strict=False):
        torch.testing.assert_close(mine[mask], layer.scores()[mask], rtol=1e-4, atol=1e-6)


@every_family
def test_a_padded_batch_is_its_rows_alone(family: str) -> None:
    ours = measured(operated(family))
    sparse, whole = operated(family), batch()
    loss = torch.zeros(())
    with sparse.counting():
        for row, length in enumerate(REAL):
            ids, labels = whole["input_ids"][row : row + 1, :length], whole["labels"][row, 1:length]
            logits = sparse.model(input_ids=ids).logits[0, :-1].float()
            loss = loss + nn.functional.cross_entropy(logits, labels, reduction="sum") / sum(LABELLED)
    loss.backward()
    torch.testing.assert_close(ours["loss"], loss.detach(), rtol=1e-5, atol=1e-6)
    assert torch.equal(ours["counts"], sparse.expert_tokens())
    for name, value in sparse.adapter.items():
        torch.testing.assert_close(ours[name], value.grad, rtol=1e-4, atol=1e-6)


@every_family
def test_experts_see_real_tokens_alone_and_the_last_ones_labelled_positions(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    run = experts.run_assignments
    monkeypatch.setattr(experts, "run_assignments", lambda *args: seen.append(len(args[1])) or run(*args))
    sparse = operated(family)
    language_loss(sparse, batch())
    assert seen == [TOP_K * sum(REAL), TOP_K * sum(LABELLED)]
    sparse.model(input_ids=batch()["input_ids"])  # no mask, all logits
    assert seen[2:] == [TOP_K * ROWS * LENGTH] * 2
    missing = sparse.num_experts - TOP_K
    SETTINGS["oracle"](sparse)
    language_loss(sparse, batch())
    assert seen[4:] == [pairs * tokens for tokens in (sum(REAL), sum(LABELLED)) for pairs in (TOP_K, missing)]


@every_family
def test_only_the_last_experts_answers_stay_where_they_are(family: str) -> None:
    model = tiny(family).requires_grad_(False)
    first, last = (block for _, block in find_blocks(model))
    assert answers_stay_put(model, last) and not answers_stay_put(model, first)


def test_a_head_that_looks_at_other_positions_gets_all_of_them() -> None:
    class Neighbours(nn.Module):
        def __init__(self, norm: nn.Module) -> None:
            super().__init__()
            self.norm = norm

        def forward(self, hidden: Tensor) -> Tensor:
            return self.norm(hidden + nn.functional.pad(hidden, (0, 0, 1, 0))[:, :-1])

    model = tiny("olmoe")
    model.model.norm = Neighbours(model.model.norm)
    assert not answers_stay_put(model.requires_grad_(False), list(find_blocks(model))[-1][1])
    sparse = SparseModel(model)
    sparse.load_adapter(sparse.fresh_adapter(3, torch.Generator().manual_seed(0), shared_a=True), alpha=2.0)
    whole = batch()
    keep = whole["labels"][:, 1:] != IGNORED
    with torch.no_grad():
        full = sparse.model(whole["input_ids"], whole["attention_mask"]).logits[:, :-1][keep]
        torch.testing.assert_close(sparse.logits_at(whole["input_ids"], whole["attention_mask"], keep), full)


def test_nothing_is_remembered_after_a_look() -> None:
    sparse, ids = operated("olmoe"), words()
    before = sparse.model(ids).logits
    with pytest.raises(RuntimeError, match="stop"), sparse.reading(torch.zeros(3, 5, dtype=torch.bool)):
        raise RuntimeError("stop")
    assert torch.equal(sparse.model(ids).logits, before)
