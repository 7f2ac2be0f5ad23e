"""The benchmark's own claims, on a small model: loading and quantizing on the way stay within their memory."""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).resolve().parents[2]
MARGIN = 16 << 20  # allocators and the tokenizer-free loader itself

linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc, which only Linux has")


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import bench_speed

    yield bench_speed
    sys.modules.pop("bench_speed", None)


@linux
def test_memory_of_loading_and_of_quantizing_on_the_way(bench, tmp_path):
    dense, encoded = tmp_path / "dense", tmp_path / "encoded"
    bench.random_model(1, 1024).save_pretrained(dense)
    quantized = bench.peak_memory(dense, bench.CHOICES["int4 g64"], encoded)
    assert quantized["own"] <= quantized["result"] + quantized["largest"] + MARGIN
    loaded = bench.peak_memory(encoded, None)
    assert loaded["result"] == quantized["result"]
    assert loaded["resident"] <= loaded["result"] + loaded["largest"] + MARGIN


def test_table_of_a_tiny_model(bench, tmp_path, capsys):
    bench.random_model(1, 128).save_pretrained(tmp_path)
    models = {name: AutoModelForCausalLM.from_pretrained(tmp_path) for name in bench.CHOICES}
    found = bench.speeds(models, Namespace(new_tokens=2, repeats=1, prompt=20, prefill_repeats=1))
    assert all(speed["decode"] > 0 and speed["prefill"] > 0 for speed in found.values())
    rows = {
        name: speed | {"limit": 1.0, "bytes_a_token": bench.bytes_a_token(models[name])}
        for name, speed in found.items()
    }
    assert rows["bf16"]["bytes_a_token"] == 2 * (sum(p.numel() for p in models["bf16"].parameters()) - 2000 * 128)
    bench.show({"layers": 1, "device": "CPU", "bandwidth": 1e9, "models": rows})
    assert "int4 g64" in capsys.readouterr().out
