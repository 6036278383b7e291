"""The same run on other ranks: masks, losses, gradients, updates and checkpoints do not depend on how many there are."""

from __future__ import annotations

import json

import pytest

from atat_fast import evaluate, sample
from atat_fast.models import DiT
from atat_fast.runs import checkpoint
from atat_fast.training import loss as objective
from atat_fast.training.stops import Interrupted

MODEL = {
    "model.layers": 2, "model.dropout": 0, "model.qk_norm": True, "train.dtype": "fp32", "optim.name": "adamw",
    "optim.lr": 2e-3, "sample.num_samples": 0, "train.global_batch": 12,
}  # fmt: skip
GAPS = {"diffusion.gap_power": 0.5}
TWENTY = MODEL | GAPS | {"train.max_steps": 20, "train.log_every": 2, "eval.every": 20, "diffusion.spread": 0.5}
TWELVE = MODEL | GAPS | {"train.max_steps": 12, "train.log_every": 1, "eval.every": 6}
ATAT = TWELVE | {
    "importance.source": "learned", "importance.width": 16, "importance.heads": 2, "importance.layers": 1,
    "diffusion.weighting": "importance", "curriculum.kind": "linear", "model.tie_embeddings": True,
    "model.document_mask": True, "model.time_conditioning": True,
}  # fmt: skip
COMPILED = ATAT | {
    "train.max_steps": 4, "eval.every": 4, "train.dtype": "bf16", "train.micro_batch": 2, "model.dropout": 0.1, "model.layers": 4,
    "model.document_mask": False, "optim.name": "muon", "importance.reads": "hidden",
}  # fmt: skip
DDP, FSDP = {"parallel.mode": "ddp"}, {"parallel.mode": "fsdp"}
SIX = MODEL | {"train.max_steps": 6, "train.log_every": 1, "eval.every": 6}
BLOCKS = SIX | {"model.block": 4}
PROMPTS = SIX | {
    "data.prompt_column": "prompt", "data.tokenizer": "bytes", "model.document_mask": True, "model.length": 24,
}  # fmt: skip
WIDE = MODEL | FSDP | {"model.dim": 512, "model.layers": 10}
DROPOUT = TWELVE | FSDP | {"model.dropout": 0.1}
AGAIN = "parallel.activation_checkpointing"
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # a busy machine takes its time
WAYS = {
    "two-ddp": (2, DDP | {"train.micro_batch": 2}),
    "two-fsdp": (2, FSDP | {"train.micro_batch": 3, "parallel.reshard_after_forward": "always"}),
    "four-ddp": (4, DDP),
    "four-fsdp": (4, FSDP | {"train.micro_batch": 1, AGAIN: 2}),
    "four-hsdp": (4, {"parallel.mode": "hsdp", "parallel.shard_size": 2}),
}


@pytest.fixture
def numbers(rows):
    """numbers(folder): what its log lines and its evaluations say."""
    return lambda folder: (rows(folder, "train", "step", "loss", "grad_norm"), rows(folder, "eval", "step", "nll", "nll_se"))


def rows_under(folder):
    """A file of prompts and responses of several lengths."""
    path = folder / "rows.jsonl"
    words = ["abcdefghij"[: i % 9 + 2] for i in range(150)]
    path.write_text("".join(json.dumps({"prompt": f"{word} is ", "response": word[::-1]}) + "\n" for word in words))
    return path


@pytest.fixture(scope="module")
def legs(tmp_path_factory, small_at, forked, trainer, arguments):
    """All runs of this file, by a process for each number of ranks: 20 steps each way, and two runs that 4 ranks began: `handed`
    goes on on 2, and `alone` in one process and then on 2.
    """
    folder = tmp_path_factory.mktemp("legs")
    small = small_at(folder)

    def job(name, settings, *, resume=False, stop=0, masks="", graphs="", memory=False):
        places = {"masks": str(masks), "graphs": str(graphs), "memory": memory}
        return {"arguments": arguments(small, settings, {"run.name": name}), "resume": resume, "stop": stop} | places

    def ways(ranks):
        return [job(n, TWENTY | how, masks=folder / f"{n}.json") for n, (count, how) in WAYS.items() if count == ranks]

    of_four = [
        job("wide", WIDE, memory=True),
        *ways(4),
        job("handed", TWELVE | FSDP, stop=3),
        job("alone", TWELVE | FSDP, stop=3),
    ]
    of_two = [
            *ways(2), job("atat-ddp", ATAT | DDP), job("atat-fsdp", ATAT | FSDP),
            *(job(name, TWELVE | FSDP, resume=True) for name in ("handed", "alone")),
            job("compiled-ddp", COMPILED | DDP | {"train.compile": "on"}, graphs=folder / "graphs.json"),
            job("compiled-fsdp", COMPILED | FSDP | {AGAIN: 2, "train.compile": "on"}), job("again", DROPOUT),
            job("stopped", DROPOUT, stop=7), job("stopped", DROPOUT, resume=True), job("blocks", BLOCKS | FSDP),
            job("prompts", PROMPTS | DDP | {"data.corpus": rows_under(folder), "train.micro_batch": 2}),
    ]  # fmt: skip
    for ranks, plan in ((4, of_four), (2, of_two)):
        done = forked(ranks, "runs", json.dumps(plan))
        assert done.returncode == 0, done.stderr[-6000:]
        if ranks == 4:
            with pytest.raises(Interrupted):
                trainer(small, TWELVE, {"run.name": "alone"}, resume=True, stop=7).train()
    return folder, small


def close(a, b):
    for mine, other in zip(a, b, strict=True):
        assert mine == pytest.approx(other, rel=1e-5, abs=1e-5)


def test_losses_and_masks_are_those_of_one_process(legs, trainer, numbers, monkeypatch):
    """20 steps in fp32 on 1, 2 and 4 ranks, DDP, FSDP and HSDP, with other micro-batches, gathering again and computing again."""
    folder, small = legs
    seen, hide = {}, objective.hide_for_training

    def record(tokens, config, **options):
        masked = hide(tokens, config, **options)
        for i, row in enumerate((masked.noisy != tokens).int().tolist()):
            seen[f"{options['step']}/{options['first'] + i}"] = row
        return masked

    monkeypatch.setattr(objective, "hide_for_training", record)
    trainer(small, TWENTY, {"run.name": "one"}).train()
    losses, evaluations = numbers(folder / "runs" / "one")
    assert len(losses) == 10 and len(seen) == 20 * 12
    for name in WAYS:
        mine, mine_evaluated = numbers(folder / "runs" / name)
        close([row[:2] for row in mine], [row[:2] for row in losses])
        assert [row[2] for row in mine] == pytest.approx([row[2] for row in losses], rel=1e-3)  # the gradient's norm
        close(mine_evaluated, evaluations)
        assert json.loads((folder / f"{name}.json").read_text()) == seen, name


@pytest.mark.parametrize(("name", "settings"), [("blocks", BLOCKS), ("prompts", PROMPTS)])
def test_blocks_and_prompts_are_trained_alike(legs, trainer, numbers, name, settings):
    """Counts of all blocks, and lengths of all responses, of the global batch decide on every rank."""
    folder, small = legs
    more = {"data.corpus": rows_under(folder)} if name == "prompts" else {}
    trainer(small, settings | more, {"run.name": f"{name}-one"}).train()
    (losses, evaluations), (mine, mine_evaluated) = (numbers(folder / "runs" / run) for run in (f"{name}-one", name))
    assert len(losses) == 6
    close([row[:2] for row in mine], [row[:2] for row in losses])
    close(mine_evaluated, evaluations)


def test_the_estimator_is_trained_alike(legs, trainer, rows):
    """Importance, its estimator and curriculum, tied embeddings, time conditioning and documents: on two ranks as on one."""
    folder, small = legs
    trainer(small, ATAT, {"run.name": "atat-one"}).train()
    one, ddp, fsdp = (
        [row for kind in ("train", "eval") for row in rows(folder / "runs" / f"atat-{name}", kind)]
        for name in ("one", "ddp", "fsdp")
    )
    for row, *others in zip(one, ddp, fsdp, strict=True):
        for mine in others:
            for key in ("loss", "nll", "importance_loss", "importance_score", "importance_target"):
                if row.get(key) is not None:
                    assert mine[key] == pytest.approx(row[key], rel=2e-4), (row["step"], key)
            if "reliability" in row:
                assert sum(mine["reliability"]["count"]) == sum(row["reliability"]["count"])
    for name in ("atat-ddp", "atat-fsdp"):
        saved = checkpoint.find(folder / "runs" / name)
        assert saved.sharded and checkpoint.load_importance(saved) is not None
        assert (folder / "runs" / name / "importance.json").is_file()


def test_what_presets_do_by_default_is_what_one_rank_does(legs, trainer, rows):
    """ATAT compiled in bf16, with dropout, accumulation and Muon, on two ranks under ddp and fsdp: within 1e-3 of one rank that
    compiles nothing. Blocks share graphs, and nothing cuts a graph in two. tests/models/test_recompute.py compiles to code.
    """
    folder, small = legs
    trainer(small, COMPILED, {"run.name": "eager"}).train()
    want = rows(folder / "runs" / "eager", "train")
    for name in ("compiled-ddp", "compiled-fsdp"):
        assert json.loads((folder / "runs" / name / "run.json").read_text())["compile"] is True
        for mine, one in zip(rows(folder / "runs" / name, "train"), want, strict=True):
            for key in ("loss", "importance_loss", "importance_score"):
                assert mine[key] == pytest.approx(one[key], rel=1e-3), (name, mine["step"], key)
    for traced, compiled in json.loads((folder / "graphs.json").read_text()):
        assert traced == compiled <= 12  # four of a block in training, three in evaluation, and those of the estimator


def test_a_run_goes_from_four_ranks_to_two_or_to_one_and_then_to_two(legs, trainer, numbers, capsys):
    """Each leg reads what another number of ranks wrote; together they are the run that nobody stopped."""
    folder, small = legs
    trainer(small, TWELVE, {"run.name": "unbroken"}).train()
    last, unbroken = folder / "runs" / "alone", folder / "runs" / "unbroken"
    for run in (folder / "runs" / "handed", last):
        for mine, one in zip(numbers(run), numbers(unbroken), strict=True):
            assert [row[0] for row in mine] == [row[0] for row in one]
            close([row[1:] for row in mine], [row[1:] for row in one])
    saved, whole = checkpoint.find(last), checkpoint.find(unbroken)
    assert saved.manifest["ranks"] == 2 and saved.step == 12
    for name in (checkpoint.WEIGHTS, checkpoint.EMA, checkpoint.OPTIMIZER):
        mine, one = ({key: value.shape for key, value in found.tensors(name).items()} for found in (saved, whole))
        assert mine == one
    assert not [f for f in saved.path.rglob("*") if f.is_file() and f.suffix not in (".safetensors", ".json")]
    assert evaluate.main(["--run", str(last), "--checkpoint", "last", "--sequences", "8", "--dtype", "fp32"]) == 0
    assert f"{numbers(last)[1][-1][1]:.4f}" in capsys.readouterr().out
    assert sample.main(["--run", str(last), "--steps", "3"]) == 0


def test_a_resumed_run_on_as_many_ranks_is_the_uninterrupted_one(legs, numbers, rows):
    """Bit for bit, with dropout on; and its checkpoints' sizes and times are in the log."""
    again = legs[0] / "runs" / "again"
    assert numbers(legs[0] / "runs" / "stopped") == numbers(again)
    written = rows(again, "checkpoint")
    assert {row["step"] for row in written} == {6, 12}
    assert all(row["bytes"] > 1000 and 0 <= row["blocked"] <= row["seconds"] for row in written)
    facts = json.loads((again / "run.json").read_text())
    assert facts["ranks"] == 2 and facts["parallel"].startswith("fsdp over 2 ranks")
    averaged = checkpoint.find(again, "best").tensors(checkpoint.EMA)
    assert all((p == averaged[name]).all() for name, p in DiT.from_pretrained(again / "model").named_parameters())


def test_updates_precisions_and_words_between_ranks(tmp_path, forked):
    done = forked(2, "parts", tmp_path)
    assert done.returncode == 0, done.stderr[-6000:]
