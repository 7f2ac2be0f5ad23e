"""SentencePiece's byte-pair encoding, as llama.cpp runs it: scores decide, no list of merges."""

from __future__ import annotations

import itertools


def encode(text: str, scores: dict[str, float]) -> list[str]:
    """Pieces of a text whose spaces are U+2581 already: join the neighbours with the best score until none has one."""
    pieces = list(text)
    while True:
        joined = [(scores[a + b], -i) for i, (a, b) in enumerate(itertools.pairwise(pieces)) if a + b in scores]
        if not joined:
            break
        at = -max(joined)[1]
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
    bytewise = [[piece] if piece in scores else [f"<0x{b:02X}>" for b in piece.encode()] for piece in pieces]
    return [piece for run in bytewise for piece in run]
