"""The student writes a share of its batches: its own words, judged by the teacher, the same with the same seed."""

from __future__ import annotations

import pytest
import tiny
import torch
import training

from hf_slim.core.errors import PlanError
from hf_slim.distillation.on_policy import GENERATED, Generation, judged, prompts_of
from hf_slim.distillation.trainer import DistillationConfig, DistillationTrainer


def batch(rows=4, **pad):
    return training.Pad(**pad)(training.rows(samples=rows))


def make(folder, callbacks=(), student=None, **options):
    args = training.arguments(folder, DistillationConfig, **{"max_steps": 1, "lmbda": 1.0, **options})
    data = {"train_dataset": training.rows(), "data_collator": training.Pad()}
    return DistillationTrainer(student or tiny.llama(), tiny.llama(seed=1), args, callbacks=list(callbacks), **data)


def steps(folder, **options):
    recorded = training.Gradients()
    make(folder, [recorded], **options).train()
    return recorded.steps


def test_a_prompt_ends_where_labels_begin():
    ids, real = torch.arange(8).view(1, 8), torch.ones(1, 8, dtype=torch.bool)
    prompts, lengths, new = prompts_of(ids, real, torch.where(ids < 6, -100, ids))
    assert prompts.tolist() == [[0, 1, 2, 3, 4, 5]]
    assert (lengths.tolist(), new) == ([6], 2)
    assert prompts_of(ids, real, torch.full_like(ids, -100))[1].tolist() == [4]


def test_prompts_are_first_halves():
    given = batch(side="left")
    prompts, lengths, new = prompts_of(given["input_ids"], given["attention_mask"] != 0)
    assert lengths.tolist() == [6, 2, 4, 1]
    assert new == 6
    for row, length, prompt in zip(training.rows(samples=4), lengths.tolist(), prompts, strict=True):
        assert prompt[len(prompt) - length :].tolist() == row["input_ids"][:length].tolist()


def test_only_what_was_written_counts_and_nothing_after_its_end():
    written = torch.tensor([[7, 8, 5, 1, 5, 5], [0, 9, 4, 4, 4, 1]])
    made = judged(written, torch.tensor([[True, True], [False, True]]), torch.tensor([1]), pad=3)
    assert made["input_ids"].tolist() == [[7, 8, 5, 1, 3, 3], [9, 4, 4, 4, 1, 3]]
    assert made["attention_mask"].tolist() == [[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0]]
    assert made["labels"].tolist() == [[-100, -100, 5, 1, -100, -100], [-100, 4, 4, 4, 1, -100]]


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_student_writes_what_it_deems_likely(side):
    """A student whose every word is certain can only write that word's successor, whatever the padding."""
    student = tiny.llama(tied=False)
    table = torch.eye(tiny.VOCABULARY)[:, :40] * 0
    student.model.embed_tokens.weight.data.copy_(table)
    student.lm_head.weight.data.zero_()
    student.generation_config.eos_token_id = None
    given = batch(side=side)
    before = torch.random.get_rng_state()
    made = Generation(1.0, 3, 0).write(student.train(), given, (0, 0, 0))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert student.training
    assert made["input_ids"].shape[1] <= 6 + 3
    assert (made["labels"] != -100).sum(1).tolist() == [3, 3, 3, 3]
    wide = {"input_ids": tiny.ids(200, 4)}
    words = Generation(1.0, 2, 0).write(student, wide, (0, 0, 0))["input_ids"][:, 2:]
    counts = words.flatten().bincount(minlength=tiny.VOCABULARY)
    assert (counts > 0).sum() > 0.9 * tiny.VOCABULARY, "a student that knows nothing writes every word: none is cut off"


def test_draws_depend_on_seed_and_place_alone():
    student, given = tiny.llama(), batch()
    first = Generation(1.0, 8, 0).write(student, given, (3, 0, 0))
    again = Generation(0.5, 8, 0).write(student, given, (3, 0, 0))
    assert torch.equal(first["input_ids"], again["input_ids"])
    for seed, place in ((1, (3, 0, 0)), (0, (4, 0, 0)), (0, (3, 0, 1))):
        other = Generation(1.0, 8, seed).write(student, given, place)
        assert not torch.equal(first["labels"], other["labels"])


def test_the_share_is_kept():
    for share in (0.0, 0.3, 1.0):
        chosen = [Generation(share, 1, 0).is_chosen(step, number) for step in range(500) for number in range(4)]
        assert sum(chosen) / 2000 == pytest.approx(share, abs=0.04)


def test_a_step_is_the_loss_on_what_was_written(tmp_path):
    """The gradient of an ordinary trainer on the written batch, labels of the prompt ignored, no label loss."""
    (found,) = steps(tmp_path, alpha=0.5, per_device_train_batch_size=4)
    generation = Generation(1.0, 128, 42)
    made = generation.write(tiny.llama(), batch(), (0, 0, 0))
    assert made.pop(GENERATED)
    rows = [{name: value[i] for name, value in made.items()} for i in range(4)]
    recorded = training.Gradients()
    args = training.arguments(tmp_path, DistillationConfig, max_steps=1, per_device_train_batch_size=4)
    DistillationTrainer(tiny.llama(), tiny.llama(seed=1), args, train_dataset=rows, callbacks=[recorded]).train()
    assert training.relative(found, 0.5 * recorded.steps[0]) < 1e-5


def test_accumulated_batches_weigh_by_their_tokens(tmp_path):
    """Two micro-batches written by the student are one batch with the tokens of both."""
    (found,) = steps(tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    made = []
    for number in range(2):
        given = training.Pad()(training.rows()[4 * number : 4 * number + 4])
        made.append(Generation(1.0, 128, 42).write(tiny.llama(), given, (0, number, 0)))
    rows = []
    for part in made:
        for i, real in enumerate(part["attention_mask"] != 0):
            rows.append({name: part[name][i][real] for name in ("input_ids", "labels")})
    recorded = training.Gradients()
    args = training.arguments(tmp_path, DistillationConfig, max_steps=1, per_device_train_batch_size=8)
    data = {"train_dataset": rows, "data_collator": training.Pad(), "callbacks": [recorded]}
    DistillationTrainer(tiny.llama(), tiny.llama(seed=1), args, **data).train()
    assert training.relative(found, recorded.steps[0]) < 1e-5


def test_the_same_seed_trains_the_same_and_a_resumed_run_goes_on_alike(tmp_path):
    options = {
        "max_steps": 4,
        "lmbda": 0.5,
        "save_strategy": "steps",
        "save_steps": 2,
        "per_device_train_batch_size": 2,
    }
    straight = make(tmp_path / "a", **options)
    straight.train()
    resumed = make(tmp_path / "b", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert torch.equal(training.weights(resumed.model), training.weights(straight.model))
    other = make(tmp_path / "c", **{**options, "seed": 1, "data_seed": 42})
    other.train()
    assert not torch.equal(training.weights(other.model), training.weights(straight.model))


def test_the_student_comes_closer_to_the_teacher_where_it_writes(tmp_path):
    options = {"optim": "adamw_torch", "learning_rate": 1e-2, "max_steps": 12, "logging_steps": 3}
    trainer = make(tmp_path, **options)
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert losses[-1] < 0.8 * losses[0]


def test_options_that_cannot_be_honoured_are_refused(tmp_path):
    with pytest.raises(PlanError, match="lmbda is the share") as caught:
        make(tmp_path, lmbda=1.5, max_new_tokens=0)
    assert len(caught.value.problems) == 2
    with pytest.raises(PlanError, match="live teacher judge"):
        make(tmp_path, alpha=0.0)
    args = training.arguments(tmp_path, DistillationConfig, lmbda=0.5)
    with pytest.raises(PlanError, match="causal language model"):
        DistillationTrainer(tiny.bert(), tiny.bert(seed=1), args, train_dataset=training.rows("masked"))


def test_habits_of_generation_are_left_out_and_come_back():
    student, given = tiny.llama(), batch()
    plain = Generation(1.0, 4, 0).write(student, given, (0, 0, 0))
    own = student.generation_config
    for name, value in {
        "return_dict_in_generate": True,
        "num_return_sequences": 2,
        "stop_strings": ["a"],
        "guidance_scale": 2.0,
        "top_k": 1,
        "bad_words_ids": [[5]],
        "prompt_lookup_num_tokens": 2,
    }.items():
        setattr(own, name, value)
    made = Generation(1.0, 4, 0).write(student, given, (0, 0, 0))
    assert student.generation_config is own
    assert all(torch.equal(made[name], plain[name]) for name in ("input_ids", "labels"))


def test_a_row_of_padding_alone_counts_nothing():
    given = batch()
    given["attention_mask"][1] = 0
    made = Generation(1.0, 4, 0).write(tiny.llama(), given, (0, 0, 0))
    assert (made["labels"][1] == -100).all()
    assert (made["labels"][0] != -100).any()
