"""An adapter, or a whole export, tried out on its base: does it arrive, and does it do the same in every form?

Each way to lose one has been reported of LoRA on experts: factors that no module takes, experts packed in another order, zeros
saved for what was trained, changes that vanish in a merge. Text comes out all the same, the base's own.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ubsmoe.config import ConfigError, ModelSettings
from ubsmoe.errors import printable
from ubsmoe.export import save_load as exports
from ubsmoe.export.against_stock import check_attached, check_peft, compare, fits_twice, logits, rounded_away, twin
from ubsmoe.export.effect import faults, in_words, listed, nonzero_rows
from ubsmoe.export.installed import Installed, read_installed
from ubsmoe.export.merged import merge, survival
from ubsmoe.export.peft import PACKING, WEIGHTS
from ubsmoe.export.sidecar import Sidecar
from ubsmoe.model.expert_weights import up_name
from ubsmoe.model.load import load_base
from ubsmoe.model.surgery import SparseModel
from ubsmoe.storage import exportfolder
from ubsmoe.storage.runfolder import is_run


@dataclass(frozen=True)
class Checked:
    """What a check found: facts, and one sentence for each failure."""

    facts: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


def check(folder: Path, base: str) -> Checked:
    """Try an adapter or an export on its base.

    Args:
        folder: an export of any format, or a PEFT adapter that anybody made.
        base: a folder, a hub id or a name, as model.base takes it.

    Raises:
        UserError: if the base cannot be had, or `folder` is a run.
    """
    if is_run(folder):
        raise ConfigError(f"{folder} is a run folder; export it with `ubsmoe export`, and check the export")
    found = Checked()
    sidecar = _tried(found, lambda: exports.read(folder)) if exportfolder.is_export(folder) else None
    if not found.failures:
        sparse, _ = load_base(ModelSettings(base=base, dtype=sidecar.dtype if sidecar else "auto"))
        if sidecar:
            _tried(found, lambda: exports.check_base(sidecar, sparse, sparse.sha256, folder))
        if not found.failures and sidecar and sidecar.format == "merged":
            _check_merged(found, folder, sidecar, sparse)
        elif not found.failures:
            _check_adapter(found, folder, sidecar, sparse)
    return found


def _tried(found: Checked, step: Callable[[], Any]) -> Any:
    """What a step gives, or None: its sentence has become a failure."""
    try:
        return step()
    except (ValueError, KeyError, RuntimeError) as error:  # ours, or what transformers and PEFT raise for odd files
        found.failures.append(printable(str(error), longest=2000))
    return None


def _check_adapter(found: Checked, folder: Path, sidecar: Sidecar | None, sparse: SparseModel) -> None:
    if (read := _tried(found, lambda: exports.adapter_of(folder, sidecar, sparse))) is None:
        return
    adapter, alpha = read
    found.facts.extend(in_words(adapter))
    found.facts.extend(f"rows that are not zero: {kind} {share:.1%}" for kind, share in nonzero_rows(adapter).items())
    if (folder / WEIGHTS).is_file():
        stated = PACKING.items() <= exportfolder.read_export_header(folder / WEIGHTS).items()
        order = ", ".join(f"{factor} {how}" for factor, how in PACKING.items())
        found.facts.append(f"packing: {order}, {'as stated' if stated else 'not stated, so as PEFT has it'}")
    found.failures.extend(faults(adapter, sidecar.untouched if sidecar else None))
    if not found.failures:
        _check_logits(found, folder, adapter, alpha, sparse)


def _check_logits(
    found: Checked, folder: Path, adapter: Mapping[str, Tensor], alpha: float, sparse: SparseModel
) -> None:
    """With the adapter, without it, merged, and in PEFT."""
    effect = _tried(found, lambda: check_attached(sparse, adapter, alpha))
    without_effect = bool(found.failures)
    sparse.load_adapter(adapter, alpha)
    installed = read_installed(sparse)
    left, dtype = survival(sparse, installed), str(sparse.model.dtype).removeprefix("torch.")
    found.facts.append(f"merged into {dtype}: {left.share:.1%} of the change is left")
    _tried(found, lambda: rounded_away(left, dtype))
    if without_effect:
        return
    if effect is None:
        return found.facts.append("logits: not compared, because a second copy of this base would fill memory")
    found.facts.append(f"logits: the adapter changes them by {effect:.2%} of their size")
    ours = logits(sparse.model)
    sparse.clear()
    base = logits(twin(sparse.model))
    _tried(found, lambda: compare(logits(_merged(sparse, installed)), ours, base, "the merged model", sparse))
    if (folder / WEIGHTS).is_file():
        tensors = exportfolder.read_export_tensors(folder / WEIGHTS)
        _tried(found, lambda: check_peft(folder, sparse, installed, tensors))


def _merged(sparse: SparseModel, installed: Installed) -> Any:
    """A second model with the adapter in its weights."""
    model = twin(sparse.model)
    for name, change in merge(sparse, installed).changes.items():
        owner, _, last = name.rpartition(".")
        part = model.get_submodule(owner)
        setattr(part, last, torch.nn.Parameter(change(getattr(part, last)), requires_grad=False))
    return model


def _check_merged(found: Checked, folder: Path, sidecar: Sidecar, sparse: SparseModel) -> None:
    """A merged model against its base, expert by expert, and its logits against the base's."""
    own, _ = load_base(ModelSettings(base=str(folder), dtype=sidecar.dtype))
    changed, total = 0, 0
    for layer, other in zip(sparse.layers, own.layers, strict=True):
        for matrix, stored in (("up", up_name(layer.experts)), ("down", "down_proj")):
            pairs = list(zip(getattr(layer.experts, stored), getattr(other.experts, stored), strict=True))
            same = {expert for expert, (base, merged) in enumerate(pairs) if torch.equal(base, merged)}
            changed, total = changed + len(pairs) - len(same), total + len(pairs)
            name = f"layers.{layer.index}.{matrix}"
            if sidecar.untouched is not None and (lost := sorted(same - set(sidecar.untouched.get(name, [])))):
                found.failures.append(
                    f"{name}: {listed(lost)} as in the base, not named as untouched: lost in the merge"
                )
    found.facts.append(f"changed: {changed} of {total} matrices (experts x projections x layers)")
    if not changed:
        found.failures.append(f"{folder} holds the experts of its base: nothing was merged; export it again")
    elif fits_twice(sparse) and torch.equal(logits(sparse.model), logits(own.model)):
        found.failures.append("logits of the merged model are those of its base: what was merged has no effect")
