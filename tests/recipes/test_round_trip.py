"""Reports name every option, defaults too, and are read as the recipes that they are of: model cards are made so."""

from __future__ import annotations

from pathlib import Path

import pytest

from hf_slim.core.stage import make_stage
from hf_slim.recipe import Recipe, load_recipe

ONE_OF_TWO = [
    ("quantize.bnb", {}),
    ("quantize.bnb", {"format": "int8"}),
    ("share.basis", {"rank": 4, "across": "inputs"}),
    ("distill.logits", {"features": [{"kind": "hidden"}, {"kind": "relation", "relation_heads": 2}]}),
    ("distill.logits", {"divergences": [{"kind": "jsd"}], "alpha_schedule": "linear"}),
    ("distill.logits", {"lora": {}}),
    ("distill.logits", {"teacher_cache": {"draws": 50}, "student": {"layers": 2}}),
]


@pytest.mark.parametrize(("method", "options"), ONE_OF_TWO, ids=str)
def test_a_report_that_names_every_option_is_read_as_its_recipe(method, options):
    stage = make_stage(method, options)
    assert make_stage(method, stage.options.model_dump(mode="json")).options == stage.options


SHIPPED = sorted(
    path for path in (Path(__file__).parents[2] / "recipes").rglob("*.yaml") if "accelerate" not in str(path)
)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_reports_of_our_recipes_are_read_as_them(path):
    recipe = load_recipe(path)
    assert Recipe.model_validate(recipe.to_dict()) == recipe
