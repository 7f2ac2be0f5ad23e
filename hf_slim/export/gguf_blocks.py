"""GGUF blocks, pure kernels: 32 columns of a row, a float16 scale d, integers q beside it.

    Q8_0   W = d q           q in [-128, 127]    d, 32 bytes                                   8.5 bits a weight
    Q4_0   W = d (n - 8)     n in [0, 15]        d, 16 bytes                                   4.5
    Q4_1   W = d n + m       n in [0, 15]        d, m (float16), 16 bytes                      5

Of 4-bit numbers, byte j of a block holds column j in its low half and column j + 16 in its high half. Our affine grid
is W = (code - zero) s with integer zero points, so steps `code - zero` and scales s go over as they are, d = s; only
Q4_1 rounds something, m = float16(-zero s), which moves a group's weights together by at most 2**-11 |zero s|. Levels
that lie half a step beside zero become odd steps of half the scale. A group of more than 32 columns repeats its scale
in each of its blocks.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Float16, Int8, Int16, UInt8
from torch import Tensor

from hf_slim.encodings import Affine
from hf_slim.encodings.codes import load_codes
from hf_slim.encodings.packing import unpack

BLOCK = 32
BlockType = Literal["q8_0", "q4_0", "q4_1"]


class Grid(NamedTuple):
    """An affine weight in blocks.

    Args:
        steps: code - zero, twice that where zero is no level; 0 where pruning took the weight.
        scales, zeros: of each block.
    """

    steps: Int16[Tensor, "rows cols"]
    scales: Float[Tensor, "rows blocks"]
    zeros: Int16[Tensor, "rows blocks"]

    def take(self, order: Tensor) -> Grid:
        """The grid of the weight's rows in another order."""
        return Grid(*(tensor[order] for tensor in self))


def steps_fit(encoding: Affine, kind: BlockType) -> bool:
    """Whether every weight of an affine encoding's grid is on the grid of a block type (Q4_1: but for m's rounding)."""
    highest = 2 ** (encoding.bits - 1) if encoding.symmetric else 2**encoding.bits - 1  # of |code - zero|
    if kind == "q4_1":
        return encoding.bits <= 4
    limit = 8 if kind == "q4_0" else 128
    return highest <= limit if encoding.symmetric else highest < limit


def groups_fit(encoding: Affine, cols: int) -> bool:
    """Whether no block of 32 columns spans two groups."""
    return cols % BLOCK == 0 and (encoding.groups(cols) == 1 or (encoding.group_size or cols) % BLOCK == 0)


def block_grid(encoding: Affine, tensors: dict[str, Tensor], rows: int, cols: int) -> Grid:
    """The steps, scales and zero points of a stored affine weight whose groups fit."""
    tensors = {name: tensor.cpu() for name, tensor in tensors.items()}
    codes, keep = load_codes(tensors, encoding.bits, rows, cols, encoding.survivors, encoding.pattern)
    codes, scales = codes.to(torch.int16), tensors["scales"].float()
    groups, size = encoding.groups(cols), encoding.group_size or cols
    if encoding.centered:
        codes, scales = 2 * codes, scales / 2
        zeros = torch.full((rows, groups), 2**encoding.bits - 1, dtype=torch.int16)
    elif encoding.symmetric:
        zeros = torch.full((rows, groups), 2 ** (encoding.bits - 1), dtype=torch.int16)
    else:
        zeros = unpack(tensors["zeros"], encoding.bits, groups).to(torch.int16)
    steps = codes - zeros.repeat_interleave(min(size, cols), dim=1)[:, :cols]
    if keep is not None:
        steps.masked_fill_(~keep, 0)
    block_of = torch.arange(0, cols, BLOCK) // size
    return Grid(steps, scales[:, block_of], zeros[:, block_of])


def pack_grid(grid: Grid, kind: BlockType) -> UInt8[Tensor, "rows bytes"]:
    """Blocks of a grid whose steps fit the type."""
    steps, scales = grid.steps, grid.scales.half()
    if kind == "q8_0":
        return pack_q8_0(steps.to(torch.int8), scales)
    if kind == "q4_0":
        return pack_q4_0((steps + 8).to(torch.uint8), scales)
    codes = steps + grid.zeros.repeat_interleave(BLOCK, dim=1)
    return pack_q4_1(codes.to(torch.uint8), scales, (-grid.zeros * scales.float()).half())


def pack_q8_0(q: Int8[Tensor, "rows cols"], d: Float16[Tensor, "rows blocks"]) -> UInt8[Tensor, "rows bytes"]:
    """Q8_0 blocks from what they hold."""
    return _join(_bytes(d), q.view(torch.uint8).reshape(*d.shape, BLOCK))


def pack_q4_0(n: UInt8[Tensor, "rows cols"], d: Float16[Tensor, "rows blocks"]) -> UInt8[Tensor, "rows bytes"]:
    """Q4_0 blocks from what they hold."""
    return _join(_bytes(d), _halves(n))


def pack_q4_1(
    n: UInt8[Tensor, "rows cols"], d: Float16[Tensor, "rows blocks"], m: Float16[Tensor, "rows blocks"]
) -> UInt8[Tensor, "rows bytes"]:
    """Q4_1 blocks from what they hold."""
    return _join(_bytes(d), _bytes(m), _halves(n))


def _halves(n: UInt8[Tensor, "rows cols"]) -> UInt8[Tensor, "rows blocks 16"]:
    low, high = n.view(n.shape[0], -1, 2, BLOCK // 2).unbind(dim=2)
    return low | high << 4


def _bytes(values: Float16[Tensor, "rows blocks"]) -> UInt8[Tensor, "rows blocks 2"]:
    return values.contiguous().view(torch.uint8).view(*values.shape, 2)


def _join(*fields: UInt8[Tensor, "rows blocks _"]) -> UInt8[Tensor, "rows bytes"]:
    return torch.cat(fields, dim=-1).flatten(1)
