"""The artifact: a folder that `from_pretrained` loads, with the recipe, what was measured, and a model card.

config.json          quantization_config.quant_method is "hf_slim"
model.safetensors    stored tensors; none is called `weight` where a layer is encoded
tokenizer files
exports/             the same model in formats of other programs, where the recipe has export stages
slim.json            recipe, plan, versions, seeds, fingerprints of model and data, the measured report
README.md            model card: the table, the recipe, the command that reproduces it
"""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

import hf_slim
from hf_slim.core.errors import ArtifactError
from hf_slim.core.report import RunReport, Size, StageReport
from hf_slim.core.size import stored_bytes
from hf_slim.export.card import model_card
from hf_slim.export.files import EXPORTS
from hf_slim.plan import Plan

REPORT = "slim.json"


def write_artifact(
    plan: Plan,
    stages: list[StageReport],
    model: PreTrainedModel,
    tokenizer: Any,
    inputs: dict[str, Any],
    folder: Path,
) -> RunReport:
    """Write everything but `slim.json`'s place in the world: the caller moves the folder where it belongs."""
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    report = RunReport(
        model=plan.source.name,
        architecture=type(model).__name__,
        recipe=plan.recipe.to_dict(),
        plan=plan.to_dict(),
        inputs=inputs,
        versions=versions(),
        size=measure_size(plan, model, folder),
        stages=stages,
        notes=plan.source.notes(),
    )
    (folder / "README.md").write_text(model_card(report), encoding="utf-8")
    exported = [f"{EXPORTS}/{name}" for stage in stages for name in stage.files]
    report.files = sorted([p.name for p in folder.iterdir()] + [REPORT] + exported)
    (folder / REPORT).write_text(report.model_dump_json(indent=1), encoding="utf-8")
    return report


def read_report(folder: str | Path) -> RunReport:
    """The report of an artifact.

    Raises:
        ArtifactError: the folder holds none, or a damaged one.
    """
    path = Path(folder) / REPORT
    if not path.is_file():
        raise ArtifactError(f"{folder} holds no {REPORT}; give the folder that `hf-slim run` wrote")
    try:
        return RunReport.model_validate_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ArtifactError(f"{path} is damaged: {str(error).splitlines()[0]}") from error


def measure_size(plan: Plan, model: PreTrainedModel, folder: Path) -> Size:
    """Count stored bytes: what the original's tensors take, what the artifact's tensors and files take."""
    return Size(
        parameters=plan.parameters,
        bytes_before=plan.bytes_before,
        bytes_after=stored_bytes(model),
        file_bytes=sum(f.stat().st_size for f in folder.glob("*.safetensors")),
    )


def versions() -> dict[str, str]:
    """What computed the result."""
    return {
        "hf_slim": hf_slim.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
