"""`SlimConfig`: checked when it is made, written as JSON, and named when it is damaged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from compressed import compressed, encoded_names
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

import hf_slim
from hf_slim.core.errors import ArtifactError, PlanError, RecipeError
from hf_slim.integration.transformers import SlimQuantizer


@pytest.mark.parametrize(
    ("error", "arguments", "options", "hint"),
    [
        (RecipeError, ["quantize.rtm"], {}, "did you mean 'quantize.rtn'?"),
        (RecipeError, ["quantize.rtn"], {"bitz": 4}, "did you mean 'bits'?"),
        (RecipeError, ["quantize.rtn"], {"bits": 99}, "at most 8"),
        (PlanError, ["quantize.gptq"], {"bits": 4}, "hf_slim.compress(model, 'quantize.gptq', ...)"),
        (PlanError, ["prune.magnitude"], {"scope": "global"}, "hf_slim.compress(model, 'prune.magnitude', ...)"),
        (PlanError, ["prune.gradual"], {}, "hf_slim.compress"),
        (PlanError, ["evaluate.perplexity"], {}, "hf_slim.compress"),
        (PlanError, [], {"bits": 4}, "need a method"),
        (ArtifactError, [], {"format": 2}, "upgrade hf_slim"),
    ],
)
def test_a_config_is_checked_at_once(error, arguments, options, hint):
    with pytest.raises(error) as caught:
        hf_slim.SlimConfig(*arguments, **options)
    assert hint in str(caught.value)


def test_a_config_survives_json(tmp_path):
    model = compressed("llama", "rtn")
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    read = AutoConfig.from_pretrained(tmp_path).quantization_config
    assert (read if isinstance(read, dict) else read.to_dict()) == written
    config = hf_slim.SlimConfig.from_dict(written)
    assert config.to_dict() == written == model.config.quantization_config.to_dict()
    assert len(config.encodings) == 2  # layers and embedding; descriptions are not repeated layer by layer
    for name in encoded_names(model):
        assert config.encoding_of(name) == model.get_submodule(name).encoding
    asked = hf_slim.SlimConfig("quantize.rtn", bits=3, embeddings={"bits": 8})
    assert hf_slim.SlimConfig.from_dict(json.loads(json.dumps(asked.to_dict()))).to_dict() == asked.to_dict()


def damage(folder: Path, change) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "hint"),
    [
        (lambda q: q.update(format=7), "format 7"),
        (lambda q: q["encodings"][0].update(kind="afine"), "did you mean 'affine'?"),
        (lambda q: q["encodings"][0].update(grup_size=3), "did you mean 'group_size'?"),
        (lambda q: q["modules"].update({"model.layers.0.mlp.up_prj": 0}), "up_prj"),
        (lambda q: q["modules"].update({"model.layers.0.mlp.up_proj": 5}), "up_proj"),
    ],
)
def test_a_damaged_config_is_named(change, hint, tmp_path):
    compressed("llama", "rtn").save_pretrained(tmp_path)
    damage(tmp_path, change)
    with pytest.raises(ArtifactError) as caught:
        AutoModelForCausalLM.from_pretrained(tmp_path)
    assert hint in str(caught.value)


def test_other_quantizers_are_left_alone():
    assert AUTO_QUANTIZER_MAPPING["hf_slim"] is SlimQuantizer
    assert AUTO_QUANTIZATION_CONFIG_MAPPING["bitsandbytes_4bit"] is BitsAndBytesConfig
    others = {k: v for k, v in AUTO_QUANTIZER_MAPPING.items() if k != "hf_slim"}
    assert {"gptq", "awq", "compressed-tensors"} <= set(others)
    assert not any(issubclass(quantizer, SlimQuantizer) for quantizer in others.values())
