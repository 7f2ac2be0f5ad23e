"""LoRA beside encoded weights: adapters train, save and reload; merging into codes is refused, into dense ones not."""

from __future__ import annotations

import pytest
import tiny
import torch
from training import arguments
from transformers import AutoModelForCausalLM, Trainer

import hf_slim
from hf_slim.core.errors import SlimError
from hf_slim.encodings.modules import EncodedModule

peft = pytest.importorskip("peft", reason="needs the extra 'peft'")

TARGETS = {"llama": ["q_proj", "v_proj"], "gpt2": ["c_attn"]}
METHODS = {"rtn": ("quantize.rtn", {"bits": 4, "embeddings": {"bits": 8}}), "sparse": ("prune.magnitude", {})}
each_architecture = pytest.mark.parametrize("architecture", TARGETS)
each_method = pytest.mark.parametrize("method", METHODS)


def saved(architecture: str, method: str, folder) -> str:
    model = tiny.CAUSAL[architecture]()
    address, options = METHODS[method]
    hf_slim.compress(model, address, **options)
    return tiny.save(model, folder / "slim")


def adapted(architecture: str, folder: str, **options):
    torch.manual_seed(0)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=8, lora_dropout=0.0, target_modules=TARGETS[architecture], **options
    )
    return peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config)


def train(model, folder) -> tuple[float, float]:
    """The loss before and after a few steps on text of four tokens."""
    ids = tiny.ids(4) % 4 + 2
    data = [{"input_ids": row, "labels": row} for row in ids]
    args = arguments(folder, max_steps=12, per_device_train_batch_size=4, learning_rate=3e-2, use_cpu=True)
    before = loss(model.eval(), ids)
    Trainer(model, args, train_dataset=data).train()
    return before, loss(model.eval(), ids)


def loss(model, ids: torch.Tensor) -> float:
    with torch.no_grad():
        return model(input_ids=ids, labels=ids).loss.item()


def stored(model) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{key}": tensor.clone()
        for name, module in model.named_modules()
        if isinstance(module, EncodedModule)
        for key, tensor in module.tensors().items()
    }


@each_architecture
@each_method
def test_adapters_train_save_and_reload(architecture, method, tmp_path):
    folder = saved(architecture, method, tmp_path)
    model = adapted(architecture, folder)
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trainable
    assert all("lora_" in name for name in trainable)
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    before, start = stored(model), tiny.logits(model.eval())
    before_loss, after_loss = train(model, tmp_path)
    assert after_loss < 0.95 * before_loss
    assert all(torch.equal(tensor, before[name]) for name, tensor in stored(model).items())
    assert all(torch.equal(model.get_parameter(name), tensor) for name, tensor in frozen.items())
    assert not torch.equal(tiny.logits(model), start)

    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "adapter")
    assert torch.equal(tiny.logits(again.eval()), tiny.logits(model))
    with again.disable_adapter():
        assert torch.equal(tiny.logits(again), start)


@each_architecture
@each_method
@pytest.mark.parametrize("safe_merge", [False, True])
def test_merging_into_codes_is_refused(architecture, method, safe_merge, tmp_path):
    model = adapted(architecture, saved(architecture, method, tmp_path), init_lora_weights=False).eval()
    before, expected = stored(model), tiny.logits(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(SlimError, match=r"model\.dequantize\(\)"):
            merge(safe_merge=safe_merge)
    assert all(torch.equal(tensor, before[name]) for name, tensor in stored(model).items())
    assert torch.equal(tiny.logits(model), expected)  # the adapter still works


@each_architecture
@each_method
def test_merging_works_once_the_model_is_dense(architecture, method, tmp_path):
    folder = saved(architecture, method, tmp_path)
    model = adapted(architecture, folder, init_lora_weights=False).eval()
    expected = tiny.logits(model)
    model.save_pretrained(tmp_path / "adapter")
    dense = AutoModelForCausalLM.from_pretrained(folder).dequantize()
    merged = peft.PeftModel.from_pretrained(dense, tmp_path / "adapter").merge_and_unload()
    torch.testing.assert_close(tiny.logits(merged.eval()), expected, rtol=1e-4, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(tiny.logits(again), tiny.logits(merged))
    assert not hasattr(again.config, "quantization_config")


@each_architecture
def test_making_an_adapted_model_dense_keeps_its_adapter_or_is_refused(architecture, tmp_path):
    model = adapted(architecture, saved(architecture, "rtn", tmp_path), init_lora_weights=False).eval()
    expected = tiny.logits(model)
    if architecture == "gpt2":  # PEFT wrapped linear layers, and would merge into Conv1D layers the wrong way round
        with pytest.raises(SlimError, match=r"model\.unload\(\)"):
            model.get_base_model().dequantize()
        assert torch.equal(tiny.logits(model), expected)
        return
    model.get_base_model().dequantize()
    assert torch.equal(tiny.logits(model), expected)
    torch.testing.assert_close(tiny.logits(model.merge_and_unload()), expected, rtol=1e-4, atol=1e-4)


@each_architecture
def test_unloading_gives_the_encoded_model_back(architecture, tmp_path):
    folder = saved(architecture, "rtn", tmp_path)
    model = adapted(architecture, folder, init_lora_weights=False).eval()
    plain = AutoModelForCausalLM.from_pretrained(folder)
    back = model.unload()
    assert torch.equal(tiny.logits(back), tiny.logits(plain))
    assert [type(m) for m in back.modules()] == [type(m) for m in plain.modules()]


def test_the_adapter_interface_of_transformers(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(saved("llama", "rtn", tmp_path))
    model.add_adapter(peft.LoraConfig(r=4, target_modules=TARGETS["llama"]))
    before_loss, after_loss = train(model, tmp_path)
    assert after_loss < 0.95 * before_loss
