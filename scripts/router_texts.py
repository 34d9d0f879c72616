#!/usr/bin/env python3
"""Texts that the shipped token routers learn from, out of Debian packages: the same bytes every time, a file for each kind.

    apt-get download python3.11-doc libpython3.11-stdlib debian-handbook dict-gcide
    for package in *.deb; do dpkg-deb -x "$package" unpacked; done
    scripts/router_texts.py unpacked texts
    foveate train-router -m smollm2-135m-instruct -f texts/manual.txt -f texts/code.txt -f texts/book.txt -f texts/dictionary.txt

Of every kind it takes pieces that are spread evenly over the package, up to --bytes of text. Needs Python 3.10 or newer and nothing
beside it."""
import argparse
import gzip
import html.parser
from pathlib import Path

# Long enough for tokens that matter thousands of tokens later.
PIECE = 24_000


class Text(html.parser.HTMLParser):
    """What a page says: no markup, no scripts, a line for each paragraph."""

    BLOCKS = {"p", "div", "li", "h1", "h2", "h3", "h4", "h5", "pre", "td", "dt", "dd"}
    HIDDEN = {"script", "style", "head", "nav"}

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.hidden = 0

    def handle_starttag(self, tag, attrs):
        self.hidden += tag in self.HIDDEN

    def handle_endtag(self, tag):
        self.hidden -= tag in self.HIDDEN
        if tag in self.BLOCKS:
            self.parts.append("\n")

    def handle_data(self, data):
        if not self.hidden:
            self.parts.append(data)


def page(path: Path) -> str:
    parser = Text()
    parser.feed(path.read_text(encoding="utf-8", errors="replace"))
    lines = (line.strip() for line in "".join(parser.parts).splitlines())
    return "\n".join(line for line in lines if line)


def plain(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def files(root: Path, pattern: str, read, most: int) -> str:
    """The first piece of files that lie evenly in the sorted list."""
    paths = [path for path in sorted(root.glob(pattern)) if path.is_file() and path.stat().st_size >= PIECE // 2]
    if not paths:
        raise SystemExit(f"{root}/{pattern}: nothing there; unpack the packages named in --help")
    wanted = max(1, most // PIECE)
    step = max(1, len(paths) // wanted)
    return "\n".join(read(path)[:PIECE] for path in paths[::step])[:most]


def dictionary(root: Path, most: int) -> str:
    path = root / "usr/share/dictd/gcide.dict.dz"
    if not path.is_file():
        raise SystemExit(f"{path} is not there; unpack the packages named in --help")
    text = gzip.decompress(path.read_bytes()).decode("utf-8", errors="replace")
    wanted = max(1, most // PIECE)
    return "\n".join(text[at : at + PIECE] for at in range(PIECE, len(text) - PIECE, len(text) // wanted))[:most]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("unpacked", type=Path, help="where the packages were unpacked")
    parser.add_argument("out", type=Path, help="where the texts go")
    parser.add_argument("--bytes", type=int, default=250_000, help="of each kind, about")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    doc = args.unpacked / "usr/share/doc"
    kinds = {
        "manual": files(doc / "python3.11/html/_sources", "**/*.rst.txt", plain, args.bytes),
        "code": files(args.unpacked / "usr/lib/python3.11", "**/*.py", plain, args.bytes),
        "book": files(doc / "debian-handbook/html/en-US", "*.html", page, args.bytes),
        "dictionary": dictionary(args.unpacked, args.bytes),
    }
    for kind, text in kinds.items():
        (args.out / f"{kind}.txt").write_text(text, encoding="utf-8")
        print(f"{kind}.txt: {len(text.encode())} bytes")


if __name__ == "__main__":
    main()
