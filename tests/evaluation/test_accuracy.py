"""Accuracy against one text at a time, and against scikit-learn."""

from __future__ import annotations

import random

import pytest
import tiny
import torch
from sklearn.metrics import accuracy_score

from hf_slim.core.errors import ModelError
from hf_slim.core.examples import examples_from
from hf_slim.evaluation.accuracy import Accuracy, accuracy

torch.set_num_threads(1)
DRAW = random.Random(0)
ROWS = [{"text": "".join(DRAW.choices("abcdef", k=DRAW.randint(1, 30))), "label": n % 2} for n in range(41)]


def test_padding_and_batches_change_nothing():
    model, tokenizer = tiny.bert_classifier().train(), tiny.tokenizer()
    examples = examples_from(ROWS, tokenizer, length=24)
    with torch.no_grad():
        ids = [torch.tensor([tokenizer(row["text"])["input_ids"][:24]]) for row in ROWS]
        alone = [int(model.eval()(input_ids=each).logits.argmax()) for each in ids]
    expected = accuracy_score([row["label"] for row in ROWS], alone)
    assert 0 < expected < 1
    model.train()
    for batch in (1, 7, 41):
        found = accuracy(model, examples, tokenizer, batch)
        assert found.accuracy == pytest.approx(expected)
        assert found.stderr == pytest.approx((expected * (1 - expected) / 40) ** 0.5)
        assert found.texts == 41
    assert model.training


def test_metric_of_the_evaluate_library():
    metric = Accuracy()
    metric.add_batch(predictions=[0, 1], references=[0, 0])
    metric.add_batch(predictions=[2], references=[2])
    assert metric.compute() == {"accuracy": pytest.approx(2 / 3), "stderr": pytest.approx(1 / 3), "texts": 3}


def test_a_language_model_is_refused():
    with pytest.raises(ModelError, match="needs a sequence classifier, got BertForMaskedLM"):
        accuracy(tiny.bert(), examples_from(ROWS, tiny.tokenizer()), tiny.tokenizer())
