"""Check a built site without a network: python book/check_site.py _build/html

Reports, one line each:
- an internal link whose file or anchor does not exist;
- anything but an <a> that points at another host (scripts, styles, fonts: the book must read offline);
- an image without alternative text;
- with --repository URL: a link into the repository (source, Colab, Binder) to a file that is not there.
"""

import argparse
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

SVG_NAMES = {"image", "use", "feimage", "lineargradient", "radialgradient", "pattern", "textpath", "mpath"}
LOADS = {
    "src",
    "srcset",
    "poster",
    "data",
    "action",
    "background",
}  # attributes that make a browser fetch something
CSS_URL = re.compile(r"(?:url\(|@import)\s*[\"']?\s*((?:https?:)?//[^\"')\s;]+)", re.IGNORECASE)
OTHER_HOST = re.compile(r"^(?:https?:|wss?:|ftp:)?//", re.IGNORECASE)


class Page(HTMLParser):
    """The links, anchors and loaded addresses of one page."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.loads: list[tuple[str, str]] = []
        self.without_alt: list[str] = []
        self.in_style = False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        values = {name: value or "" for name, value in attributes}
        self.anchors.update(values[name] for name in ("id", "name") if name in values)
        self.in_style = tag == "style"
        if tag == "a":
            self.links.extend(values[name] for name in ("href", "xlink:href") if name in values)
        elif tag == "link" or tag in SVG_NAMES:
            self.loads.extend((tag, values[name]) for name in ("href", "xlink:href") if name in values)
        self.loads.extend((tag, values[name]) for name in LOADS & values.keys())
        self.loads.extend((tag, address) for address in CSS_URL.findall(values.get("style", "")))
        if tag == "img" and (not values.get("alt", "").strip() or "_images/" in values["alt"]):
            self.without_alt.append(values.get("src", "")[:80])

    def handle_data(self, text):
        if self.in_style:
            self.loads.extend(("style", address) for address in CSS_URL.findall(text))

    def handle_endtag(self, tag):
        self.in_style = False


def check(site: Path, *, repository: str | None = None, tree: Path = Path(".")) -> list[str]:
    """The problems of the site in the folder ``site``, as sentences; an empty list where there are none."""
    site = site.resolve()
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}
    if not pages:
        return [f"{site}: no page at all"]
    problems = []
    for path, page in pages.items():
        name = path.relative_to(site)
        problems += [f"{name}: image without alternative text: {source}" for source in page.without_alt]
        for tag, address in page.loads:
            if OTHER_HOST.match(address):
                problems.append(f"{name}: <{tag}> loads from another host: {address}")
            elif tag != "form" and (missing := _missing(address, path, site, pages)):
                problems.append(f"{name}: <{tag}> {missing}")
        for address in page.links:
            if OTHER_HOST.match(address):
                if repository and (missing := _missing_source(address, repository, tree)):
                    problems.append(f"{name}: {missing}")
            elif missing := _missing(address, path, site, pages):
                problems.append(f"{name}: {missing}")
    for path in sorted(site.rglob("*.css")):
        text = path.read_text(encoding="utf-8", errors="replace")
        problems += [f"{path.relative_to(site)}: loads from another host: {a}" for a in CSS_URL.findall(text)]
    for path in sorted(site.rglob("*.svg")):
        loads = Page(path.read_text(encoding="utf-8", errors="replace")).loads
        problems += [
            f"{path.relative_to(site)}: loads from another host: {a}" for _, a in loads if OTHER_HOST.match(a)
        ]
    return problems


def _missing(address: str, path: Path, site: Path, pages: dict[Path, Page]) -> str | None:
    """Why an internal address leads nowhere, or None."""
    parts = urlsplit(address)
    if parts.scheme:  # mailto:, data:, javascript:
        return None
    target = path if not parts.path else (path.parent / unquote(parts.path)).resolve()
    if target.is_dir():
        target = target / "index.html"
    if not target.is_relative_to(site) or not target.is_file():
        return f"broken link: {address}"
    if parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].anchors | {"top"}:
        return f"no such anchor: {address}"
    return None


def _missing_source(address: str, repository: str, tree: Path) -> str | None:
    """Why a link into the repository leads nowhere, or None (also for every other address)."""
    parts = urlsplit(address)
    slug = urlsplit(repository).path.strip("/")
    inside = re.search(rf"/{re.escape(slug)}/(?:blob|tree|edit|raw)/[^/]+/(.+)$", parts.path)
    if inside:
        wanted = inside.group(1)
    elif f"/gh/{slug}/" in parts.path and "urlpath" in parse_qs(parts.query):
        wanted = re.sub(r"^(?:lab/)?tree/", "", parse_qs(parts.query)["urlpath"][0])
    else:
        return None
    wanted = unquote(wanted)
    return None if (tree / wanted).exists() else f"no such file in the repository: {wanted}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("site", type=Path)
    parser.add_argument("--repository", help="address of the repository that source links point into")
    options = parser.parse_args()
    problems = check(options.site, repository=options.repository)
    print(
        "\n".join(problems) if problems else f"{options.site}: links, anchors, images and hosts are in order"
    )
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
