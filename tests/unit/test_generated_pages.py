"""The pages that documentation reads off the code: nothing is left out, and formulas keep their meaning."""

import importlib.util
import pkgutil
import re
from pathlib import Path
from types import ModuleType

import pytest

from documents import ROOT
from ubsmoe.config import RunSettings, TierSettings
from ubsmoe.methods import METHODS, build
from ubsmoe.methods.table import PARTS, describe, part_settings


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs/generate.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_run_file_page_has_every_key_with_its_default(generate: ModuleType) -> None:
    page = generate.run_file_page()
    assert '| `rescale` | `"none"`, `"mass"`, `"k_max"` | `"mass"` | ' in page
    assert "| `budgets` | list: number > 0 ≤ 1 | `[0.25, 0.5, 0.75, 1.0]` | " in page
    assert "| `k_max` | whole number > 0 | left out | " in page and "## [data.partition]" in page
    assert "| `noise_multiplier` | number > 0 | required | " in page
    for key in [*TierSettings.model_fields, *(name for name in RunSettings.model_fields)]:
        assert f"`{key}`" in page or f"## [{key}]" in page


def test_every_setting_has_a_description(generate: ModuleType) -> None:
    for prefix, section in [("", RunSettings), *generate._sections(RunSettings, "")]:
        for name, field in section.model_fields.items():
            known = field.description or generate.section_of(field) or (prefix, name) == ("method", "name")
            assert known, f"{prefix}.{name} has no description: Field(..., description=...) in config/settings.py"


@pytest.mark.parametrize("name", METHODS)
def test_a_methods_page_has_its_formula_source_settings_and_properties(generate: ModuleType, name: str) -> None:
    page, method = generate.method_page(name), build(name, generate.SMALLEST)
    assert page.startswith(f"# {name}\n") and '<pre class="formula">' in page and "\nSource: " in page
    assert all(f"| `{setting}` |" in page for setting in describe(name).settings)
    assert all(f"[`[method.{part}]`](../parts/{part}.md)" in page for part in describe(name).parts)
    assert all(f"`{one}`" in page for one in generate.PROPERTIES)
    assert all(f"Is exempt from `{one}`: {reason}." in page for one, reason in method.exempt.items())
    for section in ("robust", "privacy", "secure_aggregation"):
        assert (f"Refuses `[{section}]`: " in page) == (section in method.refuses)
    for part in PARTS:
        assert (f"Refuses `[method.{part}]`: " in page) == (part in method.refuses)


@pytest.mark.parametrize("part", PARTS)
def test_a_parts_page_has_its_source_settings_and_who_refuses_it(generate: ModuleType, part: str) -> None:
    page = generate.part_page(part)
    assert page.startswith(f"# method.{part}\n") and "\nSource: " in page
    assert part_settings(part) and all(f"| `{setting}` |" in page for setting in part_settings(part))
    for name in METHODS:
        assert (f"Refused by [{name}]" in page) == (part in build(name, generate.SMALLEST).refuses)
    assert ("Part of [ubsmoe]" in page) == (part in ("dmr", "pg"))
    assert f"(parts/{part}.md)" in generate.methods_page()
    assert ("self_ipw     ρ * missing<sub>i</sub>" in page) == (
        part == "pg"
    )  # the formulas are those of the settings' file


def test_every_function_and_test_that_the_equations_name_exists() -> None:
    rows = [line for line in (ROOT / "docs/equations.md").read_text().splitlines() if line.startswith("| ")]
    names = [name for row in rows for name in re.findall(r"`((?:maths|methods|client|costs|study)\.[\w.]+)`", row)]
    tests = [path for row in rows for path in re.findall(r"`(tests/[\w/.]+)`", row)]
    assert len(names) >= 20 and len(tests) >= 12
    assert [name for name in names if not pkgutil.resolve_name(f"ubsmoe.{name}")] == []
    assert [path for path in tests if not (ROOT / path).exists()] == []


@pytest.mark.parametrize(
    ("plain", "shown"),
    [
        ("    a_{c,i}^2 / n_c", "a<sub>c,i</sub><sup>2</sup> / n<sub>c</sub>"),
        ("    lambda sum_l x >= K_max", "λ ∑<sub>l</sub> x ≥ K<sub>max</sub>"),
        ("    maths/pseudo_gradient.py", "maths/pseudo_gradient.py"),
        ("    a < b\n      c & d", "a &lt; b\n  c &amp; d"),
    ],
)
def test_a_formula_in_plain_text_gets_letters_and_indices(generate: ModuleType, plain: str, shown: str) -> None:
    assert generate.formula(plain) == f'<pre class="formula">{shown}</pre>'


def test_the_command_line_page_has_every_verb_and_the_exit_codes(generate: ModuleType) -> None:
    page = generate.command_line_page()
    assert "| 2 | invalid input or environment" in page and "| `RUN_FILE` | run file (TOML)" in page
    assert all(f"\n## ubsmoe {verb}\n" in page for verb in ("run", "eval", "data commonsense", "study bias-floor"))


def test_pages_of_methods_that_are_gone_are_removed(generate: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "methods").mkdir()
    (tmp_path / "methods" / "gone.md").write_text("old")
    generate.write_pages(tmp_path, {})
    assert {path.stem for path in (tmp_path / "methods").iterdir()} == set(METHODS)
    assert {path.stem for path in (tmp_path / "parts").iterdir()} == set(PARTS)
