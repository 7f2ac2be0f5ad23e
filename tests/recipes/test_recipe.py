"""Recipes: text and object give each other back, and every mistake gets one exact message."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Literal

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field, model_validator

from hf_slim.core import stage, strict_yaml
from hf_slim.core.errors import RecipeError, nearest
from hf_slim.core.method import MethodConfig
from hf_slim.core.stage import Stage, StageList, make_stage
from hf_slim.recipe import Recipe, load_recipe


class Embeddings(MethodConfig):
    bits: int = 8


class Quantize(MethodConfig):
    bits: Annotated[int, Field(ge=2, le=8)] = 4
    group_size: int | Literal["row"] = 128
    damp: Annotated[float, Field(gt=0)] = 0.01
    clip: bool = False
    embeddings: Embeddings | None = None
    exclude: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _fits(self) -> Quantize:
        if self.bits == 2 and self.clip:
            raise ValueError("2 bits cannot be clipped; use 3")
        return self


class Distill(MethodConfig):
    steps: int
    during: StageList = ()


class Evaluate(MethodConfig):
    pass


METHODS = {"quantize.gptq": Quantize, "distill.logits": Distill, "evaluate.perplexity": Evaluate}


def find_stand_in(address: str) -> SimpleNamespace:
    if address not in METHODS:
        raise RecipeError(f"unknown method {address!r}; {nearest(address, METHODS)}")
    return SimpleNamespace(Config=METHODS[address])


@pytest.fixture(autouse=True, scope="module")
def stand_in_methods():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "find_method", find_stand_in)
        yield


def problems(text: str, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        Recipe.from_yaml(text, overrides, "r.yaml")
    return caught.value.problems


def with_stage(text: str) -> list[str]:
    return problems(f"stages:\n  - {text}")


FULL = """\
model: org/name
revision: main
seed: 7
dtype: bfloat16
stages:
  - distill.logits: {steps: 200, during: [evaluate.perplexity, {quantize.gptq: {bits: 3}}]}
  - quantize.gptq: {group_size: row, damp: 1e-4, embeddings: {bits: 6}, exclude: ["lm_head"]}
  - evaluate.perplexity
"""


# What a good recipe gives


def test_every_part_is_read():
    recipe = Recipe.from_yaml(FULL)
    assert (recipe.model, recipe.revision, recipe.seed, recipe.dtype) == ("org/name", "main", 7, "bfloat16")
    distill, quantize, evaluate = recipe.stages
    assert [s.method for s in recipe.stages] == ["distill.logits", "quantize.gptq", "evaluate.perplexity"]
    assert [s.method for s in distill.options.during] == ["evaluate.perplexity", "quantize.gptq"]
    assert distill.options.during[1].options == Quantize(bits=3)
    assert quantize.options == Quantize(
        group_size="row", damp=1e-4, embeddings=Embeddings(bits=6), exclude=("lm_head",)
    )
    assert evaluate.options == Evaluate()


def test_defaults():
    recipe = Recipe.from_yaml("stages: [evaluate.perplexity]")
    assert (recipe.model, recipe.revision, recipe.seed, recipe.dtype) == (None, None, 0, "auto")


@pytest.mark.parametrize("text", ["evaluate.perplexity", "evaluate.perplexity:", "evaluate.perplexity: {}"])
def test_no_options_can_be_written_three_ways(text):
    assert Recipe.from_yaml(f"stages:\n- {text}").stages == (make_stage("evaluate.perplexity"),)


def test_words_are_read_as_yaml_1_2():
    text = "stages: [{quantize.gptq: {damp: 1e-4, bits: 03, clip: yes, exclude: [no, 1:30, 2024-01-01, on]}}]"
    options = Recipe.from_yaml(text).stages[0].options
    assert options == Quantize(damp=1e-4, bits=3, clip=True, exclude=("no", "1:30", "2024-01-01", "on"))


def test_yaml_leaves_defaults_out_and_dict_keeps_them():
    recipe = Recipe.from_yaml("seed: 0\nstages: [{quantize.gptq: {bits: 4, clip: true}}, evaluate.perplexity: {}]")
    assert recipe.to_yaml() == "stages:\n- quantize.gptq: {clip: true}\n- evaluate.perplexity\n"
    as_dict = recipe.to_dict()
    assert list(as_dict) == ["model", "revision", "seed", "dtype", "task", "num_labels", "data", "stages"]
    assert as_dict["stages"][0]["quantize.gptq"]["exclude"] == []
    assert as_dict["stages"][1] == {"evaluate.perplexity": {}}
    assert Recipe.model_validate(as_dict) == recipe


def test_recipe_and_stage_are_frozen():
    recipe = Recipe.from_yaml(FULL)
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 1
    with pytest.raises(ValueError, match="frozen"):
        recipe.stages[0].method = "quantize.gptq"


words = st.text(min_size=1, max_size=8) | st.sampled_from(
    ["no", "~", "1e-4", "0x1", "1:30", "- a", "a: b", "'", ".nan", "\x85", "a\u2028 b", "a\n\n b "]
)
quantize = st.fixed_dictionaries(
    {},
    optional={
        "bits": st.integers(3, 8),
        "group_size": st.integers() | st.just("row"),
        "damp": st.floats(min_value=0, exclude_min=True, allow_infinity=False),
        "clip": st.booleans(),
        "embeddings": st.none() | st.fixed_dictionaries({"bits": st.integers()}),
        "exclude": st.lists(words, max_size=3),
    },
).map(lambda options: {"quantize.gptq": options})
distill = st.fixed_dictionaries(
    {"steps": st.integers()}, optional={"during": st.lists(quantize | st.just("evaluate.perplexity"), max_size=2)}
).map(lambda options: {"distill.logits": options})
recipes = st.fixed_dictionaries(
    {"stages": st.lists(quantize | distill | st.just("evaluate.perplexity"), min_size=1, max_size=3)},
    optional={
        "model": st.none() | words,
        "revision": st.none() | words,
        "seed": st.integers(0, 2**32 - 1),
        "dtype": st.sampled_from(["auto", "float32", "bfloat16", "float16"]),
        "data": st.fixed_dictionaries({"train": st.fixed_dictionaries({"samples": st.integers(1)})}),
    },
)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(recipes)
def test_text_and_recipe_give_each_other_back(tree):
    recipe = Recipe.model_validate(tree)
    text = recipe.to_yaml()
    again = Recipe.from_yaml(text)
    assert again == recipe
    assert again.to_yaml() == text
    assert again.to_dict() == recipe.to_dict()
    assert Recipe.from_yaml(strict_yaml.dump(tree)) == recipe


# What is wrong with the values


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("bitz: 3", "quantize.gptq: unknown key 'bitz'; did you mean 'bits'?"),
        ("embeddings: {bit: 3}", "quantize.gptq.embeddings: unknown key 'bit'; did you mean 'bits'?"),
        ("bits: 9", "quantize.gptq.bits: 9 is too large, at most 8"),
        ("bits: 0", "quantize.gptq.bits: 0 is too small, at least 2"),
        ("damp: 0", "quantize.gptq.damp: 0 is too small, must be more than 0.0"),
        ("bits: four", "quantize.gptq.bits: expected a whole number, got 'four'"),
        ("bits: 3.5", "quantize.gptq.bits: expected a whole number, got 3.5"),
        ("bits:", "quantize.gptq.bits: expected a whole number, got nothing"),
        ("damp: [1]", "quantize.gptq.damp: expected a number, got [1]"),
        ("damp: true", "quantize.gptq.damp: expected a number, got true"),
        ("damp: .inf", "quantize.gptq.damp: expected a finite number, got inf"),
        ("damp: 1e999", "quantize.gptq.damp: expected a finite number, got inf"),
        ("damp: infinity", "quantize.gptq.damp: expected a finite number, got 'infinity'"),
        ("clip: 5", "quantize.gptq.clip: expected true or false, got 5"),
        ("exclude: lm_head", "quantize.gptq.exclude: expected a list such as [a, b], got 'lm_head'"),
        ("exclude: [3]", "quantize.gptq.exclude.0: expected text, got 3; put it in quotes"),
        ("embeddings: 4", "quantize.gptq.embeddings: expected a mapping such as {key: value}, got 4"),
        ("group_size: x", "quantize.gptq.group_size: expected a whole number, got 'x', or 'x' is not one of 'row'"),
        ("{bits: 2, clip: true}", "quantize.gptq: 2 bits cannot be clipped; use 3"),
    ],
)
def test_wrong_option(options, message):
    braces = options if options.startswith("{") else f"{{{options}}}"
    assert with_stage(f"quantize.gptq: {braces}") == [f"r.yaml, line 2: {message}"]


def test_nan_is_no_number():
    [problem] = with_stage("quantize.gptq: {damp: .nan}")
    assert problem.startswith("r.yaml, line 2: quantize.gptq.damp: ")
    assert "nan" in problem


def test_more_digits_than_python_reads():
    [problem] = with_stage("quantize.gptq: {bits: " + "9" * 5000 + "}")
    assert problem.startswith("r.yaml, line 2: quantize.gptq.bits: ")
    assert len(problem) < 150


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("quantize.gtpq: {}", "stages.0: unknown method 'quantize.gtpq'; did you mean 'quantize.gptq'?"),
        ("3", "stages.0: expected a stage such as quantize.gptq: {bits: 4}, got 3"),
        ("{}", "stages.0: expected a stage such as quantize.gptq: {bits: 4}, got an empty mapping"),
        ("quantize.gptq: 4", "quantize.gptq: expected a mapping such as {key: value}, got 4"),
        ("evaluate.perplexity: {x: 1}", "evaluate.perplexity: unknown key 'x'; it takes no options"),
        ("distill.logits", "distill.logits: key 'steps' is missing; add it"),
        (
            "{quantize.gptq: {}, bits: 4}",
            "stages.0: a stage has one method, got 2 keys: 'quantize.gptq', 'bits'; start each stage with '-'",
        ),
        (
            "distill.logits: {steps: 1, during: [quantize.gtpq]}",
            "distill.logits.during.0: unknown method 'quantize.gtpq'; did you mean 'quantize.gptq'?",
        ),
        (
            "distill.logits: {steps: 1, during: [{quantize.gptq: {bitz: 1}}]}",
            "distill.logits.during.0.quantize.gptq: unknown key 'bitz'; did you mean 'bits'?",
        ),
    ],
)
def test_wrong_stage(text, message):
    assert with_stage(text) == [f"r.yaml, line 2: {message}"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sed: 3", "r.yaml, line 2: unknown key 'sed'; did you mean 'seed'?"),
        ("seed: -1", "r.yaml, line 2: seed: -1 is too small, at least 0"),
        ("seed: yes", "r.yaml, line 2: seed: expected a whole number, got 'yes'"),
        ("seed: true", "r.yaml, line 2: seed: expected a number, got true"),
        ("model: 3", "r.yaml, line 2: model: expected text, got 3; put it in quotes"),
        ("model: ''", "r.yaml, line 2: model: expected text of 1 or more characters, got ''"),
        ("dtype: int8", "r.yaml, line 2: dtype: 'int8' is not one of 'auto', 'float32', 'bfloat16' or 'float16'"),
        ("data: 3", "r.yaml, line 2: data: expected a mapping such as {key: value}, got 3"),
        ("data: {trian: {}}", "r.yaml, line 2: data: unknown key 'trian'; did you mean 'train'?"),
        ("data:\n  train:\n    sample: 3", "r.yaml, line 4: data.train: unknown key 'sample'; did you mean 'samples'?"),
    ],
)
def test_wrong_top_level(text, message):
    assert problems(f"stages: [evaluate.perplexity]\n{text}") == [message]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "r.yaml: is empty; a recipe needs 'stages:' and a list of methods"),
        ("# only a comment", "r.yaml: is empty; a recipe needs 'stages:' and a list of methods"),
        ("recipe.yaml", "r.yaml: expected 'key: value' lines at the top, got 'recipe.yaml'"),
        ("seed: 3", "r.yaml: key 'stages' is missing; add it"),
        ("stages:", "r.yaml, line 1: stages: expected a list such as [a, b], got nothing"),
        (
            "stages: []",
            "r.yaml, line 1: stages: has no entry; a recipe needs at least one method, such as - quantize.rtn",
        ),
    ],
)
def test_nothing_to_do(text, message):
    assert problems(text) == [message]


def test_all_problems_come_at_once_in_the_order_of_the_text():
    text = "sed: 1\nmodel: 2\nseed: 3\nseed: x\nstages:\n- quantize.gptq: {\n    bitz: 3,\n    clip: 7}\n- what.ever"
    assert problems(text, "dtype=x", "word") == [
        "r.yaml, line 4: key 'seed' is given twice, first on line 3; keep one",
        "override 'word': expected key=value, such as seed=3 or quantize.gptq.bits=3",
        "r.yaml, line 1: unknown key 'sed'; did you mean 'seed'?",
        "r.yaml, line 2: model: expected text, got 2; put it in quotes",
        "r.yaml, line 4: seed: expected a whole number, got 'x'",
        "r.yaml, line 7: quantize.gptq: unknown key 'bitz'; did you mean 'bits'?",
        "r.yaml, line 8: quantize.gptq.clip: expected true or false, got 7",
        "r.yaml, line 9: stages.1: unknown method 'what.ever'; "
        "known: distill.logits, evaluate.perplexity, quantize.gptq",
        "override 'dtype=x': dtype: 'x' is not one of 'auto', 'float32', 'bfloat16' or 'float16'",
    ]


def test_make_stage_reports_everything():
    assert make_stage("quantize.gptq", {"bits": 3}) == Stage(method="quantize.gptq", options=Quantize(bits=3))
    with pytest.raises(RecipeError) as caught:
        make_stage("quantize.gptq", {"bits": 9, "clop": 1})
    assert caught.value.problems == [
        "quantize.gptq.bits: 9 is too large, at most 8",
        "quantize.gptq: unknown key 'clop'; did you mean 'clip'?",
    ]


# What is wrong with the text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "a: [1\nb: 2",
            "r.yaml, line 2, column 2: not valid YAML: while parsing a flow sequence, expected ',' or ']', but got ':'",
        ),
        ("a: b: c", "r.yaml, line 1, column 5: not valid YAML: mapping values are not allowed here"),
        ("a: \x00", "r.yaml: not valid YAML: character 0x0000 is not allowed; use printable text"),
        (
            r'a: "\UFFFFFFFF"',
            "r.yaml: not valid YAML: an escape or a number is out of range; write it plainly",
        ),
        (
            "a: 1\nb: &x [1]\nc: *x",
            "r.yaml, line 2: anchors and aliases are not allowed, got 'x'; write the value out where it is used",
        ),
        (
            "a: *x",
            "r.yaml, line 1: anchors and aliases are not allowed, got 'x'; write the value out where it is used",
        ),
        ("a: !mine 3", "r.yaml, line 1: tags are not allowed, got '!mine'; write a plain value"),
        ("a: !!str 3", "r.yaml, line 1: tags are not allowed, got '!!str'; write a plain value"),
        ("[" * 10_000, "r.yaml, line 1: nested more than 32 levels deep; a recipe needs fewer"),
        ("a:\n" + "- " * 10_000, "r.yaml, line 2: nested more than 32 levels deep; a recipe needs fewer"),
        ("a" * 2**17, "r.yaml: larger than 64 KiB; a recipe is a page of text"),
    ],
)
def test_unreadable_text(text, message):
    assert problems(text) == [message]


def test_two_documents():
    [problem] = problems("a: 1\n---\nb: 2")
    assert problem.startswith("r.yaml, line 2, column 1: not valid YAML: expected a single document")


def test_key_that_is_a_list_and_text_that_cannot_be_written():
    found = problems('? [a]\n: 3\nmodel: "\\ud800"\nstages: [evaluate.perplexity]')
    assert found == [
        "r.yaml, line 1: a key must be a single word",
        "r.yaml, line 3: model: '\\ud800' is half of a surrogate pair, which is not text; write the character itself",
    ]


def test_merge_key_is_an_ordinary_unknown_key():
    [problem] = problems("stages: [evaluate.perplexity]\n<<: {seed: 3}")
    assert problem.startswith("r.yaml, line 2: unknown key '<<'")


def test_python_tag_runs_nothing(tmp_path):
    target = tmp_path / "made"
    assert problems(f"stages: !!python/object/apply:os.mkdir ['{target}']") == [
        "r.yaml, line 1: tags are not allowed, got '!!python/object/apply:os.mkdir'; write a plain value"
    ]
    assert not target.exists()


yaml_like = (
    st.text()
    | st.text(alphabet="stages:-[]{}#&*!|>'\"%@,? \n\t\\1e.~")
    | st.binary().map(lambda raw: raw.decode("latin-1"))
)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    yaml_like, st.lists(st.text() | yaml_like.map("seed={}".format) | yaml_like.map("stages.0.{}".format), max_size=2)
)
def test_garbage_raises_recipe_errors_only(text, overrides):
    for source in (text, "stages:\n- " + text, "stages: [quantize.gptq]\n" + text):
        with suppress(RecipeError):
            Recipe.from_yaml(source, overrides)


trees = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=12,
)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(trees)
def test_dump_and_parse_are_inverse_for_any_tree(tree):
    text = strict_yaml.dump(tree)
    document = strict_yaml.parse(text, "tree")
    assert document.value == tree
    assert document.problems == []


@settings(max_examples=30, deadline=None, derandomize=True)
@given(trees)
def test_garbage_of_the_right_syntax_raises_recipe_errors_only(tree):
    stages = [tree, [tree], [{"quantize.gptq": tree}], [{"distill.logits": {"during": tree}}]]
    sources = [{"calibration": tree}, {"held_out": {"source": tree}}]
    for value in [tree, *({"stages": each} for each in stages), *({"data": each} for each in sources)]:
        with suppress(RecipeError):
            Recipe.from_yaml(strict_yaml.dump(value))


# Files


def test_file_is_read_and_named(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + FULL.encode())
    assert load_recipe(path) == load_recipe(str(path)) == Recipe.from_yaml(path) == Recipe.from_yaml(FULL)
    assert load_recipe(path, ["seed=9"]).seed == 9
    path.write_text("stages: 3")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert caught.value.problems == [f"{path}, line 1: stages: expected a list such as [a, b], got 3"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "{path}: no such file; check the path"),
        (b"seed: 3\nmodel: caf\xe9\n", "{path}, line 2: byte 0xe9 is not UTF-8; save the file as UTF-8"),
        (b"#" * (2**16 + 1), "{path}: larger than 64 KiB; a recipe is a page of text"),
    ],
)
def test_unreadable_file(tmp_path, content, message):
    path = tmp_path / "r.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert caught.value.problems == [message.format(path=path)]


def test_folder_and_impossible_path(tmp_path):
    with pytest.raises(RecipeError) as caught:
        load_recipe(tmp_path)
    assert caught.value.problems == [f"{tmp_path}: is a folder; name a recipe file, such as {tmp_path / 'recipe.yaml'}"]
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe("a\0b")


def test_a_file_without_end_is_refused():
    if not Path("/dev/zero").exists():
        pytest.skip("needs /dev/zero")
    with pytest.raises(RecipeError, match="larger than 64 KiB"):
        load_recipe("/dev/zero")


# Overrides


@pytest.mark.parametrize(
    ("override", "changed"),
    [
        ("seed=3", lambda d: d.update(seed=3)),
        ("model=other/name", lambda d: d.update(model="other/name")),
        ("revision=", lambda d: d.update(revision=None)),
        ("data.calibration.samples=5", lambda d: d["data"].update(calibration={"samples": 5})),
        ("stages.1.bits=3", lambda d: d["stages"][1]["quantize.gptq"].update(bits=3)),
        ("stages.1.quantize=3", None),
        ("stages.1.embeddings.bits=5", lambda d: d["stages"][1]["quantize.gptq"]["embeddings"].update(bits=5)),
        ("stages.1.exclude=[a, b]", lambda d: d["stages"][1]["quantize.gptq"].update(exclude=["a", "b"])),
        ("stages.2={quantize.gptq: {bits: 5}}", lambda d: d["stages"].__setitem__(2, {"quantize.gptq": {"bits": 5}})),
        ("distill.logits.steps=1", lambda d: d["stages"][0]["distill.logits"].update(steps=1)),
        ("distill.logits.during=[]", lambda d: d["stages"][0]["distill.logits"].update(during=[])),
        (
            "stages.0.during.1.bits=8",
            lambda d: d["stages"][0]["distill.logits"]["during"][1]["quantize.gptq"].update(bits=8),
        ),
        (
            "stages.0.during.0.x=8",
            None,
        ),
    ],
)
def test_override_equals_editing_the_text(override, changed):
    data = yaml.safe_load(FULL.replace("1e-4", "0.0001"))
    data.setdefault("data", {})
    if changed is None:
        with pytest.raises(RecipeError, match="unknown key"):
            Recipe.from_yaml(FULL, [override])
        return
    changed(data)
    assert Recipe.from_yaml(FULL, [override]) == Recipe.model_validate(data) != Recipe.from_yaml(FULL)


def test_one_stage_of_a_method_is_found_wherever_it_is():
    text = "stages: [evaluate.perplexity, {distill.logits: {steps: 1, during: [quantize.gptq]}}]"
    recipe = Recipe.from_yaml(text, ["quantize.gptq.bits=3", "quantize.gptq.embeddings.bits=5", "seed=1", "seed=2"])
    assert recipe.stages[1].options.during[0].options == Quantize(bits=3, embeddings=Embeddings(bits=5))
    assert recipe.seed == 2


TWO = "seed: 1\nstages: [quantize.gptq, evaluate.perplexity, {quantize.gptq: {bits: 3}}]"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("word", "expected key=value, such as seed=3 or quantize.gptq.bits=3"),
        ("=3", "expected key=value, such as seed=3 or quantize.gptq.bits=3"),
        ("a..b=3", "expected key=value, such as seed=3 or quantize.gptq.bits=3"),
        ("sed=3", "unknown key 'sed'; did you mean 'seed'?"),
        ("seed=x", "seed: expected a whole number, got 'x'"),
        ("seed.x=3", "'seed' is 1 and holds no 'x'"),
        ("data.trian.seed=3", "data: unknown key 'trian'; did you mean 'train'?"),
        ("data.train.samples=x", "data.train.samples: expected a whole number, got 'x'"),
        ("quantize.gptq.bits=4", "2 stages are 'quantize.gptq'; say which: stages.0.bits or stages.2.bits"),
        ("quantize.gtpq.bits=4", "no stage 'quantize.gtpq' in this recipe; did you mean 'quantize.gptq'?"),
        ("stages.0.bitz=4", "quantize.gptq: unknown key 'bitz'; did you mean 'bits'?"),
        ("stages.3.bits=4", "'stages' has no entry '3'; it has 3, counted from 0"),
        ("stages.-1.bits=4", "'stages' has no entry '-1'; it has 3, counted from 0"),
        ("stages.1.x=4", "evaluate.perplexity: unknown key 'x'; it takes no options"),
        ("stages.2.bits=9", "quantize.gptq.bits: 9 is too large, at most 8"),
        ("stages.2.clip={a: 1, a: 2}", "key 'a' is given twice, first on line 1; keep one"),
    ],
)
def test_wrong_override(override, message):
    where = f"override {override!r}"
    found = problems(TWO, override)
    assert found[0] in (f"{where}: {message}", f"{where}, line 1: {message}")


def test_override_in_a_recipe_without_stages():
    assert problems("seed: 1", "quantize.gptq.bits=3") == [
        "override 'quantize.gptq.bits=3': no stage 'quantize.gptq' in this recipe; it has no stages",
        "r.yaml: key 'stages' is missing; add it",
    ]


def test_override_value_is_yaml_too():
    [problem] = problems(TWO, "model=[")
    assert problem.startswith("override 'model=[', line 1, column 2: not valid YAML: ")
    assert problems(TWO, "seed=!!int 3") == [
        "override 'seed=!!int 3', line 1: tags are not allowed, got '!!int'; write a plain value"
    ]


def test_a_very_deep_override_is_no_key():
    [problem] = problems(TWO, ".".join("a" * 5000) + "=3")
    assert problem.endswith("expected key=value, such as seed=3 or quantize.gptq.bits=3")
