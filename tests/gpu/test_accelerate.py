"""accelerate on a GPU: transformers' losses and gradients, and less memory."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from atat_fast.models.accelerate import accelerate, masked_diffusion_loss

pytest.importorskip("transformers")
from masked_lms import MASK, batch, make


@pytest.mark.parametrize("name", ["BERT", "ModernBERT", "LLaDA", "Dream"])
def test_losses_and_gradients_under_autocast(device, name):
    plain = make(name).to(device)
    fast, exact = accelerate(copy.deepcopy(plain)), copy.deepcopy(plain).double()
    inputs = {key: value.to(device) for key, value in batch(rows=8, length=64).items()}

    def loss_of(model):
        out = model(**inputs)
        return F.cross_entropy(out.logits.flatten(0, 1), inputs["labels"].flatten()) if out.loss is None else out.loss

    want, errors = torch.autograd.grad(loss_of(exact), list(exact.parameters())), []
    for model in (fast, plain):
        with torch.autocast(device, torch.bfloat16):
            loss = loss_of(model)
        found = torch.autograd.grad(loss, list(model.parameters()))
        errors.append(sum(float((g.double() - w).square().sum()) for g, w in zip(found, want, strict=True)) ** 0.5)
    assert errors[0] <= 1.2 * errors[1]
    how = {"mask_id": MASK, "seed": 1, "step": 0, "attention_mask": inputs["attention_mask"]}
    assert masked_diffusion_loss(fast, inputs["input_ids"], **how).isfinite()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
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
    assert sizes["plain"] - sizes["fast"] > 64 * 512 * 97 * 4
