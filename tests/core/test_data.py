from __future__ import annotations

import json
import re

import datasets
import pytest
import torch
from pydantic import ValidationError
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_slim.core import texts
from hf_slim.core.data import POOL, DataConfig, DataSource, fingerprint, load_tokens, tokens_from
from hf_slim.core.errors import DataError

EOS = 1


def make_tokenizer(eos: str | None = "</s>"):
    """One token a character; unknown is 0, end of sequence 1, space 2, then digits and letters."""
    characters = " 0123456789abcdefghijklmnopqrstuvwxyz"
    vocabulary = {"?": 0, "</s>": EOS} | {character: i + 2 for i, character in enumerate(characters)}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    plain.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=plain, eos_token=eos, unk_token="?")


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def numbers(count: int) -> str:
    """Text in which every window of eight characters is another one: 0000 0001 0002 ..."""
    return "".join(f"{i:07d} " for i in range(count))


def words(tokenizer, windows) -> list[str]:
    return ["".join(tokenizer.convert_ids_to_tokens(row)) for row in windows.ids]


# -------------------------------------------------------------- the built-in prose


def test_halves_share_no_paragraph_and_lose_none():
    calibration, held_out = texts.builtin(held_out=False), texts.builtin(held_out=True)
    ours, theirs = ({p for text in half for p in text.split("\n\n")} for half in (calibration, held_out))
    assert not ours & theirs
    assert len(ours) + len(theirs) == sum(text.count("\n\n") + 1 for text in calibration + held_out)
    from pydoc_data.topics import topics

    assert ours | theirs == {paragraph for text in topics.values() for paragraph in texts._prose(text)}


def test_halves_share_next_to_no_sentence():
    """Topics quote each other with small changes, which paragraphs do not catch: 22 of 12,086 runs of 12 words."""
    runs = []
    for half in (texts.builtin(held_out=False), texts.builtin(held_out=True)):
        split = [text.split() for text in half]
        runs.append({tuple(words[i : i + 12]) for words in split for i in range(len(words) - 11)})
    assert len(runs[0] & runs[1]) < 0.01 * len(runs[1])


def test_prose_is_large_enough_and_is_prose():
    """At 4.4 characters a token: over 32 windows of 512 for calibration and 16 held out, in every Python since 3.10."""
    calibration, held_out = (sum(map(len, texts.builtin(held_out=half))) for half in (False, True))
    assert calibration > 1.5 * 32 * 512 * 4.4
    assert held_out > 1.5 * 16 * 512 * 4.4
    assert 0.2 < held_out / (calibration + held_out) < 0.4
    everything = "\n".join(texts.builtin(held_out=False) + texts.builtin(held_out=True))
    assert not re.search(r"::=|^>>>|\*{4}|={4}", everything, re.MULTILINE)


def test_prose_is_the_same_every_time(tokenizer):
    first, second = (load_tokens(DataSource(samples=4, length=64), "calibration", tokenizer, seed=3) for _ in range(2))
    assert first.fingerprint == second.fingerprint
    assert torch.equal(first.ids, second.ids)
    assert re.match(r"prose of Python 3\.\d+\.\d+\S* \(calibration topics\): 4 windows of 64 tokens", first.description)


def test_training_text_is_never_held_out(tokenizer):
    held_out = "\n\n".join(texts.builtin(held_out=True))
    for role in ("calibration", "train"):
        assert all(text not in held_out for text in texts.read("builtin", role))
    assert list(texts.read("builtin", "held_out")) == texts.builtin(held_out=True)


def test_markup_is_stripped():
    sentence = 'The *quick* brown fox jumps over a built-\nin "dog" with 2**3 legs.'
    text = f"Title\n*****\n\n{sentence}\n\n   a ::= b\n\n   >>> x\n\nHi."
    assert texts._prose(text) == ['The quick brown fox jumps over a built-in "dog" with 2**3 legs.']


# ------------------------------------------------------------------------- windows


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "numbers.txt"
    path.write_text(numbers(100))
    return str(path)


def test_held_out_windows_are_the_first_in_order(file, tokenizer):
    windows = load_tokens(DataSource(source=file, samples=3, length=8), "held_out", tokenizer, seed=5)
    assert words(tokenizer, windows) == ["0000000 ", "0000001 ", "0000002 "]
    assert windows.ids.dtype == torch.int64
    assert windows.description == f"{file}: 3 windows of 8 tokens"


@pytest.mark.parametrize("role", ["calibration", "train"])
def test_drawn_windows_are_distinct_and_follow_the_seed(file, tokenizer, role):
    source = DataSource(source=file, samples=20, length=8)
    draws = [words(tokenizer, load_tokens(source, role, tokenizer, seed)) for seed in (0, 0, 1)]
    assert draws[0] == draws[1]
    assert draws[0] != draws[2]
    assert len(set(draws[0])) == 20
    assert set(draws[0]) <= {f"{i:07d} " for i in range(100)}
    own = source.model_copy(update={"seed": 1})
    assert words(tokenizer, load_tokens(own, role, tokenizer, 0)) == draws[2]


def test_all_windows_can_be_drawn(file, tokenizer):
    drawn = load_tokens(DataSource(source=file, samples=100, length=8), "calibration", tokenizer)
    assert sorted(words(tokenizer, drawn)) == [f"{i:07d} " for i in range(100)]


def test_draw_comes_from_the_pool(file, tokenizer):
    drawn = load_tokens(DataSource(source=file, samples=2, length=8), "calibration", tokenizer, seed=0)
    assert all(int(word) < 2 * POOL for word in words(tokenizer, drawn))


def test_fingerprint_changes_with_tokens_and_shape():
    ids = torch.arange(12).view(3, 4)
    assert fingerprint(ids) == fingerprint(ids.clone().int())
    assert len({fingerprint(each) for each in (ids, ids + 1, ids.view(4, 3), ids.flip(0))}) == 4


# --------------------------------------------------------- files, folders, the Hub


ROWS = ["one fish", "two fish", "red fish", "blue fish"]


@pytest.fixture
def written(tmp_path):
    """The same four texts as jsonl, as parquet, and as a folder that `datasets` loads."""
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"text": row, "n": i}) for i, row in enumerate(ROWS)))
    rows = datasets.Dataset.from_dict({"text": ROWS, "n": list(range(4))})
    rows.to_parquet(tmp_path / "rows.parquet")
    (tmp_path / "folder").mkdir()
    rows.to_parquet(tmp_path / "folder" / "train.parquet")
    datasets.Dataset.from_dict({"text": ROWS[::-1]}).to_parquet(tmp_path / "folder" / "test.parquet")
    return tmp_path


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet", "folder"])
def test_documents_are_joined_by_the_end_of_sequence(written, tokenizer, name):
    windows = load_tokens(DataSource(source=str(written / name), samples=1, length=35), "held_out", tokenizer)
    assert words(tokenizer, windows) == ["one fish</s>two fish</s>red fish</s>blue fish"[: 35 + 9]]


def test_without_an_end_of_sequence_documents_are_joined_directly(written):
    plain = make_tokenizer(eos=None)
    windows = load_tokens(DataSource(source=str(written / "rows.jsonl"), samples=1, length=16), "held_out", plain)
    assert words(plain, windows) == ["one fishtwo fish"]


def test_split_is_taken(written, tokenizer):
    source = DataSource(source=str(written / "folder"), split="test", samples=1, length=9)
    assert words(tokenizer, load_tokens(source, "held_out", tokenizer)) == ["blue fish"]


def test_kinds_of_source(tmp_path):
    (tmp_path / "plain").write_text("x")
    kinds = {
        "builtin": "builtin",
        "some/where/corpus.txt": "text",
        "Corpus.JSONL": "jsonl",
        "a.parquet": "parquet",
        str(tmp_path): "folder",
        str(tmp_path / "plain"): "unknown",
        "./nowhere": "unknown",
        "Salesforce/wikitext": "hub",
        "squad": "hub",
    }
    assert {source: texts.kind_of(source) for source in kinds} == kinds


def test_a_hub_name_that_cannot_be_loaded_says_what_to_do(monkeypatch, tokenizer):
    def offline(*arguments, **options):
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    source = DataSource(source="Salesforce/wikitext", name="wikitext-2-raw-v1", split="test")
    with pytest.raises(DataError, match=r"wikitext-2-raw-v1 test: cannot be loaded .*reach the Hub\. Check the id"):
        load_tokens(source, "held_out", tokenizer)


def test_a_hub_data_set_is_streamed_with_its_name_and_split(monkeypatch, tokenizer):
    asked = []

    def load_dataset(*arguments, **options):
        asked.append((arguments, options))
        return ({"text": f"{i:07d}"} for i in iter(int, 1))  # endless

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    windows = load_tokens(DataSource(source="a/b", name="c", samples=2, length=8), "calibration", tokenizer)
    assert asked == [(("a/b", "c"), {"split": "train", "streaming": True})]
    assert windows.ids.shape == (2, 8)


# -------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("absent.txt", None, {}, "absent.txt: no such file; give an existing path"),
        ("notes.pdf", b"x", {}, r"cannot read \.pdf files; known: \.csv, \.jsonl, \.parquet, \.raw, \.tsv, \.txt"),
        ("empty.txt", b"", {}, r"empty\.txt: holds no text"),
        ("short.txt", b"abc", {"samples": 2, "length": 8}, "3 tokens, but 1 windows of 8 tokens need 8"),
        (
            "few.txt",
            b"abcdefghij",
            {"samples": 2, "length": 8},
            "10 tokens, but 2 windows of 8 tokens need 16; use more",
        ),
        ("latin.txt", b"caf\xe9", {}, r"latin\.txt: cannot be read as UTF-8"),
        ("empty.jsonl", b"\n\n", {}, "holds no text"),
        ("bad.jsonl", b'{"text": "a"}\n{"text":', {}, "line 2: is not JSON"),
        ("list.jsonl", b"[1]", {}, "line 1: expected an object"),
        ("other.jsonl", b'{"body": "a", "id": 1}', {}, "no column 'text'; columns: body, id; set column:"),
        ("typed.jsonl", b'{"text": 3}', {}, "column 'text' holds int, not text"),
        ("broken.parquet", b"PAR1", {}, r"broken\.parquet: cannot be read as parquet"),
    ],
)
def test_unusable_files(tmp_path, tokenizer, name, content, options, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_tokens(DataSource(source=str(tmp_path / name), **options), "calibration", tokenizer)


@pytest.mark.parametrize("name", ["rows.parquet", "folder"])
def test_missing_column_names_the_columns(written, tokenizer, name):
    source = DataSource(source=str(written / name), column="body")
    with pytest.raises(DataError, match="no column 'body'; columns: text, n; set column:"):
        load_tokens(source, "calibration", tokenizer)


def test_empty_folder_and_unknown_split(written, tokenizer, tmp_path):
    (tmp_path / "nothing").mkdir()
    for source in ({"source": str(tmp_path / "nothing")}, {"source": str(written / "folder"), "split": "dev"}):
        with pytest.raises(DataError, match="cannot be loaded as a data set"):
            load_tokens(DataSource(**source), "calibration", tokenizer)


@pytest.mark.parametrize(
    "options",
    [
        {"samples": 0},
        {"length": 1},
        {"seed": -1},
        {"source": ""},
        {"sample": 3},
        {"column": "text"},
        {"source": "a.txt", "split": "test"},
        {"source": "a.parquet", "name": "en"},
    ],
)
def test_options_that_cannot_be_are_refused(options):
    with pytest.raises(ValidationError):
        DataSource(**options)


def test_same_text_cannot_be_fitted_to_and_held_out(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("x")
    same, roundabout = (
        DataSource(source=str(path)),
        DataSource(source=f"{tmp_path}/../{tmp_path.name}/a.txt", samples=3),
    )
    for roles in ({"calibration": same}, {"train": same}):
        with pytest.raises(ValidationError, match="are the same text"):
            DataConfig(held_out=roundabout, **roles)
    with pytest.raises(ValidationError, match="are the same text"):
        DataConfig(held_out=DataSource(source="a/b"), calibration=DataSource(source="a/b", split="train"))
    DataConfig(held_out=DataSource(source="a/b", split="test"), calibration=DataSource(source="a/b"))
    DataConfig(calibration=same, train=same)


def test_config_survives_a_round_trip():
    config = DataConfig(calibration=DataSource(source="a.jsonl", column="body"), train=DataSource(samples=7))
    assert DataConfig.model_validate(config.model_dump(mode="json")) == config


# ------------------------------------------------------------------ data in memory


def test_texts_in_memory(tokenizer):
    windows = tokens_from(["abc", "def"], tokenizer, length=3)
    assert words(tokenizer, windows) == ["abc", "</s>de"]


def test_equally_long_id_lists_are_the_windows(tokenizer):
    rows = [[1, 2, 3], [4, 5, 6]]
    assert tokens_from(rows).ids.tolist() == rows
    assert tokens_from([torch.tensor(row) for row in rows]).ids.tolist() == rows
    assert tokens_from(rows, length=2).ids.tolist() == [[1, 2], [3, 4], [5, 6]]


def test_ragged_id_lists_are_joined():
    assert tokens_from([[1, 2, 3], [4], [5, 6, 7]], length=3).ids.tolist() == [[1, 2, 3], [4, 5, 6]]


def test_tensor_rows_are_the_windows():
    ids = torch.arange(12, dtype=torch.int32).view(3, 4)
    windows = tokens_from(ids)
    assert windows.ids.tolist() == ids.tolist()
    assert windows.ids.dtype == torch.int64
    assert tokens_from(ids, length=2).ids.tolist() == ids[:, :2].tolist()
    drawn = tokens_from(ids, samples=2, seed=4).ids.tolist()
    assert len({tuple(row) for row in drawn} & {tuple(row) for row in ids.tolist()}) == 2
    windows.ids[0, 0] = 99
    assert ids[0, 0] == 0  # a copy


def test_data_sets_in_memory(tokenizer):
    text = datasets.Dataset.from_dict({"text": ["abc", "def"]})
    assert tokens_from(text, tokenizer, length=7).fingerprint == tokens_from(["abc", "def"], tokenizer, 7).fingerprint
    ids = datasets.Dataset.from_dict({"input_ids": [[1, 2], [3, 4]], "text": ["a", "b"]})
    assert tokens_from(ids).ids.tolist() == [[1, 2], [3, 4]]


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        ([], {}, "is empty"),
        (["abc"], {}, "no tokenizer"),
        ("abc", {}, "one str"),
        (7, {}, "got int"),
        ([1, 2], {}, "expected texts or lists of token ids, got an item of type int"),
        ([[1, 2], ["a", 2]], {}, "got an item of type list"),
        ([[], []], {"length": 4}, "holds no text"),
        ([[1, 2]], {"length": 4}, "2 tokens, but 1 windows of 4 tokens need 4"),
        ([[1, 2]], {"samples": 3}, "2 tokens, but 3 windows of 2 tokens need 6"),
        (torch.zeros(2, 3), {}, r"expected token ids of shape \[windows, length\], got torch\.float32 \[2, 3\]"),
        (torch.zeros(3, dtype=torch.long), {}, r"got torch\.int64 \[3\]"),
        (torch.zeros(2, 3, dtype=torch.long), {"length": 4}, "windows of 4 tokens need as many columns"),
        (torch.zeros(2, 3, dtype=torch.long), {"samples": 4}, "6 tokens, but 4 windows of 3 tokens need 12"),
        (datasets.Dataset.from_dict({"body": ["a"]}), {}, "needs a column 'text' or 'input_ids', got body"),
    ],
)
def test_unusable_data_in_memory(data, options, message):
    with pytest.raises(DataError, match=message):
        tokens_from(data, **options)


def test_mixed_items_are_refused(tokenizer):
    with pytest.raises(DataError, match=r"data\[1\]: expected str as in data\[0\], got list"):
        tokens_from(["abc", [1, 2]], tokenizer, length=2)
