"""Tied tables are rounded for what their head is fed; the rest is rounded as before."""

from __future__ import annotations

import pytest
import tiny
import torch

import hf_slim
from hf_slim.core.select import find_layers
from hf_slim.quantization.embeddings import head_hessian, joint_hessian

DATA = tiny.ids(32, seed=3)
ONE = {"include": ["layers.1.mlp.down_proj"]}


def table(model) -> torch.Tensor:
    return model.get_input_embeddings().weight.detach().float()


def compressed(tied: bool = True, method: str = "quantize.gptq", **embeddings) -> torch.Tensor:
    model = tiny.llama(tied=tied)
    hf_slim.compress(model, method, data=DATA, bits=8, layers=ONE, embeddings=embeddings)
    return table(model)


def test_the_joint_hessian_charges_every_direction_its_share():
    H = torch.tensor([[3.0, 1.0], [1.0, 1.0]])
    assert torch.allclose(joint_hessian(H, 0.5), torch.tensor([[4.0, 1.0], [1.0, 2.0]]))


def test_the_head_hessian_is_the_second_moment_of_final_hidden_states():
    model = tiny.llama()
    layers = find_layers(model)
    found = head_hessian(model, next(x for x in layers.values() if x.kind == "embedding"), DATA)
    with torch.no_grad():
        h = model.model(DATA).last_hidden_state.flatten(0, 1)
    assert torch.allclose(found, 2 * h.T @ h / len(h), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("bits", "share"), [(3, 0.9), (4, 0.9), (6, 0.9)])
def test_logits_suffer_less_than_from_plain_rounding(bits, share):
    dense = tiny.llama()
    W = table(dense)
    with torch.no_grad():
        h = dense.model(tiny.ids(32, seed=4)).last_hidden_state.flatten(0, 1)  # held out
    weighted, plain = ((h @ (W - compressed(bits=bits, weighted=on)).T).square().sum() for on in (True, False))
    assert weighted < share * plain


@pytest.mark.parametrize(("tied", "weighted"), [(False, True), (True, False)])
def test_untied_tables_and_unweighted_ones_are_rounded_as_without_data(tied, weighted):
    assert torch.equal(compressed(tied, bits=4, weighted=weighted), compressed(tied, "quantize.rtn", bits=4))
