"""Distillation of encoder-decoders: a source text is read, a target text is predicted."""

from __future__ import annotations

import architectures
import pytest
import runs
import tiny
import torch
import training
from reference import distillation as reference
from transformers import AutoModelForSeq2SeqLM, DataCollatorForSeq2Seq

from hf_slim.core.errors import DataError, ModelError, PlanError, RecipeError
from hf_slim.core.targets import load_targets
from hf_slim.distillation.student import make_student
from hf_slim.distillation.trainer import DistillationConfig, DistillationTrainer
from hf_slim.plan import make_plan
from hf_slim.run import run_recipe

LENGTHS = ((9, 5), (4, 7), (12, 3), (6, 6))


def rows():
    """Source and target texts of their own lengths."""
    return [
        {"input_ids": tiny.ids(1, source, seed=i)[0].tolist(), "labels": tiny.ids(1, target, seed=90 + i)[0].tolist()}
        for i, (source, target) in enumerate(LENGTHS)
    ]


def pair():
    models = architectures.make("T5"), architectures.make("T5", seed=1)
    for model in models:
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
            elif isinstance(getattr(module, "dropout", None), float):
                module.dropout = 0.0
    return models


def make(folder, models=None, data=None, callbacks=(), multiple=1, **options):
    student, teacher = models or pair()
    collator = DataCollatorForSeq2Seq(tiny.tokenizer(), pad_to_multiple_of=multiple)
    options = {"max_steps": 1, "alpha": 0.6, "learning_rate": 0.01} | options
    args = training.arguments(folder, DistillationConfig, **options)
    data = rows() if data is None else data
    return DistillationTrainer(
        student, teacher, args, train_dataset=data, eval_dataset=data, data_collator=collator, callbacks=list(callbacks)
    )


def gradient(folder, **options):
    recorded = training.Gradients()
    make(folder, callbacks=[recorded], **options).train()
    (found,) = recorded.steps
    return found


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.0])
def test_loss_matches_reference(tmp_path, alpha, fused):
    trainer = make(tmp_path, alpha=alpha, temperature=3.0, fused=fused)
    batch = trainer.data_collator(rows())
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model, batch)
        logits = (model(**batch).logits.double().flatten(0, 1) for model in (trainer.model, trainer.teacher))
        s, t = (found.numpy() for found in logits)
    targets = batch["labels"].numpy().reshape(-1)
    keep = targets != -100
    expected = alpha * reference.kl(s, t, keep, 3.0, "forward_kl")
    expected += (1 - alpha) * reference.cross_entropy(s, targets, keep)
    assert loss.item() == pytest.approx(expected / keep.sum(), rel=1e-5)


def test_neither_padding_nor_micro_batches_change_the_gradient(tmp_path):
    whole = gradient(tmp_path, per_device_train_batch_size=4)
    parts = gradient(tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    padded = gradient(tmp_path, per_device_train_batch_size=4, multiple=32)
    assert training.relative(parts, whole) < 1e-5
    assert training.relative(padded, whole) < 1e-5


def test_a_student_that_is_its_teacher_has_nothing_to_learn(tmp_path):
    teacher = architectures.make("T5")
    assert make(tmp_path, (make_student(teacher, layers=2), teacher), alpha=1.0).evaluate()["eval_loss"] < 1e-6
    found = make(tmp_path, (make_student(teacher, layers=1), teacher)).evaluate()
    assert found["eval_distillation_loss"] > 1e-3


def test_texts_without_labels_are_written_by_their_decoder_inputs(tmp_path):
    trainer = make(tmp_path, alpha=1.0)
    batch = trainer.data_collator(rows())
    labels = batch.pop("labels")
    start = trainer.model.prepare_decoder_input_ids_from_labels(labels)
    unlabelled = batch | {"decoder_input_ids": start, "decoder_attention_mask": (labels != -100).long()}
    with torch.no_grad():
        expected = trainer.compute_loss(trainer.model, batch | {"labels": labels})
        torch.testing.assert_close(trainer.compute_loss(trainer.model, unlabelled), expected)
        with pytest.raises(DataError, match="needs labels or decoder_input_ids"):
            trainer.compute_loss(trainer.model, batch)


class Pairs(runs.Place):
    """An encoder-decoder in a folder, and a table of texts to read and to write."""

    def __init__(self, folder):
        super().__init__(folder, architectures.make("T5"))
        lines = [f"{runs.text(i, 3)}\t{runs.text(i, 1)}" for i in range(12)]
        (folder / "pairs.tsv").write_text("\n".join(["source\ttarget", *lines]) + "\n")

    def yaml(self, *stages, head="", column="target"):
        table = self.folder / "pairs.tsv"
        train = f"  train: {{source: {table}, column: source, target: {column}, samples: 8, length: 12}}"
        return super().yaml(*stages, head=head).replace("data:\n", f"data:\n{train}\n")


def test_a_recipe_distils_pairs_of_texts_into_a_shorter_model(tmp_path):
    place = Pairs(tmp_path)
    options = "{alpha: 0.5, steps: 2, batch_size: 4, student: {encoder_layers: 1, decoder_layers: 1}}"
    recipe = place.recipe(f"distill.logits: {options}", "evaluate.agreement")
    plan, report = make_plan(recipe), run_recipe(recipe, place.out)
    assert report.size.bytes_after == plan.bytes_after < plan.bytes_before
    assert report.stages[0].metrics["texts"] == 8
    assert report.stages[1].metrics["kl"] > 0
    config = AutoModelForSeq2SeqLM.from_pretrained(place.out).config
    assert (config.num_layers, config.num_decoder_layers) == (1, 1)


def test_pairs_are_what_the_tokenizer_makes_of_each_text(tmp_path):
    place, tokenizer = Pairs(tmp_path), tiny.tokenizer()
    source = place.recipe("distill.logits").data.of("train")
    found = load_targets(source, "train", tokenizer)
    again, other = (load_targets(source, "train", tokenizer, seed) for seed in (0, 1))
    assert len(found) == 8
    for row, read, write in zip(found, found.documents, found.targets, strict=True):
        assert row["input_ids"] == tokenizer(read)["input_ids"][:12]
        assert row["labels"] == tokenizer(write)["input_ids"][:12]
        assert f"{read}\t{write}" in (tmp_path / "pairs.tsv").read_text()
    assert found.fingerprint == again.fingerprint != other.fingerprint
    assert found.windows(tokenizer).shape[1] == 12


def test_pairs_that_cannot_be_used_are_refused(tmp_path):
    place = Pairs(tmp_path)
    with pytest.raises(DataError, match="targte"):
        run_recipe(place.recipe("distill.logits", column="targte"), place.out)
    assert not place.out.exists()
    with pytest.raises(RecipeError, match="label is for classifiers, and target for encoder-decoders"):
        place.recipe("distill.logits", column="target, label: target")
    tiny.save(tiny.llama(), tmp_path / "model")
    with pytest.raises(PlanError, match="what an encoder-decoder is to write, and the model is none"):
        make_plan(place.recipe("distill.logits"))


def test_what_cannot_be_distilled_is_refused(tmp_path):
    with pytest.raises(PlanError, match="live teacher's logits alone"):
        make(tmp_path, features=[{"kind": "hidden"}])
    with pytest.raises(PlanError, match="takes a causal language model"):
        make(tmp_path, lmbda=0.5)
    with pytest.raises(ModelError, match="predict different things"):
        make(tmp_path, (architectures.make("T5"), tiny.llama()))
