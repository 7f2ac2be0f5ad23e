"""What the README shows works: its code runs, its table of methods is the code's, its commands exist."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import tiny

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
HUB_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_python_blocks_run(number, tmp_path, monkeypatch):
    model = tiny.save(tiny.llama(), tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    code = blocks("python")[number]
    assert HUB_MODEL in code
    exec(compile(code.replace(HUB_MODEL, model), f"README block {number}", "exec"), {})
    assert (tmp_path / "smaller" / "config.json").exists()


@pytest.mark.parametrize("block", blocks("yaml"))
def test_recipes_are_valid(block, tmp_path):
    from hf_slim.plan import make_plan
    from hf_slim.recipe import Recipe

    recipe = Recipe.from_yaml(block)
    assert recipe.model == HUB_MODEL
    plan = make_plan(recipe.model_copy(update={"model": tiny.save(tiny.llama(), tmp_path)}))
    assert plan.bytes_after < plan.bytes_before


def test_table_of_methods_is_the_codes():
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        import methods_table
    finally:
        sys.path.pop(0)
    assert methods_table.replaced(README) == README, "run python scripts/methods_table.py --write"


def test_names_the_two_commands():
    assert "make demo" in README
    assert "make test" in README


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "zero2", "zero3"])
def test_accelerate_reads_the_launchers_configs(name):
    from accelerate.commands.config.config_args import load_config_from_file

    path = ROOT / "recipes" / "accelerate" / f"{name}.yaml"
    kind = {"ddp": "MULTI_GPU", "fsdp2": "FSDP"}.get(name, "DEEPSPEED")
    assert load_config_from_file(str(path)).distributed_type.value == kind
    assert all(f"# {word}" in path.read_text() for word in ("Goal", "Command", "Measured", "Hardware"))


def test_every_shipped_recipe_is_valid_and_says_what_it_measured():
    from hf_slim.recipe import load_recipe

    recipes = sorted(path for path in (ROOT / "recipes").rglob("*.yaml") if path.parent.name != "accelerate")
    assert len(recipes) >= 8
    for path in recipes:
        text = path.read_text(encoding="utf-8")
        load_recipe(path)
        assert len(text.splitlines()) <= 40, path
        for word in ("# Goal", "# Command", "# Measured"):
            assert word in text, f"{path} has no line {word!r}"
