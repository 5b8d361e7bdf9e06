"""UB-SMoE: Dynamic Modulated Routing (DMR) and the Universal Pseudo-Gradient (PG).

A round, as in Figure 1 of the paper:

    (1) the server knows the utilization   u_i = sum_c p_c a_{c,i} / n_c
    (2) clients route with                 m_i = s_i + phi_i on the N_p best experts of each token
    (3) each activates                     K_c = max(1, floor(K_max beta_c)) experts
    (4) inactive experts receive pseudo-gradients during local training (maths/pseudo_gradient.py)
    (5) clients return updates and counts; theta <- theta + sum_c p_c (theta_c - theta),
        phi <- zeta phi + (1 - zeta) tanh(u* / (u_i + eps) - 1),  u* = mean_i u_i

The paper states steps 1-5, the tanh target and momentum, and that phi may also be trained with a range penalty. Ours: the
defaults N_p = 2 K_max, zeta = 0.9, which side zeta weighs, every PG formula (the paper's is not public), PG's strength and
scope, and activation-aware averaging as an option. Each default has its row in docs/results.md, Screening, where nothing
beat it beyond the noise (zeta: momentum; N_p: num_candidates; pg_mode, pg_strength, pg_scope; phi; activation_power).
`dmr = false` or `pg_mode = "off"` switch the parts off one by one.

Source: UB-SMoE (arXiv 2605.16690).
"""

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor

from ubsmoe.costs.shape import ModelShape
from ubsmoe.maths import routing
from ubsmoe.maths.pseudo_gradient import Mode, PseudoGradient, Scope, Sparsity, parameter_signal, unit_rows
from ubsmoe.messages import Profile, Tensors, Update
from ubsmoe.methods.method import USE_WEIGHS, Base, Hooks, Method, State, activation_weights, install_adapter
from ubsmoe.model.adapter import layer_of_experts
from ubsmoe.model.surgery import SparseModel


def ubsmoe(
    base: Base,
    *,
    dmr: bool = True,
    num_candidates: int | None = None,
    momentum: float = 0.9,
    epsilon: float = 1e-6,
    phi: Literal["server", "trained"] = "server",
    phi_penalty: float = 1e-2,
    phi_min: float = -1.0,
    phi_max: float = 1.0,
    pg_mode: Mode = "client_mean",
    pg_strength: float = 0.3,
    pg_scope: Sequence[Scope] = ("experts",),
    pg_sparsity: Sparsity = "experts",
    pg_fraction: float = 0.1,
    pg_limit: float = 10.0,
    pg_decay: float = 0.95,
    activation_power: float = 0.0,
) -> Method:
    """Build the method.

    Args:
        base: sizes of the run.
        dmr: modulate the routers.
        num_candidates: N_p, experts per token that phi may move; 2 K_max when left out.
        momentum: zeta, the share of the old phi that stays.
        epsilon: keeps u* / u finite.
        phi: "server": only utilization moves it; "trained": clients train it too, kept in range by a penalty.
        phi_penalty: lambda of that penalty, outside [phi_min, phi_max].
        phi_min: lower end of the range.
        phi_max: upper end of the range.
        pg_mode: which pseudo-gradient; the modes stand in maths/pseudo_gradient.py.
        pg_strength: factor on it.
        pg_scope: where it acts: "experts", "router", "hidden".
        pg_sparsity: rho_c, "experts" 1 - K/M, "k_max" 1 - K/K_max, "inverse" M/K.
        pg_fraction: share of missing pairs that `sampled` computes.
        pg_limit: bound on the ratio of `self_ipw` and on "inverse".
        pg_decay: how slowly the expert means of `default_vector` forget, per batch.
        activation_power: t of activation-aware averaging, (a_{c,i} / slots_c)^t n_c per expert; 0 is FedAvg.

    Raises:
        ValueError: for a setting out of range.
    """
    pseudo = PseudoGradient(pg_mode, pg_strength, tuple(pg_scope), pg_sparsity, pg_fraction, pg_limit, pg_decay)
    if pseudo.mode == "client_mean" and "experts" in pseudo.scope and pseudo.strength > 0 and not base.shared_a:
        raise ValueError(
            "pg_mode 'client_mean' averages gradients over experts, which says nothing unless they start from one A; "
            "set adapter.shared_a = true or another pg_mode"
        )
    n_p = min(2 * base.k_max, base.num_experts) if num_candidates is None else num_candidates
    if not base.k_max <= n_p <= base.num_experts:
        raise ValueError(f"num_candidates must lie in K_max..M = {base.k_max}..{base.num_experts}, got {n_p}")
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum must lie in [0, 1), got {momentum}")
    if phi not in ("server", "trained"):
        raise ValueError(f'phi must be "server" or "trained", got {phi!r}')
    if phi_min >= phi_max:
        raise ValueError(f"phi_min must be below phi_max, got {phi_min} and {phi_max}")
    for name, value in (("phi_penalty", phi_penalty), ("activation_power", activation_power)):
        if value < 0:
            raise ValueError(f"{name} must be >= 0, got {value}")
    if epsilon <= 0:
        raise ValueError(f"epsilon must be > 0, got {epsilon}")
    trained_phi = dmr and phi == "trained"

    def start(adapter: dict[str, Tensor]) -> State:
        extras = {"phi": torch.zeros(base.num_layers, base.num_experts)} if dmr else {}
        if pseudo.mode == "server":
            extras |= {f"update.{name}": torch.zeros_like(adapter[name]) for name in _expert_names(adapter)}
        return State(adapter, extras)

    def dispatch(state: State, profile: Profile) -> dict[str, Tensor]:
        return {**state.adapters, **{name: value for name, value in state.extras.items() if name != "utilization"}}

    def install(model: SparseModel, payload: Tensors, profile: Profile, generator: torch.Generator) -> Hooks:
        install_adapter(model, payload, profile, base.alpha)
        model.set_pseudo_gradient(pseudo, generator)
        hooks = Hooks()
        if dmr:
            value = payload["phi"].clone().to(next(iter(model.adapter.values())).device)
            if trained_phi:
                parameter = torch.nn.Parameter(value)
                hooks.parameters = [parameter]
                hooks.penalty = lambda: phi_penalty * routing.phi_range_penalty(parameter, phi_min, phi_max)
                hooks.extras = lambda: {"phi": parameter.detach().cpu()}
                value = parameter
            model.set_phi(value, n_p)
        if not pseudo.is_exact and pseudo.mode != "off" and "experts" in pseudo.scope:
            directions = {
                name: unit_rows(payload[f"update.{name}"]).to(value.device)
                for name, value in model.adapter.items()
                if f"update.{name}" in payload
            }
            hooks.before_step = lambda: _add_signal(model, pseudo, directions)
        return hooks

    def aggregate(state: State, updates: Iterable[Update]) -> State:
        mean, counted = base.mean(), base.mean()
        by_use = base.mean() if pseudo.mode == "server" else None
        examples = 0
        for update in updates:
            n = update.num_examples
            mean.add(update.adapters, activation_weights(update, activation_power, update.assignments))
            if by_use:
                by_use.add(update.adapters, activation_weights(update, 1.0, update.assignments))
            counted.add({"used": routing.utilization(update.expert_tokens, update.tokens)}, n)
            if trained_phi:
                counted.add({"phi": update.extras["phi"]}, n)
            examples += n
        if not examples:
            return state
        nothing = torch.zeros(base.num_layers, base.num_experts, dtype=torch.float64)
        means = counted.result({"used": nothing, "phi": state.extras.get("phi", nothing).double()})
        extras = {"utilization": means["used"].float()}
        if dmr:
            target = routing.phi_target(means["used"], epsilon)
            extras["phi"] = routing.phi_update(means["phi"], target, momentum).float()
        if by_use:
            after = by_use.result(state.adapters)
            extras |= {f"update.{name}": after[name] - state.adapters[name] for name in _expert_names(after)}
        return State(mean.result(state.adapters), extras)

    modulation = base.num_layers * base.num_experts

    def extra_down(shape: ModelShape, rank: int) -> int:
        return (modulation if dmr else 0) + (shape.trained_elements(rank) if pseudo.mode == "server" else 0)

    return Method(
        "ubsmoe",
        start,
        dispatch,
        install,
        aggregate,
        refuses=USE_WEIGHS if activation_power else {},
        pair_fraction=pseudo.pair_fraction,
        pairs_reach_input=pseudo.is_exact and "hidden" in pseudo.scope,
        extra_down=extra_down,
        extra_up=modulation if trained_phi else 0,
    )


def _expert_names(adapter: Tensors) -> list[str]:
    """The tensors of an adapter that belong to experts: neither routers' nor attention's."""
    return [name for name in adapter if layer_of_experts(name) is not None]


def _add_signal(model: SparseModel, pseudo: PseudoGradient, directions: Tensors) -> None:
    """Add the pseudo-gradient of this step to the experts' gradients, then start the next step's masses at zero."""
    for layer in model.layers:
        if layer.mass is None:
            continue
        for key in ("up.A", "up.B", "down.A", "down.B"):
            name = f"layers.{layer.index}.{key}"
            grad = model.adapter[name].grad
            if grad is not None:
                parameter_signal(pseudo, grad, layer.mass, directions.get(name), into=grad)
        layer.mass = None
