"""What the ranks of a test do. torchrun runs this file once for each, rank_cases.py CASE ARGUMENTS; forked_ranks.py forks them.

Cases that begin with `command` are the train command, with something that goes wrong on one rank.
"""

from __future__ import annotations

import dataclasses
import errno
import functools
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._dynamo.utils import counters
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.tensor import Shard, distribute_tensor

from atat_fast import cli, train
from atat_fast.config import Config, ModelConfig, OptimConfig
from atat_fast.distributed.fit import Layout
from atat_fast.distributed.ranks import Launch, Ranks
from atat_fast.distributed.tensors import local, whole
from atat_fast.distributed.wrap import Parallel
from atat_fast.errors import UsageError
from atat_fast.models.dit import DiT
from atat_fast.runs import checkpoint, shards
from atat_fast.runs.saver import Saver
from atat_fast.runs.telemetry import Telemetry
from atat_fast.training import loss as objective
from atat_fast.training import step
from atat_fast.training.optimizers import Average, Optimizers
from atat_fast.training.optimizers.muon import Muon
from atat_fast.training.stops import Diverged, Interrupted
from atat_fast.training.trainer import Trainer

RANK = int(os.environ["RANK"])
ATTEMPT = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
EAGER = "aot_eager_decomp_partition"


def trainer(arguments: Sequence[str], ranks: Ranks, resume: bool = False) -> Trainer:
    config, _ = cli.parse_config(cli.make_parser(), arguments)
    return Trainer(config, resume=resume, show_progress=False, ranks=ranks)


def runs(plan: str) -> None:
    """Several runs one after another, in one group. plan: JSON list of {arguments, resume, stop (a step, or 0), masks, graphs,
    memory}. masks and graphs are files for the masks, and for each rank's numbers of graphs that were traced and compiled; memory
    starts the run only. Compiled runs have their graphs traced, joined with their backwards and cut, but no code generated.
    """
    ranks = Ranks.start("cpu", 60)
    compile_ = torch.compile
    torch.compile = lambda module, **_: compile_(module, backend=EAGER)  # type: ignore[assignment]
    hide, stage = objective.hide_for_training, shards.stage
    for job in json.loads(plan):
        if job["memory"]:
            memory(ranks, job["arguments"])
            continue
        seen: dict[str, list[int]] = {}

        def record(tokens, config, seen=seen, **options):
            masked = hide(tokens, config, **options)
            for i, row in enumerate((masked.noisy != tokens).int().tolist()):
                seen[f"{options['step']}/{options['first'] + i}"] = row
            return masked

        objective.hide_for_training = record
        counters.clear()
        staged: list[int] = []
        shards.stage = lambda tensors, staged=staged: staged.append(len(tensors)) or stage(tensors)  # type: ignore[func-returns-value]
        run = trainer(job["arguments"], ranks, job["resume"])

        def stop_there(run=run, step=run._train_step, job=job) -> None:
            step()
            if run.state.step == job["stop"] and ranks.size - 1 == RANK:  # one rank hears of it
                os.kill(os.getpid(), signal.SIGTERM)

        run._train_step = stop_there
        try:
            run.train()
            code = 0
        except Interrupted as caught:
            code = caught.code
        assert code == (143 if job["stop"] else 0)
        assert bool(staged) == (run.parts.parallel.sharded or ranks.first)  # under ddp rank 0 alone copies and writes
        everyone = ranks.gather(seen)
        if ranks.first and job["masks"]:
            Path(job["masks"]).write_text(json.dumps({key: row for part in everyone for key, row in part.items()}))
        made = ranks.gather([counters["stats"]["unique_graphs"], counters["aot_autograd"]["total"]])
        if ranks.first and job["graphs"]:
            Path(job["graphs"]).write_text(json.dumps(made))
    ranks.leave()


def raised(kind: type[BaseException], what: Callable[[], Any]) -> str:
    try:
        what()
    except kind as error:
        return str(error)
    raise AssertionError(f"it raised no {kind.__name__}")


refused = functools.partial(raised, UsageError)


def parts(folder: str) -> None:
    """The pieces: updates, precisions, groups, and what is refused."""
    ranks = Ranks.start("cpu", 60)
    muon(ranks)
    precisions(ranks)
    scalars(ranks, Path(folder))
    same_and_agree(ranks)
    ranks.leave()


def model() -> DiT:
    torch.manual_seed(0)
    made = DiT(11, 10, dim=16, layers=3, heads=2, length=12, dropout=0.0, qk_norm=True)
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return made


def loss_of(made: DiT, first: int, last: int) -> torch.Tensor:
    """The loss of sequences first .. last - 1 of a batch of 4, as a share of the mean over all of its hidden tokens."""
    make = torch.Generator().manual_seed(5)
    noisy, target = torch.randint(0, 11, (4, 12), generator=make), torch.randint(0, 10, (4, 6), generator=make)
    count = last - first
    rows, weights = torch.arange(0, 12 * count, 2), torch.full((6 * count,), 1 / 24)
    return made(noisy[first:last], rows, target[first:last].flatten(), weights)[0]


def memory(ranks: Ranks, arguments: Sequence[str]) -> None:
    """A sharded run holds its part of weights and average when it starts, and never held a whole model."""

    from timing import peak_resident_bytes as peak

    trainer([*arguments, "--model.dim=16", "--run.name=narrow"], ranks).close()
    before = peak()
    run = trainer(arguments, ranks)
    run.close()
    held = sum(local(t).nbytes for t in [*run.parts.model.parameters(), *run.parts.average.values.values()])
    whole_model = sum(4 * p.numel() for p in run.parts.model.parameters())
    assert 50 << 20 < held < 0.6 * whole_model and peak() - before < whole_model, (held, peak() - before)


def muon(ranks: Ranks) -> None:
    """Three updates of sharded matrices, wide, tall, uneven and of fewer rows than ranks, are torch.optim.Muon's; each rank makes
    some of them orthogonal, and no rank all.
    """
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (ranks.size,))
    torch.manual_seed(1)
    shapes = [(8, 24)] * 3 + [(24, 8)] * 4 + [(25, 8), (7, 7), (1, 5), (9, 9)]
    plain = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    split = [torch.nn.Parameter(distribute_tensor(p.detach().clone(), mesh, [Shard(0)])) for p in plain]
    options: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.2}
    one, many = torch.optim.Muon(plain, adjust_lr_fn="match_rms_adamw", **options), Muon(split, dtype=torch.bfloat16, **options)
    made: list[int] = []
    orthogonal = many._orthogonal
    many._orthogonal = lambda updates: made.append(len(updates)) or orthogonal(updates)  # type: ignore[method-assign]
    for _ in range(3):
        for p, q in zip(plain, split, strict=True):
            p.grad = torch.randn(p.shape)
            q.grad = distribute_tensor(p.grad.clone(), mesh, [Shard(0)])
        one.step()
        many.step()
    for p, q in zip(plain, split, strict=True):
        torch.testing.assert_close(whole(q), p.detach(), rtol=1e-5, atol=1e-5)
        assert ranks.size == 1 or p.shape[0] == 1 or local(many.state[q]["momentum_buffer"]).numel() < p.numel()
    assert ranks.total(torch.tensor([float(sum(made))], dtype=torch.float64)).item() == 3 * len(shapes)
    assert ranks.size == 1 or sum(made) < 3 * len(shapes)


def precisions(ranks: Ranks) -> None:
    """Gathered in bf16, reduced in bf16: close to fp32, and the masters stay fp32."""
    alone = model()
    loss_of(alone, 0, 4).backward()
    sharded = Layout("fsdp", ranks.size, ranks.size, keep_gathered=False)
    ddp = Layout("ddp", ranks.size, 1, sums="bf16")
    for layout in (dataclasses.replace(sharded, gathers="bf16"), dataclasses.replace(sharded, sums="bf16"), ddp):
        made = model()
        parallel = Parallel(made, None, layout, ranks.size, "cpu")
        first, last = (4 * r // ranks.size for r in (ranks.rank, ranks.rank + 1))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = parallel.inside(functools.partial(loss_of, made, first, last))
        parallel.backward(loss)
        for (name, p), q in zip(made.named_parameters(), alone.named_parameters(), strict=True):
            assert p.dtype is torch.float32 and p.grad.dtype is torch.float32
            away = (whole(p.grad) - q[1].grad).norm() / q[1].grad.norm().clamp(min=1e-3)
            assert away < 0.1, (layout.wire, name, away)


def scalars(ranks: Ranks, folder: Path) -> None:
    """Shards hold numbers, replicated and sharded tensors, and give them back to ranks and to one process alone."""
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (ranks.size,))
    full = torch.arange(21.0).view(7, 3)
    tensors = {"a": distribute_tensor(full, mesh, [Shard(0)]), "b/step": torch.tensor(5.0), "c": torch.arange(3.0)}
    tensors["codes"] = torch.tensor([0, 1, 254, 255], dtype=torch.uint8)
    staged = shards.stage(tensors)
    local(tensors["a"]).zero_()  # what changes afterwards is not written
    shards.write(folder / "shards", staged, ranks.disk)
    ranks.barrier()
    layout = shards.layout(folder / "shards")
    assert {key: tuple(kind.shape) for key, kind in layout.items()} == {"a": (7, 3), "b/step": (), "c": (3,), "codes": (4,)}
    assert layout["codes"].dtype is torch.uint8 and layout["a"].dtype is torch.float32
    back = {"a": distribute_tensor(torch.zeros(7, 3), mesh, [Shard(0)]), "b/step": torch.zeros(())}
    shards.read(folder / "shards", back, ranks.control)
    assert torch.equal(whole(back["a"]), full) and back["b/step"] == 5
    alone = {"a": torch.zeros(7, 3), "c": torch.zeros(3), "codes": torch.zeros(4, dtype=torch.uint8)}
    shards.read(folder / "shards", alone)
    for name, value in (("a", full), ("c", tensors["c"]), ("codes", tensors["codes"])):
        assert torch.equal(alone[name], value)
    assert not [f for f in (folder / "shards").iterdir() if f.suffix != ".safetensors"]


def same_and_agree(ranks: Ranks) -> None:
    text = refused(lambda: ranks.require_same("settings", {"train.seed": RANK}))
    assert text == "rank 1 has train.seed 1 where rank 0 has 0; start all ranks with the same settings"

    def bad() -> None:
        with ranks.agree():
            if RANK == 1:
                raise UsageError("there is no such file")

    assert refused(bad) == "rank 1: there is no such file"
    assert [ranks.vote(RANK), ranks.vote(0), ranks.last_vote()] == [0, 1, 0]
    assert ranks.total(torch.tensor([1.0, RANK])).tolist() == [2.0, 1.0]


def refusals(*arguments: str) -> None:
    """What differs between ranks, and fewer cards than ranks, is the same sentence on all of them, before a folder is made."""
    told, torch.cuda.device_count = torch.cuda.device_count, lambda: 1
    text = refused(lambda: Ranks.start("cuda", 60))
    assert text.startswith("2 ranks were started on ") and "which has 1 CUDA device(s); use --nproc-per-node=1" in text
    torch.cuda.device_count = told
    dist.destroy_process_group()
    ranks = Ranks.start("cpu", 60, dataclasses.replace(Launch.of(), restarts=1))
    cases = {
        "--train.seed=7": "rank 1 has train.seed 7 where rank 0 has 1; start all ranks with the same settings",
        "--data.corpus=nowhere.txt": "rank 1 has data.corpus nowhere.txt",
    }
    for option, begin in cases.items():
        text = refused(lambda option=option: trainer([*arguments, *([option] if RANK == 1 else [])], ranks))
        assert text.startswith(begin)
    os.chdir(f"host{RANK}")  # another text under the same path
    text = refused(lambda: trainer([*arguments, "--data.corpus=text.jsonl", "--data.cache_dir=cache"], ranks))
    assert text.startswith("rank 1 has ") and text.endswith("; start all ranks with the same data")
    ranks.leave()


def stops(plain: str, poisoned: str, full: str) -> None:
    """A run that nothing happens to, one whose loss is NaN on rank 1 in step 5, one whose disk is full on rank 1 in step 8.

    The arguments of each as JSON. All ranks stop with the same words.
    """
    ranks = Ranks.start("cpu", 60)
    trainer(json.loads(plain), ranks).train()

    run = trainer(json.loads(poisoned), ranks)
    loss = run.parts.objective.loss_of

    def poison(*rest: Any, **more: Any) -> Any:
        value, parts = loss(*rest, **more)
        if RANK == 1 and run.state.step == 4:
            return value * torch.nan, parts | {"diffusion": parts["diffusion"] * torch.nan}
        return value, parts

    run.parts.objective.loss_of = poison  # type: ignore[method-assign]
    text = raised(Diverged, run.train)
    assert "is not finite at step 5 (rank 1); the last good checkpoint is" in text and "(step 4)" in text, text
    assert set(ranks.gather(text)) == {text}

    create = FileSystem.create_stream

    def no_room(self: FileSystem, path: Any, mode: str) -> Any:
        if RANK == 1 and "step-00000008" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return create(self, path, mode)

    FileSystem.create_stream = no_room  # type: ignore[method-assign]
    run = trainer(json.loads(full), ranks)
    text = refused(run.train)
    assert text.startswith("cannot write to ") and text.endswith("checkpoints: No space left on device (rank 1)"), text
    assert set(ranks.gather(text)) == {text} and run.state.step < 12
    ranks.leave()


def command(*arguments: str) -> None:
    cli.run_command(train.main, arguments)


def command_killed(kills: str, *arguments: str) -> None:
    """kill -9 of one rank, each time another one at another place: so often in the middle of a step, then as often in the middle
    of a save, then no more.
    """
    in_a_step = ((Parallel, "backward"), (Parallel, "clip"), (Average, "update"))  # before, between and after the weights move
    in_a_save = ((shards, "stage"), (shards, "write"), (checkpoint, "fingerprint"), (Saver, "_complete"))
    places, nth = (in_a_step, 4) if int(kills) > ATTEMPT else (in_a_save, 2)
    if 2 * int(kills) > ATTEMPT and ATTEMPT % 2 == RANK:
        place, name = places[ATTEMPT % len(places)]
        call, calls = getattr(place, name), []

        def die(*given: Any, **more: Any) -> Any:
            calls.extend([name] * (name != "fingerprint" or "/.step-" in str(given[0])))  # not of files that are read
            if len(calls) == nth:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*given, **more)

        setattr(place, name, die)
    command(*arguments)


def command_apart(folder: str, *arguments: str) -> None:
    """The ranks run in different folders, as on two hosts that share none."""
    os.chdir(Path(folder) / f"host{RANK}")
    command(*arguments)


def command_raised(*arguments: str) -> None:
    """Rank 1 raises in step 3, which no code expects. The launcher ends rank 0 while that closes, which takes it a while."""
    read, close = step.read_batch, Telemetry.close

    def broken(parts: Any, number: int, slot: int) -> Any:
        if RANK == 1 and number == 2:
            raise LookupError("broken on purpose")
        return read(parts, number, slot)

    def slow(self: Telemetry) -> None:
        time.sleep(0 if RANK else 2)
        close(self)

    step.read_batch, Telemetry.close = broken, slow  # type: ignore[method-assign]
    command(*arguments)


def command_hung(*arguments: str) -> None:
    """Rank 1 does nothing any more in step 4."""
    read = step.read_batch

    def hang(parts: Any, number: int, slot: int) -> Any:
        if RANK == 1 and number == 3:
            print("rank 1 hangs", flush=True)
            time.sleep(600)
        return read(parts, number, slot)

    step.read_batch = hang
    command(*arguments)


def held_and_sent(file: str) -> None:
    """What two ranks really hold and send in a step of three passes, by kind, under each layout; to a JSON file."""
    from wire import Wire

    ranks = Ranks.start("cpu", 60)

    def size(tensors: Any) -> int:
        return sum(local(t).nbytes for t in tensors)

    fsdp = Layout("fsdp", 2, 2)
    freed, small = dataclasses.replace(fsdp, keep_gathered=False), dataclasses.replace(fsdp, gathers="bf16", sums="bf16")
    found = []
    for layout in (Layout("ddp", 2, 1), Layout("ddp", 2, 1, sums="bf16"), fsdp, freed, small):
        torch.manual_seed(0)
        config = Config(model=ModelConfig(dim=32, layers=4, heads=2, length=16, dropout=0.0), optim=OptimConfig(name="muon"))
        made = DiT(67, 66, **vars(config.model))
        parallel = Parallel(made, None, layout, 2, "cpu")
        optimizers, average = Optimizers(made, config.optim), Average(made, 0.9)
        tokens, rows = torch.randint(0, 66, (2, 16)), torch.arange(0, 32, 2)
        given = (tokens, rows, tokens.flatten()[rows], torch.ones(len(rows)))

        def passes(parallel: Parallel = parallel, made: DiT = made, given: Any = given) -> list[torch.Tensor]:
            made.zero_grad(set_to_none=True)
            for i in range(3):
                with parallel.accumulating(last=i == 2):
                    with torch.autocast("cpu", torch.bfloat16, enabled=parallel.layout.gathers == "bf16"):
                        loss = parallel.inside(lambda: made(*given)[0])
                    parallel.backward(loss)
            return [local(p.grad).clone() for p in made.parameters() if p.grad is not None]

        kept, parallel._kept = parallel._kept, []  # gathered anew in every pass, as torch does by default
        want, parallel._kept = passes(), kept
        held = {"parameters": size(made.parameters()), "average": size(average.values.values())}
        with Wire() as wire:
            same = all(torch.equal(a, b) for a, b in zip(want, passes(), strict=True))
            held["gradients"] = size(p.grad for p in made.parameters() if p.grad is not None)
            optimizers.step(1e-3)
        held["optimizer"] = size(t for name, t in optimizers.state().items() if not name.endswith("/step"))
        found.append({"layout": dataclasses.asdict(layout), "held": held, "sent": wire.sent, "same": same})
    if ranks.first:
        Path(file).write_text(json.dumps(found))
    ranks.leave()


def accelerated(file: str) -> None:
    """Losses and gradients of a BERT under DDP, of its own forward and of hidden rows alone, and of a bound."""
    import masked_lms

    from atat_fast.models.accelerate import accelerate, masked_diffusion_loss

    class Bound(torch.nn.Module):
        """DDP calls a forward, so the loss is one."""

        def __init__(self, network: torch.nn.Module) -> None:
            super().__init__()
            self.network = network

        def forward(self, *arguments: Any, **more: Any) -> torch.Tensor:
            return masked_diffusion_loss(self.network, *arguments, mask_id=masked_lms.MASK, seed=1, step=2, **more)

    ranks = Ranks.start("cpu", 60)
    torch.manual_seed(3)
    inputs = masked_lms.batch(rows=4)
    own = slice(2 * RANK, 2 * RANK + 2)
    part = {name: value[own] for name, value in inputs.items()}
    found: dict[str, Any] = {}
    for name in ("plain", "fast", "bound"):
        made = masked_lms.make("BERT")
        if name != "plain":
            accelerate(made)
        wrapped = torch.nn.parallel.DistributedDataParallel(Bound(made) if name == "bound" else made)
        if name == "bound":
            lengths = inputs["attention_mask"].sum(1)
            mask = part["attention_mask"]
            loss = wrapped(part["input_ids"], first=2 * RANK, total=4, attention_mask=mask, lengths=lengths)
        else:
            loss = wrapped(**part).loss
        loss.backward()
        found[name] = [float(loss), [p.grad.flatten().tolist() for p in made.parameters()]]
    loss = masked_diffusion_loss(
        accelerate(masked_lms.make("BERT")),
        inputs["input_ids"],
        mask_id=masked_lms.MASK,
        seed=1,
        step=2,
        attention_mask=inputs["attention_mask"],
    )
    found["whole"] = [float(loss), []]
    found["bounds"] = ranks.total(torch.tensor([found["bound"][0]])).tolist()
    if RANK == 0:
        Path(file).write_text(json.dumps(found))
    ranks.leave()


def find_scripts() -> None:
    """Modules of bench/ and tests/helpers, folders of scripts, can be imported."""
    sys.path.extend(str(Path(__file__).resolve().parents[2] / folder) for folder in ("bench", "tests/helpers"))


if __name__ == "__main__":
    find_scripts()
    globals()[sys.argv[1]](*sys.argv[2:])
