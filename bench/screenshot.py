"""A picture of the search's page for the README: the page in Chromium, after a sentence was searched.

python train.py               the model, and the synthetic people whom the page shows
python bench/screenshot.py    writes bench/results/search-page.png; needs the extra 'serve', playwright and Chromium
"""

import argparse
import io
import shutil
import sys
import threading
from pathlib import Path
from typing import Any

from PIL import Image

from upperson.errors import Parser, RunError, exit_status
from upperson.files import write_atomically

SIZE: Any = {"width": 1200, "height": 820}
COLOURS = 256  # of the PNG file, which stays below 400 KB
SENTENCE = "a woman in a red coat with a small white handbag"


def main() -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sentence", nargs="?", default=SENTENCE)
    parser.add_argument("--index", help="(default: people.db, or the synthetic people of the newest run)")
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "search-page.png")
    options = parser.parse_args()
    chromium = shutil.which("chromium")
    if chromium is None:
        raise RunError("Chromium is missing; Debian has it in the package 'chromium'")

    import uvicorn

    from upperson.search import Gallery
    from upperson.search.page import listen
    from upperson.search.page.app import make_app

    with Gallery.find(options.index) as gallery, listen(port=0) as opened:
        server = uvicorn.Server(uvicorn.Config(make_app(gallery), log_level="warning", lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [opened]})
        thread.start()
        try:
            address = f"http://127.0.0.1:{opened.getsockname()[1]}/"
            png = screenshot(chromium, address, options.sentence, options.dark)
        finally:
            server.should_exit = True
            thread.join()
    small = io.BytesIO()
    Image.open(io.BytesIO(png)).convert("RGB").quantize(COLOURS).save(small, "PNG", optimize=True)
    write_atomically(options.output, small.getvalue())
    print(f"{options.output}: {len(small.getvalue()) / 1e3:.0f} KB")
    return 0


def screenshot(chromium: str, address: str, sentence: str, dark: bool) -> bytes:
    """PNG of the window after `sentence` was typed and searched."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport=SIZE, color_scheme="dark" if dark else "light")
        page.goto(address)
        page.get_by_role("searchbox").fill(sentence)
        page.keyboard.press("Enter")
        page.locator(".rank").first.wait_for()
        page.evaluate("Promise.all([...document.images].map(image => (image.loading = 'eager', image.decode())))")
        taken = page.screenshot()
        browser.close()
    return taken


if __name__ == "__main__":
    sys.exit(exit_status(main))
