"""Compiles every shipped configuration of the GPU's kernels without a GPU, and prints what the compiler reports.

    python tests/kernels/compile_all.py 90          # the compute capability, times ten
    python tests/kernels/compile_all.py 90 0 8      # the first and the last configuration only

One JSON object a line: kernel, configuration, registers, spilled bytes, and marks in the generated code.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sphkv_compile.kernels.gpu import append as appending
from sphkv_compile.kernels.gpu import bulk, launch, moving, statistics
from sphkv_compile.spec import Tier
from sphkv_compile.storage.layout import Layout
from sphkv_compile.storage.moves import Moves
from sphkv_compile.storage.state import Geometry, empty_state

TYPES = {
    torch.float64: "*fp64", torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int8: "*i8",
    torch.uint8: "*u8", torch.int32: "*i32", torch.int64: "*i64",
}  # fmt: skip
OPTIONS = ("num_warps", "num_stages", "launch_pdl", "maxnreg", "enable_fp_fusion")
CONFIGURATIONS = [  # tier or menu of kept tokens, head_dim, dtype, masked, rolling; kv heads, columns where not usual
    ("K4V4", 128, torch.bfloat16, True, False),
    ("K4V4", 128, torch.bfloat16, False, False),
    ("K4V2", 128, torch.float16, False, False),
    ("K3V2", 128, torch.bfloat16, True, False),
    ("K2V2", 128, torch.bfloat16, False, True),
    ("K3V3", 128, torch.bfloat16, False, False),
    ("K4V4", 64, torch.float32, True, False),
    ("K4V2", 64, torch.bfloat16, True, True),
    ("K4V4", 256, torch.bfloat16, True, True),
    ("K4V4", 256, torch.bfloat16, False, False),
    ("K4V4/K4V2", 128, torch.bfloat16, True, False),
    ("K4V4/K4V2", 128, torch.bfloat16, False, False),
    ("K8V4/K4V4/K4V2", 128, torch.bfloat16, False, False),
    ("K8V4/K4V4/K4V2", 256, torch.bfloat16, True, False),
    ("K4V4/K4V2", 64, torch.float32, True, False),
    ("K8V8/K8V4/K2V4", 64, torch.bfloat16, True, False),
    ("K8V4", 128, torch.bfloat16, False, False),
    ("K8V8", 64, torch.bfloat16, True, False),
    ("K8V4", 256, torch.float16, True, True),
    ("K4V4/K4V2", 128, torch.bfloat16, False, False, 1, 300),  # numbers that are 1 are known to the compiler
    ("K4V4/K4V2", 128, torch.bfloat16, False, False, 1, 500),
    ("K4V4", 128, torch.bfloat16, True, False, 512, 1024),  # every part looks at a thousand rows and heads
]


class Recorder:
    """Stands in for a kernel: keeps the arguments of its launch."""

    def __init__(self, kernel, calls):
        self.kernel, self.calls = kernel, calls

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.calls.append((self.kernel, args, kwargs))


def launches(capability, tier, dim, dtype, masked, rolling, heads=8, columns=4096):
    """What one decode step and one chunk of a prefill launch, on tensors that hold nothing."""
    menu = tuple(map(Tier.parse, tier.split("/")))
    layout = Layout("axis_cosine", menu, 4, 128, 128, 64, 0, "half", dim, "tiles", kept=len(menu) > 1)
    batch = 2 if masked else 1  # two rows are divided by a list
    geometry = Geometry(batch, heads, columns, dim, dim, dtype, dtype, rolling, 4)
    state, calls = empty_state(layout, geometry, torch.zeros(1 << 16, dtype=torch.uint8)), []
    for module, names in (
        (launch, ("prepare", "decode", "combine")),
        (appending, ("append",)),
        (bulk, ("encode_spans", "extents", "turn_queries", "prefill")),
        (moving, ("gather_pages", "put_pages")),
        (statistics, ("page_attention", "page_statistics")),
    ):
        for name in names:
            kernel = getattr(module, name)
            setattr(module, name, Recorder(kernel.kernel if isinstance(kernel, Recorder) else kernel, calls))
    launch.converts, launch._depends = (lambda device: capability >= 89), (lambda device: capability >= 90)
    bulk.converts = statistics.converts = moving.converts = launch.converts
    launch.processors = bulk.processors = lambda device: 132
    q, k, v = (torch.zeros(batch, n * heads, 1, dim, dtype=dtype) for n in (4, 1, 1))
    mask = torch.zeros(1, 1, 1, columns, dtype=torch.bool) if masked else None
    pos = torch.zeros(1, dtype=torch.int64)
    launch.attend(state, layout, q, k, v, pos, None, columns, mask, None, rolling)
    launch.append(state, layout, q, k, v, pos, None, mask, rolling)
    if heads != 8:  # the others are the same
        return calls
    if layout.kept:
        n = len(menu)
        offsets, token = torch.zeros(n, dtype=torch.int32), torch.zeros(n, 64, dtype=torch.uint8)
        moving.move(state, layout, Moves((1,) * n, offsets, offsets, token.int(), token, token))
        state.held.fill_(bulk.PART)
        rows, exact = torch.zeros(batch, heads, 512, dim), torch.zeros(batch, heads, 512)
        for parts in ((64, 64), (128,)):
            statistics.mean_attention(state, layout, rows, exact, torch.arange(128), parts)
        statistics.remember(state, layout, torch.zeros(*state.table.shape, 64), 0, 1000, 128)
    q, k, v = (torch.zeros(1, n * heads, 256, dim, dtype=dtype) for n in (4, 1, 1))
    mask = torch.zeros(1, 1, 256, columns, dtype=torch.bool)
    bulk.encode(state, layout, torch.zeros(1, dtype=torch.int64), k, v, 4, range(1), 0)
    lo, hi, _ = bulk.extents_of(mask, columns)
    bits = torch.zeros(1, 256, 134, dtype=torch.int32) if masked else None
    bounds = (lo, hi, bits) if masked or rolling else (None, None, None)
    bulk.over_codes(state, layout, q, k, v, 2000, 0, columns, not masked, None, *bounds)
    few = (x[:, :, :4] for x in (q, k, v))  # so few queries that a row is cut into parts
    bulk.over_codes(state, layout, *few, 2000, 0, columns, False, None, lo[:, :4], hi[:, :4], None)
    return calls


def compiled(kernel, args, kwargs, capability):
    """The kernel for ``capability``, specialised as a launch would do it."""
    options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
    signature, constants, attributes = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        free = i < len(args) and kernel.params[i].do_not_specialize
        if i >= len(args) or (isinstance(args[i], int) and args[i] == 1 and not free):
            signature[name], constants[name] = "constexpr", kwargs[name] if i >= len(args) else 1
            continue
        value = args[i]
        if isinstance(value, float):
            signature[name] = "fp32"
        elif isinstance(value, int):
            signature[name] = "i32"
        else:
            signature[name] = TYPES[value.dtype]
        if not isinstance(value, (float, int)) or (isinstance(value, int) and value % 16 == 0 and not free):
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def report(code, capability):
    """Registers and spills from the assembler, marks from the code."""
    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder, "kernel.ptx")
        ptx.write_text(code.asm["ptx"])
        assembler = triton.knobs.nvidia.ptxas_blackwell if capability >= 100 else triton.knobs.nvidia.ptxas
        name = f"--gpu-name=sm_{capability}{'a' if capability >= 90 else ''}"
        said = subprocess.run([assembler.path, "-v", name, ptx, "-o", "/dev/null"], capture_output=True, text=True)
    return {
        "registers": int(re.findall(r"Used (\d+) registers", said.stderr)[-1]),
        "spilled": sum(map(int, re.findall(r"(\d+) bytes spill stores", said.stderr))),
        "mma": code.asm["ptx"].count("mma.sync"),
        "wgmma": code.asm["ptx"].count("wgmma.mma"),
        "e4m3": code.asm["ptx"].count("e4m3x2"),
        "dependent": code.asm["ptx"].count("griddepcontrol"),
        "kwidths": sorted(set(re.findall(r"dot_op<\{opIdx = 0, parent = #\w+, kWidth = (\d)", code.asm["ttgir"]))),
        "decoded_kwidths": decoded_kwidths(code.asm["ttgir"]),
        "overhanging": overhanging(code.asm["ttgir"]),
        "transposed": transposed(code.asm["ttgir"]),
    }


def overhanging(text):
    """Products of warp groups whose warps reach past the rows: they read what is not theirs, in silence."""
    warps = dict(re.findall(r"^(#\w+) = #ttg.nvidia_mma<.*warpsPerCTA = \[(\d+)", text, re.M))
    products = re.findall(r"warp_group_dot .*-> tensor<(\d+)x\d+xf32, (#\w+)>", text)
    return [(int(rows), int(warps[layout])) for rows, layout in products if int(rows) < 16 * int(warps[layout])]


def transposed(text):
    """Layouts of what one instruction transposes in tiles of 8 x 8: it holds for those of a product's result alone."""
    layouts = dict(re.findall(r"^(#\w+) = #ttg\.(nvidia_mma<.*)$", text, re.M))
    found = re.findall(r"elementwise_inline_asm \"movmatrix.*-> tensor<\w+xf16, (#\w+)>", text)
    shapes = (re.search(r"versionMajor = (\d).*instrShape = \[([\d, ]+)\]", layouts.get(name, "")) for name in found)
    return sorted({shape.groups() if shape else "none" for shape in shapes})


def decoded_kwidths(text):
    """Layouts in which inline assembly gives its planes: 4 bytes of a row must be one register."""
    found = set()
    for line in text.splitlines():
        if "elementwise_inline_asm" in line and "packed_element = 4" in line:
            found |= set(re.findall(r"kWidth = (\d)", line)) or {"none"}
    return sorted(found)


if __name__ == "__main__":
    capability, *chosen = map(int, sys.argv[1:])
    for configuration in [CONFIGURATIONS[i] for i in chosen] or CONFIGURATIONS:
        for kernel, args, kwargs in launches(capability, *configuration):
            facts = report(compiled(kernel, args, dict(kwargs), capability), capability)
            print(json.dumps({"kernel": kernel.__name__, "of": configuration} | facts, default=str), flush=True)
