import shutil

import pytest

from switchlm.report.write import write_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or ""


@pytest.fixture(scope="module")
def browser():
    driver = pytest.importorskip("playwright.sync_api")
    if not CHROMIUM:
        pytest.skip("there is no chromium here")
    with driver.sync_playwright() as started:
        options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        found = started.chromium.launch(executable_path=CHROMIUM, args=options)
        yield found
        found.close()


@pytest.fixture
def draw(browser, tmp_path):
    """Write a report, open it and return the page; its console must be empty."""
    opened = []

    def draw(runs, **report):
        path = tmp_path / "report.html"
        write_report(path, title="t", headline="h", runs=runs, **report)
        page = browser.new_page(viewport={"width": 1200, "height": 900})
        opened.append(page)
        messages = []
        page.on("pageerror", lambda error: messages.append(str(error)))
        page.on("console", lambda message: messages.append(message.text))
        page.goto(path.as_uri())
        assert not messages
        return page

    yield draw
    for page in opened:
        page.close()
