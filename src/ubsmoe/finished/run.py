"""A finished run, opened again: scored; or, without its data, put on the base, exported, or asked."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from ubsmoe.config import ConfigError, RunSettings, parse_run, with_overrides
from ubsmoe.config.plug_ins import require_trusted
from ubsmoe.export import save_load as exports
from ubsmoe.export.installed import read_installed
from ubsmoe.export.sidecar import Format, Sidecar
from ubsmoe.messages import Profile
from ubsmoe.methods.chosen import chosen_method, shape_of_model, tier_profiles
from ubsmoe.methods.compensation import CompensationState
from ubsmoe.methods.method import Method, State
from ubsmoe.methods.state import unpack
from ubsmoe.model.load import Bases, base_bytes, load_skeleton
from ubsmoe.model.opened import DIRECT_BYTES
from ubsmoe.model.presets import dtype_of, experts_of
from ubsmoe.model.surgery import SparseModel
from ubsmoe.seeds import generator_for
from ubsmoe.server.federation import build_server
from ubsmoe.server.rounds import evaluate_tier
from ubsmoe.storage.runfolder import read_adapter, read_run

Weights = Literal["trained", "plain", "none"]


@dataclass(frozen=True)
class FinishedRun:
    """A run that has ended. `tiers` is one profile per tier; `bases` are loaded when they are asked for, None for no weights."""

    path: Path
    settings: RunSettings
    skeleton: SparseModel
    bases: Bases | None
    weights: Weights
    method: Method
    tiers: list[Profile]
    state: State
    base_sha256: str

    def tier(self, number: int | None) -> Profile:
        """A tier, counted from 1; the one with the largest budget for None. Raises ConfigError if there is none."""
        if number is None:
            return max(self.tiers, key=lambda profile: profile.budget)
        return _numbered(self.tiers, number)

    @property
    def tokenizer(self) -> Any:
        """The base's, where a base is loaded."""
        return self.bases and self.bases.tokenizer

    def origin(self, profile: Profile) -> exports.Origin:
        """What an export of this profile says of itself."""
        model = self.settings.model.model_copy(update={"experts": profile.experts})
        return exports.Origin(model, self.base_sha256, self.method.name, profile.tier + 1)

    def install(self, profile: Profile) -> SparseModel:
        """Put on the base what a client of this profile gets, and give it.

        Raises:
            UserError: if the base cannot be had, or is another than it was trained on.
        """
        model, payload = self._base_for(profile), self.method.dispatch(self.state, profile)
        self.method.install(model, payload, profile, generator_for(self.settings.seed, "evaluation"))
        if CompensationState in self.method.keeps and (own := self.state.of(CompensationState).by_name()):
            model.set_compensation(own)  # of every K, so that it serves at any
        return model

    def _base_for(self, profile: Profile) -> SparseModel:
        if self.bases is None:
            return self.skeleton
        stored = experts_of(self.settings.model.model_copy(update={"experts": None}))
        model = self.bases(profile.experts if self.weights == "trained" else stored)
        _require_base(self.path, self.base_sha256, model.sha256, self.settings)
        return model


def open_run(
    path: Path, device: str | None = None, weights: Weights = "trained", base: str | None = None
) -> FinishedRun:
    """Open a finished run.

    Args:
        path: the run folder.
        device: where to, if not where it was trained.
        weights: the base's as in training, or "plain" where its experts were quantised; with "none", adapters can be put on and
            read off, and nothing run.
        base: where the base lies, if it is not to be taken from where it was in training.

    Raises:
        RunFolderError: if the folder holds no finished run.
        ConfigError: if its base cannot be had.
    """
    tensors, facts = read_adapter(path)
    settings = settings_of_run(path, {"model.device": device} if device else {})
    found = {
        "dtype": dtype_of(settings.model),
        "experts": experts_of(settings.model),
        "base": base or settings.model.base,
    }
    settings = settings.model_copy(update={"model": settings.model.model_copy(update=found)})
    place = settings.model, settings.tiers.rescale, settings.tiers.k_max
    skeleton, bases = load_skeleton(*place), None if weights == "none" else Bases(*place)
    skeleton.device = torch.device("cpu")
    shape = shape_of_model(settings, skeleton)
    method = chosen_method(settings, shape)
    tiers, state = tier_profiles(settings, method, shape), unpack(tensors, method.keeps)
    return FinishedRun(path, settings, skeleton, bases, weights, method, tiers, state, facts["base_sha256"])


def export_run(path: Path, out: Path, format: Format, tier: int | None = None, base: str | None = None) -> Sidecar:
    """Export what one tier of a finished run uses.

    Args:
        path: the run folder.
        out: the new folder.
        format: "native", "peft" or "merged".
        tier: counted from 1; the one with the largest budget when left out.
        base: for "merged", the plain base, if the run was on a prepared one with quantised experts.

    Raises:
        UserError: if there is no finished run, no such tier, its base is another, or `out` is taken; then nothing is written.
    """
    # an adapter holds nothing of its base, which is there only to try it out, where that costs next to nothing
    whole = format == "merged" or (format == "peft" and base_bytes(settings_of_run(path, {}).model) < DIRECT_BYTES)
    run = open_run(path, weights="plain" if whole else "none", base=base)
    profile = run.tier(tier)
    model = run.install(profile)
    installed = read_installed(model)
    model.clear()
    return exports.write(model, run.tokenizer, installed, run.origin(profile), format, out)


def evaluate_run(
    path: Path, overrides: dict[str, Any], tier: int | None = None, top_k: int | None = None
) -> list[dict[str, Any]]:
    """Score the adapter of a finished run.

    Args:
        path: the run folder.
        overrides: dotted settings that say how to score: evaluate.*, data.*, model.device.
        tier: one tier, counted from 1; None for all.
        top_k: score with so many experts per token, 1..K_max (0 with a compensation); None for each tier's own.

    Returns:
        Per tier: tier, top_k, rank and scores by task.

    Raises:
        ConfigError: for another setting, a tier or a K that does not exist, or a base that is not the run's.
        RunFolderError: if the folder holds no finished run.
    """
    if wrong := [key for key in overrides if not key.startswith(("evaluate.", "data.")) and key != "model.device"]:
        raise ConfigError(f"--set {wrong[0]}: scoring a run can change evaluate.*, data.* and model.device only")
    tensors, facts = read_adapter(path)
    federation = build_server(settings_of_run(path, overrides), weights=True)
    _require_base(path, facts["base_sha256"], federation.base_sha256, federation.settings)
    state = unpack(tensors, federation.method.keeps)
    chosen = federation.tiers if tier is None else [_numbered(federation.tiers, tier)]
    if top_k is not None:
        least = federation.method.skipped.least_top_k if federation.method.skipped else 1
        if not least <= top_k <= federation.shape.k_max:
            raise ConfigError(f"--top-k must lie in {least}..{federation.shape.k_max}, got {top_k}")
        chosen = [replace(profile, top_k=top_k) for profile in chosen]
    return [
        {
            "tier": profile.tier,
            "top_k": profile.top_k,
            "rank": profile.rank,
            "scores": {task: score.figures() for task, score in evaluate_tier(federation, state, profile).items()},
        }
        for profile in chosen
    ]


def settings_of_run(path: Path, changes: dict[str, Any]) -> RunSettings:
    """A run's settings with these changes, and its number of threads in force: other sums would round differently."""
    config = read_run(path).config
    require_trusted(config, path)
    settings = parse_run(with_overrides(config, changes))
    if settings.threads:
        torch.set_num_threads(settings.threads)
    return settings


def _numbered(tiers: list[Profile], number: int) -> Profile:
    if not 1 <= number <= len(tiers):
        raise ConfigError(f"--tier must lie in 1..{len(tiers)}, got {number}")
    return tiers[number - 1]


def _require_base(path: Path, trained_on: str, base_sha256: str, settings: RunSettings) -> None:
    if trained_on != base_sha256:
        raise ConfigError(f"model.base: {path} was trained on another base than {settings.model.base}")
