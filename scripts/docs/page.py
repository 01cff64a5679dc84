"""The manual's picture of the web page, drawn by the page itself in Chromium.

python scripts/docs/page.py [--width 1280] [--dark] [-o docs/images/page.png]
"""

import argparse
import io
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from PIL import Image
from playwright.sync_api import expect, sync_playwright

PROMPT = "a red circle above a blue square"


def main() -> None:
    """Start a server, draw four pictures on its page and write the screenshot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/images/page.png"))
    given = parser.parse_args()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        words = ["serve", "--port", str(port), "-o", folder]
        server = subprocess.Popen([sys.executable, "-m", "latentdiff", *words], stderr=subprocess.DEVNULL)
        try:
            address = f"http://127.0.0.1:{port}"
            wait_for(address)
            shot = screenshot(address, given.width, "dark" if given.dark else "light")
        finally:
            server.terminate()
            server.wait(60)
    Image.open(io.BytesIO(shot)).convert("P", palette=Image.Palette.ADAPTIVE, colors=64).save(
        given.output, optimize=True
    )


def wait_for(address: str) -> None:
    """Wait until the server answers. Raises SystemExit after a minute."""
    for _ in range(600):
        try:
            urllib.request.urlopen(f"{address}/health").close()
            return
        except OSError:
            time.sleep(0.1)
    raise SystemExit("the server did not answer within a minute")


def screenshot(address: str, width: int, scheme: str) -> bytes:
    """The page after four pictures, a PNG."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": 640}, color_scheme=scheme)
        page.goto(address)
        page.fill("#prompt", PROMPT)
        page.locator("#seed").evaluate("(field) => (field.value = '1')")
        page.click("#go")
        expect(page.locator("#gallery figure:not(.waiting) img")).to_have_count(4, timeout=60_000)
        expect(page.locator("#cancel")).to_be_hidden()
        page.wait_for_timeout(500)
        return page.screenshot(full_page=True)


if __name__ == "__main__":
    main()
