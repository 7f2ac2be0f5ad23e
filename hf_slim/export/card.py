"""The model card: what was done, what was measured, and how to do it again."""

from __future__ import annotations

from pathlib import Path

from hf_slim.core.report import RunReport
from hf_slim.export.table import stage_seconds, summary
from hf_slim.methods import changes_model
from hf_slim.recipe import Recipe


def model_card(report: RunReport) -> str:
    """README.md of an artifact: metadata for the Hub, the table, use, recipe, command."""
    recipe = Recipe.model_validate(report.recipe)
    return "\n".join(
        [
            *_metadata(report),
            "",
            f"# {_short_name(report.model)}, made smaller with hf_slim",
            "",
            f"`{report.model}` after {', '.join(f'`{s.method}`' for s in recipe.stages if changes_model(s.method))}.",
            "",
            *_table(report),
            "",
            "## Use",
            "",
            "```python",
            "import hf_slim  # teaches Transformers to read this folder",
            f"from transformers import {_auto_class(report)}, AutoTokenizer",
            "",
            f'model = {_auto_class(report)}.from_pretrained("THIS_FOLDER")',
            'tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")',
            "```",
            "",
            "## Recipe",
            "",
            "```yaml",
            recipe.to_yaml().rstrip(),
            "```",
            "",
            f"Save it as `recipe.yaml`; `hf-slim run recipe.yaml --model {report.model} --out OUT` does it again.",
            "",
            *_provenance(report),
            "",
        ]
    )


def _metadata(report: RunReport) -> list[str]:
    lines = ["---", "library_name: transformers", "tags:", "- hf_slim"]
    if "/" in report.model and not Path(report.model).exists() and not report.model.startswith((".", "~", "/")):
        lines.append(f"base_model: {report.model}")
    return [*lines, "---"]


def _table(report: RunReport) -> list[str]:
    lines = ["| measured | original | this model |", "|---|---:|---:|"]
    lines += [f"| {row.what} | {row.before} | {row.after} |" for row in summary(report)]
    lines += ["", "| stage | time |", "|---|---:|"]
    return lines + [f"| {stage} | {seconds} |" for stage, seconds in stage_seconds(report)]


def _provenance(report: RunReport) -> list[str]:
    notes = [f"- {stage.method}: {note}" for stage in report.stages for note in stage.notes]
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    notes = [f"- {note}" for note in report.notes] + notes
    return [f"Made with {versions}; seed {report.recipe.get('seed', 0)}. Details: `slim.json`.", *notes]


def _short_name(model: str) -> str:
    return Path(model).name


def _auto_class(report: RunReport) -> str:
    """The class of Transformers that loads the model with its head."""
    if report.architecture.endswith("ForSequenceClassification"):
        return "AutoModelForSequenceClassification"
    return "AutoModelForCausalLM" if report.architecture.endswith(("ForCausalLM", "LMHeadModel")) else "AutoModel"
