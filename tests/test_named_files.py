"""Files that the README and the docs name exist: tests that prove a line, figures, sources, and what links lead to."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "benchmarks/NOTES.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMED = re.compile(r"\b(?:tests|integration_tests|benchmarks|src|kernels|examples)/[\w/.*-]+\.(?:py|md|json|h|cpp|png)")
LINK = re.compile(r"\]\((?!https?:|#|mailto:)([^)#\s]+)")


def test_files_that_pages_name_exist():
    found = [(page, name) for page in PAGES for name in NAMED.findall(page.read_text())]
    assert len(found) > 100
    missing = [f"{page.name}: {name}" for page, name in found if not any(ROOT.glob(name))]
    assert not missing


def test_links_between_pages_lead_somewhere():
    found = [(page, target) for page in PAGES for target in LINK.findall(page.read_text())]
    assert len(found) > 100
    missing = [f"{page.name}: {target}" for page, target in found if not (page.parent / target).exists()]
    assert not missing
