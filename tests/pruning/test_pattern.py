"""How pruned layers are stored: what is planned is what is packed, and a file takes the bits that are promised."""

from __future__ import annotations

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

import hf_slim
from hf_slim.core.errors import PlanError, SlimError
from hf_slim.core.select import Layer
from hf_slim.core.swap import get_weight
from hf_slim.pruning.masks import magnitude_mask, n_m_mask
from hf_slim.pruning.pattern import block_of, column_problems, pack, parse_pattern, stored

ROWS, COLS = 96, 64
PATTERNS = ("unstructured", "1:4", "2:4", "block:4")


def weight(seed: int = 0) -> torch.Tensor:
    return torch.randn(ROWS, COLS, generator=torch.Generator().manual_seed(seed)).bfloat16()


def mask(W: torch.Tensor, pattern: str, sparsity: float = 0.5) -> torch.Tensor:
    n_m = parse_pattern(pattern)
    return magnitude_mask(W, sparsity, block_of(pattern)) if n_m is None else n_m_mask(W, *n_m)


def layer() -> Layer:
    return Layer("layer", "linear", ROWS, COLS, torch.bfloat16)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_plan_and_pack_agree(pattern):
    W = weight()
    keep = mask(W, pattern)
    encoding, tensors = pack(W, keep, pattern)
    assert encoding == stored(layer(), pattern, 0.5)
    assert torch.equal(encoding.decode(tensors, ROWS, COLS), W * keep)


@pytest.mark.parametrize(
    ("earlier", "pattern", "exact"),
    [("2:4", "1:4", True), ("block:4", "block:4", True), ("unstructured", "2:4", False), ("2:4", "unstructured", True)],
)
def test_pruning_again_never_brings_anything_back(earlier, pattern, exact):
    W = weight()
    first = mask(W, earlier)
    pruned = layer().encoded(stored(layer(), earlier, 0.5))
    keep = first & mask(W * first, pattern, 0.75)
    encoding, tensors = pack(W, keep, pattern)
    planned = stored(pruned, pattern, 0.75)
    assert planned.pattern == encoding.pattern
    assert (planned == encoding) == exact
    assert encoding.survivors <= planned.survivors
    assert torch.equal(encoding.decode(tensors, ROWS, COLS), W * keep)


@pytest.mark.parametrize("pattern", ["4:2", "0:4", "2:2", "block:1", "block:x", "half", "2:4:8", ""])
def test_unknown_patterns_are_refused(pattern):
    with pytest.raises(SlimError, match="'block:4'"):
        parse_pattern(pattern)
    with pytest.raises(SlimError, match="pattern"):
        hf_slim.compress(tiny.llama(), "prune.magnitude", pattern=pattern)


@pytest.mark.parametrize("pattern", ["2:16", "block:16"])
def test_all_layers_that_cannot_take_a_pattern_are_named_at_once(pattern):
    model = tiny.llama()  # 40 and 72 columns
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(PlanError) as caught:
        hf_slim.compress(model, "prune.magnitude", pattern=pattern)
    assert len(caught.value.problems) == 14
    assert all("no multiple of 16" in problem for problem in caught.value.problems)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert column_problems("fc", 64, pattern) == []


def bits_on_disk(folder, model) -> float:
    """Bits a weight of everything in the file that belongs to encoded layers."""
    import json

    with open(folder / "model.safetensors", "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    encoded = {name: m for name, m in model.named_modules() if isinstance(m, hf_slim.encodings.modules.EncodedModule)}
    spans = [entry["data_offsets"] for key, entry in header.items() if key.rpartition(".")[0] in encoded]
    return 8 * sum(end - start for start, end in spans) / sum(m.rows * m.cols for m in encoded.values())


@pytest.mark.parametrize(
    ("options", "quantized", "limit"),
    [
        ({"sparsity": 0.7}, None, 5.9),
        ({"sparsity": 0.5}, 4, 3.1 + 24 / 40),
        ({"pattern": "2:4"}, None, 8.8),
        ({"pattern": "1:4"}, None, 4.6),
        ({"pattern": "1:4"}, 4, 1.6 + 24 / 40),
        ({"pattern": "block:4", "sparsity": 0.5}, None, 8.4),
    ],
)
def test_bits_on_disk(options, quantized, limit, tmp_path):
    """Scales and zero points are 16 + 8 bits a row of at least 40 weights: `quantized` files may take these too."""
    model = tiny.llama(torch.bfloat16)
    hf_slim.compress(model, "prune.magnitude", **options)
    pruned = {n: get_weight(m) == 0 for n, m in model.named_modules() if hasattr(m, "encoding")}
    if quantized:
        hf_slim.compress(model, "quantize.rtn", bits=quantized, group_size=None)
    model.save_pretrained(tmp_path)
    assert bits_on_disk(tmp_path, model) <= limit
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert pruned
    for name, zeros in pruned.items():
        assert not get_weight(again.get_submodule(name))[zeros].any()
    with torch.no_grad():
        assert torch.equal(again(tiny.ids()).logits, model.eval()(tiny.ids()).logits)
