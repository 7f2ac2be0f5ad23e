"""The benchmark of quality, on a small model: its lines hold what the library measures."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

import hf_slim
from hf_slim.core.data import DataSource, load_tokens
from hf_slim.evaluation.perplexity import perplexity

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import bench_quality

    yield bench_quality
    sys.modules.pop("bench_quality", None)


def test_lines_hold_what_is_measured_one_by_one(bench, tmp_path, capsys):
    folder, lines = tiny.save(tiny.llama(), tmp_path / "model"), tmp_path / "lines.json"
    small = ["--windows", "2", "--length", "32", "--calibration-length", "32"]
    trials = ["--try", 'both=quantize.rtn {"bits": 3, "group_size": 8}; quantize.scales {"steps": 2, "batch_size": 1}']
    trials += ["--try", 'alone=quantize.rtn {"bits": 3, "group_size": 8}']
    assert bench.main(["--model", folder, "--json", str(lines), *small, *trials]) == 0
    original, both, alone = json.loads(lines.read_text())
    model = AutoModelForCausalLM.from_pretrained(folder)
    held_out = load_tokens(DataSource(samples=2, length=32), "held_out", tiny.tokenizer()).ids
    assert original["perplexity"] == pytest.approx(perplexity(model, held_out).perplexity)
    report = hf_slim.compress(model, "quantize.rtn", bits=3, group_size=8)
    assert alone["perplexity"] == pytest.approx(perplexity(model, held_out).perplexity)
    bits = 8 * sum(row.bytes for row in report.layers) / sum(row.rows * row.cols for row in report.layers)
    assert both["bits"] == alone["bits"] == pytest.approx(bits)
    assert original["bits"] == 16.0
    assert alone["megabytes"] < original["megabytes"]
    assert "alone" in capsys.readouterr().out


def test_dithering_moves_weights_off_their_grid_by_half_a_step_at_most(bench, tmp_path):
    model = tiny.opt()
    folder = tiny.save(model, tmp_path)
    before, after = (bench.load(folder, dither).model.decoder.layers[0].fc2.weight for dither in (False, True))
    groups = before.detach().view(-1, 32)
    step = (groups.amax(1, keepdim=True) - groups.amin(1, keepdim=True)) / 15
    moved = (after - before).detach().view(-1, 32) / step
    assert moved.abs().max() <= 0.5 + 1e-5
    assert moved.abs().mean() == pytest.approx(0.25, abs=0.02)
    embedding = model.model.decoder.embed_tokens.weight
    assert torch.equal(bench.load(folder, True).model.decoder.embed_tokens.weight, embedding)
