"""The README's generated tables are those of the code, and what it names exists."""

import re
from pathlib import Path

import pytest
from readme import FILES, family_table, rendered

from sphkv_compile.testing.families import FAMILIES

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", FILES)
def test_generated_parts_are_up_to_date(name):
    text = (ROOT / name).read_text()
    assert rendered(text, FILES[name]) == text, "run: make docs"


def test_missing_part_is_named():
    with pytest.raises(ValueError, match="idioms"):
        rendered("nothing here", FILES["README.md"])


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_linked_files_exist(name):
    links = re.findall(r"\]\((?!http)([^)#]+)\)", (ROOT / name).read_text())
    missing = [link for link in links if not (ROOT / link).exists()]
    assert not missing


def test_make_targets_exist():
    named = set(
        re.findall(
            r"(?:`|^)make ([a-z-]+)",
            (ROOT / "README.md").read_text() + (ROOT / "CONTRIBUTING.md").read_text(),
            re.MULTILINE,
        )
    )
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"demo", "test"} <= named <= targets


def test_families_are_those_that_are_tried():
    """The rows themselves are held against the models in tests/integrations."""
    part = re.search(r"<!-- families -->\n(.*?)\n<!-- /families -->", (ROOT / "README.md").read_text(), re.DOTALL)
    rows = [line for line in part.group(1).splitlines() if line.startswith("| ")][1:]
    assert [row.split(" | ")[0].strip("| ") for row in rows] == [str(f) for f in FAMILIES], "run: make docs"
    assert family_table(rows) == part.group(1), "run: make docs"
