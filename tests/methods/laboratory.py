"""A tiny base and made-up updates, so that every method can be tried without training."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from transformers import OlmoeConfig, OlmoeForCausalLM

from ubsmoe.costs.shape import ModelShape
from ubsmoe.messages import Profile, Update
from ubsmoe.methods.method import Method, RunShape, State, contribution
from ubsmoe.model.adapter import layer_of_experts
from ubsmoe.model.presets import shape_from_config
from ubsmoe.model.surgery import SparseModel

LAYERS, EXPERTS, K_MAX, HIDDEN, WIDTH, VOCAB = 2, 6, 3, 12, 10, 32
BUDGETS, RANKS, TOP = (0.25, 0.5, 0.75, 1.0), (2, 3, 5, 7), 3
EXAMPLES = (5, 2, 9, 4)

Dense = dict[str, Tensor]


def generator(*seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(sum(10**i * part for i, part in enumerate(seed)))


def aggregated(method: Method, state: State, updates: Iterable[Update]) -> State:
    """The state after a round of these updates, when nothing robust or private acts on them."""
    return method.aggregate(state, map(contribution, updates))


@dataclass(frozen=True)
class Lab:
    """Every size differs from every other, ranks exceed no layer, alpha / rank is rarely a power of two.

    Routers and attention are trained as well. `sizes` are those of the base, `shape` is what a method knows of the run.
    """

    model: SparseModel
    sizes: ModelShape
    shape: RunShape

    @classmethod
    def build(cls) -> "Lab":
        torch.manual_seed(0)
        config = OlmoeConfig(
            vocab_size=VOCAB,
            hidden_size=HIDDEN,
            intermediate_size=WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=2,
            num_key_value_heads=2,
            num_experts=EXPERTS,
            num_experts_per_tok=K_MAX,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=1,
        )
        model = SparseModel(OlmoeForCausalLM(config).eval())
        shape = RunShape(LAYERS, EXPERTS, K_MAX, rank=4, alpha=6.0, attention=True, top_ks=(1, 2, K_MAX))
        return cls(model, shape_from_config(config), shape)

    @cached_property
    def skeleton(self) -> SparseModel:
        """The base without numbers, on the meta device."""
        skeleton = SparseModel(OlmoeForCausalLM(self.model.model.config).eval())
        skeleton.model.to("meta")
        return skeleton

    def start(self, method: Method) -> State:
        rank = self.profile(method, TOP).rank
        state = method.start(self.model.fresh_adapter(rank, generator(1), shared_a=True, router=True, attention=True))
        if method.calibration is None:
            return state
        ids = torch.arange(2, 2 + 24).reshape(4, 6)
        text = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return method.calibration.fit(state, self.model, text, self.profile(method, TOP), generator(5))

    def profile(self, method: Method, tier: int, client: str = "someone") -> Profile:
        return method.profile(self.shape, client, tier, BUDGETS[tier], RANKS[tier], EXAMPLES[tier])

    def effective(self, method: Method, state: State, tier: int = TOP) -> Dense:
        """The dense update of every matrix that a tier's evaluation sees, float64."""
        profile = self.profile(method, tier)
        method.install(self.model, method.dispatch(state, profile), profile, generator(2))
        return self._take_off()

    def update(
        self,
        method: Method,
        state: State,
        tier: int,
        *,
        noise: float = 0.1,
        untouched: Sequence[int] = (),
        seed: int = 0,
    ) -> tuple[Update, Dense]:
        """What a client would return had training moved its tensors at random, and the same as a dense update."""
        client = f"client-{tier}"
        profile = self.profile(method, tier, client)
        hooks = method.install(self.model, method.dispatch(state, profile), profile, generator(3, seed, tier))
        touched = torch.ones(EXPERTS)
        touched[list(untouched)] = 0
        draw = generator(4, seed, tier)
        for name, parameter in self.model.adapter.items():
            step = noise * torch.randn(parameter.shape, generator=draw)
            moved = step if layer_of_experts(name) is None else step * touched[:, None, None]
            parameter.data.add_(moved)
        tokens = 20
        update = Update(
            client=client,
            round=1,
            num_examples=profile.num_examples,
            adapters={name: value.detach().clone() for name, value in self.model.adapter.items()},
            expert_tokens=_counts(tokens, profile.top_k, touched),
            tokens=tokens,
            assignments=tokens * profile.top_k,
            loss=1.0,
            seconds=1.0,
            extras={name: value.detach().clone() for name, value in hooks.extras().items()},
        )
        return update, self._take_off()

    def round(self, method: Method, state: State, **how: object) -> list[Update]:
        """One update per tier, in client order."""
        return [self.update(method, state, tier, **how)[0] for tier in range(len(RANKS))]  # type: ignore[arg-type]

    def warm(self, method: Method) -> State:
        """A state after a round, where nothing is zero any more."""
        state = self.start(method)
        return aggregated(method, state, self.round(method, state, seed=7))

    def _take_off(self) -> Dense:
        dense = {}
        for layer in self.model.layers:
            assert layer.routing.adapter is not None
            matrices = dict(zip(("up", "down"), layer.routing.adapter, strict=True))
            matrices |= {f"attention.{name}": matrix for name, matrix in layer.attention.adapters.items()}
            for name, matrix in matrices.items():
                a, b = matrix.joined()
                dense[f"layers.{layer.index}.{name}"] = layer.routing.lora_scale * (
                    b.detach().double() @ a.detach().double()
                )
        self.model.clear()
        return dense


def _counts(tokens: int, top_k: int, touched: Tensor) -> Tensor:
    """[L, M]: every token goes to the same number of experts, those that are touched, in turn."""
    experts = touched.nonzero().flatten()
    chosen = experts[torch.arange(tokens * top_k) % len(experts)]
    return torch.bincount(chosen, minlength=EXPERTS).expand(LAYERS, -1).clone()
