"""The few things that differ when several processes run: accelerate's, under short names."""

from __future__ import annotations

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState, is_initialized
from accelerate.utils import DistributedType, parse_flag_from_env, reduce
from torch import Tensor

from hf_slim.core.errors import PlanError

_SHARDING = {DistributedType.FSDP: "FSDP", DistributedType.DEEPSPEED: "DeepSpeed"}


def processes() -> PartialState:
    """The processes of this launch; `PartialState` alone does not see those of `accelerate launch --cpu`."""
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))


def is_main() -> bool:
    """Whether this process writes files and prints."""
    return processes().is_main_process


def device() -> torch.device:
    """Where this process computes: its accelerator, or the CPU."""
    return torch.device(processes().device or "cpu")


def wait_for_all() -> None:
    """Return when every process has come here."""
    processes().wait_for_everyone()


def sum_over_processes(sums: Tensor) -> Tensor:
    """Sums of all processes together, float32 on the CPU."""
    return reduce(sums.float().to(processes().device), reduction="sum").cpu()  # pyright: ignore


def require_whole_weights(what: str) -> None:
    """Raises PlanError where FSDP or DeepSpeed shard the weights, by the launcher's choice or by a Trainer's arguments.

    Args:
        what: needs them, for the error.
    """
    chosen = [name for kind, name in _SHARDING.items() if parse_flag_from_env(f"ACCELERATE_USE_{kind.value}")]
    if not chosen and is_initialized():
        chosen = [_SHARDING[kind] for kind in _SHARDING if AcceleratorState().distributed_type == kind]
    if chosen:
        raise PlanError(
            f"{what} needs whole weights, which {chosen[0]} shards; use data parallelism, "
            "as in recipes/accelerate/ddp.yaml"
        )
