"""Take the README's two pictures: `python docs/screenshots.py LINK IMAGE`, LINK as `lineup serve` printed it."""

import io
import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, ViewportSize, sync_playwright

FOLDER = Path(__file__).parent
DETECT: ViewportSize = {"width": 1200, "height": 1580}
MAP: ViewportSize = {"width": 1200, "height": 1240}


def save(page: Page, name: str) -> None:
    """Write what the window shows, in few enough colours for a small file."""
    picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    picture.quantize(256, dither=Image.Dither.NONE).save(FOLDER / name, optimize=True)


def main(link: str, image: str) -> None:
    """A verdict by day, the map by night."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport=DETECT, color_scheme="light")
        page.goto(link)
        page.locator("#view-detect input[type=file]").first.set_input_files(image)
        page.locator(".stability").wait_for()  # comes after the verdict
        page.wait_for_load_state("networkidle")
        save(page, "verdict.png")
        page = browser.new_page(viewport=MAP, color_scheme="dark")
        page.goto(f"{link}#/map")
        page.get_by_role("list", name="Kinds of references").get_by_role("listitem").first.wait_for()
        page.wait_for_load_state("networkidle")
        save(page, "map.png")
        browser.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
