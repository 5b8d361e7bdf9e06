"""The load-balancing loss: by hand, its properties, and where transformers' own differs and why."""

import pytest
import torch
from transformers.models.olmoe.modeling_olmoe import load_balancing_loss_func as pooled_loss

from ubsmoe.maths.balance import load_balancing_loss

# three tokens, four experts, two assignments each; every row of probabilities sums to 1
PROBS = torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.5, 0.1, 0.3, 0.1], [0.1, 0.2, 0.3, 0.4]])
CHOSEN = torch.tensor([[0, 1], [0, 2], [3, 2]])


def test_by_hand():
    # f = (2, 1, 2, 1) / 6,  P = (1.0, 0.6, 0.8, 0.6) / 3,  f P = (2.0 + 0.6 + 1.6 + 0.6) / 18
    assert load_balancing_loss(PROBS, CHOSEN).item() == pytest.approx(4 * 4.8 / 18)


@pytest.mark.parametrize("top_k", [1, 2, 3, 5])
def test_perfect_balance_costs_one_at_any_budget(top_k):
    # token t takes experts t, t+1, ...: each is chosen top_k times, and the scores are a rotation of one row
    scores = torch.stack([torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0]).roll(t) for t in range(5)]) / 15
    chosen = scores.topk(top_k).indices
    assert load_balancing_loss(scores, chosen).item() == pytest.approx(1)


def test_one_expert_for_all_costs_as_much_as_there_are_experts():
    probs = torch.eye(7)[[3] * 5]
    assert load_balancing_loss(probs, probs.topk(1).indices).item() == pytest.approx(7)


def test_the_gradient_runs_through_the_probabilities_alone():
    probs = PROBS.clone().requires_grad_()
    load_balancing_loss(probs, CHOSEN).backward()
    expected = 4 * torch.tensor([2.0, 1.0, 2.0, 1.0]) / 6 / 3  # M f / T for every token
    torch.testing.assert_close(probs.grad, expected.expand(3, 4))


def test_padding_is_as_good_as_absent():
    real = torch.tensor([True, False, True])
    masked = load_balancing_loss(PROBS, CHOSEN, real)
    torch.testing.assert_close(masked, load_balancing_loss(PROBS[real], CHOSEN[real]))
    assert masked.item() != pytest.approx(load_balancing_loss(PROBS, CHOSEN).item())


def test_nothing_but_padding_costs_nothing():
    assert load_balancing_loss(PROBS, CHOSEN, torch.zeros(3, dtype=torch.bool)).item() == 0


def test_a_share_from_elsewhere_replaces_the_batch_own():
    share = torch.tensor([0.1, 0.2, 0.3, 0.4])
    # P = (1.0, 0.6, 0.8, 0.6) / 3,  f P = (0.10 + 0.12 + 0.24 + 0.24) / 3
    assert load_balancing_loss(PROBS, CHOSEN, share_M=share).item() == pytest.approx(4 * 0.7 / 3)


def test_an_even_share_pulls_at_nothing():
    logits = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss = load_balancing_loss(logits.softmax(-1), CHOSEN, share_M=torch.full((4,), 0.25))
    loss.backward()
    assert loss.item() == pytest.approx(1)
    torch.testing.assert_close(logits.grad, torch.zeros(3, 4), atol=1e-7, rtol=0)


# transformers' loss is compared on logits whose softmax is PROBS
LOGITS = PROBS.log()


def test_transformers_loss_of_one_layer_without_padding_is_ours_times_k():
    """Its f are tokens per expert over tokens, which sum to K instead of 1."""
    assert pooled_loss((LOGITS,), 4, top_k=2).item() == pytest.approx(2 * load_balancing_loss(PROBS, CHOSEN).item())


def test_transformers_loss_pools_layers_so_that_opposite_imbalances_cancel():
    left, right = torch.tensor([[9.0, 0.0]]).expand(6, 2), torch.tensor([[0.0, 9.0]]).expand(6, 2)
    assert pooled_loss((left, right), 2, top_k=1).item() == pytest.approx(1)  # "perfectly balanced"
    for logits in (left, right):
        assert load_balancing_loss(logits.softmax(-1), logits.topk(1).indices).item() == pytest.approx(2, abs=1e-3)


def test_transformers_loss_counts_padding_unless_it_is_given_the_mask():
    real = torch.tensor([True, False, True])
    ours = 2 * load_balancing_loss(PROBS, CHOSEN, real).item()
    assert pooled_loss((LOGITS,), 4, top_k=2, attention_mask=real[None]).item() == pytest.approx(ours)
    assert pooled_loss((LOGITS,), 4, top_k=2).item() != pytest.approx(ours, abs=0.05)


def test_transformers_loss_of_probabilities_is_nearly_blind():
    """Where a family records probabilities as its router logits, its loss takes a second softmax of them."""
    collapsed = torch.tensor([[9.0, 0.0, 0.0, 0.0]]).expand(6, 4)
    probs, chosen = collapsed.softmax(-1), collapsed.topk(1).indices
    assert load_balancing_loss(probs, chosen).item() == pytest.approx(4, abs=1e-2)
    assert pooled_loss((collapsed,), 4, top_k=1).item() == pytest.approx(4, abs=1e-2)
    assert pooled_loss((probs,), 4, top_k=1).item() < 2


def test_transformers_loss_assumes_everybody_has_the_models_own_k():
    """It chooses again, by the logits and one K, whatever a client's budget, bias or modulation made of them."""
    at_k_1 = load_balancing_loss(PROBS, CHOSEN[:, :1]).item()
    assert pooled_loss((LOGITS,), 4, top_k=2).item() / 2 != pytest.approx(at_k_1, abs=0.01)
