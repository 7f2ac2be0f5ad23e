"""LoRA on pruned layers: zeros stay zero when adapters are merged, and the merged model is the trained one."""

from __future__ import annotations

import pytest
import tiny
import torch
import training
from peft import IA3Config, LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

from hf_slim import GradualMagnitudePruning, compress, merge_and_unload
from hf_slim.core.errors import ModelError, PlanError
from hf_slim.core.select import Select
from hf_slim.pruning.targets import find_targets

TARGETS = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"]}


def adapted(name="llama", model=None, **options):
    model = tiny.ALL[name]() if model is None else model
    config = LoraConfig(target_modules=TARGETS[name], r=4, fan_in_fan_out=name == "gpt2", **options)
    return get_peft_model(model, config)


def train(folder, model, pruning, **options):
    callback = GradualMagnitudePruning(pruning)
    defaults = {"max_steps": 6, "optim": "adamw_torch", "learning_rate": 3e-2}
    trainer = Trainer(
        model,
        training.arguments(folder, TrainingArguments, **{**defaults, **options}),
        train_dataset=training.rows(),
        data_collator=training.Pad(),
        callbacks=[callback],
    )
    return trainer, callback


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_pruning_under_adapters_is_exact_and_survives_the_merge(tmp_path, name, dropout):
    torch.manual_seed(0)
    model = adapted(name, lora_dropout=dropout)
    trainer, callback = train(tmp_path, model, {"sparsity": 0.5, "every": 1})
    trainer.train()
    expected = tiny.logits(model)
    assert any(target.adapter is not None for target in callback.targets.values())
    assert not any("lora_" in layer or "base_layer" in layer for layer in callback.targets)
    merged = merge_and_unload(model)
    assert not any("lora_" in parameter for parameter, _ in merged.named_parameters())
    for layer, target in find_targets(merged, callback.config.layers).items():
        assert int((target.weight == 0).sum()) == round(0.5 * target.weight.numel()), layer
    assert training.relative(tiny.logits(merged), expected) < 1e-5
    assert (tiny.logits(merged) - tiny.logits(tiny.ALL[name]())).abs().max() > 1e-2


def test_zeros_of_the_base_survive_training_and_merging(tmp_path):
    base = tiny.llama()
    compress(base, "prune.magnitude", sparsity=0.6)
    model = adapted(model=base)
    trainer, _ = train(tmp_path, model, {"sparsity": 0.0})
    trainer.train()
    expected = tiny.logits(model)
    merged = merge_and_unload(model)
    for target in find_targets(merged, Select()).values():
        assert int((target.weight == 0).sum()) == round(0.6 * target.weight.numel())
    assert training.relative(tiny.logits(merged), expected) < 1e-5


@pytest.mark.parametrize("kind", ["neuron", "head"])
def test_whole_units_that_went_under_adapters_can_be_cut_out_of_the_merged_model(tmp_path, kind):
    model = adapted()
    trainer, callback = train(tmp_path, model, {"sparsity": 0.5, "units": kind, "every": 1})
    trainer.train()
    expected = tiny.logits(model)
    assert callback.masks
    merged = merge_and_unload(model)
    assert training.relative(tiny.logits(merged), expected) < 1e-5
    report = compress(merged, "prune.structurize", kinds=[kind])
    assert report.metrics[f"removed_{kind}s"] == 2 * {"neuron": 36, "head": 1}[kind]
    assert training.relative(tiny.logits(merged), expected) < 1e-5


def test_a_plain_merge_would_fill_the_zeros(tmp_path):
    """What this module is for: PEFT's own merge after the same training."""
    model = adapted()
    train(tmp_path, model, {"sparsity": 0.5, "every": 1})[0].train()
    assert int((model.merge_and_unload().model.layers[0].mlp.down_proj.weight == 0).sum()) == 0


def test_a_resumed_run_equals_a_straight_one(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 3}
    torch.manual_seed(0)
    straight = adapted()
    train(tmp_path, straight, {"sparsity": 0.6, "every": 1}, **options)[0].train()
    torch.manual_seed(1)
    resumed = adapted()
    trainer, _ = train(tmp_path, resumed, {"sparsity": 0.6, "every": 1}, **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert torch.equal(tiny.logits(resumed), tiny.logits(straight))


def test_what_cannot_be_merged_is_refused():
    with pytest.raises(ModelError, match="LlamaForCausalLM has no adapters to merge"):
        merge_and_unload(tiny.llama())
    model = adapted()
    model.merge_adapter()
    with pytest.raises(ModelError, match="merged already; call unmerge_adapter"):
        merge_and_unload(model)
    base = tiny.llama()
    base.model.layers[0].mlp.down_proj.weight.data[0] = 0
    with pytest.raises(ModelError, match=r"0\.mlp\.down_proj is pruned, and its adapter is more than plain LoRA"):
        merge_and_unload(adapted(model=base, use_dora=True))


@pytest.mark.parametrize(
    ("config", "pruning", "message"),
    [
        (IA3Config(target_modules=["down_proj"], feedforward_modules=[]), {}, "more than plain LoRA"),
        (LoraConfig(target_modules=["down_proj"]), {"score": "taylor"}, "get no gradients.*score: taylor needs them"),
        (LoraConfig(target_modules=["down_proj"]), {"shadow": True}, "shadow: true needs them"),
    ],
    ids=["ia3", "taylor", "shadow"],
)
def test_what_adapters_rule_out_is_refused(tmp_path, config, pruning, message):
    trainer, _ = train(tmp_path, get_peft_model(tiny.llama(), config), {"initial_sparsity": 0.3, **pruning})
    with pytest.raises(PlanError, match=message):
        trainer.train()
