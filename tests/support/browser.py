"""Headless Chromium, for the playground's test and its picture."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from selenium import webdriver


def missing_browser() -> str | None:
    """The first required program that is not on PATH; None if all are."""
    return next((name for name in ("chromium", "chromedriver") if shutil.which(name) is None), None)


@contextmanager
def browser(
    width: int = 1280, height: int = 800, dark: bool = False, still: bool = False
) -> Iterator[webdriver.Chrome]:
    """still: with the preference for reduced motion."""
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    # CI runs as root, which Chromium's sandbox does not allow.
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        theme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        motion = {"name": "prefers-reduced-motion", "value": "reduce" if still else "no-preference"}
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [theme, motion]})
        yield driver
    finally:
        driver.quit()
