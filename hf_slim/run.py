"""Carry out a recipe: plan, run stage by stage, keep what is finished, write the artifact.

Killed at any moment and started again with the same command, a run goes on after the last finished stage (a GPTQ stage
after its last finished block) and ends with the same bytes. When the recipe, the model, the data or the code changed,
it refuses and says what.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel, set_seed

import hf_slim
from hf_slim.core.apply import run_stage
from hf_slim.core.context import Context
from hf_slim.core.data import Role, TokenWindows, load_tokens
from hf_slim.core.errors import ArtifactError, DataError
from hf_slim.core.examples import Examples, check_examples, load_examples, unknown_classes
from hf_slim.core.experts import unfused
from hf_slim.core.layers import check_weights
from hf_slim.core.model import ModelSource, check_tokens
from hf_slim.core.parallel import device, is_main, wait_for_all
from hf_slim.core.progress import Progress
from hf_slim.core.report import RunReport
from hf_slim.core.select import find_layers
from hf_slim.core.targets import Targets, check_targets, load_targets
from hf_slim.export.artifact import read_report, write_artifact
from hf_slim.export.workspace import Workspace, disk_errors
from hf_slim.labels import LABELLED
from hf_slim.methods import changes_model
from hf_slim.plan import Plan, make_plan
from hf_slim.recipe import Recipe

Data = dict[str, TokenWindows | Examples | Targets]


def run_recipe(
    recipe: Recipe, out: str | Path, *, overwrite: bool = False, progress: Progress | None = None
) -> RunReport:
    """Run a recipe and leave an artifact that `from_pretrained` loads.

    Args:
        recipe: with its `model` set.
        out: the artifact's folder: new, empty, or ours (an unfinished run is taken up).
        overwrite: throw away what an earlier run of ours left there.
        progress: progress bars; shown on a terminal by default.

    Returns:
        What was measured.

    Raises:
        PlanError, ModelError, DataError, ArtifactError, ResumeError: before any weight is touched where possible.
    """
    plan = make_plan(recipe)
    workspace = Workspace(Path(out))
    workspace.check()
    if plan.source.path is not None and plan.source.path.resolve() == workspace.out.resolve():
        raise ArtifactError(f"{out} holds the model itself; give another folder for the result")
    tokenizer = plan.source.load_tokenizer()
    data = _read_data(plan, tokenizer)
    inputs = fingerprints(recipe, plan.source, data)
    with disk_errors(workspace.out):
        if overwrite:
            workspace.clear()
        if workspace.is_finished():
            return workspace.finished(inputs)
        workspace.open(inputs)
        model = _run_stages(plan, workspace, data, tokenizer, progress or Progress())
        return _finish(plan, workspace, model, tokenizer, inputs)


def fingerprints(recipe: Recipe, source: ModelSource, data: Data) -> dict[str, Any]:
    """What decides the result of a run, as short strings."""
    stages = recipe.to_dict()
    stages.pop("model", None)
    return {
        "recipe": _digest(json.dumps(stages, sort_keys=True)),
        "model": source.fingerprint(),
        "code": f"hf_slim {hf_slim.__version__} {code_digest()[:12]}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}",
        **{f"{kind} {name}": ModelSource(name).fingerprint() for kind, name in _other_models(recipe)},
        **{f"data.{role}": found.fingerprint for role, found in data.items()},
    }


def _other_models(recipe: Recipe) -> list[tuple[str, str]]:
    """Other models that stages learn from or begin with: ("teacher" or "student", name)."""
    options = [part for stage in recipe.stages for part in (stage.options, getattr(stage.options, "training", None))]
    kinds = ("teacher", "student")
    return [(kind, name) for part in options for kind in kinds if (name := getattr(part, f"own_{kind}", None))]


@cache
def code_digest() -> str:
    """Changes when any source file of the package does."""
    package = Path(__file__).parent
    files = sorted(package.rglob("*.py"))
    return _digest("".join(f"{f.relative_to(package)} {_digest(f.read_text())}\n" for f in files))


def _run_stages(plan: Plan, workspace: Workspace, data: Data, tokenizer: Any, progress: Progress) -> PreTrainedModel:
    done = len(workspace.reports)
    model = _load(plan, workspace)
    context = Context(
        seed=plan.recipe.seed,
        tokenizer=tokenizer,
        windows=_windows(data, tokenizer),
        labelled=lambda role: found if isinstance(found := data[role], Examples | Targets) else None,
        load_original=lambda: plan.source.load().to(device()),
        source=plan.source,
        progress=progress,
        out=workspace.exports,
        retokenize=lambda new: _windows({role: _read(plan.recipe, role, new) for role in plan.roles()}, new),
    )
    _take_up_tokens(context, workspace)
    for role, found in data.items():
        examples = context.examples(role)
        if isinstance(examples, Targets):
            check_targets(model, examples)
        elif examples is not None:
            check_examples(model, examples)
        else:
            check_tokens(model, context.tokens(role), found.description)
    workspace.begin()
    for number, planned in enumerate(plan.stages, 1):
        if number <= done:
            continue
        progress.say(f"stage {number} of {len(plan.stages)}: {planned.stage.method}")
        set_seed(plan.recipe.seed)
        folder = workspace.stage_folder(number)
        context.blocks, context.work = folder / "blocks", folder / "training"
        report = run_stage(model, planned.stage, context)
        context.release_original()
        changed = model if changes_model(planned.stage.method) else None
        workspace.finish_stage(number, report, changed, tokenizer if context.kept else None)
    return model


def _take_up_tokens(context: Context, workspace: Workspace) -> None:
    """Go on with the tokenizer that a finished stage has rewritten; the run was killed after it."""
    folder = workspace.model_folder and workspace.work / workspace.model_folder
    if folder and (folder / "tokenizer.json").is_file():
        old, new = context.tokenizer.get_vocab(), ModelSource(str(folder)).load_tokenizer()
        words = sorted(new.get_vocab().items(), key=lambda pair: pair[1])
        context.renumber_tokens(new.backend_tokenizer, [old[word] for word, _ in words])


def _load(plan: Plan, workspace: Workspace) -> PreTrainedModel:
    """The model as the last finished stage left it, or the original."""
    if workspace.model_folder is not None:
        return ModelSource(str(workspace.work / workspace.model_folder)).load().to(device())
    model = plan.source.load().to(device())
    with unfused(model):
        check_weights(model, [x for x in find_layers(model).values() if x.tied_to is None])
    return model


def _finish(
    plan: Plan, workspace: Workspace, model: PreTrainedModel, tokenizer: Any, inputs: dict[str, Any]
) -> RunReport:
    report = None
    if is_main():
        staged = workspace.work / "artifact"
        shutil.rmtree(staged, ignore_errors=True)
        report = write_artifact(plan, workspace.reports, model, tokenizer, inputs, staged)
        workspace.publish(staged)
    wait_for_all()
    return report or read_report(workspace.out)


def _read_data(plan: Plan, tokenizer: Any) -> Data:
    """The data of every role that a stage needs.

    Raises:
        DataError: all that is wrong with them, classes that the model does not have too.
    """
    data: Data = {}
    problems: list[str] = []
    for role in plan.roles():
        try:
            found = data[role] = _read(plan.recipe, role, tokenizer)
        except DataError as error:
            problems += error.problems
            continue
        if isinstance(found, Examples):
            problems += unknown_classes(found, plan.source.load_config().num_labels or 0)
    if problems:
        raise DataError(problems)
    return data


def _read(recipe: Recipe, role: Role, tokenizer: Any) -> TokenWindows | Examples | Targets:
    source = recipe.data.of(role)
    if source.target is not None:
        return load_targets(source, role, tokenizer, recipe.seed)
    if source.label is not None and role in LABELLED:
        return load_examples(source, role, tokenizer, recipe.seed)
    return load_tokens(source, role, tokenizer, recipe.seed)


def _windows(data: Data, tokenizer: Any) -> Callable[[str], Tensor]:
    def of(role: str) -> Tensor:
        found = data[role]
        return found.windows(tokenizer) if isinstance(found, Examples | Targets) else found.ids

    return of


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
