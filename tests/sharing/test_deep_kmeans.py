"""Deep k-Means: its penalties against Autograd, and trainings that end as they are stored."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
import training
from reference import deep_kmeans as oracle
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer

import hf_slim
from hf_slim import DistillationConfig, DistillationTrainer, GradualMagnitudePruning
from hf_slim.core.errors import ModelError, PlanError
from hf_slim.core.select import find_layers
from hf_slim.core.stage import make_stage
from hf_slim.core.swap import get_weight
from hf_slim.encodings import Codebook
from hf_slim.encodings.modules import EncodedModule
from hf_slim.plan import plan_stage
from hf_slim.sharing.deep_kmeans import Config, DeepKMeans, directions, outside, vectors
from hf_slim.sharing.members import Members
from hf_slim.sharing.vectors import cluster_vectors

SHARED = Path(__file__).parents[3] / "shared"
STORIES, TEXT = SHARED / "models" / "stories260K", SHARED / "data" / "tinystories"
OPTIONS = {"bits": 2, "scope": "tensor", "refresh": 2, "finetune": 0.5}
RUNS = {"bits": 1, "dim": 8, "scope": "tensor", "refresh": 2, "finetune": 0.5}


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make(folder, callbacks, cls=Trainer, model=None, **options):
    teacher = {} if cls is Trainer else {"teacher": tiny.llama(seed=1)}
    given = {"max_steps": 4, "optim": "adamw_torch", "learning_rate": 3e-3, **options}
    return cls(
        model=tiny.llama() if model is None else model,
        args=training.arguments(folder, DistillationConfig, **given),
        train_dataset=training.rows(samples=16),
        data_collator=training.Pad(),
        callbacks=list(callbacks),
        **teacher,
    )


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(tiny.ids()).logits


# penalties


@pytest.mark.parametrize(("n", "s", "clusters"), [(30, 7, 3), (6, 20, 4), (9, 9, 2), (12, 5, 5), (4, 10, 6)])
def test_the_relaxed_gradient_is_autograds(n, s, clusters):
    X = drawn(n, s).requires_grad_()
    penalty = oracle.relaxed(X.T, min(clusters, n))
    (slope,) = torch.autograd.grad(penalty, X)
    rest = outside(X.detach(), directions(X.detach(), clusters).double())
    assert torch.allclose(rest, slope, atol=1e-5)
    assert rest.square().sum().item() / 2 == pytest.approx(penalty.item(), abs=1e-5)


def test_the_relaxed_penalty_is_the_energy_of_the_smaller_singular_values():
    X = drawn(40, 12)
    tail = torch.linalg.svdvals(X)[3:].square().sum()
    assert outside(X, directions(X, 3).double()).square().sum().item() == pytest.approx(tail.item(), rel=1e-5)


def test_the_relaxed_penalty_is_zero_for_vectors_in_so_many_directions_and_for_no_others():
    inside, more = drawn(50, 3) @ drawn(3, 16, seed=1), drawn(50, 4) @ drawn(4, 16, seed=1)
    assert outside(inside, directions(inside, 3).double()).abs().max() < 1e-5
    assert outside(more, directions(more, 3).double()).abs().max() > 1e-2


@pytest.mark.parametrize(("dim", "clusters"), [(1, 2), (1, 16), (4, 4), (4, 16), (8, 256)])
def test_the_relaxed_penalty_of_short_vectors_is_zero_whatever_they_are(dim, clusters):
    X = vectors(drawn(24, 40), dim)
    assert outside(X, directions(X, clusters).double()).abs().max() < 1e-5


def test_a_relaxed_penalty_that_is_zero_is_refused():
    with pytest.raises(PlanError, match="4 directions hold all vectors of dim: 4"):
        DeepKMeans(penalty="relaxed", bits=2, dim=4)
    assert not Config(bits=2, dim=4).relaxed
    assert Config(bits=1, dim=4).relaxed
    assert not Config(bits=1, dim=4, penalty="hard").relaxed


def test_the_hard_gradient_is_autograds(tmp_path):
    sharing = DeepKMeans(**OPTIONS)
    make(tmp_path, [sharing], max_steps=2, learning_rate=0.0).train()
    pulled = sharing._pulled[0]
    pulled.module.weight.data.copy_(drawn(*pulled.weight.shape))  # pyright: ignore
    pulled.refresh()
    _, tensors = pulled.solve()
    x = pulled.weight.double().reshape(-1, 1).requires_grad_()
    table = tensors["centroids"].double().reshape(-1, 1)
    nearest = (x - table.T).abs().argmin(1)
    (slope,) = torch.autograd.grad(oracle.hard(x, table, nearest), x)
    assert torch.allclose(pulled.rest().double().reshape(-1, 1), slope, atol=1e-6)


# vectors and members


def test_few_vectors_are_reproduced_and_many_are_near_their_centroids():
    few = drawn(5, 6).half().float()[torch.arange(40) % 5]
    codes, centroids = cluster_vectors(few, 8)
    assert torch.equal(centroids[codes.long()].float(), few)
    blobs = (10 * drawn(4, 6))[torch.arange(80) % 4] + 0.1 * drawn(80, 6, seed=1)
    codes, centroids = cluster_vectors(blobs.float(), 4)
    assert torch.equal(codes, codes[:4].repeat(20))
    assert (centroids[codes.long()] - blobs).square().mean() < 0.02


def test_members_share_gradients_and_steps():
    W = torch.tensor([[1.0, 1.0, 2.0, 2.0], [0.0, 2.0, 1.0, 0.0]])
    stored = Codebook(bits=2, clusters=3)
    members = Members(stored, stored.pack((W.to(torch.uint8)), torch.tensor([[0.0, 1.0, 2.0]])), 2, 4)
    gradient = torch.tensor([[3.0, 0.0, 1.0, 1.0], [5.0, 4.0, 0.0, 5.0]])
    members.before_step(W, gradient)
    assert gradient.tolist() == [[1.0, 1.0, 2.0, 2.0], [0.0, 2.0, 1.0, 0.0]]
    W += torch.tensor([[0.5, 0.25, 0.0, 0.0], [9.0, 0.75, 0.0, 9.0]])
    members.after_step(W)
    assert W.tolist() == [[1.25, 1.25, 2.25, 2.25], [0.0, 2.25, 1.25, 0.0]]
    members.before_step(W, torch.zeros(2, 4))
    W -= 1e-4  # less than float16 can tell beside 1 and 2
    members.after_step(W)
    assert W[0].tolist() == [1.25, 1.25, 2.25, 2.25]
    assert torch.allclose(members.centroids, torch.tensor([[0.0, 1.2499, 2.2499]]))


# trainings


@pytest.mark.parametrize("options", [OPTIONS, RUNS], ids=["hard", "relaxed"])
def test_a_resumed_training_is_the_straight_one_and_what_is_stored_was_trained(options, tmp_path):
    sharing = DeepKMeans(**options)
    saving = {"save_strategy": "steps", "save_steps": 1, "max_steps": 4}
    trainer = make(tmp_path, [sharing], **saving)
    trainer.train()
    straight, model = training.weights(trainer.model), trainer.model
    for step in (1, 3):  # before and after weights share values
        again = make(tmp_path, [DeepKMeans(**options)], **saving)
        again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert torch.equal(training.weights(again.model), straight)
    trained = logits(model)
    assert len(sharing.store(model)) == 14
    assert torch.allclose(logits(model), trained, atol=1e-4)
    model.save_pretrained(tmp_path / "stored")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "stored")
    assert torch.allclose(logits(loaded), trained, atol=1e-4)
    layer = loaded.model.layers[0].mlp.down_proj
    assert layer.encoding.dim == options.get("dim", 1)


def test_accumulated_batches_are_one_batch(tmp_path):
    found = []
    for steps in (1, 4):
        options = {"per_device_train_batch_size": 8 // steps, "gradient_accumulation_steps": steps}
        trainer = make(tmp_path, [DeepKMeans(**OPTIONS)], optim="sgd", learning_rate=0.1, **options)
        trainer.train()
        found.append(training.weights(trainer.model))
    assert training.relative(*found) < 1e-4


def test_the_penalty_draws_weights_to_centroids(tmp_path):
    found = []
    for strength in (1e-6, 2.0):
        sharing = DeepKMeans(OPTIONS, strength=strength, warmup=0.0, finetune=0.0)
        make(tmp_path, [sharing], max_steps=12).train()
        found.append(sharing.distances)
    assert found[0][0] == found[1][0]
    assert found[1][-1] < 0.9 * found[0][-1]


def test_sharing_forgets_what_adam_knew_of_single_weights(tmp_path):
    sharing = DeepKMeans(OPTIONS)
    trainer = make(tmp_path, [sharing], max_steps=4)
    trainer.train()
    state = trainer.optimizer.state
    assert {int(state[pulled.module.weight]["step"]) for pulled in sharing._pulled} == {2}
    assert int(state[trainer.model.model.norm.weight]["step"]) == 4


@pytest.mark.skipif(not STORIES.is_dir(), reason="no trained model in ../shared/models/stories260K")
def test_it_beats_training_first_and_k_means_afterwards(tmp_path):
    tokenizer, text = AutoTokenizer.from_pretrained(STORIES), (TEXT / "train.txt").read_text()[:90_000]
    ids = torch.tensor(tokenizer(text)["input_ids"])[: 240 * 64].view(-1, 64)
    seen, unseen = [{"input_ids": row, "labels": row} for row in ids[:192]], ids[192:]
    losses = {}
    for name, callbacks in {"rival": [], "ours": [DeepKMeans(bits=3, scope="tensor", refresh=8, finetune=0.5)]}.items():
        trainer = Trainer(
            AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float32),
            training.arguments(
                tmp_path, max_steps=32, per_device_train_batch_size=6, optim="adamw_torch", learning_rate=1e-3
            ),
            train_dataset=seen,
            callbacks=callbacks,
        )
        trainer.train()
        model = trainer.model.eval()
        if callbacks:
            callbacks[0].store(model)
        else:
            hf_slim.compress(model, "share.kmeans", bits=3, scope="tensor")
        with torch.no_grad():
            losses[name] = model(input_ids=unseen, labels=unseen).loss.item()
    assert losses["ours"] < losses["rival"] - 0.1, losses


def test_pruned_weights_stay_zero(tmp_path):
    sharing, pruning = DeepKMeans(OPTIONS), GradualMagnitudePruning(sparsity=0.6, end=0.5, every=1)
    trainer = make(tmp_path, [pruning, sharing], DistillationTrainer, weight_decay=0.1, max_steps=6)
    trainer.train()
    model, masks = trainer.model, pruning.masks
    trained = logits(model)
    pruning.store(model)
    sharing.store(model)
    assert len(masks) == 14
    for name, keep in masks.items():
        W = get_weight(model.get_submodule(name))
        assert (~keep).sum() >= 0.55 * keep.numel()
        assert not W[~keep].any()
        assert len(W.unique()) <= 5
    assert torch.allclose(logits(model), trained, atol=1e-4)


def test_it_happens_during_distillation():
    model, original = tiny.llama(), tiny.llama()
    during = [{"prune.gradual": {"sparsity": 0.5}}, {"share.deep_kmeans": {"bits": 2, "refresh": 1}}]
    report = hf_slim.compress(
        model, "distill.logits", data=tiny.ids(8), original=original, steps=4, batch_size=2, during=during
    )
    stored = [m for m in model.modules() if isinstance(m, EncodedModule)]
    assert len(stored) == 14
    assert all(isinstance(m.encoding, Codebook) for m in stored)
    assert len(report.layers) == 14


# bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 9}, "share.deep_kmeans.bits"),
        ({"strenght": 1}, "did you mean 'strength'"),
        ({"dim": 0}, "share.deep_kmeans.dim"),
        ({"finetune": 1.0}, "share.deep_kmeans.finetune"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(PlanError, match=message):
        DeepKMeans(options)


def test_weights_that_cannot_be_shared_are_refused(tmp_path):
    frozen = tiny.llama().requires_grad_(False)
    frozen.lm_head.weight.requires_grad_(True)
    with pytest.raises(PlanError, match="14 layers are frozen, such as model"):
        make(tmp_path, [DeepKMeans()], model=frozen).train()
    pruned = tiny.llama()
    hf_slim.compress(pruned, "prune.magnitude")
    with pytest.raises(PlanError, match="q_proj is pruned, and its zeros would be parts of shared vectors"):
        plan_stage(find_layers(pruned), make_stage("share.deep_kmeans", {"dim": 4}), pruned)


def test_a_model_that_diverged_is_named(tmp_path):
    trainer = make(tmp_path, [DeepKMeans(OPTIONS)], max_steps=1)
    trainer.model.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.inf
    with pytest.raises(ModelError, match="up_proj: the weight holds NaN or infinite values"):
        trainer.train()
