"""The demo's own steps, on a tiny model: compress, resume or start anew, talk in a fresh process."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import tiny

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def demo(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import demo

    yield demo
    sys.modules.pop("demo", None)


RECIPE = """
data:
  held_out: {{source: {text}, samples: 2, length: 16}}
stages:
  - quantize.rtn: {{bits: {bits}}}
  - evaluate.perplexity
"""


def test_compress_starts_anew_when_the_recipe_changed(demo, tmp_path, monkeypatch, capsys):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog, again and again. " * 20)
    model = Path(tiny.save(tiny.llama(), tmp_path / "model"))
    recipe = tmp_path / "recipe.yaml"
    monkeypatch.setattr(demo, "RECIPE", recipe)
    for bits in (8, 4):
        recipe.write_text(RECIPE.format(text=text, bits=bits))
        demo.compress(model, tmp_path / "out")
        assert "bits per weight" in capsys.readouterr().out
    assert '"bits": 4' in (tmp_path / "out" / "config.json").read_text()
