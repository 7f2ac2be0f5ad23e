"""Where a model comes from: a Hub id, a local folder or a GGUF file; its config, its skeleton, its weights.

The skeleton is built on the meta device: planning reads a few kilobytes and no weight. Remote code is never run.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import StrictDataclassError
from jaxtyping import Int
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedModel
from transformers.utils.quantization_config import QuantizationConfigMixin

from hf_slim.core.errors import DataError, ModelError
from hf_slim.core.experts import unfuse
from hf_slim.core.imports import check_readable, dense_state, foreign, gguf_loss, lost
from hf_slim.core.tasks import Task, check_classes, drawn_by, is_new_head, model_class, outside_head
from hf_slim.integration.bitsandbytes import keep_layout
from hf_slim.integration.transformers import QUANT_METHOD, SlimConfig, SlimQuantizer

IMPORTED = ("*.safetensors", "*.json")  # what is fetched of a checkpoint that another program has quantized
WEIGHTS = ("*.safetensors", "*.bin", "config.json", "*.gguf")


@dataclass(frozen=True)
class ModelSource:
    """A model by name.

    Args:
        name: Hub id, local folder, or path of a GGUF file.
        revision: branch, tag or commit on the Hub.
        dtype: "auto" (as stored), "float32", "bfloat16" or "float16".
        task: what it is to be used for; None for what its config names.
        num_labels: classes of a classifier; None for what its config says.
        seed: of a head that the checkpoint does not have.
    """

    name: str
    revision: str | None = None
    dtype: str = "auto"
    task: Task | None = None
    num_labels: int | None = None
    seed: int = 0

    @property
    def path(self) -> Path | None:
        """The local folder or file, or None for a Hub id."""
        path = Path(self.name).expanduser()
        return path if path.exists() else None

    def where(self) -> dict[str, Any]:
        """Arguments that tell `from_pretrained` where the model is."""
        path = self.path
        if path is None and (self.name.startswith((".", "/", "~")) or self.name.endswith(".gguf")):
            raise ModelError(f"model {self.name!r}: no such folder or file")
        if path is not None and path.is_file():
            if path.suffix != ".gguf":
                raise ModelError(f"model {self.name!r} is a file; give its folder (only a .gguf file stands alone)")
            return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
        return {"pretrained_model_name_or_path": str(path or self.name), "revision": self.revision or "main"}

    def load_config(self) -> PretrainedConfig:
        """The model's config, with as many classes as are asked for and, for a task, a padding token.

        Raises:
            ModelError: it cannot be found or read, or its head is for other classes.
        """
        try:
            config = AutoConfig.from_pretrained(**self.where(), trust_remote_code=False)
        except (OSError, ValueError, KeyError, StrictDataclassError) as error:
            raise ModelError(f"model {self.name!r}: cannot read its config: {_first_line(error)}") from error
        check_classes(config, self.task, self.num_labels)
        for key, value in self._of_task(config).items():
            setattr(config, key, value)
        return config

    def _of_task(self, config: PretrainedConfig) -> dict[str, Any]:
        """What a task changes in a config. Decoders look for a text's end before its padding, and many name none."""
        classes: dict[str, Any] = {} if self.num_labels is None else {"num_labels": self.num_labels}
        if self.task is None or getattr(config, "pad_token_id", None) is not None:
            return classes
        return classes | {"pad_token_id": self.load_tokenizer().pad_token_id}

    @property
    def has_new_head(self) -> bool:
        """Whether a head is drawn at random, because the checkpoint has none for the task."""
        return is_new_head(self.load_config(), self.task)

    def skeleton(self) -> PreTrainedModel:
        """The model without weights, on the meta device; dense where another program has quantized it.

        Layers that are stored encoded are encoded in it; experts are linear layers of their own.
        """
        config = self.load_config()
        self._strip_foreign(config)
        stored = getattr(config, "quantization_config", None)
        with torch.device("meta"):
            model = model_class(config, self.task)._from_config(config, dtype=self._dtype_of(config))
        if stored is not None and stored.get("quant_method") == QUANT_METHOD:
            SlimQuantizer(SlimConfig(**stored))._process_model_before_weight_loading(model)
        unfuse(model)
        return model

    def load(self, quantization: QuantizationConfigMixin | None = None) -> PreTrainedModel:
        """The model with its weights, in eval mode.

        Args:
            quantization: how Transformers is to quantize the weights as they arrive.

        Raises:
            ModelError: it cannot be found or read, a file is damaged, or weights are missing.
        """
        where, config = self.where(), self.load_config()
        cls, stored = model_class(config, self.task), None if _stays_quantized(config) else self._strip_foreign(config)
        if stored is not None:
            where = self._decoded(config, stored)
        options: dict[str, Any] = {} if quantization is None else {"quantization_config": quantization}
        if stored is None:
            options |= {key: getattr(config, key) for key in ("num_labels", "pad_token_id") if self.task is not None}
        try:
            with drawn_by(self.seed):
                loaded: Any = cls.from_pretrained(**where, dtype=self.dtype, output_loading_info=True, **options)
            model, info = loaded
        except SafetensorError as error:
            raise ModelError(f"model {self.name!r}: a weights file is damaged ({error}); download it again") from error
        except (OSError, ValueError, RuntimeError) as error:
            raise ModelError(f"model {self.name!r}: cannot load it: {_first_line(error)}") from error
        new_head = is_new_head(config, self.task)
        if absent := outside_head(info["missing_keys"], model) if new_head else sorted(info["missing_keys"]):
            missing = ", ".join(sorted(absent)[:5])
            raise ModelError(
                f"model {self.name!r}: {len(absent)} weights are not in its files ({missing} ...); "
                "they would be random. Use a complete checkpoint"
            )
        if "gguf_file" in where:
            forget_gguf(model)
        keep_layout(model)
        return model.eval()

    def notes(self) -> list[str]:
        """What was lost before the model came here: it was quantized by another program.

        Raises:
            ModelError: by one whose checkpoints are not read.
        """
        path = self.path
        if path is not None and path.is_file():
            return gguf_loss(path)
        config = self.load_config()
        stored = self._strip_foreign(config)
        return [] if stored is None else [lost(stored, self._dtype_of(config))]

    def _dtype_of(self, config: PretrainedConfig) -> torch.dtype:
        written: Any = config.dtype if self.dtype == "auto" else getattr(torch, self.dtype)
        return written or torch.float32

    def _strip_foreign(self, config: PretrainedConfig) -> dict[str, Any] | None:
        """Take out of a config how another program has quantized the checkpoint: it is read as a dense one."""
        stored = foreign(config)
        if stored is None or self.where().get("gguf_file"):
            return None
        check_readable(stored, self.name)
        del config.quantization_config
        return stored

    def _decoded(self, config: PretrainedConfig, stored: dict[str, Any]) -> dict[str, Any]:
        """Arguments that let `from_pretrained` load the decoded weights."""
        name, revision = self.name, self.revision
        folder = self.path or Path(snapshot_download(name, revision=revision, allow_patterns=IMPORTED))
        with torch.device("meta"):
            skeleton = model_class(config, self.task)._from_config(config)
        state = dense_state(folder, stored, skeleton, self._dtype_of(config))
        return {"pretrained_model_name_or_path": None, "config": config, "state_dict": state}

    def load_tokenizer(self) -> Any:
        """The model's tokenizer; for a task, one without a padding token pads with its end-of-sequence token.

        Raises:
            ModelError: there is none.
        """
        try:
            tokenizer = AutoTokenizer.from_pretrained(**self.where(), trust_remote_code=False)
        except (OSError, ValueError, KeyError) as error:
            raise ModelError(f"model {self.name!r}: cannot load its tokenizer: {_first_line(error)}") from error
        if self.task is not None and tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    def fingerprint(self) -> str:
        """Changes when the model does: hashes of local files, or the Hub's commit."""
        path = self.path
        if path is None:
            return f"{self.name}@{getattr(self.load_config(), '_commit_hash', None) or self.revision or 'main'}"
        files = [path] if path.is_file() else sorted(f for pattern in WEIGHTS for f in path.glob(pattern))
        return hashlib.sha256("".join(f"{f.name} {sha256(f)}\n" for f in files).encode()).hexdigest()


def check_tokens(model: PreTrainedModel, ids: Int[Tensor, "windows length"], what: str) -> None:
    """Refuse token windows that the model cannot take.

    Args:
        what: names the data in messages.

    Raises:
        DataError: windows longer than the model has positions, or ids that its embedding does not have.
    """
    problems = []
    length, positions = ids.shape[1], getattr(model.config, "max_position_embeddings", None)
    if positions is not None and length > positions:
        problems.append(
            f"{what}: windows of {length} tokens do not fit the {positions} positions of {type(model).__name__}; "
            f"use length {positions} or less"
        )
    known = getattr(model.config, "vocab_size", None)
    if known is not None and ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < known:
        problems.append(
            f"{what}: token ids run from {int(ids.min())} to {int(ids.max())}, but the model knows 0 to {known - 1}; "
            "use the model's own tokenizer"
        )
    if problems:
        raise DataError(problems)


def forget_gguf(model: PreTrainedModel) -> None:
    """A model read from GGUF is dense, but Transformers still marks it as quantized."""
    model.hf_quantizer = None  # pyright: ignore
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def sha256(path: Path) -> str:
    """Hash of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _stays_quantized(config: PretrainedConfig) -> bool:
    """Whether Transformers runs the checkpoint as it is stored: bitsandbytes', as `quantize.bnb` leaves one."""
    stored: Any = getattr(config, "quantization_config", None) or {}
    return stored.get("quant_method") == "bitsandbytes"


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
