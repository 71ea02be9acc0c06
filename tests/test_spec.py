"""CacheSpec: what is accepted, and what an error says."""

import dataclasses

import pytest
import torch

from sphkv_compile.runtime.budget import WIDEST_FIRST, full_bytes, resolve
from sphkv_compile.spec import CacheSpec, Tier, parse_bytes
from sphkv_compile.storage.state import Geometry


@pytest.mark.parametrize(
    ("bits", "tier"),
    [
        (None, Tier(4, 4)),
        (3, Tier(3, 3)),
        ("K4V2", Tier(4, 2)),
        ((8, 4), Tier(8, 4)),
        (16, Tier(16, 16)),
        ("8", Tier(8, 8)),
    ],
)
def test_ways_to_give_bits(bits, tier):
    assert CacheSpec(bits=bits).tier == tier


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": 5}, "nearest is 4"),
        ({"bits": True}, "k_bits=True.*nearest is 2"),
        ({"bits": 4.4}, "nearest is 4"),
        ({"bits": (4,)}, "nearest is 4"),
        ({"bits": (4, 6)}, "v_bits=6.*nearest is 4"),
        ({"bits": "4V4"}, "expected the form 'K4V2'.*did you mean 'K4V4'"),
        ({"bits": "K9"}, "did you mean 'K8V8'"),
        ({"bits": "four"}, "did you mean 'K4V4'"),
        ({"bits": 4, "budget": 0.5}, "give one"),
        ({"sink": -1}, "nearest is 0"),
        ({"window": "130"}, "window='130': expected a whole number >= 0; the nearest is 130"),
        ({"window": 128.6}, "nearest is 129"),
        ({"window": True}, "nearest is 1"),
        ({"window": None}, "nearest is 0"),
        ({"seed": "a"}, "seed='a'.*nearest is 0"),
        ({"strict": "no"}, "strict='no': expected True or False"),
        ({"span": 100, "page": 64}, "whole number of pages.*nearest is span=64, page=64"),
        ({"span": 512, "page": 512}, "nearest is span=256, page=256"),
        ({"span": 32, "page": 64}, "nearest is span=64, page=64"),
        ({"codec": "axis_cosin"}, "did you mean 'axis_cosine'"),
        ({"policy": "keepall"}, "did you mean 'keep_all'"),
        ({"policy": "rdr"}, "needs a budget"),
        ({"policy": 3}, r"an object with plan\(\); .* 'rdr'"),
        ({"budget": 0.1, "tiers": "K4V2,K4V4"}, "expected the widest first.*did you mean 'K4V4,K4V2'"),
        ({"budget": 0.1, "tiers": "K2V8,K8V2,K4V4"}, "did you mean 'K8V2'"),
        ({"budget": 0.1, "tiers": ()}, "such as 'K8V4,K4V4,K4V2'"),
        ({"budget": 0.1, "tiers": ""}, "did you mean 'K4V4'"),
        ({"budget": 0.1, "tiers": 4}, "such as 'K8V4,K4V4,K4V2'"),
        ({"budget": 0.1, "tiers": "K4V4,K4V4"}, "expected the widest first"),
        ({"budget": 0.1, "tiers": "K16V16,K4V4"}, "expected 8 bits or less.*nearest is 'K8V8,K4V4'"),
        ({"budget": 0.1, "codec": "tree"}, "give one tier, such as tiers='K8V4', or codec='axis_cosine'"),
        ({"budget": 0.1, "page": 2, "span": 8}, "multiple of 4; the nearest is 4"),
        ({"budget": "512 parsecs"}, "512MiB"),
        ({"budget": 4096.0}, r"in \(0, 1\], such as 1.0, or 4096 for bytes"),
        ({"budget": -0.5}, r"in \(0, 1\], such as 0.125"),
        ({"budget": [1]}, r"budget \[1\]: expected a positive number of bytes, such as '512MiB'"),
        ({"budget": "1.5"}, r"in \(0, 1\]"),
        ({"budget": 25}, r"budget 25: expected .* in \(0, 1\], .*did you mean 0.25, for 25 %"),
        ({"budget": "25%"}, "did you mean 0.25, for 25 %"),
        ({"budget": "12.5 %"}, "did you mean 0.125"),
        ({"budget": "25"}, "did you mean 0.25"),
        ({"budget": 1.5}, "did you mean 1.0, all of them"),
        ({"budget": 1}, "did you mean 1.0"),
        ({"budget": "150%"}, "did you mean 1.0"),
        ({"budget": 0}, "positive"),
        ({"budget": "0MiB"}, "'0MiB'.*positive"),
        ({"budget": "0B/token"}, "'0B/token'.*positive"),
        ({"budget": "64/token"}, "did you mean '64B/token'"),
        ({"budget": "1.5 kb/tokens"}, "'64B/token'; did you mean '1.5KB/token'"),
        ({"budget": "64B/head"}, "did you mean '64B/token'"),
        ({"budget": "-5MiB"}, "did you mean '5MiB'"),
        ({"budget": "1.2.3MiB"}, "did you mean '1.2MiB'"),
        ({"budget": "all"}, "did you mean '64"),
        ({"budget": 0.1, "keep_all_heads": 1.2}, "nearest is 1"),
        ({"budget": 0.1, "keep_all_heads": -0.1}, "nearest is 0"),
        ({"budget": 0.1, "keep_all_heads": "a"}, r"a share in \[0, 1\]; the nearest is 0"),
        ({"budget": 0.1, "keep_all_heads": 0.1, "policy": "snapkv"}, "'snapkv'.*expected one of rdr"),
        ({"bits": 4, "keep_all_heads": 0.1}, "'keep_all'.*expected one of rdr"),
    ],
)
def test_a_bad_field_is_named_with_what_was_expected(fields, message):
    with pytest.raises(ValueError, match=message):
        CacheSpec(**fields)


def test_an_unknown_option_names_the_nearest():
    with pytest.raises(TypeError, match="did you mean 'window'"):
        CacheSpec.from_options({"windo": 3})


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("nbits", "did you mean 'bits'"),
        ("residual_length", "did you mean 'window'"),
        ("compression_ratio", "did you mean 'budget'.*stays: 0.25 for a ratio of 0.75"),
        ("max_cache_length", "give max_cache_len to the cache"),
        ("q_group_size", "give bits, and span"),
        ("axis_key", "nothing is grouped along an axis here"),
    ],
)
def test_a_name_of_another_tool_is_translated(key, said):
    """Bug: the nearest by spelling, such as 'inductor' for 'compression_ratio'."""
    with pytest.raises(TypeError, match=f"unknown option '{key}'; .*{said}"):
        CacheSpec.from_options({key: 3})


def test_bits_as_text_are_the_same_specification():
    assert CacheSpec(bits="4") == CacheSpec(bits=4) and CacheSpec(bits="4").uuid == CacheSpec(bits=4).uuid


def test_options_are_a_dict():
    with pytest.raises(TypeError, match=r"options='bits=4': expected a dict, such as \{'bits': 4\}"):
        CacheSpec.from_options("bits=4")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        *[("1KiB", 1024), ("2 MB", 2_000_000), ("1gib", 2**30), (77, 77), (0.25, 250), ("0.25", 250), ("9", 9)],
        *[("64B/token", 640), ("1.5 KiB/token", 15360), (".25b/token", 2)],
    ],
)
def test_budgets_in_bytes(value, expected):
    assert parse_bytes(value, dense=1000, tokens=10) == expected


SITES = [Geometry(1, 2, 1024, 64, 64, torch.bfloat16, torch.bfloat16, False)] * 3


def test_a_budget_buys_the_widest_tier_that_fits_and_no_wider():
    needs = [full_bytes(CacheSpec(bits=str(tier)), SITES) for tier in WIDEST_FIRST]
    assert needs == sorted(needs, reverse=True)
    for tier, need in zip(WIDEST_FIRST, needs):
        fixed = resolve(CacheSpec(budget=need, policy="keep_all"), SITES)
        assert fixed.tier == tier and full_bytes(fixed, SITES) <= need


def test_bytes_per_token_are_of_each_row_and_kv_head_over_the_capacity():
    """Of what a policy may drop: a sliding window neither counts nor takes."""
    sites = [Geometry(3, 2, 1024, 64, 64, torch.bfloat16, torch.bfloat16, False), SITES[0]._replace(capacity=2048)]
    every = resolve(CacheSpec(budget="40B/token", policy="keep_all"), [*SITES, SITES[0]])
    assert every == resolve(CacheSpec(budget=40 * 4 * 2 * 1024, policy="keep_all"), [*SITES, SITES[0]])
    assert resolve(CacheSpec(budget="40B/token"), [*SITES, SITES[0]]).budget == 40 * 4 * 2 * 1024
    assert resolve(CacheSpec(budget="40B/token"), [sites[1], *SITES]).budget == 40 * 2 * 2048
    rows = [sites[0], sites[0]._replace(heads=1)]
    assert resolve(CacheSpec(budget="40B/token"), rows).budget == 40 * 3 * 1024 * (2 + 1)
    with pytest.raises(ValueError, match=r"budget='1B/token' is 12,288 bytes; .* at least"):
        resolve(CacheSpec(budget="1B/token"), [*SITES, *SITES])


def test_a_budget_too_small_says_the_least_possible():
    least = full_bytes(CacheSpec(bits="K2V2"), SITES)
    with pytest.raises(ValueError, match=f"at least {least:,} bytes"):
        resolve(CacheSpec(budget=least - 1, policy="keep_all"), SITES)


def test_heads_that_keep_all_need_no_saying_where_all_do():
    spec = CacheSpec(budget=1.0, keep_all_heads=0.5)
    assert resolve(spec, SITES).keep_all_heads == 0
    assert resolve(dataclasses.replace(spec, budget=0.1), SITES).keep_all_heads == 0.5


def test_a_growing_cache_has_no_budget():
    with pytest.raises(ValueError, match="grows without limit"):
        resolve(CacheSpec(budget="1GiB"), [SITES[0]._replace(capacity=0)])
