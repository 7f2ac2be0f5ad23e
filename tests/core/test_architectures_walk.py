"""The walk runs every architecture's blocks as the model does, and shared or scaled embeddings stay what they are."""

from __future__ import annotations

import architectures
import pytest
import tiny
import torch
from torch import nn

import hf_slim
from hf_slim.core.context import Context
from hf_slim.core.forward import run_on
from hf_slim.core.select import find_layers, find_stacks
from hf_slim.core.swap import densify
from hf_slim.core.walk import walk
from hf_slim.encodings.embeddings import EncodedScaledEmbedding, TiedEmbedding
from hf_slim.encodings.modules import EncodedEmbedding, EncodedModule, TiedHead

torch.set_num_threads(1)
IDS = tiny.ids(3, 10)


@pytest.mark.parametrize("name", architectures.KINDS)
def test_blocks_are_fed_and_put_out_what_they_do_in_the_model(name):
    model = architectures.make(name)
    blocks = [block for stack in find_stacks(model) for block in stack.blocks]
    seen = {}

    def note(block):
        def hook(module, args, kwargs, out):
            entered = args[0] if args else kwargs["hidden_states"]
            seen[block] = entered, out[0] if isinstance(out, tuple) else out

        return hook

    handles = [model.get_submodule(b).register_forward_hook(note(b), with_kwargs=True) for b in blocks]
    with torch.no_grad():
        run_on(model, IDS)
    for handle in handles:
        handle.remove()
    walked = []

    def solve(known, block):
        walked.append(block.name)
        entered, left = seen[block.name]
        for got, expected in ((block.inputs(0), entered), (block.run(0), left), (block.target(0), left)):
            torch.testing.assert_close(got, expected)
        return {}

    layers = [layer for layer in find_layers(model).values() if layer.block is not None]
    walk(model, layers, IDS, solve, Context(), reference=True)
    assert walked == blocks
    assert len(blocks) == (4 if name == "T5" else 2)


def test_the_decoder_gets_the_windows_as_training_would_give_them():
    model = architectures.make("T5")
    with torch.no_grad():
        expected = model(input_ids=IDS, decoder_input_ids=model._shift_right(IDS), use_cache=False).logits
        assert torch.equal(run_on(model, IDS).logits, expected)


@pytest.mark.parametrize("name", ["Gemma 2", "Gemma 3", "T5"])
def test_embeddings_are_encoded_once_scaled_as_before_and_come_back(name, tmp_path):
    model = architectures.make(name)
    kinds = {n: type(m) for n, m in model.named_modules()}
    with torch.no_grad():
        before = run_on(model, IDS).logits
    hf_slim.compress(model, "quantize.rtn", layers={"include": []}, embeddings={"bits": 8})
    assert sum(isinstance(m, EncodedEmbedding) for m in model.modules()) == 1
    assert isinstance(model.get_input_embeddings(), EncodedScaledEmbedding) == name.startswith("Gemma")
    assert sum(isinstance(m, TiedEmbedding) for m in model.modules()) == (2 if name == "T5" else 0)
    with torch.no_grad():
        after = run_on(model, IDS).logits
    assert (after - before).norm() < 0.1 * before.norm()  # a lost scale would change everything
    model.save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert {key: found for key, found in info.items() if found} == {}
    loaded.dequantize()
    assert {n: type(m) for n, m in loaded.named_modules()} == kinds
    with torch.no_grad():
        torch.testing.assert_close(run_on(loaded, IDS).logits, after, rtol=1e-4, atol=1e-4)
    table = loaded.get_input_embeddings().weight
    heads = [m for m in loaded.modules() if isinstance(m, nn.Linear | nn.Embedding) and m.weight is table]
    assert len(heads) == (4 if name == "T5" else 2)


def test_a_scaled_embedding_in_bfloat16_scales_as_the_dense_one():
    model = architectures.make("Gemma 3").to(torch.bfloat16)
    hf_slim.compress(model, "quantize.rtn", layers={"include": []}, embeddings={"bits": 8})
    table = model.get_input_embeddings()
    with torch.no_grad():
        encoded = table(IDS)
        densify(model, "model.embed_tokens")
        assert torch.equal(model.get_input_embeddings()(IDS), encoded)


def test_layers_of_a_subclass_of_linear_are_found():
    layers = find_layers(architectures.make("Falcon"))
    assert sum(layer.block is not None for layer in layers.values()) == 8
    model = architectures.make("Falcon")
    hf_slim.compress(model, "quantize.rtn", bits=4, group_size=16)
    assert not [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and not _encoded(m) and ".h." in n]


def _encoded(module: nn.Module) -> bool:
    return isinstance(module, EncodedModule | TiedHead)
