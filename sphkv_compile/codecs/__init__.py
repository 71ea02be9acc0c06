"""Angle codes of keys and values; one codec per file, the pipeline around them in ``keys`` and ``values``."""

from __future__ import annotations

import difflib

from sphkv_compile.codecs.axis_cosine import AxisCosine
from sphkv_compile.codecs.base import Codec
from sphkv_compile.codecs.chain import Chain
from sphkv_compile.codecs.pair_polar import PairPolar
from sphkv_compile.codecs.tree import Tree

CODECS: dict[str, type[Codec]] = {codec.name: codec for codec in (AxisCosine, PairPolar, Chain, Tree)}

__all__ = ["CODECS", "AxisCosine", "Chain", "Codec", "PairPolar", "Tree", "get_codec"]


def get_codec(name: str) -> Codec:
    """The codec of this name.

    Raises:
        ValueError: no such codec; the message names the nearest.
    """
    if name not in CODECS:
        near = difflib.get_close_matches(str(name), CODECS, n=1, cutoff=0.0)[0]
        raise ValueError(f"codec {name!r}: expected one of {', '.join(CODECS)}; did you mean {near!r}?")
    return CODECS[name]()
