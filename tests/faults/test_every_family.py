"""C8 (and C1) of the faults found by trial: of every mixture that this transformers has, plan, costs and run say the same.

A family runs, or is refused in one sentence. Where it runs, its costs are counted or `plan` says that they are not, as `run` does.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from ubsmoe.cli.inspect import _plan_of_base
from ubsmoe.config import RunSettings, parse_run
from ubsmoe.engines.local import LocalEngine
from ubsmoe.errors import UserError
from ubsmoe.model.load import load_tokenizer
from ubsmoe.model.presets import FAMILIES
from ubsmoe.plan.forecast import forecast
from ubsmoe.server.federation import build_federation
from ubsmoe.server.rounds import evaluate_tier, one_round
from ubsmoe.server.start import start_state
from ubsmoe.training.opening import known_costs
from unit.model import mixtures

REFUSED = {
    "dbrx": "cannot load",
    "deepseek_v4": "DeepseekV4HashRouter cannot be run on hidden states and a bias per expert alone",
    "gemma4_text": "Gemma4TextRouter has no top_k of its own",
    "inkling_text": "InklingTopkRouter cannot be run .* it returns 4 values",
    "jetmoe": "JetMoeForCausalLM has no mixture-of-experts layers that can be given a budget",
    "llama4_text": "Llama4TextExperts does not follow the experts interface",
    "longcat_flash": "LongcatFlashForCausalLM has no mixture-of-experts layers that can be given a budget",
    "phimoe": "PhimoeTopKRouter ignores top_k",
    "zaya": "ZayaRouter cannot be run .* it returns 4 values",
}
"""Families that cannot be given a budget, and why; all others run."""

EVERY = sorted(set(mixtures.families()) - mixtures.WRAPPERS)


def said(work: Callable[[], Any]) -> str:
    """The sentence that a piece of work is refused with; empty if it is not."""
    try:
        work()
    except UserError as refusal:
        return str(refusal)
    return ""


def write_base(family: str, folder: Path) -> None:
    torch.manual_seed(0)
    config = mixtures.tiny_config(family)
    load_tokenizer(parse_run({}).model).save_pretrained(folder)
    try:
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    except AttributeError:  # a family that this transformers cannot build itself, such as dbrx
        config.save_pretrained(folder)


def one_run(settings: RunSettings) -> None:
    federation = build_federation(settings)
    clients = LocalEngine(federation.trainer, federation.examples, federation.clients)
    dropped: list[dict[str, Any]] = []

    def log(event: str, _: int, **fields: Any) -> None:
        if event == "dropped":
            dropped.append(fields)

    state = one_round(federation, clients, start_state(federation), 1, log)
    assert not dropped
    scores = evaluate_tier(federation, state, federation.tiers[0])
    assert 0 < scores["macro"].loss < 100


FIRST = {
    "olmoe",
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "deepseek_v2",
    "deepseek_v3",
    "gpt_oss",
    "granitemoe",
    "jamba",
    "dbrx",
}


@pytest.mark.parametrize(
    "family", [name if name in FIRST else pytest.param(name, marks=pytest.mark.thorough) for name in EVERY]
)
def test_plan_costs_and_run_say_the_same(family: str, tmp_path: Path) -> None:
    write_base(family, tmp_path)
    table = {
        "model": {"base": str(tmp_path)}, "clients": {"count": 2}, "tiers": {"budgets": [0.5, 1.0]},
        "adapter": {"router": "trained"},
        "data": {"synthetic": {"train_examples": 8, "test_examples": 8, "entities": 8}}, "method": {"name": "ubsmoe"},
        "train": {"local_steps": 1, "batch_size": 2}, "evaluate": {"max_new_tokens": 2, "max_examples": 1},
    }  # fmt: skip
    settings, unknown = parse_run(table), list[str]()
    run, known = said(lambda: one_run(settings)), known_costs(settings, unknown.append)
    plan, costs = (
        said(lambda: forecast(settings, 8, 1e9)),
        said(lambda: _plan_of_base({"model.base": str(tmp_path)}, [])),
    )
    assert "\n" not in run + plan + costs
    if family in REFUSED:
        assert run == plan == costs
        assert re.search(REFUSED[family], run), run
    else:
        assert run == ""
        assert plan == costs == "".join(unknown)
        assert (known is not None) == (plan == "") == (family in FAMILIES), plan
        assert plan == "" or plan.startswith(f"cannot count the costs of {family.removesuffix('_text')}"), plan
