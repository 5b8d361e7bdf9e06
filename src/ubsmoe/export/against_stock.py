"""An export is loaded by the software it is for, and compared with what is in memory, before it is published.

Names alone prove nothing: PEFT leaves out what it has no place for, with a warning at most.
"""

import warnings
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from ubsmoe.errors import UserError
from ubsmoe.export.effect import NoEffect
from ubsmoe.export.installed import Installed, install
from ubsmoe.export.merged import Survival
from ubsmoe.export.sidecar import Sidecar
from ubsmoe.model.checkpoint import LOAD, READ, check_tensors, named
from ubsmoe.model.fused import Checkpoint, weight_files
from ubsmoe.model.opened import DIRECT_BYTES, skeleton
from ubsmoe.model.surgery import SparseModel

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
"""Largest mean difference of logits, as a share of their mean size: other kernels add in another order."""

NOISE = 1e-5
"""The least that is asked for, as a share of the logits' size: an adapter's effect may be smaller than what float32 can tell."""

OF_EFFECT = 0.1
"""Largest mean difference in float32 as a share of what the adapter changes: a small one could vanish within TOLERANCE."""

LEAST_SURVIVAL = 0.5
"""Least share of an adapter's change that rounding must leave in merged weights."""


class ExportMismatch(UserError):
    """An export that plain transformers or PEFT would load as something else; it is not published."""


def check_merged(folder: Path, sparse: SparseModel, installed: Installed, sidecar: Sidecar) -> None:
    """Raise UserError unless transformers loads a merged model as its base is with all that the weights have taken in.

    Of a model that would fill memory a second time, names and sizes are compared, and nothing is loaded.
    """
    if not fits_twice(sparse):
        config = AutoConfig.from_pretrained(folder, **READ)
        Checkpoint(skeleton(config, sparse.model.dtype), weight_files(folder))
        return
    stock, found = AutoModelForCausalLM.from_pretrained(folder, dtype=sparse.model.dtype, **LOAD)
    check_tensors(found, str(folder))
    ours = SparseModel(twin(sparse.model))
    # what the sidecar still says is not in the weights
    left = {name: None for name in ("phi", "selection_bias", "output_scale") if getattr(sidecar, name)}
    taken = {"selection_bias": None} | left
    install(
        ours,
        installed.adapter,
        sidecar.model_copy(update={**installed.routing, **taken, "rescale": "none", "compensated": False}),
    )
    base = SparseModel(twin(sparse.model))
    base.limit_k_max(sidecar.k_max)
    base.set_top_k(sidecar.top_k)
    compare(logits(stock.to(sparse.device).eval()), logits(ours.model), logits(base.model), "transformers", base)


def check_peft(folder: Path, sparse: SparseModel, installed: Installed, tensors: dict[str, Tensor]) -> None:
    """Raise UserError unless PEFT puts every tensor of an adapter on the base and gets its logits; nothing without PEFT.

    On a base that has no plain weights in memory the tensors are put in place, and nothing is computed.
    """
    if find_spec("peft") is None:
        return
    peft = import_module("peft")
    bare = any(parameter.is_meta for parameter in sparse.model.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT looks for the patterns of parameters among modules, too
        base = skeleton(sparse.model.config, sparse.model.dtype) if bare else twin(sparse.model)
        theirs = peft.PeftModel.from_pretrained(base, str(folder)).eval()
    loaded = peft.get_peft_model_state_dict(theirs, save_embedding_layers=False)
    if lost := sorted(name for name in tensors if name not in loaded or not _same(loaded[name], tensors[name])):
        raise ExportMismatch(f"PEFT has no place on this base for {named(lost)}; export it as merged or native instead")
    if not bare:
        ours = SparseModel(twin(sparse.model))
        ours.load_adapter(installed.adapter, installed.alpha)
        compare(logits(theirs), logits(ours.model), logits(twin(sparse.model)), "PEFT", sparse)


def check_attached(sparse: SparseModel, adapter: Mapping[str, Tensor], alpha: float) -> float | None:
    """How much an adapter in place changes the base's logits, as a share of their size; takes it off again.

    None for a base that does not fit twice.

    Raises:
        NoEffect: if nothing changes.
    """
    if not fits_twice(sparse):
        return None
    found = []
    for factor in (0, 1):  # the same kernel runs for both, so equal logits are equal to the bit
        sparse.load_adapter({name: factor * tensor for name, tensor in adapter.items()}, alpha)
        found.append(logits(sparse.model))
    sparse.clear()
    base, ours = found
    if torch.equal(base, ours):
        raise NoEffect(
            "logits with the adapter in place are those of the base: it has no effect; train it, or save it again"
        )
    return float((ours - base).abs().mean() / base.abs().mean().clamp_min(1e-6))


def check_saved(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Raise ExportMismatch unless a file gives back every tensor that was written into it."""
    if lost := sorted(name for name in wanted if name not in found or not _same(found[name], wanted[name])):
        raise ExportMismatch(f"the file does not give back {named(lost)} as it was; check the disk and export again")


def rounded_away(left: Survival, dtype: str) -> list[str]:
    """What merged weights of this precision have lost, in a sentence; none if next to nothing.

    Raises:
        ExportMismatch: if most of the adapter is lost.
    """
    if left.share < LEAST_SURVIVAL:
        raise ExportMismatch(
            f"merging into {dtype} weights would keep {left.share:.0%} of what the adapter changes: the rest is smaller than "
            "their rounding; export it as peft or native instead"
        )
    count = sum(map(len, left.lost.values()))
    if not count and left.share > 0.99:
        return []
    whole = f"; {count} expert matrices lost theirs whole" if count else ""
    return [f"Rounding: {left.share:.1%} of the adapter's change is left in {dtype} weights{whole}."]


def fits_twice(sparse: SparseModel) -> bool:
    """Whether a base is in memory with plain weights, and so small that a second one costs next to nothing."""
    parameters = list(sparse.model.parameters())
    return sum(one.nbytes for one in parameters) < DIRECT_BYTES and not any(one.is_meta for one in parameters)


def twin(model: Any) -> Any:
    """Another model object on the same weights."""
    twin = skeleton(model.config, model.dtype)
    twin.load_state_dict(model.state_dict(), assign=True)
    twin.tie_weights()
    twin.set_experts_implementation("eager")  # ours may be in place on the model
    for name, buffer in model.named_buffers():  # those that are computed, not saved
        owner, _, last = name.rpartition(".")
        twin.get_submodule(owner)._buffers[last] = buffer
    return twin.requires_grad_(False).eval()


@torch.no_grad()
def logits(model: Any) -> Float[Tensor, "1 T V"]:
    """Of a few tokens, in float32."""
    ids = torch.arange(12, device=model.device) % model.get_input_embeddings().num_embeddings
    logits: Tensor = model(input_ids=ids.unsqueeze(0), use_cache=False).logits
    return logits.float()


def _same(theirs: Shaped[Tensor, "..."], ours: Shaped[Tensor, "..."]) -> bool:
    if theirs.is_meta:
        return theirs.shape == ours.shape
    return torch.equal(theirs.cpu(), ours.to(theirs.dtype).cpu())


def compare(
    theirs: Float[Tensor, "1 T V"],
    ours: Float[Tensor, "1 T V"],
    base: Float[Tensor, "1 T V"],
    who: str,
    sparse: SparseModel,
) -> None:
    """Raise ExportMismatch if these logits are the base's, or others than were trained."""
    if torch.equal(theirs, base) and not torch.equal(ours, base):
        raise ExportMismatch(f"{who} computes the base's own logits from this export: the adapter has no effect there")
    size = ours.abs().mean().clamp_min(1e-6)
    off, effect = float((theirs - ours).abs().mean() / size), float((ours - base).abs().mean() / size)
    allowed = TOLERANCE[sparse.model.dtype]
    if sparse.model.dtype == torch.float32:
        allowed = min(allowed, max(NOISE, OF_EFFECT * effect))
    if not off <= allowed:
        raise ExportMismatch(
            f"{who} computes other logits from this export than were trained (off by {off:.2%} of their size, of which the "
            f"adapter changes {effect:.2%}); export it natively instead, and report this family"
        )
