"""A pruned artifact that is loaded and fine-tuned keeps its zeros, unless the user makes it dense."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch import nn
from training import arguments
from transformers import AutoModelForCausalLM, Trainer

import hf_slim
from hf_slim.core.swap import get_keep, get_weight
from hf_slim.encodings.modules import EncodedModule


def pruned(folder, dtype: torch.dtype, **options):
    """A pruned model, saved and loaded again."""
    model = tiny.llama(dtype)
    hf_slim.compress(model, "prune.magnitude", **options)
    tiny.save(model, folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def zeros(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: ~get_keep(m) for n, m in model.named_modules() if isinstance(m, EncodedModule)}


def fine_tune(model, folder) -> None:
    rows = [{"input_ids": row, "labels": row} for row in tiny.ids(8)]
    given = {
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.1,
        "weight_decay": 0.1,
    }  # bfloat16 drops small steps
    Trainer(model, arguments(folder, use_cpu=True, **given), train_dataset=rows).train()


@pytest.mark.parametrize("options", [{"sparsity": 0.7}, {"pattern": "2:4"}, {"pattern": "block:4"}], ids=str)
def test_adamw_with_decay_in_bfloat16_keeps_zeros(options, tmp_path):
    model = pruned(tmp_path / "pruned", torch.bfloat16, **options)
    before, dense = zeros(model), {n: get_weight(model.get_submodule(n)) for n in zeros(model)}
    fine_tune(model, tmp_path)
    model.save_pretrained(tmp_path / "tuned")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned")
    assert len(before) == 14
    for name, dropped in before.items():
        W = get_weight(again.get_submodule(name))
        assert W.dtype == torch.bfloat16
        assert not W[dropped].any()
        assert not torch.equal(W, dense[name])
        assert torch.equal(zeros(again)[name], dropped)


def test_a_model_made_dense_trains_every_weight(tmp_path):
    model = pruned(tmp_path / "pruned", torch.float32, sparsity=0.7)
    before = zeros(model)
    model = model.dequantize()
    assert all(model.get_submodule(name).weight.requires_grad for name in before)
    fine_tune(model, tmp_path)
    assert all(model.get_submodule(name).weight[dropped].any() for name, dropped in before.items())


def test_survivors_train_beside_an_adapter(tmp_path):
    peft = pytest.importorskip("peft")
    base = pruned(tmp_path / "pruned", torch.float32, sparsity=0.7)
    before, values = zeros(base), {n: p.detach().clone() for n, p in base.named_parameters() if n.endswith(".values")}
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    assert not any(p.requires_grad for n, p in model.named_parameters() if n.endswith(".values"))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad or name.endswith(".values"))
    fine_tune(model, tmp_path)
    trained = {n: p for n, p in model.named_parameters() if n.endswith(".values")}
    assert len(trained) == len(values) == 14
    assert not any(torch.equal(p, q) for p, q in zip(trained.values(), values.values(), strict=True))
    unloaded = model.unload()
    for name, dropped in before.items():
        assert not get_weight(unloaded.get_submodule(name))[dropped].any()
