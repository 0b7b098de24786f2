"""Take the screenshot of the page for the docs, from a running server.

switchlm serve --model RUN --port 8000
python -m tests.serving.screenshot http://127.0.0.1:8000/ docs/page.png
"""

import argparse
import shutil

from playwright.sync_api import Page, sync_playwright

ARGUMENTS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip


def pose(page: Page, text: str | None, layer: int, token: int) -> None:
    """Fill a text (None: the example of the page), choose a layer, point at a token."""
    if text is not None:
        page.fill("#text", text)
    page.click("#submit")
    page.wait_for_selector("#stacks figure")
    for name in ("encoder", "decoder"):
        slider = page.locator(f"#{name}-layer")
        if slider.count() and slider.is_enabled():
            page.focus(f"#{name}-layer")
            for _ in range(layer):
                page.keyboard.press("ArrowRight")
    page.evaluate("document.activeElement.blur()")
    page.locator(".tokens").first.locator(".token").nth(token).hover()
    page.wait_for_timeout(200)


def main() -> None:
    """Read the arguments and write one PNG."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("url")
    parser.add_argument("out")
    parser.add_argument("--text", help="instead of the page's example; \\n is a line end")
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--width", type=int, default=1180)
    parser.add_argument("--layer", type=int, default=1, help="how many layers up the sliders stand")
    parser.add_argument("--token", type=int, default=12, help="the token pointed at")
    chosen = parser.parse_args()
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=ARGUMENTS)
        page = browser.new_page(
            viewport={"width": chosen.width, "height": 800},
            color_scheme="dark" if chosen.dark else "light",
        )
        page.goto(chosen.url)
        text = chosen.text and chosen.text.replace("\\n", "\n")
        pose(page, text, chosen.layer, chosen.token)
        page.screenshot(path=chosen.out, full_page=True)
        browser.close()


if __name__ == "__main__":
    main()
