"""A teacher asked beforehand teaches what a live one does; a cache of anything else is refused."""

from __future__ import annotations

import json
import math
import random

import jobs
import processes
import pytest
import runs
import tiny
import torch
import training
from safetensors.torch import load_file, save_file
from transformers import default_data_collator

from hf_slim.core.errors import ArtifactError, DataError, ModelError, PlanError, RecipeError, ResumeError
from hf_slim.core.examples import collator, examples_from
from hf_slim.core.training import Windows
from hf_slim.distillation import teacher_cache
from hf_slim.distillation.cache_files import TeacherCache
from hf_slim.distillation.cache_records import (
    ids_bytes,
    pack_draws,
    pack_ids,
    renormalized,
    tail_of,
    unpack_draws,
    unpack_ids,
)
from hf_slim.distillation.sampling import draw, top
from hf_slim.distillation.teacher_cache import CacheOptions, write_cache
from hf_slim.distillation.trainer import DistillationConfig, DistillationTrainer
from hf_slim.run import run_recipe

EXACT = CacheOptions(k=tiny.VOCABULARY, precision="float32")


def windows(samples=6, length=9, seed=0):
    return Windows(tiny.ids(samples, length, seed), labels=True)


def write(folder, options=EXACT, data=None, teacher=None, **more):
    return write_cache(folder, teacher or tiny.llama(seed=1), windows() if data is None else data, options, **more)


def still(model):
    """Without dropout, which draws other numbers where a live teacher has drawn some before."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def gradients(folder, name="llama", *, rows, cache=None, teacher=None, tokenizer=None, **options):
    recorded = training.Gradients()
    args = training.arguments(folder, DistillationConfig, **{"max_steps": 1, "alpha": 0.6, **options})
    DistillationTrainer(
        still(tiny.ALL[name]()),
        teacher,
        args,
        teacher_cache=cache,
        processing_class=tokenizer,
        train_dataset=rows,
        data_collator=training.Pad() if isinstance(rows, list) else default_data_collator,
        callbacks=[recorded],
    ).train()
    return recorded.steps


@pytest.mark.parametrize("vocabulary", [2, 96, 256, 257, 49152, 65537, 151936])
def test_ids_survive_packing_in_the_bits_that_they_need(vocabulary):
    draw = random.Random(vocabulary)
    ids = torch.tensor([[draw.randrange(vocabulary) for _ in range(64)] for _ in range(3)])
    ids[0, 0] = vocabulary - 1
    packed = pack_ids(ids, vocabulary)
    assert torch.equal(unpack_ids(packed, vocabulary, 64), ids)
    assert packed.shape[1] == ids_bytes(64, vocabulary) == 8 * math.ceil(math.log2(vocabulary))


def test_draws_survive_packing():
    ids = torch.randint(0, 300, (5, 50), generator=torch.Generator().manual_seed(0)) ** 2 // 900
    ids[1] = 7
    ids[2] = torch.arange(50)
    words, shares = unpack_draws(*pack_draws(ids, 300), 300, 50)
    for row, kept, share in zip(ids, words, shares, strict=True):
        found = {word: round(part * 50) for word, part in zip(kept.tolist(), share.tolist(), strict=True) if part}
        assert found == {word: row.tolist().count(word) for word in row.tolist()}


def test_rounded_words_and_tail_are_a_distribution():
    _, exact = top(torch.randn(20, 1000, generator=torch.Generator().manual_seed(0)) * 4, 64)
    read = renormalized(exact.half(), tail_of(exact).half())
    assert (tail_of(read) - tail_of(exact)).abs().max() < 0.01
    assert (tail_of(exact.half().float()) - tail_of(exact)).abs().max() > 0.01, "without the tail it would drown"
    assert (read - exact).abs().max() < 0.005
    assert (read.exp().sum(1) - exact.exp().sum(1)).abs().max() < 1e-3


def test_size_of_a_token(tmp_path):
    """The bars: 300 bytes at k = 64, and 36 drawn; a shard's header is little where there are enough tokens."""
    data = windows(64, 64)
    likeliest = write(tmp_path / "k", None, data)
    assert likeliest.tokens == 64 * 64
    assert likeliest.bytes_a_token == pytest.approx(ids_bytes(64, tiny.VOCABULARY) + 130, abs=2)
    assert ids_bytes(64, 151936) + 130 == 274
    drawn = write(tmp_path / "draws", CacheOptions(draws=50), data, temperature=2.0)
    logits = tiny.logits(tiny.llama(seed=1), data.ids)
    ids, _ = draw(logits.flatten(0, 1), 50, 2.0, generator=torch.Generator().manual_seed(9))
    words = torch.tensor([len(set(row)) for row in ids.tolist()]).float().mean().item()
    assert drawn.bytes_a_token == pytest.approx(7 + words * 7 / 8, rel=0.02)
    assert 7 + 12 * 18 / 8 < 36


@pytest.mark.parametrize("name", ["llama", "bert", "bert_classifier"])
def test_all_words_teach_as_the_live_teacher(tmp_path, name):
    rows = training.rows({"llama": "causal", "bert": "masked"}.get(name, "sequence"))
    teacher = tiny.ALL[name](seed=1)
    side = "left" if name == "llama" else "right"  # BERT counts positions from the first column, padding or not
    write(tmp_path / "cache", EXACT, rows, teacher, collate=training.Pad(side=side), batch_size=3)
    options = {"rows": rows, "per_device_train_batch_size": 4, "max_steps": 2}
    live = gradients(tmp_path, name, teacher=teacher, **options)
    cached = gradients(tmp_path, name, cache=tmp_path / "cache", **options)
    for ours, expected in zip(cached, live, strict=True):
        assert training.relative(ours, expected) < 1e-5


def test_classified_texts_find_their_targets(tmp_path):
    texts = [{"text": text, "label": i % 2} for i, text in enumerate(["ab", "xyz", "a b c", "zz", "hello"])]
    examples, pad = examples_from(texts, tiny.tokenizer()), collator(tiny.tokenizer())
    teacher, found = tiny.bert_classifier(seed=1), []
    write(tmp_path / "cache", EXACT, examples, teacher, collate=pad, tokenizer=tiny.tokenizer(), batch_size=2)
    for chosen in ({"teacher": teacher}, {"teacher_cache": tmp_path / "cache"}):
        recorded = training.Gradients()
        args = training.arguments(tmp_path, DistillationConfig, max_steps=1, per_device_train_batch_size=3)
        options = {"train_dataset": examples, "data_collator": pad, "callbacks": [recorded]}
        DistillationTrainer(still(tiny.bert_classifier()), args=args, **chosen, **options).train()
        found += recorded.steps
    assert training.relative(found[1], found[0]) < 1e-5


def test_rows_find_their_targets_however_they_are_shuffled_and_accumulated(tmp_path):
    rows, teacher = training.rows(samples=12), tiny.llama(seed=1)
    write(tmp_path / "cache", EXACT, rows, teacher, collate=training.Pad())
    options = {"rows": rows, "train_sampling_strategy": "random", "per_device_train_batch_size": 2}
    options |= {"gradient_accumulation_steps": 3, "max_steps": 2, "remove_unused_columns": True, "seed": 3}
    live = gradients(tmp_path, teacher=teacher, **options)
    cached = gradients(tmp_path, cache=tmp_path / "cache", **options)
    assert training.relative(cached[1], live[1]) < 1e-5


def test_fewer_words_leave_the_stated_bias(tmp_path):
    """With less than all words the gradient differs only by how the rest is divided: less and less with k."""
    data, teacher = windows(), tiny.llama(seed=1)
    (live,) = gradients(tmp_path, rows=data, teacher=teacher, alpha=1.0)
    away = []
    for k in (8, 32, 96):
        write(tmp_path / f"{k}", CacheOptions(k=k), data, teacher)
        (found,) = gradients(tmp_path, rows=data, cache=tmp_path / f"{k}", alpha=1.0)
        away.append(training.relative(found, live))
    assert away[0] > away[1] > away[2]
    assert away[2] < 1e-3, "only float16 is left"


def test_draws_are_unbiased(tmp_path):
    """The mean gradient of 20 caches is as near to the live one as their scatter says, far below a single one's.

    With n independent draws the distance shrinks as 1 / sqrt(20) = 0.22.
    """
    data, teacher, student = windows(4, 6), tiny.llama(seed=1), tiny.llama()
    logits = student(data.ids).logits.detach().flatten(0, 1).double()
    taught = tiny.logits(teacher, data.ids).flatten(0, 1).double()
    live = (logits / 2).softmax(1) - (taught / 2).softmax(1)
    found = []
    for seed in range(20):
        cache = write(tmp_path / f"{seed}", CacheOptions(draws=50), data, teacher, seed=seed, temperature=2.0)
        targets = cache.read(range(4))
        p = torch.zeros_like(live).scatter_add_(1, targets.ids, targets.values.double())
        found.append((logits / 2).softmax(1) - p)
    single = (found[0] - live).norm()
    assert (torch.stack(found).mean(0) - live).norm() < 0.3 * single
    assert single > 0.05


def test_drawn_targets_train(tmp_path):
    data, teacher = windows(), tiny.llama(seed=1)
    (live,) = gradients(tmp_path, rows=data, teacher=teacher, alpha=1.0)
    write(tmp_path / "cache", CacheOptions(draws=255), data, teacher)
    (found,) = gradients(tmp_path, rows=data, cache=tmp_path / "cache", alpha=1.0)
    assert torch.cosine_similarity(found, live, dim=0) > 0.9
    assert 0.7 < found.norm() / live.norm() < 1.4


def test_a_killed_pass_goes_on_and_ends_with_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(teacher_cache, "_TOKENS_A_SHARD", 18)
    options = CacheOptions(draws=5)
    write(tmp_path / "whole", options)

    class Killed(BaseException):
        pass

    write_shard, written = teacher_cache.write_shard, []

    def dying(folder, shard, tensors):
        if shard == 1:
            path = folder / "shard-00001.safetensors"
            path.write_bytes(b"half")  # as if the file were there, and its note were not
            raise Killed
        write_shard(folder, shard, tensors)

    with monkeypatch.context() as patch:
        patch.setattr(teacher_cache, "write_shard", dying)
        with pytest.raises(Killed):
            write(tmp_path / "cache", options)
    with pytest.raises(ArtifactError, match="2 of 3 shards are missing, such as number 1"):
        TeacherCache(tmp_path / "cache")
    monkeypatch.setattr(teacher_cache, "write_shard", lambda *found: (written.append(found[1]), write_shard(*found)))
    write(tmp_path / "cache", options, batch_size=1)
    assert written == [1, 2]
    whole, resumed = (runs.snapshot(tmp_path / name) for name in ("whole", "cache"))
    assert resumed == whole


def test_a_changed_shard_is_refused_and_written_anew(tmp_path):
    cache = write(tmp_path / "cache")
    path = tmp_path / "cache" / "shard-00000.safetensors"
    before, tensors = path.read_bytes(), load_file(path)
    tensors["log_p"][0, 0] -= 1
    save_file(tensors, path)
    with pytest.raises(ArtifactError, match="is not as it was written"):
        TeacherCache(cache.folder).read([0])
    write(tmp_path / "cache")
    assert path.read_bytes() == before


def test_a_finished_cache_is_not_asked_again(tmp_path, monkeypatch):
    write(tmp_path / "cache")
    monkeypatch.setattr(teacher_cache, "_ask", None)
    write(tmp_path / "cache")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"teacher": tiny.llama(seed=2)}, "the teacher: the cache has"),
        ({"data": windows(seed=5)}, "the tokens of the data set: the cache has"),
        ({"temperature": 2.0}, "temperature: the cache has 1.0, here it is 2.0"),
        ({"options": CacheOptions(k=3, precision="float32")}, "k or draws: the cache has 96, here it is 3"),
    ],
    ids=["teacher", "data", "temperature", "k"],
)
def test_a_cache_of_something_else_is_not_taken_up(tmp_path, change, words):
    write(tmp_path / "cache", tokenizer=tiny.tokenizer())
    before = runs.snapshot(tmp_path)
    with pytest.raises(ResumeError) as caught:
        write(tmp_path / "cache", tokenizer=tiny.tokenizer(), **change)
    assert len(caught.value.problems) == 1
    assert words in str(caught.value)
    assert runs.snapshot(tmp_path) == before


def other_tokenizer():
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(["new"])
    return tokenizer


def train(folder, **options):
    return gradients(folder, cache=folder / "cache", **{"rows": windows(), **options})


def test_a_cache_made_for_other_training_is_refused(tmp_path):
    write(tmp_path / "cache", tokenizer=tiny.tokenizer(), vocabulary=100)
    with pytest.raises(PlanError) as caught:
        train(tmp_path, temperature=3.0, tokenizer=other_tokenizer())
    assert [problem.split(": ")[1] for problem in caught.value.problems] == [
        "temperature",
        "the tokenizer",
        "vocabulary",
    ]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (windows(7), "of 6 rows, the data set has 7"),
        (windows(seed=3), "row 0 of the data set is not what"),
        (Windows(tiny.ids(6, 9)[[0, 2, 1, 3, 4, 5]], labels=True), "row 1 of the data set is not what"),
        (windows(0), "the data set is empty"),
        (iter([]), "not a stream"),
    ],
    ids=["number", "tokens", "order", "empty", "stream"],
)
def test_other_data_is_refused(tmp_path, rows, words):
    write(tmp_path / "cache")
    with pytest.raises(DataError, match=words):
        train(tmp_path, rows=rows)


def test_a_collator_that_changes_tokens_is_refused(tmp_path):
    def masked(items):
        batch = default_data_collator(items)
        return {**batch, "input_ids": batch["input_ids"] * 0}

    with pytest.raises(DataError, match="changes the tokens of row 0"):
        write(tmp_path / "cache", collate=masked)


@pytest.mark.parametrize(
    ("data", "problems"),
    [
        (windows(0), ["is empty"]),
        (
            Windows(torch.full((2, 129), 96), labels=True),
            ["129 tokens does not fit the teacher's 128", "run from 0 to 96"],
        ),
        ([{"text": "a"}], ["row 0 of the data set has no input_ids"]),
    ],
    ids=["empty", "long", "text"],
)
def test_data_that_the_teacher_cannot_read_is_refused_before_anything_is_written(tmp_path, data, problems):
    with pytest.raises(DataError) as caught:
        write(tmp_path / "cache", data=data)
    for problem, words in zip(caught.value.problems, problems, strict=True):
        assert words in problem
    assert not (tmp_path / "cache").exists()


def test_a_teacher_that_predicts_nan_is_refused(tmp_path):
    teacher = tiny.llama(seed=1)
    teacher.model.norm.weight.data.fill_(torch.nan)
    with pytest.raises(ModelError, match="NaN or infinite values in row 0"):
        write(tmp_path / "cache", teacher=teacher)


def test_folders_without_a_cache_are_refused(tmp_path):
    with pytest.raises(ArtifactError, match="holds no teacher cache"):
        train(tmp_path)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "mine.txt").write_text("kept")
    with pytest.raises(ArtifactError, match="is no teacher cache"):
        write(tmp_path / "cache")
    (tmp_path / "cache" / "cache.json").write_text(json.dumps({"version": 2}))
    with pytest.raises(ArtifactError, match="not the key of a teacher cache of this version"):
        write(tmp_path / "cache")


def test_options_that_a_cache_cannot_honour_are_refused(tmp_path):
    write(tmp_path / "cache")
    with pytest.raises(PlanError) as caught:
        train(tmp_path, features=[{"kind": "hidden"}], divergence="reverse_kl", lmbda=0.5)
    assert len(caught.value.problems) == 3
    with pytest.raises(PlanError, match="both teach"):
        train(tmp_path, teacher=tiny.llama(seed=1))


def test_evaluation_on_other_data_measures_the_labels(tmp_path):
    write(tmp_path / "cache")
    args = training.arguments(tmp_path, DistillationConfig)
    trainer = DistillationTrainer(tiny.llama(), None, args, teacher_cache=tmp_path / "cache", train_dataset=windows())
    metrics = trainer.evaluate(windows(seed=4))
    assert metrics["eval_loss"] == pytest.approx(metrics["eval_label_loss"])
    assert metrics["eval_loss"] > 1


def test_two_processes_share_a_cache(tmp_path, monkeypatch):
    first, second = processes.together(jobs.write_cache, str(tmp_path / "cache"))
    assert first == second
    monkeypatch.setattr(teacher_cache, "_TOKENS_A_SHARD", 16)  # it is patched by the job as well
    assert jobs.write_cache(str(tmp_path / "alone")) == first
    assert runs.snapshot(tmp_path / "cache") == runs.snapshot(tmp_path / "alone")


STAGE = "distill.logits: {steps: 4, batch_size: 2, learning_rate: 0.01, checkpoint_every: 2%s}"


def test_a_stage_trains_from_a_cache_and_resumes_with_it(tmp_path, monkeypatch):
    place = runs.Place(tmp_path)
    stages = (
        "prune.magnitude: {sparsity: 0.5}",
        STAGE % f", teacher_cache: {{k: {tiny.VOCABULARY}, precision: float32}}",
    )
    live = run_recipe(place.recipe(stages[0], STAGE % ""), tmp_path / "live").stages[1].metrics

    class Killed(BaseException):
        pass

    def dying(*arguments, **options):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(DistillationTrainer, "train", dying)
        with pytest.raises(Killed):
            run_recipe(place.recipe(*stages), place.out)
    assert list((place.out / ".slim").rglob("teacher_cache/shard-00000.json"))
    monkeypatch.setattr(teacher_cache, "_ask", None)
    cached = run_recipe(place.recipe(*stages), place.out).stages[1].metrics
    assert cached["last_loss"] == pytest.approx(live["last_loss"], rel=1e-4)
    assert cached["first_loss"] == pytest.approx(live["first_loss"], rel=1e-4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("teacher_cache: {k: 4, draws: 5}", "give one of them"),
        ("teacher_cache: {k: 0}", "0 is too small, at least 1"),
        ("teacher_cache: {}, features: [{kind: hidden}]", "features need a live teacher"),
        ("teacher_cache: {}, lmbda: 0.5", "live teacher judge"),
        ("vocabulary: universal", "name one with teacher:"),
    ],
)
def test_recipes_that_a_cache_cannot_honour_are_refused(tmp_path, options, words):
    with pytest.raises(RecipeError, match=words):
        runs.Place(tmp_path).recipe(STAGE % f", {options}")
