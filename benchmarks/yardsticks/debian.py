"""English texts from the documentation packages of Debian: what the small causal model is trained on, and a held-out text.

    training_text()   about 25 MB of manuals
    manual_text()     the user's manual of aptitude, which is not in the training text

Packages are downloaded with `apt-get download` and unpacked with `dpkg-deb`; nothing is installed. The texts are cached
beside the models (`real_models.cache_dir()`), with the versions of their packages.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path

from yardsticks import example

real_models = example("real_models.py")

TRAINING = (
    "debian-reference-en",
    "debian-policy",
    "developers-reference",
    "debian-faq",
    "harden-doc",
    "git-doc",
    "postgresql-doc-15",
    "apache2-doc",
    "python3.11-doc",
    "sqlite3-doc",
    "python-django-doc",
)
MANUAL = "aptitude-doc-en"
#: characters of one package, so that none outweighs the others
MOST = 4_000_000


def training_text() -> str:
    """The training text, paragraphs separated by blank lines; the same packages give the same text."""
    return _cached("debian-documentation", TRAINING)


def manual_text() -> str:
    """The held-out text: prose about installing packages."""
    return _cached("debian-aptitude", (MANUAL,))


def paragraphs(html: str) -> list[str]:
    """The paragraphs of a page, without navigation, scripts and markup."""
    reader = _Reader()
    reader.feed(html)
    reader.close()
    return reader.found


class _Reader(HTMLParser):
    """Collects the text of block elements; text in `pre` keeps its lines."""

    BLOCKS = re.compile("p|li|dd|dt|h[1-6]|pre|td|th|blockquote|div|table|ul|ol|dl|section")
    IGNORED = re.compile("script|style|nav|head|footer|header|form|svg")

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.found: list[str] = []
        self._parts: list[str] = []
        self._ignored = 0
        self._pre = False

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self._ignored += self.IGNORED.fullmatch(tag) is not None
        if self.BLOCKS.fullmatch(tag):
            self._end()
            self._pre = tag == "pre"

    def handle_endtag(self, tag: str) -> None:
        self._ignored -= self._ignored > 0 and self.IGNORED.fullmatch(tag) is not None
        if self.BLOCKS.fullmatch(tag):
            self._end()

    def handle_data(self, data: str) -> None:
        if not self._ignored:
            self._parts.append(data)

    def close(self) -> None:
        super().close()
        self._end()

    def _end(self) -> None:
        text = "".join(self._parts)
        text = text.strip("\n").rstrip() if self._pre else re.sub(r"\s+", " ", text).strip()
        text = text.replace("\N{PILCROW SIGN}", "").replace("\xa0", " ").strip("\n")
        if len(text) > 20:
            self.found.append(text)
        self._parts, self._pre = [], False


def _cached(name: str, packages: Sequence[str]) -> str:
    path = real_models.cache_dir() / f"{name}.txt"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as work:
            parts = [_text_of(package, Path(work)) for package in packages]
            new = Path(work) / "text"
            new.write_text("\n\n".join(parts), encoding="utf-8")
            new.replace(path)
    return path.read_text(encoding="utf-8")


def _text_of(package: str, work: Path) -> str:
    folder = work / package
    folder.mkdir()
    try:
        subprocess.run(["apt-get", "download", package], cwd=folder, check=True, capture_output=True, text=True)
        (archive,) = folder.glob("*.deb")
        subprocess.run(
            ["dpkg-deb", "-x", str(archive), "files"], cwd=folder, check=True, capture_output=True, text=True
        )
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        raise real_models.ModelNotAvailable(
            f"the Debian package {package} could not be downloaded: {said.strip()}\nThese texts need `apt-get` and "
            f"`dpkg-deb` (Debian 12), or the files of another machine's {real_models.cache_dir()}"
        ) from error
    print(f"Reading {archive.name}", flush=True)
    seen: set[str] = set()
    kept: list[str] = []
    size = 0
    for page in sorted(folder.rglob("*.html*")):
        if page.suffix not in (".html", ".en") or not page.is_file() or page.is_symlink():
            continue
        html = page.read_text(encoding="utf-8", errors="ignore")
        language = re.search(r"<html[^>]*\blang=\"(\w\w)", html[:2000])
        if language and language[1] != "en":
            continue
        for text in paragraphs(html):
            # Lines of navigation and of licenses are on every page.
            if text not in seen and size < MOST and text.isascii():
                seen.add(text)
                kept.append(text)
                size += len(text)
    return "\n\n".join(kept)
