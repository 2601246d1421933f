# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""
Draws docs/web_demo.png: the web page, in Chromium, with the model of `make demo`:

    visualchat web outputs/demo/model --examples digits &
    python docs/web_demo_figure.py http://127.0.0.1:7860 docs/web_demo.png
"""

import shutil
import sys

from playwright.sync_api import sync_playwright


def main(address: str, path: str) -> None:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 900, "height": 1380})
        page.goto(address)
        page.get_by_text("Two digits, then a third").click()
        page.wait_for_function("document.querySelectorAll('#chat [data-testid=bot]').length == 3")
        page.wait_for_selector("#undo:not([disabled])")
        page.wait_for_timeout(1000)  # buttons fade
        page.screenshot(path=path, clip={"x": 70, "y": 0, "width": 760, "height": 1180})


if __name__ == "__main__":
    main(*sys.argv[1:])
