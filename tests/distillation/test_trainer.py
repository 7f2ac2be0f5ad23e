"""DistillationTrainer: the gradient does not depend on how a batch is cut up, padded or spread over processes."""

from __future__ import annotations

import copy
import math

import processes
import pytest
import tiny
import torch
import training
from reference import distillation as reference
from safetensors import safe_open
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5Model,
    TrainingArguments,
)

from hf_slim.core.errors import DataError, ModelError, PlanError
from hf_slim.distillation.trainer import DistillationConfig, DistillationTrainer
from hf_slim.pruning.gradual import GradualMagnitudePruning

FEATURES = [{"kind": "hidden", "weight": 0.1}, {"kind": "relation", "layers": "last", "schedule": "linear"}]
KINDS = {"llama": "causal", "gpt2": "causal", "opt": "causal", "bert": "masked", "bert_classifier": "sequence"}


def pair(name="llama"):
    """Student and teacher without dropout, which would draw other numbers for every way to cut a batch."""
    models = tiny.ALL[name](), tiny.ALL[name](seed=1)
    for model in models:
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
            elif isinstance(getattr(module, "dropout", None), float):  # OPT's
                module.dropout = 0.0
    return models


def make(folder, name="llama", *, models=None, rows=None, pad=None, callbacks=(), **options):
    student, teacher = models or pair(name)
    args = training.arguments(folder, DistillationConfig, **{"max_steps": 1, "alpha": 0.6, **options})
    return DistillationTrainer(
        student,
        teacher,
        args,
        train_dataset=training.rows(KINDS[name]) if rows is None else rows,
        data_collator=pad or training.Pad(),
        callbacks=list(callbacks),
    )


def gradients(folder, **options):
    recorded = training.Gradients()
    make(folder, callbacks=[recorded], **options).train()
    return recorded.steps


def batch(rows=None, **pad):
    return training.Pad(**pad)(training.rows() if rows is None else rows)


@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.0])
def test_loss_matches_reference(tmp_path, alpha):
    trainer = make(tmp_path, alpha=alpha, temperature=3.0)
    inputs = batch()
    features = {k: v for k, v in inputs.items() if k != "labels"}
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model, inputs)
        s, t = (model(**features).logits.double().numpy() for model in (trainer.model, trainer.teacher))
    expected = reference.causal_loss(s, t, inputs["labels"].numpy(), 3.0, alpha)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("labelled", [True, False], ids=["labels", "no labels"])
@pytest.mark.parametrize("name", KINDS)
def test_accumulating_micro_batches_is_one_large_batch(tmp_path, name, labelled):
    options = {"name": name, "rows": training.rows(KINDS[name], labelled=labelled), "alpha": 0.6 if labelled else 1.0}
    (whole,) = gradients(tmp_path, per_device_train_batch_size=8, **options)
    (parts,) = gradients(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4, **options)
    assert parts.norm().item() == pytest.approx(whole.norm().item(), rel=1e-5)
    assert training.relative(parts, whole) < 1e-5


@pytest.mark.parametrize("pad", [{"extra": 5}, {"side": "left"}, {"extra": 3, "side": "left"}], ids=str)
@pytest.mark.parametrize("labelled", [True, False], ids=["labels", "no labels"])
def test_padding_changes_nothing(tmp_path, pad, labelled):
    options = {"rows": training.rows(labelled=labelled), "alpha": 0.6 if labelled else 1.0}
    (plain,) = gradients(tmp_path, **options)
    (padded,) = gradients(tmp_path, pad=training.Pad(**pad), **options)
    assert training.relative(padded, plain) < 1e-5


def wide_teacher() -> LlamaForCausalLM:
    """Wider and deeper than `tiny.llama`."""
    torch.manual_seed(1)
    sizes = {"hidden_size": 48, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=tiny.VOCABULARY, num_hidden_layers=3, **sizes)).eval()


def composed(folder: str, rows_per_process: int) -> dict:
    """Trained weights and logs. The whole batch is 2 accumulated x processes x rows_per_process samples."""
    args = training.arguments(
        folder,
        DistillationConfig,
        alpha=0.7,
        features=FEATURES,
        max_steps=4,
        per_device_train_batch_size=rows_per_process,
        gradient_accumulation_steps=2,
        logging_steps=2,
        eval_strategy="no",
        per_device_eval_batch_size=rows_per_process,
        dataloader_drop_last=True,
    )
    trainer = DistillationTrainer(
        tiny.llama(),
        wide_teacher(),
        args,
        train_dataset=training.rows(samples=32),
        eval_dataset=training.rows(samples=8),
        data_collator=training.Pad(),
        callbacks=[GradualMagnitudePruning(sparsity=0.5, every=1)],
    )
    trainer.train()
    return {
        "weights": training.weights(trainer.model),
        "projections": training.weights(trainer.features.projections),
        "logs": [{k: v for k, v in log.items() if "loss" in k} for log in trainer.state.log_history],
        "processes": trainer.args.world_size,
    }


def test_two_processes_are_one_with_twice_the_batch(tmp_path):
    one = composed(str(tmp_path), 4)
    two, _ = processes.together(composed, str(tmp_path), 2)
    assert (one["processes"], two["processes"]) == (1, 2)
    start = training.weights(tiny.llama())
    assert training.relative(two["weights"] - start, one["weights"] - start) < 1e-5
    assert torch.equal(two["weights"] == 0, one["weights"] == 0)
    assert training.relative(two["projections"], one["projections"]) < 1e-6
    for a, b in zip(two["logs"], one["logs"], strict=True):
        assert a == pytest.approx(b, rel=1e-5)


def test_labels_that_are_all_ignored_give_zero(tmp_path):
    rows = training.rows()
    for row in rows:
        row["labels"] = torch.full_like(row["labels"], -100)
    trainer = make(tmp_path, rows=rows, logging_steps=1)
    before = training.weights(trainer.model)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == 0
    assert torch.equal(training.weights(trainer.model), before)


def test_a_micro_batch_without_labels_weighs_nothing(tmp_path):
    rows = training.rows()
    for row in rows[2:4]:
        row["labels"] = torch.full_like(row["labels"], -100)
    (whole,) = gradients(tmp_path, rows=rows, per_device_train_batch_size=8)
    (parts,) = gradients(tmp_path, rows=rows, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    assert training.relative(parts, whole) < 1e-5


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_a_model_has_nothing_to_learn_from_its_own_copy(tmp_path, divergence):
    student, _ = pair()
    (gradient,) = gradients(tmp_path, models=(student, copy.deepcopy(student)), alpha=1.0, divergence=divergence)
    assert gradient.abs().max() < 1e-6


@pytest.mark.parametrize("name", KINDS)
def test_the_student_comes_closer_to_the_teacher(tmp_path, name):
    options = {"optim": "adamw_torch", "learning_rate": 1e-2, "max_steps": 8, "logging_steps": 1, "alpha": 1.0}
    trainer = make(tmp_path, name, **options)
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert losses[-1] < 0.8 * losses[0]


def test_the_teacher_is_frozen_and_kept_out(tmp_path):
    student, teacher = pair()
    before = training.weights(teacher.train())
    trainer = make(tmp_path, models=(student, teacher), max_steps=2, save_strategy="steps", save_steps=2)
    trainer.train()
    assert not teacher.training
    assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())
    assert torch.equal(training.weights(teacher), before)
    taught = {id(p) for p in teacher.parameters()}
    assert not any(id(p) in taught for group in trainer.optimizer.param_groups for p in group["params"])
    with safe_open(tmp_path / "checkpoint-2" / "model.safetensors", "pt") as file:
        assert set(file.keys()) <= set(student.state_dict())


@pytest.mark.parametrize("name", ["llama", "bert_classifier"])
def test_a_teacher_may_be_named(tmp_path, name):
    (student, _), (copied, teacher) = pair(name), pair(name)
    teacher.save_pretrained(tmp_path / "teacher")
    by_name = make(tmp_path / "a", name, models=(student, str(tmp_path / "teacher"))).train()
    assert by_name.training_loss == make(tmp_path / "b", name, models=(copied, teacher)).train().training_loss
    with pytest.raises(ModelError, match="nowhere"):
        make(tmp_path / "c", name, models=(student, tmp_path / "nowhere"))


def test_a_teacher_reads_packed_texts_apart(tmp_path):
    student, teacher = pair()
    teacher.load_state_dict(student.state_dict())
    trainer = make(tmp_path, models=(student, teacher), alpha=1.0)
    ids = torch.arange(12)[None] % 7
    packed = {"input_ids": ids, "labels": ids, "position_ids": torch.arange(6).repeat(2)[None]}
    student.config.use_cache = False  # as the Trainer has it
    assert trainer.compute_loss(student.eval(), packed).item() < 1e-6


def test_logs_hold_both_parts_and_they_add_up(tmp_path):
    trainer = make(tmp_path, max_steps=6, logging_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    trainer.eval_dataset = training.rows(samples=7)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    metrics = trainer.evaluate()
    assert len(logs) == 2
    for log, prefix in [(log, "") for log in logs] + [(metrics, "eval_")]:
        mixed = 0.6 * log[f"{prefix}distillation_loss"] + 0.4 * log[f"{prefix}label_loss"]
        assert log[f"{prefix}loss"] == pytest.approx(mixed, rel=1e-5)


def test_evaluation_without_labels_has_a_loss(tmp_path):
    trainer = make(tmp_path, alpha=1.0)
    metrics = trainer.evaluate(training.rows(labelled=False))
    assert metrics["eval_loss"] == pytest.approx(metrics["eval_distillation_loss"], rel=1e-5)
    assert math.isfinite(metrics["eval_loss"])


def test_plain_training_arguments_distil_with_the_defaults(tmp_path):
    args = training.arguments(tmp_path, TrainingArguments, max_steps=1)
    trainer = DistillationTrainer(*pair(), args, train_dataset=training.rows(), data_collator=training.Pad())
    expected = make(tmp_path, alpha=1.0, temperature=1.0)
    with torch.no_grad():
        losses = [t.compute_loss(t.model, batch()) for t in (trainer, expected)]
    assert losses[0] == losses[1]


def test_a_teacher_that_predicts_nan_is_named_with_step_and_row(tmp_path):
    student, teacher = pair()
    poison = next(i for i in range(tiny.VOCABULARY) if (batch()["input_ids"] == i).any(1).sum() == 1)
    row = (batch()["input_ids"] == poison).any(1).nonzero().item()
    teacher.get_input_embeddings().weight.data[poison] = torch.nan
    teacher.config.tie_word_embeddings = False
    teacher.lm_head.weight = torch.nn.Parameter(torch.nan_to_num(teacher.lm_head.weight.data))
    with pytest.raises(ModelError, match=rf"NaN or infinite values at step 0, rows \[{row}\]"):
        make(tmp_path, models=(student, teacher)).train()


def other_vocabulary():
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=100, **sizes))


def five_classes():
    config = BertConfig(vocab_size=tiny.VOCABULARY, hidden_size=16, intermediate_size=16, num_hidden_layers=1)
    config.num_attention_heads, config.num_labels = 2, 5
    return BertForSequenceClassification(config)


@pytest.mark.parametrize(
    ("name", "teacher", "message"),
    [
        ("llama", other_vocabulary, r"100 entries, the student's 96; .*vocabulary=\"align\""),
        ("bert_classifier", five_classes, r"5 classes, the student 2; load the student with num_labels=5"),
        ("bert", tiny.llama, "predict different things"),
    ],
    ids=["vocabulary", "classes", "task"],
)
def test_a_teacher_that_does_not_fit_is_refused(tmp_path, name, teacher, message):
    student, teacher = tiny.ALL[name](), teacher()
    with pytest.raises(ModelError, match=message):
        make(tmp_path, name, models=(student, teacher))
    assert all(p.requires_grad for p in teacher.parameters())


def test_a_teacher_that_shares_weights_is_refused(tmp_path):
    student, _ = pair()
    with pytest.raises(ModelError, match="pass teacher=copy"):
        make(tmp_path, models=(student, student))
    assert all(p.requires_grad for p in student.parameters())


def test_models_without_a_distribution_are_refused(tmp_path):
    t5 = T5Config(vocab_size=32, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    with pytest.raises(ModelError, match="T5Model cannot be distilled"):
        make(tmp_path, models=(T5Model(t5), T5Model(t5)))
    student, teacher = tiny.bert_classifier(), tiny.bert_classifier(seed=1)
    student.config.problem_type = "regression"
    with pytest.raises(ModelError, match="regression and multi-label"):
        make(tmp_path, "bert_classifier", models=(student, teacher))


def test_options_that_distillation_cannot_honour_are_refused(tmp_path):
    with pytest.raises(PlanError) as caught:
        make(tmp_path, temperature=0.0, alpha=1.5)
    assert len(caught.value.problems) == 2
    config = DistillationConfig(output_dir=str(tmp_path))
    config.divergence = "kl"
    with pytest.raises(PlanError, match="there is no 'kl'"):
        config.__post_init__()
    with pytest.raises(PlanError, match="label_smoothing_factor"):
        make(tmp_path, label_smoothing_factor=0.1)


def test_a_label_loss_without_labels_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"alpha=0.6 needs labels"):
        make(tmp_path, rows=training.rows(labelled=False)).train()


def test_labels_that_are_no_class_indices_are_refused(tmp_path):
    rows = training.rows("sequence")
    for row in rows:
        row["labels"] = row["labels"].float()
    with pytest.raises(DataError, match="class indices"):
        make(tmp_path, "bert_classifier", rows=rows).train()


def test_bfloat16_models_are_distilled(tmp_path):
    student, teacher = tiny.llama(torch.bfloat16), tiny.llama(torch.bfloat16, seed=1)
    trainer = make(tmp_path, models=(student, teacher), max_steps=2, logging_steps=1)
    trainer.train()
    assert all(math.isfinite(log["loss"]) for log in trainer.state.log_history if "loss" in log)
    assert torch.isfinite(training.weights(student).float()).all()
