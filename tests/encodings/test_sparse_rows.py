"""Weights that pruning left little of are multiplied as sparse rows: same numbers, nothing lost, never out of date."""

from __future__ import annotations

import copy

import pytest
import torch

from hf_slim.encodings import Affine, Codebook, Encoding, Sparse
from hf_slim.encodings.kernels import FEW_ROWS, SparseRows, kernel_for, why_not_packed
from hf_slim.encodings.modules import EncodedLinear

ROWS, COLS = 48, 64
pytestmark = pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="sparse products need MKL")


def draw(kind: str, share: float = 0.1, dtype: torch.dtype = torch.float32) -> EncodedLinear:
    generator = torch.Generator().manual_seed(0)
    keep = torch.rand(ROWS, COLS, generator=generator) < share
    left = int(keep.sum())
    codes = torch.randint(0, 16, (ROWS, COLS), generator=generator).to(torch.uint8)
    encoding: Encoding
    if kind == "sparse":
        encoding = Sparse(survivors=left)
        tensors = encoding.pack(torch.randn(ROWS, COLS, generator=generator).to(dtype), keep)
    elif kind == "affine":
        encoding = Affine(bits=4, survivors=left)
        zeros = torch.full((ROWS, 1), 8, dtype=torch.uint8)
        tensors = encoding.pack(codes, torch.rand(ROWS, 1, generator=generator), zeros, keep)
    else:
        encoding = Codebook(bits=4, clusters=16, survivors=left)
        tensors = encoding.pack(codes, torch.randn(1, 16, generator=generator), keep)
    layer = EncodedLinear(COLS, ROWS, encoding, bias=True, dtype=dtype)
    layer.put(tensors)
    torch.nn.init.normal_(layer.bias, generator=generator)
    return layer


def inputs(n: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(n, COLS, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["sparse", "affine", "codebook"])
@pytest.mark.parametrize("n", [1, 5, FEW_ROWS, FEW_ROWS + 1])
@torch.no_grad()
def test_products_agree_with_the_decoded_weight(kind, n, dtype):
    layer, x = draw(kind, dtype=dtype), inputs(n, dtype)
    W = layer.encoding.decode(layer.tensors(), ROWS, COLS).double()
    found = layer(x)
    assert (type(layer._packed) is SparseRows) == (n <= FEW_ROWS)
    assert found.dtype == dtype
    rounding = 1e-6 if dtype == torch.float32 else 8e-3
    torch.testing.assert_close(found.double(), x.double() @ W.T + layer.bias.double(), rtol=rounding, atol=8 * rounding)


@torch.no_grad()
def test_what_is_stored_stays_beside_it():
    layer = draw("sparse")
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    layer(inputs(1))
    assert layer.resident_bytes() == 8 * layer.encoding.survivors + 4 * (ROWS + 1)
    assert list(layer.state_dict()) == list(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())
    layer(inputs(1))
    assert torch.equal(copy.deepcopy(layer)(inputs(1)), layer(inputs(1)))
    assert layer.to(torch.bfloat16)(inputs(1, torch.bfloat16)).dtype == torch.bfloat16


def test_training_between_products_is_seen():
    layer, x = draw("sparse"), inputs(3)
    with torch.no_grad():
        first = layer(x)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer(x).square().sum().backward()
    optimizer.step()
    with torch.no_grad():
        found, W = layer(x), layer.encoding.decode(layer.tensors(), ROWS, COLS)
        torch.testing.assert_close(found, x @ W.T + layer.bias, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found, first)


@torch.no_grad()
def test_denser_weights_are_decoded():
    layer = draw("sparse", share=0.4)
    layer(inputs(1))
    assert layer._packed is None
    assert "20%" in why_not_packed(layer.encoding, COLS, torch.float32, "cpu", ROWS)
    sparse = draw("sparse").encoding
    assert kernel_for(sparse, COLS, torch.float32, "cpu", ROWS) is SparseRows
    assert "cuda" in why_not_packed(sparse, COLS, torch.float32, "cuda", ROWS)
