"""A run exported and used again, method by method, and the Python interface on top."""

import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import ubsmoe
from e2e.test_cli import ubsmoe as command
from ubsmoe.config import with_overrides
from ubsmoe.errors import UserError
from ubsmoe.export import save_load as exports
from ubsmoe.export.installed import read_installed
from ubsmoe.export.serving import Served
from ubsmoe.finished.federated_moe import FederatedMoE
from ubsmoe.finished.run import export_run, open_run

WriteToml = Callable[..., Path]
IDS = torch.randint(3, 60, (2, 6), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    result: torch.Tensor = model(input_ids=IDS).logits
    return result


@pytest.fixture(scope="session")
def done() -> dict[str, Path]:
    """Runs by method, each carried out once."""
    return {}


@pytest.fixture
def finished(
    done: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    tiny_run: dict,
    write_toml: WriteToml,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], Path]:
    """A finished run of a method, as a copy of the test's own."""

    def run(method: str) -> Path:
        if method not in done:
            changes = {"method.name": method, "train.rounds": 1, "adapter.attention": "trained"}
            settings, place = with_overrides(tiny_run, changes), tmp_path_factory.mktemp("finished") / method
            assert command(monkeypatch, "run", write_toml(settings), "--out", place) == 0
            done[method] = place
        return shutil.copytree(done[method], tmp_path / "run")

    return run


TWINS = ("florist", "fedex_lora", "ffa_lora")
"""Their exports are flora's (a factor beside the adapter) and fedavg's."""


@pytest.mark.parametrize(
    "method",
    [
        *("ubsmoe", "lossfree", "flame", "fed_sb", "hetlora", "flora"),
        *(pytest.param(name, marks=pytest.mark.thorough) for name in TWINS),
    ],
)
def test_every_kind_of_method_exports_what_its_tier_runs(method: str, finished: Any, tmp_path: Path) -> None:
    place = finished(method)
    run = open_run(place)
    model = run.install(run.tier(2))
    want = logits(model.model)
    model.clear()
    base = logits(model.model)
    assert (want - base).abs().max() > 1e-4
    for format in ("native", "peft", "merged"):
        sidecar = export_run(place, tmp_path / format, format, tier=2)
        assert sidecar.method == method and sidecar.tier == 2
        again = FederatedMoE.from_pretrained(tmp_path / format)
        assert (logits(again.model) - want).abs().max() <= 1e-5
        assert again.top_k == run.tier(2).top_k


@pytest.mark.parametrize("method", ["ubsmoe", "lossfree", "flame", "flora"])
def test_an_adapter_is_exported_without_the_weights_of_its_base(
    method: str, finished: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = finished(method)
    for format in ("native", "peft"):
        run = open_run(place)
        model, origin = run.install(run.tier(2)), run.origin(run.tier(2))
        loaded = tmp_path / f"loaded-{format}"
        exports.write(model, run.tokenizer, read_installed(model), origin, format, loaded)
        with monkeypatch.context() as patch:
            patch.setattr("ubsmoe.finished.run.DIRECT_BYTES", 0)  # as if this base were a big one
            patch.setattr("ubsmoe.finished.run.Bases", None)  # whoever loads weights fails
            export_run(place, tmp_path / format, format, 2)
        for file in loaded.iterdir():
            assert (tmp_path / format / file.name).read_bytes() == file.read_bytes(), file


def test_the_object_answers_at_any_budget_and_saves_itself(finished: Any, tmp_path: Path) -> None:
    model = ubsmoe.FederatedMoE.from_pretrained(finished("ubsmoe"))
    full = logits(model.model)
    assert model.top_k == model.k_max == 4
    with model.budget(0.25) as small:
        assert small.top_k == 1
        assert not torch.allclose(logits(model.model), full)
        text = model.generate("alpha beta", max_new_tokens=4)
    assert isinstance(text, str) and model.top_k == 4
    assert torch.equal(logits(model.model), full)
    model.save_pretrained(tmp_path / "saved")
    again = FederatedMoE.from_pretrained(tmp_path / "saved")
    assert torch.equal(logits(again.model), full)
    for wrong in (0.0, 1.5):
        with pytest.raises(UserError, match="budget must lie in"):
            model.set_budget(wrong)


def test_scales_learned_at_one_k_are_not_used_at_another(finished: Any) -> None:
    model = FederatedMoE.from_pretrained(finished("flame"), tier=2)
    with pytest.raises(UserError, match="learned at K = 2; load the tier"):
        model.set_budget(1.0)


def test_a_bare_base_generates_but_has_nothing_to_save(random_base: Path, tmp_path: Path) -> None:
    model = FederatedMoE.from_pretrained(random_base)
    model.set_budget(0.5)
    assert model.top_k == 2 and isinstance(model.generate("a", max_new_tokens=2), str)
    with pytest.raises(UserError, match="no adapter is in place"):
        model.save_pretrained(tmp_path / "out")
    with pytest.raises(UserError, match="is no run folder"):
        FederatedMoE.from_pretrained(random_base, tier=1)


def test_export_import_and_generate_from_the_command_line(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, finished: Any, tiny_run: dict, write_toml: WriteToml, tmp_path: Path
) -> None:
    place = finished("fedavg")
    assert command(monkeypatch, "export", place, "--out", tmp_path / "peft", "--tier", "2") == 0
    assert "K=2, rank 3" in capsys.readouterr().out
    assert command(monkeypatch, "export", place, "--out", tmp_path / "peft", "--tier", "2") == 2
    assert "exists already" in capsys.readouterr().err
    merged = ("export", place, "--format", "merged", "--out", tmp_path / "merged", "--tier", "1")
    assert command(monkeypatch, *merged) == 0 and "K=1" in capsys.readouterr().out
    assert command(monkeypatch, "export", place, "--out", tmp_path / "x", "--tier", "5") == 2
    assert not (tmp_path / "x").exists()
    assert (
        command(monkeypatch, "generate", tmp_path / "peft", "alpha", "--budget", "0.25", "--max-new-tokens", "3") == 0
    )

    short = {"train.rounds": 1, "method.name": "fedavg"}
    again = with_overrides(tiny_run, {**short, "adapter.attention": "trained"})
    quoted = shutil.copytree(tmp_path / "peft", tmp_path / 'it\'s "mine"')
    assert (
        command(monkeypatch, "run", write_toml(again), "--set", f"adapter.start={quoted}", "--out", tmp_path / "again")
        == 0
    )
    goes_on, ended = (json.loads((folder / "summary.json").read_text()) for folder in (tmp_path / "again", place))
    assert goes_on["before"] == ended["after"] != ended["before"]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"adapter.rank": 2}, "has rank 3 and alpha 6, this run 2 and 6; set adapter.rank = 3"),
        ({"adapter.router": "trained"}, "adapter.router is 'trained'"),
        ({"adapter.attention": "frozen"}, "adapter.attention is 'frozen'"),
        ({"method.name": "fed_sb"}, "fed_sb begins from an adapter of its own"),
        ({"method.name": "flora", "tiers.ranks": [3, 3, 3, 3]}, "flora begins from an adapter of its own"),
    ],
)
def test_an_adapter_that_a_run_cannot_start_from_is_refused(
    change: dict,
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
    finished: Any,
    tiny_run: dict,
    write_toml: WriteToml,
    tmp_path: Path,
) -> None:
    export_run(finished("fedavg"), tmp_path / "peft", "peft")
    settings = write_toml(
        with_overrides(tiny_run, {"adapter.start": str(tmp_path / "peft"), "adapter.attention": "trained", **change}),
        "again.toml",
    )
    capsys.readouterr()
    assert command(monkeypatch, "run", settings, "--out", tmp_path / "again") == 2
    assert sentence in capsys.readouterr().err


def asked(url: str, body: dict | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.loads(answer.read())


def written(folder: Path) -> str:
    """What AutoModel writes after "alpha beta", at the K of the config."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    stock = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer("alpha beta", return_tensors="pt")
    out = stock.generate(
        inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=6, do_sample=False
    )
    return str(tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


@pytest.mark.parametrize("method", ["fedavg", "ubsmoe"])
def test_a_merged_tier_is_served(method: str, finished: Any, tmp_path: Path) -> None:
    """OpenAI's completions are the text that AutoModel writes at the K of the tier's config, and what that lacks is said."""
    for module in ("fastapi", "uvicorn", "openai", "accelerate"):
        pytest.importorskip(module, reason="needs the extra serve")
    run = finished(method)
    export_run(run, tmp_path / "served", "merged", tier=1)
    want = written(tmp_path / "served")

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    words = [sys.executable, "-m", "ubsmoe", "serve", "served", "--port", str(port)]
    with (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen(words, cwd=tmp_path, stdout=log, stderr=log)
    try:
        while server.poll() is None:
            try:
                assert asked(f"{url}/health")["status"] == "ok"
                break
            except OSError:
                time.sleep(0.2)
        body = {"model": "served", "prompt": "alpha beta", "max_tokens": 6, "temperature": 0}
        said = asked(f"{url}/v1/completions", body)["choices"][0]["text"]
        after = _taken(url, body, tmp_path, run) if method == "fedavg" else {}
    finally:
        server.terminate()
        server.wait()
    told = (tmp_path / "log").read_text()
    assert said == want, told
    assert "served: K=1; the model's name in requests is served" in told
    assert ("left out: φ" in told) == (method == "ubsmoe")
    if method == "fedavg":
        assert after == {"damaged": said, "K = 2": written(tmp_path / "served")}
        assert "served was not taken, the model before goes on answering" in told and "served: K=2" in told
        served = Served(tmp_path / "served", lambda line: None)
        assert experts_per_token(served) == 2
        (tmp_path / "served").rename(tmp_path / "K = 2")
        (tmp_path / "before damaged").rename(tmp_path / "served")
        served.reload()
        assert experts_per_token(served) == 1


def experts_per_token(served: Served) -> int:
    """K of the one model that answers."""
    (one,) = served.manager.loaded_models.values()
    return int(one.model.config.num_experts_per_tok)


def _taken(url: str, body: dict, folder: Path, run: Path) -> dict[str, str]:
    """What a server says when another export, first a damaged and then a whole one, has taken the place of its own."""
    found = {}
    for name in ("damaged", "K = 2"):
        export_run(run, folder / "next", "merged", tier=2)
        if name == "damaged":
            (folder / "next" / "config.json").unlink()
        (folder / "served").rename(folder / f"before {name}")
        (folder / "next").rename(folder / "served")
        try:
            asked(f"{url}/reload", {})
        except urllib.error.HTTPError as error:
            assert name == "damaged" and error.code == 409
        found[name] = asked(f"{url}/v1/completions", body)["choices"][0]["text"]
    return found


def test_what_cannot_be_served_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, finished: Any, tmp_path: Path
) -> None:
    export_run(finished("fedavg"), tmp_path / "peft", "peft")
    for place, sentence in (
        ("peft", "is a peft export, and the server loads whole models"),
        ("run", "not a whole export"),
    ):
        assert command(monkeypatch, "serve", tmp_path / place) == 2
        assert sentence in capsys.readouterr().err
    export_run(tmp_path / "run", tmp_path / "merged", "merged")
    monkeypatch.setattr("ubsmoe.errors.find_spec", lambda name: None)
    assert command(monkeypatch, "serve", tmp_path / "merged") == 2
    assert 'this needs fastapi: pip install "ubsmoe[serve]"' in capsys.readouterr().err
