"""Tokenizers in GGUF's terms: the same tokens, and scores that merge as the ranks did."""

from __future__ import annotations

import gguf_models
import pytest
from gguf import TokenType
from reference import sentencepiece
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from hf_slim.core.errors import ArtifactError
from hf_slim.export.gguf_tokenizer import SPLITS, describe_tokenizer

ROWS = 400


def described(kind: str, rows: int = ROWS, **options):
    found = describe_tokenizer(gguf_models.tokenizer(kind, **options), rows)
    return {key.removeprefix("tokenizer."): value for key, value in found.items()}


@pytest.mark.parametrize("kind", ["sentencepiece", "gemma"])
def test_scores_merge_in_the_order_of_the_ranks(kind: str):
    tokenizer = gguf_models.tokenizer(kind)
    found = described(kind)
    plain = [int(TokenType.NORMAL), int(TokenType.BYTE)]
    scores = {
        token: score
        for token, score, kind in zip(found["ggml.tokens"], found["ggml.scores"], found["ggml.token_type"], strict=True)
        if kind in plain
    }
    lines = [*gguf_models.TEXT.splitlines(), "foxes run there", "aaa the the", "日本 naïve"]
    for line in lines:
        prefix = " " if found["ggml.add_space_prefix"] else ""
        expected = tokenizer.tokenize(line)
        assert sentencepiece.encode((prefix + line).replace(" ", "\u2581"), scores) == expected


@pytest.mark.parametrize("kind", ["gpt-2", "smollm", *SPLITS])
def test_the_split_of_a_byte_level_tokenizer_is_recognized(kind: str):
    found = described(kind)
    assert (found["ggml.model"], found["ggml.pre"]) == ("gpt2", kind)
    assert "ggml.scores" not in found


def test_every_row_of_the_embedding_has_a_token():
    found = described("sentencepiece")
    tokens, types = found["ggml.tokens"], found["ggml.token_type"]
    vocabulary = gguf_models.tokenizer("sentencepiece").get_vocab()
    assert len(tokens) == len(types) == len(found["ggml.scores"]) == ROWS
    assert all(tokens[i] == token for token, i in vocabulary.items())
    assert tokens[len(vocabulary) :] == [f"[PAD{i}]" for i in range(len(vocabulary), ROWS)]
    expected = {"<unk>": 2, "<s>": 3, "<|turn|>": 3, "<0x41>": 6, "\u2581the": 1, f"[PAD{ROWS - 1}]": 5}
    assert {token: types[tokens.index(token)] for token in expected} == expected


def test_what_is_put_around_a_text_is_stated():
    plain, both = described("gpt-2"), described("sentencepiece", add_bos_token=True, add_eos_token=True)
    assert (plain["ggml.add_bos_token"], plain["ggml.add_eos_token"]) == (False, False)
    assert (both["ggml.add_bos_token"], both["ggml.add_eos_token"]) == (True, True)
    assert (plain["ggml.add_space_prefix"], both["ggml.add_space_prefix"]) == (False, True)
    assert (plain["ggml.bos_token_id"], plain["ggml.eos_token_id"], plain["ggml.padding_token_id"]) == (1, 2, 0)
    assert "ggml.unknown_token_id" not in plain
    assert both["ggml.unknown_token_id"] == 0
    assert described("gpt-2", chat_template="{{ x }}")["chat_template"] == "{{ x }}"


def test_added_words_are_looked_up_as_they_stand_in_the_text():
    tokenizer = gguf_models.tokenizer("gemma")
    tokenizer.add_tokens(["\u2581\u2581\u2581"])
    found = describe_tokenizer(tokenizer, ROWS)
    at = tokenizer.convert_tokens_to_ids("\u2581\u2581\u2581")
    assert found["tokenizer.ggml.tokens"][at] == "   "
    assert found["tokenizer.ggml.token_type"][at] == int(TokenType.USER_DEFINED)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (models.Unigram([("a", -1.0), ("b", -2.0)], unk_id=0), "a Unigram"),
        (models.BPE({"a": 0, "b": 1}, []), "a BPE without bytes"),
    ],
)
def test_other_kinds_of_tokenizers_are_refused(model, words: str):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model))
    with pytest.raises(ArtifactError, match=words):
        describe_tokenizer(tokenizer, 2)


def test_an_unknown_split_needs_a_name():
    tokenizer = gguf_models.tokenizer("qwen2")
    spec = tokenizer.backend_tokenizer.to_str().replace("[^\\\\r\\\\n", "[^\\\\r", 1)
    changed = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(spec))
    with pytest.raises(ArtifactError, match="name for it as `pre`"):
        describe_tokenizer(changed, ROWS)
    assert describe_tokenizer(changed, ROWS, "qwen35")["tokenizer.ggml.pre"] == "qwen35"


def test_tokens_beyond_the_embedding_are_refused():
    with pytest.raises(ArtifactError, match="embedding 100 rows"):
        described("gpt-2", rows=100)
