"""Encodings: how a weight is stored. `read_encoding` turns a description from `config.json` back into one."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from hf_slim.core.errors import ArtifactError, nearest
from hf_slim.core.explain import explain
from hf_slim.encodings.affine import Affine
from hf_slim.encodings.base import Encoding, TensorSpec
from hf_slim.encodings.codebook import Codebook
from hf_slim.encodings.hashed import Hashed
from hf_slim.encodings.low_rank import LowRank
from hf_slim.encodings.sparse import Sparse

KINDS: dict[str, type[Encoding]] = {
    "affine": Affine,
    "codebook": Codebook,
    "hashed": Hashed,
    "low_rank": LowRank,
    "sparse": Sparse,
}

__all__ = ["KINDS", "Affine", "Codebook", "Encoding", "Hashed", "LowRank", "Sparse", "TensorSpec", "read_encoding"]


def read_encoding(description: dict[str, Any]) -> Encoding:
    """The encoding that a description such as {"kind": "affine", "bits": 4} names.

    Raises:
        ArtifactError: unknown kind or option: a damaged config, or one written by a newer hf_slim.
    """
    kind = description.get("kind")
    if kind not in KINDS:
        raise ArtifactError(
            f"unknown encoding {kind!r} in the model's quantization_config; {nearest(str(kind), KINDS)}"
        )
    try:
        return KINDS[kind].model_validate(description)
    except ValidationError as error:
        found = explain(error, KINDS[kind], description)
        raise ArtifactError(
            [
                f"quantization_config, encoding {description}: {' '.join(map(str, [*about, message]))}"
                for _, about, message in found
            ]
        ) from None
