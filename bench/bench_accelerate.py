"""A training step of transformers' masked language models, before and after accelerate(), and its head and loss alone.

    python bench/bench_accelerate.py [--models modernbert bert llada] [--parts head step] [--rounds 5] [--out FOLDER]

Random weights and tokens at the sizes of ModernBERT-base (30 % of the tokens hidden), BERT-base (15 %), and a decoder like
LLaDA's (half of them, 126,464 ids, small otherwise). Ways to the same loss, in turn, in one process:

    transformers     the class's own forward: logits of every token
    rows first       what one can write by hand: the backbone's hidden rows, then the class's head and torch's cross entropy
    liger, cce       their fused losses in place of the class's, on all rows, where they can run (bench/peers.py)
    atat_fast        accelerate(model)

`head` gives each way the backbone's last hidden states; `step` is forward and backward of everything. Losses and gradients must
agree first. Memory is the most that one call adds, gradients included: on a CPU that of a fresh process.
"""

from __future__ import annotations

import argparse
import functools
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))  # bench/ is a folder of scripts, not a package

from peers import linear_cross_entropy_missing, linear_cross_entropy_peers
from timing import added_at_peak, interleaved, spread, synchronize, write_record

from atat_fast.config import TrainConfig
from atat_fast.errors import UsageError, nearest
from atat_fast.hardware.compute import Compute, environment, resolve
from atat_fast.models.accelerate import accelerate, restore

PARTS = ("head", "step")
FOREIGN = ("liger", "cce")


@dataclass(frozen=True)
class Case:
    """A model's sizes, and a batch: sequences, their length, the share that is hidden."""

    name: str
    family: str
    settings: dict[str, Any]
    batch: int
    length: int
    share: float
    transform: str  # the module between backbone and head, or ''

    def small(self) -> Case:
        """The same in little, for tests."""
        little = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 8, "intermediate_size": 64}
        return replace(self, settings=self.settings | little | {"vocab_size": 999}, batch=2, length=16)

    def model(self) -> Any:
        """The class with seeded weights, in training mode, without dropout."""
        import transformers

        torch.manual_seed(0)
        ids = {f"{name}_token_id": i for i, name in enumerate(("pad", "bos", "eos", "mask", "cls", "sep"))}
        config = getattr(transformers, f"{self.family}Config")(**self.settings, **ids)
        return getattr(transformers, f"{self.family}ForMaskedLM")(config).train()


NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
DECODER = {
    "hidden_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "intermediate_size": 1536,
}
CASES = {
    case.name: case
    for case in (
        Case("modernbert", "ModernBert", {"vocab_size": 50_368}, 8, 512, 0.30, "head"),
        Case("bert", "Bert", {"vocab_size": 30_522, **NO_DROPOUT}, 8, 128, 0.15, "cls.predictions.transform"),
        Case("llada", "EuroBert", {"vocab_size": 126_464, **DECODER}, 2, 256, 0.50, ""),
    )
}


class Bench:
    """One case's model and batch, and every way to its loss."""

    def __init__(self, case: Case, part: str, compute: Compute) -> None:
        self.case, self.part, self.compute = case, part, compute
        self.model = case.model().to(compute.device)
        generator = torch.Generator().manual_seed(1)
        shape = (case.batch, case.length)
        ids = torch.randint(4, case.settings["vocab_size"], shape, generator=generator)
        hidden = torch.zeros(ids.numel(), dtype=torch.bool)
        hidden[torch.randperm(ids.numel(), generator=generator)[: round(case.share * ids.numel())]] = True
        self.labels = torch.where(hidden.view(shape), ids, -100).to(compute.device)
        self.ids = ids.masked_fill(hidden.view(shape), 3).to(compute.device)
        self.peers = {name: peer for name, peer in linear_cross_entropy_peers(compute.device).items() if name in FOREIGN}
        if part == "head":
            from transformers.modeling_outputs import BaseModelOutput

            width = self.model.config.hidden_size
            states = torch.randn(*shape, width, generator=generator).to(compute.device).requires_grad_()
            self.states: Tensor | None = states
            self.model.base_model.forward = lambda *args, **more: BaseModelOutput(last_hidden_state=states)
        else:
            self.states = None

    @property
    def ways(self) -> list[str]:
        """Every way that can run here; the first is the class's own."""
        return ["transformers", "rows first", *self.peers, "atat_fast"]

    def loss(self, way: str) -> Tensor:
        """The mean of -log p over hidden tokens."""
        if way == "transformers":
            return self.model(input_ids=self.ids, labels=self.labels).loss  # type: ignore[no-any-return]
        if way == "atat_fast":
            accelerate(self.model, check=False)
            try:
                return self.model(input_ids=self.ids, labels=self.labels).loss  # type: ignore[no-any-return]
            finally:
                restore(self.model)
        states = self.model.base_model(input_ids=self.ids)[0].flatten(0, 1)
        labels, head = self.labels.flatten(), self.model.get_output_embeddings()
        transform: Callable[[Tensor], Tensor] = torch.nn.Identity()
        if self.case.transform:
            transform = self.model.get_submodule(self.case.transform)
        rows = (labels != -100).nonzero()[:, 0]
        if way == "rows first":
            return F.cross_entropy(head(transform(states[rows])), labels[rows])
        x = transform(states)
        return self.peers[way].call(x.to(self.compute.dtype), head.weight, labels, head.bias, None) / len(rows)

    def step(self, way: str) -> Tensor:
        """The loss; gradients are in the parameters."""
        for p in self.model.parameters():
            p.grad = None
        with self.compute.autocast():
            loss = self.loss(way)
        loss.backward()
        return loss.detach()

    def check(self) -> float:
        """The largest difference of a way's loss or gradient from the class's own, relative to its size. Raises RuntimeError."""
        worst, want = 0.0, None
        for way in self.ways:
            loss = self.step(way)
            got = [loss.float(), *(p.grad.float() for p in self.model.parameters() if p.grad is not None)]
            want = want or [g.clone() for g in got]
            whole = float(torch.cat([g.flatten() for g in want[1:]]).norm())  # some gradients, as of a key's bias, are rounding
            errors = [float((a - b).norm() / b.norm().clamp(min=1e-2 * whole)) for a, b in zip(got, want, strict=True)]
            if not max(errors) < (8e-2 if self.compute.dtype is torch.bfloat16 else 1e-3):
                raise RuntimeError(f"{way} differs from {self.ways[0]}: its loss or a gradient by {max(errors):.1e} of its size")
            worst = max(worst, *errors)
        return worst


def memory(bench: Bench, way: str, small: bool) -> int:
    """Bytes that one call adds at its peak."""
    device = bench.compute.device
    if device.type == "cuda":
        for p in bench.model.parameters():
            p.grad = None
        synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        bench.step(way)
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    command = [sys.executable, __file__, "--memory_of", way, "--models", bench.case.name, "--parts", bench.part]
    done = subprocess.run([*command, *["--small"][:small]], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def measure(args: argparse.Namespace) -> int:
    """Check, time, print, write."""
    for name in args.models:
        if name not in CASES:
            raise UsageError(f"--models {name!r} is unknown{nearest(name, CASES)}; choose {', '.join(CASES)}")
    if args.rounds < 1:
        raise UsageError(f"--rounds must be at least 1, got {args.rounds}")
    compute = resolve(TrainConfig())
    cases = [CASES[name].small() if args.small else CASES[name] for name in args.models]
    if args.memory_of:
        bench = Bench(cases[0], args.parts[0], compute)
        print(added_at_peak(lambda: bench.step(args.memory_of)))
        return 0
    rows: list[dict[str, Any]] = []
    print(compute.describe())
    for case in cases:
        for part in args.parts:
            bench = Bench(case, part, compute)
            agreement = bench.check()
            calls = {way: functools.partial(bench.step, way) for way in bench.ways}
            taken = interleaved(calls, compute.device, args.rounds)
            print(f"{case.name}, {part}: {case.batch} x {case.length} tokens, {case.share:.0%} hidden; agree to {agreement:.1e}")
            for way in bench.ways:
                ratios = spread([a / b for a, b in zip(taken[bench.ways[0]], taken[way], strict=True)])
                row = {
                    "model": case.name, "part": part, "way": way, "batch": case.batch, "length": case.length, "share": case.share,
                    "vocabulary": case.settings["vocab_size"], "agreement": agreement, "ms": spread(taken[way])[1] * 1e3,
                    "ratio": ratios[1], "ratio_low": ratios[0], "ratio_high": ratios[2], "bytes": memory(bench, way, args.small),
                }  # fmt: skip
                rows.append(row)
                print(f"  {way:<14}{row['ms']:>9.1f} ms  {ratios[1]:>6.2f} times as fast{row['bytes'] / 2**20:>9.0f} MiB")
    record = {
        "benchmark": "accelerate", "rounds": args.rounds, "results": rows, "environment": environment(compute),
        "missing": {name: why for name, why in linear_cross_entropy_missing(compute.device).items() if name in FOREIGN},
    }  # fmt: skip
    write_record(record, compute.device, args.out)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, measure; status 2 on bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(CASES), help=f"of {', '.join(CASES)}")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what is timed")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds")
    parser.add_argument("--small", action="store_true", help="tiny sizes, to try the script")
    parser.add_argument("--out", type=Path, default=None, help="folder for the JSON; bench/results/<device> by default")
    parser.add_argument("--memory_of", help=argparse.SUPPRESS)
    try:
        return measure(parser.parse_args(arguments))
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
