"""Packed kernels compute what decoding and multiplying does, and lose not a bit of what is stored."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hf_slim.encodings import Affine, Codebook, Encoding
from hf_slim.encodings import kernels as kernels_module
from hf_slim.encodings.kernels import FEW_ROWS, Int4, Int8, half_split, kernel_for, why_not_packed
from hf_slim.encodings.modules import EncodedEmbedding, EncodedLinear, TiedHead

# Activations, results and the int4 kernel's scales and offsets are rounded to bfloat16, 2**-9 each.
ROUNDING = 8e-3
DTYPES = (torch.float32, torch.bfloat16)
CPU = torch.device("cpu")


def stored(encoding: Affine, rows: int, cols: int, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    groups = encoding.groups(cols)
    codes = torch.randint(0, 2**encoding.bits, (rows, cols), generator=generator).to(torch.uint8)
    scales = (torch.rand(rows, groups, generator=generator) + 0.5) * torch.randn(rows, 1, generator=generator).sign()
    # zero points near the middle, where solvers put them: weights lie around zero
    half = 2 ** (encoding.bits - 1)
    zeros = half + torch.randint(-half // 2, half // 2 + 1, (rows, groups), generator=generator)
    return encoding.pack(codes, scales * 0.02, zeros.clamp(0, 2**encoding.bits - 1).to(torch.uint8))


def linear(encoding: Affine, rows: int = 48, cols: int = 128, bias: bool = False, dtype=torch.float32) -> EncodedLinear:
    layer = EncodedLinear(cols, rows, encoding, bias=bias, dtype=dtype)
    layer.put(stored(encoding, rows, cols))
    if bias:
        nn.init.normal_(layer.bias, generator=torch.Generator().manual_seed(0))
    return layer


def inputs(tokens: int, cols: int = 128, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(tokens, cols, generator=torch.Generator().manual_seed(1)).to(dtype)


def expected(layer: EncodedLinear, x: torch.Tensor) -> torch.Tensor:
    W = layer.encoding.decode({n: t.clone() for n, t in copy.deepcopy(layer).tensors().items()}, layer.rows, layer.cols)
    y = x.double() @ W.double().T
    return y if layer.bias is None else y + layer.bias.detach().double()


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found.double() - wanted).norm() / wanted.norm()).item()


INT4, INT8 = Affine(bits=4, group_size=64), Affine(bits=8)
EACH = {
    "int4": INT4,
    "int8": INT8,
    "int8 sym": Affine(bits=8, symmetric=True),
    "two planes": Affine(bits=8, group_size=32),
}
each = pytest.mark.parametrize("encoding", EACH.values(), ids=EACH.keys())


@given(
    bits=st.integers(1, 8),
    group_size=st.sampled_from([None, 32, 64, 96, 128, 256, 512]),
    symmetric=st.booleans(),
    rows=st.integers(1, 150),
    runs=st.integers(1, 16),
    tokens=st.integers(1, FEW_ROWS),
    dtype=st.sampled_from(DTYPES),
)
@settings(max_examples=60, deadline=None, derandomize=True)
@torch.no_grad()
def test_equals_decoding_and_gives_the_codes_back(bits, group_size, symmetric, rows, runs, tokens, dtype):
    cols = 32 * runs
    encoding = Affine(bits=bits, group_size=group_size, symmetric=symmetric)
    layer = linear(encoding, rows, cols)
    before = {name: tensor.clone() for name, tensor in layer.tensors().items()}
    x = inputs(tokens, cols, dtype)
    wanted = expected(layer, x)
    found = layer(x)
    kernel = layer._packed
    assert type(kernel) is (Int8 if group_size is None and bits > 4 else Int4)
    assert kernel.reversible
    assert found.dtype == dtype
    assert error(found, wanted) < ROUNDING
    many = layer(inputs(FEW_ROWS + 1, cols))  # decodes from the packed form
    assert layer._packed is kernel
    assert error(many, expected_from(encoding, before, rows, cols)) < 1e-5
    for name, tensor in layer.tensors().items():
        assert torch.equal(tensor, before[name])


def expected_from(encoding: Affine, tensors: dict[str, torch.Tensor], rows: int, cols: int) -> torch.Tensor:
    return inputs(FEW_ROWS + 1, cols).double() @ encoding.decode(tensors, rows, cols).double().T


@torch.no_grad()
def test_centered_grids():
    layer = linear(Affine(bits=2, group_size=32, symmetric=True, centered=True))
    assert error(layer(inputs(3)), expected(layer, inputs(3))) < ROUNDING


@each
@torch.no_grad()
def test_packing_happens_once(encoding, monkeypatch):
    packed: list[object] = []
    kernel = kernel_for(encoding, 128, torch.float32)
    real = kernel.__init__
    monkeypatch.setattr(kernel, "__init__", lambda self, *args: (packed.append(self), real(self, *args))[1])
    layer = linear(encoding)
    for tokens in (1, 3, 1, FEW_ROWS + 1, 200, FEW_ROWS):
        layer(inputs(tokens))
        layer(inputs(tokens, dtype=torch.bfloat16))
    assert len(packed) == 1
    layer.scales.mul_(2)  # what is stored changed: pack anew, once
    wanted = expected(layer, inputs(2))
    for _ in range(3):
        assert error(layer(inputs(2)), wanted) < ROUNDING
    assert len(packed) == 2


@each
@torch.no_grad()
def test_many_rows_alone_never_pack(encoding):
    layer = linear(encoding)
    layer(inputs(FEW_ROWS + 1))
    assert layer._packed is None


@each
@torch.no_grad()
def test_the_packed_form_replaces_the_stored_codes(encoding):
    layer = linear(encoding, 128, 512)
    before = layer.nbytes()
    layer(inputs(1, 512))
    resident = sum(buffer.nbytes for buffer in layer.buffers())
    assert "codes" not in dict(layer.named_buffers())
    assert resident == before
    assert layer.nbytes() == before


@each
@torch.no_grad()
def test_state_dict_copies_and_moves_are_those_of_the_stored_form(encoding, tmp_path):
    plain, layer = linear(encoding, bias=True), linear(encoding, bias=True)
    wanted = layer(inputs(2))
    ways = {
        "state dict": lambda: layer.state_dict(),
        "deepcopy": lambda: copy.deepcopy(layer).state_dict(),
        "pickle": lambda: pickle.loads(pickle.dumps(layer)).state_dict(),  # noqa: S301
        "to dtype": lambda: layer.to(torch.bfloat16).to(torch.float32).state_dict(),
        "to device": lambda: layer.to("cpu").state_dict(),
        "codes": lambda: {"codes": layer.codes},
        "tensors": lambda: layer.tensors(),
    }
    for way, take in ways.items():
        layer.load_state_dict(plain.state_dict())
        assert torch.equal(layer(inputs(2)), wanted), way
        assert layer._packed is not None
        found = take()
        assert layer._packed is None, way
        for name, tensor in found.items():
            if name != "bias" or way != "to dtype":
                assert torch.equal(tensor, plain.state_dict()[name]), way
        assert list(layer.state_dict()) == list(plain.state_dict())
    layer(inputs(2))
    layer.put(stored(encoding, 48, 128, seed=5))
    assert error(layer(inputs(2)), expected(layer, inputs(2))) < ROUNDING


@each
def test_packed_in_inference_mode_and_trained_later(encoding):
    layer, plain = linear(encoding, bias=True), linear(encoding, bias=True)
    with torch.inference_mode():
        layer(inputs(2))
    assert layer._packed is not None
    x, y = inputs(2).requires_grad_(), inputs(2).requires_grad_()
    for module, given_x in ((layer, x), (plain, y)):
        module(given_x).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    torch.testing.assert_close(layer.bias.grad, plain.bias.grad)
    layer.load_state_dict(plain.state_dict())


@each
def test_an_adapter_beside_a_packed_layer_gets_gradients(encoding):
    layer = linear(encoding)
    with torch.no_grad():
        layer(inputs(1))
    A, x = nn.Parameter(torch.randn(128, 128, generator=torch.Generator().manual_seed(3)) / 11), inputs(2)
    layer(x @ A).sum().backward()
    W = layer.weight
    torch.testing.assert_close(A.grad, x.T @ torch.ones(2, 48) @ W)


@each
@torch.no_grad()
def test_tied_head_and_lookup_share_one_table(encoding):
    table = EncodedEmbedding(150, 128, encoding)
    table.put(stored(encoding, 150, 128))
    head, ids = TiedHead(table, None), torch.tensor([[0, 149, 7], [63, 64, 65]])
    looked_up = table(ids)
    W = table.weight.clone()
    logits = head(inputs(1))
    assert table._packed is not None
    assert error(logits, inputs(1).double() @ W.double().T) < ROUNDING
    assert torch.equal(table(ids), looked_up)
    assert torch.equal(table.weight, W)


@torch.no_grad()
def test_unknown_layouts_keep_the_stored_codes(monkeypatch):
    monkeypatch.setattr(kernels_module, "half_split", lambda: None)
    layer = linear(INT4)
    assert error(layer(inputs(2)), expected(layer, inputs(2))) < ROUNDING
    layer(inputs(2))
    assert not layer._packed.reversible
    assert torch.equal(layer.codes, linear(INT4).codes)


def test_this_processor_has_a_layout_that_can_be_read_back():
    assert half_split() in (16, 32, 64)


@pytest.mark.parametrize(
    ("encoding", "cols", "dtype", "reason"),
    [
        (Codebook(bits=4, clusters=16), 128, torch.float32, "codebook"),
        (Affine(bits=4, group_size=64, survivors=10), 128, torch.float32, "pruned"),
        (Affine(bits=4, group_size=48), 96, torch.float32, "48"),
        (Affine(bits=8), 40, torch.float32, "40"),
        (INT8, 128, torch.float16, "float16"),
        (Affine(bits=8, symmetric=True, activations="int8"), 128, torch.float32, "int8 activations in float32"),
    ],
)
def test_reasons_for_no_kernel(encoding: Encoding, cols, dtype, reason):
    assert reason in why_not_packed(encoding, cols, dtype)
    assert kernel_for(encoding, cols, dtype) is None
    assert "meta" in why_not_packed(INT8, 128, torch.bfloat16, "meta")
    assert why_not_packed(INT8, 128, torch.bfloat16) is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@each
@torch.no_grad()
def test_on_a_gpu(encoding):
    layer = linear(encoding, 64, 512, dtype=torch.bfloat16)
    x = inputs(2, 512, torch.bfloat16)
    wanted = expected(layer, x)
    assert error(layer.cuda()(x.cuda()).cpu(), wanted) < ROUNDING
