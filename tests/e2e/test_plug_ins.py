"""docs/plug-ins.md: its files, run as they stand on a smaller base; and what a plug-in may not do."""

import hashlib
import json
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from documents import ROOT, blocks
from e2e.test_cli import ubsmoe as command
from ubsmoe import Federation
from ubsmoe.client.node_config import on_this_machine
from ubsmoe.config import load_run, parse_run
from ubsmoe.config import plug_ins as registry
from ubsmoe.config.plug_ins import identities, load, plug_ins
from ubsmoe.errors import UserError

PAGE = ROOT / "docs/plug-ins.md"
SMALL = {
    "threads": 1,
    "adapter": {"rank": 3},
    "tiers": {"budgets": [0.25, 1.0], "ranks": [2, 3]},
    "train": {"rounds": 2, "local_steps": 1, "batch_size": 2},
    "evaluate": {"before": False, "max_examples": 3, "max_new_tokens": 2},
}


@pytest.fixture
def page(tmp_path: Path) -> Path:
    """The page's files, in a folder of their own."""
    folder = tmp_path / "own"
    folder.mkdir()
    for block in blocks(PAGE):
        if block.title:
            with open(folder / block.title, "a") as file:
                file.write(block.text + "\n\n")
    return folder


def test_every_plug_in_of_the_page_acts_in_one_run_which_is_reported_without_them(
    page: Path, random_base: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path
) -> None:
    fed = Federation(page / "own.toml", model=str(random_base), out=tmp_path / "run", **SMALL)
    named = plug_ins(fed.settings.model_dump())
    assert {key.removesuffix(".0") for key in named} == {*registry.KEYS, *registry.LISTS} - {"data.test"}
    summary = fed.train()
    clients = [event["client"] for event in fed.record.clients]
    assert clients == ["client-0", "client-1", "client-2", "client-3"]  # two at a time, in turn
    report = fed.record.named("partition")[0]["report"]
    assert report and len(report["clients"]) == 4
    assert summary["method"] == "small" and summary["after"]
    macro = summary["after"][0]["macro"]
    assert set(macro["metrics"]) == {"overlap", "exact"} and 0 <= macro["metrics"]["overlap"] <= 1
    sha256 = hashlib.sha256((page / "mine.py").read_bytes()).hexdigest()
    assert {value for key, value in fed.record.versions.items() if key.startswith("plug-in")} == {sha256}

    (page / "mine.py").rename(page / "gone.py")  # a report needs no plug-in
    monkeypatch.chdir(tmp_path)
    assert command(monkeypatch, "report", "run", "--watch") == 0
    from ubsmoe.report.series import read_series

    assert read_series([tmp_path / "run"])[0].label.startswith("small(penalty=0.02")


def test_the_functions_of_the_page_by_hand(page: Path) -> None:
    split, falling = (load(f"{page / 'mine.py'}:{name}", "x") for name in ("by_parity", "falling"))
    examples = [SimpleNamespace(fields={"parity": str(i % 2)}) for i in range(8)]
    assert split(examples, 4, 0) == [[0, 2, 4, 6], [], [], [1, 3, 5, 7]]
    assert [falling(t) for t in (0.0, 1.0)] == [1.0, 0.1]


BAD = {
    "mine:nothing": r"mine\.py has no function 'nothing'",
    "absent:f": r"absent:f names no module that is there; put absent\.py beside the run file",
    "broken:f": r"broken\.py:f cannot be imported: ZeroDivisionError: division by zero",
}


@pytest.mark.parametrize("name", BAD)
def test_a_plug_in_that_is_not_there_is_a_sentence(name: str, page: Path, tmp_path: Path) -> None:
    (page / "broken.py").write_text("1 / 0\n")
    settings = load_run(page / "own.toml", {"data.template": name})
    with pytest.raises(UserError, match=rf"data\.template: .*{BAD[name]}"):
        load(settings.data.template, "data.template")


@pytest.mark.parametrize(
    ("key", "code", "sentence"),
    [
        (
            "data.partition.kind",
            "def f(examples, num_clients, seed): return [[0]] * num_clients",
            "each of the positions 0",
        ),
        ("data.train", "def f(): return 3", "gave int; expected records, one dict after another"),
        ("data.train", "def f(): return [{'prompt': 'a'}]", r"record 1: missing field 'completion'"),
    ],
)
def test_what_a_plug_in_gives_is_checked(key: str, code: str, sentence: str, page: Path, random_base: Path) -> None:
    (page / "bad.py").write_text(code)
    fed = Federation(page / "own.toml", model=str(random_base), **SMALL, **{key: "bad:f"})
    with pytest.raises(UserError, match=sentence):
        fed.round()


def test_a_node_runs_only_what_its_own_configuration_names_and_imports_nothing_else(
    page: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = parse_run({"method": {"name": "mine:small"}, "data": {"train": "mine:sums"}})
    place = {"partition-id": 0, "num-partitions": 1}
    monkeypatch.setattr(registry, "_module", None)  # whoever imports one fails
    with pytest.raises(
        UserError, match=r"names the plug-in 'mine:small' \(method\.name\), which is code; .*plug-ins=\"mine:small\""
    ):
        on_this_machine(settings, place)
    with pytest.raises(UserError, match="mine:sums"):
        on_this_machine(settings, {**place, "plug-ins": "mine:small"})
    own = f"mine:sums, {page / 'mine.py'}:small"
    here, identity = on_this_machine(settings, {**place, "plug-ins": own})
    assert here.method.name == f"{page / 'mine.py'}:small" and here.data.train == "mine:sums" and identity == place
    elsewhere = parse_run({"method": {"name": "/server/mine.py:small"}})
    assert on_this_machine(elsewhere, {**place, "plug-ins": own})[0].method.name == here.method.name
    servers = {"method": {"name": "fedavg", "server": {"rule": "mine:r"}}, "evaluate": {"metrics": ["mine:m"]}}
    assert on_this_machine(parse_run(servers), place)[1] == place  # what only the server runs


def test_an_entry_point_is_a_plug_in_and_never_hides_what_is_ours(
    page: Path, monkeypatch: pytest.MonkeyPatch, random_base: Path
) -> None:
    found = {"parity": f"{page / 'mine.py'}:by_parity", "iid": f"{page / 'mine.py'}:by_parity"}
    monkeypatch.setattr(registry, "_entry_points", lambda: found)
    settings = parse_run({"data": {"partition": {"kind": "parity"}}})
    assert settings.data.partition.kind == "parity" and json.loads(settings.model_dump_json())
    assert identities(plug_ins(settings.model_dump())).keys() == {"plug-in mine.py:by_parity"}
    with pytest.raises(UserError, match=r"data\.partition\.kind: Input should be 'iid', 'natural'"):
        parse_run({"data": {"partition": {"kind": "parityy"}}})
    with pytest.raises(UserError, match="epsilon"):
        parse_run(
            {
                "clients": {"sampling": "mine:in_turn", "per_round": 2},
                "privacy": {"noise_multiplier": 1, "clip_norm": 1},
            }
        )


def test_an_entry_point_that_is_no_function_of_a_module_is_no_plug_in(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"good": "theirs.inner:f", "odd": "theirs.inner:Class.method"}
    named = [SimpleNamespace(name=name, value=value) for name, value in found.items()]
    monkeypatch.setattr(registry, "entry_points", lambda group: named)
    assert registry._entry_points.__wrapped__() == {"good": "theirs.inner:f"}


def test_the_page_names_every_place_that_takes_a_plug_in() -> None:
    (run_file,) = (tomllib.loads(block.text) for block in blocks(PAGE) if block.title == "own.toml")
    named = {key.removesuffix(".0") for key in plug_ins(run_file)}
    assert named == {*registry.KEYS, *registry.LISTS} - {"data.test"}


def test_a_run_folder_names_no_code_that_its_reader_does_not_name(
    page: Path, random_base: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path
) -> None:
    run, mark = tmp_path / "theirs", tmp_path / "mark"
    quick = SMALL | {"train": {"rounds": 1, "local_steps": 1, "batch_size": 2}, "method": "fedavg"}
    Federation(model=str(random_base), data="synthetic", out=run, **quick).train()
    (run / "evil.py").write_text(f"open({str(mark)!r}, 'w').close()\n\n\ndef f(*given):\n    return 1.0\n")
    config = json.loads((run / "config.json").read_text())
    config["evaluate"]["metrics"] = [f"{run}/evil.py:f"]
    (run / "config.json").write_text(json.dumps(config))
    sentence = "evil.py:f' (evaluate.metrics.0), which is code"
    for verb in (["eval", run], ["run", run, "--more-rounds", "1"], ["generate", run, "Who?"]):
        assert command(monkeypatch, *verb) == 2
        assert sentence in capsys.readouterr().err
    with pytest.raises(UserError, match=r"evil\.py:f' \(evaluate\.metrics\.0\), which is code"):
        Federation.resume(run)
    # nor to look at one that did not note what it costs, as runs of a Flower app do not
    config["method"]["name"] = f"{run}/evil.py:f"
    (run / "config.json").write_text(json.dumps(config))
    (run / "costs.json").rename(tmp_path / "costs.json")
    for verb in (["report", run, "--out", tmp_path / "report.html"], ["flower", "status", run]):
        assert command(monkeypatch, *verb) == 0
    assert not mark.exists()
    config["method"]["name"] = "fedavg"
    (run / "config.json").write_text(json.dumps(config))
    monkeypatch.setenv("UBSMOE_PLUG_INS", f"mine:f, {run}/evil.py:f")
    assert command(monkeypatch, "eval", run, "--tier", "1") == 0
    assert mark.exists()


def test_all_plug_ins_that_a_reader_has_to_name_are_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UBSMOE_PLUG_INS", "mine:a")
    table = {"method": {"name": "mine:a"}, "data": {"train": "mine:b"}, "evaluate": {"metrics": ["mine:c", "mine:b"]}}
    names = r"'mine:b' \(data.train\), 'mine:c' \(evaluate.metrics.0\), 'mine:b' \(evaluate.metrics.1\), which"
    with pytest.raises(UserError, match=rf"run names the plug-ins {names}.* UBSMOE_PLUG_INS=mine:a,mine:b,mine:c$"):
        registry.require_trusted(table, "run")


def test_a_dotted_plug_in_is_found_without_importing_its_package(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "__init__.py").write_text("raise RuntimeError\n")
    (tmp_path / "theirs" / "inner.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    assert registry.source_of("theirs.inner:f", "x") == tmp_path / "theirs" / "inner.py"
