"""Benches: ours beside dense, in one run on one machine. ``sphkv bench`` and ``examples/bench/`` call them."""
