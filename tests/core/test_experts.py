"""Laws of experts as linear layers: unfusing and fusing change nothing, and each expert sees the tokens sent to it."""

from __future__ import annotations

import json

import architectures
import pytest
import tiny
import torch
from safetensors import safe_open
from torch import nn
from transformers import GptOssConfig, GptOssForCausalLM, NemotronHConfig, PreTrainedModel
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

import hf_slim
from hf_slim.core.context import Context
from hf_slim.core.experts import Experts, fuse, read_layout, unfuse, unfused, unseen
from hf_slim.core.forward import run_on
from hf_slim.core.model import ModelSource
from hf_slim.core.select import find_layers
from hf_slim.core.size import count_weights, stored_bytes
from hf_slim.core.walk import walk
from hf_slim.encodings.modules import EncodedLinear
from hf_slim.integration.transformers import SlimConfig

torch.set_num_threads(1)
IDS = tiny.ids(4, 16)


def gpt_oss() -> PreTrainedModel:
    """Transposed weights, biases, gate and up interleaved, a gating of its own."""
    options = {**architectures.DECODER, "intermediate_size": 24, "head_dim": 8, "num_local_experts": 3}
    config = GptOssConfig(**options, num_experts_per_tok=2, attn_implementation="eager")
    torch.manual_seed(0)
    model = GptOssForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, 1.5 * parameter.shape[-1] ** -0.5)
    return model.eval()


MODELS = {
    "Mixtral": lambda: architectures.make("Mixtral"),
    "Qwen3-MoE": lambda: architectures.make("Qwen3-MoE"),
    "gpt-oss": gpt_oss,
}


@pytest.fixture(params=MODELS)
def model(request) -> PreTrainedModel:
    made = MODELS[request.param]()
    made.set_experts_implementation("eager")
    return made


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return run_on(model, IDS).logits


def names_in(folder) -> list[str]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return list(file.keys())


def test_unfused_experts_compute_what_fused_ones_do(model):
    before = logits(model)
    assert len(unfuse(model)) == 2
    assert before.std() > 0.5
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-6)


def test_gradients_are_the_same(model):
    run_on(model, IDS).logits.square().mean().backward()
    fused = {name: p.grad for name, p in model.named_parameters() if p.dim() == 3}
    others = {name: p.grad for name, p in model.named_parameters() if p.dim() != 3 and "experts" not in name}
    model.zero_grad()
    unfuse(model)
    run_on(model, IDS).logits.square().mean().backward()
    layers = dict(model.named_parameters())
    for name, grad in fused.items():
        module, _, matrix = name.rpartition(".")
        experts: Experts = model.get_submodule(module)
        for number in range(experts.layout.experts):
            own = layers[f"{module}.{number}.{matrix}.weight"].grad
            expected = experts.layout.weight(grad, number)
            torch.testing.assert_close(torch.zeros_like(expected) if own is None else own, expected)
    for name, grad in others.items():
        torch.testing.assert_close(layers[name].grad, grad)


def test_fusing_again_changes_no_bit_and_copies_nothing(model):
    before = {name: (t.clone(), t.data_ptr()) for name, t in model.state_dict().items()}
    kinds = [type(m) for m in model.modules()]
    unfuse(model)
    fuse(model)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, (value, _) in before.items())
    assert [after[name].data_ptr() for name in after] == [place for _, place in before.values()]
    assert [type(m) for m in model.modules()] == kinds


def test_changed_experts_are_fused_as_they_are_now(model):
    unfuse(model)
    layer = next(m for n, m in model.named_modules() if n.endswith("experts.1.down_proj"))
    layer.weight = nn.Parameter(layer.weight.detach() + 1.0)
    expected = logits(model)
    fuse(model)
    assert not any(isinstance(m, Experts) for m in model.modules())
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-6)


def test_unfusing_takes_no_memory_and_keeps_no_second_copy(model):
    weights, stored = count_weights(model), stored_bytes(model)
    storages = {t.untyped_storage().data_ptr() for t in model.state_dict().values()}
    unfuse(model)
    assert {t.untyped_storage().data_ptr() for t in model.state_dict().values()} == storages
    assert (count_weights(model), stored_bytes(model)) == (weights, stored)


def test_experts_are_layers_that_say_so(model):
    assert not any(layer.routed for layer in find_layers(model).values())
    with unfused(model):
        layers = find_layers(model)
        routed = {name for name, layer in layers.items() if layer.routed}
        expected = {name for name in layers if ".experts." in name}
        assert routed == expected
        assert len(routed) == 2 * 2 * model.config.num_local_experts
        block = model.model.layers[0].mlp.experts
        assert block.num_experts == model.config.num_local_experts  # what the fused module has, it has too
    assert not any(layer.routed for layer in find_layers(model).values())


def test_ungated_experts():
    config = NemotronHConfig(hidden_size=16, moe_intermediate_size=12, n_routed_experts=3, moe_latent_size=None)
    config._experts_implementation = "eager"
    torch.manual_seed(0)
    holder = nn.ModuleDict({"experts": NemotronHExperts(config)})
    for parameter in holder.parameters():
        nn.init.normal_(parameter)
    x, index, weights = torch.randn(6, 16), torch.tensor([[0], [2], [2], [0], [2], [0]]), torch.rand(6, 1)
    expected = holder["experts"](x, index, weights)
    assert unfuse(holder) == ["experts"]
    torch.testing.assert_close(holder["experts"](x, index, weights), expected)
    assert "experts.0.up_proj.weight" in holder.state_dict()


def test_other_arithmetic_or_shapes_are_left_alone():
    model = architectures.make("Mixtral")
    first, second = model.model.layers[0].mlp.experts, model.model.layers[1].mlp.experts

    class Doubled(type(first)):
        def _apply_gate(self, gate_up):
            return 2 * super()._apply_gate(gate_up)

    first.__class__ = Doubled  # its eager forward does not double
    second.extra = nn.Parameter(torch.zeros(1))
    assert unfuse(model) == []
    assert unfuse(architectures.make("Llama")) == []


def test_what_is_not_understood_is_named():
    model = architectures.make("Mixtral")
    config = model.config
    config.hidden_act = "silu"
    for layer in model.model.layers:
        layer.mlp.experts = Llama4TextExperts(config)
    assert unfuse(model) == []
    (sentence,) = unseen(model)
    assert sentence.startswith("36,864 weights of model.layers.0.mlp.experts and 1 more like it (Llama4TextExperts)")
    assert unseen(architectures.make("Mixtral")) == []
    assert unseen(architectures.make("GPT-2")) == []


def test_hessian_of_an_expert_is_that_of_its_tokens(model):
    """Oracle: route the tokens by hand from what enters the fused module."""
    seen = {}
    module = model.model.layers[0].mlp.experts
    handle = module.register_forward_pre_hook(lambda m, args: seen.update(args=args))
    logits(model)
    handle.remove()
    x, index, _ = seen["args"]
    known_all = {}

    def solve(known, block):
        known_all.update(known)
        return {}

    with unfused(model):
        layers = [layer for layer in find_layers(model).values() if layer.routed and ".layers.0." in layer.name]
        walk(model, layers, IDS, solve, Context())
    for number in range(module.num_experts):
        tokens = [t for t in range(len(x)) if number in index[t].tolist()]
        H = sum((torch.outer(x[t], x[t]) for t in tokens), torch.zeros(x.shape[1], x.shape[1]))
        matrix = "gate_up_proj"
        known = known_all[f"model.layers.0.mlp.experts.{number}.{matrix}"]
        assert known.tokens == len(tokens)
        torch.testing.assert_close(known.hessian, 2 * H / max(1, len(tokens)), rtol=1e-4, atol=1e-4)


def test_experts_without_tokens_are_rounded_and_say_so():
    model = architectures.make("Mixtral")
    ids = tiny.ids(1, 1)  # a single token, two of four experts
    with unfused(model):
        reached = set()
        for number in range(4):
            expert = model.model.layers[0].mlp.experts.expert(number).down_proj
            expert.register_forward_pre_hook(lambda m, args, number=number: reached.add(number))
        run_on(model, ids)
    unreached = set(range(4)) - reached
    assert len(unreached) == 2
    report = hf_slim.compress(model, "quantize.gptq", data=ids, bits=4, group_size=16)
    for number in range(4):
        for matrix in ("gate_up_proj", "down_proj"):
            name = f"model.layers.0.mlp.experts.{number}.{matrix}"
            said = [note for note in report.notes if note.startswith(f"{name}: rounded to nearest: only ")]
            assert len(said) == 1, name
            if number in unreached:
                assert said == [f"{name}: rounded to nearest: only 0 tokens were routed to it"]


def test_an_artifact_stores_each_expert_encoded_and_loads_equal(model, tmp_path):
    dense = stored_bytes(model)
    hf_slim.compress(model, "quantize.gptq", data=IDS, bits=4, group_size=16)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size < 0.6 * dense
    stored = [name for name in names_in(tmp_path) if ".experts." in name]
    assert stored
    assert not [name for name in stored if name.endswith((".weight", "gate_up_proj", "down_proj"))]
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert {key: found for key, found in info.items() if found} == {}
    assert sum(isinstance(m, EncodedLinear) for m in loaded.modules()) == len(find_layers(model)) - 2  # table, head
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-4, atol=1e-4)
    skeleton = ModelSource(str(tmp_path)).skeleton()
    assert stored_bytes(skeleton) == stored_bytes(model)
    assert count_weights(skeleton) == count_weights(model)


@pytest.mark.parametrize("include", [None, ["layers.1.*.1.*"]], ids=["all", "one expert"])
def test_encoding_while_loading_equals_encoding_afterwards(model, tmp_path, include):
    model.save_pretrained(tmp_path / "dense")
    options = {"bits": 4, "group_size": 16} | ({"layers": {"include": include}} if include else {})
    config = SlimConfig("quantize.rtn", **options)
    loaded, info = type(model).from_pretrained(
        tmp_path / "dense", quantization_config=config, experts_implementation="eager", output_loading_info=True
    )
    assert {key: found for key, found in info.items() if found} == {}
    hf_slim.compress(model, "quantize.rtn", **options)
    assert list(loaded.state_dict()) == list(model.state_dict())
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    loaded.save_pretrained(tmp_path / "encoded")
    again = type(model).from_pretrained(tmp_path / "encoded")
    torch.testing.assert_close(logits(again), logits(loaded), rtol=1e-4, atol=1e-4)


def test_a_dense_model_again_saves_as_the_stock_one(model, tmp_path):
    model.save_pretrained(tmp_path / "stock")
    hf_slim.compress(model, "quantize.rtn", bits=8, group_size=16)
    model.save_pretrained(tmp_path / "encoded")
    loaded = type(model).from_pretrained(tmp_path / "encoded", experts_implementation="eager")
    expected = logits(loaded)
    loaded.dequantize()
    assert not any(isinstance(m, Experts) for m in loaded.modules())
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-4, atol=1e-4)
    loaded.save_pretrained(tmp_path / "dense")
    assert names_in(tmp_path / "dense") == names_in(tmp_path / "stock")
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert "quantization_config" not in config


def test_methods_that_leave_experts_alone_leave_them_fused(model):
    before = {name: t for name, t in model.state_dict().items() if ".experts." in name}
    hf_slim.compress(model, "quantize.rtn", bits=4, group_size=16, layers={"include": ["q_proj"]})
    after = model.state_dict()
    assert all(after[name].data_ptr() == t.data_ptr() for name, t in before.items())
    assert read_layout(model.model.layers[0].mlp.experts) is not None


def test_partly_encoded_experts_do_not_keep_the_fused_tensor(model):
    hf_slim.compress(model, "quantize.rtn", bits=4, group_size=16, layers={"include": ["layers.0.*.1.*"]})
    for name, tensor in model.state_dict().items():
        if ".layers.0." in name and ".experts." in name:
            assert tensor.untyped_storage().nbytes() == tensor.nbytes, name


def test_a_refused_stage_leaves_the_model_as_it_was(model):
    kinds = [type(m) for m in model.modules()]
    with pytest.raises(hf_slim.core.errors.PlanError):
        hf_slim.compress(model, "quantize.gptq", bits=4)  # no data
    assert [type(m) for m in model.modules()] == kinds
