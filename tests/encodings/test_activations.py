"""Products of 8-bit weights and 8-bit activations: an integer product, rescaled, and nothing else."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from reference.encodings import int8_product
from torch import nn

from hf_slim.encodings import Affine, read_encoding
from hf_slim.encodings.activations import quantize_tokens
from hf_slim.encodings.modules import EncodedEmbedding, EncodedLinear, TiedHead

ROWS, COLS = 32, 96
W8A8 = Affine(bits=8, symmetric=True, activations="int8")


def stored(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (ROWS, COLS), generator=generator).to(torch.uint8)
    scales = torch.randn(ROWS, 1, generator=generator) * 0.01
    return W8A8.pack(codes, scales, torch.full((ROWS, 1), 128, dtype=torch.uint8))


def layer(dtype: torch.dtype, bias: bool) -> EncodedLinear:
    made = EncodedLinear(COLS, ROWS, W8A8, bias=bias, dtype=dtype)
    made.put(stored())
    if bias:
        nn.init.normal_(made.bias, generator=torch.Generator().manual_seed(0))
    return made


def inputs(tokens: int, dtype: torch.dtype) -> torch.Tensor:
    x = torch.randn(tokens, COLS, generator=torch.Generator().manual_seed(1)) * torch.logspace(-3, 3, tokens)[:, None]
    return x.to(dtype)


@pytest.mark.parametrize("tokens", [1, 3, 70])
@pytest.mark.parametrize("bias", [True, False])
# a processor with bfloat16 arithmetic rounds the decoded weight, the product and the result, to 2^-8 each
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 1e-6), (torch.bfloat16, 3 * 2**-8)])
@torch.no_grad()
def test_equals_the_integer_oracle_to_rounding(tokens, bias, dtype, rounding):
    module, x = layer(dtype, bias), inputs(tokens, dtype)
    tensors = stored()
    b = module.bias.double().numpy() if bias else None
    expected = int8_product(x.double().numpy(), tensors["codes"].numpy(), tensors["scales"].double().numpy(), b)
    found = module(x)
    assert found.dtype == dtype
    size = np.abs(expected).max(axis=1, keepdims=True)
    assert (np.abs(found.double().numpy() - expected) <= rounding * size).all()


def test_the_oracle_tells_quantized_activations_from_exact_ones():
    module, x = layer(torch.float32, False), inputs(8, torch.float32)
    exact = x @ module.weight.T
    error = (module(x) - exact).norm() / exact.norm()
    assert 1e-4 < error < 2e-2


def test_a_token_of_zeros_stays_zero_and_tokens_do_not_touch_each_other():
    x = torch.stack([torch.zeros(COLS), torch.full((COLS,), 1e30), torch.linspace(-1, 1, COLS)])
    q, scale = quantize_tokens(x)
    assert torch.equal(q[0], torch.zeros(COLS))
    assert torch.equal(q[1], torch.full((COLS,), 127.0))
    assert torch.equal(q[2], quantize_tokens(x[2:])[0][0])
    assert (q * scale - x).abs().le(scale * 0.5 * (1 + 1e-6)).all()


def test_gradients_pass_the_rounding():
    module = layer(torch.float32, True)
    x = inputs(4, torch.float32).requires_grad_()
    slope = torch.randn(4, ROWS, generator=torch.Generator().manual_seed(2))
    (module(x) * slope).sum().backward()
    torch.testing.assert_close(x.grad, slope @ module.weight)


def test_a_tied_head_multiplies_the_same_way():
    table = EncodedEmbedding(ROWS, COLS, W8A8)
    table.put(stored())
    x = inputs(3, torch.float32)
    assert torch.equal(TiedHead(table, None)(x), layer(torch.float32, False)(x))


def test_description():
    assert W8A8.describe() == "8-bit row sym, int8 activations"
    written = W8A8.model_dump(mode="json", exclude_defaults=True) | {"kind": "affine"}
    assert read_encoding(written) == W8A8
    assert copy.deepcopy(layer(torch.float32, True)).encoding == W8A8


@pytest.mark.parametrize(
    ("wrong", "word"), [({"bits": 4}, "bits"), ({"group_size": 64}, "group_size"), ({"symmetric": False}, "symmetric")]
)
def test_other_weights_are_refused(wrong, word):
    with pytest.raises(ValidationError, match=f"activations.*{word}"):
        Affine(**({"bits": 8, "symmetric": True, "activations": "int8"} | wrong))
