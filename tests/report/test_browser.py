"""The page in a real browser: it loads nothing, says no errors, and zoom, sorting, colours and small screens work."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from diffusion_rtb.report.page import write_page
from tests.oracles.evaluated import evaluated, training

pytest.importorskip("selenium")
from selenium import webdriver
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.wait import WebDriverWait

CHROMIUM, DRIVER = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(CHROMIUM is None or DRIVER is None, reason="needs Chromium and chromedriver")

PROMPTS = (
    "a cat",
    "<img src=x onerror=\"document.title='owned'\">",
    "</script><script>document.title='owned'</script>",
    "b" * 90,
)

CONTRAST = """
const parse = (text) => (text.match(/[\\d.]+/g) || [0, 0, 0, 0]).map(Number);
const over = (front, back) => front.slice(0, 3).map((v, i) => v * (front[3] ?? 1) + back[i] * (1 - (front[3] ?? 1)));
const light = (c) => c.slice(0, 3).map((v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
  .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
const behind = (node) => {
  for (; node; node = node.parentElement) {
    const colour = parse(getComputedStyle(node).backgroundColor);
    if ((colour[3] ?? 1) > 0) return colour;
  }
  return [255, 255, 255];
};
const found = [];
const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
for (let text; (text = walk.nextNode());) {
  const node = text.parentElement;
  if (!text.textContent.trim() || !node.getClientRects().length || node.closest("script, .skip")) continue;
  const style = getComputedStyle(node), back = behind(node);
  const front = over(parse(node.closest("svg") ? style.fill : style.color), back);
  const [a, b] = [light(front), light(back)].sort((x, y) => y - x);
  found.push([(a + 0.05) / (b + 0.05), text.textContent.trim().slice(0, 40)]);
}
return found.sort((x, y) => x[0] - y[0]);
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """One for all tests, with its network log."""
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM or ""
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.implicitly_wait(0)
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("browser")
    run = training(evaluated(root / "run" / "eval", PROMPTS, judged=1.0, count=40))
    other = evaluated(root / "other", PROMPTS[:1], kind="images", count=10)
    return write_page([run, other], root / "page.html").as_uri()


@pytest.fixture
def opened(browser: Any, page: str) -> Any:
    """The page, freshly loaded, on a large screen."""
    screen(browser, 1200)
    browser.get(page)
    return browser


def screen(browser: Any, width: int, scheme: str = "light") -> None:
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})


def one(browser: Any, selector: str) -> Any:
    return browser.find_element("css selector", selector)


def test_it_loads_without_errors_and_asks_for_nothing(opened: Any, page: str) -> None:
    assert [entry for entry in opened.get_log("browser") if entry["level"] in {"SEVERE", "WARNING"}] == []
    broken = "return [...document.images].filter(i => !(i.complete && i.naturalWidth > 0)).map(i => i.alt)"
    assert opened.execute_script("return document.images.length") > 40
    assert opened.execute_script(broken) == []
    asked = [json.loads(entry["message"])["message"] for entry in opened.get_log("performance")]
    urls = {m["params"]["request"]["url"] for m in asked if m["method"] == "Network.requestWillBeSent"}
    assert {url for url in urls if not url.startswith("data:")} == {page}
    assert opened.title == "2 subjects compared"  # no prompt has run


def test_a_script_of_somebody_else_would_not_run(opened: Any) -> None:
    opened.execute_script("""
        const script = document.createElement("script");
        script.textContent = "document.title = 'owned'";
        document.body.append(script);
        document.body.insertAdjacentHTML("beforeend", "<img src=x onerror=\\"document.title = 'owned'\\">");
    """)
    assert opened.title == "2 subjects compared"
    assert any("Content Security Policy" in entry["message"] for entry in opened.get_log("browser"))


def test_zoom_by_click_and_keyboard(opened: Any) -> None:
    pictures = opened.find_elements("css selector", "button.picture")
    opened.execute_script("arguments[0].focus()", pictures[1])
    pictures[1].send_keys(Keys.ENTER)
    dialog, zoomed = one(opened, "#zoom"), one(opened, "#zoomed")
    sources = [p.find_element("css selector", "img").get_attribute("src") for p in pictures]
    assert dialog.get_attribute("open") is not None
    assert zoomed.get_attribute("src") == sources[1]
    assert one(opened, "#zoomed-words").text.startswith(f"2 of {len(pictures)}: prior, prompt")
    opened.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
    assert zoomed.get_attribute("src") == sources[2]
    one(opened, "#before").click()
    one(opened, "#before").click()
    assert zoomed.get_attribute("src") == sources[0]
    opened.switch_to.active_element.send_keys(Keys.ARROW_LEFT)
    assert zoomed.get_attribute("src") == sources[-1]
    opened.switch_to.active_element.send_keys(Keys.ESCAPE)
    assert dialog.get_attribute("open") is None
    assert opened.execute_script("return document.activeElement === arguments[0]", pictures[-1])
    opened.execute_script("arguments[0].click()", pictures[0])
    assert dialog.get_attribute("open") is not None
    one(opened, "#close").click()
    assert dialog.get_attribute("open") is None


def test_a_swipe_shows_the_next_picture(opened: Any) -> None:
    opened.execute_script("document.querySelector('button.picture').click()")
    opened.execute_script("""
        const touch = (x) => new Touch({identifier: 1, target: arguments[0], clientX: x, clientY: 10});
        const fire = (kind, key, x) => arguments[0].dispatchEvent(new TouchEvent(kind, {bubbles: true, [key]: [touch(x)]}));
        fire("touchstart", "touches", 200);
        fire("touchend", "changedTouches", 80);
    """, one(opened, "#zoomed"))  # fmt: skip
    assert one(opened, "#zoomed-words").text.startswith("2 of ")


def test_the_table_of_prompts_sorts_by_number_and_by_name(opened: Any) -> None:
    table = next(t for t in opened.find_elements("css selector", "table.sortable") if "prompt by prompt" in t.text)
    titles = table.find_elements("css selector", "thead th")
    column = next(i for i, title in enumerate(titles) if title.text.startswith("posterior"))

    def values() -> list[float]:
        cells = table.find_elements("css selector", f"tbody tr > :nth-child({column + 1})")
        return [float(cell.get_attribute("data-value")) for cell in cells]

    button = titles[column].find_element("css selector", "button")
    assert len(set(values())) == len(PROMPTS)
    button.send_keys(Keys.ENTER)
    assert values() == sorted(values(), reverse=True)
    assert titles[column].get_attribute("aria-sort") == "descending"
    opened.execute_script("arguments[0].click()", button)
    assert values() == sorted(values())
    assert titles[column].get_attribute("aria-sort") == "ascending"
    opened.execute_script("arguments[0].click()", titles[0].find_element("css selector", "button"))
    assert titles[column].get_attribute("aria-sort") is None
    assert [row.text for row in table.find_elements("css selector", "tbody th")][-1] == PROMPTS[3]


def test_colours_follow_the_system_until_they_are_chosen(opened: Any, page: str) -> None:
    def paper() -> str:
        return str(opened.execute_script("return getComputedStyle(document.body).backgroundColor"))

    light = paper()
    screen(opened, 1200, "dark")
    dark = paper()
    assert light != dark
    button = one(opened, "#theme")
    button.click()
    assert (paper(), button.text) == (light, "Colours: light")
    button.click()
    assert (paper(), button.text) == (dark, "Colours: dark")
    opened.get(page)
    assert one(opened, "#theme").text == "Colours: dark"
    opened.execute_script("localStorage.clear()")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_what_is_behind_it(opened: Any, scheme: str) -> None:
    screen(opened, 1200, scheme)
    opened.execute_script("document.querySelectorAll('details').forEach(d => d.open = true)")
    found = opened.execute_script(CONTRAST)
    assert len(found) > 300
    assert found[0][0] >= 4.5, found[:5]


def test_a_phone_shows_it_without_scrolling_sideways(opened: Any) -> None:
    screen(opened, 375)
    opened.execute_script("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert opened.execute_script("return [document.scrollingElement.scrollWidth, innerWidth]") == [375, 375]
    small = "return [...document.querySelectorAll('svg.chart')].map(s => s.getBoundingClientRect().width / s.viewBox.baseVal.width)"
    assert min(opened.execute_script(small)) > 0.9  # charts keep the size of their letters


def test_the_numbers_can_be_saved(opened: Any, tmp_path: Path) -> None:
    opened.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)})
    opened.execute_script("document.getElementById('download').click()")
    saved = tmp_path / "numbers.json"
    WebDriverWait(opened, 10).until(lambda _: saved.is_file())
    assert json.loads(saved.read_text())["s1"]["per_prompt"][1]["prompt"] == PROMPTS[1]
