"""Each family of transformers' models is matched, or refused for a reason that its code shows, as the README says."""

import inspect
import re
import sys
from pathlib import Path

import pytest
import transformers
from packaging.version import Version

from sphkv_compile.testing.families import FAMILIES, Family, Found, OtherTransformersError, try_family

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
KNOWN = re.search(r"^transformers==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE).group(1)
ALIKE = {
    "Llama 4", "Phi-MoE", "OLMoE", "Qwen3-Next", "Gemma 3, multimodal", "Gemma 4", "OLMo 3", "Cohere 2", "EXAONE 4",
    "GLM-4", "Helium", "OPT", "Falcon-H1", "Bamba", "Jamba",
}  # fmt: skip
"""Families whose attention and cache are as in another that is tried, and which take longer."""
DEFAULT = [pytest.param(f, marks=[pytest.mark.slow] * (f.name in ALIKE), id=f.name) for f in FAMILIES]
MATCHED = [pytest.param(f, id=f.name) for f in FAMILIES if f.refused is None]


def tried(family: Family, **kw) -> Found:
    """Skips where an older transformers has no such family or runs it otherwise; the known one must have them all."""
    try:
        return try_family(family, **kw)
    except OtherTransformersError as error:
        if Version(transformers.__version__) >= Version(KNOWN):
            raise
        pytest.skip(f"transformers {transformers.__version__}: {error}")


def close(found: Found) -> None:
    """Logits are dense attention's, and a lost key would have been noticed."""
    assert found.error <= found.tolerance < found.lost_key / 100


@pytest.mark.parametrize("family", DEFAULT)
def test_verdicts_logits_and_the_readme(family):
    found = tried(family)
    close(found)
    if family.refused is None:
        assert found.refusals == () and found.matched == found.attentions == found.layers > 0 < found.encoded
    else:
        assert found.refusals == (family.refused,) and found.matched == 0 < found.layers <= found.attentions
    assert found.row() in README.splitlines(), "run: make docs"


@pytest.mark.slow
@pytest.mark.parametrize("family", MATCHED)
def test_codes_are_what_is_attended_to(family):
    found = tried(family, bits=4)
    close(found)
    assert found.matched == found.layers and found.encoded > 0


@pytest.mark.slow
@pytest.mark.parametrize("family", MATCHED)
def test_over_a_growing_cache(family):
    """A sliding window that is cut off after each step is not stored whole, and stays dense."""
    found = tried(family, dynamic=True)
    close(found)
    (row,) = (row for row in README.splitlines() if row.startswith(f"| {family} |"))
    if "`sliding`" in row:
        assert set(found.refusals) == {"not_stored"} and found.matched < found.layers == found.attentions
    else:
        assert (found.idioms, found.refusals) == (("dynamic_cat",), ()) and found.matched == found.layers
    assert (found.encoded > 0) == (found.matched > 0)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.refused], ids=str)
def test_a_refusal_is_borne_out_by_the_models_code(family):
    config = transformers.AutoConfig.for_model(family.model_type)
    model = transformers.AutoModelForCausalLM._model_mapping[type(config)]
    assert family.evidence in inspect.getsource(sys.modules[model.__module__])


def test_an_unknown_family_is_said():
    with pytest.raises(OtherTransformersError, match="no model of type 'lama'"):
        try_family(Family("Lama", "lama"))


def test_another_attention_is_said():
    with pytest.raises(OtherTransformersError, match="'sdpa', which we know as 'eager'"):
        try_family(Family("Llama", "llama", refused="not_sdpa"))
