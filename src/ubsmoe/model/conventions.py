"""What a family's blocks look like and what its routers do with K: found out by looking and trying, not by name."""

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from ubsmoe.errors import UserError

ECHO = "ubsmoe_echo"
"""An experts implementation whose answer is its input."""


class UnsupportedModel(UserError):
    """A model this project cannot give budgets to; the message says why."""


@dataclass(frozen=True)
class RouterConvention:
    """What a family does with the scores of the chosen experts.

    `renormalises`: the K weights sum to the same whatever K. `scoring`: what turns logits into scores. `by_score`: the K
    chosen are those of the largest scores (not so where groups of experts or a bias of the family's own have a say).
    `weight`: the name of the router's parameter whose linear map gives the logits.
    """

    renormalises: bool
    scoring: Literal["softmax", "sigmoid"]
    by_score: bool
    weight: str


Seen = Callable[[str, Float[Tensor, "*T in"], Float[Tensor, "*T out"]], Float[Tensor, "*T out"]]
"""Name of the parameter, input and output of a linear map -> the output to go on with."""


class LinearMaps(TorchFunctionMode):
    """Inside, the output of every linear map of a module's own parameter goes through `seen(name, input, output)`.

    A map is known by its parameter, never by its shape.
    """

    CASTS = frozenset({Tensor.to, Tensor.type, Tensor.float})

    def __init__(self, module: nn.Module, seen: Seen) -> None:
        super().__init__()
        self.seen = seen
        self.names: dict[Tensor, str] = {parameter: name for name, parameter in module.named_parameters()}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call `func`, and `seen` after it if it is a linear map."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func in self.CASTS and args[0] in self.names:
            self.names[out] = self.names[args[0]]  # DeepSeek multiplies with a float32 copy of its bfloat16 weight
        elif func is nn.functional.linear:
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            if weight in self.names:
                return self.seen(self.names[weight], args[0] if args else kwargs["input"], out)
        return out


def router_matrix(router: nn.Module, convention: RouterConvention) -> tuple[str, nn.Parameter]:
    """The module within a router that owns the matrix of its logits ("" for the router itself), and that matrix.

    Families keep it as `weight`, or in a linear map `wg` (HunYuan), `gate` (AFMoE) or `proj` of the router's.
    """
    return convention.weight.rpartition(".")[0], router.get_parameter(convention.weight)


def top_k_name(config: Any) -> str:
    """What a family's configuration calls the experts per token."""
    names = "num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "moe_top_k", "top_k_experts"
    return next(name for name in names if hasattr(config, name))


def find_blocks(model: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    """(router, experts) of every block that has both, in order.

    Raises:
        UnsupportedModel: for experts or routers of a kind that cannot be given a budget.
    """
    for module in model.modules():
        experts = getattr(module, "experts", None)
        router = getattr(module, "gate", None) or getattr(module, "router", None)
        if isinstance(experts, nn.Module) and hasattr(experts, "num_experts") and isinstance(router, nn.Module):
            if not hasattr(experts, "is_transposed"):
                raise UnsupportedModel(
                    f"{type(experts).__name__} does not follow the experts interface of this transformers, which is not supported"
                )
            if getattr(experts, "has_post_expert_norm", False):
                raise UnsupportedModel(
                    f"{type(experts).__name__} normalises each expert's output, which is not supported"
                )
            if not isinstance(getattr(router, "top_k", None), int):
                raise UnsupportedModel(
                    f"{type(router).__name__} has no top_k of its own, so no budget can be set on it, which is not supported"
                )
            yield router, experts


Routed = tuple[Float[Tensor, "T M"], Float[Tensor, "T K"], Int[Tensor, "T K"]]
"""What a router returns: logits, gate weights, chosen experts."""


@torch.no_grad()
def observe_router(router: nn.Module, num_experts: int) -> RouterConvention:
    """Run a router on random inputs, at K = 1, 2 and its own, and see what it does.

    What it takes beside the hidden states is a bias per expert on the choice (MiniMax-M2, LFM2-MoE, AFMoE, HY-V3), drawn at random
    too. A router on the meta device is tried out on a copy with random numbers in it.

    Raises:
        UnsupportedModel: if it ignores `top_k` (PhiMoE always takes two), needs more than that, scores its experts in
            another way, or computes its logits by more than one linear map.
    """
    if next(router.parameters()).is_meta:
        router = _with_random_weights(router)
    name, maps = type(router).__name__, dict[str, Tensor]()
    runs = _try_out(router, name, maps, num_experts)
    for top_k, (logits, _, index) in runs.items():
        if index.shape[-1] != top_k or logits.shape[-1] != num_experts:
            raise UnsupportedModel(
                f"{name} ignores top_k (asked for {top_k} experts per token, got {index.shape[-1]}): "
                "clients of different budgets are impossible with this family"
            )
    one, two = (runs[top_k][1].float().sum(-1) for top_k in (1, 2))
    logits, _, index = runs[int(router.top_k)]  # type: ignore[arg-type]
    kept, best = logits.gather(-1, index), logits.topk(index.shape[-1], dim=-1).values
    owners = [weight for weight, out in maps.items() if torch.equal(out.to(logits.dtype), logits)]
    if not owners:
        raise UnsupportedModel(f"{name} computes its logits by other means than one linear map, which is not supported")
    return RouterConvention(
        renormalises=torch.allclose(one, two, rtol=1e-2),
        scoring=_scoring(name, runs[2]),
        # compared by their sum: ties may fall either way
        by_score=torch.allclose(kept.float().sum(-1), best.float().sum(-1), atol=1e-3),
        weight=owners[0],
    )


def _try_out(router: nn.Module, name: str, maps: dict[str, Tensor], num_experts: int) -> dict[int, Routed]:
    """What a router returns for the same hidden states at each K; `maps` gets the outputs of its linear maps.

    The inputs are scaled to logits of size 1: a sharper router puts all its weight on one expert whatever K, a flatter one
    drowns the difference between softmax and sigmoid in rounding.
    """

    def seen(weight: str, hidden: Float[Tensor, "*T h"], out: Float[Tensor, "*T M"]) -> Float[Tensor, "*T M"]:
        maps[weight] = out
        return out

    stock, weight = router.top_k, next(router.parameters())
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(16, weight.shape[-1], generator=generator).to(weight.device, weight.dtype)
    biases = [torch.randn(num_experts, generator=generator).to(weight.device) for _ in _biases(router)]
    runs = {}
    try:
        size = nn.functional.linear(hidden.float(), weight.float()).std()
        hidden = (hidden / size.clamp_min(1e-6)).to(weight.dtype)
        for top_k in (1, 2, int(stock)):  # type: ignore[arg-type]
            router.top_k = top_k  # type: ignore[assignment]
            with LinearMaps(router, seen):
                runs[top_k] = _run(router, hidden, biases)
    except Exception as error:  # a router is anybody's code
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UnsupportedModel(
            f"{name} cannot be run on hidden states and a bias per expert alone: {reason}"
        ) from error
    finally:
        router.top_k = stock
    return runs


def _run(router: nn.Module, hidden: Float[Tensor, "T h"], biases: list[Float[Tensor, " M"]]) -> Routed:
    """What a router returns for these tokens, which some want as [B, T, h]."""
    try:
        out = router(hidden, *biases)
    except (ValueError, IndexError):
        out = router(hidden.unsqueeze(0), *biases)
    if not isinstance(out, tuple) or len(out) != 3:
        raise ValueError(
            f"it returns {len(out) if isinstance(out, tuple) else 1} values; expected logits, weights and indices"
        )
    return out


def _biases(router: nn.Module) -> list[str]:
    """What its forward takes beside the hidden states: all that it must have, and whatever is called a bias."""
    _, *others = inspect.signature(router.forward).parameters.values()
    named = [one for one in others if one.kind is one.POSITIONAL_OR_KEYWORD]
    return [one.name for one in named if one.default is one.empty or "bias" in one.name]


def _scoring(name: str, routed: Routed) -> Literal["softmax", "sigmoid"]:
    """Which scores explain the first expert's share in the weights of two."""
    logits, weights, index = routed
    chosen = logits.float().gather(-1, index)
    share = weights[:, 0].float() / weights.float().sum(-1)
    soft = (chosen.softmax(-1)[:, 0] - share).abs().mean()
    sigmoid = (chosen[:, 0].sigmoid() / chosen.sigmoid().sum(-1) - share).abs().mean()
    if min(soft, sigmoid) > 0.02:
        raise UnsupportedModel(f"{name} scores its experts neither by softmax nor by sigmoid, which is not supported")
    return "softmax" if soft <= sigmoid else "sigmoid"


def _with_random_weights(router: nn.Module) -> nn.Module:
    """A copy of a router on the CPU: one layer's router is small, even where its model is not."""
    twin = copy.deepcopy(router).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for tensor in (*twin.parameters(), *twin.buffers()):
        # a correction bias is filled too, for a trained model's is not zero
        tensor.data.copy_(torch.randn(tensor.shape, generator=generator))
    return twin


@torch.enable_grad()
def answers_stay_put(model: Any, experts: nn.Module) -> bool:
    """Whether what these experts answer for a token reaches the logits of that token alone, as in a last layer.

    Tried out on four tokens: the gradient of one token's logits by the answers for all. Where answers go does not depend on
    what they are, so no expert runs: where a base is mapped, those chosen would be read from disk.
    Without weights nothing can be tried out, and False is the answer that is right for every model.
    """
    if model.device.type == "meta":
        return False
    answers: list[Float[Tensor, "*T h"]] = []

    def watch(module: nn.Module, args: object, answer: Float[Tensor, "*T h"]) -> Float[Tensor, "*T h"]:
        answers.append(answer.detach().requires_grad_())
        return answers[-1]

    hook = experts.register_forward_hook(watch)
    try:
        with experts_run_by(model, ECHO):
            logits = model(input_ids=torch.arange(4, device=model.device).unsqueeze(0), use_cache=False).logits
    finally:
        hook.remove()
    reached = [grad.reshape(4, -1).any(-1) for grad in torch.autograd.grad(logits[0, 2].square().sum(), answers)]
    return len(reached) == 1 and reached[0].tolist() == [False, False, True, False]


def _echo(
    module: nn.Module,
    hidden: Float[Tensor, "T h"],
    top_k_index: Int[Tensor, "T K"],
    top_k_weights: Float[Tensor, "T K"],
) -> Float[Tensor, "T h"]:
    return hidden


ALL_EXPERTS_FUNCTIONS.register(ECHO, _echo)


@contextmanager
def experts_run_by(model: Any, implementation: str) -> Iterator[None]:
    """Inside, another implementation runs the experts."""
    stock = model.config._experts_implementation
    model.set_experts_implementation(implementation)
    try:
        yield
    finally:
        model.set_experts_implementation(stock)
