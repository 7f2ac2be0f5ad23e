"""A linear layer that shares the encoded weight of another one."""

from __future__ import annotations

from torch import Tensor

from hf_slim.encodings.modules import EncodedLinear, TiedHead


class TiedLinear(TiedHead):
    """A layer of a block whose weight is the encoded one of another block; it stores its bias only.

    Args:
        turned: it stands in for a Conv1D, and must become one again when made dense.
    """

    def __init__(self, source: EncodedLinear, bias: Tensor | None, turned: bool = False):
        super().__init__(source, bias)
        self.turned = turned

    def extra_repr(self) -> str:
        return f"tied to an encoded {self.out_features} x {self.in_features} layer"
