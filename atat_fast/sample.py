"""Sample from a run:  python -m atat_fast.sample --run runs/demo [--prompt TEXT] [--infill [TEXT]] [--prompts FILE ...]

    echo "The [MASK] [MASK] of the list is returned." | python -m atat_fast.sample --run runs/demo --infill

docs/sampling.md explains the samplers and options.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from atat_fast.cli import make_parser, path_text, run_command
from atat_fast.config import TrainConfig
from atat_fast.data.text import valid_unicode
from atat_fast.errors import UsageError, check_seed, nearest
from atat_fast.files import check_target, disk_errors, replacing

STDIN = "-"


@dataclass(frozen=True)
class Job:
    """One text to fill: its first ids, and the user's text for the JSONL."""

    start: list[int]
    given: str

    def given_tokens(self, mask_id: int) -> int:
        """Number of tokens up to the last given one."""
        return max((i + 1 for i, token in enumerate(self.start) if token != mask_id), default=0)


def main(arguments: Sequence[str]) -> int:
    """The command. Prints samples. Status 0, or 2 on bad input."""
    args = _parser().parse_args(list(arguments))
    _check(args)

    import torch

    from atat_fast.hardware.compute import resolve
    from atat_fast.runs.loaded import open_model
    from atat_fast.sampling.samplers import SAMPLERS, cut_at_end, sample

    if args.sampler != "auto" and args.sampler not in SAMPLERS:
        known = ("auto", *SAMPLERS)
        raise UsageError(f"there is no sampler {args.sampler!r}{nearest(args.sampler, known)}; choose one of {', '.join(known)}")
    lines = _lines(args)
    scored = args.sampler == "importance" or args.html is not None
    saved = open_model(run=args.run, model=args.model, tokenizer=args.tokenizer, which=args.checkpoint, importance=scored)
    compute = resolve(TrainConfig(device=args.device, dtype=args.dtype, compile="off"), "--")
    model, tokenizer, estimator = saved.model.eval().to(compute.device), saved.reads(), saved.estimator
    scores = None
    if estimator is not None and estimator.network is not None and scored:
        scores = estimator.eval().to(compute.device).scorer(model)
    elif args.sampler == "importance":
        source = "none" if estimator is None else estimator.config.source
        raise UsageError(f"sampler importance needs learned importance, and importance.source of {saved.place} is {source}")
    jobs = _jobs(args, lines, tokenizer, model.config.length)
    count = len(jobs) * args.num_samples
    sampler = args.sampler
    if sampler == "auto":
        sampler = "ancestral" if model.time_conditioning else "ddpm_cache"
    settings = {
        "steps": args.steps,
        "sampler": sampler,
        "temperature": args.temperature,
        "top_k": args.top_k,
        "top_p": args.top_p,
        "seed": args.seed,
        "block": args.block,
        "importance": scores,
        "eta": args.eta,
        "stop_at": tokenizer.eos_id if args.stop_at_end else None,
        "tilt": saved.config.importance.tilt if args.tilt is None else args.tilt,
    }

    begin, filled = time.perf_counter(), 0
    with _output(args) as write, _Progress(args, jobs, tokenizer, model.config.length, model.mask_id, scores) as progress:
        for first in range(0, count, args.batch):
            some = [jobs[i // args.num_samples] for i in range(first, min(first + args.batch, count))]
            longest = max(len(job.start) for job in some)
            tokens = torch.full((len(some), longest), model.mask_id)
            for row, job in enumerate(some):
                tokens[row, : len(job.start)] = torch.tensor(job.start)
            lengths = torch.tensor([len(job.start) for job in some])
            filled += sum(job.start.count(model.mask_id) for job in some)
            tokens = tokens.to(compute.device)
            on_step = progress.batch(first, some, tokens)
            with compute.autocast():
                drawn = sample(
                    model, tokens, sample_ids=torch.arange(first, first + len(some)), lengths=lengths, on_step=on_step, **settings
                ).cpu()
            for row, job in enumerate(some):
                ids = drawn[row, : len(job.start)].tolist()
                if args.stop_at_end:
                    ids = cut_at_end(ids, job.given_tokens(model.mask_id), tokenizer.eos_id)
                write(first + row, count, job, ids, tokenizer, {"sampler": sampler, "run": saved.place})
    seconds = time.perf_counter() - begin
    print(f"{filled:,} tokens in {seconds:.1f} s, {filled / max(seconds, 1e-9):,.1f} tokens/s", file=sys.stderr)
    if args.html is not None:
        facts = {"run": saved.place, "sampler": sampler, "steps": args.steps, "temperature": args.temperature, "seed": args.seed}
        progress.write_html(Path(args.html), facts)
    return 0


def _parser() -> Any:
    parser = make_parser(prog="python -m atat_fast.sample", description="Text from a run's model.")
    parser.add_argument("--run", type=path_text, default=None, help="A run folder, or one of its checkpoints.")
    parser.add_argument("--model", type=path_text, default=None, help="A saved model instead of a run: a folder, or owner/name.")
    parser.add_argument("--tokenizer", type=path_text, default=None, help="Tokenizer of a --model that was saved without one.")
    parser.add_argument("--checkpoint", type=Literal["best", "last"], default="best", help="Which checkpoint of the run.")
    parser.add_argument("--num_samples", type=int, default=1, help="Samples of each prompt.")
    parser.add_argument("--prompt", type=str, default="", help="Text each sample begins with; the model continues it.")
    parser.add_argument(
        "--prompts",
        type=path_text,
        nargs="+",
        default=[],
        help="Files of prompts, or - for standard input: one a line, or .jsonl objects with prompt, text or ids.",
    )
    parser.add_argument(
        "--infill",
        type=str,
        nargs="?",
        const=STDIN,
        default=None,
        help="Text whose [MASK] are filled in, one token each; without a value, the lines of --prompts or standard input.",
    )
    parser.add_argument("--length", type=int, default=0, help="Tokens of a sample; 0 means the model's length.")
    parser.add_argument(
        "--block", type=int, default=0, help="Fill this many tokens at a time, left to right; text may be longer."
    )
    parser.add_argument("--steps", type=int, default=128, help="Denoising steps, of each block if there are blocks.")
    parser.add_argument(
        "--sampler",
        type=str,
        default="auto",
        help="auto (ddpm_cache, or ancestral for a model with time conditioning), ancestral, ddpm_cache, first_hitting, "
        "confidence, entropy, margin, importance, remdm_cap, remdm_rescale or remdm_confidence.",
    )
    parser.add_argument(
        "--stop_at_end", action="store_true", help="End each sample before its first end-of-document token after what was given."
    )
    parser.add_argument("--temperature", type=float, default=1.0, help="Divides the logits; 0 takes the likeliest token.")
    parser.add_argument("--top_k", type=int, default=0, help="Draw from the k most likely tokens; 0 means all.")
    parser.add_argument("--top_p", type=float, default=1.0, help="Draw from the fewest tokens whose chances add up to this.")
    parser.add_argument("--eta", type=float, default=None, help="How much the remdm samplers hide again, 0 to 1.")
    parser.add_argument(
        "--tilt", type=float, default=None, help="Of sampler importance: odds exp(-tilt * score); by default the run's."
    )
    parser.add_argument("--seed", type=int, default=0, help="Seed of the samples.")
    parser.add_argument("--batch", type=int, default=16, help="Sequences at a time; samples do not depend on it.")
    parser.add_argument(
        "--jsonl", type=path_text, default=None, help="Write one JSON object a sample to this file, or - for standard output."
    )
    parser.add_argument("--watch", action="store_true", help="Show the first sample of each batch as it is denoised.")
    parser.add_argument("--html", type=path_text, default=None, help="Write a page that replays the first sample.")
    parser.add_argument("--device", type=Literal["auto", "cpu", "cuda"], default="auto", help="Where to compute.")
    parser.add_argument("--dtype", type=Literal["auto", "bf16", "fp32"], default="auto", help="Precision.")
    return parser


def _check(args: Any) -> None:
    """Raise UsageError for what can be refused before reading anything."""
    for name in ("num_samples", "batch", "steps"):
        if getattr(args, name) < 1:
            raise UsageError(f"{name} must be at least 1, got {getattr(args, name)}")
    check_seed("--seed", args.seed)
    if args.infill is not None and args.prompt:
        raise UsageError("give either --prompt, which is continued, or --infill, which is completed")
    if args.prompts and args.prompt:
        raise UsageError("give either --prompt or --prompts, not both")
    if args.infill not in (None, STDIN) and args.prompts:
        raise UsageError("give --infill without a text if --prompts has the texts")
    for option in ("jsonl", "html"):
        path = getattr(args, option)
        if path not in (None, STDIN):
            check_target(path)
    if args.html == STDIN:
        raise UsageError("--html needs a file to write to")


def _lines(args: Any) -> list[tuple[str, Any]]:
    """(place, given) for every text. given: text, or a list of ids."""
    if args.infill not in (None, STDIN):
        return [("--infill", args.infill)]
    if args.infill is None and not args.prompts:
        return [("--prompt", args.prompt)]
    found: list[tuple[str, Any]] = []
    for name in args.prompts or [STDIN]:
        called = "standard input" if name == STDIN else name
        try:
            text = sys.stdin.read() if name == STDIN else Path(name).read_text(encoding="utf-8")
            text = text.removeprefix("\ufeff")
        except OSError as error:
            raise UsageError(f"cannot read {called}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise UsageError(f"{called} is not UTF-8 text: {error.reason} at byte {error.start}") from error
        for number, line in enumerate(text.split("\n"), 1):
            line = line.removesuffix("\r")
            if line.strip():
                place = f"line {number} of {called}"
                found.append((place, _of_json(place, line) if name.endswith(".jsonl") else line))
    if not found:
        raise UsageError("there is no text to begin with: every line given is empty")
    return found


def _of_json(place: str, line: str) -> Any:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise UsageError(f"{place} is not JSON: {error}") from error
    keys = [key for key in ("ids", "prompt", "text") if isinstance(record, dict) and key in record]
    if not keys:
        raise UsageError(f'{place} has no prompt, text or ids; write {{"prompt": "..."}}')
    value = record[keys[0]]
    ids = isinstance(value, list) and all(isinstance(i, int) and not isinstance(i, bool) for i in value)
    if not (ids if keys[0] == "ids" else isinstance(value, str)):
        raise UsageError(f"{place}: {keys[0]} must be {'a list of whole numbers' if keys[0] == 'ids' else 'a string'}")
    return value


def _jobs(args: Any, lines: list[tuple[str, Any]], tokenizer: Any, longest: int) -> list[Job]:
    """Each sample's first ids: the given ones, and the mask where a token is to be filled in."""
    if args.length < 0 or (args.length > longest and not args.block):
        raise UsageError(
            f"length must be in 1..{longest}, the model's own, got {args.length}; --block {longest} writes longer text"
        )
    length = args.length or longest
    jobs = []
    for place, given in lines:
        given = given if isinstance(given, list) else valid_unicode(given)
        ids = list(given) if isinstance(given, list) else tokenizer.encode_prompt(given)
        outside = [i for i in ids if not 0 <= i < tokenizer.model_vocab_size]
        if outside:
            raise UsageError(f"{place} has token id {outside[0]}, outside the vocabulary of {tokenizer.model_vocab_size:,}")
        if args.infill is not None:
            if tokenizer.mask_id not in ids and not isinstance(given, list):
                raise UsageError(f"{place} has no [MASK] in it; write [MASK] wherever a token is to be filled in")
            if len(ids) > (args.length or longest) and not args.block:
                raise UsageError(f"{place} has {len(ids)} tokens, but the model takes at most {args.length or longest}")
        else:
            if len(ids) >= length:
                raise UsageError(f"{place} has {len(ids)} tokens, which leaves nothing of {length} to fill in; shorten it")
            ids = ids + [tokenizer.mask_id] * (length - len(ids))
        jobs.append(Job(ids, given if isinstance(given, str) else tokenizer.decode(given)))
    return jobs


@contextmanager
def _output(args: Any) -> Iterator[Any]:
    """Yields a function to call with each sample. A file gets its name after the last sample, or at Ctrl-C."""
    if args.jsonl is None:

        def plain(number: int, count: int, job: Job, ids: list[int], tokenizer: Any, facts: dict[str, str]) -> None:
            if count > 1:
                print(f"--- sample {number + 1} of {count}")
            print(tokenizer.decode(ids), flush=True)

        yield plain
        return

    def line(stream: Any, number: int, job: Job, ids: list[int], tokenizer: Any, facts: dict[str, str]) -> None:
        row = {"sample": number, "given": job.given, "text": tokenizer.decode(ids), "ids": ids}
        drawn = {name: getattr(args, name) for name in ("steps", "temperature", "top_k", "top_p", "seed")}
        stream.write(json.dumps(row | facts | drawn, ensure_ascii=False) + "\n")
        stream.flush()

    if args.jsonl == STDIN:
        yield lambda number, count, *sample: line(sys.stdout, number, *sample)
        return
    interrupted = False
    with disk_errors(args.jsonl), replacing(args.jsonl) as stream:
        try:
            yield lambda number, count, *sample: line(stream, number, *sample)
        except KeyboardInterrupt:
            interrupted = stream.tell() > 0  # keep what is drawn so far
            if not interrupted:
                raise
    if interrupted:
        raise KeyboardInterrupt


class _Progress:
    """A progress bar on standard error if that is a terminal, the view of --watch, and the recording for --html."""

    def __init__(self, args: Any, jobs: list[Job], tokenizer: Any, longest: int, mask_id: int, scores: Any) -> None:
        from rich.console import Console
        from rich.live import Live
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        from atat_fast.evaluation.pieces import Pieces

        self.args, self.mask_id, self.scores = args, mask_id, scores
        self.pieces = Pieces(tokenizer.decode, mask_id)
        self.longest = longest
        self.console = Console(stderr=True)
        self.hidden = args.num_samples * sum(job.start.count(mask_id) for job in jobs)
        self.done = 0
        self.recorder: Any = None
        self.live = Live(console=self.console, auto_refresh=False, vertical_overflow="visible") if args.watch else None
        columns = (TextColumn("sampling"), BarColumn(), TextColumn("{task.completed:,.0f} of {task.total:,.0f} tokens"))
        rate = TextColumn("{task.fields[rate]}")
        self.bar = Progress(*columns, rate, TimeRemainingColumn(), console=self.console, transient=True, disable=args.watch)
        self.task = self.bar.add_task("sampling", total=self.hidden, rate="")
        self.begin = time.perf_counter()

    def __enter__(self) -> _Progress:
        if self.live is not None:
            self.live.start()
        elif self.console.is_terminal:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live is not None:
            self.live.stop()
        elif self.console.is_terminal:
            self.bar.stop()

    def batch(self, first: int, jobs: list[Job], tokens: Any) -> Any:
        """An `on_step` for this batch, or None if nothing shows it."""
        from atat_fast.evaluation.trajectory import Recorder, show

        watched = None
        if self.args.watch or (self.args.html is not None and first == 0):
            fits = len(jobs[0].start) <= self.longest  # the estimator takes no more tokens than the model
            scores = self.scores if self.args.html is not None and fits else None
            watched = Recorder(tokens, self.mask_id, length=len(jobs[0].start), scores=scores)
            if first == 0:
                self.recorder = watched
        if watched is None and not self.console.is_terminal:
            return None
        hidden = sum(job.start.count(self.mask_id) for job in jobs)
        lengths = [len(job.start) for job in jobs]

        def on_step(step: int, now: Any) -> None:
            changed = watched(step, now) if watched is not None else []
            if self.live is not None and watched is not None:
                text = show(watched.tokens, watched.start, changed, self.pieces)
                text.append(f"\nstep {step + 1}, {watched.tokens.count(self.mask_id)} hidden", style="dim")
                self.live.update(text, refresh=True)
            elif self.console.is_terminal:
                left = sum(int((now[row, :length] == self.mask_id).sum()) for row, length in enumerate(lengths))
                done = self.done + hidden - left
                rate = done / max(1e-9, time.perf_counter() - self.begin)
                self.bar.update(self.task, completed=done, rate=f"{rate:,.0f} tokens/s")
                if left == 0:
                    self.done += hidden

        return on_step

    def write_html(self, path: Path, facts: dict[str, Any]) -> None:
        """Write the page of the first sample."""
        from atat_fast.evaluation.trajectory import page, write_page

        write_page(path, page(self.recorder, self.pieces, facts))
        print(f"written to {path}", file=sys.stderr)


if __name__ == "__main__":
    run_command(main)
