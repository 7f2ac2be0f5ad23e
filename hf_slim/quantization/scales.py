"""End-to-end tuning of scales (the second phase of EfficientQAT; Chen et al. 2024, arXiv:2407.11062).

A model that is stored as integers is trained against the original's logits; codes, zero points and pruned weights are
what they are, only the scales learn, and the norms on demand:

    W = k s,   k = codes - zeros fixed,   dL/ds = Σ_group k dL/dW,   s = s0 exp(u)

k [rows, cols] is held as int8; the float weight exists for the moment of one product, forward and backward. Scales are
used as they will be stored, rounded straight-through, so what is saved is what was measured. Some training windows are
kept apart: the scales that did best there are kept, which are the old ones if none did better.

Where we differ: the loss is the divergence from the original, not the labels' (it asks for far less data); learning
rates are relative, so that one rate suits the scales of every layer, and the norms.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from jaxtyping import Float, Int
from pydantic import Field
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback

from hf_slim.core.context import Context
from hf_slim.core.errors import DataError, PlanError
from hf_slim.core.layers import put_layer
from hf_slim.core.method import Rules
from hf_slim.core.precision import fast_dtype, in_dtype
from hf_slim.core.report import StageReport
from hf_slim.core.select import Layer, Select, find_layers, select_layers
from hf_slim.core.training import TrainingOptions, Windows, train
from hf_slim.distillation.trainer import DistillationConfig, DistillationTrainer
from hf_slim.encodings import Affine
from hf_slim.encodings.activations import quantize_tokens
from hf_slim.encodings.modules import EncodedLinear, EncodedModule
from hf_slim.quantization.fake import LearnedScales, grouped

RULES = Rules(
    needs=("train", "original"), preserves=("zeros", "codes", "tied"), paper="Chen et al. 2024, arXiv:2407.11062"
)

_MEASURES = 4  # times that the windows kept apart are looked at, beside the start
_BEST = "best.safetensors"


class Config(TrainingOptions):
    """Options of `quantize.scales`."""

    steps: int = Field(50, ge=1, description="optimizer steps")
    learning_rate: float = Field(1e-3, gt=0, description="relative: the share of itself that a scale moves in a step")
    temperature: float = Field(1.0, gt=0, description="both models' logits are divided by it")
    norms: bool = Field(False, description="tune the weights and biases of the norms, too")
    validation: int = Field(4, ge=1, description="training windows kept apart, to choose the best scales")
    layers: Select = Select()


def plan(layers: dict[str, Layer], config: Config, model: PreTrainedModel) -> dict[str, Layer]:
    """No layer will be stored in another way.

    Raises:
        PlanError: there is nothing to tune.
    """
    tunable(layers, config)
    return {}


def tunable(layers: dict[str, Layer], config: Config) -> list[Layer]:
    """The chosen layers that are stored as integers with scales.

    Raises:
        PlanError: there are none.
    """
    chosen = [layer for layer in select_layers(layers, config.layers) if isinstance(layer.encoding, Affine)]
    if not chosen:
        raise PlanError(
            "no layer is stored as integers with scales; put quantize.rtn, quantize.gptq or another such method first"
        )
    return chosen


def scaled_product(
    x: Float[Tensor, "*tokens cols"],
    steps: Int[Tensor, "rows cols"],
    scales: Float[Tensor, "rows groups"],
    group_size: int | None,
) -> Float[Tensor, "*tokens rows"]:
    """x Wᵀ with W = steps * scales, differentiable in x and scales; between the passes only `steps` stays."""
    return _ScaledProduct.apply(x, steps, scales, group_size)


class _ScaledProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, steps, scales, group_size):
        ctx.save_for_backward(x, steps, scales)
        ctx.group_size = group_size
        return x @ _weight(steps, scales, group_size).to(x.dtype).t()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *upstream):
        x, steps, scales = ctx.saved_tensors
        (slope,) = upstream
        d_x = slope @ _weight(steps, scales, ctx.group_size).to(x.dtype) if ctx.needs_input_grad[0] else None
        d_W = slope.reshape(-1, slope.shape[-1]).t().float() @ x.reshape(-1, x.shape[-1]).float()
        d_scales = grouped(d_W, ctx.group_size).mul_(grouped(steps, ctx.group_size)).sum(-1)
        return d_x, None, d_scales, None


def _weight(steps: Tensor, scales: Tensor, group_size: int | None) -> Tensor:
    return grouped(steps, group_size).mul(scales[..., None]).flatten(1)[:, : steps.shape[1]]


class TunedScales(nn.Module):
    """The weight of one encoded layer, as fixed steps and scales that learn."""

    steps: Tensor

    def __init__(self, encoding: Affine, tensors: Mapping[str, Tensor], rows: int, cols: int):
        super().__init__()
        self.unit = 0.5 if encoding.centered else 1.0  # steps of a centered grid are halves
        self.group_size = encoding.group_size
        self.scales = LearnedScales(tensors["scales"].clone(), rate=1.0)
        steps = encoding.decode({**tensors, "scales": torch.ones_like(tensors["scales"])}, rows, cols) / self.unit
        self.register_buffer(
            "steps", steps.to(torch.int8 if steps.abs().max() <= 127 else torch.int16), persistent=False
        )

    def forward(self, x: Tensor) -> Tensor:
        return scaled_product(x, self.steps, self.scales() * self.unit, self.group_size)


class KeepBest(TrainerCallback):
    """Has the Trainer evaluate now and then, and ends with the parameters that did best, the first ones included."""

    def __init__(self, parameters: dict[str, nn.Parameter], steps: int):
        self.parameters, self.every, self.last = parameters, -(-steps // _MEASURES), steps
        self.first_loss, self.best_loss, self.best_step = float("nan"), float("inf"), 0
        self.best: dict[str, Tensor] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        """Take up what a checkpoint remembers."""
        path = _best_file(args, state)
        if path.is_file():
            stored = load_file(path)
            self.first_loss, self.best_loss, step = stored.pop("losses").tolist()
            self.best_step, self.best = int(step), {name: stored[name] for name in self.parameters}

    def on_step_end(self, args, state, control, **kwargs):
        """Ask for an evaluation."""
        control.should_evaluate = self._counts(state.global_step)

    def on_evaluate(self, args, state, control, *, metrics, **kwargs):
        """Remember the parameters if they are the best so far; what else a resumed run evaluates does not count."""
        if not self._counts(state.global_step):
            return
        loss = metrics["eval_loss"]
        if state.global_step == 0:
            self.first_loss = loss
        if not self.best or loss < self.best_loss:
            self.best_loss, self.best_step = loss, state.global_step
            self.best = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    def on_save(self, args, state, control, **kwargs):
        """Put the best parameters beside the checkpoint's own."""
        losses = torch.tensor([self.first_loss, self.best_loss, self.best_step], dtype=torch.float64)
        save_file({name: t.contiguous() for name, t in self.best.items()} | {"losses": losses}, _best_file(args, state))

    @torch.no_grad()
    def on_train_end(self, args, state, control, **kwargs):
        """Go back to the best parameters."""
        for name, parameter in self.parameters.items():
            parameter.copy_(self.best[name])

    def _counts(self, step: int) -> bool:
        return step % self.every == 0 or step == self.last


def apply(model: PreTrainedModel, config: Config, context: Context) -> StageReport:
    """Tune the scales of a model against the original."""
    chosen, teacher, ids = tunable(find_layers(model), config), context.original, context.tokens("train")
    if len(ids) <= config.validation:
        raise DataError(
            f"{config.validation} windows are kept apart to choose the best scales, but there are only {len(ids)}; "
            "give more training data, or lower validation"
        )
    writes = bool(getattr(model.config, "is_encoder_decoder", False))  # its decoder reads labels
    tuning, kept_apart = ids[: -config.validation], Windows(ids[-config.validation :], labels=writes)
    with (
        _tuned(model, chosen, config.norms) as parameters,
        in_dtype(teacher, fast_dtype(teacher.dtype, teacher.device)),
    ):
        best = KeepBest(parameters, config.steps)
        metrics: dict[str, Any] = train(
            model,
            config,
            replace(context, windows=lambda role: tuning, labelled=None),
            DistillationConfig,
            partial(DistillationTrainer, teacher=teacher, eval_dataset=kept_apart, callbacks=[best]),
            temperature=config.temperature,
            per_device_eval_batch_size=config.batch_size,
            prediction_loss_only=True,
            eval_on_start=True,
        )
        scales = {layer.name: model.get_submodule(layer.name).tuned.scales().detach() for layer in chosen}  # pyright: ignore
    rows = []
    for layer in chosen:
        module: Any = model.get_submodule(layer.name)
        tensors = module.tensors()
        tensors["scales"] = scales[layer.name].to(tensors["scales"].dtype)
        rows.append(put_layer(model, layer, (module.encoding, tensors)))
    metrics |= {
        "first_validation_loss": best.first_loss,
        "best_validation_loss": best.best_loss,
        "best_step": best.best_step,
    }
    notes = [] if best.best_step else ["tuning did not lower the loss on the windows kept apart; nothing was changed"]
    return StageReport(layers=rows, metrics=metrics, notes=notes)


@contextmanager
def _tuned(model: PreTrainedModel, chosen: list[Layer], norms: bool) -> Iterator[dict[str, nn.Parameter]]:
    """Inside, the scales of the chosen layers (and the norms) are the model's only trainable parameters."""
    modules: list[EncodedLinear] = [model.get_submodule(layer.name) for layer in chosen]  # pyright: ignore
    trained_before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    quantized = getattr(model, "is_quantized", False)
    model.is_quantized = False  # pyright: ignore  # the Trainer would not train codes either, and says so
    model.requires_grad_(False)
    for module in modules:
        module.tuned = TunedScales(module.encoding, module.tensors(), module.rows, module.cols)  # pyright: ignore
        module.forward = MethodType(_forward, module)
    for norm in _norms(model) if norms else ():
        norm.requires_grad_(True)
    try:
        yield {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    finally:
        for module in modules:
            del module.tuned, module.forward
        model.is_quantized = quantized  # pyright: ignore
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trained_before[name])


def _norms(model: nn.Module) -> list[nn.Module]:
    """Modules whose parameters are all vectors, told from encoded layers, whose only parameter is a bias."""
    found = []
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        if own and all(p.dim() == 1 for p in own) and not isinstance(module, EncodedModule | nn.Linear):
            found.append(module)
    return found


def _forward(module: Any, x: Tensor) -> Tensor:
    """What the encoded layer computes, of scales that learn."""
    if module.encoding.activations is not None:
        q, scale = quantize_tokens(x)
        x = (q * scale).to(x.dtype)
    y = module.tuned(x)
    return y if module.bias is None else y + module.bias


def _best_file(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}" / _BEST
