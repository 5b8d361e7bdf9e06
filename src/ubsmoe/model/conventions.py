"""What a family's blocks look like and what its routers do with K: found out by looking and trying, not by name."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ubsmoe.errors import UserError


class UnsupportedModel(UserError):
    """A model this project cannot give budgets to; the message says why."""


@dataclass(frozen=True)
class RouterConvention:
    """What a family does with the scores of the chosen experts.

    `renormalises`: the K weights sum to the same whatever K. `scoring`: what turns logits into scores. `by_score`: the K
    chosen are those of the largest scores (not so where groups of experts or a bias of the family's own have a say).
    """

    renormalises: bool
    scoring: Literal["softmax", "sigmoid"]
    by_score: bool


def find_blocks(model: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    """(router, experts) of every block that has both, in order."""
    for module in model.modules():
        experts = getattr(module, "experts", None)
        router = getattr(module, "gate", None) or getattr(module, "router", None)
        if isinstance(experts, nn.Module) and hasattr(experts, "num_experts") and hasattr(router, "top_k"):
            if not hasattr(experts, "is_transposed"):
                raise UnsupportedModel(
                    f"{type(experts).__name__} does not follow transformers' experts interface; update transformers"
                )
            if getattr(experts, "has_post_expert_norm", False):
                raise UnsupportedModel(
                    f"{type(experts).__name__} normalises each expert's output, which is not supported"
                )
            assert isinstance(router, nn.Module)
            yield router, experts


@torch.no_grad()
def observe_router(router: nn.Module, num_experts: int) -> RouterConvention:
    """Run a router on random inputs, at K = 1, 2 and its own, and see what it does.

    The inputs are scaled to logits of size 1: a sharper router puts all its weight on one expert whatever K, a flatter one
    drowns the difference between softmax and sigmoid in rounding.

    Raises:
        UnsupportedModel: if it ignores `top_k` (PhiMoE always takes two), needs more than the hidden state, or scores its
            experts in another way.
    """
    stock, name = router.top_k, type(router).__name__
    weight = next(router.parameters())
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(16, weight.shape[-1], generator=generator).to(weight.device, weight.dtype)
    seen = {}
    try:
        size = nn.functional.linear(hidden.float(), weight.float()).std()
        hidden = (hidden / size.clamp_min(1e-6)).to(weight.dtype)
        for top_k in (1, 2, stock):
            router.top_k = top_k  # type: ignore[assignment]
            logits, weights, index = router(hidden)
            seen[top_k] = logits, weights, index
    except (TypeError, ValueError, RuntimeError) as error:
        raise UnsupportedModel(f"{name} cannot be run on hidden states alone: {error}") from error
    finally:
        router.top_k = stock
    for top_k, (logits, _, index) in seen.items():
        if index.shape[-1] != top_k or logits.shape[-1] != num_experts:
            raise UnsupportedModel(
                f"{name} ignores top_k (asked for {top_k} experts per token, got {index.shape[-1]}): "
                "clients of different budgets are impossible with this family"
            )
    one, (logits, two, index) = seen[1][1].float().sum(-1), seen[2]
    renormalises = torch.allclose(one, two.float().sum(-1), rtol=1e-2)
    chosen = logits.float().gather(-1, index)
    share = two[:, 0].float() / two.float().sum(-1)  # of the first expert, in what both get
    soft = (chosen.softmax(-1)[:, 0] - share).abs().mean()
    sigmoid = (chosen[:, 0].sigmoid() / chosen.sigmoid().sum(-1) - share).abs().mean()
    if min(soft, sigmoid) > 0.02:
        raise UnsupportedModel(f"{name} scores its experts neither by softmax nor by sigmoid, which is not supported")
    logits, _, index = seen[stock]
    kept, best = logits.gather(-1, index), logits.topk(stock, dim=-1).values
    # compared by their sum: ties may fall either way
    by_score = torch.allclose(kept.float().sum(-1), best.float().sum(-1), atol=1e-3)
    return RouterConvention(renormalises, "softmax" if soft <= sigmoid else "sigmoid", by_score)


@torch.enable_grad()
def answers_stay_put(model: Any, experts: nn.Module) -> bool:
    """Whether what these experts answer for a token reaches the logits of that token alone, as in a last layer.

    Tried out on four tokens: the gradient of one token's logits by the answers for all.
    """
    answers: list[Tensor] = []

    def watch(module: nn.Module, args: object, answer: Tensor) -> Tensor:
        answers.append(answer.detach().requires_grad_())
        return answers[-1]

    hook, stock = experts.register_forward_hook(watch), model.config._experts_implementation
    model.set_experts_implementation("eager")  # takes any precision
    try:
        logits = model(input_ids=torch.arange(4, device=model.device).unsqueeze(0), use_cache=False).logits
    finally:
        hook.remove()
        model.set_experts_implementation(stock)
    reached = [grad.reshape(4, -1).any(-1) for grad in torch.autograd.grad(logits[0, 2].square().sum(), answers)]
    return len(reached) == 1 and reached[0].tolist() == [False, False, True, False]
