"""The report in a real browser. Needs selenium (`pip install 'ubsmoe[browser]'`), Chromium and its driver; skipped without them."""

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from drawn_runs import ROUNDS, write_run
from ubsmoe.config import parse_run
from ubsmoe.plan.tiers import run_costs
from ubsmoe.report.page import write_report
from ubsmoe.report.series import read_series

selenium = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (BROWSER and DRIVER), reason="Chromium and its driver are not installed")

OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--window-size=1280,900",
)  # fmt: skip

# WCAG's contrast of every element that holds text itself, against the nearest ground that is not transparent
LOW_CONTRAST = """
const numbers = text => text.match(/[\\d.]+/g).map(Number);
const light = ([r, g, b]) => [r, g, b].map(v => v / 255).map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
  .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
const ground = node => { for (; node; node = node.parentElement) {
  const colour = numbers(getComputedStyle(node).backgroundColor); if (colour.length < 4 || colour[3] > 0) return colour; }
  return [255, 255, 255]; };
return [...document.body.querySelectorAll("*")]
  .filter(node => !node.closest("svg, script, noscript") && [...node.childNodes].some(n => n.nodeType === 3 && n.data.trim()))
  .filter(node => { const [a, b] = [light(numbers(getComputedStyle(node).color)), light(ground(node))].sort((x, y) => y - x);
    return (a + .05) / (b + .05) < 4.5; }).map(node => node.outerHTML.slice(0, 99));
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    options = selenium.ChromeOptions()
    options.binary_location = BROWSER
    for option in (*OPTIONS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = selenium.Chrome(options, selenium.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Reports of two runs that have nothing in common, of one run, and of three methods on three seeds."""
    folder = tmp_path_factory.mktemp("runs")
    write_run(folder / "two" / "runs" / "fedavg-seed0", "fedavg", phi=False)
    write_run(folder / "two" / "runs" / "ubsmoe-seed1", "ubsmoe", seed=1)
    write_run(folder / "one")
    for method, after in (("fedavg", 0.6), ("flora", 0.7), ("ubsmoe", 0.75)):
        for seed in range(3):
            write_run(folder / "compared" / "runs" / f"{method}-seed{seed}", method, seed, after=after)
    for kind in ("two", "one", "compared"):
        runs = read_series([folder / kind])
        costs = [[cost.as_dict() for cost in run_costs(parse_run(run.record.config))] for run in runs]
        write_report(runs, costs, folder / f"{kind}.html")
    return {kind: folder / f"{kind}.html" for kind in ("two", "one", "compared")}


@pytest.fixture(scope="module")
def page(pages: dict[str, Path]) -> Path:
    return pages["two"]


@pytest.fixture
def opened(browser: Any, page: Path) -> Any:
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser.get(page.as_uri())
    return browser


def test_no_id_is_given_twice(opened: Any) -> None:
    twice = "return [...document.querySelectorAll('[id]')].map(e => e.id).filter((id, i, all) => all.indexOf(id) !== i)"
    assert [name for name in opened.execute_script(twice) if not name.startswith("clip")] == []


IN_VIEW = """
return [...document.querySelectorAll(arguments[0])].map(node => node.getBoundingClientRect()).every(
  box => box.width > 0 && box.left >= 0 && box.right <= innerWidth && box.top >= 0 && box.bottom <= innerHeight);
"""


SCREENS = [(width, height, scheme) for width, height in ((1280, 900), (390, 844)) for scheme in ("light", "dark")]


@pytest.mark.parametrize(("width", "height", "scheme"), SCREENS)
@pytest.mark.parametrize("kind", ["one", "compared"])
def test_the_first_screen_holds_the_headline_and_every_tiers_accuracy(
    browser: Any, pages: dict[str, Path], kind: str, width: int, height: int, scheme: str
) -> None:
    """One run of which updates were dropped, and three methods with three seeds each."""
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    browser.get(pages[kind].as_uri())
    said = browser.find_element("css selector", "header").text
    assert {"one": "accuracy 27.5 → 77.5 %", "compared": "95 % over 3 seeds"}[kind] in said
    assert "ubsmoe-tiny on synthetic data: 4 clients in 4 tiers, 3 rounds." in said and "late or away" in said
    for what in ("h1", "header p", ".lead .accuracy", ".lead thead"):
        assert browser.execute_script(IN_VIEW, what), what
    shown = [one.text for one in browser.find_elements("css selector", ".lead .accuracy")]
    assert shown[-4:] == {"one": ["70.0", "75.0", "80.0", "85.0"], "compared": ["75.0", "80.0", "85.0", "90.0"]}[kind]
    assert len(shown) == {"one": 4, "compared": 12}[kind]
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    assert browser.execute_script(LOW_CONTRAST) == []


@pytest.mark.parametrize("width", [1280, 390])
def test_a_run_shows_loss_and_gradient_norm_of_each_tier_on_axes_of_their_own(
    browser: Any, pages: dict[str, Path], width: int
) -> None:
    size = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get(pages["one"].as_uri())
    for tier in (1, 2, 3, 4):
        chart = f"document.querySelector('#steps-{tier}')"
        assert browser.execute_script(f"return {chart}.querySelectorAll('.scatterlayer .trace').length") == 2
        titles = browser.execute_script(
            f"return [...{chart}.querySelectorAll('.ytitle, .y2title')].map(t => t.textContent)"
        )
        assert titles == ["loss, nats per token", "gradient norm"]
        assert browser.execute_script(f"return {chart}.clientWidth") <= width
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")


def charts_drawn(browser: Any) -> int:
    return browser.execute_script("return document.querySelectorAll('.chart .main-svg .cartesianlayer').length")


def test_it_opens_without_errors_or_requests_and_draws_every_chart(opened: Any) -> None:
    charts = opened.execute_script("return [...document.querySelectorAll('.chart')].map(chart => chart.id)")
    assert set(charts) == {
        "loss", "accuracy", "cost-MFLOPs", "cost-seconds", "cost-MB",
        "entropy", "gini", "phi", "partition-1", "partition-2", "experts-use", "experts-phi",
    }  # fmt: skip
    assert charts_drawn(opened) == len(charts)
    assert [line for line in opened.get_log("browser") if line["level"] in ("SEVERE", "WARNING")] == []
    asked = [line["message"] for line in opened.get_log("performance") if "requestWillBeSent" in line["message"]]
    assert asked and not [message for message in asked if '"url":"http' in message]


def test_the_slider_moves_the_heat_map_and_says_the_round(opened: Any) -> None:
    read = (
        "return [document.getElementById('experts-use').data[0].z[0][0], document.getElementById('round-text').value]"
    )
    last, said = opened.execute_script(read)
    assert said == f"round {ROUNDS}"
    slider = opened.find_element("id", "round")
    slider.send_keys("\ue012")  # the left arrow: a keyboard is enough
    moved, said = opened.execute_script(read)
    assert moved != last and said == f"round {ROUNDS - 1}"
    assert slider.get_attribute("aria-valuetext") == said


def test_phi_is_shown_only_for_a_run_that_has_it(opened: Any) -> None:
    hidden = "return document.getElementById('phi-figure').hidden"
    assert opened.execute_script(hidden) is False  # the page opens on ubsmoe
    opened.find_element("id", "run").send_keys("fedavg")
    assert opened.execute_script(hidden) is True


def test_tables_sort_by_number_both_ways(opened: Any) -> None:
    table = opened.find_element("css selector", "#clients table")
    heading = next(b for b in table.find_elements("css selector", "thead button") if b.text.startswith("seconds"))
    place = opened.execute_script("return arguments[0].closest('th').cellIndex", heading)
    column = f"return [...arguments[0].tBodies[0].rows].map(row => Number(row.cells[{place}].dataset.value))"
    before = opened.execute_script(column, table)
    assert before != sorted(before)
    for ascending in (True, False):
        heading.send_keys("\ue007")  # enter
        assert opened.execute_script(column, table) == sorted(before, reverse=not ascending)
        order = heading.find_element("xpath", "..").get_attribute("aria-sort")
        assert order == ("ascending" if ascending else "descending")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_contrast_passes(opened: Any, scheme: str) -> None:
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    opened.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    time.sleep(0.3)  # the charts are drawn anew
    ground = opened.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert ground == {"light": "rgb(255, 255, 255)", "dark": "rgb(13, 17, 23)"}[scheme]
    drawn = opened.execute_script("return document.getElementById('loss').layout.paper_bgcolor")
    assert drawn == {"light": "#ffffff", "dark": "#0d1117"}[scheme]
    assert opened.execute_script(LOW_CONTRAST) == []


def test_a_phone_of_390_pixels_scrolls_down_only(opened: Any) -> None:
    size = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
    opened.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    opened.refresh()
    assert opened.execute_script("return document.documentElement.scrollWidth") <= 390
    widths = opened.execute_script("return [...document.querySelectorAll('.chart')].map(c => c.clientWidth)")
    assert all(width <= 390 for width in widths) and charts_drawn(opened) == len(widths)
