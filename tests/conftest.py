"""Fixtures for the whole suite: a random base small enough to train in a test, and run files that use it."""

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import jaxtyping
import pytest
import torch

from acting import ACTING

torch.set_num_threads(1)
# a runner's nohup or & has its children ignore these, and what the tests start would inherit that
DEFAULTS = {signal.SIGHUP: signal.SIG_DFL, signal.SIGQUIT: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
for number, handler in DEFAULTS.items():
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)
# a busy machine is no failure of a property
hypothesis.settings.register_profile("ours", deadline=None, max_examples=40)
hypothesis.settings.load_profile("ours")


SHAPES_CHECKED = {"methods", "properties", "maths", "model", "client", "src"}
"""Folders whose tests meet each tensor directly; whole runs take nearly twice as long with every shape checked."""


@pytest.fixture(autouse=True)
def check_shapes(request: pytest.FixtureRequest) -> None:
    """Check the shapes in annotations, where that shows more than the same lines have shown elsewhere."""
    wanted = not SHAPES_CHECKED.isdisjoint(request.path.relative_to(request.config.rootpath).parts)
    jaxtyping.config.update("jaxtyping_disable", not wanted)


@pytest.fixture(scope="session")
def random_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random OLMoE of 2 layers, 6 experts, K_max 4, hidden 24, expert width 20, with the shipped tokenizer."""
    from transformers import AutoTokenizer, OlmoeConfig, OlmoeForCausalLM

    from ubsmoe.model.load import shipped_path

    folder = tmp_path_factory.mktemp("random-base")
    tokenizer = AutoTokenizer.from_pretrained(shipped_path("ubsmoe-tiny"))
    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=24,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_experts=6,
        num_experts_per_tok=4,
        max_position_embeddings=512,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
    )
    OlmoeForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["blocks", "grouped"])
def each_kernel(request: pytest.FixtureRequest) -> Iterator[None]:
    """The expert kernel of a CPU, then that of an accelerator, run here."""
    from ubsmoe.model import kernel_choice

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel_choice, "GROUPED_ON", {"cpu"} if request.param == "grouped" else set())
        yield


@pytest.fixture
def tiny_run(random_base: Path) -> dict[str, Any]:
    """Settings of a run that takes about two seconds: 4 clients in 4 tiers, 2 rounds of 2 steps."""
    return {
        "seed": 3,
        "model": {"base": str(random_base)},
        "adapter": {"rank": 3, "alpha": 6.0},
        "tiers": {"ranks": [1, 2, 3, 4]},
        "clients": {"count": 4},
        "data": {"synthetic": {"train_examples": 40, "test_examples": 3, "entities": 8}},
        "train": {"rounds": 2, "local_steps": 2, "batch_size": 4},
        "evaluate": {"max_new_tokens": 4},
    }


@pytest.fixture
def acting_run(tiny_run: dict[str, Any]) -> dict[str, Any]:
    """`tiny_run` with all of ACTING, on one thread."""
    return {"threads": 1, **tiny_run} | {name: {**tiny_run.get(name, {}), **part} for name, part in ACTING.items()}


@pytest.fixture
def write_toml(tmp_path: Path) -> Callable[[dict[str, Any]], Path]:
    """Write a nested dict as a run file; gives its path."""

    def write(table: dict[str, Any], name: str = "run.toml") -> Path:
        path = tmp_path / name
        path.write_text("\n".join(_lines(table, "")), encoding="utf-8")
        return path

    return write


def _lines(table: dict[str, Any], prefix: str) -> list[str]:
    lines = [f"{key} = {_literal(value)}" for key, value in table.items() if not isinstance(value, dict)]
    for key, value in table.items():
        if isinstance(value, dict):
            lines += [f"[{prefix}{key}]", *_lines(value, f"{prefix}{key}.")]
    return lines


def _literal(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else str(value)
