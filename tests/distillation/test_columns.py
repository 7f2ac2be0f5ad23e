"""What a batch says beside its tokens: weights of labels, columns of the teacher's, and no labels at all."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tiny
import torch
import training
from datasets import Dataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DataCollatorWithPadding,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    RobertaConfig,
    RobertaForMaskedLM,
)

import hf_slim
from hf_slim.core.errors import DataError, ModelError, PlanError
from hf_slim.distillation.batches import weights_through
from hf_slim.distillation.losses import WEIGHTS
from hf_slim.distillation.pairs import check_pair, check_student
from hf_slim.distillation.teacher_cache import CacheOptions, write_cache
from hf_slim.distillation.trainer import DistillationConfig, DistillationTrainer

FEATURES = [{"kind": "hidden", "weight": 0.1}]


def rows(weights=lambda ids: None, samples=8):
    made = []
    for row in training.rows(samples=samples):
        given = weights(row["input_ids"])
        made.append(row if given is None else {**row, WEIGHTS: given})
    return made


def uneven(ids):
    return (ids % 3).float() / 2


def pad(items):
    """`training.Pad`, which knows tokens and labels, and weights likewise."""
    batch = training.Pad()([{k: v for k, v in item.items() if k != WEIGHTS} for item in items])
    if WEIGHTS in items[0]:
        batch[WEIGHTS] = torch.zeros(batch["input_ids"].shape)
        for place, item in zip(batch[WEIGHTS], items, strict=True):
            place[: len(item[WEIGHTS])] = item[WEIGHTS]
    return batch


def make(folder, data, callbacks=(), **options):
    args = training.arguments(folder, DistillationConfig, **{"max_steps": 1, "alpha": 0.6, **options})
    return DistillationTrainer(
        tiny.llama(), tiny.llama(seed=1), args, train_dataset=data, data_collator=pad, callbacks=list(callbacks)
    )


def gradient(folder, data, **options):
    recorded = training.Gradients()
    make(folder, data, [recorded], **options).train()
    return recorded.steps[0]


@pytest.mark.parametrize("options", [{}, {"fused": False}, {"features": FEATURES}], ids=str)
def test_a_weight_of_zero_is_an_ignored_label_and_only_ratios_count(tmp_path, options):
    odd = [{**row, "labels": torch.where(row["input_ids"] % 2 == 1, row["labels"], -100)} for row in rows()]
    ignored = gradient(tmp_path, odd, **options)
    weighted = gradient(tmp_path, rows(lambda ids: (ids % 2).float()), **options)
    seven = gradient(tmp_path, rows(lambda ids: 7 * (ids % 2).float()), **options)
    assert training.relative(weighted, ignored) < 1e-5
    assert training.relative(seven, ignored) < 1e-5
    assert training.relative(gradient(tmp_path, rows(), **options), ignored) > 0.1


def test_weights_survive_accumulation(tmp_path):
    whole = gradient(tmp_path, rows(uneven), per_device_train_batch_size=8)
    parts = gradient(tmp_path, rows(uneven), per_device_train_batch_size=2, gradient_accumulation_steps=4)
    assert training.relative(parts, whole) < 1e-5


def test_batches_that_the_student_writes_weigh_one_a_token(tmp_path):
    options = {"lmbda": 0.5, "alpha": 1.0, "max_steps": 3, "max_new_tokens": 3}
    half = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    assert torch.isfinite(gradient(tmp_path, rows(uneven), **options, **half)).all()


def test_a_weighted_loss_is_a_weighted_mean(tmp_path):
    trainer, inputs = make(tmp_path, rows(uneven), alpha=0.0), pad(rows(uneven))
    model: Any = trainer.model
    with torch.no_grad():
        found = trainer.compute_loss(model.train(), inputs)
        logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, :-1]
    labels, weights = inputs["labels"][:, 1:], inputs[WEIGHTS][:, 1:]
    each = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    weights = weights * (labels != -100)
    assert float(found) == pytest.approx(float((each * weights).sum() / weights.sum()), rel=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_collators_of_transformers_put_weights_where_tokens_go(side):
    tokenizer = tiny.tokenizer()
    tokenizer.padding_side, tokenizer.pad_token_id = side, 0
    collate = weights_through(DataCollatorWithPadding(tokenizer))
    items = [{"input_ids": [5, 6, 7], WEIGHTS: [0.5, 1, 2]}, {"input_ids": [8], WEIGHTS: [3]}]
    batch = collate(items)
    assert batch[WEIGHTS][0].tolist() == [0.5, 1, 2]
    assert batch[WEIGHTS][1].tolist() == ([0, 0, 3] if side == "left" else [3, 0, 0])
    with pytest.raises(DataError, match="give each token one"):
        collate([{"input_ids": [5, 6], WEIGHTS: [0.5]}])


def test_a_cached_teacher_weighs_tokens_as_a_live_one_does(tmp_path):
    tokenizer = tiny.tokenizer()
    tokenizer.pad_token_id = 0
    data = [{name: value.tolist() for name, value in row.items() if name != "labels"} for row in rows(uneven)]
    write_cache(
        tmp_path / "cache",
        tiny.llama(seed=1),
        data,
        CacheOptions(k=tiny.VOCABULARY, precision="float32"),
        collate=DataCollatorWithPadding(tokenizer),
    )
    found = []
    for teaching in ({"teacher": tiny.llama(seed=1)}, {"teacher_cache": tmp_path / "cache"}):
        recorded = training.Gradients()
        args = training.arguments(tmp_path / "out", DistillationConfig, max_steps=1)
        collate = {"data_collator": DataCollatorWithPadding(tokenizer), "train_dataset": data}
        DistillationTrainer(tiny.llama(), args=args, callbacks=[recorded], **teaching, **collate).train()
        found.append(recorded.steps[0])
    assert training.relative(found[1], found[0]) < 1e-4


def test_wrong_weights_are_refused(tmp_path):
    trainer, inputs = make(tmp_path, rows(uneven)), pad(rows(uneven))
    for wrong, message in ((inputs[WEIGHTS][:, 1:], "the shape of the labels"), (inputs[WEIGHTS] - 1, "at least 0")):
        with pytest.raises(DataError, match=message):
            trainer.compute_loss(trainer.model, {**inputs, WEIGHTS: wrong})


def classifiers():
    torch.manual_seed(0)
    sizes = {"vocab_size": tiny.VOCABULARY, "num_labels": 3}
    plain = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    bert = BertConfig(
        **sizes, **plain, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    teacher = BertForSequenceClassification(bert).eval()
    teacher.bert.embeddings.token_type_embeddings.weight.data.mul_(100)
    teacher.classifier.weight.data.mul_(100)
    quiet = {"dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0}
    student = DistilBertConfig(**sizes, **quiet, dim=32, n_layers=1, n_heads=2, hidden_dim=32)
    return DistilBertForSequenceClassification(student), teacher


def pairs_of_texts():
    ids = tiny.ids(8, 6)
    return Dataset.from_dict(
        {
            "input_ids": ids.tolist(),
            "token_type_ids": [[1, 1, 1, 0, 0, 0]] * 8,
            "labels": (ids[:, 0] % 3).tolist(),
            "text": ["not for models"] * 8,
        }
    )


def test_columns_that_only_the_teacher_reads_reach_it(tmp_path):
    student, teacher = classifiers()
    data = pairs_of_texts()
    args = training.arguments(tmp_path, DistillationConfig, max_steps=1, remove_unused_columns=True)
    trainer = DistillationTrainer(student, teacher, args, train_dataset=data)
    batch = next(iter(trainer.get_train_dataloader()))
    assert set(batch) == {"input_ids", "token_type_ids", "labels"}
    with torch.no_grad():
        found = trainer.compute_loss(student, batch)
        s = student(input_ids=batch["input_ids"]).logits.log_softmax(-1)
        t = teacher(input_ids=batch["input_ids"], token_type_ids=batch["token_type_ids"]).logits.log_softmax(-1)
        blind = teacher(input_ids=batch["input_ids"]).logits.log_softmax(-1)
    kl = [float((p.exp() * (p - s)).sum(-1).mean()) for p in (t, blind)]
    assert float(found) == pytest.approx(kl[0], rel=1e-5)
    assert abs(kl[0] - kl[1]) > 1e-3, "the column matters"
    trainer.train()
    assert trainer.predict(data.remove_columns("labels")).predictions.shape == (8, 3)


@pytest.mark.parametrize("taught", [True, False], ids=["teacher", "labels alone"])
def test_predictions_need_no_labels(tmp_path, taught):
    student, teacher = classifiers()
    seen = []
    args = training.arguments(tmp_path, DistillationConfig, alpha=1.0 if taught else 0.0)
    trainer = DistillationTrainer(
        student, teacher if taught else None, args, compute_metrics=lambda p: seen.append(p) or {}
    )
    data = pairs_of_texts().remove_columns(["labels"])
    found = trainer.predict(data)
    with torch.no_grad():
        expected = student.eval()(input_ids=torch.tensor(data["input_ids"])).logits
    assert np.allclose(found.predictions, expected.numpy(), atol=1e-6)
    assert found.label_ids is None
    assert not seen, "metrics compare with labels"
    assert ("test_loss" in (found.metrics or {})) == taught
    if not taught:
        with pytest.raises(DataError, match="without a live teacher evaluation needs labels"):
            trainer.evaluate(data)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_init": tiny.llama}, "model_init makes a new student"),
        ({"teacher_model": 1}, "passed as teacher="),
        ({}, "there is no student"),
    ],
)
def test_what_others_call_it_is_refused_with_its_name_here(tmp_path, options, message):
    args = training.arguments(tmp_path, DistillationConfig)
    with pytest.raises(PlanError, match=message):
        DistillationTrainer(teacher=tiny.llama(seed=1), args=args, train_dataset=training.rows(), **options)


def test_a_student_that_predicts_a_number_is_refused_without_a_teacher_too():
    student, _ = classifiers()
    check_student(student)
    student.config.num_labels = 1
    with pytest.raises(ModelError, match="regression and multi-label"):
        check_student(student)


def test_classes_in_another_order_are_refused():
    student, teacher = classifiers()
    student.config.id2label, teacher.config.id2label = {0: "no", 1: "yes", 2: "?"}, {0: "yes", 1: "no", 2: "?"}
    with pytest.raises(ModelError, match="0 is 'yes' to the teacher and 'no' to the student"):
        check_pair(student, teacher)
    student.config.id2label = {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
    check_pair(student, teacher)


def test_a_student_of_codes_alone_is_refused_in_a_script(tmp_path):
    student = tiny.llama()
    hf_slim.compress(student, "quantize.rtn", group_size=8)
    args = training.arguments(tmp_path, DistillationConfig)
    with pytest.raises(PlanError, match=r"the student has no trainable parts: .* layers are stored as codes"):
        DistillationTrainer(student, tiny.llama(seed=1), args, train_dataset=training.rows())


def test_a_teacher_that_counts_positions_from_its_padding_token_is_asked_for_no_more(tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = RobertaConfig(vocab_size=tiny.VOCABULARY, max_position_embeddings=12, pad_token_id=1, **sizes)
    args = training.arguments(tmp_path, DistillationConfig)
    trainer = DistillationTrainer(RobertaForMaskedLM(config), RobertaForMaskedLM(config), args)
    ids = tiny.ids(2, 11).clamp(min=2)
    with pytest.raises(DataError, match="11 tokens does not fit the teacher's 10 positions"):
        trainer.compute_loss(trainer.model, {"input_ids": ids})
    trainer.compute_loss(trainer.model, {"input_ids": ids[:, :10]})
