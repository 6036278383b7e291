"""The trainer: a run, its stop and resumption, and what it refuses."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal

import pytest
import torch
from safetensors.torch import save_file

from atat_fast import evaluate, sample, train
from atat_fast.errors import UsageError
from atat_fast.evaluation.likelihood import evaluate as evaluate_bound
from atat_fast.ops import documents_of
from atat_fast.runs import checkpoint
from atat_fast.training import trainer as module
from atat_fast.training.trainer import Diverged, Interrupted

LEARNED = {"importance.source": "learned", "importance.width": 16, "importance.heads": 2, "importance.layers": 1}
ATAT = LEARNED | {"diffusion.weighting": "importance", "curriculum.kind": "linear"}
ADAPTIVE = LEARNED | {"importance.source": "full", "curriculum.kind": "adaptive", "curriculum.patience": 1, "eval.every": 2}
WATCHED = ADAPTIVE | {"curriculum.watch": "train", "train.log_every": 2}
EVALUATION = ("step", "nll", "nll_se")


@pytest.fixture
def losses(rows):
    """losses(folder): the numbers of a run that do not depend on time."""
    return lambda folder: [rows(folder, "train", "step", "loss", "grad_norm", "lr", "tokens"), rows(folder, "eval", *EVALUATION)]


@pytest.fixture
def evaluated(tmp_path):
    """What the evaluate command writes of a run's last weights."""

    def evaluated(folder, *more):
        path = tmp_path / "page.json"
        assert evaluate.main(["--run", str(folder), "--json", str(path), "--checkpoint", "last", *more]) == 0
        return json.loads(path.read_text())

    return evaluated


def test_a_run_leaves_what_it_should(small, trainer, tmp_path, capsys, rows, losses, evaluated):
    small += ["--eval.sequences=0"]
    assert train.main(small) == 0
    folder = tmp_path / "runs" / "demo"
    files = "metrics.jsonl config.yaml run.json report.html loss.png throughput.png overview.png checkpoints"
    assert {p.name for p in folder.iterdir()} >= set(files.split())
    assert rows(folder, "train", "step") == [[5], [10], [12]] and rows(folder, "eval", "step") == [[6], [12]]
    best = min(rows(folder, "eval"), key=lambda row: row["nll"])["step"]
    for link, step in (("last", 12), ("best", best)):
        assert (folder / "checkpoints" / link).resolve().name == f"step-{step:08d}"
    lines = capsys.readouterr().out.splitlines()
    assert lines[-3].startswith("unigram entropy ") and lines[-2].startswith("val/nll ") and "±" in lines[-2]
    assert lines[-1] == f"report {folder / 'report.html'}"
    facts = json.loads((folder / "run.json").read_text())
    assert facts["parameters"]["total"] > 0 and facts["tokens_per_step"] == 64
    assert "[MASK]" not in rows(folder, "sample")[0]["texts"][0]

    assert train.main(small) == 0  # without a name the next free folder is taken
    assert losses(tmp_path / "runs" / "demo-2") == losses(folder)
    newest = trainer(small, resume=True)  # and the newest run is gone on with
    assert newest.folder.name == "demo-2" and newest.state.step == 12
    newest.close()

    again = evaluated(folder)
    assert [again[name] for name in EVALUATION] == pytest.approx(rows(folder, "eval", *EVALUATION)[-1], rel=1e-5)
    printed = capsys.readouterr().out
    assert again["unigram_entropy"] > 0
    assert all(f"\n{name} " in printed for name in ("nll", "perplexity", "bits per token", "bits per byte", "unigram entropy"))
    assert sample.main(["--run", str(folder), "--num_samples", "2", "--prompt", "The list", "--steps", "3"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("The list") == 2 and "[MASK]" not in printed


def test_attention_within_documents_is_trained_and_evaluated(small, trainer, rows, losses, evaluated):
    """Training and evaluation see the boundaries that the tokens have, and both depend on them."""
    found = []
    for flag in ("true", "false"):
        made, seen = trainer(small, {"model.document_mask": flag, "run.name": flag, "train.micro_batch": 2}), []
        forward = made.parts.objective.forward
        made.parts.objective.forward = lambda *given, seen=seen, forward=forward: seen.append(given) or forward(*given)
        made.train()
        for noisy, hidden, target, *rest in seen:
            documents = rest[3]
            assert (documents is None) == (flag == "false")
            if documents is not None:
                tokens = noisy.flatten().index_copy(0, hidden, target).view_as(noisy)
                assert torch.equal(documents.ids, documents_of(tokens, made.parts.tokenizer.eos_id).ids)
        found.append(losses(made.folder))
        assert evaluated(made.folder, "--sequences=8")["nll"] == pytest.approx(rows(made.folder, "eval")[-1]["nll"], rel=1e-6)
    assert found[0] != found[1]


def test_a_checkpoint_with_tables_block_by_block_is_read(tmp_path):
    parts = {f"blocks.{i}.modulation.bias/exp_avg": torch.randn(6) for i in range(2)}
    parts |= {"final_modulation.bias/exp_avg": torch.randn(2), "final_norm/exp_avg": torch.randn(1)}
    save_file(parts, tmp_path / checkpoint.OPTIMIZER)
    read = checkpoint.Checkpoint(tmp_path, {}).tensors(checkpoint.OPTIMIZER)
    assert set(read) == {"modulation.bias/exp_avg", "final_norm/exp_avg"}
    assert torch.equal(read["modulation.bias/exp_avg"], torch.cat(list(parts.values())[:3]))


def test_an_attention_that_cannot_run_is_refused_before_a_folder_is_made(small, trainer, tmp_path, monkeypatch):
    monkeypatch.setenv("ATAT_FAST_ATTENTION", "flash_attn")
    with pytest.raises(UsageError, match="attention cannot use 'flash_attn' here: it runs on CUDA tensors"):
        trainer(small)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("options", [{"diffusion.weighting": "uniform"}, {"diffusion.weighting": "ce"}, ATAT])
def test_accumulation_changes_nothing_but_rounding(small, trainer, rows, options):
    """In fp32 and with AdamW: bf16 products, and Muon, which orthogonalises in bf16, make much of the last bits of a gradient."""
    options = options | {"optim.name": "adamw", "optim.lr": 2e-3, "train.dtype": "fp32"}
    whole, cut = trainer(small, options), trainer(small, options, {"train.micro_batch": 1, "run.name": "cut"})
    assert whole.parts.plan.accumulation == 1 and cut.parts.plan.accumulation == 4
    whole.train()
    cut.train()
    for name, p in whole.parts.objective.named_parameters().items():
        torch.testing.assert_close(p, cut.parts.objective.named_parameters()[name], rtol=1e-3, atol=1e-4)
    if options.items() >= ATAT.items():
        a, b = ([row["importance_loss"] for row in rows(made.folder, "train")] for made in (whole, cut))
        assert a == pytest.approx(b, rel=1e-3)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"optim.name": "adamw"},
        {"diffusion.counts": "uniform", "diffusion.masking": "bernoulli"},
        {"diffusion.schedule": "token_identity"},
        ATAT,
        ADAPTIVE | {"curriculum.threshold": 1},
        WATCHED | {"curriculum.threshold": 9},
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one(small, trainer, rows, tmp_path, options):
    """Stopped between two log lines, after an evaluation, with dropout on: every number is the same bit for bit."""
    whole, parts = tmp_path / "runs" / "whole", tmp_path / "runs" / "parts"
    trainer(small, options, {"run.name": "whole"}).train()
    with pytest.raises(Interrupted, match="SIGTERM: saved") as caught:
        trainer(small, options, {"run.name": "parts"}, stop=3).train()
    assert caught.value.code == 143
    with (parts / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 4, "loss": 1')  # a line cut short
    trainer(small, options, {"run.name": "parts"}, resume=True).train()
    times = {"seconds": 0, "tokens_per_second": 0}
    for kind in ("train", "eval"):
        assert [row | times for row in rows(whole, kind)] == [row | times for row in rows(parts, kind)] != []
    if options.get("curriculum.kind") == "adaptive":
        assert len({row["phase"] for row in rows(whole, "train")}) > 1
    ends = [checkpoint.find(folder) for folder in (whole, parts)]
    estimator = (checkpoint.IMPORTANCE, checkpoint.IMPORTANCE_EMA) if "importance.source" in options else ()
    for name in (checkpoint.WEIGHTS, checkpoint.EMA, checkpoint.OPTIMIZER, *estimator):
        a, b = (end.tensors(name) for end in ends)
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    assert ends[0].manifest["curriculum"] == ends[1].manifest["curriculum"]
    if "curriculum.watch" in options:  # it watches log lines
        with pytest.raises(UsageError, match=r"was started with train.log_every 2, but this is 3"):
            trainer(small, options, {"run.name": "parts", "train.log_every": 3}, resume=True)


@pytest.mark.slow
def test_sigterm_to_the_process_saves_and_the_command_resumes(
    small, rows, losses, until, arguments, trainer, tmp_path, python, python_started
):
    """As a scheduler does it: from a fresh directory, in a process of its own."""
    folder = tmp_path / "runs" / "named"
    settings = {"train.max_steps": 400, "eval.every": 150, "sample.num_samples": 0}
    command = arguments("-m", "atat_fast.train", small, settings)
    trainer(small, settings, {"run.name": "whole"}).train()
    process = python_started(*command, "--run.name=named")
    until(lambda: rows(folder, "train"), process)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 143 and "add --resume to continue" in stderr
    again = python(*command, "--run.name=named", "--resume")
    assert again.returncode == 0, again.stderr
    assert losses(folder) == losses(tmp_path / "runs" / "whole")


def test_a_run_that_diverges_says_so_and_keeps_the_last_good_checkpoint(small, trainer, tmp_path, capsys):
    made = trainer(small, {"train.checkpoint_every": 2})
    original = made._train_step

    def poison():
        original()
        if made.state.step == 7:
            with torch.no_grad():
                made.parts.model.head.weight.fill_(torch.nan)

    made._train_step = poison
    with pytest.raises(Diverged, match=r"not finite at step 8 \(rank 0\); the last good checkpoint is .*last \(step 6\)"):
        made.train()
    saved = checkpoint.find(made.folder)
    assert saved.step == 6 and all(t.isfinite().all() for t in saved.tensors(checkpoint.WEIGHTS).values())
    capsys.readouterr()
    assert train.main([*small, "--optim.lr=1e30", "--optim.clip=0", "--run.name=hot"]) == 1
    error = capsys.readouterr().err
    assert "not finite" in error and "there is no checkpoint yet" in error and error.count("\n") == 1
    made = trainer(small, ATAT)
    with torch.no_grad():
        made.parts.estimator.network.head.bias.fill_(torch.nan)
    with pytest.raises(Diverged, match=r"importance scores hold NaN.*at step 1 .*there is no checkpoint yet"):
        made.train()


def test_a_full_disk_is_one_sentence_and_loses_nothing(small, trainer, monkeypatch):
    made, real, calls = trainer(small), checkpoint.save_file, []

    def full(tensors, path):
        calls.append(path)
        if len(calls) > 3:  # the second checkpoint
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        real(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(UsageError, match=r"cannot write to .*checkpoints: No space left on device"):
        made.train()
    assert checkpoint.find(made.folder).step == 6
    assert not [name for name in os.listdir(made.folder / checkpoint.FOLDER) if name.startswith(".")]


def test_evaluations_and_checkpoints_are_no_training_time(small, trainer, rows, monkeypatch):
    made, now = trainer(small, {"train.checkpoint_every": 4, "sample.num_samples": 0}), [0.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])

    def costs(function, seconds):
        def slowed(*args, **options):
            now[0] += seconds
            return function(*args, **options)

        return slowed

    made._train_step = costs(made._train_step, 1.0)
    monkeypatch.setattr(module, "evaluate", costs(module.evaluate, 100.0))
    monkeypatch.setattr(checkpoint, "save", costs(checkpoint.save, 1000.0))
    made.train()
    assert rows(made.folder, "train", "seconds", "tokens_per_second") == [[5.0, 64.0], [10.0, 64.0], [12.0, 64.0]]


DAMAGE = [
    (checkpoint.EMA, lambda old: old[:-10], "is damaged: ema.safetensors has .* bytes instead of"),
    (checkpoint.EMA, lambda old: old[:-1] + bytes([old[-1] ^ 1]), "its SHA-256 differs"),
    (checkpoint.EMA, lambda old: None, "ema.safetensors is missing"),
    (checkpoint.MANIFEST, lambda old: b'{"hello": 1}', "is not an atat_fast checkpoint"),
    (checkpoint.MANIFEST, lambda old: b"\x80PK", "is not an atat_fast checkpoint"),
    (
        checkpoint.MANIFEST,
        lambda old: json.dumps(json.loads(old) | {"format": 99}).encode(),
        "has checkpoint format 99; this .* 1",
    ),
]


def test_damaged_and_foreign_checkpoints_are_refused_and_nothing_is_written(small, trainer, tmp_path):
    trainer(small).train()
    for i, (name, change, message) in enumerate(DAMAGE):
        folder = tmp_path / "runs" / str(i)
        shutil.copytree(tmp_path / "runs" / "demo", folder, symlinks=True)
        for path in {(folder / checkpoint.FOLDER / link).resolve() / name for link in ("last", "best")}:
            content = change(path.read_bytes())
            path.unlink() if content is None else path.write_bytes(content)
        before = (folder / "metrics.jsonl").read_bytes()
        for refused in (
            lambda folder=folder: evaluate.main(["--run", str(folder)]),
            lambda folder=folder: sample.main(["--run", str(folder)]),
            lambda i=i: trainer(small, {"run.name": i}, resume=True),
        ):
            with pytest.raises(UsageError, match=message):
                refused()
        assert (folder / "metrics.jsonl").read_bytes() == before


def test_a_run_with_every_part_of_atat_on(small, rows, arguments, tmp_path, capsys):
    """What it logs, saves and reports; its likelihood is the uniform one, with or without the estimator's files."""
    assert train.main(arguments(small, ATAT, {"run.name": "atat"})) == 0
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
    averaged = saved.tensors(checkpoint.IMPORTANCE_EMA)
    assert all(torch.equal(p, averaged[name]) for name, p in checkpoint.load_importance(saved).named_parameters())
    assert any(key.startswith("importance.layers") or "importance.network" in key for key in saved.tensors(checkpoint.OPTIMIZER))
    command, printed = ["--run", str(folder), "--checkpoint", "last"], []
    for _ in range(2):
        capsys.readouterr()
        assert evaluate.main([*command, "--sequences", "8"]) == 0
        printed.append([line for line in capsys.readouterr().out.splitlines() if "nll" in line])
        manifest = json.loads((saved.path / checkpoint.MANIFEST).read_text())
        for name in (checkpoint.IMPORTANCE, checkpoint.IMPORTANCE_EMA):
            manifest["files"].pop(name, None)
            (saved.path / name).unlink(missing_ok=True)
        (saved.path / checkpoint.MANIFEST).write_text(json.dumps(manifest))
    assert printed[0] == printed[1] and f"{rows(folder, 'eval')[-1]['nll']:.4f}" in "".join(printed[0])
    assert sample.main([*command, "--steps", "3"]) == 0


def test_an_estimator_changes_neither_the_models_first_weights_nor_its_likelihood(small, trainer):
    made = [trainer(small, {"run.name": name}, more).parts for name, more in (("plain", {}), ("atat", ATAT))]
    plain, atat = (dict(parts.model.named_parameters()) for parts in made)
    assert plain.keys() == atat.keys() and all(torch.equal(p, atat[name]) for name, p in plain.items())
    values = [evaluate_bound(parts.model, parts.data.valid, parts.config.eval, parts.compute.autocast()) for parts in made]
    assert values[0] == values[1]


def test_frequencies_are_kept_in_the_checkpoint(small, trainer, rows):
    made = trainer(small, LEARNED | {"importance.source": "frequency"})
    assert any("importance.source frequency" in line for line in made.introduction())
    made.train()
    saved, own = checkpoint.find(made.folder), made.parts.estimator.frequency
    assert torch.equal(saved.tensors(checkpoint.IMPORTANCE)["frequency"], own)
    assert torch.equal(checkpoint.load_importance(saved).frequency, own)
    first = rows(made.folder, "train")[0]
    assert "importance_loss" not in first and "tilt" in first
