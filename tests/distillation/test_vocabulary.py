"""Other vocabularies: padded tables change nothing, other tokenizers are compared by sorted probabilities."""

from __future__ import annotations

import numpy as np
import pytest
import runs
import tiny
import torch
import training
from reference import distillation as reference
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_slim.core.errors import DataError, ModelError, PlanError, RecipeError, SlimError
from hf_slim.distillation.divergences import is_infinite
from hf_slim.distillation.losses import against_teacher, sum_over_logits
from hf_slim.distillation.teacher_cache import CacheOptions, write_cache
from hf_slim.distillation.trainer import DistillationConfig, DistillationTrainer
from hf_slim.distillation.vocabulary import Translator, against_sorted, aligned, over_common, same_words
from hf_slim.run import run_recipe

EVERY = torch.arange(5)


def logits(words, seed, rows=5):
    return torch.randn(rows, words, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2


def resized(model, words):
    """The same model with rows added, at random, or cut off."""
    torch.manual_seed(5)
    model.resize_token_embeddings(words, mean_resizing=False)
    return model


def other_tokenizer():
    """Two letters a token where there are such pairs, and other numbers."""
    pairs = [a + b for a in "abcdefghij" for b in "abcdefghij"]
    vocabulary = {word: i for i, word in enumerate(["<unk>", " ", *"abcdefghij", *pairs])}
    inner = Tokenizer(models.WordPiece(vocabulary, unk_token="<unk>", continuing_subword_prefix=""))
    inner.pre_tokenizer = pre_tokenizers.Split(" ", behavior="isolated")
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", pad_token="<unk>")


def letters():
    """`tiny.tokenizer`, whose texts are what it was given: no spaces between tokens."""
    tokenizer = tiny.tokenizer()
    tokenizer.backend_tokenizer.decoder = decoders.Fuse()
    return tokenizer


def other_teacher(positions=128):
    torch.manual_seed(3)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=112, max_position_embeddings=positions, initializer_range=1.0, **sizes)
    return LlamaForCausalLM(config).eval()


def make(
    folder, student=None, teacher=None, teacher_tokenizer=None, tokenizer=None, rows=None, callbacks=(), **options
):
    args = training.arguments(folder, DistillationConfig, **{"max_steps": 1, **options})
    return DistillationTrainer(
        student or tiny.llama(),
        teacher,
        args,
        teacher_tokenizer=teacher_tokenizer,
        processing_class=tokenizer,
        train_dataset=training.rows() if rows is None else rows,
        data_collator=training.Pad(),
        callbacks=list(callbacks),
    )


def test_missing_words_are_impossible_and_surplus_ones_are_gone():
    t = logits(8, 1)
    p = aligned(t, 10).softmax(1)
    assert torch.equal(p[:, 8:], torch.zeros(5, 2, dtype=torch.float64))
    assert torch.allclose(p[:, :8], t.softmax(1), atol=1e-15)
    assert torch.allclose(aligned(t, 6).softmax(1), t[:, :6].softmax(1), atol=1e-15)
    assert torch.equal(aligned(t, 8), t)


@pytest.mark.parametrize(
    ("divergence", "beta"),
    [("forward_kl", 0.5), ("jsd", 0.5), ("jsd", 0.0), ("skewed_kl", 0.5), ("skewed_reverse_kl", 0.5)],
)
def test_divergences_from_impossible_words_are_finite(divergence, beta):
    assert not is_infinite(divergence, beta, 0.1)
    s, t = logits(10, 1).requires_grad_(), logits(8, 2)
    loss = against_teacher(lambda tokens: aligned(t, 10)[tokens], 2.0, divergence, beta=beta)
    total = sum_over_logits(s, torch.ones(5, dtype=torch.bool), [(1.0, loss)])[0]
    total.backward()
    assert torch.isfinite(total)
    assert torch.isfinite(s.grad).all()
    assert (s.grad[:, 8:] > 0).all() or divergence == "skewed_reverse_kl", "impossible words become less likely"


def test_infinite_divergences_look_at_common_words_alone():
    assert is_infinite("reverse_kl", 0.5, 0.1)
    assert is_infinite("jsd", 1.0, 0.1)
    assert is_infinite("skewed_reverse_kl", 0.5, 0.0)
    s, t = logits(10, 1), logits(8, 2)
    plain = against_teacher(lambda tokens: t[tokens], 2.0, "reverse_kl")
    value, gradient = over_common(plain, 8)(s, EVERY)
    expected = reference.kl(s[:, :8].numpy(), t.numpy(), np.ones(5, dtype=bool), 2.0, "reverse_kl")
    assert value.sum().item() == pytest.approx(expected, rel=1e-12)
    assert torch.equal(gradient[:, 8:], torch.zeros(5, 2, dtype=torch.float64))


@pytest.mark.parametrize(("words", "other"), [(7, 7), (7, 11), (11, 7)])
@pytest.mark.parametrize("temperature", [0.7, 2.0])
def test_sorted_distance_matches_reference_and_autograd(words, other, temperature):
    s, t = logits(words, 1).requires_grad_(), logits(other, 2)
    value, gradient = against_sorted(lambda tokens: t[tokens], temperature)(s.detach(), EVERY)
    width = max(words, other)
    expected = 0.0
    for a, b in zip(s.detach().numpy() / temperature, t.numpy() / temperature, strict=True):
        q, p = (sorted(np.exp(x - x.max()) / np.exp(x - x.max()).sum(), reverse=True) for x in (a, b))
        q, p = (list(x) + [0.0] * (width - len(x)) for x in (q, p))
        expected += temperature * sum(abs(x - y) for x, y in zip(p, q, strict=True))
    assert value.sum().item() == pytest.approx(expected, rel=1e-12)
    q, p = ((x / temperature).softmax(1).sort(1, descending=True).values for x in (s, t))
    q, p = (torch.nn.functional.pad(x, (0, width - x.shape[1])) for x in (q, p))
    (temperature * (p - q).abs().sum()).backward()
    assert torch.allclose(gradient, s.grad, atol=1e-14)


def test_sorted_distance_is_zero_for_the_same_words_in_another_order():
    t = logits(9, 1)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    value, gradient = against_sorted(lambda tokens: t[tokens])(t[:, order], EVERY)
    assert value.abs().max() < 1e-14
    has = torch.tensor([True, False, True, True, False])
    value, gradient = against_sorted(lambda tokens: logits(9, 2)[tokens], has=has)(t, EVERY)
    assert ((value == 0) == ~has).all()
    assert ((gradient == 0).all(1) == ~has).all()


def test_translation_finds_the_same_text():
    student, teacher = letters(), other_tokenizer()
    ids = [student(text)["input_ids"] for text in ("abcd ef", "ghi")]
    batch = {
        "input_ids": torch.tensor([ids[0], [1] * 4 + ids[1]]),
        "attention_mask": torch.tensor([[1] * 7, [0] * 4 + [1] * 3]),
    }
    found = Translator(student, teacher)(batch)
    words = teacher.convert_ids_to_tokens(found.inputs["input_ids"].flatten())
    assert words == ["ab", "cd", " ", "ef", "gh", "i", "<unk>", "<unk>"]
    assert found.has.view(2, 7).tolist() == [[True] * 4 + [False] * 3, [False] * 4 + [True] * 2 + [False]]
    assert found.places.view(2, 7)[0, :4].tolist() == [0, 1, 2, 3]
    assert found.places.view(2, 7)[1, 4:6].tolist() == [4, 5]
    short = Translator(student, teacher, positions=2)(batch)
    assert short.inputs["input_ids"].shape == (2, 2)


def test_a_start_of_text_is_no_word():
    plain, started = letters(), letters()
    for tokenizer in (plain, started):
        tokenizer.add_special_tokens({"bos_token": "<unk>"})
    start = started.bos_token_id
    started.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<unk> $A", special_tokens=[("<unk>", start)]
    )
    ids = torch.tensor([started("abc de")["input_ids"]])
    same = Translator(started, started)({"input_ids": ids})
    assert torch.equal(same.inputs["input_ids"], ids)
    assert same.places.tolist() == list(range(ids.shape[1]))
    assert same.has.all()
    without = Translator(started, plain)({"input_ids": ids})
    assert torch.equal(without.inputs["input_ids"], ids[:, 1:])
    assert without.has.tolist() == [False] + [True] * (ids.shape[1] - 1)
    assert without.places[1:].tolist() == list(range(ids.shape[1] - 1))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("words", [120, 80])
def test_a_padded_teacher_teaches_as_before(tmp_path, words, fused):
    """Rows that no token has do not matter, whatever they hold: added ones are cut, missing ones are impossible."""
    teacher, student = tiny.llama(seed=1), tiny.llama()
    rows = training.rows()
    for row in rows:
        row["input_ids"] = row["labels"] = row["input_ids"] % 78 + 2
    teacher.lm_head.weight.data[80:] = 0
    padded = resized(tiny.llama(seed=1), words)
    trainer = make(tmp_path, student, padded, rows=rows, vocabulary="align", fused=fused, alpha=1.0, temperature=2.0)
    batch = training.Pad()(rows)
    with torch.no_grad():
        found = trainer.compute_loss(trainer.model, batch)
        s = student(**{k: v for k, v in batch.items() if k != "labels"}).logits
        t = padded(**{k: v for k, v in batch.items() if k != "labels"}).logits
    expected = reference.causal_loss(
        s.double().numpy(), aligned(t, 96).double().numpy().clip(-1e4), batch["labels"].numpy(), 2.0, 1.0
    )
    assert found.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl"])
def test_a_student_with_more_rows_learns(tmp_path, divergence):
    options = {"optim": "adamw_torch", "learning_rate": 1e-2, "max_steps": 6, "logging_steps": 1, "alpha": 1.0}
    student = resized(tiny.llama(), 100)
    trainer = make(tmp_path, student, tiny.llama(seed=1), vocabulary="align", divergence=divergence, **options)
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert losses[-1] < 0.85 * losses[0]


def test_a_cache_for_a_student_with_more_rows_is_as_the_live_teacher(tmp_path):
    rows, teacher = training.rows(), tiny.llama(seed=1)
    write_cache(
        tmp_path, teacher, rows, CacheOptions(k=100, precision="float32"), vocabulary=100, collate=training.Pad()
    )
    steps = []
    for chosen in ({"teacher_cache": tmp_path}, {"teacher": teacher}):
        recorded = training.Gradients()
        args = training.arguments(tmp_path / "out", DistillationConfig, max_steps=1, vocabulary="align")
        options = {"train_dataset": rows, "data_collator": training.Pad(), "callbacks": [recorded]}
        DistillationTrainer(resized(tiny.llama(), 100), args=args, **chosen, **options).train()
        steps += recorded.steps
    assert training.relative(steps[0], steps[1]) < 1e-5


def test_equal_tokenizers_align_padded_tables_by_themselves(tmp_path):
    both = {"tokenizer": tiny.tokenizer(), "teacher_tokenizer": tiny.tokenizer()}
    assert same_words(*both.values())
    make(tmp_path, teacher=resized(tiny.llama(seed=1), 120), **both)
    with pytest.raises(ModelError, match=r'120 entries, the student\'s 96; .*vocabulary="align"'):
        make(tmp_path, teacher=resized(tiny.llama(seed=1), 120))
    with pytest.raises(ModelError, match=r"has 90 entries"):
        make(tmp_path, teacher=resized(tiny.llama(seed=1), 90), **both)


def test_other_tokenizers_are_refused_although_the_sizes_agree(tmp_path):
    other = tiny.tokenizer()
    other.add_tokens(["new"])
    with pytest.raises(ModelError, match='vocabulary="universal"'):
        make(tmp_path, teacher=tiny.llama(seed=1), tokenizer=tiny.tokenizer(), teacher_tokenizer=other)
    make(tmp_path, teacher=tiny.llama(seed=1), tokenizer=tiny.tokenizer(), teacher_tokenizer=other, vocabulary="align")


def test_universal_distillation_needs_both_tokenizers_and_a_causal_model(tmp_path):
    with pytest.raises(ModelError, match="pass processing_class="):
        make(tmp_path, teacher=other_teacher(), vocabulary="universal")
    with pytest.raises(ModelError, match="causal language models only"):
        make(tmp_path, tiny.bert(), tiny.bert(seed=1), vocabulary="universal")
    config = DistillationConfig(output_dir=str(tmp_path))
    config.vocabulary = "univ"
    with pytest.raises(PlanError, match="there is no 'univ'; did you mean 'universal'"):
        config.__post_init__()


@pytest.mark.parametrize("fused", [True, False])
def test_universal_distillation_is_the_sum_over_shared_positions(tmp_path, fused):
    student, teacher = tiny.llama(), other_teacher()
    words, other = letters(), other_tokenizer()
    texts = ["abcd efgh", "ab c"]
    rows = [{"input_ids": torch.tensor(words(text)["input_ids"])} for text in texts]
    trainer = make(tmp_path, student, teacher, other, words, rows, vocabulary="universal", fused=fused, temperature=1.5)
    batch = training.Pad(side="left")(rows)
    with torch.no_grad():
        found = trainer.compute_loss(student, dict(batch)).item()
        expected = 0.0
        for text, row in zip(texts, rows, strict=True):
            s = student(input_ids=row["input_ids"][None]).logits[0].double()
            t = teacher(input_ids=torch.tensor([other(text)["input_ids"]])).logits[0].double()
            both = min(len(s), len(t))
            value, _ = against_sorted(lambda tokens, t=t: t[tokens], 1.5)(s[:both], torch.arange(both))
            expected += value.sum().item()
    assert found == pytest.approx(expected / batch["attention_mask"].sum().item(), rel=1e-5)


def test_a_recipe_distils_from_another_tokenizer(tmp_path):
    place = runs.Place(tmp_path)
    other_teacher().save_pretrained(tmp_path / "teacher")
    other_tokenizer().save_pretrained(tmp_path / "teacher")
    stage = f"distill.logits: {{teacher: {tmp_path / 'teacher'}, steps: 12, batch_size: 2, learning_rate: 0.01%s}}"
    before = runs.snapshot(tmp_path)
    with pytest.raises(SlimError, match="other words"):
        run_recipe(place.recipe(stage % ""), place.out)
    assert runs.snapshot(place.folder / "model").items() <= {k[6:]: v for k, v in before.items()}.items()
    report = run_recipe(place.recipe(stage % ", vocabulary: universal"), tmp_path / "other")
    assert report.stages[0].metrics["last_loss"] < report.stages[0].metrics["first_loss"]
    with pytest.raises(RecipeError, match="universal is for a teacher with another tokenizer"):
        place.recipe("distill.logits: {vocabulary: universal}")


def test_text_longer_than_the_teacher_reads_is_refused_before_any_step(tmp_path):
    teacher, student = tiny.llama(seed=1), tiny.llama()
    teacher.config.max_position_embeddings = 8
    before = training.weights(student)
    with pytest.raises(DataError, match="16 tokens does not fit the teacher's 8 positions"):
        make(tmp_path, student, teacher).train()
    assert torch.equal(training.weights(student), before)
    with pytest.raises(DataError, match="data set is empty"):
        make(tmp_path, student, tiny.llama(seed=1), rows=[])


def test_a_recipe_refuses_windows_that_the_teacher_cannot_read(tmp_path):
    place = runs.Place(tmp_path)
    teacher = tiny.llama(seed=1)
    teacher.config.max_position_embeddings = 8
    tiny.save(teacher, tmp_path / "teacher")
    with pytest.raises(DataError, match="train data, read by the teacher: windows of 16 tokens do not fit the 8"):
        run_recipe(place.recipe(f"distill.logits: {{teacher: {tmp_path / 'teacher'}, steps: 2}}"), place.out)
