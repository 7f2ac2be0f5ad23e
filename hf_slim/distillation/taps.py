"""What one forward pass of a model shows of its inside: hidden states, queries, keys and values of chosen blocks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from hf_slim.distillation.pairs import Model

Role = Literal["query", "key", "value"]

# names of the linear layers that make them, below a block
_SEPARATE: dict[str, Role] = {
    **{"q_proj": "query", "k_proj": "key", "v_proj": "value"},
    **{"query": "query", "key": "key", "value": "value"},
    **{"q_lin": "query", "k_lin": "key", "v_lin": "value"},
}
_JOINT = ("qkv_proj", "c_attn")  # all three in one: first all queries, then all keys, then all values


class Seen:
    """A context that keeps what passes through a model inside it; hooks are gone after it.

    Args:
        model: runs one forward pass.
        blocks: names of its blocks.
        outputs: numbers of the blocks whose output is kept.
        roles: (block, role) of the queries, keys and values to keep.
        embedding: keep what enters the first block.

    Attributes:
        outputs: {block: hidden states [batch, length, width]}.
        roles: {(block, role): [batch, length, width of all heads]}, without rotary embedding.
        embedding: hidden states that enter the first block, [batch, length, width].
    """

    embedding: Tensor

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[str],
        outputs: Iterable[int] = (),
        roles: Iterable[tuple[int, Role]] = (),
        embedding: bool = False,
    ):
        self.outputs: dict[int, Tensor] = {}
        self.roles: dict[tuple[int, Role], Tensor] = {}
        self._model, self._blocks = model, [model.get_submodule(name) for name in blocks]
        self._wanted = (sorted(outputs), sorted(roles), embedding)
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Seen:
        outputs, roles, embedding = self._wanted
        for i in outputs:
            self._handles.append(self._blocks[i].register_forward_hook(partial(self._keep_output, i)))
        for i, role in roles:
            module, joint = _maker(self._blocks[i], role)
            assert module is not None  # `relation_problems` has refused what lacks it
            share = _share(self._model, role) if joint else None
            self._handles.append(module.register_forward_hook(partial(self._keep_role, (i, role), share)))
        if embedding:
            self._handles.append(self._blocks[0].register_forward_pre_hook(self._keep_embedding, with_kwargs=True))
        return self

    def __exit__(self, *_: object) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _keep_output(self, i: int, module: nn.Module, args: Any, output: Any) -> None:
        self.outputs[i] = output[0] if isinstance(output, tuple) else output

    def _keep_role(
        self, key: tuple[int, Role], share: tuple[float, float] | None, module: nn.Module, args: Any, output: Tensor
    ) -> None:
        width = output.shape[-1]
        self.roles[key] = output if share is None else output[..., round(share[0] * width) : round(share[1] * width)]

    def _keep_embedding(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self.embedding = args[0] if args else kwargs["hidden_states"]


def relation_problems(whose: str, model: Model, blocks: Sequence[str], roles: Iterable[Role]) -> list[str]:
    """Why queries, keys or values cannot be read off a model; empty if they can."""
    missing = [role for role in roles if any(_maker(model.get_submodule(b), role)[0] is None for b in blocks)]
    if not missing:
        return []
    return [
        f"no layers were found that make the {', '.join(missing)} in the {whose} {type(model).__name__}: known are "
        f"{', '.join((*_SEPARATE, *_JOINT))}; use kind: hidden instead"
    ]


def _maker(block: nn.Module, role: Role) -> tuple[nn.Module | None, bool]:
    """The first module of a block that makes its queries, keys or values, and whether it makes all three."""
    for name, module in block.named_modules():
        last = name.rpartition(".")[2]
        if _SEPARATE.get(last) == role or last in _JOINT:
            return module, last in _JOINT
    return None, False


def _share(model: nn.Module, role: Role) -> tuple[float, float]:
    """From where to where in the joint output the queries, keys or values lie, as shares of its width."""
    config: Any = model.config.get_text_config()  # pyright: ignore
    queries = config.num_attention_heads
    keys = getattr(config, "num_key_value_heads", None) or queries
    total = queries + 2 * keys
    start, end = {"query": (0, queries), "key": (queries, queries + keys), "value": (queries + keys, total)}[role]
    return start / total, end / total


@contextmanager
def eager_attention(models: Sequence[PreTrainedModel]) -> Iterator[None]:
    """Inside, the models show their attention maps, which fast attention never makes."""
    before = [model.config._attn_implementation for model in models]
    try:
        for model in models:
            model.set_attn_implementation("eager")
        yield
    finally:
        for model, implementation in zip(models, before, strict=True):
            model.set_attn_implementation(implementation)
