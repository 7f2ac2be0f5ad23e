"""What Transformers users do with a compressed model: load, save, shard, generate, push, make dense again."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from compressed import DTYPES, METHODS, compressed, encoded_names, load, logits
from huggingface_hub import HfApi
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

import hf_slim
from hf_slim.core.errors import SlimError
from hf_slim.core.size import stored_bytes
from hf_slim.core.swap import get_weight
from hf_slim.encodings.modules import EncodedModule, TiedHead
from hf_slim.integration.transformers import SlimQuantizer

ROOT = Path(__file__).resolve().parents[2]
each_architecture = pytest.mark.parametrize("architecture", tiny.ALL)
each_method = pytest.mark.parametrize("method", METHODS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())


def stored_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@each_architecture
@each_method
@each_dtype
def test_encoding_while_loading_equals_compressing_in_process(architecture, method, dtype, tmp_path):
    folder = tiny.save(tiny.ALL[architecture](dtype), tmp_path)
    address, options = METHODS[method]
    streamed = load(architecture, folder, quantization_config=hf_slim.SlimConfig(address, **options))
    expected = compressed(architecture, method, dtype)
    assert encoded_names(streamed) == encoded_names(expected) != []
    assert torch.equal(logits(streamed), logits(expected))
    assert streamed.state_dict().keys() == expected.state_dict().keys()
    assert stored_bytes(streamed) == stored_bytes(expected) < stored_bytes(tiny.ALL[architecture](dtype))
    assert streamed.config.quantization_config.to_dict() == expected.config.quantization_config.to_dict()
    assert not any(p.is_meta for p in streamed.state_dict().values())


@each_architecture
@each_method
@each_dtype
def test_saving_and_loading_changes_nothing(architecture, method, dtype, tmp_path):
    model = compressed(architecture, method, dtype)
    model.save_pretrained(tmp_path / "first")
    again = load(architecture, tmp_path / "first")
    assert again.dtype == dtype
    assert torch.equal(logits(again), logits(model))
    again.save_pretrained(tmp_path / "second")
    assert contents(tmp_path / "second") == contents(tmp_path / "first")
    tensors = stored_tensors(tmp_path / "first")
    for name in encoded_names(model):
        assert f"{name}.weight" not in tensors
        module = model.get_submodule(name)
        for key, spec in module.encoding.layout(module.rows, module.cols, dtype).items():
            assert tensors[f"{name}.{key}"].dtype == spec.dtype  # what learns is wider in memory


@each_architecture
@pytest.mark.parametrize("method", ["rtn", "unstructured"])
def test_sharded_folders(architecture, method, tmp_path):
    model = compressed(architecture, method)
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert torch.equal(logits(load(architecture, tmp_path / "shards")), logits(model))

    tiny.ALL[architecture]().save_pretrained(tmp_path / "dense", max_shard_size="20KB")
    address, options = METHODS[method]
    streamed = load(architecture, tmp_path / "dense", quantization_config=hf_slim.SlimConfig(address, **options))
    assert torch.equal(logits(streamed), logits(model))


@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}, "auto"], ids=str)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_device_maps(architecture, device_map, tmp_path):
    model = compressed(architecture, "rtn")
    model.save_pretrained(tmp_path / "slim")
    assert torch.equal(logits(load(architecture, tmp_path / "slim", device_map=device_map)), logits(model))
    tiny.ALL[architecture]().save_pretrained(tmp_path / "dense")
    address, options = METHODS["rtn"]
    config = hf_slim.SlimConfig(address, **options)
    streamed = load(architecture, tmp_path / "dense", quantization_config=config, device_map=device_map)
    assert torch.equal(logits(streamed), logits(model))


@pytest.mark.parametrize("method", ["rtn", "unstructured"])
@pytest.mark.parametrize(("written", "wanted"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_loading_in_another_dtype(method, written, wanted, tmp_path):
    """The asked dtype rounds what is dense, and sparse values; codes and scales stay as they are stored."""
    compressed("llama", method, DTYPES[written]).save_pretrained(tmp_path / "slim")
    there = load("llama", tmp_path / "slim", dtype=DTYPES[wanted])
    as_written = load("llama", tmp_path / "slim")
    assert there.dtype == DTYPES[wanted]
    for name in encoded_names(there):
        module, stored = there.get_submodule(name), as_written.get_submodule(name)
        assert module.compute_dtype == DTYPES[wanted]
        decoded = stored.encoding.decode(stored.tensors(), stored.rows, stored.cols)
        assert torch.equal(module.weight, decoded.to(there.dtype))
    assert logits(there).dtype == DTYPES[wanted]
    there.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load("llama", tmp_path / "again")), logits(there))

    tiny.llama(DTYPES[written]).save_pretrained(tmp_path / "dense")
    dense = load("llama", tmp_path / "dense", dtype=DTYPES[wanted])
    address, options = METHODS[method]
    hf_slim.compress(dense, address, **options)
    config = hf_slim.SlimConfig(address, **options)
    streamed = load("llama", tmp_path / "dense", dtype=DTYPES[wanted], quantization_config=config)
    assert torch.equal(logits(streamed), logits(dense))


@each_dtype
@pytest.mark.parametrize("architecture", tiny.CAUSAL)
def test_generation_uses_the_cache(architecture, dtype, tmp_path):
    compressed(architecture, "rtn", dtype).save_pretrained(tmp_path)
    model = load(architecture, tmp_path)
    prompt = tiny.ids(2, 8)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 1}
    options["attention_mask"] = torch.ones_like(prompt)
    cached = model.generate(prompt, use_cache=True, **options)
    assert cached.shape == (2, 14)
    hf_slim.cache_decoded(model)
    assert torch.equal(model.generate(prompt, use_cache=True, **options), cached)
    if dtype == torch.float32:  # with a cache, bfloat16 sums come in another order
        assert torch.equal(model.generate(prompt, use_cache=False, **options), cached)


def python(code: str, *arguments: str) -> subprocess.CompletedProcess:
    """Run code in a fresh interpreter that knows nothing of this one."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_a_fresh_process_only_imports_hf_slim(tmp_path):
    model = compressed("llama", "rtn", torch.bfloat16)
    model.save_pretrained(tmp_path)
    torch.save(logits(model), tmp_path / "expected.pt")
    torch.save(tiny.ids(), tmp_path / "ids.pt")
    done = python(
        "import sys, torch, hf_slim\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "ids, expected = torch.load(sys.argv[1] + '/ids.pt'), torch.load(sys.argv[1] + '/expected.pt')\n"
        "with torch.no_grad():\n"
        "    out = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits\n"
        "print(torch.equal(out, expected))\n",
        str(tmp_path),
    )
    assert done.stdout.strip() == "True", done.stderr


def test_without_hf_slim_nothing_is_computed_in_silence(tmp_path):
    model = compressed("llama", "rtn")
    model.save_pretrained(tmp_path)
    done = python(
        "import json, sys\n"
        "from transformers import AutoModelForCausalLM\n"
        "try:\n"
        "    _, info = AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)\n"
        "    print(json.dumps({'missing': sorted(info['missing_keys'])}))\n"
        "except Exception as error:\n"
        "    print(json.dumps({'error': str(error)}))\n"
        "assert 'hf_slim' not in sys.modules\n",
        str(tmp_path),
    )
    said = json.loads(done.stdout.strip().splitlines()[-1])
    assert done.returncode == 0, done.stderr
    assert "hf_slim" in said.get("error", "") or {f"{n}.weight" for n in encoded_names(model)} <= set(said["missing"])


@each_architecture
@pytest.mark.parametrize("method", ["rtn", "2:4"])
def test_made_dense_it_is_a_plain_model(architecture, method, tmp_path):
    model = compressed(architecture, method, torch.bfloat16)
    model.save_pretrained(tmp_path / "slim")
    expected = logits(model)
    model = load(architecture, tmp_path / "slim")
    dense = model.dequantize()
    plain = logits(dense)
    # encoded layers multiply in float32 where the processor has no bfloat16 arithmetic, plain ones round on the way
    assert (plain.float() - expected.float()).norm() < 0.03 * expected.float().norm()
    assert not any(isinstance(module, EncodedModule | TiedHead) for module in dense.modules())
    original = tiny.ALL[architecture](torch.bfloat16)
    assert dense.state_dict().keys() == original.state_dict().keys()
    assert [type(m) for m in dense.modules()] == [type(m) for m in original.modules()]
    assert stored_bytes(dense) == stored_bytes(original)  # ties included
    dense.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    assert torch.equal(logits(load(architecture, tmp_path / "dense")), plain)


def test_at_most_one_dense_weight_at_a_time(tmp_path, monkeypatch):
    """When a weight is encoded, all the others are encoded already or not there yet."""
    folder = tiny.save(tiny.llama(layers=4), tmp_path)
    dense: list[int] = []
    encode = SlimQuantizer.encode
    holder: list[PreTrainedModel] = []
    before = SlimQuantizer._process_model_before_weight_loading

    def remember(self, model, **options):
        holder.append(model)
        return before(self, model, **options)

    def counted(self, name, weight, module):
        there = [n for n in self._planned if not isinstance(holder[0].get_submodule(n), EncodedModule)]
        dense.append(sum(not holder[0].get_submodule(n).weight.is_meta for n in there))
        return encode(self, name, weight, module)

    monkeypatch.setattr(SlimQuantizer, "_process_model_before_weight_loading", remember)
    monkeypatch.setattr(SlimQuantizer, "encode", counted)
    load("llama", folder, quantization_config=hf_slim.SlimConfig("quantize.rtn", bits=4))
    assert dense == [0] * 28


def test_resizing_an_encoded_table_is_refused():
    """It would write into a decoded copy, and drop the tie of the head."""
    model = compressed("llama", "rtn")
    expected = logits(model)
    with pytest.raises(SlimError, match=r"model\.dequantize\(\)"):
        model.resize_token_embeddings(tiny.VOCABULARY + 4)
    assert torch.equal(logits(model), expected)
    model.dequantize().resize_token_embeddings(tiny.VOCABULARY + 4)
    assert logits(model).shape[-1] == tiny.VOCABULARY + 4
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("architecture", ["llama", "bert"])
def test_push_to_hub_sends_a_folder_that_loads(architecture, tmp_path, monkeypatch):
    hub, model = tmp_path / "hub", compressed(architecture, "rtn")

    def create_repo(self, repo_id, **options):
        hub.mkdir()
        return type("Repo", (), {"repo_id": repo_id})()

    def create_commit(self, repo_id, operations, **options):
        for operation in operations:
            shutil.copy(operation.path_or_fileobj, hub / operation.path_in_repo)

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "create_commit", create_commit)
    monkeypatch.setattr("transformers.utils.hub.create_and_tag_model_card", lambda *a, **k: _NoCard())
    model.push_to_hub("someone/slim-model")
    assert json.loads((hub / "config.json").read_text())["quantization_config"]["quant_method"] == "hf_slim"
    assert torch.equal(logits(load(architecture, hub)), logits(model))


class _NoCard:
    def save(self, path):
        Path(path).write_text("card")


@pytest.mark.parametrize(
    ("architecture", "other"),
    [
        ("llama", AutoModel),
        ("llama", AutoModelForSequenceClassification),
        ("gpt2", AutoModel),
        ("gpt2", AutoModelForSequenceClassification),
        ("bert", AutoModel),
        ("bert", AutoModelForSequenceClassification),
    ],
)
@pytest.mark.parametrize("method", ["rtn", "unstructured"])
def test_another_head_on_the_same_blocks(architecture, other, method, tmp_path):
    """As with a dense checkpoint, the blocks arrive and only the new head is missing."""
    model = compressed(architecture, method)
    model.save_pretrained(tmp_path / "slim")
    model.dequantize().save_pretrained(tmp_path / "dense")
    found, missing = {}, {}
    for form in ("slim", "dense"):
        loaded, info = other.from_pretrained(tmp_path / form, output_loading_info=True)
        missing[form] = info["missing_keys"]
        with torch.no_grad():
            found[form] = loaded.eval().base_model(input_ids=tiny.ids()).last_hidden_state
    assert torch.equal(found["slim"], found["dense"])
    assert missing["slim"] == missing["dense"]
    assert (loaded.base_model is loaded) == (other is AutoModel)


def test_a_base_model_goes_into_a_whole_one(tmp_path):
    hf_slim.compress(plain := tiny.llama().model, "quantize.rtn", bits=4)
    plain.save_pretrained(tmp_path / "base")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert len(encoded_names(whole)) == len(encoded_names(plain)) == 14
    with torch.no_grad():
        found = whole.model(input_ids=tiny.ids()).last_hidden_state
        assert torch.equal(found, plain(input_ids=tiny.ids()).last_hidden_state)


def test_stages_on_top_of_each_other_are_one_artifact(tmp_path):
    """Pruned, then quantized: masks and codes of the survivors; what was pruned is zero after loading."""
    model = tiny.llama()
    hf_slim.compress(model, "prune.magnitude", sparsity=0.7)
    hf_slim.compress(model, "quantize.rtn", bits=8, group_size=16)
    model.save_pretrained(tmp_path)
    again = load("llama", tmp_path)
    assert torch.equal(logits(again), logits(model))
    for name in encoded_names(again):
        module = again.get_submodule(name)
        assert module.encoding.survivors is not None
        assert (get_weight(module) == 0).float().mean() >= 0.69
