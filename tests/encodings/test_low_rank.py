"""A product of thin factors behaves like the dense weight it stands for, and never forms it where that is dearer."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional as F

from hf_slim.core.errors import ArtifactError
from hf_slim.core.swap import get_weight
from hf_slim.encodings import Affine, Codebook, LowRank, Sparse, read_encoding
from hf_slim.encodings.modules import EncodedEmbedding, EncodedLinear, TiedHead

ROWS, COLS, RANK = 24, 20, 3
KINDS = ("dense", "affine", "codebook", "residual", "sparse residual")
each_kind = pytest.mark.parametrize("kind", KINDS)


def codes(rows: int, cols: int) -> torch.Tensor:
    return torch.randint(0, 8, (rows, cols), generator=torch.Generator().manual_seed(3)).to(torch.uint8)


def affine(rows: int, cols: int):
    encoding = Affine(bits=3, group_size=None)
    return encoding, encoding.pack(codes(rows, cols), torch.full((rows, 1), 0.2), torch.full((rows, 1), 3).byte())


def stored(kind: str, dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(5)
    A, B = torch.randn(ROWS, RANK, generator=generator), torch.randn(RANK, COLS, generator=generator)
    if kind == "affine":
        (left, packed_left), (right, packed_right) = affine(ROWS, RANK), affine(RANK, COLS)
        encoding = LowRank(rank=RANK, left=left, right=right)
        return encoding, encoding.pack(packed_left, packed_right)
    if kind == "codebook":
        part, table = Codebook(bits=3, clusters=8), torch.randn(1, 8, generator=generator)
        encoding = LowRank(rank=RANK, left=part, right=part)
        return encoding, encoding.pack(part.pack(codes(ROWS, RANK), table), part.pack(codes(RANK, COLS), table))
    if kind == "dense":
        return LowRank(rank=RANK), LowRank(rank=RANK).pack(A.to(dtype), B.to(dtype))
    if kind == "residual":
        base, tensors = affine(ROWS, COLS)
    else:
        keep = torch.rand(ROWS, COLS, generator=generator) < 0.5
        base = Sparse(survivors=int(keep.sum()))
        tensors = base.pack(torch.randn(ROWS, COLS, generator=generator).to(dtype), keep)
    encoding = LowRank(rank=RANK, base=base)
    return encoding, encoding.pack(A.to(dtype), B.to(dtype), tensors)


def linear(kind: str, dtype: torch.dtype = torch.float32) -> EncodedLinear:
    encoding, tensors = stored(kind, dtype)
    layer = EncodedLinear(COLS, ROWS, encoding, dtype=dtype)
    layer.put(tensors)
    torch.nn.init.normal_(layer.bias, generator=torch.Generator().manual_seed(0))
    return layer


def inputs(tokens: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(2, tokens, COLS, generator=torch.Generator().manual_seed(1)).to(dtype)


@each_kind
@pytest.mark.parametrize("tokens", [0, 1, 50])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_those_of_the_decoded_weight(kind, tokens, dtype):
    layer, x = linear(kind, dtype), inputs(tokens, dtype)
    expected = F.linear(x.double(), get_weight(layer).double(), layer.bias.double())
    with torch.no_grad():
        found = layer(x)
    rounding = 1e-5 if dtype == torch.float32 else 0.04
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, rtol=rounding, atol=rounding * 4)
    torch.testing.assert_close(layer(x).double(), expected, rtol=rounding, atol=rounding * 4)


@each_kind
def test_the_weight_is_the_sum_of_its_parts(kind):
    encoding, tensors = stored(kind)
    parts = {part: encoding.factor(part, tensors, ROWS, COLS).float() for part in ("left", "right")}
    expected = parts["left"] @ parts["right"]
    if encoding.base is not None:
        expected = expected + encoding.factor("base", tensors, ROWS, COLS)
    assert torch.equal(encoding.decode(tensors, ROWS, COLS), expected)


def test_gradients_are_those_of_the_product():
    layer, x = linear("dense"), inputs(7)
    A, B = (getattr(layer, name).detach().clone().requires_grad_() for name in ("left", "right"))
    layer(x).square().sum().backward()
    F.linear(x, A @ B, layer.bias.detach()).square().sum().backward()
    torch.testing.assert_close(layer.left.grad, A.grad, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(layer.right.grad, B.grad, rtol=1e-4, atol=1e-3)


@each_kind
def test_what_learns_is_what_is_not_a_code(kind):
    learns = {
        "dense": {"left", "right"},
        "affine": set(),
        "codebook": {f"{part}_{name}" for part in ("left", "right") for name in Codebook(bits=3, clusters=8).trainable},
        "residual": {"left", "right"},
        "sparse residual": {"left", "right", "base_values"},
    }
    layer = linear(kind)
    assert {name for name, _ in layer.named_parameters()} == learns[kind] | {"bias"}


def test_thin_products_are_taken_exactly_where_they_are_cheaper():
    useful, useless = LowRank(rank=10), LowRank(rank=12)  # 24 * 20 / 44 = 10.9
    assert useful.multiplies(1, ROWS, COLS)
    assert useful.multiplies(10**6, ROWS, COLS)
    assert useless.multiplies(1, ROWS, COLS)
    assert not useless.multiplies(10**6, ROWS, COLS)


@each_kind
def test_a_table_reads_rows_of_the_decoded_weight_and_serves_a_head(kind):
    encoding, tensors = stored(kind)
    table = EncodedEmbedding(ROWS, COLS, encoding)
    table.put(tensors)
    ids = torch.tensor([[0, 5, 5], [23, 1, 0]])
    torch.testing.assert_close(table(ids), F.embedding(ids, get_weight(table)))
    head = TiedHead(table, None)
    torch.testing.assert_close(head(inputs(4)), F.linear(inputs(4), get_weight(table)), rtol=1e-4, atol=1e-4)


@each_kind
def test_layout_state_dict_and_description_agree(kind):
    encoding, tensors = stored(kind)
    layout = encoding.layout(ROWS, COLS, torch.float32)
    assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == layout
    assert encoding.nbytes(ROWS, COLS, torch.float32) == sum(t.nbytes for t in tensors.values())
    layer, empty = linear(kind), EncodedLinear(COLS, ROWS, encoding)
    assert set(layer.state_dict()) == {*layout, "bias"}
    empty.load_state_dict(layer.state_dict())
    assert torch.equal(empty(inputs(3)), layer(inputs(3)))
    assert read_encoding(encoding.model_dump(mode="json", exclude_defaults=True) | {"kind": "low_rank"}) == encoding
    assert read_encoding(encoding.model_dump()) == encoding


@each_kind
def test_casts_and_cached_weights(kind):
    layer = copy.deepcopy(linear(kind)).to(torch.bfloat16)
    assert layer(inputs(3, torch.bfloat16)).dtype == torch.bfloat16 == get_weight(layer).dtype
    kept = linear(kind)
    kept.cache_decoded()
    with torch.no_grad():
        torch.testing.assert_close(kept(inputs(3)), linear(kind)(inputs(3)), rtol=1e-4, atol=1e-4)


def test_damaged_descriptions_are_refused():
    with pytest.raises(ArtifactError, match="rank"):
        read_encoding({"kind": "low_rank", "rank": 0})
    with pytest.raises(ArtifactError, match="left"):
        read_encoding({"kind": "low_rank", "rank": 2, "left": {"kind": "low_rank", "rank": 1}})


def test_it_says_what_it_is():
    assert stored("dense")[0].describe() == "rank 3"
    assert stored("affine")[0].describe() == "rank 3 in 3-bit row"
    assert stored("residual")[0].describe() == "3-bit row + rank 3"
