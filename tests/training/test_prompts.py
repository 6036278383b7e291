"""Training on prompts and responses: prompts and padding are seen or not, but never hidden nor counted."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from atat_fast import evaluate, train
from atat_fast.errors import UsageError
from atat_fast.training.plan import check
from atat_fast.training.trainer import Interrupted

SENTENCES = [f"{'abcdefgh'[: i % 7 + 2]} backwards is |{'abcdefgh'[: i % 7 + 2][::-1]}" for i in range(120)]


@pytest.fixture
def rowed(small, tmp_path):
    """Arguments of a run of 12 steps on rows of prompts and responses, with bytes as tokens."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(dict(zip(("prompt", "response"), s.split("|"), strict=True))) + "\n" for s in SENTENCES))
    settings = {
        "data.corpus": path, "data.prompt_column": "prompt", "data.tokenizer": "bytes", "model.document_mask": "true",
        "model.length": 32, "eval.sequences": 0, "sample.num_samples": 2, "sample.steps": 4,
    }  # fmt: skip
    return [*small, *(f"--{name}={value}" for name, value in settings.items())]


def recorded(made):
    """What the model is given in a run: (noisy, rows, target, weights) of every pass."""
    seen, forward = [], made.parts.objective.forward
    made.parts.objective.forward = lambda *given: seen.append(given[:4]) or forward(*given)
    made.train()
    return seen


def test_only_responses_are_hidden_and_counted(rowed, trainer, rows, capsys):
    found = {}
    for micro in (2, 4):
        made = trainer(rowed, {"run.name": micro, "train.micro_batch": micro, "train.dtype": "fp32", "train.global_batch": 4})
        parts, length = made.parts, 32
        seen = recorded(made)
        assert len(seen) == 12 * 4 // micro
        for i, (noisy, hidden, target, _) in enumerate(seen):
            extents = parts.loader.extents(i * micro, micro)
            inside = (torch.arange(length) >= extents[:, :1]) & (torch.arange(length) < extents[:, 1:])
            masked = noisy == parts.tokenizer.mask_id
            assert not (masked & ~inside).any() and torch.equal(masked.flatten().nonzero()[:, 0], hidden)
            tokens = noisy.flatten().index_copy(0, hidden, target).view_as(noisy)
            assert torch.equal(tokens, parts.loader.batch(i * micro, micro)[0])
        found[micro] = rows(made.folder, "train", "step", "loss")
        end, text = parts.tokenizer.decode([parts.tokenizer.eos_id]), rows(made.folder, "sample")[0]["texts"]
        assert len(text) == 2 and all(" backwards is " in t and t.count(end) <= 9 for t in text)
    for (step, a), (same, b) in zip(found[2], found[4], strict=True):
        assert step == same and a == pytest.approx(b, rel=1e-4)  # the whole batch's responses divide both
    assert "rows.jsonl" in capsys.readouterr().out


@pytest.mark.parametrize("weighting", ["uniform", "ce"])
@pytest.mark.parametrize("counts", ["uniform", "bell"])
def test_the_loss_by_hand(rowed, trainer, weighting, counts):
    made = trainer(rowed, {"diffusion.weighting": weighting, "diffusion.counts": counts, "train.dtype": "fp32"})
    parts, plan = made.parts, made.parts.plan
    objective, model = parts.objective, parts.objective.model
    tokens, ids = parts.loader.batch(0, plan.global_batch)
    extents = parts.loader.extents(0, plan.global_batch)
    inside = (torch.arange(32) >= extents[:, :1]) & (torch.arange(32) < extents[:, 1:])
    n = inside.sum(1)
    masked = objective.hide(tokens, ids, first=0, step=0, frozen=~inside, lengths=n)
    loss, _ = objective.loss_of(masked, ids, step=0, progress=0.0)
    logits = model.logits(model.features(masked.noisy))
    nll = F.cross_entropy(logits[masked.rows].double(), masked.target, reduction="none")
    k = (masked.noisy == parts.tokenizer.mask_id).sum(1)
    if weighting == "ce":
        want = nll.mean()
    elif counts == "uniform":
        want = (((n + 1) / k.clamp(min=1)).repeat_interleave(k) * nll).sum() / n.sum()
    else:
        want = (masked.weights * nll).sum() / n.sum()
    assert float(loss) == pytest.approx(float(want), rel=1e-5)
    made.close()


def test_a_run_goes_on_and_is_evaluated(rowed, trainer, rows, tmp_path):
    whole = trainer(rowed, {"run.name": "whole"})
    whole.train()
    with pytest.raises(Interrupted):
        trainer(rowed, {"run.name": "cut"}, stop=5).train()
    trainer(rowed, {"run.name": "cut"}, resume=True).train()
    folder = tmp_path / "runs" / "cut"
    assert rows(folder, "train", "step", "loss")[-1] == rows(whole.folder, "train", "step", "loss")[-1]
    want = rows(folder, "eval")[-1]
    assert (
        evaluate.main(["--run", str(folder), "--checkpoint", "last", "--sequences", "0", "--json", str(tmp_path / "a.json")]) == 0
    )
    found = json.loads((tmp_path / "a.json").read_text())
    assert found["nll"] == pytest.approx(want["nll"], rel=1e-6) and found["bytes_per_token"] == want["bytes_per_token"] < 1
    assert found["bits_per_byte"] > want["nll"] / 0.6932
    for more in (["--order", "left_to_right"], ["--se", "0.1"]):
        with pytest.raises(UsageError, match=r"this is not made for prompts and responses \(data.prompt_column\)"):
            evaluate.main(["--run", str(folder), "--checkpoint", "last", *more])


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"model.document_mask": False}, "makes sequences that are padded.*set model.document_mask true"),
        ({"importance.source": "learned"}, "importance.source learned is not made for prompts and responses"),
        ({"diffusion.schedule": "token_identity"}, "diffusion.schedule token_identity is not made for prompts"),
        ({"diffusion.mirror": True}, "diffusion.mirror true is not made for prompts and responses"),
        ({"diffusion.counts": "learned"}, "diffusion.counts learned follows one length"),
    ],
)
def test_what_does_not_go_together(settings, sentence):
    from atat_fast.config import Config

    config = Config()
    config.data.prompt_column, config.model.document_mask = "prompt", True
    check(config)
    for name, value in settings.items():
        room, _, setting = name.partition(".")
        setattr(getattr(config, room), setting, value)
    if "importance.source" in settings or "diffusion.schedule" in settings:
        config.diffusion.weighting = "uniform"
    with pytest.raises(UsageError, match=sentence):
        check(config)


def test_the_plan_says_it(rowed, capsys):
    assert train.main([*rowed, "--dry_run"]) == 0
    assert "column 'prompt' is seen, and is neither hidden nor counted" in capsys.readouterr().out


@pytest.mark.slow
def test_from_an_empty_folder(tmp_path, rowed):
    (folder := tmp_path / "empty").mkdir()
    options = [option for option in rowed if not option.startswith("--run.root")]
    command = [sys.executable, "-m", "atat_fast.train", *options, "--train.max_steps=60"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert "val/nll" in done.stdout
