"""The page in a real browser: a question asked, streamed and stopped, edited, retried; the inside; both languages.

    python tests/checks/check_web.py --ckpt out/demo/pretrain/final,out/demo/sft/final --shots out/web

Needs Chromium and its driver (Debian: apt install chromium chromium-driver) and selenium; `make check-web` sees to the
latter. Starts a server, and leaves screenshots in the folder of --shots.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

from cli import call
from errors import UserError, command_line

FLAGS = (
    "headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
    "disable-component-update", "disable-sync", "hide-scrollbars",
)  # fmt: skip
PATIENCE = 120  # seconds, for a machine that does other things too
WIDE, PHONE = (1400, 900), (390, 844)


class Page:
    """The page in a browser, and what a person does there."""

    def __init__(self, url: str, language: str, dark: bool = False, size: tuple[int, int] = WIDE) -> None:
        options = Options()
        options.binary_location = shutil.which("chromium") or "chromium"
        for flag in (*FLAGS, f"lang={language}", f"user-data-dir={tempfile.mkdtemp()}"):
            options.add_argument(f"--{flag}")
        options.add_experimental_option("prefs", {"intl.accept_languages": language})
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        self.driver = webdriver.Chrome(options, Service(shutil.which("chromedriver")))
        self.driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": size == PHONE},
        )
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
        self.driver.get(url)
        self.until(lambda: self.all("#models input"), "the models are listed")

    def all(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def text(self, selector: str) -> list[str]:
        """The texts of all elements, read at one moment: what streams is replaced meanwhile."""
        script = "return [...document.querySelectorAll(arguments[0])].map((one) => one.textContent)"
        return self.driver.execute_script(script, selector)

    def until(self, holds: Callable[[], object], what: str) -> None:
        """Wait for something; raise `AssertionError` with the page's own errors when it does not come."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            if holds():
                return
            time.sleep(0.05)
        raise AssertionError(f"{what}: not within {PATIENCE} s; {self.driver.get_log('browser')}")

    def choose(self, *models: str) -> None:
        for box in self.all("#models input"):
            if box.is_selected() != (box.get_attribute("value") in models):
                box.click()

    def ask(self, question: str) -> None:
        self.all("#question")[0].send_keys(question, Keys.ENTER)

    def click(self, selector: str, place: int = 0) -> None:
        self.driver.execute_script("document.querySelectorAll(arguments[0])[arguments[1]].click()", selector, place)

    def set(self, name: str, value: object) -> None:
        script = "document.querySelector(`#settings [name=${arguments[0]}]`).value = arguments[1]"
        self.driver.execute_script(script, name, str(value))

    def finished(self) -> bool:
        return bool(self.all(".reply")) and not self.all(".reply.busy")

    def shoot(self, file: Path) -> None:
        self.driver.save_screenshot(str(file))

    def close(self) -> None:
        """End the browser. Raise `AssertionError` where the page reported an error of its own."""
        errors = [one for one in self.driver.get_log("browser") if one["level"] == "SEVERE"]
        self.driver.quit()
        assert not errors, errors


def check_web(ckpt: str, shots: str = "out/web", questions: str = "你好|算一算，6加51等于几？") -> None:
    """Drive the page in Chromium and check what it shows.

    Args:
        ckpt: checkpoints separated by commas, at least two
        shots: folder for screenshots
        questions: two questions, separated by |
    """
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        raise UserError("check_web.py: there is no chromium with chromedriver; apt install chromium chromium-driver")
    first, second = questions.split("|")
    folder = Path(shots)
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "eval/serve.py", "--ckpt", ckpt, "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            line = server.stdout.readline()
            url = line.partition(" at ")[2].split()[0]
            models = line.removeprefix("serving ").partition(" at ")[0].split(", ")
            talk(Page(url, "zh-CN"), models, (first, second), folder)
            look(Page(url, "en-US", dark=True), models, second, folder)
            phone(Page(url, "zh-CN", size=PHONE), models, second, folder)
        finally:
            server.terminate()
    print(f"the page works; screenshots: {folder}")


def talk(page: Page, models: list[str], questions: tuple[str, str], folder: Path) -> None:
    """Side by side, streamed, stopped, edited, retried."""
    assert page.text("#send") == ["发送"]
    page.choose(*models)
    page.set("temperature", 0)
    page.ask(questions[0])
    page.until(page.finished, "replies")
    assert page.text(".reply h2") == models and all(page.text(".said")), page.text(".said")
    page.choose(models[-1])
    page.ask(questions[1])
    page.until(page.finished, "a reply")
    page.set("max_tokens", 900)
    page.set("temperature", 5)  # noise seldom ends
    page.ask(questions[0])
    page.until(lambda: page.all(".reply.busy") and page.text(".turn:last-child .said")[0], "a beginning")
    page.click("#stop")
    page.until(page.finished, "stopping")
    assert any("已停止" in text for text in page.text(".turn:last-child footer")), page.text("footer")
    page.set("temperature", 0)
    page.set("max_tokens", 256)
    page.click(".turn:last-child .question button")
    area = page.all(".turn:last-child textarea")[0]
    area.clear()
    area.send_keys(questions[1])
    page.click(".turn:last-child form button")
    page.until(lambda: page.finished() and page.text(".turn:last-child .question p") == [questions[1]], "editing")
    before = page.text(".turn:last-child .said")
    page.click(".turn:last-child footer button")
    page.until(page.finished, "a second try")
    assert page.text(".turn:last-child .said") == before
    page.shoot(folder / "side-by-side.png")
    page.close()


def look(page: Page, models: list[str], question: str, folder: Path) -> None:
    """The inside of a reply, in English and the dark."""
    page.choose(*models)
    page.set("temperature", 0)
    page.ask(question)
    page.until(page.finished, "replies")
    page.click(".look", len(models) - 1)
    tokens, said = page.text(".token .word"), page.text(".said")[-1]
    assert len(tokens) > 3 and all(text.rstrip("✓✗") in said for text in tokens[:2]), (tokens, said)
    page.click(".token", 2)
    assert page.all(".token")[2].get_attribute("class") == "token chosen"
    assert len(page.text(".bars .value")) >= 8 and page.all(".scores i") and page.all(".layer i")
    assert "Inside" in page.text("#inside h2")[0]
    page.shoot(folder / "inside.png")
    page.click("#language")
    assert "内部" in page.text("#inside h2")[0]
    page.click("#inside h2 button")
    assert not page.all("#inside")[0].is_displayed()
    page.close()


def phone(page: Page, models: list[str], question: str, folder: Path) -> None:
    """Nothing is wider than a phone."""
    page.choose(*models[-2:])
    page.set("temperature", 0)
    page.ask(question)
    page.until(page.finished, "replies")
    page.click(".look")
    width = page.driver.execute_script("return document.documentElement.scrollWidth")
    assert width <= PHONE[0], f"the page is {width} wide"
    page.shoot(folder / "phone.png")
    page.close()


if __name__ == "__main__":
    command_line(lambda: call(check_web, __doc__ or ""))
