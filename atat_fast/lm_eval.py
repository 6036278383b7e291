"""Our models in lm-eval:  python -m atat_fast.lm_eval --model_args run=runs/demo --tasks lambada_openai

All other options are the harness's own. From Python, `register()` registers the model under the name atat_fast.

Requests it answers:
- loglikelihood: of a continuation given its context. `likelihood=nelbo` is minus the conditional bound, a Monte-Carlo mean over
  masks of the continuation alone; if there are at most `draws` masks, all are read and nothing is random.
  `likelihood=left_to_right` and the other orders of evaluation/orders.py are exact, one pass a token.
  A model of blocks (`model.block`) sums the bounds of the continuation's blocks; at block 1 that is its likelihood.
- loglikelihood_rolling: of a whole text, each token scored once, in windows of the model's length with as much context as fits.
- generate_until: a sampler fills in masks after the context, and the text is cut at the first stop. A context that does not fit
  beside them loses its beginning.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from atat_fast.config import TrainConfig
from atat_fast.data import Tokenizer
from atat_fast.errors import UsageError, check_seed, nearest
from atat_fast.evaluation.orders import EXACT, order_nll
from atat_fast.evaluation.precision import antithetic_counts
from atat_fast.hardware.compute import Compute, resolve
from atat_fast.models.dit import DiT
from atat_fast.ops.masking import mask_tokens
from atat_fast.sampling.samplers import SAMPLERS, cut_at_end, sample

NAME = "atat_fast"
LIKELIHOODS = ("nelbo", *EXACT)
MOST_TOKENS = 256  # of a generation whose task sets none, as in the harness's own models
MOST_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # tasks' names for it; the first counts
INSTALL = "pip install 'atat_fast[lm-eval]'"


class Answers:
    """Answers to the harness's requests, without the harness.

    Args:
        model, tokenizer: The model, which moves to compute's device, and its tokenizer.
        likelihood: nelbo, or an exact order.
        draws: Masks of a continuation that the bound averages over; at least 2.
        per_pass: Tokens an order reveals at a time.
        steps: Denoising steps of a generation; 0 is one a token.
        sampler: auto is ddpm_cache, or ancestral for a model with time conditioning.
        batch: Sequences in one forward pass.
    """

    def __init__(
        self,
        model: DiT,
        tokenizer: Tokenizer,
        compute: Compute,
        *,
        likelihood: str = "nelbo",
        draws: int = 64,
        per_pass: int = 1,
        steps: int = 0,
        sampler: str = "auto",
        batch: int = 16,
        seed: int = 1234,
    ) -> None:
        if likelihood not in LIKELIHOODS:
            raise UsageError(
                f"there is no likelihood {likelihood!r}{nearest(likelihood, LIKELIHOODS)}; choose {', '.join(LIKELIHOODS)}"
            )
        for name, value, least in (
            ("draws", draws, 2),
            ("tokens_per_pass", per_pass, 1),
            ("steps", steps, 0),
            ("batch_size", batch, 1),
        ):
            if not isinstance(value, int):
                raise UsageError(f"{name} must be a whole number, got {value!r}")
            if value < least:
                raise UsageError(f"{name} must be at least {least}, got {value}")
        check_seed("seed", seed)
        if model.config.block and likelihood != "nelbo":
            raise UsageError(
                f"likelihood {likelihood} reveals tokens of a whole text in an order, and this model makes it in blocks "
                f"(model.block {model.config.block}); use likelihood nelbo, which is exact at block 1"
            )
        self.noted: set[str] = set()
        self.model, self.tokenizer, self.compute = model.to(compute.device).eval(), tokenizer, compute
        self.likelihood, self.draws, self.per_pass, self.steps = likelihood, draws, per_pass, steps
        self.sampler = ("ancestral" if model.time_conditioning else "ddpm_cache") if sampler == "auto" else sampler
        self.batch, self.seed, self.length = batch, seed, model.config.length

    def continuation(self, context: str, text: str) -> tuple[float, bool]:
        """(log-likelihood of `text` after `context`, whether greedy decoding by confidence writes it)."""
        before, after = self.split(context, text)
        if not after:
            return 0.0, True
        scored = [self._scored(given, part) for given, part in self._windows(before, after)]
        return -sum(nll for nll, _ in scored), all(greedy for _, greedy in scored)

    def whole(self, text: str) -> float:
        """Log-likelihood of a text by itself: after an end of document."""
        ids = self.tokenizer.encode(text)
        return -sum(self._scored(given, part, greedy=False)[0] for given, part in self._windows([self.tokenizer.eos_id], ids))

    def split(self, context: str, text: str) -> tuple[list[int], list[int]]:
        """Ids of both. Blanks at the context's end go to the text, since tokens hold the blank before a word.

        Context and text are tokenised together if that leaves a boundary between them. If one token would span it, each is
        tokenised by itself, so that exactly the text is scored. A context without tokens becomes an end of document. Text that
        the tokenizer does not see (none; blanks under BERT's) has no tokens.
        """
        kept = context.rstrip()
        moved = context[len(kept) :] + text
        before, both = self.tokenizer.encode_batch([kept, kept + moved])
        after = both[len(before) :] if both[: len(before)] == before else []
        return before or [self.tokenizer.eos_id], after or self.tokenizer.encode(moved)

    def _windows(self, before: list[int], after: list[int]) -> Iterator[tuple[list[int], list[int]]]:
        """(given, scored), at most `length` tokens together. Each token of `after` is scored once, given as much as fits."""
        most = self.length - min(len(before), 1)  # at least one token is given if there is one
        done = 0
        while done < len(after):
            part = after[done : done + most]
            given = (before + after[:done])[-(self.length - len(part)) :] if self.length > len(part) else []
            yield given, part
            done += len(part)
            most = self.length - 1

    @torch.no_grad()
    def _scored(self, given: list[int], part: list[int], greedy: bool = True) -> tuple[float, bool]:
        """(-log-likelihood of part after given in nats, whether each token is the likeliest when confidence reveals it)."""
        tokens = torch.tensor([given + part], device=self.compute.device)
        hidden = torch.arange(tokens.shape[1], device=tokens.device)[None] >= len(given)
        with self.compute.autocast():
            if self.likelihood != "nelbo":
                nll, sure = order_nll(self.model, tokens, hidden, self.likelihood, per_pass=self.per_pass)
                return float(nll), bool(sure)
            if self.model.config.block:
                return self._block_bound(tokens, len(given)), greedy and self._writes(tokens, len(given))
            sure = (
                order_nll(self.model, tokens, hidden, "confidence", per_pass=self.per_pass)[1] if greedy else torch.tensor(False)
            )
            return self._bound(tokens, len(given), len(part)), bool(sure)

    def _writes(self, tokens: Tensor, given: int) -> bool:
        """Whether a model of blocks writes tokens [1, T] after the first `given`, the surest first in every block."""
        start = tokens.clone()
        start[:, given:] = self.model.mask_id
        steps = -(-self.model.config.block // self.per_pass)
        return torch.equal(sample(self.model, start, steps=steps, sampler="confidence", temperature=0.0), tokens)

    def _block_bound(self, tokens: Tensor, given: int) -> float:
        """The bound of tokens [1, T] after the first `given` by a model of blocks, nats: the sum of the blocks' own.

        A block's bound does not depend on how other blocks are masked, so a pass reads a mask of each. With one token in each
        block there is one mask, and the sum is the likelihood itself. What follows the text in its last block stays hidden.
        """
        size, length = self.model.config.block, tokens.shape[1]
        padded = torch.nn.functional.pad(tokens, (0, -length % size), value=self.model.mask_id)
        found = []
        for start in range(given // size * size, length, size):
            begin, end = max(given, start) - start, min(length - start, size)
            hidden, weight = self._masks(padded[:, start : start + end], begin, end - begin, first=start)
            found.append((start + begin, end - begin, hidden, weight))
        most = max(len(hidden) for _, _, hidden, _ in found)
        masks = torch.zeros(most, padded.shape[1], dtype=torch.bool)
        weights = torch.zeros(masks.shape, dtype=torch.float64)  # of each hidden token: m / k, and the mask's share
        for begin, m, hidden, weight in found:
            place = (slice(len(hidden)), slice(begin, begin + m))
            masks[place] = hidden
            weights[place] = (m / hidden.sum(1) * weight)[:, None]
        total = 0.0
        for first in range(0, most, self.batch):
            now = masks[first : first + self.batch]
            x, rows = padded.expand(len(now), -1), now.flatten().nonzero()[:, 0]
            noisy, rows_here = x.masked_fill(now.to(x.device), self.model.mask_id), rows.to(x.device)
            nll = self.model.nll(noisy, rows_here, x.flatten()[rows_here]).double().cpu()
            total += float((nll * weights[first : first + self.batch].flatten()[rows]).sum())
        return total

    def _bound(self, tokens: Tensor, given: int, m: int) -> float:
        """The conditional bound of the last m tokens of tokens [1, given + m], nats: E over k in 1..m of m / k * sum of k."""
        hidden, weight = self._masks(tokens, given, m)
        hidden = torch.cat((torch.zeros(len(hidden), given, dtype=torch.bool), hidden), 1)
        total = 0.0
        for first in range(0, len(hidden), self.batch):
            now = hidden[first : first + self.batch].to(tokens.device)
            x = tokens.expand(len(now), -1)
            rows = now.flatten().nonzero().flatten()
            share = now.float().mean(1)
            nll = self.model.nll(x.masked_fill(now, self.model.mask_id), rows, x.flatten()[rows], share).double().cpu()
            sums = torch.zeros(len(now), dtype=torch.float64).index_add_(
                0, torch.div(rows.cpu(), now.shape[1], rounding_mode="floor"), nll
            )
            total += float((sums * m / now.sum(1).cpu() * weight[first : first + len(now)]).sum())
        return total

    def _masks(self, tokens: Tensor, given: int, m: int, first: int = 0) -> tuple[Tensor, Tensor]:
        """Masks of the last m tokens of tokens [1, given + m], and each one's share of the mean: [n, m] bool, [n] fp64, on a CPU.

        All masks, if there are at most `draws`; else so many at random. first: makes those of another block others.
        """
        if (1 << m) - 1 > self.draws:
            hidden = self._pairs(tokens, given, m, first).cpu()
            return hidden, torch.full((len(hidden),), 1.0 / len(hidden), dtype=torch.float64)
        sets = [chosen for k in range(1, m + 1) for chosen in itertools.combinations(range(m), k)]
        hidden = torch.zeros(len(sets), m, dtype=torch.bool)
        for row, chosen in enumerate(sets):
            hidden[row, list(chosen)] = True
        sizes = hidden.sum(1)
        return hidden, 1.0 / (m * torch.bincount(sizes)[sizes].double())  # all k weigh the same, and all sets of one size

    def _pairs(self, tokens: Tensor, given: int, m: int, first: int = 0) -> Tensor:
        """Masks of the last m tokens, [draws, m] bool, in antithetic pairs (evaluation/precision.py) over strata of 1..m."""
        pairs = -(-self.draws // 2)
        k = antithetic_counts(pairs, m, seed=self.seed, step=first)
        x = tokens.cpu().expand(pairs, -1).contiguous()
        frozen = (torch.arange(x.shape[1]) < given).expand(pairs, -1).contiguous()
        ids = torch.arange(pairs) + first * pairs

        def hide(counts: Tensor) -> Tensor:
            noisy, _, _ = mask_tokens(
                x, counts, mask_id=self.model.mask_id, seed=self.seed, step=0, sample_ids=ids, frozen=frozen
            )
            return noisy[:, given:] == self.model.mask_id

        return torch.cat((hide(k), ~hide(k - 1)))

    def generated(
        self,
        context: str,
        *,
        stops: Sequence[str],
        most: int | None,
        temperature: float,
        sample_id: int,
        top_k: int = 0,
        top_p: float = 1.0,
    ) -> str:
        """The text a sampler writes after `context`: at most `most` tokens, up to the first stop or end of document.

        most: None is 256, or half the model's length if that is less. The context keeps the end that fits, but at least half the
        model's length; then fewer tokens are written. Raises UsageError for options that `Cut` refuses.
        """
        most = min(MOST_TOKENS, self.length // 2) if most is None else most
        if most < 0:
            raise UsageError(f"max_gen_toks must be at least 0, got {most}")
        if most == 0:
            return ""
        before = self.tokenizer.encode(context) or [self.tokenizer.eos_id]
        if len(before) + most > self.length:
            self.note(
                "lengths",
                f"a context of {len(before):,} tokens and max_gen_toks {most:,} are more than this model's {self.length:,}: "
                "if they do not fit, contexts lose their beginning but keep half of that length, and fewer tokens are written",
            )
            before = before[-max(self.length - most, self.length // 2, 1) :]
            most = min(most, self.length - len(before))
        ids = torch.tensor([before + [self.model.mask_id] * most], device=self.compute.device)
        with self.compute.autocast():
            drawn = sample(
                self.model,
                ids,
                steps=self.steps or most,
                sampler=self.sampler,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                seed=self.seed,
                sample_ids=torch.tensor([sample_id], device=ids.device),
            )
        text = self.tokenizer.decode(cut_at_end(drawn[0].tolist(), len(before), self.tokenizer.eos_id)[len(before) :])
        ends = [text.find(stop) for stop in stops if stop and stop in text]
        return text[: min(ends)] if ends else text

    def note(self, about: str, sentence: str) -> None:
        """Print a sentence on standard error, once for each `about`."""
        if about not in self.noted:
            self.noted.add(about)
            print(f"note: {sentence}", file=sys.stderr)


def generation_options(settings: dict[str, Any], note: Callable[[str, str], None]) -> dict[str, Any]:
    """Options of `Answers.generated` from a request's settings, the harness's gen_kwargs. null means absent.

    Greedy if do_sample is false, temperature is 0, or neither is given; do_sample without a temperature is temperature 1.
    note: called like `Answers.note` for settings that are not followed. Raises UsageError for invalid values.
    """
    given = {name: value for name, value in settings.items() if value is not None}

    def number(name: str, kind: type[Any], default: Any) -> Any:
        try:
            value = kind(given.get(name, default))
            if kind is int and value != float(given.get(name, default)):
                raise ValueError
        except (TypeError, ValueError, OverflowError) as error:
            asked = "a whole number" if kind is int else "a number"
            raise UsageError(f"generation setting {name} must be {asked}, got {given[name]!r}") from error
        return value

    stops = given.get("until", [])
    stops = [stops] if isinstance(stops, str) else stops
    if not isinstance(stops, (list, tuple)) or not all(isinstance(stop, str) for stop in stops):
        raise UsageError(f"generation setting until must be a string or a list of strings, got {stops!r}")
    known = ("until", "do_sample", "temperature", "top_k", "top_p", *MOST_NAMES)
    for name in (name for name in given if name not in known):
        note(name, f"generation setting {name} is not followed here; known are {', '.join(known)}")
    limit = next((name for name in MOST_NAMES if name in given), None)
    temperature = number("temperature", float, 1.0 if given.get("do_sample") else 0.0)
    options = {"stops": stops, "most": None if limit is None else number(limit, int, None), "temperature": temperature}
    if temperature == 0 or not given.get("do_sample", True):
        return options | {"temperature": 0.0}
    top_k = number("top_k", int, 0)
    return options | {"top_k": 0 if top_k == -1 else top_k, "top_p": number("top_p", float, 1.0)}


def open_answers(
    *,
    run: str | None = None,
    model: str | None = None,
    tokenizer: str | None = None,
    checkpoint: str = "best",
    weights: str = "ema",
    device: str = "auto",
    dtype: str = "auto",
    tokens_per_pass: int = 1,
    batch_size: int | str = 16,
    **options: Any,
) -> Answers:
    """Answers from the harness's model_args: a run or a saved model, and options of `Answers`. Raises UsageError."""
    if (run is None) == (model is None):
        raise UsageError("model_args names what is asked: run=runs/NAME, or model=FOLDER for a saved model")
    from atat_fast.runs.loaded import open_model

    known = ("likelihood", "draws", "steps", "sampler", "seed")
    for name in options.keys() - set(known):
        raise UsageError(f"there is no model argument {name!r}{nearest(name, known)}")
    size = str(batch_size)
    size = "16" if size.startswith("auto") else size
    if not size.isdecimal():
        raise UsageError(f"batch_size must be a whole number or auto, got {batch_size!r}")
    where: Any = (device or "auto").split(":")[0]
    if where == "cuda" and not torch.cuda.is_available():
        where = "auto"  # the harness passes cuda:0 if its user named no device
    kind: Any = {"bfloat16": "bf16", "float32": "fp32"}.get(dtype, dtype)
    for name, value, choices in (
        ("checkpoint", checkpoint, ("best", "last")),
        ("weights", weights, ("ema", "raw")),
        ("device", where, ("auto", "cpu", "cuda")),
        ("dtype", kind, ("auto", "bf16", "fp32")),
        ("sampler", options.get("sampler", "auto"), ("auto", *SAMPLERS)),
    ):
        if value not in choices:
            raise UsageError(f"there is no {name} {value!r}{nearest(str(value), choices)}; choose one of {', '.join(choices)}")
    compute = resolve(TrainConfig(device=where, dtype=kind, compile="off"), "")
    saved = open_model(run=run, model=model, tokenizer=tokenizer, which=checkpoint, average=weights == "ema", importance=False)
    return Answers(saved.model, saved.reads(), compute, per_pass=tokens_per_pass, batch=int(size), **options)


def register() -> type[Any]:
    """Register the model with lm-eval as atat_fast. Returns its class. Raises UsageError if lm-eval is missing."""
    try:
        from lm_eval.api.model import LM
        from lm_eval.api.registry import register_model
    except ImportError as error:
        raise UsageError(f"this needs the package lm-eval, which is not installed: {INSTALL}") from error
    global _registered
    if _registered is not None:
        return _registered

    class AtatFastLM(LM):
        """A masked-diffusion model as lm-eval's LM. Arguments: see `open_answers`."""

        def __init__(self, **arguments: Any) -> None:
            super().__init__()
            arguments = {name: value for name, value in arguments.items() if value is not None and name != "max_batch_size"}
            self.answers = open_answers(**arguments)

        @property
        def tokenizer_name(self) -> str:
            """The tokenizer's name in the harness's caches."""
            return self.answers.tokenizer.fingerprint

        def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            """Of continuations: requests' args are (context, continuation)."""
            return [self._kept("loglikelihood", r.args, self.answers.continuation(*r.args)) for r in requests]

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            """Of whole texts: requests' args are (text,)."""
            return [self._kept("loglikelihood_rolling", r.args, self.answers.whole(r.args[0])) for r in requests]

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            """Requests' args are (context, settings): until, max_gen_toks, do_sample, temperature, top_k, top_p."""
            return [self._kept("generate_until", r.args, self._generate(i, *r.args)) for i, r in enumerate(requests)]

        def _generate(self, i: int, context: str, settings: dict[str, Any]) -> str:
            return self.answers.generated(context, sample_id=i, **generation_options(settings, self.answers.note))

        def _kept(self, what: str, arguments: Any, answer: Any) -> Any:
            self.cache_hook.add_partial(what, arguments, answer)
            return answer

    _registered = register_model(NAME)(AtatFastLM)
    return AtatFastLM


_registered: type[Any] | None = None


def main(arguments: Sequence[str]) -> int:
    """The command. The harness's own command line, with our model registered and used unless another is named."""
    register()
    from lm_eval.__main__ import cli_evaluate

    given = list(arguments)
    if not any(argument in ("--model", "-M", "ls", "validate") or argument.startswith("--model=") for argument in given):
        given = [*given, "--model", NAME]
    sys.argv = ["lm_eval", *given]
    cli_evaluate()
    return 0


if __name__ == "__main__":
    # As __main__ this file is another module; register the class that importers get.
    from atat_fast import lm_eval as module
    from atat_fast.cli import run_command

    run_command(module.main)
