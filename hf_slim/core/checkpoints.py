"""A Trainer that resumes models whose weights lie in memory under other names than on disk.

Transformers keeps all experts of a block in one tensor, and writes them one by one under the names that the authors of
the model chose. `from_pretrained` converts; the stock Trainer loads a checkpoint without converting, warns of missing
keys, and goes on with the experts that the model began with. `Resumes` converts there as well.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel, Trainer
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig

from hf_slim.core.errors import DataError
from hf_slim.core.skeleton import without_weights


class Resumes(Trainer):
    """`Trainer`, whose checkpoints restore every weight, those of fused experts included.

    FSDP and DeepSpeed write checkpoints of their own, in the names of memory; these are left to `Trainer`.
    """

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        """As in `Trainer`, and names are converted as `from_pretrained` does."""
        if not self._converted(resume_from_checkpoint, self.model if model is None else model):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self):
        """As in `Trainer`, and names are converted as `from_pretrained` does."""
        if not self._converted(self.state.best_model_checkpoint, self.model):
            super()._load_best_model()

    def _converted(self, folder: str | None, model: nn.Module) -> bool:
        """Load a checkpoint if its names have to be converted; whether they had to."""
        files = sorted(Path(str(folder)).glob("model*.safetensors"))
        own_format = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if own_format or not files or not isinstance(model, PreTrainedModel):
            return False
        if _names(files) <= model.state_dict().keys():
            return False
        load_converted(model, {name: tensor for file in files for name, tensor in load_file(file).items()})
        return True


def _names(files: list[Path]) -> set[str]:
    """Names of the tensors in safetensors files; no tensor is read."""
    names: set[str] = set()
    for file in files:
        with safe_open(file, framework="pt") as opened:
            names |= set(opened.keys())
    return names


def load_converted(model: PreTrainedModel, stored: dict[str, torch.Tensor]) -> None:
    """Give a model the weights of a checkpoint, in place: parameters stay the tensors that they are.

    Args:
        model: a dense model, or one with encoded layers.
        stored: {name on disk: tensor}.

    Raises:
        DataError: the checkpoint lacks weights of the model; nothing has been changed.
    """
    twin = without_weights(model)
    options = LoadStateDictConfig(weight_mapping=get_model_conversion_mapping(model), device_map={"": "cpu"})
    convert_and_load_state_dict_in_model(model=twin, state_dict=stored, load_config=options)
    read = {name: tensor for name, tensor in twin.state_dict().items() if not tensor.is_meta}
    places = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    found = {place for name, place in places.items() if name in read}  # tied weights are read once
    missing = [name for name, place in places.items() if place not in found]
    if missing:
        raise DataError(
            f"the checkpoint lacks {len(missing)} weights of {type(model).__name__}, {missing[0]} for one; resume with "
            "the model that was trained"
        )
    model.load_state_dict(read, strict=False)
