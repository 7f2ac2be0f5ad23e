"""Students made from teachers: what stays is what it was, and the result is a plain model of another config."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import architectures
import pytest
import runs
import tiny
import torch
import training
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, Trainer

import hf_slim
from hf_slim import DistillationConfig, DistillationTrainer
from hf_slim.core.data import DataSource, load_tokens
from hf_slim.core.errors import ModelError, PlanError, RecipeError, SlimError
from hf_slim.core.forward import logits_of
from hf_slim.core.select import find_layers
from hf_slim.core.size import stored_bytes
from hf_slim.core.swap import get_weight
from hf_slim.core.training import Windows
from hf_slim.distillation.cut import StudentOptions
from hf_slim.distillation.inherit import spread
from hf_slim.distillation.student import make_student, plan_student
from hf_slim.evaluation.perplexity import perplexity
from hf_slim.plan import make_plan
from hf_slim.run import run_recipe

IDS = tiny.ids(2, 12)
SHARED = Path(__file__).parents[3] / "shared"
DISTIL = "distill.logits: {{steps: 2, batch_size: 2, student: {}}}"


@torch.no_grad()
def put_out(model):
    return logits_of(model.eval(), IDS)


def deep(name, **options):
    """An architecture of other sizes; a hybrid one has blocks of several kinds if it is deep enough."""
    cls, usual = architectures.KINDS[name]
    return getattr(transformers, cls)(getattr(transformers, cls).config_class(**usual | options)).eval()


@pytest.mark.parametrize("name", architectures.KINDS)
def test_half_of_the_blocks_make_a_plain_model(name, tmp_path):
    teacher = architectures.make(name)
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    assert torch.equal(put_out(make_student(teacher, layers=2)), put_out(teacher)), "all blocks: the teacher itself"
    student = make_student(teacher, layers=1)
    student.save_pretrained(tmp_path)
    loaded, info = type(teacher).from_pretrained(tmp_path, output_loading_info=True, attn_implementation="eager")
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert not hasattr(loaded.config, "quantization_config")
    torch.testing.assert_close(put_out(loaded), put_out(student))
    assert {p.shape for p in student.parameters()} <= {p.shape for p in teacher.parameters()}
    assert stored_bytes(student) < stored_bytes(teacher)
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())
    assert not {id(p) for p in student.parameters()} & {id(p) for p in teacher.parameters()}


@pytest.mark.parametrize(
    ("layers", "kept"), [(2, [0, 3]), ("every_second", [0, 2]), ([1, -1], [1, 3]), (1, [0]), ([2], [2])], ids=str
)
def test_blocks_that_stay(layers, kept):
    teacher = tiny.llama(layers=4)
    student = make_student(teacher, layers=layers)
    assert student.config.num_hidden_layers == len(kept)
    for mine, number in zip(student.model.layers, kept, strict=True):
        for a, b in zip(mine.parameters(), teacher.model.layers[number].parameters(), strict=True):
            assert torch.equal(a, b)


def test_blocks_are_spread_from_the_first_to_the_last():
    assert spread(6, 12) == [0, 2, 4, 7, 9, 11], "DistilBERT's"
    for total in range(1, 40):
        for count in range(1, total + 1):
            kept = spread(count, total)
            assert (kept, kept[0], len(kept)) == (sorted({*kept}), 0, count)
            assert count == 1 or kept[-1] == total - 1


def test_lists_of_the_config_follow_their_blocks():
    teacher = deep("Gemma 3", num_hidden_layers=7)
    kinds = teacher.config.layer_types
    assert kinds[4:6] == ["sliding_attention", "full_attention"]
    assert make_student(teacher, layers=[4, 5]).config.layer_types == [kinds[4], kinds[5]]
    assert make_student(teacher, config={"num_hidden_layers": 3}).config.layer_types == [kinds[0], kinds[3], kinds[6]]


def test_a_cut_model_writes_with_a_cache_what_it_writes_without():
    student = make_student(tiny.llama(layers=4), layers=[1, 3])
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 1}
    assert torch.equal(student.generate(IDS, **options), student.generate(IDS, use_cache=False, **options))


def test_both_stacks_of_an_encoder_decoder():
    teacher = deep("T5", num_layers=3)
    sizes = {
        (len(student.encoder.block), len(student.decoder.block))
        for student in (
            make_student(teacher, layers=2),
            make_student(teacher, encoder_layers=1),
            make_student(teacher, encoder_layers="every_second", decoder_layers=1),
        )
    }
    assert sizes == {(2, 2), (1, 3), (2, 1)}


@pytest.mark.parametrize("choose", ["kl", "influence"])
def test_a_block_that_does_nothing_is_not_missed(choose):
    teacher = tiny.llama(layers=3)
    with torch.no_grad():
        teacher.model.layers[1].self_attn.o_proj.weight.zero_()
        teacher.model.layers[1].mlp.down_proj.weight.zero_()
    student = make_student(teacher, layers=2, choose=choose, data=tiny.ids(4, 16))
    torch.testing.assert_close(put_out(student), put_out(teacher))


def test_neurons_that_do_nothing_are_not_missed(tmp_path):
    teacher = tiny.llama()
    with torch.no_grad():
        for block in teacher.model.layers:
            block.mlp.down_proj.weight[:, ::2] = 0
    student = make_student(teacher, mlp_width=36, data=tiny.ids(8, 16))
    assert student.config.intermediate_size == 36
    torch.testing.assert_close(put_out(student), put_out(teacher), rtol=1e-3, atol=1e-3)
    student.save_pretrained(tmp_path)
    assert torch.equal(put_out(AutoModelForCausalLM.from_pretrained(tmp_path)), put_out(student))


def test_fewer_blocks_by_config_are_the_same_blocks():
    teacher = tiny.llama(layers=4)
    by_config = make_student(teacher, config={"num_hidden_layers": 2})
    assert torch.equal(put_out(by_config), put_out(make_student(teacher, layers=2)))


def test_a_narrower_model_keeps_the_first_channels_of_its_embedding():
    teacher = tiny.llama(tied=False)
    options = {"hidden_size": 24, "head_dim": 10, "num_hidden_layers": 1}
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    student, again, other = (make_student(teacher, config=options, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), state), "nobody else's random numbers are used up"
    for mine, theirs in ((student.model.embed_tokens, teacher.model.embed_tokens), (student.lm_head, teacher.lm_head)):
        assert torch.equal(mine.weight, theirs.weight[:, :24])
    assert torch.equal(student.model.norm.weight, teacher.model.norm.weight[:24])
    new = [model.model.layers[0].mlp.up_proj.weight for model in (student, again, other)]
    assert new[0].shape == (72, 24)
    assert new[0].std() > 0
    assert torch.equal(new[0], new[1])
    assert not torch.equal(new[0], new[2])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"layers": 9}, ["9 blocks are to stay of model.layers, which has 4"]),
        ({"layers": "every_third"}, ["layers: .*'every_third'"]),
        ({"layers": [2, 1]}, ["in ascending order"]),
        ({"layers": []}, ["expected 1 or more entries"]),
        ({"encoder_layers": 1}, ["is no encoder-decoder; give layers"]),
        ({"layers": 2, "decoder_layers": 1}, ["layers is for all stacks"]),
        ({"layers": [1], "choose": "kl"}, ["choose: kl finds blocks"]),
        ({"mlp_width": 1.0}, ["mlp_width: .*1.0 is too large"]),
        ({"heads": 3}, ["2 query heads share a key/value head"]),
        ({"mlp_width": 900, "heads": 6, "layers": 9}, ["9 blocks", "6 heads are to stay of 4", "900 neurons"]),
        ({"mlp_width": 0.5}, ["pass data=texts"]),
        ({"config": {"num_layers": 2, "hiden": 3}}, ["no entry 'num_layers'; did you", "no entry 'hiden'"]),
        ({"config": {"hidden_size": 41}}, ["refuses {'hidden_size': 41}"]),
        ({"config": {"num_hidden_layers": 7}}, ["would have 7 blocks, the teacher's has 4"]),
        ({"config": {"num_hidden_layers": 1}, "layers": 1}, ["choose either"]),
        ({}, ["says nothing"]),
    ],
    ids=str,
)
def test_what_cannot_be_made_is_refused(options, words):
    with pytest.raises(PlanError) as caught:
        make_student(tiny.llama(layers=4), **options)
    assert len(caught.value.problems) == len(words), str(caught.value)
    for problem, word in zip(caught.value.problems, words, strict=True):
        assert re.search(word, problem), problem


def test_nan_weights_are_refused():
    teacher = tiny.llama()
    teacher.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj"):
        make_student(teacher, layers=1)


@pytest.mark.parametrize(
    "student",
    [{"layers": [0, -1], "mlp_width": 24}, {"heads": 2}, {"config": {"num_hidden_layers": 2, "hidden_size": 24}}],
    ids=str,
)
def test_shapes_are_foreseen(student):
    teacher = tiny.llama(layers=3)
    skeleton, planned = plan_student(find_layers(teacher), StudentOptions(**student), teacher)
    assert all(parameter.is_meta for parameter in skeleton.parameters())
    found = find_layers(make_student(teacher, data=tiny.ids(8, 16), **student))
    assert {name: (x.rows, x.cols) for name, x in planned.items()} == {n: (x.rows, x.cols) for n, x in found.items()}


def test_later_stages_see_the_student_and_sizes_come_true(tmp_path):
    place = runs.Place(tmp_path, tiny.llama(layers=3))
    stages = [DISTIL.format("{layers: [0, -1]}"), "quantize.rtn: {bits: 4, group_size: 8}", "evaluate.agreement"]
    recipe = place.recipe(*stages)
    plan, report = make_plan(recipe), run_recipe(recipe, place.out)
    assert report.size.bytes_after == plan.bytes_after < plan.bytes_before / 3
    assert {name for name in plan.final_layers if ".layers." in name} == {row.name for row in report.stages[1].layers}
    assert report.stages[0].metrics["student"] == {"blocks": {"model.layers": [0, 2]}}
    assert report.stages[2].metrics["kl"] > 0, "against the original"
    assert AutoModelForCausalLM.from_pretrained(place.out).config.num_hidden_layers == 2


def test_another_model_as_the_student(tmp_path):
    place = runs.Place(tmp_path, tiny.llama())
    folder = tiny.save(tiny.gpt2(seed=3), tmp_path / "small")
    recipe = place.recipe(DISTIL.format(folder))
    report = run_recipe(recipe, place.out)
    assert report.size.bytes_after == make_plan(recipe).bytes_after == stored_bytes(tiny.gpt2())
    assert report.stages[0].metrics["student"] == {"model": folder}
    assert f"student {folder}" in report.inputs
    assert type(AutoModelForCausalLM.from_pretrained(place.out)).__name__ == "GPT2LMHeadModel"


def test_killed_while_the_student_learns(tmp_path, monkeypatch):
    place = runs.Place(tmp_path, tiny.llama(layers=3))
    options = "{steps: 4, batch_size: 2, checkpoint_every: 2, student: {layers: 2}}"
    recipe = place.recipe(f"distill.logits: {options}")
    run_recipe(recipe, tmp_path / "whole")

    class Killed(BaseException):
        pass

    with monkeypatch.context() as patch:
        step = Trainer.training_step

        def dying(self, *args, **kwargs):
            if self.state.global_step == 3:
                raise Killed
            return step(self, *args, **kwargs)

        patch.setattr(Trainer, "training_step", dying)
        with pytest.raises(Killed):
            run_recipe(recipe, place.out)
    assert not (place.out / "slim.json").exists()
    run_recipe(recipe, place.out)
    assert runs.result(place.out) == runs.result(tmp_path / "whole")


@pytest.mark.parametrize(
    ("stages", "kind", "words"),
    [
        (["quantize.rtn: {bits: 4}", DISTIL.format("{layers: 1}")], PlanError, "put distill.logits before"),
        (
            ["prune.magnitude: {sparsity: 0.5}", DISTIL.format("{config: {num_hidden_layers: 1}}")],
            PlanError,
            "make the student first",
        ),
        ([DISTIL.format("{layer: 1}")], RecipeError, "did you mean 'layers'"),
        ([DISTIL.format("{layers: 5}")], PlanError, "5 blocks are to stay of model.layers, which has 2"),
        (["prune.apoz: {share: 0.5, training: {student: {layers: 1}}}"], RecipeError, "leave student out"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_recipes_that_cannot_work(tmp_path, stages, kind, words):
    place = runs.Place(tmp_path)
    with pytest.raises(SlimError, match=words) as caught:
        make_plan(place.recipe(*stages))
    assert type(caught.value) is kind


def test_heads_go_with_their_key_value_head():
    student = make_student(tiny.llama(layers=1), heads=2, data=tiny.ids(8, 16))
    assert (student.config.num_attention_heads, student.config.num_key_value_heads) == (2, 1)
    assert student.model.layers[0].self_attn.q_proj.weight.shape == (20, 40)


def test_pruned_weights_of_blocks_that_stay_are_zero_in_the_student(tmp_path):
    place = runs.Place(tmp_path, tiny.llama(layers=3))
    recipe = place.recipe("prune.magnitude: {sparsity: 0.5}", DISTIL.format("{layers: [0, 2]}"))
    plan, report = make_plan(recipe), run_recipe(recipe, place.out)
    assert report.size.bytes_after == pytest.approx(plan.bytes_after, rel=0.01)
    down = AutoModelForCausalLM.from_pretrained(place.out).model.layers[1].mlp.down_proj
    assert (get_weight(down) == 0).float().mean() > 0.4


def test_in_a_script_the_model_itself_becomes_the_student():
    model = tiny.llama(layers=3)
    teacher = copy.deepcopy(model)
    options = {"data": tiny.ids(8, 16), "steps": 2, "batch_size": 2, "student": {"layers": 2}}
    with pytest.raises(PlanError, match="would be one model"):
        hf_slim.compress(model, "distill.logits", original=model, **options)
    assert len(model.model.layers) == 3
    hf_slim.compress(model, "distill.logits", original=teacher, **options)
    assert model.config.num_hidden_layers == len(model.model.layers) == 2
    assert len(teacher.model.layers) == 3
    config = LlamaConfig(**model.config.to_dict())
    LlamaForCausalLM(config).load_state_dict(model.state_dict())


@pytest.mark.skipif(
    not (SHARED / "models").is_dir(), reason="needs the trained model stories260K beside the repository"
)
def test_a_teacher_teaches_more_than_labels_in_as_many_steps(tmp_path):
    folder = SHARED / "models" / "stories260K"
    teacher, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    texts = SHARED / "data" / "tinystories"
    train = load_tokens(DataSource(source=str(texts / "train.txt"), samples=400, length=64), "train", tokenizer).ids
    held_out = load_tokens(
        DataSource(source=str(texts / "valid.txt"), samples=32, length=64), "held_out", tokenizer
    ).ids
    cut = make_student(teacher, layers=[0, 4])

    def learned(alpha):
        student = copy.deepcopy(cut)
        options = {"alpha": alpha, "temperature": 1.0, "max_steps": 50, "per_device_train_batch_size": 8}
        args = training.arguments(
            tmp_path, DistillationConfig, **options, optim="adamw_torch", learning_rate=5e-3, lr_scheduler_type="linear"
        )
        data = Windows(train, labels=True)
        DistillationTrainer(student, teacher if alpha else None, args, train_dataset=data).train()
        return perplexity(student, held_out).perplexity

    assert learned(1.0) < 0.95 * learned(0.0) < 0.1 * perplexity(cut, held_out).perplexity
