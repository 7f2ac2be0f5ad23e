"""Every method on every architecture: each cell of the README's table is run, the refusals too."""

from __future__ import annotations

import sys
from pathlib import Path

import architectures
import cells
import pytest
import torch

from hf_slim.core.errors import SlimError
from hf_slim.core.size import count_weights
from hf_slim.methods import addresses, changes_model

torch.set_num_threads(1)
ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CELLS = [(method, name) for method in cells.METHODS for name in architectures.KINDS]


def test_every_method_has_its_row():
    assert list(cells.METHODS) == addresses()


@pytest.mark.parametrize(("method", "name"), CELLS, ids=[f"{method}-{name}" for method, name in CELLS])
def test_cell(method, name, tmp_path):
    refusal = cells.refusal(method, name)
    if refusal is None:
        cells.run(method, name, tmp_path)
        return
    with pytest.raises(SlimError) as raised:
        cells.run(method, name, tmp_path)
    assert refusal.says in str(raised.value)


@pytest.mark.parametrize("method", [method for method in cells.METHODS if changes_model(method)])
def test_models_in_bfloat16(method, tmp_path):
    """What most checkpoints are stored in, and what a CPU without arithmetic for it computes in float32 meanwhile."""
    cells.run(method, "Llama", tmp_path, torch.bfloat16)


@pytest.mark.parametrize("name", architectures.KINDS)
def test_models_are_tiny_and_not_indifferent(name):
    model = architectures.make(name)
    assert count_weights(model) < 100_000
    out = cells.logits(model)
    assert (out[0] - out[1]).abs().max() > 0.5 * out.std() > 0.1
    again = cells.logits(architectures.make(name))
    assert torch.equal(out, again)


def test_the_readmes_table_is_what_the_cells_say():
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        import architectures_table
    finally:
        sys.path.pop(0)
    assert architectures_table.replaced(README) == README, "run python scripts/architectures_table.py --write"
    assert cells.table() in README
