"""Vocabulary trimming: the same tokens, the same logits on the text that was counted; whatever must stay, stays."""

from __future__ import annotations

import copy
import itertools
from functools import cache

import architectures
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import hf_slim
from hf_slim.core.errors import PlanError
from hf_slim.core.wordpieces import derivation
from hf_slim.recipe import Recipe
from hf_slim.run import run_recipe

torch.set_num_threads(1)
WORLD = [
    "the quick brown fox jumps over the lazy dog while another quicker foxhound is jumping over lazier dogs",
    "a penny saved is a penny earned and pennies earned in savings are pennies saved for the learners of earning",
    "0123456789 zebra yaks vex my jinxed quiz kid; pack my box with five dozen liquor jugs",
]
TEXT = ["the lazy dog saved a penny while the fox was jumping over the learners " * 12]
SPECIAL = ["<unk>", "<s>", "</s>"]


def trained(kind: str) -> PreTrainedTokenizerFast:
    return copy.deepcopy(train(kind))


@cache  # trainers break ties otherwise every time
def train(kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer of 96 tokens or more, fitted to a few sentences; the special tokens are not the first ones."""
    options: dict = {"vocab_size": 90, "show_progress": False}
    if kind == "byte-level":
        inner = Tokenizer(models.BPE())
        inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        options |= {"vocab_size": 340, "initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}
        trainer = trainers.BpeTrainer(**options)
    elif kind == "byte-fallback":
        inner = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
        inner.normalizer = normalizers.Replace(" ", "▁")
        inner.pre_tokenizer = pre_tokenizers.Metaspace(split=True)
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        inner.decoder = decoders.Sequence(steps)
        trainer = trainers.BpeTrainer(
            special_tokens=["<unk>", *(f"<0x{b:02X}>" for b in range(256))], **options | {"vocab_size": 360}
        )
    elif kind == "unigram":
        inner = Tokenizer(models.Unigram())
        inner.decoder = decoders.Metaspace()
        inner.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(special_tokens=["<unk>"], unk_token="<unk>", **options)
    elif kind == "wordpiece":
        inner = Tokenizer(models.WordPiece(unk_token="<unk>"))  # pyright: ignore
        inner.pre_tokenizer = pre_tokenizers.Whitespace()
        trainer = trainers.WordPieceTrainer(special_tokens=["<unk>"], **options | {"vocab_size": 140})
    else:
        inner = Tokenizer(models.WordLevel(unk_token="<unk>"))
        inner.pre_tokenizer = pre_tokenizers.Whitespace()
        trainer = trainers.WordLevelTrainer(special_tokens=["<unk>"], **options)
    inner.train_from_iterator(WORLD + TEXT, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    made.add_special_tokens({"additional_special_tokens": ["<tool>"]})
    return made


KINDS = ("byte-level", "byte-fallback", "unigram", "wordpiece", "words")


def model_of(tokenizer, name: str = "Llama"):
    config = architectures.config_of(name)
    config.vocab_size = len(tokenizer) + 5  # padded, as many models are
    config.eos_token_id, config.bos_token_id = tokenizer.eos_token_id, tokenizer.bos_token_id
    torch.manual_seed(0)
    cls = type(architectures.make(name))
    return cls._from_config(config, dtype=torch.float32).eval()


@torch.no_grad()
def logits(model, ids: list[int]) -> torch.Tensor:
    return model(torch.tensor([ids])).logits[0]


def words_of(tokenizer) -> list[str]:
    return [word for word, _ in sorted(tokenizer.get_vocab().items(), key=lambda pair: pair[1])]


@pytest.mark.parametrize("name", ["Llama", "Qwen2"])  # with a head of its own, and tied
@pytest.mark.parametrize("kind", KINDS)
def test_counted_text_is_lossless(kind, name, tmp_path):
    old, tokenizer = trained(kind), trained(kind)
    model = model_of(tokenizer, name)
    before = old(TEXT[0], add_special_tokens=False)["input_ids"]
    expected = logits(model, before)
    report = hf_slim.compress(model, "prune.vocabulary", tokenizer=tokenizer, data=TEXT, length=16)
    after = tokenizer(TEXT[0], add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(after) == old.convert_ids_to_tokens(before)
    kept = [old.get_vocab()[word] for word in words_of(tokenizer)]
    assert kept == sorted(kept)
    assert report.metrics["tokens"] == len(kept) == model.config.vocab_size < len(old)
    torch.testing.assert_close(logits(model, after), expected[:, kept], rtol=0, atol=1e-5)
    assert model.config.eos_token_id == tokenizer.eos_token_id == words_of(tokenizer).index("</s>")
    cells_tokens = [word for word in words_of(old) if word.startswith("<")]
    assert {*cells_tokens} <= {*words_of(tokenizer)}
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded, again = (cls.from_pretrained(tmp_path) for cls in (AutoModelForCausalLM, PreTrainedTokenizerFast))
    assert again(TEXT[0], add_special_tokens=False)["input_ids"] == after
    assert not hasattr(loaded.config, "quantization_config")
    assert torch.allclose(logits(loaded, after), expected[:, kept], atol=1e-5)


@pytest.mark.parametrize("kind", ["byte-level", "byte-fallback", "unigram"])
def test_any_text_can_still_be_written(kind):
    old, tokenizer = trained(kind), trained(kind)
    hf_slim.compress(model_of(tokenizer), "prune.vocabulary", tokenizer=tokenizer, data=TEXT, length=16)
    text = "quick zebras vex 5 jugs" + (" Zürich 東京" if kind != "unigram" else "")
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids) == old.decode(old(text, add_special_tokens=False)["input_ids"])


def test_derivation_applies_what_bpe_applies():
    """Against a slow rule: of all merges that could be applied, the earliest learned."""
    ranks = {("a", "b"): 2, ("b", "c"): 0, ("a", "bc"): 1, ("abc", "abc"): 3, ("c", "a"): 4}
    assert derivation("abcabc", ranks) == [("b", "c"), ("b", "c"), ("a", "bc"), ("a", "bc"), ("abc", "abc")]
    for letters in itertools.product("abc", repeat=5):
        parts = list(letters)
        for left, right in derivation("".join(letters), ranks):
            fits = [p for p in itertools.pairwise(parts) if p in ranks]
            assert ranks[left, right] == min(ranks[p] for p in fits)
            place = next(i for i, p in enumerate(itertools.pairwise(parts)) if p == (left, right))
            parts[place : place + 2] = [left + right]
        assert not [p for p in itertools.pairwise(parts) if p in ranks]


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        ({"drop": ("<tool>",)}, "'<tool>' is a special or added token"),
        ({"drop": ("a",)}, "'a' is one of the 256 bytes"),
        ({"keep": ("nonsense",)}, "no token 'nonsense'"),
        ({"drop": ("nonsense",), "keep": ("rubbish",)}, "2 problems"),
    ],
)
def test_requests_that_cannot_be_met_are_refused(options, hint):
    tokenizer = trained("byte-level")
    model = model_of(tokenizer)
    vocabulary, state = tokenizer.get_vocab(), {key: t.clone() for key, t in model.state_dict().items()}
    with pytest.raises(PlanError) as raised:
        hf_slim.compress(model, "prune.vocabulary", tokenizer=tokenizer, data=TEXT, length=16, **options)
    assert hint in str(raised.value)
    assert tokenizer.get_vocab() == vocabulary
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())


def test_keep_drop_and_multiple():
    tokenizer = trained("byte-level")
    unused = next(
        word for word in reversed(words_of(tokenizer)) if word not in TEXT[0] and len(word) > 3 and word[0] != "<"
    )
    used = max(tokenizer.tokenize(TEXT[0]), key=len)
    options = {"keep": (unused,), "drop": (used,), "multiple_of": 16}
    model = model_of(tokenizer)
    hf_slim.compress(model, "prune.vocabulary", tokenizer=tokenizer, data=TEXT, length=16, **options)
    assert unused in tokenizer.get_vocab()
    assert used not in tokenizer.get_vocab()
    assert len(tokenizer) == model.config.vocab_size == model.get_input_embeddings().weight.shape[0]
    assert len(tokenizer) % 16 == 0


def test_an_encoded_embedding_is_refused():
    tokenizer = trained("words")
    model = model_of(tokenizer, "Qwen2")
    hf_slim.compress(model, "quantize.rtn", bits=8, group_size=16, embeddings={"bits": 8})
    with pytest.raises(PlanError, match=r"embed_tokens.*put prune\.vocabulary before"):
        hf_slim.compress(model, "prune.vocabulary", tokenizer=tokenizer, data=TEXT, length=16)


def test_other_stages_work_with_the_new_tokens(tmp_path, monkeypatch):
    """What comes after counts, cuts and compares with the tokens that are left; a run that was killed too."""
    tokenizer = trained("byte-level")
    source = tmp_path / "model"
    model_of(tokenizer).save_pretrained(source)
    tokenizer.save_pretrained(source)
    (tmp_path / "text.txt").write_text(TEXT[0] * 4)
    (tmp_path / "other.txt").write_text(" ".join(WORLD) * 8)
    recipe = Recipe.model_validate(
        {
            "model": str(source),
            "data": {
                "calibration": {"source": str(tmp_path / "text.txt"), "samples": 8, "length": 16},
                "held_out": {"source": str(tmp_path / "other.txt"), "samples": 4, "length": 16},
            },
            "stages": ["prune.vocabulary", "evaluate.agreement", {"quantize.gptq": {"bits": 8, "group_size": 16}}],
        }
    )
    report = run_recipe(recipe, tmp_path / "straight")
    assert report.stages[1].metrics["kl"] < 1e-6  # the original's logits, over the tokens that are left
    with monkeypatch.context() as patch:
        patch.setattr("hf_slim.evaluation.agreement.apply", killed)
        with pytest.raises(KeyboardInterrupt):
            run_recipe(recipe, tmp_path / "resumed")
    again = run_recipe(recipe, tmp_path / "resumed")
    assert again.stages[1].metrics == report.stages[1].metrics
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (tmp_path / "resumed" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()
    small = AutoTokenizer.from_pretrained(tmp_path / "resumed")
    assert len(small) == AutoModelForCausalLM.from_pretrained(tmp_path / "resumed").config.vocab_size < len(tokenizer)


def killed(*_):
    raise KeyboardInterrupt
