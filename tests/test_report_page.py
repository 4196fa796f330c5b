"""The page of a report in a real browser: drawn without a network, by keyboard, in any light."""

import importlib.util
import re
import shutil
import time
from pathlib import Path

import pytest

from gradaccum.cli.main import main
from tests import runs

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
needs_browser = pytest.mark.skipif(
    not (BROWSER and DRIVER and importlib.util.find_spec("selenium")),
    reason="needs chromium, chromedriver (apt install chromium-driver) and selenium",
)
STYLE = Path(__file__).parent.parent / "gradaccum" / "report" / "page.css"
SERIES = [f"s{i}" for i in range(1, 7)]
# What is wider than the window, but for what scrolls on its own.
WIDER = """
return [...document.querySelectorAll("body *")].filter(e =>
  e.getBoundingClientRect().right > innerWidth + 1 && !e.closest(".scroll, .unseen, .skip"))
  .map(e => e.outerHTML.slice(0, 100))"""
DRAWN = """
return [...document.querySelectorAll(".chart")].map(chart => {
  const svg = chart.querySelector("svg"), box = svg?.getBoundingClientRect();
  const marks = [...chart.querySelectorAll(".mark-line path, .mark-rect path, .mark-symbol path")];
  return [chart.id, box ? box.width * box.height : 0, marks.length, chart.clientWidth,
    box ? box.width : 0];
})"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Return the page of one run and that of three, as files."""
    folder = tmp_path_factory.mktemp("runs")
    told = runs.lines(60, change=(40, 64))
    told[20]["loss"] = None
    told[30]["ranks"] = [[3, 16, 4000, 3500], [4, 16, 4200, 3600]]
    runs.write(folder / "one", told, runs.about(60, schedule="32:0,64:40"))
    # Names and commands as long as they come.
    runs.write(folder / ("a" * 60), runs.lines(25), runs.about(command="gradaccum " + "x" * 300))
    runs.write(folder / "20261128-103114", runs.lines(25, nudge=4e-8), runs.about())
    runs.write(folder / "c", runs.lines(25, change=(12, 64)), runs.about())
    main(["report", str(folder / "one")])
    several = [str(folder / name) for name in ("a" * 60, "20261128-103114", "c")]
    main(["report", *several, "--out", str(folder / "several.html")])
    return {"one": folder / "one" / "report.html", "several": folder / "several.html"}


class Browser:
    """Drive a browser that has no network."""

    def __init__(self, driver):
        self.driver = driver
        self.run = driver.execute_script
        self.tell = driver.execute_cdp_cmd

    def show(self, page, *, width=1280, height=900, **features):
        """Open a page in a window and with media features, and wait until it is drawn."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.tell("Emulation.setDeviceMetricsOverride", size)
        names = {"scheme": "prefers-color-scheme", "motion": "prefers-reduced-motion"}
        told = [{"name": names[name], "value": value} for name, value in features.items()]
        self.tell("Emulation.setEmulatedMedia", {"media": "", "features": told})
        self.driver.get(page.as_uri())
        deadline = time.monotonic() + 60
        while not self.run("return document.documentElement.dataset.drawn"):
            assert time.monotonic() < deadline, self.driver.get_log("browser")
            time.sleep(0.05)

    def tree(self):
        """Return (role, name) of what assistive technology is told of."""
        nodes = self.tell("Accessibility.getFullAXTree", {})["nodes"]
        return [
            (node["role"]["value"], node.get("name", {}).get("value", ""))
            for node in nodes
            if not node["ignored"]
        ]


@pytest.fixture(scope="module")
def browser():
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    driver.execute_cdp_cmd("Network.enable", {})
    offline = {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0}
    driver.execute_cdp_cmd("Network.emulateNetworkConditions", offline)
    yield Browser(driver)
    driver.quit()


@needs_browser
@pytest.mark.parametrize("name", ["one", "several"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 375])
def test_every_figure_is_drawn_and_nothing_fails_or_is_requested(
    browser, pages, name, scheme, width
):
    browser.driver.get_log("browser")
    browser.driver.get_log("performance")
    browser.show(pages[name], width=width, scheme=scheme)
    assert browser.driver.get_log("browser") == []
    sent = [
        entry["message"]
        for entry in browser.driver.get_log("performance")
        if '"Network.requestWillBeSent"' in entry["message"]
    ]
    urls = [re.search(r'"url":"([^"]*)"', message).group(1) for message in sent]
    assert {url for url in urls if not url.startswith("data:")} == {pages[name].as_uri()}
    drawn = browser.run(DRAWN)
    assert len(drawn) == (11 if name == "one" else 5)
    for figure, area, marks, room, wide in drawn:
        assert area > 10_000 and marks, figure
        assert room - 3 <= wide <= room + 1, f"{figure} fills the width that it has"
    assert browser.run("return document.documentElement.scrollWidth") <= width
    assert browser.run(WIDER) == []


@needs_browser
def test_light_and_dark_are_other_colours_and_change_without_drawing_again(browser, pages):
    seen = {}
    for scheme in ("light", "dark"):
        browser.show(pages["one"], scheme=scheme)
        line = "getComputedStyle(document.querySelector('#figure-loss .mark-line path')).stroke"
        label = "getComputedStyle(document.querySelector('#figure-loss .mark-text text')).fill"
        paper = "getComputedStyle(document.body).backgroundColor"
        seen[scheme] = browser.run(f"return [{line}, {label}, {paper}]")
    assert all(light != dark for light, dark in zip(seen["light"], seen["dark"], strict=True))
    features = [{"name": "prefers-color-scheme", "value": "light"}]
    browser.tell("Emulation.setEmulatedMedia", {"features": features})
    assert browser.run(f"return [{line}, {label}, {paper}]") == seen["light"]


@needs_browser
def test_figures_have_names_that_say_what_they_show(browser, pages):
    browser.show(pages["one"])
    tree = browser.tree()
    images = [name for role, name in tree if role in ("image", "img")]
    assert len(images) == 11 and all(len(name) > 20 and name.endswith(".") for name in images)
    assert any(name.startswith("The loss goes from ") for name in images)
    assert not [name for role, name in tree if "graphics" in role.lower()], "marks are not read out"
    roles = {role for role, _ in tree}
    assert {"banner", "main", "navigation", "heading", "table", "rowheader"} <= roles
    for role, name in tree:
        if role in ("figure", "link", "button", "region", "navigation", "DisclosureTriangle"):
            assert name, role


@needs_browser
def test_the_page_is_read_by_its_structure(browser, pages):
    for page in pages.values():
        browser.show(page)
        levels = browser.run(
            "return [...document.querySelectorAll('h1,h2,h3')].map(h => h.tagName)"
        )
        assert levels.count("H1") == 1 and levels[0] == "H1"
        assert browser.run("return document.documentElement.lang") == "en"
        ids = browser.run("return [...document.querySelectorAll('[id]')].map(e => e.id)")
        assert len(ids) == len(set(ids))
        assert browser.run(
            "return [...document.querySelectorAll('table')].every(t => t.caption?.textContent"
            " && t.querySelector('thead th[scope=col]') && t.querySelector('tbody th[scope=row]'))"
        )


@needs_browser
def test_the_keyboard_reaches_links_numbers_and_buttons(browser, pages):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    browser.show(pages["one"])
    reached, outlines = [], []
    for _ in range(80):
        browser.driver.switch_to.active_element.send_keys(Keys.TAB)
        tag, text, outline = browser.run(
            "const e = document.activeElement, s = getComputedStyle(e);"
            "return [e.tagName, e.textContent.trim(), s.outlineStyle + s.outlineWidth]"
        )
        if tag == "BODY":
            break
        reached.append((tag, text))
        outlines.append(outline)
    assert reached[0] == ("A", "Skip to the figures")
    tags = [tag for tag, _ in reached]
    assert tags.count("SUMMARY") == 11 and tags.count("BUTTON") == 2 and tags.count("A") == 10
    assert all(outline == "solid3px" for outline in outlines), "what has the focus is seen"
    details = browser.driver.find_elements(By.TAG_NAME, "details")[0]
    details.find_element(By.TAG_NAME, "summary").send_keys(Keys.ENTER)
    assert details.get_attribute("open") and "10.6" in details.text


@needs_browser
def test_the_skip_link_goes_to_the_figures(browser, pages):
    from selenium.webdriver.common.keys import Keys

    browser.show(pages["one"])
    browser.driver.switch_to.active_element.send_keys(Keys.TAB)
    browser.driver.switch_to.active_element.send_keys(Keys.ENTER)
    assert browser.run("return document.activeElement.id") == "main"


@needs_browser
def test_the_command_is_copied_as_it_is(browser, pages):
    from selenium.webdriver.common.by import By

    browser.show(pages["one"])
    button = browser.driver.find_element(By.CSS_SELECTOR, ".listing button")
    code = browser.run("return document.querySelector('.listing code').textContent")
    assert code == runs.about()["command"]
    browser.run("arguments[0].click()", button)
    time.sleep(0.3)
    assert browser.run("return document.getElementById('said').textContent") != ""


@needs_browser
def test_a_pointer_over_a_line_shows_its_figures(browser, pages):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By

    browser.show(pages["one"])
    chart = browser.driver.find_element(By.CSS_SELECTOR, "#figure-loss svg")
    browser.run("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", chart)
    ActionChains(browser.driver, 0).move_to_element_with_offset(chart, 7, 5).pause(0.5).perform()
    said = browser.run("return document.getElementById('vg-tooltip-element')?.textContent ?? ''")
    assert "step" in said and "loss" in said


@needs_browser
def test_it_prints_dark_pages_in_light_and_within_the_paper(browser, pages):
    browser.show(pages["one"], scheme="dark")
    features = [{"name": "prefers-color-scheme", "value": "dark"}]
    browser.tell("Emulation.setEmulatedMedia", {"media": "print", "features": features})
    assert browser.run("return getComputedStyle(document.body).backgroundColor") == (
        "rgb(255, 255, 255)"
    )
    assert browser.run("return getComputedStyle(document.querySelector('nav')).display") == "none"
    browser.tell("Emulation.setDeviceMetricsOverride", {
        "width": 700, "height": 1000, "deviceScaleFactor": 1, "mobile": False
    })  # fmt: skip
    assert browser.run(WIDER) == []


@needs_browser
def test_nothing_moves_where_that_is_not_wanted(browser, pages):
    behavior = "return getComputedStyle(document.documentElement).scrollBehavior"
    for motion, expected in (("reduce", "auto"), ("no-preference", "smooth")):
        browser.show(pages["one"], motion=motion)
        assert browser.run(behavior) == expected


@needs_browser
def test_a_hundred_thousand_steps_are_drawn(browser, tmp_path):
    some = runs.lines(500)
    told = [line | {"step": line["step"] + 500 * i} for i in range(200) for line in some]
    folder = runs.write(tmp_path / "long", told)
    assert main(["report", str(folder)]) == 0
    page = folder / "report.html"
    assert page.stat().st_size < 3_000_000
    browser.show(page)
    assert all(area > 10_000 for _, area, *_ in browser.run(DRAWN))


def luminance(color):
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a, b):
    """Return the contrast of WCAG 2: https://www.w3.org/TR/WCAG22/#dfn-contrast-ratio."""
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def test_text_and_figures_have_enough_contrast_in_both_themes():
    light, dark = (
        dict(re.findall(r"--(\w+): (#\w{6})", block))
        for block in re.findall(r":root \{(.*?)\}", STYLE.read_text(), re.DOTALL)
    )
    assert set(light) == set(dark)
    for theme in (light, dark):
        for paper in ("paper", "raised", "notice"):
            assert contrast(theme["ink"], theme[paper]) >= 7
        for text in ("muted", "link", "warn"):
            assert contrast(theme[text], theme["paper"]) >= 4.5, text
        for name in (*SERIES, "edge"):
            assert contrast(theme[name], theme["paper"]) >= 3, name
