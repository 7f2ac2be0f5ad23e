"""PyTorch's kernels for packed integer weights and for sparse ones, and which weights they can multiply.

A kernel reads the codes themselves, so that one token costs about the bytes of the artifact instead of those of the
dense model. It wants them in a layout of its own, and scales in bfloat16:

    Int8   y = (x qᵀ) s + Σx (2**(bits - 1) - z) s                    q = codes - 2**(bits - 1), one scale a row
    Int4   y = x Wᵀ,  W = (q - 8) s + offset                          groups of 32, 64, 128 or 256 columns

Int8 takes 5 to 8 bits with one scale a row, with or without zero points; its scales stay float32. Int4 takes 1 to 4
bits in groups (a group of 96 counts as three of 32) with q = codes + 8 - 2**(bits - 1), so that symmetric grids have no
offset; and 5 to 8 bits as two planes of 4, codes + 128 - 2**(bits - 1) = 16 high + low, side by side:
[x x] [16 high | low]ᵀ. Sums are accumulated in float32; activations, results and Int4's scales are rounded to bfloat16.

The packed form takes the place of the stored codes; `codes` gives them back bit for bit.

Codebooks with int8 tables are multiplied as the entries that their codes name, one signed byte a weight, by the
operator of Int8; table and row scales are applied to the result. The codes stay stored beside. Tables in float16 have
no such form, and no operator of PyTorch reads their codes: looking entries up one at a time takes 3 ns a weight, so
instructions bound it, not the bytes saved. Keep such a weight decoded (`cache_decoded`), or its tables in int8.
4 bits, 4 rows a table, one row of bfloat16 activations, one thread of a busy AVX2 machine, medians in ms:

                   dense bfloat16    int8 tables    float16 tables, looked up each time
    2048 x 2048    1.02              0.91           17
    5632 x 2048    2.98              1.92           37

A weight of which at most `DENSEST` is left, however its values are stored, is multiplied as compressed sparse rows in
float32 (8 bytes a survivor). Against dense products in float32 and bfloat16, one AVX2 thread, in ms:

    left              20 %         10 %         5 %         dense float32    dense bfloat16
    2048 x 2048       0.5          0.24         0.16        0.7              0.8     one row of activations
                      1.5          0.68         0.35        3.4              12.6    16 rows
    5632 x 2048       1.0          0.70         0.35        2.1              2.3     one row
                      4.7          2.0          0.94        13.2             34.9    16 rows
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from functools import lru_cache
from typing import ClassVar

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional as F

from hf_slim.encodings.affine import Affine, row_runs
from hf_slim.encodings.base import Encoding
from hf_slim.encodings.codebook import Codebook
from hf_slim.encodings.packing import pack, unpack

# Most rows of activations (tokens) that a packed kernel is used for; beyond, decoding once a call pays. A product of
# 5632 x 2048 on one busy AVX2 core, packed against decoded, in ms: 32 rows 267 / 201 (8 bits a row), 239 / 197 (4 bits
# in groups), 426 / 342 (8 bits in groups); 64 rows 599 / 403, 450 / 501, 844 / 576.
FEW_ROWS = 16
DENSEST = 0.2  # share of survivors up to which sparse rows are multiplied as such
GROUPS = (256, 128, 64, 32)
_BLOCK = 64  # rows are filled up to a multiple: every processor's layout consists of whole blocks then


class Packed(ABC):
    """A weight [rows, cols] as a kernel reads it.

    Attributes:
        weight: the codes or values, in the kernel's layout.
        dtypes: of the activations that it multiplies.
    """

    name: ClassVar[str]
    weight: Tensor
    dtypes: tuple[torch.dtype, ...]

    @abstractmethod
    def product(self, x: Float[Tensor, "n cols"]) -> Float[Tensor, "n rows"]:
        """x Wᵀ in the dtype of x."""

    def nbytes(self) -> int:
        """Bytes of everything that a product reads besides its input."""
        return sum(value.nbytes for value in vars(self).values() if isinstance(value, Tensor))


class SparseRows(Packed):
    """Compressed sparse rows: each survivor's column and value; the stored tensors stay beside them."""

    name: ClassVar[str] = "sparse kernel"

    def __init__(self, encoding: Encoding, tensors: dict[str, Tensor], rows: int, cols: int):
        self.dtypes = (torch.float32, torch.bfloat16, torch.float16)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that this layout is in beta, and its invariants unchecked
            W = encoding.decode(tensors, rows, cols).detach().float().to_sparse_csr()
            self.starts, self.columns, self.weight = W.crow_indices().int(), W.col_indices().int(), W.values()
            self._matrix = torch.sparse_csr_tensor(
                self.starts, self.columns, self.weight, size=(rows, cols), check_invariants=False
            )

    def product(self, x: Float[Tensor, "n cols"]) -> Float[Tensor, "n rows"]:
        wide = x.float()
        y = (self._matrix @ wide[0])[None] if len(x) == 1 else (self._matrix @ wide.T.contiguous()).T
        return y.to(x.dtype)

    def nbytes(self) -> int:
        return self.starts.nbytes + self.columns.nbytes + self.weight.nbytes


class Int8Tables(Packed):
    """The entries of a codebook's int8 tables, one signed byte a weight; the stored codes stay beside them."""

    name: ClassVar[str] = "int8 kernel"

    def __init__(self, encoding: Codebook, tensors: dict[str, Tensor], rows: int, cols: int):
        self.dtypes = (torch.bfloat16, torch.float32)
        device = tensors["codes"].device
        self.weight = torch.empty(rows, cols, dtype=torch.int8, device=device)
        for run in row_runs(rows, cols):
            self.weight[run] = encoding.int8_entries(tensors, run, cols)
        self.scale = encoding.row_scales(tensors, rows)
        self.ones = torch.ones(rows, dtype=torch.bfloat16, device=device)

    def product(self, x: Float[Tensor, "n cols"]) -> Float[Tensor, "n rows"]:
        return (torch._weight_int8pack_mm(x.to(torch.bfloat16), self.weight, self.ones) * self.scale).to(x.dtype)


class PackedCodes(Packed):
    """A weight whose integer codes a kernel reads.

    Attributes:
        reversible: `codes` works; else the stored codes have to be kept beside.
        by_row: `codes` reads any rows (else only runs that start at multiples of 64).
    """

    reversible: bool
    by_row: ClassVar[bool]

    def __init__(self, encoding: Affine, rows: int, cols: int):
        self.encoding, self.rows, self.cols = encoding, rows, cols
        self.dtypes = _dtypes(encoding)

    @abstractmethod
    def codes(self, rows: slice | Tensor) -> UInt8[Tensor, "n cols"]:
        """The integer codes of some rows."""

    def stored_codes(self, rows: slice | Tensor | None = None) -> UInt8[Tensor, "n b"]:
        """The tensor `codes` of the encoding's layout, or some of its rows."""
        if rows is not None:
            return pack(self.codes(rows), self.encoding.bits)
        return torch.cat([self.stored_codes(run) for run in row_runs(self.rows, self.cols)])


class Int8(PackedCodes):
    """One signed byte a weight and one scale a row."""

    name: ClassVar[str] = "int8 kernel"
    by_row = True
    reversible = True

    def __init__(self, encoding: Affine, tensors: dict[str, Tensor], rows: int, cols: int):
        super().__init__(encoding, rows, cols)
        self.middle = 2 ** (encoding.bits - 1)
        stored = tensors["codes"]
        self.weight = torch.empty(rows, cols, dtype=torch.int8, device=stored.device)
        for run in row_runs(rows, cols):
            self.weight[run] = (unpack(stored[run], encoding.bits, cols) - self.middle).view(torch.int8)
        self.scale = tensors["scales"].float().flatten()
        shift = (self.middle - encoding.zero_points(tensors, 1).flatten()) * self.scale
        self.shift = shift if shift.any() else None
        self.ones = torch.ones(rows, dtype=torch.bfloat16, device=stored.device)

    def product(self, x: Float[Tensor, "n cols"]) -> Float[Tensor, "n rows"]:
        y = torch._weight_int8pack_mm(x.to(torch.bfloat16), self.weight, self.ones) * self.scale
        if self.shift is not None:
            y.addcmul_(x.sum(-1, keepdim=True, dtype=torch.float32), self.shift)
        return y.to(x.dtype)

    def codes(self, rows: slice | Tensor) -> UInt8[Tensor, "n cols"]:
        return self.weight[rows].view(torch.uint8) + self.middle  # bytes wrap around, as they did on the way in


class Int4(PackedCodes):
    """Four bits a weight, in one plane or two, and a scale and an offset a group."""

    name: ClassVar[str] = "int4 kernel"
    by_row = False

    def __init__(self, encoding: Affine, tensors: dict[str, Tensor], rows: int, cols: int):
        super().__init__(encoding, rows, cols)
        self.group: int = common_group(encoding, cols)  # pyright: ignore[reportAttributeAccessIssue]
        self.planes = 1 if encoding.bits <= 4 else 2
        self.raised = 2 ** (4 * self.planes - 1) - 2 ** (encoding.bits - 1)
        stored = tensors["codes"]
        self.block = half_split() if stored.device.type == "cpu" else None
        self.reversible = self.block is not None
        runs = row_runs(rows, cols)
        self.weight = torch.cat([self._plane_codes(unpack(stored[run], encoding.bits, cols)) for run in runs])
        self.scales_and_offsets = self._grid(tensors)

    def product(self, x: Float[Tensor, "n cols"]) -> Float[Tensor, "n rows"]:
        x16 = x.to(torch.bfloat16)
        if self.planes == 2:
            x16 = torch.cat([x16, x16], dim=-1)
        multiply = torch.ops.aten._weight_int4pack_mm_for_cpu if x.device.type == "cpu" else torch._weight_int4pack_mm
        return multiply(x16, self.weight, self.group, self.scales_and_offsets)[:, : self.rows].to(x.dtype)

    def codes(self, rows: slice | Tensor) -> UInt8[Tensor, "n cols"]:
        first, last = rows.start, rows.stop  # pyright: ignore[reportAttributeAccessIssue]
        packed = self.weight[first : last + -last % _BLOCK]
        planes = _unfold(packed, self.block)[: last - first]  # pyright: ignore[reportArgumentType]
        raised = planes if self.planes == 1 else planes[:, : self.cols] << 4 | planes[:, self.cols :]
        return raised - self.raised

    def _plane_codes(self, codes: UInt8[Tensor, "n cols"]) -> Tensor:
        q = codes + self.raised
        planes = q if self.planes == 1 else torch.cat([q >> 4, q & 15], dim=1)
        return _convert(F.pad(planes, (0, 0, 0, -len(planes) % _BLOCK)))

    def _grid(self, tensors: dict[str, Tensor]) -> Float[Tensor, "groups padded 2"]:
        """Scale and offset of every group in bfloat16. Of two planes, the second holds what the first's offset lost."""
        encoding, groups = self.encoding, self.cols // self.group
        each = (encoding.group_size or self.cols) // self.group
        scales = tensors["scales"].float()
        zeros = encoding.zero_points(tensors, scales.shape[1]) + self.raised
        s, z = (t.repeat_interleave(each, dim=1)[:, :groups].T for t in (scales, zeros))
        if self.planes == 1:
            grid = torch.stack([s, (8 - z) * s], dim=-1)
        else:
            offset = (16 * 8 + 8 - z) * s
            high = torch.stack([16 * s, offset], dim=-1)
            grid = torch.cat([high, torch.stack([s, offset - offset.bfloat16()], dim=-1)])
        return F.pad(grid, (0, 0, 0, -self.rows % _BLOCK)).to(torch.bfloat16).contiguous()


Kernel = type[Int8] | type[Int4] | type[Int8Tables] | type[SparseRows]


def why_not_packed(
    encoding: Encoding, cols: int, dtype: torch.dtype, device: torch.device | str = "cpu", rows: int = 0
) -> str | None:
    """Why no packed kernel can multiply activations of `dtype` by such a weight on that device; None if one can."""
    found = _choose(encoding, cols, dtype, torch.device(device), rows)
    return found if isinstance(found, str) else None


def kernel_for(
    encoding: Encoding, cols: int, dtype: torch.dtype, device: torch.device | str = "cpu", rows: int = 0
) -> Kernel | None:
    """The kernel that can, if any; `rows` decides for pruned weights, whose density counts."""
    found = _choose(encoding, cols, dtype, torch.device(device), rows)
    return None if isinstance(found, str) else found


@lru_cache(maxsize=1024)
def _choose(encoding: Encoding, cols: int, dtype: torch.dtype, device: torch.device, rows: int) -> Kernel | str:
    left = getattr(encoding, "survivors", None)
    if left is not None and getattr(encoding, "activations", None) is None:
        if left > DENSEST * rows * cols:
            return f"a pruned weight is multiplied as it is stored only where at most {DENSEST:.0%} of it is left"
        if device.type != "cpu" or not torch.backends.mkl.is_available():
            return f"sparse products were found to be faster than dense ones with MKL alone, not on {device.type}"
        return SparseRows
    if isinstance(encoding, Codebook):
        chosen, operator = _for_tables(encoding, cols, dtype), "_weight_int8pack_mm"
    elif isinstance(encoding, Affine):
        chosen, operator = _for_grid(encoding, cols, dtype, device)
    else:
        return f"PyTorch has no kernel for {encoding.kind} weights"
    if isinstance(chosen, str):
        return chosen
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device.type)
    if key is None or not torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{operator}", key):
        return f"this PyTorch has no {operator} on {device.type}"
    if key == "CUDA" and torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} has no bfloat16 arithmetic, which the kernels need"
    return chosen


def _for_grid(encoding: Affine, cols: int, dtype: torch.dtype, device: torch.device) -> tuple[Kernel | str, str]:
    """The kernel for an affine grid, or why there is none; and the operator that it needs."""
    if encoding.survivors is not None:
        return "the codes of a pruned weight are stored without their places", ""
    if dtype not in _dtypes(encoding):
        what = f"{encoding.describe()} in {str(dtype).split('.')[1]}"
        return f"the kernels round to bfloat16, too coarse for {what}", ""
    if cols % GROUPS[-1]:  # the int8 kernel reads past the end of rows of 4 or 20 columns, and crashes
        return f"the kernels take whole runs of {GROUPS[-1]} columns, which {cols} are not", ""
    if encoding.group_size is None and encoding.bits > 4:
        return Int8, "_weight_int8pack_mm"
    if common_group(encoding, cols):
        return Int4, "_weight_int4pack_mm_for_cpu" if device.type == "cpu" else "_weight_int4pack_mm"
    return f"the kernels take groups of whole runs of {GROUPS[-1]} columns, which {encoding.group_size} are not", ""


def _for_tables(encoding: Codebook, cols: int, dtype: torch.dtype) -> type[Int8Tables] | str:
    """The kernel for a codebook, or why there is none."""
    if encoding.centroid_dtype != "int8":
        return (
            f"PyTorch has no kernel for codebook weights with {encoding.centroid_dtype} tables, for int8 tables it has"
        )
    if encoding.outliers:
        return "the int8 kernel knows no outliers kept apart"
    if dtype not in (torch.bfloat16, torch.float32):
        return f"the kernels round to bfloat16, too coarse for codebooks in {str(dtype).split('.')[1]}"
    if cols % GROUPS[-1]:
        return f"the kernels take whole runs of {GROUPS[-1]} columns, which {cols} are not"
    return Int8Tables


def _dtypes(encoding: Affine) -> tuple[torch.dtype, ...]:
    """8-bit activations of a float32 model are multiplied exactly instead."""
    return (torch.bfloat16,) if encoding.activations is not None else (torch.bfloat16, torch.float32)


def common_group(encoding: Affine, cols: int) -> int | None:
    """The largest group the int4 kernel knows such that every one of ours consists of whole ones."""
    size = encoding.group_size or cols
    return next((group for group in GROUPS if cols % group == 0 and size % group == 0), None)


@lru_cache
def half_split() -> int | None:
    """Rows in a block of the int4 layout of this processor: the first half in the low nibbles, the second in the high.

    None when the layout is another one; found by packing known codes.
    """
    codes = torch.arange(2 * _BLOCK * 6).mul(2654435761).bitwise_right_shift(13).bitwise_and(15)
    known = codes.to(torch.uint8).view(2 * _BLOCK, 6)
    packed = _convert(known)
    return next((block for block in (64, 32, 16) if torch.equal(_unfold(packed, block), known)), None)


def _convert(codes: UInt8[Tensor, "rows cols"]) -> Tensor:
    if codes.device.type == "cpu":
        return torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.to(torch.int32), 1)
    return torch._convert_weight_to_int4pack(codes[:, ::2] << 4 | codes[:, 1::2], 2)


def _unfold(packed: UInt8[Tensor, "rows half"], block: int) -> UInt8[Tensor, "rows cols"]:
    rows, half = packed.shape
    blocks = packed.view(rows // block, 2 * half, block // 2).transpose(1, 2).contiguous()
    return torch.stack([blocks & 15, blocks >> 4], dim=1).view(rows, 2 * half)
