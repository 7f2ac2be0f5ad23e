"""A teacher that was asked beforehand: one pass over the training data, and students learn without the teacher.

    top k      Σ_k p log(p / q) + p_rest log(p_rest / q_rest)      forward KL, but for what differs within the rest
    sampled    -Σ_i (c_i / n) log q(v_i)                           forward KL in the mean, plus the teacher's entropy

c_i counts how often word v_i was among n draws from the teacher (random sampling knowledge distillation,
arXiv:2503.16870). With k = vocabulary the first is forward KL itself; below, it is at most that, and its gradient
leaves alone how the student divides what it gives to the other words.

A pass writes shards (`cache_files.py`), several processes each their own, and goes on where it was killed. The key of
a cache says which teacher, tokenizer and data it is of; another one is refused. Rows of the data are addressed by
their number, so that data may be shuffled, cut into batches and padded in any way; their tokens may not change.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import default_data_collator

from hf_slim.core.errors import DataError, ModelError, PlanError
from hf_slim.core.forward import device_of, evaluating
from hf_slim.core.method import MethodConfig
from hf_slim.core.parallel import is_main, processes, wait_for_all
from hf_slim.distillation.cache_data import check_readable, check_sum, require_rows, scan, tokens_of
from hf_slim.distillation.cache_files import CacheKey, Targets, TeacherCache, claim, is_whole, write_shard
from hf_slim.distillation.cache_records import pack_draws, pack_ids, tail_of
from hf_slim.distillation.losses import WEIGHTS, RowLoss, against_samples, against_top_k, chunks
from hf_slim.distillation.on_policy import seed_of
from hf_slim.distillation.pairs import Model, task_of, words_of
from hf_slim.distillation.sampling import draw, top
from hf_slim.distillation.teachers import LiveTeacher, Taught
from hf_slim.distillation.vocabulary import aligned, real_positions, words_digest

ROW = "teacher_row"
"""What the number of a row in the data set is called in a batch."""

_TOKENS_A_SHARD = 2**16  # 17 MB at k = 64; what a killed process loses at most


class CacheOptions(MethodConfig):
    """What a cache keeps of each token."""

    one_of = ("k", "draws")

    k: int | None = Field(None, ge=1, description="the likeliest words; 64 if neither k nor draws is given")
    draws: int | None = Field(
        None, ge=1, le=255, description="words drawn instead, as 50: unbiased, noisier, small at temperature 1"
    )
    precision: Literal["float16", "float32"] = Field("float16", description="of stored log-probabilities")
    folder: str | None = Field(None, description="where to keep it; with the run's own files if not given")

    @model_validator(mode="after")
    def _one_kind(self) -> CacheOptions:
        if self.k is not None and self.draws is not None:
            raise ValueError("k keeps the likeliest words, draws keeps random ones; give one of them")
        return self

    def kept(self) -> dict[str, Any]:
        """The options, as a key names them."""
        if self.draws is not None:
            return {"kind": "sampled", "words": self.draws, "precision": self.precision}
        return {"kind": "top_k", "words": self.k or 64, "precision": self.precision}


class WithRows(Dataset):
    """A data set whose items also tell their number."""

    def __init__(self, data: Any):
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.data[index], ROW: index}


def hand_rows_through(collate: Callable[[list[Any]], dict[str, Any]]) -> Callable[[list[Any]], dict[str, Any]]:
    """A collator that knows nothing of rows, made to leave their numbers in the batch."""

    def with_rows(items: list[dict[str, Any]]) -> dict[str, Any]:
        rows = [item[ROW] for item in items if ROW in item]
        batch = dict(collate([{name: value for name, value in item.items() if name != ROW} for item in items]))
        return batch | ({ROW: torch.tensor(rows)} if rows else {})

    return with_rows


def write_cache(
    folder: str | Path,
    teacher: Model,
    data: Any,
    options: CacheOptions | None = None,
    *,
    temperature: float = 1.0,
    tokenizer: Any = None,
    name: str | None = None,
    vocabulary: int | None = None,
    collate: Callable[[list[Any]], dict[str, Any]] = default_data_collator,
    batch_size: int = 8,
    seed: int = 0,
    around: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> TeacherCache:
    """Ask a teacher about every row of a data set; every process of a launch calls this.

    Args:
        folder: new, empty, or a cache of the same that was begun or finished.
        teacher: a causal or masked language model, a token or sequence classifier.
        data: items with "input_ids", by number.
        options: k, draws, precision; the 64 likeliest words if not given.
        temperature: that training will use.
        tokenizer: that made the data; its words become part of the key.
        name: of the teacher, such as a Hub id with its commit; a hash of all weights if not given.
        vocabulary: words of the student, if it has others than the teacher; see `vocabulary.aligned`.
        collate: makes a batch of items; it may pad, on the side that training pads on, and change no token.
        batch_size: rows in a forward pass.
        seed: of draws.
        around: makes a context for the forward pass, such as autocast.

    Raises:
        ResumeError: the folder holds a cache of something else.
        DataError: there is no data, or data that the teacher cannot read; nothing has been written.
        ModelError: the teacher predicts NaN or infinity.
    """
    found = scan(data)
    check_readable(teacher, found)
    key = CacheKey(
        **(options or CacheOptions()).kept(),
        teacher=name or weights_digest(teacher),
        tokenizer=None if tokenizer is None else words_digest(tokenizer),
        data=found.fingerprint,
        rows=len(found.checks),
        task=task_of(teacher),
        vocabulary=vocabulary or words_of(teacher),
        temperature=temperature,
        seed=seed,
        rows_a_shard=max(1, _TOKENS_A_SHARD // found.longest),
    )
    folder, state = Path(folder), processes()
    claim(folder, key, create=is_main())
    wait_for_all()
    claim(folder, key, create=False)
    live = LiveTeacher(teacher, around=around)
    with evaluating(teacher):
        for shard in range(state.process_index, key.shards, state.num_processes):
            if is_whole(folder, shard):
                continue
            rows = key.rows_of(shard)
            batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
            records = [_ask(live, data, batch, key, found.checks, collate) for batch in batches]
            write_shard(folder, shard, _joined([record for batch in records for record in batch]))
    wait_for_all()
    return TeacherCache(folder)


def weights_digest(model: nn.Module) -> str:
    """SHA-256 of the names, dtypes and bytes of all tensors of a model, in hexadecimal.

    Raises:
        PlanError: some of them are elsewhere.
    """
    digest = hashlib.sha256()
    if any(tensor.is_meta for tensor in model.state_dict().values() if isinstance(tensor, Tensor)):
        raise PlanError(
            "parts of the teacher are offloaded, so that its weights cannot tell it from others; pass name=, its Hub "
            "id and revision or another name of your choice"
        )
    for name, tensor in sorted(model.state_dict().items()):
        if isinstance(tensor, Tensor):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class CachedTeacher:
    """Answers out of a cache.

    Args:
        cache: a folder, or an opened cache.
        words: vocabulary, or number of classes, of the student.
        task: what the student predicts.
        temperature: of the training.
        tokenizer: that makes the student's batches, if it is known.
        data: the training data; it must be what the cache was made of.

    Raises:
        ArtifactError: there is no finished cache.
        PlanError: it was made for another student or temperature; says what differs.
        DataError: it was made of other data.
    """

    def __init__(
        self,
        cache: str | Path | TeacherCache,
        *,
        words: int,
        task: str,
        temperature: float,
        tokenizer: Any = None,
        data: Any = None,
    ):
        self.cache = cache if isinstance(cache, TeacherCache) else TeacherCache(cache)
        key, self.task, self.temperature = self.cache.key, task, temperature
        digest = None if tokenizer is None else words_digest(tokenizer)
        wanted = {"task": task, "temperature": temperature, "tokenizer": digest}
        problems = key.differences(wanted)
        if key.vocabulary > words:
            problems.append(f"vocabulary: the cache has {key.vocabulary} entries, the student {words}")
        if problems:
            raise PlanError(
                [f"teacher cache {self.cache.folder}: {problem}; write one for this" for problem in problems]
            )
        if data is not None:
            self._check_data(data)

    def teach(self, batch: Mapping[str, Any], progress: float = 0.0) -> Taught:
        """What the teacher has predicted for a batch, whatever the progress.

        Raises:
            DataError: the batch holds other tokens than the cache was made of.
        """
        if ROW not in batch:
            raise DataError(
                f"the batch does not say which rows it holds ({ROW}); a teacher cache serves its training data alone"
            )
        rows = batch[ROW].tolist()
        found, real = self.cache.read(rows), real_positions(batch).cpu()
        for row, ids, kept, check in zip(rows, batch["input_ids"].cpu(), real, found.checks, strict=True):
            if check_sum(ids[kept]) != check:
                raise DataError(_other_tokens(self.cache.folder, row))
        places = torch.arange(len(rows)) if self.task == "sequence" else real.flatten().nonzero().squeeze(1)
        count = len(rows) if self.task == "sequence" else real.numel()
        return Taught(self._loss(found, places, count))

    def _loss(self, found: Targets, places: Tensor, count: int) -> RowLoss:
        ids = torch.zeros(count, found.ids.shape[1], dtype=torch.long).index_copy_(0, places, found.ids)
        values = torch.zeros(count, found.ids.shape[1]).index_copy_(0, places, found.values)
        against = against_top_k if self.cache.key.kind == "top_k" else against_samples
        return against(ids, values, self.temperature)

    def _check_data(self, data: Any) -> None:
        """Refuse other data: by their number, and by a few rows now; `teach` looks at every row it is asked about."""
        require_rows(data)
        if len(data) != self.cache.key.rows:
            raise DataError(
                f"teacher cache {self.cache.folder} is of {self.cache.key.rows} rows, the data set has {len(data)}; "
                "write a cache of this data set"
            )
        few = sorted({0, len(data) // 2, len(data) - 1})
        for row, check in zip(few, self.cache.read(few).checks, strict=True):
            if check_sum(tokens_of(data[row], row)) != check:
                raise DataError(_other_tokens(self.cache.folder, row))


def _ask(
    live: LiveTeacher, data: Any, rows: Sequence[int], key: CacheKey, checks: list[int], collate: Callable[..., Any]
) -> Iterator[dict[str, Tensor]]:
    """Records of some rows, one a row."""
    items = [{name: value for name, value in data[row].items() if name != WEIGHTS} for row in rows]
    inputs = dict(collate(items))
    real = real_positions(inputs)
    for row, ids, kept in zip(rows, inputs["input_ids"], real, strict=True):
        if check_sum(ids[kept]) != checks[row]:
            raise DataError(f"the collator changes the tokens of row {row}; a cache needs one that only pads")
    device = device_of(live.model)
    features = {name: value.to(device) for name, value in inputs.items() if name not in ("labels", "shift_labels", ROW)}
    predicted = live.teach(features)
    assert predicted.rows is not None
    numbers = torch.arange(real.numel()).view(real.shape)
    for place, row in enumerate(rows):
        positions = torch.tensor([place]) if key.task == "sequence" else numbers[place][real[place]]
        yield _record(predicted.rows, positions, row, key) | {
            "lengths": torch.tensor([len(positions)]),
            "checks": torch.tensor([checks[row]]),
        }


def _record(logits_of: Callable[[Tensor], Tensor], positions: Tensor, row: int, key: CacheKey) -> dict[str, Tensor]:
    """What is kept of one row, packed."""
    generator = torch.Generator().manual_seed(seed_of(key.seed, row))  # the same draws however rows are shared out
    kept, everything = [], torch.ones(len(positions), dtype=torch.bool)
    for part in chunks(everything, key.vocabulary):
        logits = aligned(logits_of(positions[part]).cpu(), key.vocabulary)
        if (logits.isnan() | (logits == torch.inf)).any() or (logits == -torch.inf).all(-1).any():
            raise ModelError(
                f"the teacher's logits hold NaN or infinite values in row {row} of the data set; load the teacher in "
                "bfloat16 or float32, or check that its weights are finite"
            )
        if key.kind == "top_k":
            kept.append(top(logits, min(key.words, key.vocabulary), key.temperature))
        else:
            kept.append(draw(logits, key.words, key.temperature, generator=generator))
    ids, values = (torch.cat(parts) for parts in zip(*kept, strict=True))
    if key.kind == "sampled":
        begins, packed = pack_draws(ids, key.vocabulary)
        return {"begins": begins, "ids": packed}
    dtype = getattr(torch, key.precision)
    return {"ids": pack_ids(ids, key.vocabulary), "log_p": values.to(dtype), "tail": tail_of(values).to(dtype)}


def _joined(records: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([record[name] for record in records]) for name in records[0]}


def _other_tokens(folder: Path, row: int) -> str:
    return (
        f"row {row} of the data set is not what teacher cache {folder} was made of; use the same data in the same "
        "order and a collator that only pads, or write a cache of this data"
    )
