"""The report in a real browser: what is seen, what is moved, and that nothing is fetched."""

from __future__ import annotations

import base64
import io
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from report_sample import BLUES, LABELS, NAMES, write_sample

from lalic.report import PictureOptions, write_report

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="no chromium and chromedriver here (Debian: chromium, chromium-driver)"
)
FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--hide-scrollbars", "--force-color-profile=srgb"),
    "--disable-dev-shm-usage",  # containers have little of it
)
DESKTOP, PHONE, NARROW = (1280, 900, False), (390, 844, True), (360, 640, True)

# What may scroll within a box of its own is left out, and what is hidden from the eye.
BEYOND_THE_SCREEN = """
  return [...document.querySelectorAll("body *")]
    .filter(e => !e.closest(".scroll, .hidden, .segments, .stage, svg, legend"))
    .filter(e => e.getBoundingClientRect().right > innerWidth + 0.5).map(e => e.outerHTML.slice(0, 200))"""
CUT_OFF = """
  return [...document.querySelectorAll("body *")]
    .filter(e => !e.matches(".scroll, .segments, .hidden") && !e.closest("svg, .stage, caption, legend"))
    .filter(e => getComputedStyle(e).display !== "inline" && e.scrollWidth > e.clientWidth + 1)
    .map(e => e.outerHTML.slice(0, 200))"""

Open = Callable[..., Any]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    path = folder / "report.html"
    result = write_sample(folder)
    write_report(result, path, reconstructions=folder / "recon", options=PictureOptions(lossless=True))
    return path


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def open_report(driver: Any, report: Path) -> Iterator[Open]:
    def open_(screen: tuple[int, int, bool] = DESKTOP, path: Path = report, scripts: bool = True) -> Any:
        width, height, mobile = screen
        driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": mobile},
        )
        driver.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": mobile})
        driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": not scripts})
        driver.get_log("browser")
        driver.get_log("performance")
        driver.get(path.as_uri())
        return driver

    yield open_
    driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "", "features": []})


def stage(driver: Any, index: int = 0) -> Any:
    found = driver.find_elements("css selector", ".stage")[index]
    driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", found)
    return found


def box_of(driver: Any, element: Any) -> dict[str, float]:
    return driver.execute_script("return arguments[0].getBoundingClientRect().toJSON()", element)


def colours(driver: Any, element: Any, *shares: float, at: float = 0.8) -> list[tuple[int, ...]]:
    """What is painted at these shares of an element's width, as a camera would see it."""
    # Pictures are decoded beside the page; two frames later they are painted.
    driver.execute_async_script(
        "const done = arguments[0]; Promise.all([...document.images].filter(i => i.checkVisibility())"
        ".map(i => i.decode())).then(() => requestAnimationFrame(() => requestAnimationFrame(done)))"
    )
    shot = driver.execute_cdp_cmd("Page.captureScreenshot", {"format": "png"})["data"]
    picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(shot))).convert("RGB"))
    box = box_of(driver, element)
    row = picture[int(box["top"] + at * box["height"])]
    return [tuple(map(int, row[int(box["left"] + share * box["width"])])) for share in shares]


def close_to(seen: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    return max(abs(a - b) for a, b in zip(seen, expected, strict=True)) <= 3


RED = (255, 0, 0)
BLUE = BLUES[LABELS[2]]  # the middle one of the checkpoints is shown first


class TestPage:
    @pytest.mark.parametrize("screen", [DESKTOP, PHONE, NARROW], ids=["desktop", "phone", "narrow"])
    def test_nothing_is_fetched_and_nothing_complains(self, open_report: Open, screen: tuple[int, int, bool]) -> None:
        driver = open_report(screen)
        for label in driver.find_elements("css selector", ".segments input"):
            driver.execute_script("arguments[0].click()", label)
        messages = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
        requests = [m["params"] for m in messages if m["method"] == "Network.requestWillBeSent"]
        # The browser's own pages, such as that of a new tab, ask for things of their own.
        urls = [r["request"]["url"] for r in requests if r["documentURL"] == driver.current_url]
        assert [url for url in urls if not url.startswith("data:")] == [driver.current_url]
        assert driver.get_log("browser") == []

    @pytest.mark.parametrize("screen", [DESKTOP, PHONE, NARROW], ids=["desktop", "phone", "narrow"])
    def test_only_tables_scroll_sideways(self, open_report: Open, screen: tuple[int, int, bool]) -> None:
        driver = open_report(screen)
        driver.execute_script("document.querySelectorAll('details').forEach(d => d.open = true)")
        assert driver.execute_script("return document.documentElement.scrollWidth") <= screen[0]
        assert driver.execute_script(BEYOND_THE_SCREEN) == []
        assert driver.execute_script(CUT_OFF) == []

    def test_letters_are_large_enough_on_a_phone(self, open_report: Open) -> None:
        driver = open_report(PHONE)
        small = driver.execute_script(
            "return [...document.querySelectorAll('body *')].filter(e => !e.closest('svg, script, sup') && "
            "[...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()) && "
            "parseFloat(getComputedStyle(e).fontSize) < 16).map(e => e.outerHTML)"
        )
        assert small == []
        scale = driver.execute_script(
            "const s = document.querySelector('.chart'), t = s.querySelector('text');"
            "return parseFloat(getComputedStyle(t).fontSize) * s.clientWidth / s.viewBox.baseVal.width"
        )
        assert scale >= 12

    def test_names_stay_text(self, open_report: Open) -> None:
        driver = open_report()
        titles = [h.text for h in driver.find_elements("css selector", ".viewer h3")]
        assert [title.rsplit(" 480", 1)[0] for title in titles] == [NAMES[0], NAMES[1], "c\\u202egnp.exe.png"]
        assert len(driver.find_elements("css selector", "script")) == 1
        choices = [s.text for s in driver.find_elements("css selector", ".bar fieldset:first-child span")]
        assert choices == LABELS

    def test_dark(self, open_report: Open, driver: Any) -> None:
        features = [{"name": "prefers-color-scheme", "value": "dark"}]
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        open_report()
        paper, ink = driver.execute_script(
            "const s = getComputedStyle(document.body); return [s.backgroundColor, s.color]"
            ".map(c => Math.max(...c.match(/\\d+/g).map(Number)))"
        )
        assert paper < 40
        assert ink > 200


class TestSlider:
    def test_shows_the_original_on_the_left(self, open_report: Open) -> None:
        driver = open_report()
        left, right = colours(driver, stage(driver), 0.45, 0.55)
        assert close_to(left, RED)
        assert close_to(right, BLUE)

    def test_drag(self, open_report: Open) -> None:
        driver = open_report()
        first = stage(driver)
        width = box_of(driver, first)["width"]
        chain = webdriver.ActionChains(driver)
        chain.move_to_element(first).click_and_hold().move_by_offset(-int(0.3 * width), 0).release().perform()
        before, behind = colours(driver, first, 0.15, 0.25)
        assert close_to(before, RED)
        assert close_to(behind, BLUE)
        # Each picture has a slider of its own.
        assert close_to(colours(driver, stage(driver, 1), 0.45)[0], RED)

    def test_touch(self, open_report: Open) -> None:
        driver = open_report(PHONE)
        first = stage(driver)
        box = box_of(driver, first)

        def touch(kind: str, share: float | None) -> None:
            points = [] if share is None else [{"x": box["left"] + share * box["width"], "y": box["top"] + 20}]
            driver.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})

        touch("touchStart", 0.5)
        for share in (0.55, 0.6, 0.65, 0.7, 0.75, 0.8):
            touch("touchMove", share)
        touch("touchEnd", None)
        before, behind = colours(driver, first, 0.75, 0.85)
        assert close_to(before, RED)
        assert close_to(behind, BLUE)

    def test_keyboard(self, open_report: Open) -> None:
        driver = open_report()
        first = stage(driver)
        slider = first.find_element("css selector", "input[type=range]")
        driver.execute_script("arguments[0].focus({preventScroll: true})", slider)
        keys = webdriver.Keys
        for key, share in ((keys.HOME, 0), (keys.END, 100), (keys.ARROW_LEFT, 98), (keys.PAGE_DOWN, 88)):
            slider.send_keys(key)
            assert float(slider.get_property("value")) == pytest.approx(share)
            assert slider.get_attribute("aria-valuetext") == f"{share} % original on the left"
        assert close_to(colours(driver, first, 0.85)[0], RED)
        assert close_to(colours(driver, first, 0.92)[0], BLUE)
        assert slider.accessible_name.endswith(NAMES[0])
        assert slider.aria_role == "slider"

    def test_error_and_checkpoints(self, open_report: Open) -> None:
        driver = open_report()
        driver.find_element("css selector", "label:has(#view-error)").click()
        # Red against blue is off by more than 255 / 8 in the mean of the channels: the brightest colour of the map.
        assert close_to(colours(driver, stage(driver), 0.7)[0], (255, 250, 200))
        driver.find_element("css selector", "label:has(#view-picture)").click()
        for i, label in enumerate(LABELS):
            driver.find_elements("css selector", ".bar fieldset:first-child label")[i].click()
            assert close_to(colours(driver, stage(driver), 0.7)[0], BLUES[label])
            chosen = driver.execute_script(
                "return [...document.querySelectorAll('.numbers')].map(t => [...t.tBodies[0].rows].findIndex("
                "r => getComputedStyle(r).fontWeight === '600'))"
            )
            assert chosen == [i] * len(NAMES)

    def test_zoom_keeps_what_is_under_the_slider(self, open_report: Open, tmp_path: Path) -> None:
        result = write_sample(tmp_path, ["steps.png"])
        steps = np.zeros((320, 480, 3), np.uint8)
        steps[:, 120:150] = (0, 255, 0)  # a stripe at a quarter of the width
        for path in tmp_path.rglob("steps.png"):
            Image.fromarray(steps).save(path)
        for record in result["records"]:
            record["psnr"] = None
        write_report(result, tmp_path / "r.html", reconstructions=tmp_path / "recon")
        driver = open_report(path=tmp_path / "r.html")
        driver.find_element("css selector", "label:has(#zoom-4)").click()
        first = stage(driver)
        chain = webdriver.ActionChains(driver)
        chain.move_to_element_with_offset(first, -int(0.22 * box_of(driver, first)["width"]), 0).click().perform()
        # The stripe is 30 pixels of 480; four times as wide it covers a quarter of the stage.
        seen = colours(driver, first, 0.2, 0.4, 0.45)
        assert [colour[1] > 200 for colour in seen] == [True, True, False]


class TestWithoutScript:
    def test_all_three_are_shown_and_checkpoints_can_be_chosen(self, open_report: Open) -> None:
        driver = open_report(scripts=False)
        assert driver.find_elements("css selector", "input[type=range]") == []
        assert not driver.find_element("css selector", "#view-error").is_displayed()
        first = driver.find_element("css selector", ".viewer")
        for label in LABELS[::-1]:
            index = LABELS.index(label)
            driver.find_elements("css selector", ".bar fieldset:first-child label")[index].click()
            shown = [i for i in first.find_elements("tag name", "img") if i.is_displayed()]
            assert [i.get_attribute("alt") for i in shown] == [
                f"{NAMES[0]}, original",
                f"{NAMES[0]}, reconstruction by {label}",
                f"{NAMES[0]}, error map by {label}",
            ]
            lefts = [i.rect["x"] for i in shown]
            assert lefts == sorted(set(lefts))

    def test_on_paper(self, open_report: Open, driver: Any) -> None:
        open_report()
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
        first = driver.find_element("css selector", ".viewer")
        shown = [i for i in first.find_elements("tag name", "img") if i.is_displayed()]
        assert len({i.rect["x"] for i in shown}) == 3
        assert not first.find_element("css selector", "input[type=range]").is_displayed()
