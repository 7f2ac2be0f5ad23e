"""Encoded layers behave like the dense layers that they stand in for, and lose nothing in silence."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from torch import nn
from torch.nn import functional as F
from training import arguments
from transformers import AutoModelForCausalLM, Trainer

import hf_slim
from hf_slim.core.errors import SlimError
from hf_slim.core.precision import in_dtype
from hf_slim.core.swap import encode_layer, get_keep, get_weight
from hf_slim.encodings import Affine, Codebook, Sparse
from hf_slim.encodings.modules import DecodedWeight, EncodedEmbedding, EncodedLinear, EncodedModule, TiedHead

ROWS, COLS = 24, 20
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def stored(kind: str, dtype: torch.dtype = torch.float32):
    """An encoding of a weight [ROWS, COLS] and its tensors."""
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(0, 8, (ROWS, COLS), generator=generator).to(torch.uint8)
    keep = torch.rand(ROWS, COLS, generator=generator) < 0.5
    if kind == "affine":
        encoding = Affine(bits=3, group_size=8)
        scales = torch.rand(ROWS, 3, generator=generator) + 0.1
        zeros = torch.randint(0, 8, (ROWS, 3), generator=generator).to(torch.uint8)
        return encoding, encoding.pack(codes, scales, zeros)
    if kind == "codebook":
        encoding = Codebook(bits=3, clusters=8, rows_per_book=5, survivors=int(keep.sum()))
        return encoding, encoding.pack(codes, torch.randn(5, 8, generator=generator), keep)
    encoding = Sparse(survivors=int(keep.sum()))
    return encoding, encoding.pack(torch.randn(ROWS, COLS, generator=generator).to(dtype), keep)


KINDS = ("affine", "codebook", "sparse")
each_kind = pytest.mark.parametrize("kind", KINDS)


def linear(kind: str, dtype: torch.dtype = torch.float32, bias: bool = True) -> EncodedLinear:
    encoding, tensors = stored(kind, dtype)
    layer = EncodedLinear(COLS, ROWS, encoding, bias=bias, dtype=dtype)
    layer.put(tensors)
    if bias:
        nn.init.normal_(layer.bias, generator=torch.Generator().manual_seed(0))
    return layer


def embedding(kind: str, dtype: torch.dtype = torch.float32) -> EncodedEmbedding:
    encoding, tensors = stored(kind, dtype)
    layer = EncodedEmbedding(ROWS, COLS, encoding, dtype=dtype)
    layer.put(tensors)
    return layer


def dense_like(layer: EncodedLinear) -> nn.Linear:
    dense = nn.Linear(COLS, ROWS, bias=layer.bias is not None, dtype=layer.compute_dtype)
    dense.weight = nn.Parameter(get_weight(layer).clone())
    dense.bias = layer.bias
    return dense


def inputs(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(2, 5, COLS, generator=torch.Generator().manual_seed(1)).to(dtype)


@each_kind
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
def test_linear_is_a_linear_layer_with_the_decoded_weight(kind, dtype, bias):
    layer = linear(kind, dtype, bias)
    encoding, tensors = stored(kind, dtype)
    W = encoding.decode(tensors, ROWS, COLS).to(dtype)
    x, y = inputs(dtype).requires_grad_(), inputs(dtype).requires_grad_()
    out, expected = layer(x), F.linear(y, W, layer.bias)
    assert isinstance(layer, nn.Linear)
    assert torch.equal(out, expected)
    assert out.dtype == dtype
    out.float().square().sum().backward()
    expected.float().square().sum().backward()
    assert torch.equal(x.grad, y.grad)


@each_kind
@pytest.mark.parametrize("dtype", DTYPES)
def test_embedding_looks_up_rows_of_the_decoded_weight(kind, dtype):
    layer = embedding(kind, dtype)
    ids = torch.tensor([[0, 5, 5], [23, 1, 0]])
    assert isinstance(layer, nn.Embedding)
    assert torch.equal(layer(ids), F.embedding(ids, get_weight(layer)))
    assert layer(ids).dtype == dtype
    assert layer(ids[:0]).shape == (0, 3, COLS)


@each_kind
def test_tied_head_stores_nothing_of_its_own(kind):
    table = embedding(kind)
    bias = nn.Parameter(torch.randn(ROWS, generator=torch.Generator().manual_seed(2)))
    head = TiedHead(table, bias)
    model = nn.ModuleDict({"table": table, "head": head})
    assert torch.equal(head(inputs()), F.linear(inputs(), get_weight(table), bias))
    assert set(model.state_dict()) == {f"table.{name}" for name in table.tensors()} | {"head.bias"}
    moved = copy.deepcopy(model).to(torch.bfloat16)
    assert moved["head"]._source[0] is moved["table"]
    assert moved["head"].weight.dtype == torch.bfloat16


@each_kind
def test_writing_to_the_weight_is_refused(kind):
    layer = linear(kind)
    before = {name: tensor.clone() for name, tensor in layer.tensors().items()}
    assert torch.equal(layer.weight, get_weight(layer))
    assert layer.weight.shape == (ROWS, COLS)

    def assign(value):
        layer.weight.data = value

    def add(value):
        layer.weight.data += value

    def add_in_place(value):
        layer.weight.data.add_(value)

    def copy_in(value):
        layer.weight.copy_(value)

    def set_rows(value):
        layer.weight.data[0] = value[0]

    for write in (assign, add, add_in_place, copy_in, set_rows, nn.init.zeros_):
        with pytest.raises(SlimError, match="dequantize"):
            write(layer.weight if write is nn.init.zeros_ else torch.ones(ROWS, COLS))
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.tensors().items())


@each_kind
def test_results_of_arithmetic_on_the_weight_are_plain_tensors(kind):
    layer = linear(kind)
    for result in (layer.weight + 1, layer.weight.T, layer.weight.clone(), F.linear(inputs(), layer.weight)):
        assert type(result) is torch.Tensor
    result = layer.weight + 1
    result += 1
    assert torch.equal(result, get_weight(layer) + 1 + 1)
    assert torch.equal(copy.deepcopy(layer.weight), layer.weight)


@each_kind
def test_casts_keep_what_is_stored(kind):
    layer = linear(kind)
    before = {name: tensor.clone() for name, tensor in layer.tensors().items() if name not in layer.encoding.trainable}
    expected = get_weight(layer)
    for cast, dtype in ((nn.Module.half, torch.float16), (nn.Module.bfloat16, torch.bfloat16)):
        other = cast(copy.deepcopy(layer))
        assert get_weight(other).dtype == dtype == other(inputs(dtype)).dtype
        assert torch.equal(get_weight(other), expected.to(dtype))
        back = other.float()
        for name, tensor in before.items():
            assert getattr(back, name).dtype == tensor.dtype
            assert torch.equal(getattr(back, name), tensor)
        if not layer.encoding.trainable:
            assert torch.equal(get_weight(back), expected)
    assert get_weight(layer.to(torch.float64)).dtype == torch.float64


@each_kind
def test_state_dict_round_trip_and_deepcopy(kind):
    layer = linear(kind)
    empty = EncodedLinear(COLS, ROWS, layer.encoding)
    assert set(layer.state_dict()) == {*layer.tensors(), "bias"}
    for assign in (False, True):
        assert empty.load_state_dict(layer.state_dict(), assign=assign).missing_keys == []
        assert torch.equal(empty(inputs()), layer(inputs()))
    twin = copy.deepcopy(layer)
    for tensor in twin.tensors().values():
        tensor.data.zero_()
    assert torch.equal(empty(inputs()), layer(inputs()))


@each_kind
def test_put_refuses_other_shapes_and_dtypes(kind):
    encoding, tensors = stored(kind)
    layer = EncodedLinear(COLS, ROWS, encoding)
    for name, tensor in tensors.items():
        with pytest.raises(ValueError, match=name):
            layer.put(tensors | {name: tensor[..., :-1]})
        with pytest.raises(ValueError, match=name):
            layer.put(tensors | {name: tensor.double()})


@each_kind
@pytest.mark.parametrize("dtype", DTYPES)
def test_cached_equals_decoding_on_the_fly(kind, dtype):
    model = nn.ModuleDict({"linear": linear(kind, dtype), "table": embedding(kind, dtype)})
    plain = copy.deepcopy(model)
    hf_slim.cache_decoded(model)
    ids = torch.arange(ROWS)

    def same(dtype):
        found, expected = (m["linear"](inputs(dtype)).double() for m in (model, plain))
        rounding = 0 if dtype == torch.float32 else torch.finfo(dtype).eps  # decoding computes in float32 where faster
        torch.testing.assert_close(found, expected, rtol=0, atol=rounding * expected.abs().max().item())
        assert torch.equal(model["table"](ids), plain["table"](ids))
        assert torch.equal(model["linear"].weight, plain["linear"].weight)

    same(dtype)
    assert set(model.state_dict()) == set(plain.state_dict())
    with in_dtype(model, torch.float32), in_dtype(plain, torch.float32):
        same(torch.float32)
    same(dtype)
    for other in DTYPES:
        model, plain = model.to(other), plain.to(other)
        same(other)
    for layer in model.values():
        assert layer._cache is not None
    hf_slim.cache_decoded(model, on=False)
    assert all(layer._cache is None for layer in model.values())
    same(other)


def test_a_cache_does_not_answer_for_another_dtype():
    layer = linear("affine", torch.bfloat16, bias=False)
    expected = layer(inputs())
    layer.cache_decoded()
    assert torch.equal(layer(inputs()), expected)


def test_a_cache_follows_new_tensors_and_training():
    layer, other = linear("affine"), linear("affine")
    layer.cache_decoded()
    other.scales.mul_(2)
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer(inputs()), other(inputs()))

    pruned, plain = linear("sparse"), linear("sparse")
    pruned.cache_decoded()
    for model in (pruned, plain):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model(inputs()).square().sum().backward()
        assert model.values.grad is not None
        optimizer.step()
    with torch.no_grad():
        assert torch.equal(pruned(inputs()), plain(inputs()))
    assert torch.equal(pruned.weight, plain.weight)


def pruned_llama(dtype: torch.dtype = torch.float32):
    model = tiny.llama(dtype)
    hf_slim.compress(model, "prune.magnitude", sparsity=0.5)
    return model


def masks(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: get_keep(m) for name, m in model.named_modules() if isinstance(m, EncodedModule)}


def check_zeros(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    assert before
    for name, keep in before.items():
        assert torch.equal(masks(model)[name], keep)
        assert not get_weight(model.get_submodule(name))[~keep].any()


def test_survivors_train_and_zeros_stay_zero():
    model = pruned_llama()
    before, values = masks(model), {n: p.clone() for n, p in model.named_parameters() if n.endswith(".values")}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    ids, losses = tiny.ids(), []
    for _ in range(5):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(not torch.equal(model.get_parameter(name), value) for name, value in values.items())
    check_zeros(model, before)


def test_plain_trainer_trains_a_reloaded_pruned_model(tmp_path):
    tiny.save(pruned_llama(), tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    before, values = masks(model), {n: p.clone() for n, p in model.named_parameters() if n.endswith(".values")}
    data = [{"input_ids": row, "labels": row} for row in tiny.ids(8)]
    args = arguments(tmp_path, max_steps=3, per_device_train_batch_size=4, learning_rate=1e-2, use_cpu=True)
    Trainer(model, args, train_dataset=data).train()
    assert values
    assert all(not torch.equal(model.get_parameter(name), value) for name, value in values.items())
    check_zeros(model, before)
    model.save_pretrained(tmp_path / "trained")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "trained")
    with torch.no_grad():
        assert torch.equal(again(tiny.ids()).logits, model.eval()(tiny.ids()).logits)


def test_plain_trainer_refuses_codes(tmp_path):
    model = tiny.llama()
    hf_slim.compress(model, "quantize.rtn", bits=4)
    with pytest.raises(ValueError, match="purely quantized"):
        Trainer(model, arguments(tmp_path, use_cpu=True), train_dataset=[])


def test_conv1d_is_turned_before_it_is_encoded():
    model = tiny.gpt2()
    name = "transformer.h.0.mlp.c_fc"
    module = model.get_submodule(name)
    W, x = module.weight.detach().clone(), torch.randn(3, 48, generator=torch.Generator().manual_seed(0))
    expected = module(x)
    encoding = Sparse(survivors=W.numel())
    encode_layer(model, name, encoding, encoding.pack(get_weight(module), torch.ones(192, 48, dtype=torch.bool)))
    layer = model.get_submodule(name)
    assert (layer.in_features, layer.out_features, layer.turned) == (48, 192, True)
    torch.testing.assert_close(layer(x), expected)
    assert torch.equal(get_weight(layer), W.T)


def test_the_weight_says_what_it_is():
    assert isinstance(linear("affine").weight, DecodedWeight)
    assert "24 x 20, 3-bit g8" in repr(linear("affine"))
