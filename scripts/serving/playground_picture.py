"""Screenshots of the playground: while it answers, in light, dark and phone width; then the cycles of an answer.

python -m scripts.serving.playground_picture ENGINE OUT
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

from PIL import Image
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.select import Select
from selenium.webdriver.support.wait import WebDriverWait

from scripts.serving.server_process import KEY, serving
from tests.support.browser import browser

QUESTIONS = ("What is 60% of 440?", "Write a short story about Milo, who finds 37 stones and later 90 more.")
MODES = ("linear_spec", "diffusion")
SEEN_TOKENS = 250  # of both answers: enough to see
# name: width, height, dark
PICTURES = {"light": (1240, 620, False), "dark": (1240, 620, True), "phone": (390, 844, True)}
CYCLES = 1240, 760, False


def rejected_are_seen(page: Chrome) -> bool:
    """Whether rejected drafts of the last answers are visible."""
    tokens = page.find_elements(By.CSS_SELECTOR, ".turn .token")
    return len(tokens) > SEEN_TOKENS and bool(page.find_elements(By.CSS_SELECTOR, ".turn .rejected"))


def opened(page: Chrome, url: str, modes: tuple[str, str]) -> WebDriverWait[Chrome]:
    """The page with the key entered, in two lanes."""
    page.get(f"{url}/")
    wait = WebDriverWait(page, 30)
    key = page.find_element(By.ID, "key")
    wait.until(lambda _: key.is_displayed())
    key.send_keys(KEY, Keys.ENTER)
    page.execute_script("document.getElementById('key-field').hidden = true")
    page.find_element(By.ID, "compare").click()
    for field, mode in zip(page.find_elements(By.NAME, "mode"), modes, strict=True):
        Select(field).select_by_visible_text(mode)
    return wait


def ask(page: Chrome, wait: WebDriverWait[Chrome], question: str) -> None:
    wait.until(lambda page: page.find_element(By.ID, "send").is_enabled())
    page.find_element(By.ID, "prompt").send_keys(question, Keys.ENTER)


def save(page: Chrome, path: Path) -> None:
    picture = Image.open(io.BytesIO(page.get_screenshot_as_png())).convert("RGB")
    picture.quantize(256).save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("engine", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    with serving(options.engine) as server:
        for name, (width, height, dark) in PICTURES.items():
            with browser(width, height, dark, still=True) as page:
                wait = opened(page, server.url, MODES)
                for question in QUESTIONS:
                    ask(page, wait, question)
                wait.until(rejected_are_seen)
                save(page, options.out / f"playground-{name}.png")
        with browser(*CYCLES, still=True) as page:
            wait = opened(page, server.url, ("linear_spec", "auto"))
            Select(page.find_element(By.NAME, "tree_width")).select_by_visible_text("32")
            for question in QUESTIONS:  # in the first, auto measures passes
                ask(page, wait, question)
            wait.until(lambda page: page.find_element(By.ID, "send").is_enabled())
            for summary in page.find_elements(By.CSS_SELECTOR, ".cycles summary")[1::2]:
                summary.click()
            wait.until(lambda page: len(page.find_elements(By.CSS_SELECTOR, ".lane:has(.drafts)")) == len(MODES))
            page.execute_script("document.querySelectorAll('.talk').forEach((talk) => { talk.scrollTop = 1e6; })")
            page.execute_script("document.activeElement.blur()")
            save(page, options.out / "playground-cycles.png")


if __name__ == "__main__":
    main()
