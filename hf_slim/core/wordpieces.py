"""A fast tokenizer as its JSON: which tokens depend on which, and the same tokenizer with fewer of them.

BPE, Unigram, WordPiece and WordLevel models of the `tokenizers` library. A token is a string; BPE reaches it through
merges, and what merges pass on the way has to exist too.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

from tokenizers import Tokenizer

from hf_slim.core.errors import ModelError

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


class Pieces:
    """The tokens of a fast tokenizer.

    Args:
        state: its JSON.

    Attributes:
        ids: {token: id}, added tokens included.
    """

    def __init__(self, state: dict[str, Any]):
        self.state, self.kind = state, state["model"]["type"]
        model = state["model"]
        listed = self.kind == "Unigram"
        self.own: dict[str, int] = (
            {token: number for number, (token, _) in enumerate(model["vocab"])} if listed else dict(model["vocab"])
        )
        self.added = {entry["content"]: entry["id"] for entry in state["added_tokens"]}
        self.ids = self.own | self.added
        self.words = {number: word for word, number in self.ids.items()}
        self.merges = [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in model.get("merges", ())]
        self.ranks = {merge: rank for rank, merge in enumerate(self.merges)}
        self.bytes = "ByteLevel" in json.dumps([state["pre_tokenizer"], state["normalizer"]])
        self.fallback = bool(model.get("byte_fallback"))

    def fixed(self) -> set[int]:
        """Ids that must stay: special and added tokens, bytes, or else all single characters."""
        return {number for number in self.words if self.why_fixed(number) is not None}

    def why_fixed(self, number: int) -> str | None:
        """What makes a token one that cannot go."""
        word = self.words.get(number)
        if word is None:
            return "named by the model's config"
        model = self.state["model"]
        if word in self.added or word == model.get("unk_token") or number == model.get("unk_id"):
            return "a special or added token"
        if _BYTE.fullmatch(word) or (self.bytes and len(word) == 1):
            return "one of the 256 bytes"
        prefix = model.get("continuing_subword_prefix") or ""
        if not self.bytes and not self.fallback and len(word.removeprefix(prefix)) == 1 and self.kind != "WordLevel":
            return "a single character"
        if self.kind == "Unigram" and word == min(model["vocab"], key=lambda pair: pair[1])[0]:
            return "the token of the lowest score, which unknown characters are measured by"
        return None

    def closed(self, chosen: Iterable[int]) -> set[int]:
        """With the intermediate tokens of the merges that lead to the chosen ones."""
        found = set(chosen)
        if self.kind != "BPE":
            return found
        for number in list(found):
            word = self.words.get(number, "")
            if word in self.own:
                for left, right in derivation(word, self.ranks):
                    found |= {self.own[part] for part in (left, right, self._joined(left, right)) if part in self.own}
        return found

    def by_rank(self) -> list[int]:
        """All ids, those that merges make early first: what a token is made of comes before it."""
        made = {self._joined(left, right): rank for rank, (left, right) in reversed(list(enumerate(self.merges)))}
        return sorted(self.words, key=lambda number: (made.get(self.words[number], -1), number))

    def rewritten(self, kept: Sequence[int]) -> Tokenizer:
        """The tokenizer with these tokens only, numbered in this order."""
        new = {old: number for number, old in enumerate(kept)}
        state = copy.deepcopy(self.state)
        model = state["model"]
        own = {word: new[number] for word, number in self.own.items() if number in new}
        if self.kind == "Unigram":
            model["vocab"] = [pair for number, pair in enumerate(model["vocab"]) if number in new]
            model["unk_id"] = None if model["unk_id"] is None else new[model["unk_id"]]
        else:
            model["vocab"] = dict(sorted(own.items(), key=lambda pair: pair[1]))
        if self.kind == "BPE":
            stays = [m for m in self.merges if {*m, self._joined(*m)} <= own.keys()]
            model["merges"] = [list(merge) for merge in stays]
        for entry in state["added_tokens"]:
            entry["id"] = new[entry["id"]]
        _renumber_template(state.get("post_processor"), new)
        return Tokenizer.from_str(json.dumps(state))

    def check(self, tokenizer: Tokenizer, kept: Sequence[int], texts: Sequence[str], ids: Sequence[list[int]]) -> None:
        """Refuse a tokenizer that cuts the texts otherwise.

        Args:
            ids: what the original makes of the texts, in its own numbers.

        Raises:
            ModelError: with the first difference.
        """
        new = {old: number for number, old in enumerate(kept)}
        for text, old in zip(texts, ids, strict=True):
            found = tokenizer.encode(text, add_special_tokens=False).ids
            expected = [new[number] for number in old]
            if found != expected:
                place = next((i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), len(found))
                word = self.words[old[min(place, len(old) - 1)]]
                raise ModelError(
                    f"the trimmed {self.kind} tokenizer would cut the text otherwise at {word!r}; keep more tokens "
                    "with keep: [...] or choose other text"
                )

    def _joined(self, left: str, right: str) -> str:
        prefix = self.state["model"].get("continuing_subword_prefix") or ""
        return left + right.removeprefix(prefix)


def read_pieces(tokenizer: Any) -> Pieces:
    """The tokens of a Transformers tokenizer.

    Raises:
        ModelError: it is not a fast one, or of a kind that is not understood.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ModelError(f"{type(tokenizer).__name__} is no fast tokenizer; its vocabulary cannot be rewritten")
    pieces = Pieces(json.loads(backend.to_str()))
    if pieces.kind not in ("BPE", "Unigram", "WordPiece", "WordLevel"):
        raise ModelError(
            f"a tokenizer of kind {pieces.kind} is not understood; known: BPE, Unigram, WordPiece, WordLevel"
        )
    return pieces


def derivation(word: str, ranks: dict[tuple[str, ...], int]) -> list[tuple[str, str]]:
    """The merges that BPE applies to a word on its own, in order: the one of lowest rank first, leftmost first."""
    parts, applied = list(word), []
    while True:
        pairs = [(ranks[pair], place) for place, pair in enumerate(pairwise(parts)) if pair in ranks]
        if not pairs:
            return applied
        _, place = min(pairs)
        applied.append((parts[place], parts[place + 1]))
        parts[place : place + 2] = ["".join(parts[place : place + 2])]


def _renumber_template(processor: Any, new: dict[int, int]) -> None:
    """Ids that a post-processor repeats: templates, and BERT's and RoBERTa's pairs of token and id."""
    if not isinstance(processor, dict):
        return
    for inner in processor.get("processors", ()):
        _renumber_template(inner, new)
    for entry in (processor.get("special_tokens") or {}).values():
        entry["ids"] = [new[number] for number in entry["ids"]]
    for key in ("sep", "cls"):
        if isinstance(processor.get(key), list):
            processor[key][1] = new[processor[key][1]]
