"""A dense Llama-shaped model becomes a sparse mixture of experts.

Whole copies (one slice): Mixtral's class, whose weights sum to 1 whatever K. The function is preserved at every K, up to
rounding, and K experts cost K feed-forwards:

    E_i = FFN for every expert i,   sum_{i in A(x)} w_i E_i(x) = FFN(x)

Fine-grained: each copy is cut into S slices of its inner dimensions, every copy in its own way. A copy's S experts start with
one router row and S times larger down projections, so that the best K_max = S experts are one copy, each with weight 1/S. That
costs one feed-forward and keeps the function; K < K_max costs less, and loses what the missing slices hold. A shared expert
makes that bearable: the inner dimensions that act most, by mean |activation| times the norm of what they write, are not cut but run
for every token (Qwen2-MoE's class, its gate starting at sigma(0) = 1/2). At K < S the slices left count S / K times, so one strong
dimension among them does more harm than all that are missing.

Experts that start alike get like gradients; drop-upcycling sets them apart, and gives up part of the function for it:

    per expert, a random share of the inner dimensions is drawn anew, N(mean, std) of the very weights it replaces,
    in the columns of gate and up and in the rows of down alike

Source: Sparse Upcycling (Komatsuzaki et al. 2023, arXiv 2212.05055); groups of slices under one router row: Upcycling LLMs into
MoE (He et al. 2024, arXiv 2410.07524); shared expert: DeepSeekMoE (Dai et al. 2024, arXiv 2401.06066); Drop-Upcycling (Nakamura
et al. 2025, arXiv 2502.19261). Ours: which dimensions are shared, and the routers' warm-up on the balancing loss alone.
"""

from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, Qwen2MoeConfig

from ubsmoe import progress
from ubsmoe.bases.warm_up import mean_activations, warm_up
from ubsmoe.config import ConfigError, DataSettings
from ubsmoe.data.records import read_file
from ubsmoe.data.tokens import batches, collate, pad_id, tokenize
from ubsmoe.model.checkpoint import LOAD, READ, check_finite, check_tensors, check_weights, one_sentence
from ubsmoe.model.conventions import UnsupportedModel
from ubsmoe.model.load import read_config
from ubsmoe.model.presets import check_place, quieten
from ubsmoe.model.surgery import SparseModel
from ubsmoe.seeds import generator_for
from ubsmoe.storage.exportfolder import check_free, write_folder

# what the dense and the sparse configurations mean by the same name
_KEPT = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "hidden_act", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "attention_dropout",
    "rope_parameters", "bos_token_id", "eos_token_id", "pad_token_id", "initializer_range",
)  # fmt: skip
BATCH_SIZE = 8


def upcycle_checkpoint(
    dense: str,
    out: Path,
    *,
    num_experts: int,
    top_k: int,
    drop: float = 0.0,
    slices: int = 1,
    shared: float = 0.0,
    warm_up_data: Path | None = None,
    warm_up_steps: int = 40,
    seed: int = 0,
) -> list[float]:
    """Upcycle, warm the routers up if there is data to do it on, and save in bfloat16.

    Args:
        dense: a folder, hub id or .gguf file.
        out: a folder that does not exist yet.
        num_experts: M.
        top_k: K_max.
        drop: this and the next two: see `upcycle`.
        slices: experts per copy of the feed-forward.
        shared: share of it that is not cut.
        warm_up_data: a file of records, as data.train, for the routers' warm-up and to see which dimensions act most;
            None for neither.
        warm_up_steps: batches of 8 records.
        seed: of all draws.

    Returns:
        The balancing loss of each warm-up step.

    Raises:
        UserError: if the model cannot be upcycled or `out` is taken; then nothing is written.
    """
    check_free(out)
    source, tokenizer = load_dense(dense)
    data = [] if warm_up_data is None else list(_batches(warm_up_data, tokenizer, warm_up_steps, seed))
    active = mean_activations(source, data) if shared and data else None
    model = upcycle(source, num_experts, top_k, drop, seed, slices=slices, shared=shared, activations=active)
    losses = warm_up(SparseModel(model), data) if data else []
    model.to(torch.bfloat16)

    def fill(folder: Path) -> None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    write_folder(out, fill)
    return losses


def load_dense(place: str) -> tuple[Any, Any]:
    """A dense model and its tokenizer, float32, from a folder, a hub id or a .gguf file.

    Raises:
        ConfigError: if it cannot be loaded.
    """
    quieten()
    path = Path(place)
    gguf = {"gguf_file": path.name} if path.suffix == ".gguf" else {}
    source = str(path.parent) if gguf else place
    with one_sentence(lambda reason: f"cannot load a dense model from {place}: {reason}"):
        check_file(path) if gguf else check_place(place)
        tokenizer = AutoTokenizer.from_pretrained(source, **gguf, **READ)
        if not gguf:
            read_config(source, place)
            if path.is_dir():
                check_weights(path)
        model, found = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **gguf, **LOAD)
    check_tensors(found, place)
    check_finite(model.named_parameters(), place)
    return model.eval(), tokenizer


def check_file(path: Path) -> None:
    """Raise ValueError unless a .gguf file can be read here."""
    if not path.is_file():
        raise ValueError("no such file")
    if not find_spec("gguf"):
        raise ValueError("a .gguf file needs the gguf package: pip install 'ubsmoe[gguf]'")


@torch.no_grad()
def upcycle(
    dense: Any,
    num_experts: int,
    top_k: int,
    drop: float,
    seed: int,
    *,
    slices: int = 1,
    shared: float = 0.0,
    activations: Sequence[Tensor] | None = None,
) -> Any:
    """Make experts of the dense model's feed-forward.

    Args:
        dense: a Llama-shaped model; nothing of it is changed.
        num_experts: M = copies * slices.
        top_k: K_max, a multiple of `slices`.
        drop: share of each expert's inner dimensions that is drawn anew; 0 preserves the function at K_max.
        seed: of the routers, of the cuts, and of what is drawn anew.
        slices: experts that one copy is cut into.
        shared: share of the inner dimensions that is not cut but runs for every token.
        activations: per layer the mean |activation| [f] of each inner dimension, as `mean_activations` finds it; without it
            the norms of gate and up stand in, which miss a dimension that few weights make large.

    Returns:
        A model of Mixtral's class, or with `shared` of Qwen2-MoE's, in the dtype of `dense`.

    Raises:
        UnsupportedModel: if the model has something these classes have no place for.
        ConfigError: for numbers that make no mixture.
    """
    _check(dense.config, num_experts, top_k, drop, slices, shared)
    common = round(shared * dense.config.intermediate_size)
    config = _config(dense.config, num_experts, top_k, (dense.config.intermediate_size - common) // slices, common)
    model = AutoModelForCausalLM.from_config(config, **READ).to(dense.dtype).eval()
    generator = torch.Generator().manual_seed(seed)
    wrong = model.load_state_dict(dense.state_dict(), strict=False)
    assert all(".mlp." in name for name in (*wrong.missing_keys, *wrong.unexpected_keys)), wrong
    for index, (layer, source) in enumerate(zip(model.model.layers, dense.model.layers, strict=True)):
        _route(layer.mlp.gate.weight, config.initializer_range, slices, generator)
        gate, up, down = (getattr(source.mlp, f"{name}_proj").weight for name in ("gate", "up", "down"))
        active = activations[index] if activations else gate.norm(dim=1) * up.norm(dim=1)
        largest = (active * down.norm(dim=0)).argsort(descending=True)
        if common:
            _share(layer.mlp, largest[:common], gate, up, down)
        rest, experts = largest[common:], layer.mlp.experts
        cuts = [
            rest[torch.randperm(len(rest), generator=generator)].chunk(slices) for _ in range(num_experts // slices)
        ]
        for expert, rows in enumerate(part.sort().values for cut in cuts for part in cut):
            parts = gate[rows], up[rows], slices * down[:, rows]
            _draw_anew(parts, int(drop * len(rows)), generator)
            experts.gate_up_proj[expert] = torch.cat(parts[:2])
            experts.down_proj[expert] = parts[2]
    return model


def _config(dense: Any, num_experts: int, top_k: int, width: int, common: int) -> MixtralConfig | Qwen2MoeConfig:
    kept = {name: getattr(dense, name, None) for name in _KEPT}
    if not common:
        return MixtralConfig(**kept, intermediate_size=width, num_local_experts=num_experts, num_experts_per_tok=top_k)
    return Qwen2MoeConfig(
        **kept,
        intermediate_size=dense.intermediate_size,
        moe_intermediate_size=width,
        shared_expert_intermediate_size=common,
        num_experts=num_experts,
        num_experts_per_tok=top_k,
        norm_topk_prob=True,
        qkv_bias=False,
    )


def _route(weight: Tensor, size: float, slices: int, generator: torch.Generator) -> None:
    """One random row per copy, its slices a hundredth apart: with ties all tokens of a small K would use the same slices."""
    copies = torch.randn(len(weight) // slices, weight.shape[1], generator=generator).repeat_interleave(slices, dim=0)
    apart = torch.randn(weight.shape, generator=generator) if slices > 1 else torch.zeros(weight.shape)
    weight.copy_(size * (copies + 0.01 * apart))


def _share(block: Any, rows: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> None:
    """Put these inner dimensions into the shared expert, twice as large, since its gate of zeros halves them."""
    block.shared_expert_gate.weight.zero_()
    block.shared_expert.gate_proj.weight.copy_(gate[rows])
    block.shared_expert.up_proj.weight.copy_(up[rows])
    block.shared_expert.down_proj.weight.copy_(2 * down[:, rows])


def _check(config: Any, num_experts: int, top_k: int, drop: float, slices: int, shared: float) -> None:
    if config.model_type not in ("llama", "mistral"):
        raise UnsupportedModel(f"upcycling needs a Llama-shaped dense model (llama, mistral), got {config.model_type}")
    for name in ("attention_bias", "mlp_bias"):
        if getattr(config, name, False):
            raise UnsupportedModel(f"this model has {name}, which a mixture of experts of this shape cannot hold")
    if not num_experts >= 2 or not 1 <= top_k <= num_experts:
        raise ConfigError(f"--experts must be at least 2 and --top-k in 1..experts, got {num_experts} and {top_k}")
    if slices < 1 or num_experts % slices or top_k % slices:
        raise ConfigError(
            f"--slices must divide --experts and --top-k, so that K_max takes whole copies; got {slices} for "
            f"{num_experts} and {top_k}"
        )
    if not 0 <= drop < 1 or not 0 <= shared < 1:
        raise ConfigError(f"--drop and --shared are shares of the inner dimensions, in [0, 1); got {drop} and {shared}")
    rest = config.intermediate_size - round(shared * config.intermediate_size)
    if slices > 1 and rest % (8 * slices):  # torch's grouped products want rows of whole 16 bytes
        raise ConfigError(
            f"--slices must cut the {rest} inner dimensions that are not shared into multiples of 8, got {slices}"
        )


def _draw_anew(parts: tuple[Tensor, Tensor, Tensor], count: int, generator: torch.Generator) -> None:
    """Replace `count` inner dimensions of gate, up and down [h, f] by normal numbers of the same mean and standard deviation."""
    which = torch.randperm(len(parts[0]), generator=generator)[:count]
    for rows in (parts[0], parts[1], parts[2].T):
        if count:
            old = rows[which]
            rows[which] = old.mean() + old.std() * torch.randn(old.shape, generator=generator).to(old)


def _batches(path: Path, tokenizer: Any, steps: int, seed: int) -> Iterator[dict[str, Tensor]]:
    tokens = tokenize(read_file(path, tokenizer), tokenizer, DataSettings(), "train")
    order = batches(len(tokens), BATCH_SIZE, generator_for(seed, "warm-up"))
    for _ in progress.through(range(steps), "goes through the warm-up's data, step"):
        yield collate([tokens[i] for i in next(order)], pad_id(tokenizer))
