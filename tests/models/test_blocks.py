"""Models of blocks: what a block sees, its cache, and the ends K = 1 and K = L."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from small import small_dit

from atat_fast.errors import UsageError
from atat_fast.models import DiT
from atat_fast.models.blocks import two_streams

MASK = 10
SIZES = {"length": 12, "dim": 16, "heads": 2, "layers": 3}


def model_of(block, **changes):
    return small_dit(11, MASK, **SIZES | {"block": block} | changes).double().eval()


def noised(batch=3, length=12, share=0.5):
    clean = torch.randint(0, MASK, (batch, length))
    hidden = torch.rand(batch, length) < share
    return clean, torch.where(hidden, MASK, clean), hidden


def logits(model, noisy, clean):
    return model.logits(model.features(noisy, clean=clean)).view(*noisy.shape, -1)[..., :MASK]


@pytest.mark.parametrize("block", [1, 2, 3, 4, 6])
def test_a_block_sees_itself_and_finished_blocks_and_nothing_else(block):
    model, (clean, noisy, _) = model_of(block), noised()
    want = logits(model, noisy, clean)
    for b in range(12 // block):
        here, before, after = slice(b * block, (b + 1) * block), slice(0, b * block), slice((b + 1) * block, 12)
        other, text = noisy.clone(), clean.clone()
        other[:, before] = other[:, after] = MASK  # other noised blocks
        text[:, after] = (text[:, after] + 1) % MASK
        text[:, here] = (text[:, here] + 1) % MASK  # and its own clean tokens, which are the answer
        torch.testing.assert_close(logits(model, other, text)[:, here], want[:, here])
        for tokens, part in ((noisy, here), (clean, before)):
            if part.start == part.stop:
                continue
            turned = tokens.clone()
            turned[:, part.start] = (turned[:, part.start] + 1) % MASK
            found = logits(model, *((turned, clean) if tokens is noisy else (noisy, turned)))
            assert not torch.allclose(found[:, here], want[:, here])


@pytest.mark.parametrize("block", [1, 3, 4, 6])
@pytest.mark.parametrize("changes", [{}, {"qk_norm": True, "activation": "relu2", "tie_embeddings": True}])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_cached_logits_are_those_of_the_whole_pass(block, changes, dtype):
    model, (clean, noisy, _) = model_of(block, **changes).to(dtype), noised()
    want, cache = logits(model, noisy, clean), model.cache(3)
    with torch.no_grad():
        for start in range(0, 12, block):
            here = slice(start, start + block)
            got = cache.logits(cache.features(noisy[:, here])).view(3, block, -1)[..., :MASK]
            torch.testing.assert_close(got, want[:, here], rtol=1e-5, atol=1e-5)
            rows = torch.tensor([0, block * 3 - 1, block])
            picked = cache.logits(cache.features(noisy[:, here], rows=rows))[:, :MASK]
            torch.testing.assert_close(picked, got.flatten(0, 1)[rows], rtol=1e-5, atol=1e-5)
            cache.append(clean[:, here])
            if start == block:  # a text is done, and leaves
                cache.keep(torch.tensor([2, 0]))
                clean, noisy, want = clean[[2, 0]], noisy[[2, 0]], want[[2, 0]]
                cache.keep(torch.tensor([0, 1, 1]))
                clean, noisy, want = clean[[0, 1, 1]], noisy[[0, 1, 1]], want[[0, 1, 1]]


def test_one_block_is_the_model_without_blocks():
    plain, whole, (clean, noisy, _) = model_of(0), model_of(12), noised()
    whole.load_state_dict(plain.state_dict())
    assert torch.equal(logits(whole, noisy, clean), plain.logits(plain.features(noisy)).view(3, 12, -1)[..., :MASK])


def test_a_block_of_one_is_the_chain_rule():
    """-log p of each token from a mask after those before it: one pass for all of them, or one text at a time."""
    model, (clean, _, _) = model_of(1), noised()
    everything = torch.full_like(clean, MASK)
    rows = torch.arange(36)
    nll = model.nll(everything, rows, clean.flatten()).view(3, 12)
    with torch.no_grad():
        for b in range(3):
            cache, total = model.cache(1), 0.0
            for i in range(12):
                p = torch.log_softmax(cache.logits(cache.features(torch.tensor([[MASK]]))).double(), -1)
                total -= float(p[0, clean[b, i]])
                cache.append(clean[b : b + 1, i : i + 1])
            assert total == pytest.approx(float(nll[b].sum()), rel=1e-5)


def test_the_loss_and_its_gradient_by_hand():
    """The text behind the noise is put together from the hidden tokens' ids, padding rows or not."""
    model, (clean, noisy, hidden) = model_of(4), noised()
    rows = hidden.flatten().nonzero()[:, 0]
    weights = torch.rand(len(rows))
    want = (
        weights * F.cross_entropy(logits(model, noisy, clean).flatten(0, 1)[rows], clean.flatten()[rows], reduction="none")
    ).sum()
    got, nll = model(noisy, rows, clean.flatten()[rows], weights)
    torch.testing.assert_close(got.to(want.dtype), want, rtol=1e-5, atol=1e-5)
    padded = F.pad(rows, (0, 3))
    same, _ = model(noisy, padded, clean.flatten()[padded], F.pad(weights, (0, 3)))
    torch.testing.assert_close(same, got)
    for a, b in zip(
        torch.autograd.grad(got, [*model.parameters()]), torch.autograd.grad(want, [*model.parameters()]), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert len(nll) == len(rows)


@pytest.mark.slow
def test_it_compiles_into_one_graph():
    model, (clean, noisy, hidden) = model_of(4).float(), noised()
    rows = hidden.flatten().nonzero()[:, 0]
    arguments = (noisy, rows, clean.flatten()[rows], torch.ones(len(rows)))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments)[0], model(*arguments)[0])


def test_two_streams_are_a_rule_of_few_words():
    sees = two_streams(4, 2, torch.device("cpu"))[0, 0]
    #        noised      clean
    want = [
        "11000000", "11000000", "00111100", "00111100",
        "00001100", "00001100", "00001111", "00001111",
    ]  # fmt: skip
    assert ["".join(str(int(v)) for v in row) for row in sees] == want


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_computes_the_same(monkeypatch):
    model, (clean, noisy, _) = model_of(4, qk_norm=True, dim=32).float(), noised()
    with torch.no_grad():
        want = logits(model, noisy, clean)
        monkeypatch.setenv("ATAT_FAST_BLOCK_ATTENTION", "flex")
        torch.testing.assert_close(logits(model, noisy, clean), want, rtol=1e-4, atol=1e-4)
        monkeypatch.setenv("ATAT_FAST_BLOCK_ATTENTION", "flx")
        with pytest.raises(UsageError, match="ATAT_FAST_BLOCK_ATTENTION is 'flx'; it is flex, for FlexAttention, or mask"):
            logits(model, noisy, clean)


def test_a_window_of_the_newest_blocks_and_positions_that_go_on():
    """Beyond its length a text is given on, as attention to the last L - K finished tokens, at their own places."""
    model = model_of(4)
    text = torch.randint(0, MASK, (2, 40))
    cache = model.cache(2)
    with torch.no_grad():
        for start in range(0, 40, 4):
            assert cache.filled == min(start, 8) and cache.start == start
            out = cache.logits(cache.features(torch.full((2, 4), MASK)))
            assert out[:, :MASK].isfinite().all()
            cache.append(text[:, start : start + 4])
    longer = model_of(4, length=40)
    longer.load_state_dict(model.state_dict())
    mine, theirs = model.cache(2), longer.cache(2)
    theirs.longest = mine.longest
    with torch.no_grad():
        for start in range(0, 40, 4):  # a longer model's tables have the same places
            assert torch.equal(*(c.features(torch.full((2, 4), MASK)) for c in (mine, theirs)))
            for c in (mine, theirs):
                c.append(text[:, start : start + 4])


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"block": 5}, "model.block 5 does not divide model.length 12; try 4, or 0 for no blocks"),
        ({"block": 13}, "model.block 13 does not divide model.length 12; try 12"),
        ({"block": -1}, "model.block -1 does not divide model.length 12; try 1"),
        ({"block": 4, "time_conditioning": True}, "model.time_conditioning is not made for blocks"),
        ({"block": 4, "document_mask": True}, "model.document_mask is not made for blocks"),
    ],
)
def test_what_is_refused(settings, sentence):
    with pytest.raises(UsageError, match=sentence):
        DiT(11, MASK, **SIZES | settings)


def test_what_a_model_cannot_do_is_a_sentence():
    with pytest.raises(
        UsageError, match=r"a cache of finished blocks needs a model trained with model\.block, and this one has none"
    ):
        model_of(0).cache(1)
    with pytest.raises(
        UsageError, match="this model predicts 4 tokens from the finished ones before them, and 12 are given at once"
    ):
        model_of(4).features(torch.full((1, 12), MASK))
    with pytest.raises(ValueError, match="the cache holds 2 sequences, and 3 are given"):
        model_of(4).cache(2).features(torch.full((3, 4), MASK))
    assert model_of(4).features(torch.full((1, 4), MASK)).shape == (4, 16)  # the first block has nothing before it
