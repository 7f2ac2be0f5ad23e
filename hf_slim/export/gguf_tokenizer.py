"""A tokenizer as GGUF's metadata: tokens, their types, merges or scores, ids of special tokens, the chat template.

GGUF knows two kinds of byte-pair tokenizers. "gpt2" works on bytes spelled as letters, after a split of the text that
the file only names ("pre"). "llama" is SentencePiece's: spaces become U+2581, unknown characters fall back to bytes,
and the pair whose joined token has the best score is merged first. Tokenizers of Transformers hold ranked merges
instead, so a token's score here is minus the rank of the first merge that makes it: the same order. The merges are
written too; Transformers reads them, llama.cpp the scores.
"""

from __future__ import annotations

import json
import re
from typing import Any

from gguf import Keys, TokenType

from hf_slim.core.errors import ArtifactError

SPLITS = {  # regular expressions of known tokenizers, by llama.cpp's names for them
    "llama-bpe": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    "tekken": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
_SPACE = "\u2581"
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


def describe_tokenizer(tokenizer: Any, rows: int, pre: str | None = None) -> dict[str, Any]:
    """The tokenizer under its GGUF keys.

    Args:
        tokenizer: a fast tokenizer of Transformers.
        rows: of the embedding; ids that no token has are filled up with unused ones.
        pre: name of the text split, when it is not one that this module recognizes.

    Raises:
        ArtifactError: a tokenizer that GGUF cannot hold.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    spec = json.loads(backend.to_str()) if backend is not None else {"model": {"type": type(tokenizer).__name__}}
    model = spec["model"]
    byte_level = _contains(spec.get("pre_tokenizer"), "ByteLevel")
    if model["type"] != "BPE" or not (byte_level or model.get("byte_fallback")):
        raise ArtifactError(
            f"a GGUF file of these architectures holds byte-level or SentencePiece byte-pair tokenizers, and this one "
            f"is a {model['type']}{' without bytes' if model['type'] == 'BPE' else ''}; export another format"
        )
    vocabulary = tokenizer.get_vocab()
    if max(vocabulary.values()) >= rows:
        raise ArtifactError(
            f"the tokenizer has tokens up to id {max(vocabulary.values())}, but the model's embedding {rows} rows; "
            f"use the model's own tokenizer, or resize the embedding before it is compressed"
        )
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    tokens, types = _tokens(tokenizer, vocabulary, rows, byte_level)
    found = {
        Keys.Tokenizer.MODEL: "gpt2" if byte_level else "llama",
        Keys.Tokenizer.PRE: pre or (text_split(spec["pre_tokenizer"]) if byte_level else "default"),
        Keys.Tokenizer.LIST: tokens,
        Keys.Tokenizer.TOKEN_TYPE: types,
        Keys.Tokenizer.MERGES: merges,
    }
    if not byte_level:
        found[Keys.Tokenizer.SCORES] = merge_scores(merges, tokens)
    return {key: value for key, value in (found | _special(tokenizer)).items() if value is not None and value != []}


def text_split(pre_tokenizer: dict[str, Any]) -> str:
    """llama.cpp's name for how a byte-level tokenizer splits text before it merges.

    Args:
        pre_tokenizer: its description in `tokenizer.json`.

    Raises:
        ArtifactError: a split of unknown name.
    """
    steps = [step for step in pre_tokenizer.get("pretokenizers", [pre_tokenizer]) if step["type"] != "ByteLevel"]
    if not steps:
        return "gpt-2"
    if [step["type"] for step in steps] == ["Digits"] and steps[0]["individual_digits"]:
        return "smollm"
    if len(steps) == 1 and steps[0]["type"] == "Split":
        for name, regex in SPLITS.items():
            if steps[0]["pattern"].get("Regex") == regex:
                return name
    raise ArtifactError(
        f"the tokenizer splits text in a way that is none of {', '.join(['gpt-2', 'smollm', *SPLITS])}; give "
        "llama.cpp's name for it as `pre`"
    )


def merge_scores(merges: list[str], tokens: list[str]) -> list[float]:
    """Scores under which SentencePiece merges in the order of `merges`; tokens that no merge makes come last."""
    scores: dict[str, float] = {}
    for rank, merge in enumerate(merges):
        scores.setdefault(merge.replace(" ", ""), -float(rank))
    return [scores.get(token.replace(" ", _SPACE), -float(len(merges) + i)) for i, token in enumerate(tokens)]


def _tokens(tokenizer: Any, vocabulary: dict[str, int], rows: int, byte_level: bool) -> tuple[list[str], list[int]]:
    """Every id's token and type."""
    tokens = [f"[PAD{i}]" for i in range(rows)]
    types = [int(TokenType.UNUSED)] * rows
    for token, i in vocabulary.items():
        is_byte = not byte_level and _BYTE.fullmatch(token)
        tokens[i], types[i] = token, int(TokenType.BYTE if is_byte else TokenType.NORMAL)
    for i, added in tokenizer.added_tokens_decoder.items():
        types[i] = int(TokenType.CONTROL if added.special else TokenType.USER_DEFINED)
        if not added.special:
            tokens[i] = added.content.replace(_SPACE, " ")  # llama.cpp looks these up in the text as it came
    if not byte_level and tokenizer.unk_token_id is not None:
        types[tokenizer.unk_token_id] = int(TokenType.UNKNOWN)
    return tokens, types


def _special(tokenizer: Any) -> dict[str, Any]:
    """Ids of special tokens, what is put around a text, and the chat template."""
    ids = {
        Keys.Tokenizer.BOS_ID: tokenizer.bos_token_id,
        Keys.Tokenizer.EOS_ID: tokenizer.eos_token_id,
        Keys.Tokenizer.UNK_ID: tokenizer.unk_token_id,
        Keys.Tokenizer.PAD_ID: tokenizer.pad_token_id,
    }
    bare = tokenizer.backend_tokenizer.encode("a", add_special_tokens=False)
    whole = tokenizer.backend_tokenizer.encode("a", add_special_tokens=True).ids
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    return ids | {
        Keys.Tokenizer.ADD_BOS: len(whole) > len(bare.ids) and whole[0] == tokenizer.bos_token_id,
        Keys.Tokenizer.ADD_EOS: len(whole) > len(bare.ids) and whole[-1] == tokenizer.eos_token_id,
        Keys.Tokenizer.ADD_PREFIX: bare.tokens[0][0] in (_SPACE, "\u0120"),
        Keys.Tokenizer.CHAT_TEMPLATE: template,
    }


def _contains(step: Any, kind: str) -> bool:
    """Whether a pre-tokenizer, or a step of a sequence of them, is of that type."""
    if step is None:
        return False
    return step["type"] == kind or any(_contains(inner, kind) for inner in step.get("pretokenizers", ()))
