"""A dense Llama-shaped model becomes a sparse mixture of experts of Mixtral's class.

    E_i = FFN for every expert i,   sum_{i in A(x)} w_i E_i(x) = FFN(x)   since Mixtral's weights sum to 1 whatever K

so the function is preserved at every K, up to rounding. Equal experts get equal gradients but for what their tokens differ in;
drop-upcycling makes them different from the start, and gives up part of the function for it:

    per expert, a random share of the inner dimensions is drawn anew, N(mean, std) of the very weights it replaces,
    in the columns of gate and up and in the rows of down alike

Source: Sparse Upcycling (Komatsuzaki et al. 2023, arXiv 2212.05055); Drop-Upcycling (Nakamura et al. 2025, arXiv 2502.19261).
Ours: the routers' warm-up on the balancing loss alone.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, MixtralForCausalLM

from ubsmoe.config import ConfigError
from ubsmoe.maths.balance import load_balancing_loss
from ubsmoe.model.conventions import UnsupportedModel
from ubsmoe.model.layer import SparseLayer
from ubsmoe.model.load import check_place, quieten
from ubsmoe.model.surgery import SparseModel

# what both configurations mean by the same name
_SHARED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "hidden_act", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "attention_dropout",
    "rope_parameters", "bos_token_id", "eos_token_id", "pad_token_id", "initializer_range",
)  # fmt: skip


def load_dense(place: str) -> tuple[Any, Any]:
    """A dense model and its tokenizer, float32, from a folder, a hub id or a .gguf file.

    Raises:
        ConfigError: if it cannot be loaded.
    """
    quieten()
    path = Path(place)
    gguf = {"gguf_file": path.name} if path.suffix == ".gguf" else {}
    source = str(path.parent) if gguf else place
    try:
        check_place(source)
        tokenizer = AutoTokenizer.from_pretrained(source, **gguf)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **gguf)
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(f"cannot load a dense model from {place}: {str(error).strip().splitlines()[0]}") from None
    return model.eval(), tokenizer


@torch.no_grad()
def upcycle(dense: Any, num_experts: int, top_k: int, drop: float, seed: int) -> MixtralForCausalLM:
    """Copy the dense model's feed-forward into every expert.

    Args:
        dense: a Llama-shaped model; nothing of it is changed.
        num_experts: M.
        top_k: K_max.
        drop: share of each expert's inner dimensions that is drawn anew; 0 preserves the function.
        seed: of the routers and of what is drawn anew.

    Raises:
        UnsupportedModel: if the model has something Mixtral has no place for.
        ConfigError: for numbers that make no mixture.
    """
    _check(dense.config, num_experts, top_k, drop)
    config = MixtralConfig(
        **{name: getattr(dense.config, name, None) for name in _SHARED},
        num_local_experts=num_experts,
        num_experts_per_tok=top_k,
    )
    model = MixtralForCausalLM(config).to(dense.dtype).eval()
    generator = torch.Generator().manual_seed(seed)
    wrong = model.load_state_dict(dense.state_dict(), strict=False)
    assert all(".mlp." in name for name in (*wrong.missing_keys, *wrong.unexpected_keys)), wrong
    for layer, source in zip(model.model.layers, dense.model.layers, strict=True):
        router, experts = layer.mlp.gate, layer.mlp.experts
        router.weight.copy_(config.initializer_range * torch.randn(router.weight.shape, generator=generator))
        for expert in range(num_experts):
            gate, up, down = (
                getattr(source.mlp, name).weight.clone() for name in ("gate_proj", "up_proj", "down_proj")
            )
            anew = torch.randperm(len(gate), generator=generator)[: int(drop * len(gate))]
            _draw_anew(gate, anew, generator)
            _draw_anew(up, anew, generator)
            _draw_anew(down.T, anew, generator)
            experts.gate_up_proj[expert] = torch.cat([gate, up])
            experts.down_proj[expert] = down
    return model


def warm_up(sparse: SparseModel, batches: Iterable[dict[str, Tensor]], learning_rate: float = 1e-3) -> list[float]:
    """Train the routers alone, on the balancing loss alone: while experts are alike nothing else has a gradient.

    Args:
        sparse: an upcycled model; everything but its routers stays frozen.
        batches: input_ids and attention_mask [B, S].
        learning_rate: Adam's.

    Returns:
        The loss of each step, mean over layers; 1 is perfect balance.
    """
    weights = [weight.requires_grad_(True) for layer in sparse.layers for weight in layer.router.parameters()]
    optimizer, losses = torch.optim.Adam(weights, learning_rate), []
    sparse.record()
    try:
        for batch in batches:
            inputs = _router_inputs(sparse, batch)
            loss = torch.stack([_balance(*pair) for pair in zip(sparse.layers, inputs, strict=True)]).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    finally:
        for weight in weights:
            weight.requires_grad_(False)
        sparse.clear()
    return losses


@torch.no_grad()
def _router_inputs(sparse: SparseModel, batch: dict[str, Tensor]) -> list[Tensor]:
    """What each router sees. No router's own loss reaches another, so nothing else of the forward pass is kept."""
    seen: list[Tensor] = []
    hooks = [layer.router.register_forward_pre_hook(lambda _, args: seen.append(args[0])) for layer in sparse.layers]
    try:
        sparse.model.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _balance(layer: SparseLayer, hidden: Tensor) -> Tensor:
    layer.router(hidden)
    assert layer.chosen is not None
    return load_balancing_loss(layer.scores(), layer.chosen, layer.real_tokens())


def _check(config: Any, num_experts: int, top_k: int, drop: float) -> None:
    if config.model_type not in ("llama", "mistral"):
        raise UnsupportedModel(f"upcycling needs a Llama-shaped dense model (llama, mistral), got {config.model_type}")
    for name in ("attention_bias", "mlp_bias"):
        if getattr(config, name, False):
            raise UnsupportedModel(f"this model has {name}, for which Mixtral has no place")
    if not num_experts >= 2 or not 1 <= top_k <= num_experts:
        raise ConfigError(f"--experts must be at least 2 and --top-k in 1..experts, got {num_experts} and {top_k}")
    if not 0 <= drop < 1:
        raise ConfigError(f"--drop is a share of an expert's inner dimensions, in [0, 1); got {drop}")


def _draw_anew(rows: Tensor, which: Tensor, generator: torch.Generator) -> None:
    """Replace rows by normal numbers of the same mean and standard deviation."""
    if len(which):
        old = rows[which]
        rows[which] = old.mean() + old.std() * torch.randn(old.shape, generator=generator).to(old)
