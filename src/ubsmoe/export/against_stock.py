"""An export is loaded by the software it is for, and compared with what is in memory, before it is published.

Names alone prove nothing: PEFT leaves out what it has no place for, with a warning at most.
"""

import warnings
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from ubsmoe.errors import UserError
from ubsmoe.export.installed import Installed, install
from ubsmoe.export.sidecar import Sidecar
from ubsmoe.model.checkpoint import LOAD, READ, check_tensors, named
from ubsmoe.model.fused import Checkpoint, weight_files
from ubsmoe.model.opened import DIRECT_BYTES, skeleton
from ubsmoe.model.surgery import SparseModel

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
"""Largest mean difference of logits, as a share of their mean size: other kernels add in another order."""


class ExportMismatch(UserError):
    """An export that plain transformers or PEFT would load as something else; it is not published."""


def check_merged(folder: Path, sparse: SparseModel, installed: Installed, sidecar: Sidecar) -> None:
    """Raise UserError unless transformers loads a merged model as its base is with all that the weights have taken in.

    Of a model that would fill memory a second time, names and sizes are compared, and nothing is loaded.
    """
    if _num_bytes(sparse.model) >= DIRECT_BYTES:
        config = AutoConfig.from_pretrained(folder, **READ)
        Checkpoint(skeleton(config, sparse.model.dtype), weight_files(folder))
        return
    stock, found = AutoModelForCausalLM.from_pretrained(folder, dtype=sparse.model.dtype, **LOAD)
    check_tensors(found, str(folder))
    ours = SparseModel(_twin(sparse.model))
    # what the sidecar still says is not in the weights
    left = {name: None for name in ("phi", "selection_bias", "output_scale") if getattr(sidecar, name)}
    taken = {"selection_bias": None} | left
    install(
        ours,
        installed.adapter,
        sidecar.model_copy(update={**installed.routing, **taken, "rescale": "none", "compensated": False}),
    )
    _compare(_logits(stock.to(sparse.device).eval()), _logits(ours.model), "transformers", sparse.model.dtype)


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
        base = skeleton(sparse.model.config, sparse.model.dtype) if bare else _twin(sparse.model)
        theirs = peft.PeftModel.from_pretrained(base, str(folder)).eval()
    loaded = peft.get_peft_model_state_dict(theirs, save_embedding_layers=False)
    if lost := sorted(name for name in tensors if name not in loaded or not _same(loaded[name], tensors[name])):
        raise ExportMismatch(f"PEFT has no place on this base for {named(lost)}; export it as merged or native instead")
    if not bare:
        ours = SparseModel(_twin(sparse.model))
        ours.load_adapter(installed.adapter, installed.alpha)
        _compare(_logits(theirs), _logits(ours.model), "PEFT", sparse.model.dtype)


def _num_bytes(model: Any) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


def _twin(model: Any) -> Any:
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
def _logits(model: Any) -> Float[Tensor, "1 T V"]:
    ids = torch.arange(12, device=model.device) % model.get_input_embeddings().num_embeddings
    logits: Tensor = model(input_ids=ids.unsqueeze(0), use_cache=False).logits
    return logits.float()


def _same(theirs: Shaped[Tensor, "..."], ours: Shaped[Tensor, "..."]) -> bool:
    if theirs.is_meta:
        return theirs.shape == ours.shape
    return torch.equal(theirs.cpu(), ours.to(theirs.dtype).cpu())


def _compare(theirs: Float[Tensor, "1 T V"], ours: Float[Tensor, "1 T V"], who: str, dtype: torch.dtype) -> None:
    off = float((theirs - ours).abs().mean() / ours.abs().mean().clamp_min(1e-6))
    if not off <= TOLERANCE[dtype]:
        raise ExportMismatch(
            f"{who} computes other logits from this export than were trained (off by {off:.1%} of their size); "
            "export it natively instead, and report this family"
        )
