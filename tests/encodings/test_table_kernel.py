"""Codebooks with int8 tables are multiplied as integers: the same product, and nothing stored changes."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from hf_slim.encodings import Codebook
from hf_slim.encodings.kernels import Int8Tables, kernel_for, why_not_packed
from hf_slim.encodings.modules import EncodedEmbedding, EncodedLinear, TiedHead

ROWS, COLS = 70, 96
FORMS = {
    "tensor": {},
    "rows": {"rows_per_book": 4},
    "scaled": {"scales": "row", "rows_per_book": 16},
    "pairs": {"dim": 2},
    "fours": {"dim": 4, "scales": "row"},
}
each = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())


def stored(form: dict) -> tuple[Codebook, dict[str, torch.Tensor]]:
    g = torch.Generator().manual_seed(0)
    encoding = Codebook(bits=4, clusters=16, centroid_dtype="int8", **form)
    codes = torch.randint(0, 16, (ROWS, COLS // encoding.dim), generator=g).to(torch.uint8)
    centroids = torch.randn(encoding.books(ROWS), 16, *([encoding.dim] if encoding.dim > 1 else []), generator=g)
    scales = torch.rand(ROWS, generator=g) + 0.1 if encoding.scales else None
    return encoding, encoding.pack(codes, centroids, scales=scales)


def inputs(n: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(n, COLS, generator=torch.Generator().manual_seed(1)).to(dtype)


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_those_of_the_decoded_weight(form, dtype):
    encoding, tensors = stored(form)
    layer = EncodedLinear(COLS, ROWS, encoding, bias=True, dtype=dtype)
    layer.put(tensors)
    layer.bias.data.normal_(generator=torch.Generator().manual_seed(2))
    W = encoding.decode(tensors, ROWS, COLS)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    with torch.no_grad():
        for n in (1, 5, 16):
            x = inputs(n, dtype)
            expected = F.linear(x.float(), W, layer.bias.float())
            assert (layer(x).float() - expected).abs().max() < 0.01 * expected.abs().max()
    assert isinstance(layer._packed, Int8Tables)
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())


def test_a_tied_head_uses_it_and_the_embedding_reads_rows():
    encoding, tensors = stored(FORMS["scaled"])
    embedding = EncodedEmbedding(ROWS, COLS, encoding)
    embedding.put(tensors)
    W, x = encoding.decode(tensors, ROWS, COLS), inputs(2, torch.float32)
    with torch.no_grad():
        y = TiedHead(embedding, None)(x)
        assert (y - x @ W.T).abs().max() < 0.01 * y.abs().max()
        assert isinstance(embedding._packed, Int8Tables)
        assert torch.equal(embedding(torch.tensor([3, 69])), W[[3, 69]])


@pytest.mark.parametrize(
    ("options", "cols", "dtype", "reason"),
    [
        ({"centroid_dtype": "float16"}, 96, torch.float32, "float16 tables"),
        ({"outliers": 3}, 96, torch.float32, "outliers"),
        ({}, 96, torch.float16, "too coarse"),
        ({}, 40, torch.bfloat16, "40"),
    ],
)
def test_reasons_for_no_kernel(options, cols, dtype, reason):
    encoding = Codebook(**{"bits": 4, "clusters": 16, "centroid_dtype": "int8"} | options)
    assert reason in why_not_packed(encoding, cols, dtype)
    assert kernel_for(encoding, cols, dtype) is None
