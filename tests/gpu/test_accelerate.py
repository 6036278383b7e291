"""accelerate on a GPU: transformers' losses and gradients, and less memory."""

from __future__ import annotations

import copy

import pytest
import torch

from atat_fast.models.accelerate import accelerate, masked_diffusion_loss

pytest.importorskip("transformers")
from masked_lms import MASK, batch, make

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("name", ["BERT", "ModernBERT", "LLaDA", "Dream"])
def test_losses_and_gradients_under_autocast(name):
    plain = make(name).cuda()
    fast = accelerate(copy.deepcopy(plain))
    inputs = {key: value.cuda() for key, value in batch(rows=8, length=64).items()}
    exact = copy.deepcopy(plain).double()

    def loss_of(model):
        out = model(**inputs)
        return (
            out.loss
            if out.loss is not None
            else torch.nn.functional.cross_entropy(out.logits.flatten(0, 1), inputs["labels"].flatten())
        )

    want = torch.autograd.grad(loss_of(exact), list(exact.parameters()))
    errors = []
    for model in (fast, plain):
        with torch.autocast("cuda", torch.bfloat16):
            loss = loss_of(model)
        found = torch.autograd.grad(loss, list(model.parameters()))
        errors.append(sum(float((g.double() - w).square().sum()) for g, w in zip(found, want, strict=True)) ** 0.5)
    assert errors[0] <= 1.2 * errors[1]
    assert masked_diffusion_loss(
        fast, inputs["input_ids"], mask_id=MASK, seed=1, step=0, attention_mask=inputs["attention_mask"]
    ).isfinite()


def test_a_step_holds_no_logits_of_visible_tokens():
    sizes = {}
    for way in ("plain", "fast"):
        model = make("BERT", max_position_embeddings=512).cuda()
        if way == "fast":
            accelerate(model)
        inputs = {key: value.cuda() for key, value in batch(rows=64, length=512, share=0.15, pads=False).items()}
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        model(**inputs).loss.backward()
        sizes[way] = torch.cuda.max_memory_allocated() - before
    logits = 64 * 512 * 97 * 4
    assert sizes["plain"] - sizes["fast"] > logits
