"""From a finished run to a folder that others can load, and back.

    native   our tensors, `adapter.safetensors`
    peft     what `PeftModel.from_pretrained` loads
    merged   a whole model, what `AutoModelForCausalLM.from_pretrained` loads

Each has the sidecar `ubsmoe.json` and a README.md that says what plain transformers and PEFT leave out.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ubsmoe.config import ConfigError, ModelSettings
from ubsmoe.export.against_stock import check_attached, check_merged, check_peft, check_saved, rounded_away
from ubsmoe.export.card import export_card
from ubsmoe.export.effect import joined, require_effect, untouched
from ubsmoe.export.installed import Installed
from ubsmoe.export.merged import merge, survival, write_merged
from ubsmoe.export.peft import CONFIG, PACKING, WEIGHTS, AdapterMismatch, check_packing, from_peft, to_peft
from ubsmoe.export.sidecar import Format, Sidecar, beyond_stock, parse_sidecar
from ubsmoe.model.adapter_fit import check_fit
from ubsmoe.model.conventions import top_k_name
from ubsmoe.model.quantised import format_of
from ubsmoe.model.surgery import SparseModel
from ubsmoe.storage import exportfolder
from ubsmoe.storage.json_text import encode_json

NATIVE = "adapter.safetensors"
COMPENSATION = "compensation.safetensors"


@dataclass(frozen=True)
class Origin:
    """Where an export comes from: the base as a run file names it, its hash, and what trained the adapter."""

    model: ModelSettings
    base_sha256: str
    method: str
    tier: int | None = None


def write(
    sparse: SparseModel, tokenizer: Any, installed: Installed, origin: Origin, format: Format, out: Path
) -> Sidecar:
    """Write one export; the model is left as it was.

    Args:
        sparse: the base; names and shapes are all that is asked of it, unless the format is "merged".
        tokenizer: the base's; goes with a merged model.
        installed: what to export.
        origin: facts for the sidecar.
        format: "native", "peft" or "merged".
        out: a folder that does not exist yet, or is empty.

    Returns:
        The sidecar that was written.

    Raises:
        ExportError: if `out` is taken or cannot be written; then nothing is.
        ConfigError: for "merged" if the experts in memory are quantised.
        UserError: if plain transformers or PEFT would make something else of it; then nothing is written either.
    """
    exportfolder.check_free(out)  # before anything is computed
    if format == "merged" and format_of(sparse.layers[0].experts):
        raise ConfigError(
            f"a merged export holds whole weights, and {origin.model.base} is in memory with quantised experts; use "
            "`ubsmoe export RUN --format merged`, with --base where the plain base lies if the run was on a prepared one"
        )
    if format != "native" and installed.routing["top_k"] == 0:
        raise ConfigError(
            f"this tier runs no expert, which stock software cannot; export {format} from another --tier, or this one as native"
        )
    still = untouched(installed.adapter)
    require_effect(installed.adapter, still, f"nothing is written to {out}")
    left = survival(sparse, installed) if format == "merged" else None
    merging = merge(sparse, installed)
    k_name = top_k_name(sparse.model.config)
    stock_top_k = getattr(sparse.model.config, k_name)
    sidecar = parse_sidecar(
        {
            "format": format,
            "base": origin.model.base,
            "base_sha256": origin.base_sha256,
            "dtype": str(sparse.model.dtype).removeprefix("torch."),
            "experts": origin.model.experts,
            "family": sparse.model.config.model_type,
            "method": origin.method,
            "tier": origin.tier,
            "rank": installed.rank,
            "alpha": installed.alpha,
            "untouched": joined(still, left.lost) if left else still,
            **(merging.routing if format == "merged" else installed.routing),
        }
    )

    missing = beyond_stock(sidecar, stock_top_k)
    if left:
        missing += rounded_away(left, sidecar.dtype)

    def fill(folder: Path) -> None:
        if format == "merged":
            write_merged(sparse, merging.changes, sidecar.top_k, folder)
            tokenizer.save_pretrained(folder)
            check_merged(folder, sparse, installed, sidecar)
        elif format == "peft":
            tensors, config = to_peft(sparse, installed.adapter, installed.alpha, origin.model.base)
            exportfolder.write_tensors(folder / WEIGHTS, tensors, **PACKING)
            exportfolder.put_text(folder / CONFIG, encode_json(config, indent=2).decode())
            check_saved(exportfolder.read_export_tensors(folder / WEIGHTS), tensors)
            check_peft(folder, sparse, installed, tensors)
        else:
            exportfolder.write_tensors(folder / NATIVE, installed.adapter)
            check_saved(exportfolder.read_export_tensors(folder / NATIVE), installed.adapter)
        if sidecar.compensated:
            exportfolder.write_tensors(folder / COMPENSATION, installed.compensation)
        card = export_card(sidecar.model_dump(), missing)
        exportfolder.put_text(folder / "README.md", card.replace("num_experts_per_tok", k_name))

    exportfolder.write_export(out, sidecar.model_dump(), fill)
    return sidecar


def read(folder: Path) -> Sidecar:
    """The sidecar of an export that is whole. Raises UserError with the reason if it is not."""
    return parse_sidecar(exportfolder.read_export(folder))


def read_tensors(folder: Path, sidecar: Sidecar, sparse: SparseModel) -> dict[str, Tensor]:
    """The adapter of an export by our names; empty for a merged one. Raises UserError if it does not fit the base."""
    return {} if sidecar.format == "merged" else _sound(folder, sidecar, sparse)[0]


def read_compensation(folder: Path, sidecar: Sidecar) -> dict[str, Tensor]:
    """What stands for skipped experts; empty if nothing does."""
    return exportfolder.read_export_tensors(folder / COMPENSATION) if sidecar.compensated else {}


def check_base(sidecar: Sidecar, sparse: SparseModel, sha256: str, folder: Path) -> None:
    """Raise ConfigError unless this is the base an adapter was trained on."""
    family = sparse.model.config.model_type
    if sidecar.family != family:
        raise ConfigError(f"{folder} is an adapter for {sidecar.family}, this base is {family}; give its own base")
    if sidecar.base_sha256 != sha256:
        raise ConfigError(
            f"{folder} was trained on another base: its weights' SHA-256 begins {sidecar.base_sha256[:12]}, "
            f"this base's {sha256[:12]}; expected {sidecar.base} in {sidecar.dtype}"
        )


def read_peft(folder: Path, sparse: SparseModel, sha256: str) -> tuple[dict[str, Tensor], float]:
    """A PEFT adapter, ours or anybody's, by our names, and its alpha.

    Raises:
        UserError: if files are missing, damaged, or the adapter belongs on another base.
    """
    sidecar = None
    if exportfolder.is_export(folder):
        sidecar = read(folder)
        if sidecar.format != "peft":
            raise ConfigError(f"{folder} is a {sidecar.format} export; expected a PEFT adapter")
        check_base(sidecar, sparse, sha256, folder)
    return _sound(folder, sidecar, sparse)


def adapter_of(folder: Path, sidecar: Sidecar | None, sparse: SparseModel) -> tuple[dict[str, Tensor], float]:
    """The adapter in an export, or of PEFT's own where there is no sidecar, and its alpha, whatever it does to the base.

    Raises:
        UserError: if files are missing or damaged, or it does not fit the base.
    """
    if sidecar is None or sidecar.format == "peft":
        return from_peft(sparse, *_peft_files(folder))
    adapter = exportfolder.read_export_tensors(folder / NATIVE)
    check_fit(sparse.layers, adapter, {})
    return adapter, sidecar.alpha


def _sound(folder: Path, sidecar: Sidecar | None, sparse: SparseModel) -> tuple[dict[str, Tensor], float]:
    """As `adapter_of`. Raises UserError, too, for an adapter that has no effect where it should."""
    adapter, alpha = adapter_of(folder, sidecar, sparse)
    require_effect(adapter, sidecar.untouched if sidecar else None, str(folder))
    check_attached(sparse, adapter, alpha)
    return adapter, alpha


def _peft_files(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if not (folder / CONFIG).is_file():
        raise AdapterMismatch(f"{folder} is no PEFT adapter: it has no {CONFIG}")
    check_packing(exportfolder.read_export_header(folder / WEIGHTS), str(folder / WEIGHTS))
    return exportfolder.read_export_tensors(folder / WEIGHTS), exportfolder.read_export_json(folder / CONFIG)
