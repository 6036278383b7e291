"""The trainer through its door: a run, its stop and resumption, and what it refuses."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from atat_fast import cli, evaluate, sample, train
from atat_fast.errors import UsageError
from atat_fast.ops import documents_of
from atat_fast.runs import checkpoint
from atat_fast.training.records import importance_row
from atat_fast.training.trainer import Diverged, Trainer


def run(arguments, resume=False):
    """A Trainer from the door's arguments."""
    parser = cli.make_parser()
    parser.add_argument("--resume", action="store_true")
    config, parsed = cli.parse_config(parser, [*arguments, *(["--resume"] if resume else [])])
    return Trainer(config, resume=parsed.resume, show_progress=False)


def rows(folder: Path, kind: str):
    return [row for row in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if row["kind"] == kind]


def drop_times(row):
    return {name: value for name, value in row.items() if name not in ("seconds", "tokens_per_second")}


def losses(folder: Path):
    numbers = ("step", "loss", "grad_norm", "lr", "tokens")
    evals = ("step", "nll", "nll_se")
    return [[row[n] for n in numbers] for row in rows(folder, "train")], [[row[n] for n in evals] for row in rows(folder, "eval")]


def test_a_run_leaves_what_it_should(small, tmp_path, capsys):
    assert train.main(small) == 0
    folder = tmp_path / "runs" / "demo"
    assert {p.name for p in folder.iterdir()} >= {
        "metrics.jsonl", "config.yaml", "run.json", "report.html", "loss.png", "throughput.png", "overview.png", "checkpoints",
    }  # fmt: skip
    assert [row["step"] for row in rows(folder, "train")] == [5, 10, 12]
    assert [row["step"] for row in rows(folder, "eval")] == [6, 12]
    assert (folder / "checkpoints" / "last").resolve().name == "step-00000012"
    best = min(rows(folder, "eval"), key=lambda row: row["nll"])["step"]
    assert (folder / "checkpoints" / "best").resolve().name == f"step-{best:08d}"
    lines = capsys.readouterr().out.splitlines()
    assert lines[-3].startswith("unigram entropy ") and lines[-2].startswith("val/nll ") and "±" in lines[-2]
    assert lines[-1] == f"report {folder / 'report.html'}"
    facts = json.loads((folder / "run.json").read_text())
    assert facts["parameters"]["total"] > 0 and facts["tokens_per_step"] == 64
    (samples,) = rows(folder, "sample")
    assert "[MASK]" not in samples["texts"][0]

    assert train.main(small) == 0  # without a name the next free folder is taken
    assert losses(tmp_path / "runs" / "demo-2") == losses(folder)

    assert evaluate.main(["--run", str(folder), "--json", str(tmp_path / "out.json"), "--checkpoint", "last"]) == 0
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["step"] == 12 and written["nll_se"] > 0 and written["unigram_entropy"] > 0
    printed = capsys.readouterr().out
    for name in ("nll", "perplexity", "bits per token", "bits per byte", "unigram entropy"):
        assert f"\n{name} " in printed
    assert sample.main(["--run", str(folder), "--num_samples", "2", "--prompt", "The list", "--steps", "3"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("The list") == 2 and "[MASK]" not in printed
    assert sample.main(["--run", str(folder), "--infill", "a [MASK][MASK]b", "--steps", "3"]) == 0
    filled = capsys.readouterr().out
    assert filled.startswith("a ") and "[MASK]" not in filled


def test_evaluation_repeats_the_runs_own_number(small, tmp_path, capsys):
    run([*small, "--eval.sequences", "0"]).train()
    folder = tmp_path / "runs" / "demo"
    evaluate.main(["--run", str(folder), "--json", str(tmp_path / "out.json"), "--checkpoint", "last"])
    again = json.loads((tmp_path / "out.json").read_text())
    assert again["nll"] == pytest.approx(rows(folder, "eval")[-1]["nll"], rel=1e-6)
    assert again["nll_se"] == pytest.approx(rows(folder, "eval")[-1]["nll_se"], rel=1e-5)


def test_attention_within_documents_is_trained_and_evaluated(small, tmp_path):
    """Training and evaluation see the boundaries that the tokens have, and both depend on them."""
    folders = {}
    for name, flag in (("with", "true"), ("without", "false")):
        trainer = run([*small, "--model.document_mask", flag, "--run.name", name, "--train.micro_batch", "2"])
        seen = []
        forward = trainer.parts.objective.forward
        trainer.parts.objective.forward = lambda noisy, rows, target, *rest, seen=seen, forward=forward: (
            seen.append((noisy, rows, target, rest[3])) or forward(noisy, rows, target, *rest)
        )
        trainer.train()
        for noisy, hidden, target, documents in seen:
            assert (documents is None) == (flag == "false")
            if documents is not None:
                tokens = noisy.flatten().index_copy(0, hidden, target).view_as(noisy)
                assert torch.equal(documents.ids, documents_of(tokens, trainer.parts.tokenizer.eos_id).ids)
        folders[name] = tmp_path / "runs" / name
    assert losses(folders["with"]) != losses(folders["without"])
    for name, folder in folders.items():
        evaluate.main(
            ["--run", str(folder), "--json", str(tmp_path / f"{name}.json"), "--checkpoint", "last", "--sequences", "8"]
        )
        again = json.loads((tmp_path / f"{name}.json").read_text())
        assert again["nll"] == pytest.approx(rows(folder, "eval")[-1]["nll"], rel=1e-6)


def test_a_checkpoint_with_tables_block_by_block_is_read(tmp_path):
    parts = {f"blocks.{i}.modulation.bias/exp_avg": torch.randn(6) for i in range(2)}
    parts |= {"final_modulation.bias/exp_avg": torch.randn(2), "final_norm/exp_avg": torch.randn(1)}
    save_file(parts, tmp_path / checkpoint.OPTIMIZER)
    read = checkpoint.Checkpoint(tmp_path, {}).tensors(checkpoint.OPTIMIZER)
    assert set(read) == {"modulation.bias/exp_avg", "final_norm/exp_avg"}
    assert torch.equal(read["modulation.bias/exp_avg"], torch.cat(list(parts.values())[:3]))


def test_an_attention_that_cannot_run_is_refused_before_a_folder_is_made(small, tmp_path, monkeypatch):
    monkeypatch.setenv("ATAT_FAST_ATTENTION", "flash_attn")
    with pytest.raises(UsageError, match="attention cannot use 'flash_attn' here: it runs on CUDA tensors"):
        run(small)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("weighting", ["uniform", "ce"])
def test_accumulation_changes_nothing_but_rounding(small, weighting):
    """In fp32 and with AdamW: bf16 products, and Muon, which orthogonalises in bf16, make much of the last bits of a gradient."""
    settings = [
        *small,
        "--optim.name",
        "adamw",
        "--optim.lr",
        "2e-3",
        "--diffusion.weighting",
        weighting,
        "--train.dtype",
        "fp32",
    ]
    whole, cut = run(settings), run([*settings, "--train.micro_batch", "1"])
    assert whole.parts.plan.accumulation == 1 and cut.parts.plan.accumulation == 4
    whole.train()
    cut.train()
    for a, b in zip(whole.parts.model.parameters(), cut.parts.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


ATAT = [
    "--importance.source", "learned", "--importance.width", "16", "--importance.heads", "2", "--importance.layers", "1",
    "--diffusion.weighting", "importance", "--curriculum.kind", "linear",
]  # fmt: skip
ADAPTIVE = [
    *ATAT[:8], "--importance.source", "full", "--curriculum.kind", "adaptive", "--curriculum.patience", "1",
    "--curriculum.threshold", "1", "--eval.every", "2",
]  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--optim.name", "adamw"],
        ["--diffusion.counts", "uniform", "--diffusion.masking", "bernoulli"],
        ["--diffusion.schedule", "token_identity"],
        ATAT,
        ADAPTIVE,
        [*ADAPTIVE, "--curriculum.watch", "train", "--train.log_every", "2", "--curriculum.threshold", "9"],
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one(small, tmp_path, options):
    """Stopped between two log lines, after an evaluation, with dropout on: every number is the same bit for bit."""
    arguments = [*small, *options]
    run([*arguments, "--run.name", "whole"]).train()
    stopped = run([*arguments, "--run.name", "parts"])
    original, stops = stopped._train_step, iter([3, 7])
    stop_at = [next(stops)]

    def step_and_stop():
        original()
        if stopped.state.step == stop_at[0]:
            os.kill(os.getpid(), signal.SIGTERM)

    stopped._train_step = step_and_stop
    with pytest.raises(Exception, match="SIGTERM: saved") as caught:
        stopped.train()
    assert caught.value.code == 143
    with (tmp_path / "runs" / "parts" / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 4, "loss": 1')  # a line cut short
    run([*arguments, "--run.name", "parts"], resume=True).train()
    assert losses(tmp_path / "runs" / "whole") == losses(tmp_path / "runs" / "parts")
    for kind in ("train", "eval"):
        whole, parts = ([drop_times(row) for row in rows(tmp_path / "runs" / name, kind)] for name in ("whole", "parts"))
        assert whole == parts
    if "adaptive" in options:
        assert len({row["phase"] for row in rows(tmp_path / "runs" / "whole", "train")}) > 1
    ends = [checkpoint.find(tmp_path / "runs" / name) for name in ("whole", "parts")]
    estimator = (checkpoint.IMPORTANCE, checkpoint.IMPORTANCE_EMA) if "--importance.source" in options else ()
    for name in (checkpoint.WEIGHTS, checkpoint.EMA, checkpoint.OPTIMIZER, *estimator):
        a, b = (end.tensors(name) for end in ends)
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    assert all(end.manifest["curriculum"] == ends[0].manifest["curriculum"] for end in ends)


@pytest.mark.slow
def test_sigterm_to_the_process_saves_and_the_door_resumes(small, tmp_path):
    """As a scheduler does it: from a fresh directory, in a process of its own."""
    folder = tmp_path / "runs" / "named"
    long = [*small, "--train.max_steps", "400", "--eval.every", "150", "--sample.num_samples", "0"]
    command = [sys.executable, "-m", "atat_fast.train", *long, "--run.name"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    whole = subprocess.run([*command, "whole"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert whole.returncode == 0, whole.stderr
    process = subprocess.Popen(
        [*command, "named"], cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not ((folder / "metrics.jsonl").exists() and rows(folder, "train")):
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 143 and "add --resume to continue" in stderr
    again = subprocess.run([*command, "named", "--resume"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert losses(folder) == losses(tmp_path / "runs" / "whole")


def test_a_run_that_diverges_says_so_and_keeps_the_last_good_checkpoint(small, tmp_path, capsys):
    trainer = run([*small, "--train.checkpoint_every", "2"])
    original = trainer._train_step

    def poison():
        original()
        if trainer.state.step == 7:
            with torch.no_grad():
                trainer.parts.model.head.weight.fill_(torch.nan)

    trainer._train_step = poison
    with pytest.raises(Diverged, match=r"not finite at step 8 \(rank 0\); the last good checkpoint is .*last \(step 6\)"):
        trainer.train()
    saved = checkpoint.find(tmp_path / "runs" / "demo")
    assert saved.step == 6 and all(t.isfinite().all() for t in saved.tensors(checkpoint.WEIGHTS).values())
    assert train.main([*small, "--optim.lr", "1e30", "--optim.clip", "0", "--run.name", "hot"]) == 1
    error = capsys.readouterr().err
    assert "not finite" in error and "there is no checkpoint yet" in error and error.count("\n") == 1


def test_a_full_disk_is_one_sentence_and_loses_nothing(small, tmp_path, monkeypatch):
    trainer = run([*small, "--run.name", "full"])
    real, calls = checkpoint.save_file, []

    def full(tensors, path):
        calls.append(path)
        if len(calls) > 3:  # the second checkpoint
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        real(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(UsageError, match=r"cannot write to .*checkpoints: No space left on device"):
        trainer.train()
    assert checkpoint.find(tmp_path / "runs" / "full").step == 6
    assert not [p for p in (tmp_path / "runs" / "full" / "checkpoints").iterdir() if p.name.startswith(".")]


def test_checkpoints_that_nothing_points_to_are_dropped(small, tmp_path):
    run([*small, "--train.checkpoint_every", "1"]).train()
    root = tmp_path / "runs" / "demo" / "checkpoints"
    kept = {p.name for p in root.iterdir()}
    assert kept == {"last", "best", (root / "last").resolve().name, (root / "best").resolve().name}


def test_evaluations_and_checkpoints_are_no_training_time(small, tmp_path, monkeypatch):
    from atat_fast.training import trainer as module

    trainer = run([*small, "--train.checkpoint_every", "4", "--sample.num_samples", "0"])
    now = [0.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])

    def costs(function, seconds):
        def slowed(*args, **options):
            now[0] += seconds
            return function(*args, **options)

        return slowed

    trainer._train_step = costs(trainer._train_step, 1.0)
    monkeypatch.setattr(module, "evaluate", costs(module.evaluate, 100.0))
    monkeypatch.setattr(checkpoint, "save", costs(checkpoint.save, 1000.0))
    trainer.train()
    found = rows(tmp_path / "runs" / "demo", "train")
    assert [row["seconds"] for row in found] == [5.0, 10.0, 12.0]
    assert all(row["tokens_per_second"] == 64.0 for row in found)


def damage(path: Path, how: str) -> None:
    weights = path / checkpoint.EMA
    if how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-10])
    elif how == "changed":
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
    elif how == "missing":
        weights.unlink()
    elif how == "foreign":
        (path / checkpoint.MANIFEST).write_text('{"hello": 1}')
    elif how == "newer":
        manifest = json.loads((path / checkpoint.MANIFEST).read_text())
        (path / checkpoint.MANIFEST).write_text(json.dumps(manifest | {"format": 99}))
    elif how == "no json":
        (path / checkpoint.MANIFEST).write_text("\x80PK")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("truncated", "is damaged: ema.safetensors has .* bytes instead of"),
        ("changed", "its SHA-256 differs"),
        ("missing", "ema.safetensors is missing"),
        ("foreign", "is not an atat_fast checkpoint"),
        ("newer", "has checkpoint format 99; this version of atat_fast reads format 1"),
        ("no json", "is not an atat_fast checkpoint"),
    ],
)
def test_damaged_and_foreign_checkpoints(small, tmp_path, how, message):
    run(small).train()
    folder = tmp_path / "runs" / "demo"
    for link in ("last", "best"):
        damage((folder / "checkpoints" / link).resolve(), how)
        if (folder / "checkpoints" / "last").resolve() == (folder / "checkpoints" / "best").resolve():
            break
    for door in (evaluate.main, sample.main):
        with pytest.raises(UsageError, match=message):
            door(["--run", str(folder)])
    before = (folder / "metrics.jsonl").read_bytes()
    with pytest.raises(UsageError, match=message):
        run(small, resume=True)
    assert (folder / "metrics.jsonl").read_bytes() == before


def test_a_checkpoint_of_another_model_does_not_fit(small, tmp_path):
    run(small).train()
    saved = checkpoint.find(tmp_path / "runs" / "demo")
    other = checkpoint.load_model(saved)[0].__class__(300, 257, **(vars(saved.config.model)))
    with pytest.raises(UsageError, match=r"does not fit the model: .* is \(258,.* there, and here \(300,"):
        checkpoint.load_weights(other, saved, checkpoint.EMA)


def test_a_run_with_every_part_of_atat_on(small, tmp_path, capsys):
    """What it logs, saves and reports; its likelihood is the uniform one, with or without the estimator's files."""
    assert train.main([*small, *ATAT, "--run.name", "atat"]) == 0
    folder = tmp_path / "runs" / "atat"
    lines = rows(folder, "train")
    assert [row["level"] for row in lines] == pytest.approx([1 / 12, 1.0, 1.0])  # after steps 5, 10 and 12: progress 4/12, ...
    for row in lines:
        assert row["tilt"] == pytest.approx(2 * row["level"]) and row["focus"] == pytest.approx(row["level"])
        assert 0 < row["importance_baseline"] < 0.7 and row["importance_loss"] > 0 and 0 <= row["importance_score"] <= 1
        assert len(row["nll_quarters"]) == 4 and row["phase"] in ("easy", "mixed", "hard")
    for row in rows(folder, "eval"):
        assert sum(row["reliability"]["count"]) > 0 and len(row["reliability"]["predicted"]) == 10
    passages = json.loads((folder / "importance.json").read_text())["passages"]
    assert len(passages) == 2 and all(len(p["tokens"]) == len(p["scores"]) == 16 for p in passages)
    page = (folder / "report.html").read_text()
    assert "<h2>Importance</h2>" in page and 'class="i' in page and (folder / "importance.png").is_file()
    facts = json.loads((folder / "run.json").read_text())["parameters"]
    assert facts["importance"] > 0 and facts["total"] == sum(n for part, n in facts.items() if part != "total")

    saved = checkpoint.find(folder)
    estimator = checkpoint.load_importance(saved)
    averaged = saved.tensors(checkpoint.IMPORTANCE_EMA)
    assert all(torch.equal(p, averaged[name]) for name, p in estimator.named_parameters())
    assert any(key.startswith("importance.layers") or "importance.network" in key for key in saved.tensors(checkpoint.OPTIMIZER))
    capsys.readouterr()
    assert evaluate.main(["--run", str(folder), "--sequences", "8", "--checkpoint", "last"]) == 0
    printed = capsys.readouterr().out
    assert f"{rows(folder, 'eval')[-1]['nll']:.4f}" in printed
    manifest = json.loads((saved.path / checkpoint.MANIFEST).read_text())
    for name in (checkpoint.IMPORTANCE, checkpoint.IMPORTANCE_EMA):
        manifest["files"].pop(name)
        (saved.path / name).unlink()
    (saved.path / checkpoint.MANIFEST).write_text(json.dumps(manifest))
    assert evaluate.main(["--run", str(folder), "--sequences", "8", "--checkpoint", "last"]) == 0
    assert [line for line in capsys.readouterr().out.splitlines() if "nll" in line] == [
        line for line in printed.splitlines() if "nll" in line
    ]
    assert sample.main(["--run", str(folder), "--checkpoint", "last", "--steps", "3"]) == 0


def test_the_reported_likelihood_does_not_depend_on_importance(small, tmp_path):
    """The same weights evaluated under either kind of settings give the same number."""
    from atat_fast.evaluation.likelihood import evaluate as bound

    plain, atat = run([*small, "--run.name", "a"]), run([*small, *ATAT, "--run.name", "b"])
    for name, p in atat.parts.model.named_parameters():
        assert torch.equal(p, dict(plain.parts.model.named_parameters())[name])  # the estimator is made after the model
    values = [bound(t.parts.model, t.parts.data.valid, t.config.eval, t.parts.compute.autocast()) for t in (plain, atat)]
    assert values[0] == values[1]


def test_frequencies_are_kept_in_the_checkpoint(small, tmp_path):
    trainer = run([*small, *ATAT[:8], "--importance.source", "frequency"])
    assert any("importance.source frequency" in line for line in trainer.introduction())
    trainer.train()
    saved = checkpoint.find(trainer.folder)
    assert torch.equal(saved.tensors(checkpoint.IMPORTANCE)["frequency"], trainer.parts.estimator.frequency)
    assert torch.equal(checkpoint.load_importance(saved).frequency, trainer.parts.estimator.frequency)
    assert "importance_loss" not in rows(trainer.folder, "train")[0] and "tilt" in rows(trainer.folder, "train")[0]


def test_an_estimator_that_diverges_ends_the_run_in_a_sentence(small):
    trainer = run([*small, *ATAT])
    with torch.no_grad():
        trainer.parts.estimator.network.head.bias.fill_(torch.nan)
    with pytest.raises(Diverged, match=r"importance scores hold NaN.*at step 1 .*there is no checkpoint yet"):
        trainer.train()


def test_atat_is_the_same_however_the_batch_is_cut(small):
    settings = [*small, *ATAT, "--optim.name", "adamw", "--optim.lr", "2e-3", "--train.dtype", "fp32", "--model.dropout", "0"]
    whole, cut = run(settings), run([*settings, "--train.micro_batch", "2"])
    for trainer in (whole, cut):
        trainer._train_step()
        trainer._train_step()
    for name, p in whole.parts.objective.named_parameters().items():
        torch.testing.assert_close(p, cut.parts.objective.named_parameters()[name], rtol=1e-3, atol=1e-4)
    a, b = (importance_row(trainer.parts, trainer.state, trainer.state.window.totals(), 2) for trainer in (whole, cut))
    assert a["importance_loss"] == pytest.approx(b["importance_loss"], rel=1e-3)


def test_a_resumed_adaptive_curriculum_keeps_its_log_lines(small, tmp_path):
    arguments = [*small, *ADAPTIVE, "--curriculum.watch", "train", "--train.log_every", "2", "--run.name", "a"]
    run(arguments).train()
    with pytest.raises(UsageError, match=r"was started with train.log_every 2, but this is 3"):
        run([*arguments, "--train.log_every", "3"], resume=True)
