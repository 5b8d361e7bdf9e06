"""The command line as a user meets it: results, refusals, exit codes."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ubsmoe import cli
from ubsmoe.config import with_overrides

WriteToml = Callable[..., Path]


def ubsmoe(monkeypatch: pytest.MonkeyPatch, *args: str | Path) -> int:
    """Run a command in this process; gives its exit code."""
    monkeypatch.setattr(sys, "argv", ["ubsmoe", *map(str, args)])
    try:
        cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_help_does_not_import_torch() -> None:
    code = "import sys; from ubsmoe import cli; sys.argv = ['ubsmoe', '--help']\ntry: cli.main()\nexcept SystemExit: pass\n"
    code += "assert not {'torch', 'transformers', 'pydantic', 'rich'} & set(sys.modules), sorted(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_help_says_what_an_argument_is(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    assert ubsmoe(monkeypatch, "run", "--help") == 0
    assert re.search(r"RUN_FILE +run file \(TOML\)", capsys.readouterr().out)


def test_a_run_ends_with_a_table_and_an_adapter(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, tiny_run: dict, write_toml: WriteToml, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    assert ubsmoe(monkeypatch, "run", write_toml(tiny_run), "--out", out) == 0
    printed = capsys.readouterr().out
    assert re.search(r"tier +β +K +rank +MFLOPs", printed)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["adapter_sha256"] in printed
    assert sum(json.loads((out / "data.json").read_text())["train"]["tasks"].values()) == 40
    assert [tier["top_k"] for tier in summary["tiers"]] == [1, 2, 3, 4]
    events = [json.loads(line)["event"] for line in (out / "events.jsonl").read_text().splitlines()]
    assert events.count("client") == 8 and events.count("round") == 2 and events.count("evaluated") == 8


def test_a_private_run_tells_no_loss_and_every_reader_of_its_events_shows_it(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, tiny_run: dict, write_toml: WriteToml, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    private = {"noise_multiplier": 0.5, "clip_norm": 1.0, "seed": 5}
    given = [part for name, value in private.items() for part in ("--set", f"privacy.{name}={value}")]
    assert ubsmoe(monkeypatch, "run", write_toml(tiny_run), "--out", out, "--track", "tensorboard", *given) == 0
    assert "round 2/2  loss –" in capsys.readouterr().out
    assert ubsmoe(monkeypatch, "report", out, "--watch") == 0
    assert "round 2/2  loss –" in capsys.readouterr().out
    assert ubsmoe(monkeypatch, "report", out, "--out", tmp_path / "report.html") == 0


def test_a_finished_run_can_be_scored_again(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, tiny_run: dict, write_toml: WriteToml, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    ubsmoe(monkeypatch, "run", write_toml(tiny_run), "--out", out)
    capsys.readouterr()
    assert ubsmoe(monkeypatch, "eval", out, "--json", "--tier", "2") == 0
    (tier,) = json.loads(capsys.readouterr().out)["tiers"]
    assert tier["scores"] == json.loads((out / "summary.json").read_text())["after"][1]


def test_a_run_is_scored_with_its_own_number_of_threads(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, tiny_run: dict, write_toml: WriteToml, tmp_path: Path
) -> None:
    asked: list[int] = []
    monkeypatch.setattr("torch.set_num_threads", asked.append)
    file = write_toml(with_overrides(tiny_run, {"threads": 3, "train.rounds": 1, "train.local_steps": 1}))
    ubsmoe(monkeypatch, "run", file, "--out", tmp_path / "run")
    assert asked == [3]
    assert ubsmoe(monkeypatch, "eval", tmp_path / "run", "--tier", "1") == 0
    assert asked == [3, 3]


def test_ctrl_c_says_what_is_saved_and_the_same_command_goes_on(
    tiny_run: dict, write_toml: WriteToml, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    changes = {"threads": 1, "train.rounds": 500, "train.local_steps": 1, "keep_checkpoints": 1}
    file = write_toml(with_overrides(tiny_run, changes))
    command = [sys.executable, "-m", "ubsmoe", "run", str(file), "--out", str(out)]
    with subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
    ) as running:
        while not list(out.glob("checkpoints/round-0000[2-9]")):
            assert running.poll() is None, running.communicate()[1]
            time.sleep(0.05)
        running.send_signal(signal.SIGINT)
        said = running.communicate(timeout=60)[1]
    assert running.returncode == 130, said
    stopped = re.fullmatch(
        rf"ubsmoe: stopped after round (\d+) of 500, saved in {re.escape(str(out))}; .* goes on .*\n", said
    )
    assert stopped and (out / "checkpoints" / f"round-{int(stopped[1]):05}").is_dir()


def test_methods_lists_every_method_with_its_settings(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    assert ubsmoe(monkeypatch, "methods", "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    rows = {row["name"]: row for row in printed["methods"]}
    assert rows["ubsmoe"]["parts"] == ["dmr", "pg"] and rows["hetlora"]["settings"]["decay"] == 0.99
    assert rows["fedavg"]["settings"] == {} and printed["parts"]["dmr"]["momentum"] == 0.9
    assert rows["fedavg"]["exempt"] == {} and set(rows["hfedmoe"]["exempt"]) == {
        "lone_client",
        "identical_clients",
    }


def test_the_plan_of_a_preset_is_that_of_plain_averaging_unless_a_method_is_set(
    monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def planned(*arguments: str) -> dict[str, Any]:
        assert ubsmoe(monkeypatch, "plan", "--model", "olmoe-1b-7b", *arguments, "--json") == 0
        return json.loads(capsys.readouterr().out)

    plain = planned("--memory", "21GB")
    tiers = plain["tiers"]
    assert [tier["top_k"] for tier in tiers] == [2, 4, 6, 8]
    assert tiers[0]["forward_flops_per_token"] < 0.6 * tiers[3]["forward_flops_per_token"]
    assert plain["fits"]["tiers"] == [] and plain["fits"]["mapped_tiers"] == [0, 1, 2, 3]  # 13.8 GB of weights
    assert plain["method"] == "fedavg" and planned("--set", "method.name=fedavg")["tiers"] == tiers
    ranked = planned("--set", "method.name=hetlora")
    assert ranked["method"] == "hetlora" and [tier["rank"] for tier in ranked["tiers"]] == [4, 8, 16, 32]
    longer = planned("--sequence-length", "1024")
    assert longer == planned("--set", "data.max_length=1024") and longer["tiers"] != tiers
    assert (
        ubsmoe(monkeypatch, "plan", "--model", "olmoe-1b-7b", "--set", "model.dtype=bfloat16", "--memory", "40GiB") == 0
    )
    assert "a device of 40 GiB holds tiers: 1, 2, 3, 4" in capsys.readouterr().out


def test_the_plan_of_a_preset_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from ubsmoe.cli import app\n"
        "app(['plan', '--model', 'olmoe-1b-7b', '--json'], standalone_mode=False)\n"
        "assert not {'torch', 'transformers', 'numpy'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"train.rond": 3}, "unknown setting 'train.rond'; did you mean 'rounds'?"),
        ({"tiers.budgets": [0.5, 1.2]}, r"tiers.budgets.1: .*less than or equal to 1 \(got 1.2\)"),
        ({"tiers.k_max": 9}, r"tiers.k_max is 9, but .* was trained with 4 experts per token; expected 1..4"),
        ({"data.train": "nowhere.jsonl"}, "data.train: .*nowhere.jsonl"),
        ({"data.test": "nowhere.jsonl"}, "data.test: .*nowhere.jsonl"),
        ({"model.base": "no-such-folder"}, "model.base: cannot load 'no-such-folder'"),
        ({"method.name": "ubsmoo"}, "method.name: no method 'ubsmoo'; did you mean 'ubsmoe'?"),
        ({"method.pg_mode": "off"}, "unknown setting 'method.pg_mode' for ubsmoe; it is now called 'method.pg.mode'"),
        ({"method.pg.mod": "off"}, "unknown setting 'method.pg.mod'; did you mean 'mode'?"),
        ({"method.pg.mode": "on"}, "method.pg.mode: .*got 'on'"),
        ({"method.dmr.momentum": 1.5}, r"method.dmr.momentum: .*less than 1 \(got 1.5\)"),
        ({"clients.count": 60}, "client"),
        ({"data.partition.kind": "natural", "data.partition.field": "colour"}, "data.partition.field"),
        ({"model.device": "cuda:7"}, "model.device: 'cuda:7' cannot be used here"),
    ],
)
def test_bad_settings_get_a_sentence_and_write_nothing(
    change: dict,
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
    tiny_run: dict,
    write_toml: WriteToml,
    tmp_path: Path,
) -> None:
    out = tmp_path / "run"
    assert ubsmoe(monkeypatch, "run", write_toml(with_overrides(tiny_run, change)), "--out", out) == 2
    assert re.search(sentence, capsys.readouterr().err)
    assert not out.exists()


def test_a_record_without_its_fields_is_named_by_file_and_line(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, tiny_run: dict, write_toml: WriteToml, tmp_path: Path
) -> None:
    (tmp_path / "mine.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "c"}\n')
    assert ubsmoe(monkeypatch, "run", write_toml(with_overrides(tiny_run, {"data.train": "mine.jsonl"}))) == 2
    message = capsys.readouterr().err
    assert "mine.jsonl" in message and "2" in message and "completion" in message


def test_a_refusal_shows_what_a_file_says_and_no_terminal_obeys_it(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, tiny_run: dict, write_toml: WriteToml, tmp_path: Path
) -> None:
    (tmp_path / "mine.jsonl").write_text(json.dumps({"\x1b[2J\x07": 1, **dict.fromkeys(map(str, range(9000)), 1)}))
    assert ubsmoe(monkeypatch, "run", write_toml(with_overrides(tiny_run, {"data.train": "mine.jsonl"}))) == 2
    said = capsys.readouterr().err
    assert r"it has \x1b[2J\x07, 0, 1," in said and "\x1b" not in said and len(said) < 5000


def test_a_dense_model_is_refused(
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
    tiny_run: dict,
    write_toml: WriteToml,
    tmp_path: Path,
    random_base: Path,
) -> None:
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(random_base)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    assert ubsmoe(monkeypatch, "run", write_toml(with_overrides(tiny_run, {"model.base": "dense"}))) == 2
    assert "is a dense model (llama): it has no experts to choose from" in capsys.readouterr().err


def test_a_tokenizer_that_does_not_fit_is_refused(
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
    tiny_run: dict,
    write_toml: WriteToml,
    tmp_path: Path,
    random_base: Path,
) -> None:
    from transformers import AutoTokenizer, OlmoeConfig, OlmoeForCausalLM

    config = OlmoeConfig(
        vocab_size=100,
        hidden_size=16,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
        eos_token_id=0,
        pad_token_id=0,
    )
    OlmoeForCausalLM(config).save_pretrained(tmp_path / "small")
    AutoTokenizer.from_pretrained(random_base).save_pretrained(tmp_path / "small")
    assert ubsmoe(monkeypatch, "run", write_toml(with_overrides(tiny_run, {"model.base": "small"}))) == 2
    assert "vocabulary of 100" in capsys.readouterr().err


def test_a_run_folder_of_other_settings_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, tiny_run: dict, write_toml: WriteToml, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    assert ubsmoe(monkeypatch, "run", write_toml(tiny_run), "--out", out, "--set", "train.rounds=1") == 0
    before = (out / "adapter.safetensors").read_bytes()
    capsys.readouterr()
    assert ubsmoe(monkeypatch, "run", write_toml(tiny_run), "--out", out, "--set", "train.local_steps=9") == 2
    assert "train.local_steps (there " in capsys.readouterr().err
    assert (out / "adapter.safetensors").read_bytes() == before


def test_a_disk_that_refuses_an_event_ends_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, tiny_run: dict, write_toml: WriteToml, tmp_path: Path
) -> None:
    def full(*args: Any, **fields: Any) -> None:
        raise OSError(28, "No space left on device", "events.jsonl")

    monkeypatch.setattr("ubsmoe.storage.events.EventLog.append", full)
    assert ubsmoe(monkeypatch, "run", write_toml(tiny_run), "--out", tmp_path / "run") == 2
    assert capsys.readouterr().err == "ubsmoe: [Errno 28] No space left on device: 'events.jsonl'\n"


@pytest.mark.parametrize("change", ["method.name=ubsmoo", "tiers.k_max=9", "method.pg.strength=nan"])
def test_a_plan_refuses_what_a_run_refuses(
    change: str, monkeypatch: pytest.MonkeyPatch, capsys: Any, tiny_run: dict, write_toml: WriteToml
) -> None:
    assert ubsmoe(monkeypatch, "plan", write_toml(tiny_run), "--set", change) == 2
    assert capsys.readouterr().err.startswith(f"ubsmoe: {change.partition('=')[0]}")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["costs", "--model", "olmoe-1b-7b"], "ubsmoe costs is now ubsmoe plan"),
        (["plan"], "expected either a run file or --model NAME"),
        (["plan", "RUN.toml", "--model", "olmoe-1b-7b"], "expected either a run file or --model NAME"),
        (["plan", "RUN.toml", "--sequence-length", "9"], "--sequence-length needs --examples or --model"),
        (["plan", "--model", "olmoe-1b-7b", "--examples", "9"], "--examples and --flops-per-second need a run file"),
        (["plan", "--model", "olmoe-1b-7b", "--set", "tiers.k_max=9"], "tiers.k_max is 9, but olmoe-1b-7b"),
        (["plan", "--model", "no-such-base"], "model.base: cannot load 'no-such-base' (no such folder"),
    ],
    ids=str,
)
def test_what_cannot_be_planned_is_refused_in_a_sentence(
    arguments: list[str], sentence: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    assert ubsmoe(monkeypatch, *arguments) == 2
    assert capsys.readouterr().err.startswith(f"ubsmoe: {sentence}")


def test_a_plan_needs_no_weights_and_says_what_a_device_holds(
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
    tiny_run: dict,
    write_toml: WriteToml,
    random_base: Path,
    tmp_path: Path,
) -> None:
    base = tmp_path / "no-weights"
    shutil.copytree(random_base, base, ignore=shutil.ignore_patterns("*.safetensors"))
    file = write_toml(with_overrides(tiny_run, {"model.base": str(base)}))
    assert ubsmoe(monkeypatch, "plan", file, "--json", "--memory", "4GiB") == 0
    plan = json.loads(capsys.readouterr().out)
    assert [tier["top_k"] for tier in plan["tiers"]] == [1, 2, 3, 4] and plan["fits"]["tiers"] == [0, 1, 2, 3]
    assert plan["speed"] == "measured on this machine" and plan["run"]["rounds"] == 2
    assert ubsmoe(monkeypatch, "plan", file, "--examples", "40", "--flops-per-second", "1e9") == 0
    printed = capsys.readouterr().out
    assert "an upper bound" in printed and "2 rounds of 4 clients" in printed
    longer = ["plan", file, "--examples", "40", "--flops-per-second", "1e9", "--json", "--sequence-length"]
    tokens = []
    for length in ("32", "64"):
        assert ubsmoe(monkeypatch, *longer, length) == 0
        tokens.append(json.loads(capsys.readouterr().out)["tiers"][0]["tokens"])
    assert tokens[1] == 2 * tokens[0]
    assert ubsmoe(monkeypatch, "plan", file, "--memory", "big") == 2
    assert "--memory 'big'" in capsys.readouterr().err


def test_a_comparison_is_estimated_from_a_file_of_variants(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, tiny_run: dict, write_toml: WriteToml, tmp_path: Path
) -> None:
    variants, out = tmp_path / "variants.toml", tmp_path / "never"
    plain = '[[variants]]\nmethod = {name = "fedavg"}\n'
    named = "".join(
        f'[[variants]]\nlabel = "{label}"\nmethod = {{name = "fedavg"}}\n' for label in ("fedavg, slower", "b")
    )
    variants.write_text(f"{plain}{plain}tiers.elastic_share = 1.0  # every step at K = 1\n")
    assert ubsmoe(monkeypatch, "compare", write_toml(tiny_run), "--variants", variants, "--plan", "--out", out) == 0
    plain, elastic, whole = capsys.readouterr().out.splitlines()
    flops = [float(re.search(r"([\d.e+-]+) TFLOP", line)[1]) for line in (plain, elastic, whole)]
    assert plain.startswith("fedavg: 3 x ") and flops[1] < flops[0]
    assert whole.startswith("in all 6 runs") and flops[2] == pytest.approx(3 * (flops[0] + flops[1]), rel=0.02)
    assert not out.exists()
    variants.write_text(named)  # the first is the reference, spaces and all
    assert ubsmoe(monkeypatch, "compare", write_toml(tiny_run), "--variants", variants, "--plan", "--out", out) == 0
    capsys.readouterr()
    grid = ("compare", write_toml(tiny_run), "--methods", "fedavg", "--plan", "--out", out, "--grid")
    assert ubsmoe(monkeypatch, *grid, "train.rounds=1,3", "--grid", "data.seed=5") == 0
    short, long, _ = capsys.readouterr().out.splitlines()
    assert short.startswith("train.rounds=1;data.seed=5  fedavg: 3 x ") and long.startswith("train.rounds=3;")
    assert ubsmoe(monkeypatch, *grid, "model.base=tinny,tiny") == 2
    assert "model.base" in capsys.readouterr().err and not out.exists()
    both = (
        "compare",
        write_toml(tiny_run),
        "--variants",
        tmp_path / "both.toml",
        "--grid",
        "train.optimizer=sgd,adamw",
    )
    (tmp_path / "both.toml").write_text('[[variants]]\nmethod = "fedavg"\ntrain.optimizer = "sgd"\n')
    assert ubsmoe(monkeypatch, *both) == 2
    assert "--grid and a variant both change train.optimizer" in capsys.readouterr().err
    assert ubsmoe(monkeypatch, "compare", write_toml(tiny_run), "--variants", tmp_path / "none.toml") == 2
    assert "no such file" in capsys.readouterr().err
