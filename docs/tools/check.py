"""Every page of the built site in Chromium: wide and narrow, light and dark; formulas and search.

    make docs-check                        after apt-get install chromium
    make docs-check CHECK="--shots DIR"    and a picture of each page

Nothing may be cut off, fail to load, come from elsewhere, or complain in the console.
"""

import argparse
import functools
import http.server
import itertools
import shutil
import threading
from pathlib import Path

from playwright.sync_api import Browser, Page, Request, sync_playwright

SITE = Path(__file__).parents[2] / "site"
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
SIZES = {"wide": (1400, 900), "phone": (390, 844)}
SCHEMES = ("light", "dark")
FORMULAS = {"method.html": 20, "cost.html": 2, "objectives.html": 6}  # at least so many
# what is typed or pasted into the search: the page that must be first
SEARCHES = {
    "SelfAlignment": "reference/torch.html",
    "ema_update": "reference/ema.html",
    "student_layer must come before teacher_layer. Received: student 8, teacher 3.": "errors.html",
    "The projector must be trained with the model": "errors.html",
    "x0 and noise must have the same shape [B, ...]. Received: x0 (2, 3), noise (2, 4). "
    "Draw the noise like x0.": "errors.html",
    "update() must follow each optimizer step": "errors.html",
    "max_gap must be in [0, 1]. Received: 200. "
    "It is a fraction of the path's time axis, 0.2 in the paper.": "errors.html",
}

# What is asked of a page

TEXT = ", ".join(f"article {tag}" for tag in ("p", "li", "h1", "h2", "h3", "math"))
OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
# text that sticks out of the article and can be neither seen nor scrolled to
CUT = f"""() => [...document.querySelectorAll("{TEXT}")]
    .filter(e => {{
        const box = e.getBoundingClientRect();
        const scrolls = e.closest("div.formula, .md-typeset__scrollwrap, pre");
        return box.width > 0 && box.right > innerWidth + 1 && !scrolls;
    }})
    .map(e => e.textContent.slice(0, 60))"""
LONG = """() => [...document.querySelectorAll(".formula")]
    .filter(e => e.scrollWidth > e.clientWidth).map(e => e.textContent)"""
IMAGES = """() => [...document.images]
    .filter(i => i.complete && i.naturalWidth === 0).map(i => i.src)"""
FLAT = """() => [...document.querySelectorAll("math")].map(e => e.getBoundingClientRect())
    .filter(box => box.width * box.height < 9).length"""
FOUND = "/matching/.test(document.querySelector('.md-search-result__meta').innerText)"


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves files without a log."""

    def log_message(self, *_: object) -> None:
        pass


def watch(page: Page, home: str) -> list[str]:
    """What a page complains of from now on."""
    complaints: list[str] = []

    def see_request(request: Request) -> None:
        if not request.url.startswith((home, "data:", "blob:")):
            complaints.append(f"elsewhere: {request.url}")

    page.on(
        "console",
        lambda m: m.type in ("error", "warning") and complaints.append(f"console: {m.text}"),
    )
    page.on("pageerror", lambda error: complaints.append(f"error: {error}"))
    page.on("requestfailed", lambda request: complaints.append(f"failed: {request.url}"))
    page.on("response", lambda r: r.status >= 400 and complaints.append(f"{r.status}: {r.url}"))
    page.on("request", see_request)
    return complaints


def look(page: Page, name: str) -> list[str]:
    """What is wrong with a page that has been loaded."""
    wrong = []
    over = page.evaluate(OVERFLOW)
    if over > 0:
        wrong.append(f"wider than the window by {over}")
    wrong += [f"cut off: {text!r}" for text in page.evaluate(CUT)]
    wrong += [f"formula too long: {text}" for text in page.evaluate(LONG)]
    wrong += [f"no picture: {src}" for src in page.evaluate(IMAGES)]
    flat = page.evaluate(FLAT)
    if flat:
        wrong.append(f"{flat} formulas without size")
    count = page.locator("math").count()
    if count < FORMULAS.get(name, 0):
        wrong.append(f"{count} formulas only")
    if len(page.locator("article").inner_text()) < 80:
        wrong.append("nothing on it")
    return wrong


def pages(browser: Browser, home: str, shots: Path | None) -> list[str]:
    """What is wrong with the pages."""
    files = [file for file in SITE.rglob("*.html") if file.name != "404.html"]
    names = sorted(str(file.relative_to(SITE)) for file in files)
    wrong = []
    for size, scheme in itertools.product(SIZES, SCHEMES):
        width, height = SIZES[size]
        viewport = {"width": width, "height": height}
        context = browser.new_context(viewport=viewport, color_scheme=scheme)
        page = context.new_page()
        complaints = watch(page, home)
        for name in names:
            page.goto(home + name, wait_until="load")
            found = [*look(page, name), *complaints]
            complaints.clear()
            wrong += [f"{name} ({size}, {scheme}): {what}" for what in found]
            if shots:
                file = f"{name.replace('/', '_')}.{size}.{scheme}.png"
                page.screenshot(path=shots / file, full_page=True)
        context.close()
        print(f"{len(names)} pages, {size}, {scheme}")
    return wrong


def searches(browser: Browser, home: str) -> list[str]:
    """Which searches do not find their page first."""
    page = browser.new_page(viewport={"width": 1400, "height": 900})
    complaints = watch(page, home)
    wrong = []
    for query, expected in SEARCHES.items():
        page.goto(home + "index.html", wait_until="networkidle")  # the index has been read
        page.click(".md-search__input")
        page.keyboard.insert_text(query)
        page.keyboard.press("End")  # the search listens to keys
        page.wait_for_function(FOUND)
        links = page.locator(".md-search-result__link")
        first = (links.first.get_attribute("href") if links.count() else None) or "nothing"
        print(f"search {query!r}: {first.removeprefix(home)}")
        if expected not in first:
            wrong.append(f"search {query!r} leads to {first}")
    return wrong + complaints


def settings() -> argparse.Namespace:
    """The command line."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    parser.add_argument("--shots", type=Path, help="folder for a picture of each page")
    parser.add_argument("--chromium", default=chromium)
    options = parser.parse_args()
    if options.chromium is None:
        raise SystemExit(
            "No Chromium found. Install it (apt-get install chromium), or pass --chromium PATH."
        )
    return options


def main() -> None:
    options = settings()
    if options.shots:
        options.shots.mkdir(parents=True, exist_ok=True)
    handler = functools.partial(Quiet, directory=str(SITE))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    home = f"http://127.0.0.1:{server.server_port}/"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=options.chromium, args=FLAGS)
        wrong = searches(browser, home) + pages(browser, home, options.shots)
        browser.close()
    server.shutdown()
    if wrong:
        raise SystemExit("\n".join(wrong))
    print("The site is in order.")


if __name__ == "__main__":
    main()
