"""print() shows what rich shows, and nothing is cut where there is no terminal."""

import pytest
import torch
from rich.console import Console
from rich.table import Table

import sphkv_compile
from sphkv_compile.doctor import Check, Diagnosis
from sphkv_compile.integrations.transformers import cache_keyword
from sphkv_compile.printing import as_text, wide_console
from sphkv_compile.testing.tiny import tiny


@pytest.fixture(autouse=True)
def no_width(monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)


def test_a_table_is_as_wide_as_it_needs_without_a_terminal():
    """Bug: 80 columns, and what does not fit is cut."""
    table = Table(*(f"column {i}" for i in range(40)))
    assert Console().width == 80
    assert "column 39" in as_text(table) and "\u2026" not in as_text(table)
    assert not any(line.endswith(" ") for line in as_text(table).splitlines())


def test_a_width_that_is_given_is_kept(monkeypatch):
    monkeypatch.setenv("COLUMNS", "91")
    assert wide_console().width == 91


def test_colours_do_not_get_into_the_text(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    text = str(Diagnosis({}, [Check("kernels", False, "no compiler", 0.1)]))
    assert "FAILED: kernels" in text and "\x1b" not in text


def test_an_explanation_and_a_report_print_as_tables():
    """Bug: the dataclass's repr."""
    model = tiny("llama", head_dim=16)
    cache = sphkv_compile.SphericalCache(model.config, bits=4)
    with torch.no_grad():
        model(torch.arange(9)[None], **{cache_keyword(model): cache})
    explanation, report = sphkv_compile.explain(model, measure=False), sphkv_compile.report(cache)
    assert "2 of 2 attentions matched, in 1 graph, at K4V4." in str(explanation)
    assert "bytes/token" in f"{explanation}" and "\u2026" not in str(explanation)
    assert "resident, allocated" in str(report) and "max logit var" in str(report)
    assert repr(explanation).startswith("Explanation(rows=[SiteRow(") and repr(report).startswith("Report(sites=[")
