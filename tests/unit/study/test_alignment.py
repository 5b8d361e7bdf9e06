"""The probe of pseudo-gradients: its truth, its controls, and the rounds and tiers it visits."""

from pathlib import Path
from typing import Any

import pytest
import torch

from ubsmoe.client.train import language_loss
from ubsmoe.config import ConfigError, parse_run, to_json, with_overrides
from ubsmoe.engines.local import LocalEngine
from ubsmoe.server.federation import Federation, build_federation
from ubsmoe.server.run import run
from ubsmoe.server.start import start_state
from ubsmoe.storage.runfolder import RunFolder, RunFolderError
from ubsmoe.study import alignment
from ubsmoe.study.alignment import fixed_batch, layer_signals, probe_run


def federation_of(tiny_run: dict[str, Any], **changes: Any) -> Federation:
    unscored = {"evaluate.before": False, "evaluate.after": False}
    return build_federation(parse_run(with_overrides(tiny_run, unscored | changes)))


def finished(federation: Federation, folder: Path) -> Path:
    with RunFolder.open_or_create(folder, to_json(federation.settings)) as place:
        run(
            federation, place, LocalEngine(federation.trainer, federation.examples, federation.clients), lambda *_: None
        )
    return folder


def signals_of(federation: Federation, top_k: int) -> list[alignment.LayerSignals]:
    model, batch = federation.model, fixed_batch(federation)
    adapter = {  # B must not be zero, or A would have no gradient at all
        name: torch.randn(value.shape, generator=torch.Generator().manual_seed(len(name))) / 4
        for name, value in start_state(federation).adapters.items()
    }
    model.load_adapter(adapter, alpha=6.0)
    model.set_top_k(top_k)
    backward = lambda: language_loss(model, batch).backward()  # noqa: E731
    return layer_signals(model, backward, torch.Generator().manual_seed(1))


def test_with_every_missing_pair_sampled_nothing_of_the_truth_is_missed(
    tiny_run: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(alignment, "FRACTIONS", (1.0,))
    for layer in signals_of(federation_of(tiny_run), top_k=2):
        cosines = layer.cosines(torch.ones(6, dtype=torch.bool))
        assert cosines["sampled 1.0"] == pytest.approx([1.0] * 6, abs=1e-4)
        assert set(cosines) == {"client_mean", "self_ipw", "sampled 1.0", "random", "another expert"}


def test_a_random_direction_is_nearly_orthogonal(tiny_run: dict[str, Any]) -> None:
    layers = signals_of(federation_of(tiny_run), top_k=1)
    values = [cosine for layer in layers for cosine in layer.cosines(torch.ones(6, dtype=torch.bool))["random"]]
    width = layers[0].missing.shape[1]  # the cosine's standard deviation is 1 / sqrt(width)
    assert all(abs(value) < 5 / width**0.5 for value in values)


def test_every_kept_round_and_tier_is_probed_and_the_top_tier_lacks_something_too(
    tiny_run: dict[str, Any], tmp_path: Path
) -> None:
    federation = federation_of(tiny_run, keep_checkpoints=3)
    folder = finished(federation, tmp_path / "run")
    by_round = list(probe_run(folder))
    assert [{row["round"] for row in rows} for rows in by_round] == [{0}, {1}, {2}]
    assert {(row["tier"], row["top_k"]) for row in by_round[0]} == {(1, 1), (2, 2), (3, 3), (4, 4)}
    assert list(probe_run(folder)) == by_round
    two_layers = 2 * 6
    for tier in range(1, 5):
        counts = {r["experts"]: r["count"] for r in by_round[2] if r["tier"] == tier and r["signal"] == "random"}
        assert sum(counts.values()) == two_layers


def test_only_kept_states_can_be_probed(tiny_run: dict[str, Any], tmp_path: Path) -> None:
    folder = finished(federation_of(tiny_run, keep_checkpoints=1), tmp_path / "run")
    assert [{row["round"] for row in rows} for rows in probe_run(folder)] == [{2}]


def test_what_cannot_be_probed_is_refused(tiny_run: dict[str, Any], tmp_path: Path) -> None:
    short = {"method.name": "hfedmoe", "train.rounds": 1, "train.local_steps": 1}
    folder = finished(federation_of(tiny_run, **short), tmp_path / "hfedmoe")
    with pytest.raises(ConfigError, match="hfedmoe selects the experts that learn"):
        next(probe_run(folder))
    settings = federation_of(tiny_run).settings
    RunFolder.open_or_create(tmp_path / "empty", to_json(settings)).close()
    with pytest.raises(RunFolderError, match="no checkpoint yet"):
        next(probe_run(tmp_path / "empty"))
