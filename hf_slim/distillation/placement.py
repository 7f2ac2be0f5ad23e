"""Where a teacher lives: whole beside the student, in parts on the devices that it was loaded to, or sharded.

    DistributedDataParallel    every process holds the whole teacher
    FSDP2                      a teacher with plain weights is sharded as the student is, block by block; one whose
                               weights are codes stays whole in every process: integers are no parameters to gather
    DeepSpeed ZeRO-3           the teacher's parameters are partitioned, and gathered layer by layer by an engine of
                               its own without an optimizer; under ZeRO-1 and 2 it stays whole
    `device_map`               it stays where accelerate has put it

A sharded teacher is asked as a whole: its head has no weight outside of its forward pass, so that its logits exist for
the whole batch.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import nn
from transformers import Trainer

from hf_slim.core.select import find_stacks
from hf_slim.integration.bitsandbytes import keep_layout


def place(teacher: Any, trainer: Trainer) -> tuple[Any, bool]:
    """The teacher where its student is trained, and whether its weights are sharded.

    Args:
        teacher: a frozen model in eval mode.
        trainer: that trains the student, with its accelerator.
    """
    keep_layout(teacher)
    if getattr(teacher, "hf_device_map", None) is not None:
        return teacher, False
    if _is_plain(teacher) and trainer.is_deepspeed_enabled and _zero_stage(trainer) == 3:
        return _partitioned(teacher, trainer), True
    if _is_plain(teacher) and trainer.is_fsdp_enabled and trainer.accelerator.is_fsdp2:
        _shard(teacher, trainer)
        return teacher, True
    return teacher.to(trainer.args.device), False


def _is_plain(teacher: nn.Module) -> bool:
    """Whether all its numbers are such as can be gathered."""
    return all(p.is_floating_point() for p in teacher.parameters())


def _shard(teacher: Any, trainer: Trainer) -> None:
    """FSDP2, a block at a time: no device holds the whole teacher, not even on the way."""
    from torch.distributed.fsdp import fully_shard

    accelerator = trainer.accelerator
    plugin: Any = accelerator.state.fsdp_plugin
    parallelism: Any = accelerator.parallelism_config
    mesh = accelerator.torch_device_mesh
    options: dict[str, Any] = {"reshard_after_forward": True}
    if plugin.cpu_offload:
        options["offload_policy"] = plugin.cpu_offload
    if mesh is not None:
        options["mesh"] = mesh[tuple(parallelism.fsdp_dim_names)]
    for name in (name for stack in find_stacks(teacher) for name in stack.blocks):
        fully_shard(teacher.get_submodule(name).to(trainer.args.device), **options)
    fully_shard(teacher.to(trainer.args.device), **options)


def _zero_stage(trainer: Trainer) -> int:
    return trainer.accelerator.state.deepspeed_plugin.zero_stage  # pyright: ignore[reportOptionalMemberAccess]


def _partitioned(teacher: Any, trainer: Trainer) -> Any:
    """A DeepSpeed engine of stage 3 for forward passes alone."""
    import deepspeed  # pyright: ignore[reportMissingImports]

    given = copy.deepcopy(trainer.accelerator.state.deepspeed_plugin.deepspeed_config)  # pyright: ignore
    for of_training in ("optimizer", "scheduler", "train_batch_size", "gradient_accumulation_steps"):
        given.pop(of_training, None)
    # "auto" is filled in by the Trainer for the model that it trains, and means nothing here
    config: dict[str, Any] = {key: value for key, value in given.items() if value != "auto"}
    config["zero_optimization"] = {k: v for k, v in given["zero_optimization"].items() if v != "auto"}
    config.setdefault("train_micro_batch_size_per_gpu", trainer.args.per_device_train_batch_size)
    engine, *_ = deepspeed.initialize(model=teacher, config=config)
    engine.eval()  # which returns nothing
    return engine
