"""The page in a real browser: it draws, its switches work, nothing leaves it, and it fits on a phone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from anysize.report.page import render
from anysize.report.schema import Results
from tests.report.samples import HOSTILE, looking_real

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
)  # fmt: skip

pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="no Chromium with chromedriver is installed (Debian: chromium chromium-driver)"
)


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=DRIVER))
    driver.set_script_timeout(60)
    yield driver
    driver.quit()


def with_a_hostile_arm() -> Results:
    """Return the large comparison with a name in it that would act, if any name could."""
    name, told = json.dumps("weight-selection"), json.dumps(HOSTILE)
    text = json.dumps(looking_real().model_dump(mode="json")).replace(name, told)
    return Results.model_validate_json(text)


def resize(browser: Any, width: int, height: int = 900) -> None:
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    settle(browser)


def settle(browser: Any) -> None:
    """Wait until what was asked for has been drawn: two frames."""
    browser.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")


def visit(browser: Any, page: str, place: Path) -> None:
    place.write_text(page, encoding="utf-8")
    browser.get(place.as_uri())
    wait = "const end = arguments[0], d = document.documentElement;"
    wait += "(function look() { d.dataset.ready || d.classList.contains('failed') ? end() : setTimeout(look, 20) })()"
    browser.execute_async_script(wait)
    assert browser.execute_script("return document.documentElement.dataset.ready") == "yes"


def requested(browser: Any) -> list[str]:
    """Return every address that was asked for since the last look."""
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]


def drawn(browser: Any) -> list[str]:
    """Return the outlines of the curves as the browser has them."""
    paths = "return [...document.querySelectorAll('#chart-curves .scatterlayer .trace .js-line')]"
    return [path for path in browser.execute_script(f"{paths}.map((line) => line.getAttribute('d'))") if path]


def choose(browser: Any, name: str, value: str) -> None:
    browser.execute_script(f'document.querySelector(\'input[name="{name}"][value="{value}"]\').click()')
    settle(browser)


def axis_kinds(browser: Any) -> list[str]:
    chart = "document.getElementById('chart-curves')._fullLayout"
    return browser.execute_script(f"return [{chart}.xaxis.type, {chart}.yaxis.type]")


def test_the_page_in_a_browser(browser: Any, tmp_path: Path) -> None:
    resize(browser, 1200)
    requested(browser)
    visit(browser, render(with_a_hostile_arm()), tmp_path / "report.html")
    hostile_names_stay_names(browser)
    curves_are_drawn(browser)
    switches_change_what_is_drawn(browser)
    hovering_tells_values(browser)
    pictures_are_drawn_when_opened(browser)
    printing_opens_everything_and_closes_it_again(browser)
    light_and_dark(browser)
    nothing_is_wider_than_a_phone(browser)
    assert [entry for entry in browser.get_log("browser") if entry["level"] != "INFO"] == []
    left = {url for url in requested(browser) if not url.startswith(("data:", "blob:"))}
    assert left == {(tmp_path / "report.html").as_uri()}
    no_other_script_runs(browser)
    a_request_would_have_been_seen(browser)


def curves_are_drawn(browser: Any) -> None:
    lines = drawn(browser)
    # Five arms with a band each, two goals and the source.
    assert len(lines) >= 5 + 2 + 1
    assert all(line.startswith("M") and {"L", "H"} & set(line) for line in lines)
    height = browser.execute_script("return document.querySelector('#chart-curves svg').getBoundingClientRect().height")
    assert height > 300
    points = browser.execute_script("return document.querySelectorAll('#chart-rates .scatterlayer .point').length")
    assert points == 5 * 4


def switches_change_what_is_drawn(browser: Any) -> None:
    first = drawn(browser)
    assert axis_kinds(browser) == ["log", "linear"]
    choose(browser, "yscale", "log")
    assert axis_kinds(browser) == ["log", "log"]
    assert drawn(browser) != first
    choose(browser, "yscale", "linear")
    choose(browser, "x", "seconds")
    assert axis_kinds(browser) == ["linear", "linear"]
    choose(browser, "xscale", "log")
    choose(browser, "x", "steps")
    assert drawn(browser) == first
    title = "return document.querySelector('#chart-curves .ytitle').textContent"
    assert browser.execute_script(title) == "held-out loss, nats/token"
    choose(browser, "unit", "bits")
    assert browser.execute_script(title) == "held-out loss, bits/byte"
    choose(browser, "unit", "metric")
    toggle = "document.querySelectorAll('.toggle')[1].click()"
    browser.execute_script(toggle)
    settle(browser)
    assert len(drawn(browser)) < len(first)
    browser.execute_script(toggle)
    settle(browser)
    assert drawn(browser) == first


def hovering_tells_values(browser: Any) -> None:
    from selenium.webdriver import ActionChains

    chart = browser.find_element("id", "chart-curves")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", chart)
    ActionChains(browser).move_to_element(chart).perform()
    settle(browser)
    told = browser.execute_script("return document.querySelector('#chart-curves .hoverlayer').textContent")
    for name in (arm.name for arm in looking_real().arms if arm.name != "weight-selection"):
        assert name in told
    assert HOSTILE[:20] in told
    assert " to 5." in told or " to 4." in told


def pictures_are_drawn_when_opened(browser: Any) -> None:
    count = "return document.querySelectorAll('.strip .heatmaplayer image').length"
    assert browser.execute_script(count) == 0
    browser.execute_script("for (const one of document.querySelectorAll('details')) one.open = true")
    browser.execute_async_script("setTimeout(arguments[0], 100)")
    settle(browser)
    assert browser.execute_script(count) == 4 * 5


def printing_opens_everything_and_closes_it_again(browser: Any) -> None:
    opened = "return [...document.querySelectorAll('details')].map((one) => one.open)"
    browser.execute_script("document.querySelectorAll('details').forEach((one, i) => (one.open = i === 1))")
    before = browser.execute_script(opened)
    assert before == [False, True, False, False, False]
    browser.execute_script("dispatchEvent(new Event('beforeprint'))")
    assert all(browser.execute_script(opened))
    browser.execute_script("dispatchEvent(new Event('afterprint'))")
    assert browser.execute_script(opened) == before


def light_and_dark(browser: Any) -> None:
    look = "const s = getComputedStyle(document.body); return [s.backgroundColor, s.color]"
    line = "return document.querySelector('#chart-curves .js-line').style.stroke"
    before = [browser.execute_script(look), browser.execute_script(line)]
    button = browser.find_element("id", "theme")
    button.click()
    settle(browser)
    after = [browser.execute_script(look), browser.execute_script(line)]
    assert before[0] == ["rgb(255, 255, 255)", "rgb(21, 25, 30)"]
    assert after[0] == ["rgb(18, 21, 24)", "rgb(232, 235, 238)"]
    assert before[1] != after[1]
    button.click()
    feature = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    browser.execute_script("delete document.documentElement.dataset.theme")
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", feature)
    settle(browser)
    assert browser.execute_script(look) == after[0]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def wider(browser: Any) -> list[str]:
    """Return the elements that stick out, for whoever reads the failure."""
    look = "[...document.querySelectorAll('body *')].filter((one) => !one.closest('.scroll')"
    look += " && one.getBoundingClientRect().right > arguments[0] + 0.5)"
    return browser.execute_script(f"return {look}.map((one) => one.outerHTML.slice(0, 80))", 320)


def nothing_is_wider_than_a_phone(browser: Any) -> None:
    for width in (360, 320):
        resize(browser, width)
        found = browser.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
        assert found == [width, width], wider(browser)
    wide = "return [...document.querySelectorAll('.scroll')].some((one) => one.scrollWidth > one.clientWidth)"
    assert browser.execute_script(wide)
    resize(browser, 1200)


def no_other_script_runs(browser: Any) -> None:
    script = "const one = document.createElement('script'); one.textContent = 'window.hurt = 2';"
    assert browser.execute_script(f"{script} document.head.append(one); return window.hurt ?? 'blocked'") == "blocked"
    assert any("Content Security Policy" in entry["message"] for entry in browser.get_log("browser"))


def hostile_names_stay_names(browser: Any) -> None:
    assert browser.execute_script("return window.hurt ?? 'unhurt'") == "unhurt"
    shown = browser.execute_script("return document.querySelectorAll('.toggles label')[2].textContent")
    assert shown == HOSTILE.replace("\x00", "\ufffd")


def a_request_would_have_been_seen(browser: Any) -> None:
    requested(browser)
    browser.get("data:text/html,<img src='http://127.0.0.1:9/seen.png'>")
    assert "http://127.0.0.1:9/seen.png" in requested(browser)
