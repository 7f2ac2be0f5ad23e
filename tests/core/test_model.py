"""Where models come from: which class a config stands for."""

from __future__ import annotations

import json

import pytest
import tiny
from transformers import BertConfig, LlamaConfig, LlamaForCausalLM

from hf_slim.core.errors import ModelError
from hf_slim.core.model import ModelSource
from hf_slim.core.tasks import model_class


def test_config_without_architecture_is_a_causal_model(tmp_path):
    tiny.save(tiny.llama(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["architectures"]  # as in what Transformers reads from a GGUF file
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert isinstance(ModelSource(str(tmp_path)).skeleton(), LlamaForCausalLM)
    assert isinstance(ModelSource(str(tmp_path)).load(), LlamaForCausalLM)


@pytest.mark.parametrize("names", [["NoSuchModel"], ["NoSuchModel", "LlamaForCausalLM"]])
def test_unknown_architectures_are_not_replaced_silently(names):
    config = LlamaConfig(architectures=names)
    if len(names) == 1:
        with pytest.raises(ModelError, match="NoSuchModel"):
            model_class(config)
    else:
        assert model_class(config) is LlamaForCausalLM


def test_architecture_of_the_config_decides():
    assert model_class(BertConfig(architectures=["BertForMaskedLM"])).__name__ == "BertForMaskedLM"
