"""Which layers read the same tensor, on every architecture."""

from __future__ import annotations

import architectures
import pytest

from hf_slim.core.siblings import siblings

QKV, GATED, CALLED = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("query", "key", "value")
FUSED = {"Phi-3": [], "GPT-2": [], "GPT-NeoX": [], "Falcon": [("query_key_value", "dense_h_to_4h")], "Mixtral": [QKV]}
OTHER = {
    "OPT": [("k_proj", "v_proj", "q_proj")],
    "BERT": [CALLED],
    "RoBERTa": [CALLED],
    "DistilBERT": [("q_lin", "k_lin", "v_lin")],
}
TOGETHER = (
    {kind: [QKV, GATED] for kind in architectures.KINDS}
    | FUSED
    | OTHER
    | {"T5": [("q", "k", "v"), ("k", "v")], "Qwen3-MoE": [QKV]}
)


def groups(found):
    return {tuple(name.rpartition(".")[2] for name in names) for names in found.values() if len(names) > 1}


@pytest.mark.parametrize("name", TOGETHER)
def test_what_reads_one_tensor_is_found(name):
    assert groups(siblings(architectures.make(name))) == set(TOGETHER[name])
