"""The same run on other ranks: masks, losses, gradients, updates and checkpoints do not depend on how many there are."""

from __future__ import annotations

import json
import os
import signal

import pytest

from atat_fast import cli, evaluate, sample
from atat_fast.runs import checkpoint
from atat_fast.training.stops import Interrupted
from atat_fast.training.trainer import Trainer

MODEL = [
    "--model.layers", "2", "--model.dropout", "0", "--train.dtype", "fp32", "--optim.name", "adamw", "--optim.lr", "2e-3",
    "--sample.num_samples", "0", "--train.global_batch", "12", "--model.qk_norm", "true",
]  # fmt: skip
TWENTY = [*MODEL, "--train.max_steps", "20", "--train.log_every", "2", "--eval.every", "20"]
ATAT = [
    "--importance.source", "learned", "--importance.width", "16", "--importance.heads", "2", "--importance.layers", "1",
    "--diffusion.weighting", "importance", "--curriculum.kind", "linear", "--model.tie_embeddings", "true",
    "--model.document_mask", "true", "--model.time_conditioning", "true",
]  # fmt: skip
TWELVE = [*MODEL, "--train.max_steps", "12", "--train.log_every", "1", "--eval.every", "6"]
COMPILED = [*MODEL, "--train.max_steps", "4", "--train.log_every", "1", "--eval.every", "4", "--parallel.mode", "fsdp",
            "--parallel.activation_checkpointing", "1", "--model.dropout", "0.1", "--model.layers", "1"]  # fmt: skip
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # a busy machine takes its time
WAYS = {
    "two-ddp": (2, ["--parallel.mode", "ddp", "--train.micro_batch", "2"]),
    "two-fsdp": (2, ["--parallel.mode", "fsdp", "--train.micro_batch", "3", "--parallel.reshard_after_forward", "always"]),
    "four-ddp": (4, ["--parallel.mode", "ddp"]),
    "four-fsdp": (4, ["--parallel.mode", "fsdp", "--train.micro_batch", "1", "--parallel.activation_checkpointing", "2"]),
    "four-hsdp": (4, ["--parallel.mode", "hsdp", "--parallel.shard_size", "2"]),
}


def run(arguments, resume=False):
    parser = cli.make_parser()
    parser.add_argument("--resume", action="store_true")
    config, parsed = cli.parse_config(parser, [*arguments, *(["--resume"] if resume else [])])
    return Trainer(config, resume=parsed.resume, show_progress=False)


def numbers(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    train = [[row[name] for name in ("step", "loss", "grad_norm")] for row in rows if row["kind"] == "train"]
    return train, [[row[name] for name in ("step", "nll", "nll_se")] for row in rows if row["kind"] == "eval"]


@pytest.fixture(scope="module")
def legs(tmp_path_factory, small_at, torchrun):
    """All runs of this file, one torchrun for each number of ranks: 20 steps each way, and one run handed from 4 ranks to 2, to
    one process and to 3.
    """
    folder = tmp_path_factory.mktemp("legs")
    small = small_at(folder)

    def job(name, *arguments, stop=0, masks=""):
        return {"arguments": [*small, *arguments, "--run.name", name], "stop": stop, "masks": str(masks)}

    def ways(ranks):
        return [job(n, *TWENTY, *more, masks=folder / f"{n}.json") for n, (count, more) in WAYS.items() if count == ranks]

    handed = [*TWELVE, "--parallel.mode", "auto"]
    sharded = [*TWELVE, "--parallel.mode", "fsdp"]
    plans = {
        4: [*ways(4), job("handed", *sharded, stop=3)],
        2: [
            *ways(2), job("handed", *sharded, "--resume", stop=6), job("atat-ddp", *TWELVE, *ATAT, "--parallel.mode", "ddp"),
            job("atat-fsdp", *TWELVE, *ATAT, "--parallel.mode", "fsdp"), job("compiled", *COMPILED, "--train.compile", "on"),
            job("again", *TWELVE, "--parallel.mode", "fsdp", "--model.dropout", "0.1"),
            job("stopped", *TWELVE, "--parallel.mode", "fsdp", "--model.dropout", "0.1", stop=7),
            job("stopped", *TWELVE, "--parallel.mode", "fsdp", "--model.dropout", "0.1", "--resume"),
        ],
    }  # fmt: skip
    for ranks, plan in plans.items():
        done = torchrun(ranks, "runs", json.dumps(plan))
        assert done.returncode == 0, done.stderr[-6000:]
    one = job("handed", *handed)["arguments"]
    trainer = run(one, resume=True)
    step, stop = trainer._train_step, 8

    def stop_there():
        step()
        if trainer.state.step == stop:
            os.kill(os.getpid(), signal.SIGTERM)

    trainer._train_step = stop_there
    with pytest.raises(Interrupted):
        trainer.train()
    done = torchrun(3, "runs", json.dumps([job("handed", *handed, "--resume", "--parallel.mode", "fsdp")]))
    assert done.returncode == 0, done.stderr[-6000:]
    return folder, small


def close(a, b):
    assert len(a) == len(b)
    for mine, other in zip(a, b, strict=True):
        assert mine == pytest.approx(other, rel=1e-5, abs=1e-5)


def test_losses_and_masks_are_those_of_one_process(legs, monkeypatch):
    """20 steps in fp32 on 1, 2 and 4 ranks, DDP, FSDP and HSDP, with other micro-batches, gathering again and computing again."""
    from atat_fast.training import loss as objective

    folder, small = legs
    seen, hide = {}, objective.hide_for_training

    def record(tokens, config, **options):
        masked = hide(tokens, config, **options)
        for i, row in enumerate((masked.noisy != tokens).int().tolist()):
            seen[f"{options['step']}/{options['first'] + i}"] = row
        return masked

    monkeypatch.setattr(objective, "hide_for_training", record)
    run([*small, *TWENTY, "--run.name", "one"]).train()
    losses, evaluations = numbers(folder / "runs" / "one")
    assert len(losses) == 10 and len(seen) == 20 * 12
    for name in WAYS:
        mine, mine_evaluated = numbers(folder / "runs" / name)
        close([row[:2] for row in mine], [row[:2] for row in losses])
        close(mine_evaluated, evaluations)
        assert json.loads((folder / f"{name}.json").read_text()) == seen, name


def test_the_estimator_is_trained_alike(legs):
    """Importance, its estimator and curriculum, tied embeddings, time conditioning and documents: on two ranks as on one."""
    folder, small = legs
    run([*small, *TWELVE, *ATAT, "--run.name", "atat-one"]).train()
    rows = {}
    for name in ("atat-one", "atat-ddp", "atat-fsdp"):
        text = (folder / "runs" / name / "metrics.jsonl").read_text()
        rows[name] = [row for row in map(json.loads, text.splitlines()) if row["kind"] in ("train", "eval")]
    for name in ("atat-ddp", "atat-fsdp"):
        for mine, one in zip(rows[name], rows["atat-one"], strict=True):
            for key in ("loss", "nll", "importance_loss", "importance_score", "importance_target"):
                if one.get(key) is not None:
                    assert mine[key] == pytest.approx(one[key], rel=2e-4), (name, one["step"], key)
            if "reliability" in one:
                assert sum(mine["reliability"]["count"]) == sum(one["reliability"]["count"])
        saved = checkpoint.find(folder / "runs" / name)
        assert saved.sharded and checkpoint.load_importance(saved) is not None
        assert (folder / "runs" / name / "importance.json").is_file()


def test_compiled_blocks_that_are_sharded_and_computed_again_give_the_same_losses(legs):
    folder, small = legs
    run([*small, *COMPILED, "--parallel.activation_checkpointing", "0", "--run.name", "eager"]).train()
    for mine, one in zip(*(numbers(folder / "runs" / name)[0] for name in ("compiled", "eager")), strict=True):
        assert mine == pytest.approx(one, rel=1e-4)
    assert json.loads((folder / "runs" / "compiled" / "run.json").read_text())["compile"] is True


def test_a_run_goes_from_four_ranks_to_two_to_one_to_three(legs, capsys):
    """Each leg reads what another number of ranks wrote; together they are the run that nobody stopped."""
    folder, small = legs
    run([*small, *TWELVE, "--run.name", "unbroken"]).train()
    for mine, one in zip(numbers(folder / "runs" / "handed"), numbers(folder / "runs" / "unbroken"), strict=True):
        assert [row[0] for row in mine] == [row[0] for row in one]
        close([row[1:] for row in mine], [row[1:] for row in one])
    saved = checkpoint.find(folder / "runs" / "handed")
    assert saved.manifest["ranks"] == 3 and saved.step == 12
    whole = checkpoint.find(folder / "runs" / "unbroken")
    for name in (checkpoint.WEIGHTS, checkpoint.EMA, checkpoint.OPTIMIZER):
        mine, one = saved.tensors(name), whole.tensors(name)
        assert {key: value.shape for key, value in mine.items()} == {key: value.shape for key, value in one.items()}
    assert not [f for f in saved.path.rglob("*") if f.is_file() and f.suffix not in (".safetensors", ".json")]
    last = folder / "runs" / "handed"
    assert evaluate.main(["--run", str(last), "--checkpoint", "last", "--sequences", "8", "--dtype", "fp32"]) == 0
    assert f"{numbers(last)[1][-1][1]:.4f}" in capsys.readouterr().out
    assert sample.main(["--run", str(last), "--steps", "3"]) == 0


def test_a_resumed_run_on_as_many_ranks_is_the_uninterrupted_one(legs):
    """Bit for bit, with dropout on; and its checkpoints' sizes and times are in the log."""
    folder, _ = legs
    assert numbers(folder / "runs" / "stopped") == numbers(folder / "runs" / "again")
    rows = [json.loads(line) for line in (folder / "runs" / "again" / "metrics.jsonl").read_text().splitlines()]
    written = {row["step"]: row for row in rows if row["kind"] == "checkpoint"}
    assert set(written) == {6, 12}
    for row in written.values():
        assert row["bytes"] > 1000 and 0 <= row["blocked"] <= row["seconds"]
    facts = json.loads((folder / "runs" / "again" / "run.json").read_text())
    assert facts["ranks"] == 2 and facts["parallel"].startswith("fsdp over 2 ranks")
    model = folder / "runs" / "again" / "model"
    from atat_fast.models import DiT

    exported = DiT.from_pretrained(model)
    averaged = checkpoint.find(folder / "runs" / "again", "best").tensors(checkpoint.EMA)
    assert all((p == averaged[name]).all() for name, p in exported.named_parameters())


def test_gradients_updates_precisions_and_words_between_ranks(tmp_path, torchrun):
    done = torchrun(2, "parts", tmp_path)
    assert done.returncode == 0, done.stderr[-6000:]
