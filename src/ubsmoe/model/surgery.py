"""Surgery on a transformers sparse-MoE model: budgets, modulation, adapters and counters, without touching its code.

Two seams carry everything: the routers (layer.py), and an experts function registered with transformers (experts.py).
"""

import math
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from ubsmoe.maths.pseudo_gradient import PseudoGradient
from ubsmoe.model.adapter import MatrixAdapter
from ubsmoe.model.adapter_fit import check_fit
from ubsmoe.model.attention import find_projections
from ubsmoe.model.compensation import layer_compensations
from ubsmoe.model.conventions import UnsupportedModel, answers_stay_put, find_blocks
from ubsmoe.model.experts import IMPLEMENTATION
from ubsmoe.model.layer import SparseLayer, attach, is_attached
from ubsmoe.model.quantised import format_of
from ubsmoe.model.routing import Rescale, TrainableRule, positions


class SparseModel:
    """A frozen base with budgets, modulation and adapters that can be set for one client and taken off again.

    A model on the meta device, which has shapes but no weights, can be operated on too: everything works but running it.

    Attributes:
        model: the transformers model; its parameters are frozen and never written.
        layers: the SMoE layers in order.
        sha256: of the base's plain weights, where it was loaded from files.
        adapter: the trainable tensors now in place, by their name on the wire.
        device: where adapters are put: where the base is, unless it has no weights and its adapters are to be read off again.

    Raises:
        UnsupportedModel: if the model has no experts, or its routers ignore `top_k`.
    """

    def __init__(self, model: Any, rescale: Rescale = "none") -> None:
        blocks = list(find_blocks(model))
        if any(is_attached(router) for router, _ in blocks):
            raise ValueError("this model already belongs to a SparseModel: use that one, or load the base again")
        self.model = model.requires_grad_(False)
        self.layers = [SparseLayer(i, *pair, find_projections(model, pair[0])) for i, pair in enumerate(blocks)]
        if not self.layers:
            raise UnsupportedModel(
                f"{type(model).__name__} has no mixture-of-experts layers that can be given a budget; expected a sparse "
                "mixture of experts behind transformers' experts interface (OLMoE, Mixtral, Qwen-MoE, DeepSeek, gpt-oss, ...)"
            )
        if len({(layer.num_experts, layer.k_max) for layer in self.layers}) > 1:
            raise UnsupportedModel(
                f"{type(model).__name__} has layers of different numbers of experts, which is not supported"
            )
        self.sha256 = ""
        self.adapter: dict[str, nn.Parameter] = {}
        self.device: torch.device = next(model.parameters()).device
        self._keep: Bool[Tensor, "B S"] | None = None
        for layer in self.layers:
            layer.rescale = rescale
            attach(layer)
        quantised = format_of(blocks[-1][1]) is not None  # which only our own implementation can run
        self._stock = IMPLEMENTATION if quantised else model.config._experts_implementation
        model.set_experts_implementation(self._stock)
        self._last_stays_put = answers_stay_put(model, blocks[-1][1])
        model.register_forward_pre_hook(self._remember_tokens, with_kwargs=True)
        # generation reads each row's last position: torch would copy the whole head for every row of that strided view
        model.get_output_embeddings().register_forward_pre_hook(lambda module, args: (args[0].contiguous(),))

    @property
    def num_experts(self) -> int:
        """M."""
        return self.layers[0].num_experts

    @property
    def k_max(self) -> int:
        """The base's own number of experts per token."""
        return self.layers[0].k_max

    def limit_k_max(self, k_max: int) -> None:
        """Let budget 1 mean fewer experts per token than the base was trained with."""
        for layer in self.layers:
            layer.k_max = k_max
            layer.routing = replace(layer.routing, top_k=k_max)

    def set_top_k(self, top_k: int) -> None:
        """Experts per token in every layer. Raises ValueError outside 1..K_max, or 0..K_max once compensations are installed."""
        if not (least := self.layers[0].least_top_k) <= top_k <= self.k_max:
            raise ValueError(f"top_k must lie in {least}..{self.k_max} for this base, got {top_k}")
        for layer in self.layers:
            layer.routing = replace(layer.routing, top_k=top_k)

    def set_phi(self, phi: Float[Tensor, "..."] | None, num_candidates: int | None = None) -> None:
        """Modulate every router by its row of `phi` [L, M] on the `num_candidates` best experts of each token."""
        need = (len(self.layers), self.num_experts)
        if phi is not None and tuple(phi.shape) != need:
            raise ValueError(f"phi has shape {tuple(phi.shape)}, this base needs {need}")
        for layer in self.layers:
            row = None if phi is None else phi[layer.index]
            layer.routing = replace(layer.routing, phi=row, num_candidates=num_candidates or layer.num_experts)

    def set_pseudo_gradient(self, settings: PseudoGradient | None, generator: torch.Generator | None = None) -> None:
        """Switch a pseudo-gradient on; `generator` draws the assignments of the `sampled` mode."""
        active = settings if settings and settings.mode != "off" and settings.strength > 0 else None
        for layer in self.layers:
            layer.routing = replace(layer.routing, pseudo_gradient=active, generator=generator)
            layer.take_mass()

    def record(self) -> None:
        """Keep the scores and the choice of every forward pass, for `layer.scores()` and `layer.chosen()`."""
        for layer in self.layers:
            layer.routing = replace(layer.routing, recording=True)

    def set_selection_bias(self, bias: Float[Tensor, "L M"]) -> None:
        """Let routers choose by score plus `bias`, and weigh by the score alone.

        Raises:
            UnsupportedModel: for a family that does not simply take the K largest scores.
        """
        for layer in self.layers:
            if not layer.convention.by_score:
                name = type(layer.router).__name__.removeprefix("Budgeted")
                raise UnsupportedModel(
                    f"{name} chooses its experts by more than their scores (groups, or a bias of its own), so a selection "
                    "bias would replace its rule; choose another method or base"
                )
            layer.routing = replace(layer.routing, selection_bias=bias[layer.index].to(self.device))

    def set_output_scale(self, scale: Float[Tensor, " L"]) -> None:
        """Multiply the routed experts' sum in layer l by `scale[l]`; shared experts are left alone."""
        for layer in self.layers:
            layer.routing = replace(layer.routing, output_scale=scale[layer.index])

    def set_compensation(self, tensors: Mapping[str, Tensor]) -> None:
        """Let `compensation.{layer}...` stand for the experts that a budget skips; without any, gate weights alone are K_max's."""
        placed = {n: t.to(self.device, self.model.dtype if t.is_floating_point() else None) for n, t in tensors.items()}
        widths = [layer.shapes()["down"][1] for layer in self.layers]
        for layer, own in zip(self.layers, layer_compensations(placed, widths), strict=True):
            layer.routing = replace(layer.routing, compensation=own)
        self.model.set_experts_implementation(IMPLEMENTATION)

    @property
    def num_run(self) -> int:
        """Experts per token that run now, whole or in slices."""
        return self.layers[0].num_run

    def set_trainable_experts(self, trainable_rule: Sequence[TrainableRule]) -> None:
        """One rule per layer: which experts are trained on a batch. The others run too, but without a backward pass."""
        self.record()
        for layer, rule in zip(self.layers, trainable_rule, strict=True):
            layer.routing = replace(layer.routing, trainable_rule=rule)

    def fresh_adapter(
        self, rank: int, generator: torch.Generator, *, shared_a: bool, router: bool = False, attention: bool = False
    ) -> dict[str, Tensor]:
        """A new adapter: A uniform in +-1/sqrt(in) (one A for all experts of a layer if `shared_a`), B zero, float32.

        Returns:
            `layers.{l}.{up|down}.A` [M, rank, in], `.B` [M, out, rank], with `router` `layers.{l}.router` [M, h] zero, with
            `attention` `layers.{l}.attention.{q_proj|...}.A` [1, rank, in] and `.B` [1, out, rank].

        Raises:
            UnsupportedModel: if `attention` is asked for and a layer has none.
        """
        tensors: dict[str, Tensor] = {}
        for layer in self.layers:
            for name, (experts, out_features, in_features) in layer.matrices(attention).items():
                first = (1 if shared_a else experts, rank, in_features)
                a = (torch.rand(first, generator=generator) * 2 - 1) / math.sqrt(in_features)
                tensors[f"layers.{layer.index}.{name}.A"] = a.expand(experts, -1, -1).clone()
                tensors[f"layers.{layer.index}.{name}.B"] = torch.zeros(experts, out_features, rank)
            if router:
                tensors[f"layers.{layer.index}.router"] = torch.zeros(layer.num_experts, layer.shapes()["up"][1])
        return tensors

    def load_adapter(
        self,
        tensors: Mapping[str, Tensor],
        alpha: float,
        side: Mapping[str, Tensor] | None = None,
        frozen: Container[str] = (),
    ) -> None:
        """Put copies of `tensors` in place as trainable parameters; the rank is theirs, the factor alpha / rank.

        Args:
            tensors: A and B of every expert matrix, maybe of attention projections; maybe cores R [M, rank, rank] between
                them, maybe the routers' differences.
            alpha: LoRA's numerator.
            side: `side.layers.{l}.{up|down}.A` and `.B` and so on, a frozen adapter of factor 1 and any rank beside `tensors`.
            frozen: names in `tensors` that are used but not trained; `adapter` leaves them out.

        Raises:
            ValueError: if a tensor is missing, unknown or of another shape than this base needs.
        """
        check_fit(self.layers, tensors, side or {})

        def placed(tensor: Float[Tensor, "*S"]) -> Float[Tensor, "*S"]:
            # contiguous, and below by name: a gradient's norm depends on both, and a message keeps neither
            return tensor.detach().to(self.device, torch.float32, copy=True, memory_format=torch.contiguous_format)

        values = {
            name: placed(tensors[name]) if name in frozen else nn.Parameter(placed(tensors[name]))
            for name in sorted(tensors)
        }
        self.adapter = {name: value for name, value in values.items() if isinstance(value, nn.Parameter)}

        def on(matrix: str, scale: float) -> MatrixAdapter:
            beside = None
            if side:
                beside = placed(side[f"side.{matrix}.A"]), placed(side[f"side.{matrix}.B"]) / scale
            return MatrixAdapter(values[f"{matrix}.A"], values[f"{matrix}.B"], values.get(f"{matrix}.R"), beside)

        for layer in self.layers:
            prefix = f"layers.{layer.index}"
            scale = alpha / values[f"{prefix}.up.A"].shape[1]
            layer.routing = replace(
                layer.routing,
                adapter=(on(f"{prefix}.up", scale), on(f"{prefix}.down", scale)),
                lora_scale=scale,
                router_delta=values.get(f"{prefix}.router"),
            )
            names = [name for name in layer.attention.projections if f"{prefix}.attention.{name}.A" in values]
            layer.attention.put({name: on(f"{prefix}.attention.{name}", scale) for name in names}, scale)
        self.model.set_experts_implementation(IMPLEMENTATION)

    def clear(self) -> None:
        """Take everything off: the model is the stock base again, bit for bit."""
        self.adapter = {}
        for layer in self.layers:
            layer.clear()
        self.model.set_experts_implementation(self._stock)

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count routed tokens, padding left out, from zero; where the model is, which is asked at the end alone."""
        zeros = torch.zeros(self.num_experts, dtype=torch.int64, device=self.device)
        for layer in self.layers:
            layer.observed = replace(layer.observed, expert_tokens=zeros)
            layer.counting = True
        try:
            yield
        finally:
            for layer in self.layers:
                layer.counting = False

    def expert_tokens(self) -> Int[Tensor, "L M"]:
        """Tokens routed to each expert since counting began."""
        return torch.stack([layer.observed.expert_tokens for layer in self.layers]).cpu()

    def logits_at(
        self, input_ids: Int[Tensor, "B S"], attention_mask: Shaped[Tensor, "B S"], keep: Bool[Tensor, "B kept"]
    ) -> Float[Tensor, "N V"]:
        """Logits at the positions of `keep` only, in row order.

        With the loss on short answers the output head would otherwise cost as much as the experts of a small budget.

        Args:
            input_ids: of a batch.
            attention_mask: 0 on padding, which is on the right.
            keep: for a leading part of each row's positions.
        """
        with self.reading(nn.functional.pad(keep, (0, input_ids.shape[1] - keep.shape[1]))):
            out = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        logits: Float[Tensor, "1 N V"] = out.logits
        return logits[0]

    @contextmanager
    def reading(self, keep: Bool[Tensor, "B S"]) -> Iterator[None]:
        """Inside, the model's logits are [1, N, V]: those of the positions of `keep` only, in row order.

        Neither the output head nor the experts of the last layer compute anything for other positions. Routing does.
        """
        rows, columns = keep.nonzero(as_tuple=True)
        head = self.model.get_output_embeddings()
        hook = head.register_forward_pre_hook(lambda module, args: (args[0][rows, columns].unsqueeze(0),))
        self._keep = keep if self._last_stays_put else None
        try:
            yield
        finally:
            hook.remove()
            self._keep = None

    def _remember_tokens(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = dict(zip(("input_ids", "attention_mask"), args, strict=False)) | kwargs
        mask, inputs = given.get("attention_mask"), given.get("input_ids")
        inputs = given.get("inputs_embeds") if inputs is None else inputs
        if not isinstance(mask, Tensor) or mask.dim() != 2 or inputs is None or mask[:, -inputs.shape[1] :].all():
            mask = None
        else:  # in a decoding step the mask covers the cache too
            mask = mask[:, -inputs.shape[1] :]
        real, read = positions(mask), positions(self._keep)
        # they stay beyond the forward pass, for layers that run again in the backward pass
        for layer in self.layers:
            keep = self._keep if layer is self.layers[-1] else None
            rows = real if keep is None else read
            layer.observed = replace(layer.observed, attention_mask=mask, read=keep, rows=rows)
