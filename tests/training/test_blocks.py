"""Training a model of blocks: each block is masked by itself, exactly; the run, its bound and its samples are those of blocks."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F

from atat_fast import evaluate, sample
from atat_fast.config import Config, DiffusionConfig
from atat_fast.errors import UsageError
from atat_fast.hardware.compute import resolve
from atat_fast.models import DiT
from atat_fast.models.importance import ImportanceEstimator
from atat_fast.training.loss import Objective
from atat_fast.training.plan import check

MASK, LENGTH, BLOCK = 10, 12, 4
X, IDS = torch.randint(0, MASK, (6, LENGTH), generator=torch.Generator().manual_seed(0)), torch.arange(20, 26)


def objective_of(**settings):
    config = Config()
    for name, value in {"dim": 16, "layers": 2, "heads": 2, "length": LENGTH, "block": BLOCK, "dropout": 0.0}.items():
        setattr(config.model, name, value)
    config.train.device, config.train.dtype = "cpu", "fp32"
    for name, value in settings.items():
        room, _, setting = name.partition(".")
        setattr(getattr(config, room), setting, value)
    torch.manual_seed(0)
    model = DiT(11, MASK, **vars(config.model))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    estimator = ImportanceEstimator.of(config, None)
    return Objective(model, config, resolve(config.train), seed=3, total=12, estimator=estimator)


@pytest.mark.parametrize(
    "settings",
    [
        {}, {"diffusion.counts": "bell"}, {"diffusion.weighting": "ce"},
        {"diffusion.counts": "bell", "diffusion.weighting": "ce"},
        {"diffusion.masking": "bernoulli"}, {"diffusion.spread": 1.0}, {"diffusion.gap_power": 0.5},
        {"importance.source": "learned", "importance.width": 8, "importance.heads": 2, "importance.layers": 1},
        {"importance.source": "learned", "importance.reads": "hidden", "diffusion.weighting": "ce"},
    ],
)  # fmt: skip
def test_every_block_is_masked_by_itself_and_the_loss_is_by_hand(settings):
    o = objective_of(**settings)
    masked = o.hide(X, IDS, first=6, step=2)
    hidden = masked.noisy == MASK
    assert masked.noisy.shape == X.shape and torch.equal(masked.noisy[~hidden], X[~hidden]) and masked.tokens == 72
    assert torch.equal(hidden.flatten().nonzero()[:, 0], masked.rows[: masked.hidden])
    k = hidden.view(-1, BLOCK).sum(1)
    assert len(set(k.tolist())) > 2
    if settings in ({}, {"diffusion.spread": 1.0}):
        weights = ((BLOCK + 1) / k.clamp(min=1)).repeat_interleave(k)
        torch.testing.assert_close(masked.weights, weights.float())
    logits = o.model.logits(o.model.features(masked.noisy, clean=X))[masked.rows]
    nll = F.cross_entropy(logits, masked.target, reduction="none")
    loss, _ = o.forward_loss(masked, IDS, torch.tensor(2))
    torch.testing.assert_close(loss, (masked.weights * nll).sum() / (12 * LENGTH), rtol=1e-4, atol=1e-5)
    whole, _ = o.loss(X, IDS, first=6, step=2)
    assert whole.isfinite()
    two = [o.hide(X[i : i + 2], IDS[i : i + 2], first=6 + i, step=2) for i in (0, 2, 4)]
    assert torch.equal(torch.cat([part.noisy for part in two]), masked.noisy)
    torch.testing.assert_close(torch.cat([part.weights[: part.hidden] for part in two]), masked.weights[: masked.hidden])


def test_counts_of_all_blocks_of_a_batch_are_even_and_not_told_by_the_place():
    """Over a batch the counts cover 0..K evenly; over steps each place of a sequence sees every count alike."""
    o, seen = objective_of(), torch.zeros(LENGTH // BLOCK, BLOCK + 1)
    x, ids = torch.randint(0, MASK, (12, LENGTH)), torch.arange(12)
    for step in range(200):
        k = (o.hide(x, ids, first=0, step=step).noisy == MASK).view(12, -1, BLOCK).sum(2)
        counts = torch.bincount(k.flatten(), minlength=BLOCK + 1)
        assert counts.max() - counts.min() <= 4  # 36 blocks, 5 counts
        for place in range(LENGTH // BLOCK):
            seen[place] += torch.bincount(k[:, place], minlength=BLOCK + 1)
    assert ((seen / seen.sum(1, keepdim=True) - 0.2).abs() < 0.03).all()


def test_a_run_of_blocks_is_evaluated_sampled_and_gone_on_with(small, trainer, rows, tmp_path, capsys):
    settings = {"model.block": 4, "run.name": "blocks", "sample.num_samples": 2, "sample.steps": 2, "eval.sequences": 0}
    made = trainer(small, settings)
    made.train()
    folder = tmp_path / "runs" / "blocks"
    want = rows(folder, "eval")[-1]
    assert evaluate.main(["--run", str(folder), "--checkpoint", "last", "--sequences=0", "--json", str(tmp_path / "a.json")]) == 0
    found = json.loads((tmp_path / "a.json").read_text())
    assert found["nll"] == pytest.approx(want["nll"], rel=1e-6) and 0 < found["nll_se"] < 1
    assert sample.main(["--run", str(folder), "--num_samples", "2", "--prompt", "The list", "--steps", "3"]) == 0
    assert capsys.readouterr().out.count("The list") == 2
    assert len(rows(folder, "sample")[0]["texts"]) == 2
    for more in (["--order", "left_to_right"], ["--se", "0.1"]):
        with pytest.raises(UsageError, match=r"this is not made for models of blocks \(model.block 4\)"):
            evaluate.main(["--run", str(folder), *more])
    trainer(small, settings | {"train.max_steps": 14}, resume=True).train()
    assert rows(folder, "train", "step")[-1] == [14]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"model.block": 5}, "model.block 5 does not divide model.length 1024; try 4, or 0"),
        ({"model.block": 4, "diffusion.counts": "learned"}, r"diffusion.counts learned is not made for blocks \(model.block 4\)"),
        ({"model.block": 4, "diffusion.mirror": True}, "diffusion.mirror true is not made for blocks"),
        ({"model.block": 4, "data.prompt_column": "prompt", "model.document_mask": True}, "model.document_mask is not made for"),
    ],
)
def test_what_does_not_go_together(settings, sentence):
    config = Config()
    config.diffusion = DiffusionConfig()
    for name, value in settings.items():
        room, _, setting = name.partition(".")
        setattr(getattr(config, room), setting, value)
    with pytest.raises(UsageError, match=sentence):
        check(config)
