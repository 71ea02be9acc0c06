"""A cache that is nobody's library: gpt-fast's own buffers, compiled with the spherical backend.

    python examples/gpt_fast.py --bits 4 --rope interleaved

The bundled SmolLM2's weights go into a plain PyTorch module (sphkv_compile/testing/gpt_fast.py) whose attention writes
``k_cache[:, :, input_pos] = k``. It decodes greedily twice, dense and through the backend, from the same code.
"""

from __future__ import annotations

from typing import Annotated

import torch
import typer
from rich.table import Table
from torch import Tensor
from transformers.utils import logging as transformers_logging

import sphkv_compile
from sphkv_compile.integrations.models import load_bundled
from sphkv_compile.printing import wide_console
from sphkv_compile.testing.compare import Run, decode, first_divergence
from sphkv_compile.testing.gpt_fast import GptFast, from_llama


@torch.no_grad()
def generate(model: GptFast, step: torch.nn.Module, ids: Tensor, count: int, stop: int) -> Run:
    """Eager prefill into fresh caches, then decoding through ``step``. Shapes: ids [1, S]."""
    model.setup_caches(max_batch=1, max_seq=ids.shape[1] + count)
    logits = model(ids, torch.arange(ids.shape[1]))

    def one(token: Tensor, position: int) -> Tensor:
        return step(token, torch.tensor([position]))

    return decode(one, logits, ids.shape[1], count, stop=(stop,))


def cache_bytes(model: GptFast) -> int:
    """Bytes that the cache buffers have allocated."""
    caches = [buffer for name, buffer in model.named_buffers() if name.endswith(("k_cache", "v_cache"))]
    return sum(buffer.untyped_storage().nbytes() for buffer in caches)


def main(
    bits: Annotated[int, typer.Option(help="Width of keys and values: 2, 3, 4 or 8.")] = 4,
    rope: Annotated[str, typer.Option(help="interleaved (gpt-fast's own) or half (transformers').")] = "interleaved",
    topic: Annotated[str, typer.Option(help="Chapter of Python's manual that is the prompt.")] = "async",
    max_new_tokens: Annotated[int, typer.Option(min=2)] = 48,
) -> None:
    """Decode with gpt-fast's own cache, dense and spherical."""
    from pydoc_data.topics import topics

    if rope not in ("interleaved", "half"):
        raise typer.BadParameter(f"--rope {rope}: expected interleaved or half")
    if topic not in topics:
        raise typer.BadParameter(f"--topic {topic}: expected one of {', '.join(sorted(topics))}")
    transformers_logging.disable_progress_bar()
    llama, tokenizer = load_bundled("smollm2")
    model = from_llama(llama, rope)
    ids = tokenizer(topics[topic], return_tensors="pt").input_ids
    stop = tokenizer.eos_token_id

    dense = generate(model, model, ids, max_new_tokens, stop)
    dense_bytes = cache_bytes(model)
    compiled = torch.compile(model, backend=sphkv_compile.backend, options={"bits": bits}, fullgraph=True)
    coded = generate(model, compiled, ids, max_new_tokens, stop)

    report = sphkv_compile.report(model)
    at = first_divergence(dense.tokens, coded.tokens)
    table = Table("", "text", "cache bytes", "tokens/s", title=f"{ids.shape[1]} tokens of prompt, {rope} RoPE")
    for name, run, held in (("dense", dense, dense_bytes), ("spherical", coded, report.resident_bytes)):
        table.add_row(name, tokenizer.decode(run.tokens), f"{held:,}", f"{run.tokens_per_second:.2f}")
    console = wide_console()
    console.print(report)
    console.print(table)
    console.print(f"greedy tokens that agree: {len(dense.tokens) if at is None else at} of {len(dense.tokens)}")


if __name__ == "__main__":
    typer.run(main)
