"""Blocks that are computed again in the backward pass: the same bits, and less memory."""

from __future__ import annotations

import weakref

import pytest
import torch
from small import small_dit
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from atat_fast.distributed.wrap import compile_blocks, recompute_blocks
from atat_fast.models import DiT
from atat_fast.models.dit import Randomness
from atat_fast.ops import documents_of

OPTIONS = [
    {}, {"time_conditioning": True}, {"qk_norm": True, "activation": "relu2", "tie_embeddings": True}, {"dropout": 0.0},
    {"document_mask": True},
]  # fmt: skip


def build(every, **options):
    model = small_dit(19, scale=0.1, seed=1, **{"dim": 32, "layers": 4, "length": 16, "dropout": 0.2} | options)
    recompute_blocks(model, every)
    return model


def step(model, *, dtype=torch.float32, forward=None):
    """The loss and every gradient of one batch."""
    torch.manual_seed(2)
    tokens, share = torch.randint(0, 18, (3, 16)), torch.tensor([0.2, 0.5, 0.9])
    documents = documents_of(tokens, 5) if model.config.document_mask else None
    rows = torch.tensor([0, 3, 4, 20, 21, 40, 47])
    noisy, target = tokens.flatten().index_fill(0, rows, 18).view(3, 16), tokens.flatten()[rows]
    randomness = Randomness(7, torch.tensor(3), torch.arange(3))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype is torch.bfloat16):
        loss, _ = (model if forward is None else forward)(noisy, rows, target, torch.ones(7), share, randomness, documents)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_and_gradients_are_the_same_bits(options, dtype):
    loss, gradients = step(build(0, **options), dtype=dtype)
    for every in (1, 2, 3):
        again, other = step(build(every, **options), dtype=dtype)
        assert torch.equal(loss, again)
        for name, gradient in gradients.items():
            same = other[name] is None if gradient is None else torch.equal(gradient, other[name])
            assert same, (every, name)


def test_every_n_th_block_is_run_again_and_no_other_and_in_an_evaluation_none():
    for every, again in ((0, []), (1, [0, 1, 2, 3]), (2, [1, 3]), (3, [2]), (9, [])):
        model, runs = build(every), []
        for i, block in enumerate(model.blocks):
            block.run = lambda *arguments, i=i, plain=block.run, runs=runs: runs.append(i) or plain(*arguments)
        step(model)
        assert runs[:4] == [0, 1, 2, 3] and sorted(runs[4:]) == again
        runs.clear()
        with torch.no_grad():
            model.features(torch.zeros(1, 16, dtype=torch.int64))
        assert runs == [0, 1, 2, 3]


class Peak(TorchDispatchMode):
    """The most bytes that tensors made within have held at once, by their storages' lives."""

    def __init__(self):
        super().__init__()
        self.now, self.most, self.alive = 0, 0, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and (key := (storage := t.untyped_storage())._cdata) not in self.alive:
                self.alive[key] = storage.nbytes()
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._gone, key)
        return out

    def _gone(self, key):
        self.now -= self.alive.pop(key, 0)


def test_peak_memory_falls():
    """Of a step whose activations are most of what it holds."""
    most = {}
    for every in (0, 2, 1):
        torch.manual_seed(0)
        model = DiT(19, 18, dim=64, layers=8, heads=2, length=64, conditioning_dim=8, dropout=0.1)
        recompute_blocks(model, every)
        tokens, rows = torch.randint(0, 18, (16, 64)), torch.arange(0, 1024, 2)
        with Peak() as peak:
            loss, _ = model(tokens, rows, tokens.flatten()[rows], torch.ones(512), None, Randomness(1, 0, torch.arange(16)))
            loss.backward()
        most[every] = peak.most
        del loss
    assert most[1] < 0.45 * most[0] and most[1] < most[2] < 0.8 * most[0]


@pytest.mark.slow
def test_it_compiles_as_a_block_and_as_a_whole():
    """The whole to generated code, which takes half a minute, and blocks to graphs."""
    options = {"time_conditioning": True, "layers": 2}
    loss, gradients = step(build(0, **options))
    whole, parts = build(2, **options), build(1, **options)
    compile_blocks(parts, backend="aot_eager_decomp_partition")
    for compiled, others in (step(whole, forward=torch.compile(whole, fullgraph=True)), step(parts)):
        torch.testing.assert_close(compiled, loss, rtol=1e-5, atol=1e-6)
        for name, gradient in gradients.items():
            if gradient is not None:
                torch.testing.assert_close(others[name], gradient, rtol=1e-3, atol=1e-5, msg=name)
