"""The callback in TRL's SFTTrainer: the same exact zeros, with and without adapters."""

from __future__ import annotations

import pytest
import tiny
import torch
from datasets import Dataset
from peft import LoraConfig

from hf_slim import GradualMagnitudePruning, merge_and_unload
from hf_slim.pruning.targets import find_targets

trl = pytest.importorskip("trl", reason="TRL is not installed: pip install hf_slim[trl]")

WORDS = ("pruning", "makes", "small", "models", "of", "large", "ones")
TEXTS = [f"{word} is a word of {len(word)} letters." for word in WORDS]


def train(folder, pruning, **options):
    args = trl.SFTConfig(
        output_dir=str(folder),
        max_steps=4,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        max_length=32,
        use_cpu=True,
        bf16=False,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        gradient_checkpointing=False,
    )
    callback = GradualMagnitudePruning(pruning)
    data = Dataset.from_dict({"text": TEXTS * 2})
    tools = {"processing_class": tiny.tokenizer(), "callbacks": [callback]}
    trainer = trl.SFTTrainer(tiny.llama(), args, train_dataset=data, **tools, **options)
    trainer.train()
    return trainer, callback


@pytest.mark.parametrize("way", [{}, {"score": "taylor", "shadow": True}], ids=str)
def test_sft_prunes_to_one_weight(tmp_path, way):
    trainer, callback = train(tmp_path, {"sparsity": 0.45, "every": 1, **way})
    assert callback.targets
    for target in find_targets(trainer.model, callback.config.layers).values():
        assert int((target.weight == 0).sum()) == round(0.45 * target.weight.numel())


def test_sft_with_adapters_merges_into_a_pruned_model(tmp_path):
    lora = LoraConfig(target_modules=["q_proj", "down_proj"], r=2)
    trainer, callback = train(tmp_path, {"sparsity": 0.45, "every": 1}, peft_config=lora)
    with torch.no_grad():
        expected = trainer.model.eval()(input_ids=tiny.ids()).logits
        merged = merge_and_unload(trainer.model)
        assert (merged(input_ids=tiny.ids()).logits - expected).abs().max() < 1e-5
    for target in find_targets(merged, callback.config.layers).values():
        assert int((target.weight == 0).sum()) == round(0.45 * target.weight.numel())
