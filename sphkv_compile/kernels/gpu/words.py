"""From a tile's words to float16 planes: inline assembly where the device converts e4m3, a Triton twin everywhere else.

Both give the same bits. The layouts are those of :mod:`sphkv_compile.storage.tiles`; a level is an e4m3 number times
the width's step (:func:`sphkv_compile.codecs.codebook.byte_table`), and the step is left to the caller. At 8 bits a
level is the codec's own, rounded to float16: no permute chooses among so many, so they lie in memory.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.core import constexpr

from sphkv_compile.codecs.codebook import byte_table, e4m3_value, levels


def _word(table: tuple[int, ...]) -> str:
    """Four bytes as a 32-bit literal."""
    return hex(sum(byte << (8 * i) for i, byte in enumerate(table)))


@lru_cache(None)
def signed_table(bits: int) -> tuple[int, ...]:
    """The e4m3 byte of every code, ascending."""
    positive = byte_table(bits)[0]
    return tuple(byte | 0x80 for byte in reversed(positive)) + positive


@lru_cache(None)
def lookup(bits: int) -> tuple[float, ...]:
    """What the twin looks up: magnitudes at 4 bits, where the sign has a bit of its own, all levels at 2 and 3."""
    return tuple(map(e4m3_value, byte_table(4)[0] if bits == 4 else signed_table(bits)))


@lru_cache(None)
def step(bits: int) -> float:
    """What a decoded number is multiplied by to give a level."""
    return 1.0 if bits == 8 else byte_table(bits)[1]


@lru_cache(None)
def level_table(device: torch.device) -> Tensor:
    """The positive levels of 8 bits in float16, from a multiple of 256 bytes on, and behind them their own address.

    Signs have a bit of their own, so that the table is two lines of the first-level cache and not four: 32 threads read
    it at once, each where its code says.

    Shapes: -> int64[33].
    """
    room = torch.empty(33 + 31, dtype=torch.int64, device=device)
    table = room[-room.data_ptr() % 256 // 8 :][:33]
    table[:32] = levels(8)[128:].half().view(torch.int64).to(device)
    table[32] = table.data_ptr()
    return table


# The high half of a word copied down by a float16 multiplication by one: it runs beside the permutes, not before them.
# A selector's halves are no infinities and no NaN; adding -0 keeps +0.
_HIGH = (
    "{{ .reg .b16 a0, a1; .reg .b32 y, one, zero; mov.b32 {{a0, a1}}, {source}; mov.b32 y, {{a1, a1}}; "
    "mov.b32 one, 0x3c003c00; mov.b32 zero, 0x80008000; fma.rn.f16x2 {target}, y, one, zero; }}"
)
_CONVERT = (
    "{{ .reg .b16 h0, h1; mov.b32 {{h0, h1}}, {source}; "
    "cvt.rn.f16x2.e4m3x2 ${first}, h0; cvt.rn.f16x2.e4m3x2 ${second}, h1; }}"
)


def _high(target: str, source: str) -> str:
    return _HIGH.format(target=target, source=source)


def _convert(source: str, first: int) -> str:
    return _CONVERT.format(source=source, first=first, second=first + 1)


@lru_cache(None)
def assembly(bits: int) -> str:
    """PTX that turns the words of one group of tiles into its planes: two registers of float16 pairs each."""
    lines = {8: _assembly8, 4: _assembly4, 3: _assembly3, 2: _assembly2}[bits]()
    return "{\n" + "\n".join(lines) + "\n}"


def _kept(register: str, word: str) -> list[str]:
    """A constant that stays in one register of a loop. A permute takes one immediate; a second constant that the
    assembler knows it would copy before every permute. That a thread's own lane mask has one bit, it does not know."""
    return [
        f"mov.u32 {register}, %lanemask_eq; popc.b32 {register}, {register};",
        f"add.u32 {register}, {register}, {hex(int(word, 16) - 1)};",
    ]


def _assembly8() -> list[str]:
    """The address of the levels is the second operand; its low byte is the element's, so that a permute adds them."""
    lines = [
        ".reg .b32 m, s, t, low, high; .reg .b64 a; .reg .b16 h0, h1;",
        "mov.b64 {low, high}, $3;",
        "shl.b32 m, $2, 1; and.b32 m, m, 0xfefefefe;",
    ]
    for pair in range(2):
        for i in range(2):
            selector = hex(0x7650 + 2 * pair + i)
            lines.append(f"prmt.b32 t, m, low, {selector}; mov.b64 a, {{t, high}}; ld.global.nc.b16 h{i}, [a];")
        lines += [
            f"prmt.b32 s, $2, 0, {hex(0x1404 + 0x2020 * pair)};",
            f"mov.b32 t, {{h0, h1}}; lop3.b32 ${pair}, t, s, 0x80008000, 0xF8;",
        ]
    return lines


def _assembly4() -> list[str]:
    table = byte_table(4)[0]
    low, high = _word(table[:4]), _word(table[4:])
    return [
        ".reg .b32 m, n, s, t, u, kept;",
        *_kept("kept", low),
        "and.b32 m, $4, 0x77777777;",
        _high("n", "m"),
        f"prmt.b32 t, kept, {high}, m;",
        f"prmt.b32 u, kept, {high}, n;",
        "shl.b32 s, $4, 4;",
        "lop3.b32 t, t, $4, 0x80808080, 0xF8;",
        "lop3.b32 u, u, s, 0x80808080, 0xF8;",
        _convert("t", 0),
        _convert("u", 2),
    ]


def _assembly2() -> list[str]:
    table = _word(signed_table(2))
    lines = [
        ".reg .b32 m, n, v, t, kept;",
        *_kept("kept", table),
        "and.b32 m, $8, 0x33333333;",
        "shr.u32 v, $8, 2;",
        "and.b32 v, v, 0x33333333;",
    ]
    for i, source in enumerate(("m", "v")):
        lines += [f"prmt.b32 t, kept, 0, {source};", _convert("t", 4 * i)]
        lines += [_high("n", source), "prmt.b32 t, kept, 0, n;", _convert("t", 4 * i + 2)]
    return lines


def _assembly3() -> list[str]:
    table = signed_table(3)
    low, high = _word(table[:4]), _word(table[4:])

    def pair(first: int) -> list[str]:
        return [
            f"prmt.b32 t, kept, {high}, m;",
            _convert("t", first),
            _high("n", "m"),
            f"prmt.b32 t, kept, {high}, n;",
            _convert("t", first + 2),
        ]

    lines = [".reg .b32 m, n, s, t, kept;", *_kept("kept", low)]
    for tile in range(3):
        lines += [f"and.b32 m, ${16 + tile}, 0x77777777;", *pair(4 * tile)]
    lines += [
        "shr.u32 s, $16, 1; and.b32 m, s, 0x44444444;",
        "shr.u32 s, $17, 2; lop3.b32 m, s, 0x22222222, m, 0xEA;",
        "shr.u32 s, $18, 3; lop3.b32 m, s, 0x11111111, m, 0xEA;",
    ]
    return lines + pair(12)


ASSEMBLY2, ASSEMBLY3, ASSEMBLY4, ASSEMBLY8 = (constexpr(assembly(bits)) for bits in (2, 3, 4, 8))
TABLE2, TABLE3, TABLE4 = (constexpr(lookup(bits)) for bits in (2, 3, 4))


@triton.jit
def _assembly_planes(at, LEVELS, BITS: constexpr):
    """Planes of one group of tiles, by inline assembly: 4 bytes of a row are one word in the register that it reads."""
    if BITS == 8:
        # What assembly reads must have been loaded, or the compiler brings what it gives through shared memory: so the
        # address of the levels is itself in memory. It is read once, before the loop.
        levels = tl.broadcast_to(tl.load(LEVELS + 32 + tl.zeros([1, 1], tl.int32)), at.shape)
        out = tl.inline_asm_elementwise(
            ASSEMBLY8, "=r,=r,r,l,l,l,l", [tl.load(at), levels], dtype=(tl.float16,), is_pure=True, pack=4
        )
    elif BITS == 4:
        out = tl.inline_asm_elementwise(
            ASSEMBLY4, "=r,=r,=r,=r,r", [tl.load(at)], dtype=(tl.float16, tl.float16), is_pure=True, pack=4
        )
    elif BITS == 2:
        out = tl.inline_asm_elementwise(
            ASSEMBLY2, "=r,=r,=r,=r,=r,=r,=r,=r,r", [tl.load(at)],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16), is_pure=True, pack=4,
        )  # fmt: skip
    else:
        out = tl.inline_asm_elementwise(
            ASSEMBLY3, "=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,r,r,r",
            [tl.load(at), tl.load(at + 1024), tl.load(at + 2048)],
            dtype=(
                tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16,
            ), is_pure=True, pack=4,
        )  # fmt: skip
    return out


@triton.jit
def _choose(index, TABLE: constexpr, N: constexpr):
    value = tl.full(index.shape, TABLE[0], tl.float32)
    for i in tl.static_range(1, N):
        value = tl.where(index == i, TABLE[i], value)
    return value


@triton.jit
def _nibble(word, PLACE: constexpr, MASK: constexpr, TABLE: constexpr, N: constexpr):
    """The elements at bits PLACE, PLACE + 4, ... of every word."""
    out = ()
    for e in tl.static_range(4):
        out = out + (_choose((word >> (PLACE + 4 * e)) & MASK, TABLE, N).to(tl.float16),)
    return out


@triton.jit
def _signed(word, PLACE: constexpr, SIGN: constexpr, TABLE: constexpr):
    """The same, with a sign bit at SIGN, SIGN + 8, ..."""
    out = ()
    for e in tl.static_range(4):
        magnitude = _choose((word >> (PLACE + 4 * e)) & 7, TABLE, 8).to(tl.float16)
        out = out + (tl.where(((word >> (SIGN + 8 * e)) & 1) == 1, -magnitude, magnitude),)
    return out


@triton.jit
def _looked_up(word, LEVELS):
    """The elements at the bytes of every word: a sign above the number of a magnitude."""
    out = ()
    for e in tl.static_range(4):
        magnitude = tl.load(LEVELS.to(tl.pointer_type(tl.float16)) + ((word >> (8 * e)) & 127))
        out = out + (tl.where(((word >> (8 * e + 7)) & 1) == 1, -magnitude, magnitude),)
    return out


@triton.jit
def _twin(at, LEVELS, BITS: constexpr):
    """Elements of words in Triton alone: for devices without e4m3 conversion, and for the interpreter.

    Args:
        at: pointers int32[...] to the words of the group's first tile.

    Shapes: -> float16[...], four for each plane.
    """
    w = tl.load(at)
    if BITS == 8:
        out = _looked_up(w, LEVELS)
    elif BITS == 4:
        out = _signed(w, 0, 7, TABLE4) + _signed(w, 16, 3, TABLE4)
    elif BITS == 2:
        out = (
            _nibble(w, 0, 3, TABLE2, 4) + _nibble(w, 16, 3, TABLE2, 4)
            + _nibble(w, 2, 3, TABLE2, 4) + _nibble(w, 18, 3, TABLE2, 4)
        )  # fmt: skip
    else:
        x = tl.load(at + 256)
        y = tl.load(at + 512)
        z = ((w >> 1) & 0x44444444) | ((x >> 2) & 0x22222222) | ((y >> 3) & 0x11111111)
        out = (
            _nibble(w, 0, 7, TABLE3, 8) + _nibble(w, 16, 7, TABLE3, 8)
            + _nibble(x, 0, 7, TABLE3, 8) + _nibble(x, 16, 7, TABLE3, 8)
            + _nibble(y, 0, 7, TABLE3, 8) + _nibble(y, 16, 7, TABLE3, 8)
            + _nibble(z, 0, 7, TABLE3, 8) + _nibble(z, 16, 7, TABLE3, 8)
        )  # fmt: skip
    return out


@triton.jit
def _twin_planes(at, LEVELS, BITS: constexpr, PLANES: constexpr):
    """Planes of one group of tiles. Shapes: ``at`` [32, 8] -> PLANES times float16[32, 32]."""
    e = _twin(at, LEVELS, BITS)
    out = ()
    for p in tl.static_range(PLANES):
        row = tl.join(tl.join(e[4 * p], e[4 * p + 2]), tl.join(e[4 * p + 1], e[4 * p + 3]))
        out = out + (tl.reshape(row, (32, 32)),)
    return out


@triton.jit
def _halves(pair):
    """Two float16 that share a register."""
    low = (pair & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True)
    return low, (pair >> 16).to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def elements(at, LEVELS, BITS: constexpr, TWIN: constexpr):
    """Elements of words, wherever a layout puts them: each word is decoded by the thread that has it.

    Args:
        at: pointers int32[...] to the words of the first tile of each group.
        LEVELS: :func:`level_table`, which 8 bits alone read.
        TWIN: whether to decode without assembly.

    Shapes: -> float16[...], four for each plane of a group, in units of the width's step.
    """
    if TWIN:
        out = _twin(at, LEVELS, BITS)
    else:
        out = ()
        if BITS == 8:
            pairs = tl.inline_asm_elementwise(
                ASSEMBLY8, "=r,=r,r,l", [tl.load(at), LEVELS.to(tl.int64)], dtype=(tl.int32, tl.int32), is_pure=True,
                pack=1,
            )  # fmt: skip
        elif BITS == 4:
            pairs = tl.inline_asm_elementwise(
                ASSEMBLY4, "=r,=r,=r,=r,r", [tl.load(at)], dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True,
                pack=1,
            )  # fmt: skip
        elif BITS == 2:
            pairs = tl.inline_asm_elementwise(
                ASSEMBLY2, "=r,=r,=r,=r,=r,=r,=r,=r,r", [tl.load(at)],
                dtype=(tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32),
                is_pure=True, pack=1,
            )  # fmt: skip
        else:
            pairs = tl.inline_asm_elementwise(
                ASSEMBLY3, "=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,r,r,r",
                [tl.load(at), tl.load(at + 256), tl.load(at + 512)],
                dtype=(
                    tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32,
                    tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32,
                ), is_pure=True, pack=1,
            )  # fmt: skip
        for i in tl.static_range(16 if BITS == 3 else 16 // BITS):
            low, high = _halves(pairs[i])
            out = out + (low, high)
    return out


@triton.jit
def planes(BYTES, WORDS, LEVELS, row, BITS: constexpr, PLANES: constexpr, TWIN: constexpr):
    """The planes of one operand of a page.

    Args:
        BYTES, WORDS: its first byte, as pointers to uint8 and to int32.
        LEVELS: :func:`level_table`, which 8 bits alone read.
        row: of a plane that comes first, second, ...; int32[32].
        PLANES: 64 * D / 1024.
        TWIN: whether to decode without assembly.

    Shapes: -> PLANES times float16[32, 32], in units of the width's step.
    """
    GROUP: constexpr = 8 if BITS == 3 else 8 // BITS
    TILES: constexpr = GROUP * BITS // 8
    out = ()
    if TWIN:
        place = (row * 8)[:, None] + tl.arange(0, 8)[None, :]
        for i in tl.static_range(PLANES // GROUP):
            out = out + _twin_planes(WORDS + i * (TILES * 256) + place, LEVELS, BITS, GROUP)
    else:
        place = (row * 32)[:, None] + tl.arange(0, 32)[None, :]
        for i in tl.static_range(PLANES // GROUP):
            out = out + _assembly_planes(BYTES + i * (TILES * 1024) + place, LEVELS, BITS)
    return out


@triton.jit
def gather(at, TWIN: constexpr):
    """32-bit words that the first-level cache holds and this program does not write, as int32.

    The assembly keeps the compiler from staging them through shared memory, which is for pages, and from choosing their
    layout.
    """
    if TWIN:
        return tl.load(at).to(tl.int32, bitcast=True)
    else:
        return tl.inline_asm_elementwise(
            "ld.global.ca.b32 $0, [$1];", "=r,l", [at.to(tl.int64)], dtype=tl.int32, is_pure=True, pack=1
        )


@triton.jit
def gather_byte(at, TWIN: constexpr):
    """Bytes, as :func:`gather` takes words."""
    if TWIN:
        return tl.load(at).to(tl.int32)
    else:
        return tl.inline_asm_elementwise(
            "ld.global.ca.u8 $0, [$1];", "=r,l", [at.to(tl.int64)], dtype=tl.int32, is_pure=True, pack=1
        )


INTEGERS = constexpr("""{
.reg .b32 t, low, high, most;
mov.b32 most, 0x64806480;
xor.b32 t, $2, 0x80808080;
prmt.b32 low, t, 0x64646464, 0x4140;
prmt.b32 high, t, 0x64646464, 0x4342;
sub.rn.f16x2 $0, low, most;
sub.rn.f16x2 $1, high, most;
}""")


@triton.jit
def integers(x, TWIN: constexpr):
    """int8 as float16, exactly: a byte under the mantissa of 1024, less what that adds; a conversion is slower."""
    if TWIN:
        return x.to(tl.float16)
    else:
        return tl.inline_asm_elementwise(INTEGERS, "=r,=r,r", [x], dtype=tl.float16, is_pure=True, pack=4)
