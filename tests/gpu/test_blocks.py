"""Block diffusion on a GPU: attention by mask and by FlexAttention, and the cache."""

from __future__ import annotations

import pytest
import torch
from small import small_dit

from atat_fast.sampling.samplers import sample

MASK = 10


def model_of(device):
    return small_dit(11, MASK, length=64, dim=32, heads=2, layers=2, block=16).to(device)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_flex_attention_has_the_masks_loss_and_gradients(monkeypatch):
    model, clean = model_of("cuda"), torch.randint(0, MASK, (4, 64), device="cuda")
    hidden = torch.rand(4, 64, device="cuda") < 0.5
    rows = hidden.flatten().nonzero()[:, 0]
    given = (clean.masked_fill(hidden, MASK), rows, clean.flatten()[rows], torch.rand(len(rows), device="cuda"))
    found = {}
    for way in ("mask", "flex"):
        monkeypatch.setenv("ATAT_FAST_BLOCK_ATTENTION", way)
        loss, _ = model(*given)
        found[way] = [loss, *torch.autograd.grad(loss, list(model.parameters()))]
    for a, b in zip(found["flex"], found["mask"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_the_cache_gives_the_whole_passs_logits_and_fills_a_text(device):
    model, clean = model_of(device).eval(), torch.randint(0, MASK, (3, 64), device=device)
    noisy = torch.where(torch.rand(3, 64, device=device) < 0.5, MASK, clean)
    with torch.no_grad():
        want, cache = model.logits(model.features(noisy, clean=clean)).view(3, 64, -1)[..., :MASK], model.cache(3)
        for start in range(0, 64, 16):
            here = slice(start, start + 16)
            got = cache.logits(cache.features(noisy[:, here])).view(3, 16, -1)[..., :MASK]
            torch.testing.assert_close(got, want[:, here], rtol=1e-3, atol=1e-3)
            cache.append(clean[:, here])
    text = sample(model, torch.full((3, 96), MASK, device=device), steps=4, stop_at=9)
    assert not (text == MASK).any()
