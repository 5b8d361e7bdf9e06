"""`FederatedMoE`: a base, a finished run or an export as one object that answers at any budget."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Self

import torch

from ubsmoe import progress
from ubsmoe.config import ConfigError, ModelSettings
from ubsmoe.costs.shape import budget_top_k
from ubsmoe.data.tokens import pad_id
from ubsmoe.export import save_load as exports
from ubsmoe.export.installed import install, read_installed
from ubsmoe.export.sidecar import Format, Sidecar
from ubsmoe.finished.run import open_run
from ubsmoe.model.load import load_base
from ubsmoe.model.surgery import SparseModel
from ubsmoe.storage.exportfolder import is_export
from ubsmoe.storage.runfolder import is_run

Dtype = Literal["float32", "bfloat16"]


class FederatedMoE:
    """A sparse mixture of experts with an adapter in place, and a budget that can be changed at any time.

    Attributes:
        model: the transformers model; it obeys the budget, in `generate` and in every forward pass.
        tokenizer: the base's.
    """

    def __init__(self, sparse: SparseModel, tokenizer: Any, origin: exports.Origin) -> None:
        self._sparse, self.tokenizer, self._origin = sparse, tokenizer, origin

    @classmethod
    def from_pretrained(
        cls,
        place: str | Path,
        *,
        tier: int | None = None,
        base: str | None = None,
        device: str = "cpu",
        dtype: Dtype | None = None,
    ) -> Self:
        """Load a run folder, an export of any format, or a bare base.

        Args:
            place: a finished run, an export, or whatever model.base may be.
            tier: of a run: whose adapter and budget, counted from 1; the largest budget's when left out.
            base: of an adapter export: where its base lies, if not where it did.
            device: torch device.
            dtype: of a bare base: the checkpoint's own when left out. An adapter is used in the precision it was trained in.

        Raises:
            UserError: if it cannot be loaded; the message says why.
        """
        folder = Path(place)
        if dtype and (is_run(folder) or is_export(folder)):
            raise ConfigError(
                f"dtype is for a bare base, and {place} is a run or an export, used as it was trained; leave it out"
            )
        if is_run(folder):
            return cls._from_run(folder, tier, device)
        if tier is not None:
            raise ConfigError(f"tier chooses among the tiers of a run, and {place} is no run folder")
        if is_export(folder):
            return cls._from_export(folder, base, device)
        settings = ModelSettings(base=str(place), device=device, dtype=dtype or "auto")
        sparse, tokenizer = load_base(settings)
        return cls(sparse, tokenizer, exports.Origin(settings, sparse.sha256, "none"))

    @property
    def model(self) -> Any:
        """The transformers model."""
        return self._sparse.model

    @property
    def k_max(self) -> int:
        """Experts per token at budget 1."""
        return self._sparse.k_max

    @property
    def top_k(self) -> int:
        """Experts per token now."""
        return self._sparse.layers[0].routing.top_k

    def set_budget(self, budget: float) -> None:
        """Use max(1, floor(K_max * budget)) experts per token from now on; with a compensation, less than one runs none.

        Raises:
            UserError: outside (0, 1], or if the adapter has output scales that were learned at one K alone.
        """
        try:
            own = self._sparse.layers[0].routing.compensation
            self._set_top_k(budget_top_k(self.k_max, budget, least=0 if own and own.at(0) else 1))
        except ValueError as error:
            raise ConfigError(str(error)) from None

    @contextmanager
    def budget(self, budget: float) -> Iterator[Self]:
        """`set_budget` for the length of a with statement."""
        before = self.top_k
        self.set_budget(budget)
        try:
            yield self
        finally:
            self._sparse.set_top_k(before)

    @torch.no_grad()
    def generate(self, prompt: str, **settings: Any) -> str:
        """Continue a text at the current budget.

        Args:
            prompt: as the model is to see it, template and all.
            settings: transformers' own, such as max_new_tokens, do_sample or num_beams.

        Returns:
            The new text alone.

        Raises:
            UserError: for a prompt that holds no text.
        """
        if any("\ud800" <= character <= "\udfff" for character in prompt):
            raise ConfigError("the prompt is not UTF-8 text; expected Unicode")
        if not self.tokenizer(prompt).input_ids:
            raise ConfigError("the prompt is empty; expected text to continue")
        inputs = self.tokenizer(prompt, return_tensors="pt").to(self.model.device)
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        progress.at("generates")
        out = self.model.generate(input_ids=ids, attention_mask=mask, pad_token_id=pad_id(self.tokenizer), **settings)
        text: str = self.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        return text

    def save_pretrained(self, folder: str | Path, format: Format = "native") -> Sidecar:
        """Export what is in place, at the current budget; this object stays as it is.

        Raises:
            UserError: if there is no adapter, or the folder is taken.
        """
        try:
            installed = read_installed(self._sparse)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        return exports.write(self._sparse, self.tokenizer, installed, self._origin, format, Path(folder))

    def _set_top_k(self, top_k: int) -> None:
        if top_k != self.top_k and self._sparse.layers[0].routing.output_scale is not None:
            raise ConfigError(
                f"this adapter has output scales learned at K = {self.top_k}; load the tier that uses K = {top_k} instead"
            )
        self._sparse.set_top_k(top_k)

    @classmethod
    def _from_run(cls, folder: Path, tier: int | None, device: str) -> Self:
        run = open_run(folder, device)
        profile = run.tier(tier)
        model = run.install(profile)
        return cls(model, run.tokenizer, run.origin(profile))

    @classmethod
    def _from_export(cls, folder: Path, base: str | None, device: str) -> Self:
        sidecar = exports.read(folder)
        place = str(folder) if sidecar.format == "merged" else base or sidecar.base
        experts = None if sidecar.format == "merged" else sidecar.experts
        settings = ModelSettings(base=place, dtype=sidecar.dtype, device=device, experts=experts)
        sparse, tokenizer = load_base(settings)
        sha256 = sparse.sha256
        if sidecar.format != "merged":
            exports.check_base(sidecar, sparse, sha256, folder)
        adapter = exports.read_tensors(folder, sidecar, sparse)
        install(sparse, adapter, sidecar, exports.read_compensation(folder, sidecar))
        return cls(sparse, tokenizer, exports.Origin(settings, sha256, sidecar.method, sidecar.tier))
