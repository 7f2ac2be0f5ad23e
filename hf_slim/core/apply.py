"""Run one stage on a model that is in memory, and measure it."""

from __future__ import annotations

import resource
import time

from transformers import PreTrainedModel

from hf_slim.core.context import Context
from hf_slim.core.experts import unfused
from hf_slim.core.report import StageReport
from hf_slim.core.stage import Stage
from hf_slim.integration.transformers import mark
from hf_slim.methods import find_method


def run_stage(model: PreTrainedModel, stage: Stage, context: Context) -> StageReport:
    """Apply a stage in place; afterwards the model saves and loads as what it has become.

    Returns:
        The method's report, with seconds and the process's peak memory.
    """
    start = time.perf_counter()
    with unfused(model):
        report: StageReport = find_method(stage.method).apply(model, stage.options, context)
    mark(model)
    return report.model_copy(
        update={
            "method": stage.method,
            "options": stage.options.model_dump(mode="json", exclude_defaults=True),
            "seconds": time.perf_counter() - start,
            "peak_memory": peak_memory(),
        }
    )


def peak_memory() -> int:
    """Highest resident memory of this process so far, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
