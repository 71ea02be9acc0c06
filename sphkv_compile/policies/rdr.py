"""Rate-distortion retention: what a token is worth to queries to come, and one joint choice of keeping it and how well.

A token's loss is its expected share of attention times the length of its value, all of it if it is dropped, a part if
its codes are coarse: keys' noise moves every weight of a softmax, values' noise does not, and neither adds up as drops
do.

Source: SPHERICAL KV (arXiv 2605.18856), retention. The weights of what is known come from prototypes.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from sphkv_compile.codecs.codebook import mse
from sphkv_compile.policies.base import Held, Policy
from sphkv_compile.policies.choice import choose
from sphkv_compile.spec import PASSTHROUGH

MEAN, EXPECTED, RECENT, PRIOR = 0.3, 0.3, 0.2, 0.2
"""Weights of what is known of a token's attention. Without rotary embeddings nothing is expected, and the recent mean
has that weight too."""
YOUTH = 64
"""Tokens that are added to an age, whose reciprocal is the prior."""
NOISE = 0.5
"""What noise counts against a loss of the same size. Drops add up where noise does not, but what a drop moves is shared
out again among the tokens that stay. Measured on two documents that are not reported (2,048 tokens, 256 after),
geometric mean of KL at 12.5 and 6.25 % of bfloat16's bytes: SmolLM2 .0035 and .0163 (.0034 and .0181 at 1), Gemma3
.0108 and .0676 (.0147 and .0672): examples/eval/noise.json."""
MOST = 0.98
"""Of a token's worth, what the coarsest codes lose."""
HYSTERESIS = 0.1
"""Of a token's worth, what a change of its tier costs, so that those near a border do not move at every plan."""


class Rdr(Policy):
    """Needs a budget; what else a site does not know, it does without."""

    name: ClassVar[str] = "rdr"
    shares: ClassVar[bool] = True
    expects: ClassVar[bool] = True

    def plan(self, held: Held, budget: Tensor | None) -> Tensor:
        """Shapes: -> uint8[B, H, P, page]. Raises: ValueError: no budget, or no prices."""
        return choose(held, self.worth(held), _kinds(held), self.losses(held), budget, self.name)

    def worth(self, held: Held) -> Tensor:
        """Expected share of attention, times the value's length. Shapes: -> float32[B, H, P, page]."""
        there = held.positions >= 0
        age = (held.length.view(-1, 1, 1, 1) - held.positions).clamp(min=1).float()
        prior = torch.where(there, 1 / (age + YOUTH), 0.0)
        if held.mean is None or held.recent is None:
            share = prior
        else:
            total = prior.sum((2, 3), keepdim=True).clamp(min=1e-30)
            prior = prior / total * torch.where(there, held.mean, 0.0).sum((2, 3), keepdim=True)
            expected = held.recent if held.expected is None else held.expected
            share = MEAN * held.mean + EXPECTED * expected + RECENT * held.recent + PRIOR * prior
        return share if held.value_norm is None else share * held.value_norm

    def losses(self, held: Held) -> Tensor:
        """Of each choice, the drop and then the narrowest tier first, in units of a token's worth; a row for the tokens
        of each tier, then one for those that no plan has seen.

        Shapes: -> float32[B, H, tiers + 1, tiers + 1].
        """
        choices = len(held.menu)
        kappa = torch.ones(held.tiers.shape[:2], device=held.positions.device) if held.kappa is None else held.kappa
        loss = [torch.ones_like(kappa)]
        for tier in reversed(held.menu):
            keys, values = (0.0 if bits == PASSTHROUGH else mse(bits) for bits in (tier.k_bits, tier.v_bits))
            loss.append((NOISE * (kappa * keys + values)).clamp(max=MOST))
        rows = torch.stack(loss, -1).unsqueeze(2).repeat(1, 1, choices + 1, 1)
        choice, own = torch.arange(choices + 1), choices - torch.arange(choices).unsqueeze(1)
        rows[:, :, :choices] += torch.where(choice == own, 0.0, HYSTERESIS).to(rows.device)
        return rows.masked_fill_(torch.cat([choice > own, choice.unsqueeze(0) < 0]).to(rows.device), torch.inf)


def _kinds(held: Held) -> Tensor:
    """Which row of the losses a token goes by. Shapes: -> int64[B, H, P, 1 or page]."""
    tier = held.tiers.long().unsqueeze(-1)
    new = tier == 0  # what was coded, and not chosen, is at the widest
    if held.fresh is not None:
        new = new & held.fresh
    return torch.where(new, len(held.menu), tier)
