"""A fresh mixture, a log of its routers, and its experts in equal blocks."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu
from transformers import OlmoeConfig, OlmoeForCausalLM

from ubsmoe.bases.pretrain.settings import PretrainSettings
from ubsmoe.maths.balance import load_balancing_loss, z_loss


def build_model(settings: PretrainSettings, vocab_size: int) -> OlmoeForCausalLM:
    """A fresh OLMoE of the wanted size, its weights drawn from the settings' seed."""
    config = OlmoeConfig(
        vocab_size=vocab_size,
        hidden_size=settings.hidden_size,
        intermediate_size=settings.expert_width,
        num_hidden_layers=settings.num_layers,
        num_attention_heads=settings.num_heads,
        num_key_value_heads=settings.num_heads,
        num_experts=settings.num_experts,
        num_experts_per_tok=settings.top_k,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        norm_topk_prob=False,
        initializer_range=settings.initializer_range,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        model = OlmoeForCausalLM(config)
    with torch.no_grad():
        # Gate weights are near 1/M at first: without this the experts are almost silent and learn late.
        for layer in model.model.layers:
            layer.mlp.experts.down_proj.mul_(settings.num_experts / 4)
    # The plain kernel is faster than the fused one on short sequences, on the CPUs we measured.
    model.set_attn_implementation("eager")
    return model


class RouterLog:
    """Remembers what each layer's router said since last asked: (logits, chosen experts) per layer and pass."""

    def __init__(self, model: OlmoeForCausalLM) -> None:
        self.layers: list[tuple[Tensor, Tensor]] = []
        self.hooks = [layer.mlp.gate.register_forward_hook(self._remember) for layer in model.model.layers]

    def _remember(self, _gate: nn.Module, _inputs: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
        self.layers.append((output[0], output[2]))

    def close(self) -> None:
        """Stop listening."""
        for hook in self.hooks:
            hook.remove()

    def penalty(self, settings: PretrainSettings, mask_T: Tensor) -> Tensor:
        """Load balancing and z-loss, averaged over layers; forgets what it has seen."""
        layers, self.layers = self.layers, []
        balance = [load_balancing_loss(logits.float().softmax(-1), index, mask_T) for logits, index in layers]
        size = [z_loss(logits, mask_T) for logits, _ in layers]
        return (
            settings.balance_coefficient * torch.stack(balance).mean()
            + settings.z_coefficient * torch.stack(size).mean()
        )


def block_experts(experts: Any, hidden_TD: Tensor, index_TK: Tensor, weights_TK: Tensor, block: int = 96) -> Tensor:
    """Run the chosen experts in equal blocks of tokens: one batched product, whatever the imbalance between experts.

    The assignments are sorted by expert and padded to whole blocks, so a block has one owner. The stock implementations
    loop over experts or change shape at every step; in bfloat16 on CPUs this one was up to 1.7 times faster, with the
    same result.
    """
    num_tokens, top_k = index_TK.shape
    chosen, order = index_TK.reshape(-1).sort(stable=True)
    counts = torch.bincount(chosen, minlength=experts.num_experts)
    blocks = (counts + block - 1) // block
    first_slot, first_place = counts.cumsum(0) - counts, (blocks.cumsum(0) - blocks) * block
    place = first_place[chosen] + torch.arange(len(chosen)) - first_slot[chosen]
    token = torch.full((int(blocks.sum()) * block,), num_tokens)  # one past the end: the row of zeros that pads
    token[place] = order // top_k
    weight = weights_TK.new_zeros(len(token)).index_put((place,), weights_TK.reshape(-1)[order])
    owner = torch.repeat_interleave(torch.arange(experts.num_experts), blocks)
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else hidden_TD.dtype
    up, down = (matrix.to(dtype)[owner].transpose(1, 2) for matrix in (experts.gate_up_proj, experts.down_proj))
    padded = torch.cat([hidden_TD, hidden_TD.new_zeros(1, hidden_TD.shape[1])]).to(dtype)
    gate, value = (padded.index_select(0, token).view(len(owner), block, -1) @ up).chunk(2, dim=-1)
    output = ((silu(gate) * value) @ down).flatten(0, 1).float() * weight[:, None]
    return torch.zeros(padded.shape).index_add(0, token, output)[:num_tokens].to(hidden_TD.dtype)
