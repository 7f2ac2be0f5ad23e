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

from hf_slim.core.errors import ModelError

Model: TypeAlias = Any  # a PreTrainedModel, or a PeftModel around one, which is another class
Task = Literal["causal", "masked", "token", "sequence"]

_TASKS: dict[Any, Task] = {
    ForCausalLMLoss: "causal",
    ForMaskedLMLoss: "masked",
    ForTokenClassification: "token",
    ForSequenceClassificationLoss: "sequence",
}
_NO_DISTRIBUTION = ("regression", "multi_label_classification")


def task_of(model: Model) -> Task:
    """What the model's logits predict, told by the loss that transformers attaches to its class.

    Raises:
        ModelError: neither a causal or masked language model nor a token or sequence classifier.
    """
    # a class that names no loss (GPT2LMHeadModel) gets the causal one from transformers as well
    loss = LOSS_MAPPING.get(getattr(model, "loss_type", None), ForCausalLMLoss)
    if loss not in _TASKS or model.config.is_encoder_decoder:
        raise ModelError(
            f"{type(model).__name__} cannot be distilled: only causal and masked language models, token and sequence "
            "classifiers have logits that two models can be compared by"
        )
    return _TASKS[loss]


def check_pair(student: Model, teacher: Model) -> None:
    """Refuse a teacher that cannot teach this student.

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
    sizes = [model.config.get_text_config().vocab_size for model in (teacher, student)]
    if sizes[0] != sizes[1]:
        problems.append(
            f"the teacher's vocabulary has {sizes[0]} entries, the student's {sizes[1]}; choose a teacher with the "
            "same tokenizer. If the tokenizers are equal and one table is merely padded, cut or pad it first: "
            f"teacher.resize_token_embeddings({sizes[1]})"
        )
    if task == "sequence" and (student.config.num_labels == 1 or student.config.problem_type in _NO_DISTRIBUTION):
        problems.append("regression and multi-label models cannot be distilled: their outputs are no distribution")
    if {id(p) for p in student.parameters()} & {id(p) for p in teacher.parameters()}:
        problems.append(
            "teacher and student share weights, so freezing the teacher would freeze the student; "
            "pass teacher=copy.deepcopy(model), made before adapters are added"
        )
    if problems:
        raise ModelError(problems)
