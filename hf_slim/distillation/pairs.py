"""Whether a teacher can teach a student: what their logits predict, over which vocabulary or classes."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

from transformers.loss.loss_utils import (
    LOSS_MAPPING,
    ForCausalLMLoss,
    ForMaskedLMLoss,
    ForSequenceClassificationLoss,
    ForTokenClassification,
)

from hf_slim.core.errors import ModelError, PlanError
from hf_slim.core.select import find_layers
from hf_slim.distillation.vocabulary import Vocabulary, same_words

Model: TypeAlias = Any  # a PreTrainedModel, or a PeftModel around one, which is another class
Task = Literal["causal", "masked", "token", "sequence", "seq2seq"]

_TASKS: dict[Any, Task] = {
    ForCausalLMLoss: "causal",
    ForMaskedLMLoss: "masked",
    ForTokenClassification: "token",
    ForSequenceClassificationLoss: "sequence",
}
_NO_DISTRIBUTION = ("regression", "multi_label_classification")
_NUMBERS = "regression and multi-label models cannot be distilled: their outputs are no distribution"


def task_of(model: Model) -> Task:
    """What the model's logits predict, told by the loss that transformers attaches to its class.

    Raises:
        ModelError: neither a causal, masked or encoder-decoder language model nor a token or sequence classifier.
    """
    # a class that names no loss (GPT2LMHeadModel) gets the causal one from transformers as well
    loss = LOSS_MAPPING.get(getattr(model, "loss_type", None), ForCausalLMLoss)
    writes = model.config.is_encoder_decoder
    if loss not in _TASKS or (writes and (loss is not ForCausalLMLoss or model.get_output_embeddings() is None)):
        raise ModelError(
            f"{type(model).__name__} cannot be distilled: only causal, masked and encoder-decoder language models, "
            "token and sequence classifiers have logits that two models can be compared by"
        )
    return "seq2seq" if writes else _TASKS[loss]


def words_of(model: Model) -> int:
    """Size of what its logits are over: words, or classes."""
    classes = task_of(model) in ("token", "sequence")
    return model.config.num_labels if classes else model.config.get_text_config().vocab_size


def check_pair(
    student: Model, teacher: Model, vocabulary: Vocabulary = "same", tokenizers: tuple[Any, Any] = (None, None)
) -> None:
    """Refuse a teacher that cannot teach this student.

    Args:
        vocabulary: what was said about the vocabularies; see `vocabulary.py`.
        tokenizers: of student and teacher, as far as they are known.

    Raises:
        ModelError: another task, another vocabulary or number of classes, or weights in common; all problems at once.
    """
    task, teacher_task = task_of(student), task_of(teacher)
    problems = []
    if task != teacher_task:
        problems.append(
            f"the teacher {type(teacher).__name__} and the student {type(student).__name__} predict different things; "
            "load both with the same AutoModelFor... class"
        )
    elif task in ("token", "sequence") and student.config.num_labels != teacher.config.num_labels:
        problems.append(
            f"the teacher predicts {teacher.config.num_labels} classes, the student {student.config.num_labels}; "
            f"load the student with num_labels={teacher.config.num_labels}"
        )
    elif task in ("token", "sequence"):
        problems += _name_problems(student.config.id2label, teacher.config.id2label)
    sizes = [model.config.get_text_config().vocab_size for model in (teacher, student)]
    problems += _vocabulary_problems(sizes, task, vocabulary, tokenizers)
    if task == "sequence" and any(_predicts_numbers(model) for model in (student, teacher)):
        problems.append(_NUMBERS)
    if {id(p) for p in student.parameters()} & {id(p) for p in teacher.parameters()}:
        problems.append(
            "teacher and student share weights, so freezing the teacher would freeze the student; "
            "pass teacher=copy.deepcopy(model), made before adapters are added"
        )
    if problems:
        raise ModelError(problems)


def check_student(student: Model) -> None:
    """Refuse a student whose outputs are no distribution, or that cannot learn.

    Raises:
        ModelError: it predicts a number, or several labels at once.
        PlanError: see `check_trainable`.
    """
    if task_of(student) == "sequence" and _predicts_numbers(student):
        raise ModelError(_NUMBERS)
    if getattr(student, "is_quantized", False) and not hasattr(student, "peft_config"):
        check_trainable(student)


def _predicts_numbers(model: Model) -> bool:
    return model.config.num_labels == 1 or model.config.problem_type in _NO_DISTRIBUTION


def _name_problems(student: dict[int, str], teacher: dict[int, str]) -> list[str]:
    """Whether both number the same named classes in another order, so that one would be taught for the other."""
    if student == teacher or sorted(student.values()) != sorted(teacher.values()):
        return []
    found = next(number for number in student if student[number] != teacher.get(number))
    return [
        f"teacher and student number the same classes differently: {found} is {teacher.get(found)!r} to the teacher "
        f"and {student[found]!r} to the student; load the student with id2label=teacher.config.id2label and number the "
        "labels of the data so"
    ]


def _vocabulary_problems(
    sizes: list[int], task: Task, vocabulary: Vocabulary, tokenizers: tuple[Any, Any]
) -> list[str]:
    """What is wrong with the vocabularies of teacher and student, in this order."""
    known = all(tokenizer is not None for tokenizer in tokenizers)
    if vocabulary == "universal":
        if task != "causal":
            return ['vocabulary="universal" compares causal language models only; choose a teacher with the same words']
        return (
            []
            if known
            else [
                'vocabulary="universal" tokenizes text twice: pass processing_class= (the student\'s tokenizer) and '
                "teacher_tokenizer="
            ]
        )
    if vocabulary == "align":
        return []
    if known and not same_words(*tokenizers):
        return [
            f"the teacher's tokenizer has other words than the student's ({len(tokenizers[1])} and "
            f"{len(tokenizers[0])}); "
            'choose a teacher with the same tokenizer, or set vocabulary="universal", which compares sorted '
            'probabilities; vocabulary="align" if the words that both have carry the same numbers'
        ]
    if sizes[0] == sizes[1] or (known and len(tokenizers[0]) <= min(sizes)):
        return []
    return [
        f"the teacher's vocabulary has {sizes[0]} entries, the student's {sizes[1]}; choose a teacher with the same "
        'tokenizer. If the tokenizers are equal and one table is merely padded, set vocabulary="align"; if they '
        'differ, set vocabulary="universal"'
    ]


def check_trainable(model: Model) -> None:
    """Refuse a student whose stored tensors cannot learn; the Trainer would do so without a way out.

    Raises:
        PlanError: it is stored as codes, and nothing beside them learns.
    """
    stored = [layer for layer in find_layers(model).values() if layer.encoding is not None]
    if stored and not any(layer.encoding.trainable for layer in stored if layer.encoding is not None):
        raise PlanError(
            f"the student has no trainable parts: {len(stored)} layers are stored as codes, such as {stored[0].name}; "
            "distil before quantizing, train adapters beside the codes (lora: {r: 8}), tune scales instead "
            "(quantize.scales), or share weights (share.kmeans), whose centroids learn"
        )
