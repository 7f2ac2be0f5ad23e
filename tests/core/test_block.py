"""What the walk offers beyond Hessians: the block itself, dense outputs, layers in order, weighted tokens."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch import Tensor
from torch.nn import functional as F

import hf_slim
from hf_slim.core import capture
from hf_slim.core.context import Context
from hf_slim.core.errors import ModelError
from hf_slim.core.layers import targets
from hf_slim.core.progress import Progress
from hf_slim.core.saliency import token_weights
from hf_slim.core.select import find_layers, find_stacks
from hf_slim.core.swap import get_weight
from hf_slim.core.walk import Solution, walk
from hf_slim.quantization import gptq, rtn

IDS = tiny.ids(6, 16)
each_architecture = pytest.mark.parametrize("architecture", tiny.ALL)


@pytest.fixture(autouse=True)
def _two_batches(monkeypatch):
    monkeypatch.setattr(capture, "BATCH_TOKENS", 48)


def block_outputs(model) -> list[list[Tensor]]:
    """Every block's output for every batch, by plain hooks on the whole model."""
    (stack,) = find_stacks(model)
    seen: dict[str, list[Tensor]] = {name: [] for name in stack.blocks}

    def hook(name):
        return lambda module, args, out: seen[name].append(out[0] if isinstance(out, tuple) else out)

    handles = [model.get_submodule(name).register_forward_hook(hook(name)) for name in stack.blocks]
    with torch.no_grad():
        for batch in IDS.split(3):
            model(input_ids=batch)
    for handle in handles:
        handle.remove()
    return list(seen.values())


def round_all(model, layers, config, known):
    return {n: Solution(rtn.encode(get_weight(model.get_submodule(n)), layers[n], config, None), {}) for n in known}


@each_architecture
def test_targets_are_the_dense_models_and_runs_the_compressed_ones(architecture):
    model, config = tiny.ALL[architecture](), rtn.Config(bits=2)
    dense = block_outputs(model)
    chosen = {layer.name: layer for layer in targets(find_layers(model), rtn, config)}
    ran: list[str] = []

    def solve(known, block):
        number = len(ran)
        assert len(block) == 2
        for i in range(2):
            torch.testing.assert_close(block.target(i), dense[number][i])
            now = block_outputs(model)
            torch.testing.assert_close(block.run(i), now[number][i])
            if number > 0:
                torch.testing.assert_close(block.inputs(i), now[number - 1][i])
        ran.append(block.name)
        return round_all(model, chosen, config, known)

    before = [t.clone() for t in dense[-1]]
    walk(model, list(chosen.values()), IDS, solve, Context(), reference=True)
    assert len(ran) == 2
    after = block_outputs(model)
    assert (after[-1][0] - before[0]).norm() > 0.01 * before[0].norm()  # else the above could not tell them apart


def test_a_block_runs_with_other_parameters_and_gives_their_gradients():
    model, checked = tiny.llama(), []
    chosen = targets(find_layers(model), rtn, rtn.Config())

    def solve(known, block):
        name = "mlp.down_proj.weight"
        W = block.module.get_parameter(name).detach()
        with torch.enable_grad():
            moving = W.clone().requires_grad_()
            loss = block.run(0, {name: moving}).square().sum()
        (gradient,) = torch.autograd.grad(loss, moving)
        torch.testing.assert_close(block.run(0, {name: 2 * W}), _doubled(block, name))
        step = 1e-3 * torch.randn(W.shape, generator=torch.Generator().manual_seed(0))
        change = block.run(0, {name: W + step}).square().sum() - block.run(0, {name: W - step}).square().sum()
        torch.testing.assert_close(change / 2, (gradient * step).sum(), rtol=0.02, atol=1e-3)
        checked.append(name)
        return {}

    walk(model, chosen, IDS, solve, Context(), hessians=False)
    assert len(checked) == 2


def _doubled(block, name):
    parameter = block.module.get_parameter(name)
    parameter.data.mul_(2)
    out = block.run(0)
    parameter.data.div_(2)
    return out


def test_parameters_that_stay_dense_are_restored_with_their_block(tmp_path):
    def run(model, solve):
        chosen = targets(find_layers(model), rtn, rtn.Config(bits=4))
        return walk(model, chosen, IDS, solve, Context(blocks=tmp_path))

    first, second = tiny.llama(), tiny.llama()
    config, layers = rtn.Config(bits=4), find_layers(first)

    def solve(known, block):
        norm = "input_layernorm.weight"
        block.put(norm, block.module.get_parameter(norm) * 3)
        return round_all(first, layers, config, known)

    def never(known, block):
        raise AssertionError("a kept block must not be solved again")

    assert run(first, solve) == run(second, never)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name
    assert first.model.layers[0].input_layernorm.weight[0] == 3


@each_architecture
def test_in_order_each_layer_sees_the_compressed_ones_before_it(architecture):
    """Oracle: quantize the group, then hook the next group's inputs in the half-quantized model."""
    model, config = tiny.ALL[architecture](), rtn.Config(bits=2)
    layers = find_layers(model)
    chosen = targets(layers, rtn, config)
    solved: list[str] = []

    def solve(known, block):
        for name, found in known.items():
            inputs: list[Tensor] = []
            keep = inputs.append
            handle = model.get_submodule(name).register_forward_pre_hook(lambda m, args, keep=keep: keep(args[0]))
            with torch.no_grad():
                for batch in IDS.split(3):
                    model(input_ids=batch)
            handle.remove()
            x = torch.cat([x.reshape(-1, x.shape[-1]) for x in inputs]).double()
            torch.testing.assert_close(found.hessian.double(), 2 * x.T @ x / len(x), rtol=1e-4, atol=1e-4)
        assert len({id(found.hessian) for found in known.values()}) == 1, "layers with one input come together"
        solved.extend(known)
        return round_all(model, layers, config, known)

    walk(model, chosen, IDS, solve, Context(), sequential=True)
    assert sorted(solved) == sorted(layer.name for layer in chosen)
    if architecture == "llama":
        assert [name.rpartition(".")[2] for name in solved[:7]] == [
            *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
        ]


@pytest.mark.parametrize("groups", [1, 3])
def test_weighted_hessians_are_those_of_squared_gradients(groups):
    """Oracle: gradients of the loss from the layers' outputs, one window at a time, all in one graph."""
    model = tiny.llama()
    names = [layer.name for layer in targets(find_layers(model), rtn, rtn.Config())]
    found: dict[str, Tensor] = {}

    def solve(known, block):
        found.update({name: statistics.guided for name, statistics in known.items()})
        return {}

    weights = token_weights(model, names, IDS, groups, Progress())
    walk(model, [find_layers(model)[n] for n in names], IDS, solve, Context(), weights=weights)
    assert all(parameter.requires_grad for parameter in model.parameters())
    for name in names:
        inputs, outputs = [], []

        def hook(module, args, out, inputs=inputs, outputs=outputs):
            inputs.append(args[0].detach())
            outputs.append(out)

        handle = model.get_submodule(name).register_forward_hook(hook)
        losses = [F.cross_entropy(model(input_ids=ids[None]).logits[0, :-1], ids[1:]) for ids in IDS]
        handle.remove()
        squares = torch.cat([g[0] for g in torch.autograd.grad(sum(losses), outputs)]).double().square()
        x = torch.cat([x[0] for x in inputs]).double()
        s = torch.stack([part.mean(1) for part in squares.tensor_split(groups, dim=1)], dim=1)
        s = s / s.mean(0)
        expected = torch.stack([2 / len(x) * (x * s[:, k : k + 1]).T @ x for k in range(groups)])
        torch.testing.assert_close(found[name].double(), expected, rtol=1e-3, atol=1e-4)


def test_tokens_of_an_encoder_cannot_be_weighted():
    with pytest.raises(ModelError, match="causal"):
        hf_slim.compress(tiny.bert(), "quantize.gptq", data=IDS, guided=1, group_size=8)


@pytest.mark.parametrize("option", [{"true_sequential": True}, {"guided": 1}, {"guided": 4}], ids=str)
def test_gptq_options_choose_other_codes_and_do_no_harm(option):
    """What each is fed is held to an oracle above; on a random model neither has to gain."""
    plain, other = tiny.llama(), tiny.llama()
    dense = tiny.llama()
    for model, options in ((plain, {}), (other, option)):
        hf_slim.compress(model, "quantize.gptq", data=IDS, bits=3, group_size=8, **options)
    codes = {n: t for n, t in plain.state_dict().items() if n.endswith("codes")}
    assert any(not torch.equal(other.state_dict()[n], t) for n, t in codes.items())
    with torch.no_grad():
        losses = [(m(input_ids=IDS).logits - dense(input_ids=IDS).logits).square().mean() for m in (plain, other)]
    assert losses[1] < 1.3 * losses[0]


def test_row_runs_with_their_own_hessian_are_solved_apart():
    W = torch.randn(12, 16, generator=torch.Generator().manual_seed(0))
    x = torch.randn(2, 64, 16, generator=torch.Generator().manual_seed(1))
    H = torch.stack([part.T @ part for part in x])
    known = gptq.Statistics(H.mean(0), 64, H)
    config = gptq.Config(bits=3, group_size=8, damping=0.01)
    codes, *_ = gptq._quantize_rows(W, known, None, config)
    for k, rows in enumerate((slice(0, 6), slice(6, 12))):
        alone, *_ = gptq.quantize(W[rows], H[k], 3, 8, False, "mse", 0.01, True)
        assert torch.equal(codes[rows], alone)
