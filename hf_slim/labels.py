"""Which stages need classified texts, and whether a recipe gives them: part of the plan."""

from __future__ import annotations

from hf_slim.core.data import DataConfig, Role
from hf_slim.core.stage import Stage
from hf_slim.methods import data_needed

LABELLED: tuple[Role, ...] = ("train", "held_out")  # calibration data are text, with classes or without


def label_problems(
    stages: tuple[Stage, ...], data: DataConfig, classifies: bool, new_head: bool, writes: bool = False
) -> list[str]:
    """Classes that are missing, classes that nobody predicts, and teachers that know nothing yet.

    Args:
        classifies: the model predicts one class for a text.
        writes: it is an encoder-decoder, which reads one text and writes another.
        new_head: of its head the checkpoint has no weights, so the original predicts at random.
    """
    problems: list[str] = []
    read: set[Role] = set()
    for number, stage in enumerate(stages, 1):
        needs = data_needed(stage.method, stage.options)
        roles: list[Role] = [role for role in LABELLED if role in needs]
        read.update(roles)
        problems += [
            f"stage {number}, {stage.method}, needs texts with classes, and data.{role} has none; "
            "give it label: and the name of their column"
            for role in roles
            if classifies and "labels" in needs and data.of(role).label is None
        ]
        if new_head and {"train", "original"} <= {*needs}:
            problems.append(
                f"stage {number}, {stage.method}, would learn from the original, whose head is new and predicts at "
                "random; set alpha: 0 to learn from labels alone, or teacher: previous after a stage that did"
            )
    unread = [role for role in LABELLED if role in read and data.of(role).label is not None and not classifies]
    if "train" in read and data.of("train").target is not None and not writes:
        problems.append(
            f"data.train: target {data.of('train').target!r} is what an encoder-decoder is to write, and the model is "
            "none; leave target out"
        )
    return problems + [
        f"data.{role}: label {data.of(role).label!r} gives classes, and the model predicts none; "
        "set task: sequence-classification, or leave label out"
        for role in unread
    ]
