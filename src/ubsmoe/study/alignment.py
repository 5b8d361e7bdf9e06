"""Does a pseudo-gradient point along the gradient that top-K leaves out? Asked of every state that a run has kept.

    g_i^miss = (gradient of expert i under `oracle`) - (its plain gradient)      what expert i lacks from tokens that did not use it

One fixed batch of one client, the first of the lowest tier, meets the state after each kept round as a client of each tier
would, at that tier's K. A signal is compared with g_i^miss over all trained numbers of an expert together, expert by expert.
Controls: a random direction, and another expert's plain gradient.

Source: UB-SMoE (arXiv 2605.16690), section 6.3.4; the batch, the controls and the two groups of experts are ours.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from ubsmoe import progress
from ubsmoe.client.train import language_loss
from ubsmoe.config import ConfigError
from ubsmoe.data.tokens import batches, collate, pad_id
from ubsmoe.finished.run import settings_of_run
from ubsmoe.maths.pseudo_gradient import Mode, PseudoGradient, parameter_signal
from ubsmoe.messages import Profile
from ubsmoe.methods.state import unpack
from ubsmoe.model.adapter import layer_of_experts
from ubsmoe.model.surgery import SparseModel
from ubsmoe.seeds import generator_for
from ubsmoe.server.federation import Federation, build_federation
from ubsmoe.storage.runfolder import read_run, read_states

RESCALED: tuple[Mode, ...] = ("client_mean", "self_ipw")
FRACTIONS = (0.1, 0.5)
SIGNALS = (*RESCALED, *(f"sampled {fraction}" for fraction in FRACTIONS), "random", "another expert")

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class LayerSignals:
    """One layer's experts, each row all trained numbers of one: what it lacks, what each signal offers, and who was used."""

    missing: Tensor
    offered: dict[str, Tensor]
    used: Tensor

    def cosines(self, group: Tensor) -> dict[str, list[float]]:
        """Signal -> cosine with what is missing, for each expert in `group` [M] that lacks anything."""
        picked = group & (self.missing.norm(dim=1) > 0)
        truth = self.missing[picked]
        return {name: cosine_similarity(value[picked], truth).tolist() for name, value in self.offered.items()}


def probe_run(path: Path) -> Iterator[Rows]:
    """The cosines of a run, one kept round at a time.

    Yields:
        Rows of round, tier (from 1), top_k, experts ("some": used by some tokens of the batch and not by others, "never": by
        none), count, signal, cosine (mean over layers and experts).

    Raises:
        UserError: if there is no run, no checkpoint of it, its base is another by now, or its method picks who learns.
    """
    record = read_run(path)
    states = read_states(path)
    federation = build_federation(settings_of_run(path, {}))
    if record.summary and record.summary["base_sha256"] != federation.base_sha256:
        raise ConfigError(f"model.base: {path} was trained on another base than {federation.settings.model.base}")
    for checkpoint in states:
        progress.at(f"measures alignment after round {checkpoint.round}")
        state, rows = unpack(checkpoint.tensors, federation.method.keeps), []
        for profile in federation.tiers:
            if profile.top_k < federation.shape.num_experts:
                rows += _probe_tier(federation, federation.method.dispatch(state, profile), profile, checkpoint.round)
        yield rows


def _probe_tier(federation: Federation, payload: dict[str, Tensor], profile: Profile, number: int) -> Rows:
    model, seed = federation.model_of(profile), federation.settings.seed
    batch = fixed_batch(federation)
    try:
        federation.method.install(model, payload, profile, generator_for(seed, "alignment"))
        if any(layer.routing.trainable_rule for layer in model.layers):
            raise ConfigError(
                f"method {federation.method.name} selects the experts that learn from a batch: they lack more than top-K"
            )
        draw = generator_for(seed, number, profile.tier, "alignment")
        layers = layer_signals(model, lambda: language_loss(model, batch).backward(), draw)
    finally:
        model.clear()
    rows = []
    for group in ("some", "never"):
        found: dict[str, list[float]] = {}
        for layer in layers:
            for name, values in layer.cosines(layer.used if group == "some" else ~layer.used).items():
                found.setdefault(name, []).extend(values)
        rows += [
            {
                "round": number,
                "tier": profile.tier + 1,
                "top_k": profile.top_k,
                "experts": group,
                "count": len(values),
                "signal": name,
                "cosine": sum(values) / len(values),
            }
            for name, values in found.items()
            if values
        ]
    return rows


def fixed_batch(federation: Federation) -> dict[str, Tensor]:
    """A training batch of the first client with the smallest budget, the same in every round and tier."""
    client = min(federation.clients, key=lambda profile: profile.budget).client
    settings, examples = federation.settings, federation.examples[client]
    order = batches(len(examples), settings.train.batch_size, generator_for(settings.seed, client, "alignment"))
    return collate([examples[i] for i in next(order)], pad_id(federation.tokenizer), settings.data.loss_on_prompt)


def layer_signals(model: SparseModel, backward: Callable[[], object], draw: torch.Generator) -> list[LayerSignals]:
    """Every signal at strength 1, for one batch.

    Args:
        model: with an adapter and a budget in place.
        backward: runs the batch forward and backward.
        draw: for the sampled pairs and the random direction.
    """

    def under(mode: Mode, fraction: float = 1.0) -> list[dict[str, Tensor]]:
        return _gradients(model, backward, PseudoGradient(mode, strength=1.0, fraction=fraction), draw)

    plain = under("client_mean")  # the experts' signal is added later
    masses = [layer.observed.mass for layer in model.layers]
    oracle = under("oracle")
    sampled = {f"sampled {fraction}": under("sampled", fraction) for fraction in FRACTIONS}
    found = []
    for index, (grads, mass) in enumerate(zip(plain, masses, strict=True)):
        assert mass is not None, "K = M leaves nothing out"
        own, used = _flat(grads), mass.active > 0
        missing = _flat(oracle[index]) - own
        offered: dict[str, Tensor] = {}
        for mode in RESCALED:
            signal = PseudoGradient(mode, strength=1.0)
            offered[mode] = _flat({name: parameter_signal(signal, grad, mass) for name, grad in grads.items()})
        offered |= {name: _flat(layers[index]) - own for name, layers in sampled.items()}
        offered["random"] = torch.randn(missing.shape, generator=draw).to(missing) * (missing != 0)
        offered["another expert"] = own[_others(used)]
        found.append(LayerSignals(missing, offered, used))
    return found


def _gradients(
    model: SparseModel, backward: Callable[[], object], settings: PseudoGradient, draw: torch.Generator
) -> list[dict[str, Tensor]]:
    """Per layer, the gradients of its experts' tensors; masses stay in the layers."""
    model.set_pseudo_gradient(settings, draw)
    for value in model.adapter.values():
        value.grad = None
    backward()
    found: list[dict[str, Tensor]] = []
    for layer in model.layers:
        own = {name: value.grad for name, value in model.adapter.items() if name.startswith(f"layers.{layer.index}.")}
        found.append(
            {name: grad for name, grad in own.items() if grad is not None and layer_of_experts(name) is not None}
        )
    return found


def _flat(parts: Mapping[str, Tensor]) -> Tensor:
    """[M, all numbers of the expert]."""
    return torch.cat([part.flatten(1) for part in parts.values()], dim=1)


def _others(used: Tensor) -> list[int]:
    """For each expert another one that was used, as far as there is one."""
    live = used.nonzero().flatten().tolist()
    return [next((j for j in live[n % len(live) :] + live if j != n), n) for n in range(len(used))]
