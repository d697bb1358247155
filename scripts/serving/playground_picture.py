"""Screenshots of the playground while it answers: light, dark, phone width.

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


def rejected_are_seen(page: Chrome) -> bool:
    """Whether rejected drafts of the last answers are visible."""
    tokens = page.find_elements(By.CSS_SELECTOR, ".turn .token")
    return len(tokens) > SEEN_TOKENS and bool(page.find_elements(By.CSS_SELECTOR, ".turn .rejected"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("engine", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    with serving(options.engine) as server:
        for name, (width, height, dark) in PICTURES.items():
            with browser(width, height, dark, still=True) as page:
                page.get(f"{server.url}/")
                wait = WebDriverWait(page, 30)
                key = page.find_element(By.ID, "key")
                wait.until(lambda _, key=key: key.is_displayed())  # type: ignore[misc]
                key.send_keys(KEY, Keys.ENTER)
                page.execute_script("document.getElementById('key-field').hidden = true")
                page.find_element(By.ID, "compare").click()
                for field, mode in zip(page.find_elements(By.NAME, "mode"), MODES, strict=True):
                    Select(field).select_by_visible_text(mode)
                for question in QUESTIONS:
                    wait.until(lambda page: page.find_element(By.ID, "send").is_enabled())
                    page.find_element(By.ID, "prompt").send_keys(question, Keys.ENTER)
                wait.until(rejected_are_seen)
                picture = Image.open(io.BytesIO(page.get_screenshot_as_png())).convert("RGB")
                picture.quantize(256).save(options.out / f"playground-{name}.png", optimize=True)


if __name__ == "__main__":
    main()
