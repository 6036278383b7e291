"""Models as lm-eval sees them:  python -m atat_fast.evaluation.lm_eval --model_args run=runs/demo --tasks lambada_openai

All other options are the harness's own. From Python, `register()` makes the model known under the name atat_fast.

What it answers:
- loglikelihood: of a continuation given what comes before it. `likelihood=nelbo` is minus the conditional bound, a Monte-Carlo
  mean over masks of the continuation alone (every mask there is, where they are no more than `draws`: then without chance);
  `likelihood=left_to_right` and the other orders of evaluation/orders.py are exact, one pass a token.
- loglikelihood_rolling: of a whole text, each token scored once, in windows of the model's length with as much before as fits.
- generate_until: masks after the context are filled in by a sampler, and the text is cut at the first stop.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from atat_fast.config import TrainConfig
from atat_fast.data import Tokenizer
from atat_fast.diffusion.samplers import sample
from atat_fast.errors import UsageError, nearest
from atat_fast.evaluation.orders import EXACT, order_nll
from atat_fast.evaluation.precision import antithetic_counts
from atat_fast.models.dit import DiT
from atat_fast.ops.masking import mask_tokens
from atat_fast.training.compute import Compute, resolve

NAME = "atat_fast"
LIKELIHOODS = ("nelbo", *EXACT)
COLDEST = 1e-4  # the temperature that stands for greedy decoding
INSTALL = "pip install 'atat_fast[lm-eval]'"


class Answers:
    """What the harness wants to know, without the harness.

    Args:
        model, tokenizer: The model, on compute's device, and what reads its text.
        likelihood: nelbo, or an exact order.
        draws: Masks of a continuation that the bound is a mean over; at least 2.
        per_pass: Tokens an order reveals at a time.
        steps: Denoising steps of a generation; 0 is one for each token.
        sampler: auto is ddpm_cache, or ancestral for a model that is told the time.
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
            if value < least:
                raise UsageError(f"{name} must be at least {least}, got {value}")
        self.model, self.tokenizer, self.compute = model.to(compute.device).eval(), tokenizer, compute
        self.likelihood, self.draws, self.per_pass, self.steps = likelihood, draws, per_pass, steps
        self.sampler = ("ancestral" if model.time_conditioning else "ddpm_cache") if sampler == "auto" else sampler
        self.batch, self.seed, self.length = batch, seed, model.config.length

    def continuation(self, context: str, text: str) -> tuple[float, bool]:
        """(log-likelihood of `text` after `context`, whether greedy decoding by confidence would write it)."""
        before, after = self.split(context, text)
        if not after:
            return 0.0, True
        scored = [self._scored(given, part) for given, part in self._windows(before, after)]
        return -sum(nll for nll, _ in scored), all(greedy for _, greedy in scored)

    def whole(self, text: str) -> float:
        """Log-likelihood of a text that stands by itself: after an end of document."""
        ids = self.tokenizer.encode(text)
        return -sum(self._scored(given, part, greedy=False)[0] for given, part in self._windows([self.tokenizer.eos_id], ids))

    def split(self, context: str, text: str) -> tuple[list[int], list[int]]:
        """Ids of both. Blanks at the context's end go to the text, as tokens hold the blank before a word.

        Where there is no context, an end of document is given.
        """
        if not context:
            return [self.tokenizer.eos_id], self.tokenizer.encode(text)
        kept = context.rstrip()
        before = self.tokenizer.encode(kept)
        return before, self.tokenizer.encode(kept + context[len(kept) :] + text)[len(before) :]

    def _windows(self, before: list[int], after: list[int]) -> Iterator[tuple[list[int], list[int]]]:
        """(given, scored) of at most `length` tokens together; each token of `after` is scored once, given the most that fits."""
        most = self.length - min(len(before), 1)  # something is given where there is something to give
        done = 0
        while done < len(after):
            part = after[done : done + most]
            given = (before + after[:done])[-(self.length - len(part)) :] if self.length > len(part) else []
            yield given, part
            done += len(part)
            most = self.length - 1

    @torch.no_grad()
    def _scored(self, given: list[int], part: list[int], greedy: bool = True) -> tuple[float, bool]:
        """(-log-likelihood of part after given in nats, whether each token is the likeliest as confidence reveals them)."""
        tokens = torch.tensor([given + part], device=self.compute.device)
        hidden = torch.arange(tokens.shape[1], device=tokens.device)[None] >= len(given)
        with self.compute.autocast():
            if self.likelihood != "nelbo":
                nll, sure = order_nll(self.model, tokens, hidden, self.likelihood, per_pass=self.per_pass)
                return float(nll), bool(sure)
            sure = (
                order_nll(self.model, tokens, hidden, "confidence", per_pass=self.per_pass)[1] if greedy else torch.tensor(False)
            )
            return self._bound(tokens, len(given), len(part)), bool(sure)

    def _bound(self, tokens: Tensor, given: int, m: int) -> float:
        """The conditional bound of the last m tokens of tokens [1, given + m], nats: E over k in 1..m of m / k * sum of k."""
        if (1 << m) - 1 <= self.draws:  # every mask there is
            sets = [chosen for k in range(1, m + 1) for chosen in itertools.combinations(range(m), k)]
            hidden = torch.zeros(len(sets), m, dtype=torch.bool)
            for row, chosen in enumerate(sets):
                hidden[row, list(chosen)] = True
            sizes = hidden.sum(1)
            weight = 1.0 / (m * torch.bincount(sizes)[sizes].double())  # each k alike, each set of that size alike
        else:
            hidden = self._pairs(tokens, given, m)
            weight = torch.full((len(hidden),), 1.0 / len(hidden), dtype=torch.float64)
        hidden = torch.cat((torch.zeros(len(hidden), given, dtype=torch.bool), hidden.cpu()), 1)
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

    def _pairs(self, tokens: Tensor, given: int, m: int) -> Tensor:
        """Masks of the last m tokens, [draws, m] bool, in antithetic pairs (evaluation/precision.py) over strata of 1..m."""
        pairs = -(-self.draws // 2)
        k = antithetic_counts(pairs, m, seed=self.seed, step=0)
        x = tokens.cpu().expand(pairs, -1).contiguous()
        frozen = (torch.arange(x.shape[1]) < given).expand(pairs, -1).contiguous()
        ids = torch.arange(pairs)

        def hide(counts: Tensor) -> Tensor:
            noisy, _, _ = mask_tokens(
                x, counts, mask_id=self.model.mask_id, seed=self.seed, step=0, sample_ids=ids, frozen=frozen
            )  # fmt: skip
            return noisy[:, given:] == self.model.mask_id

        return torch.cat((hide(k), ~hide(k - 1)))

    def generated(self, context: str, *, stops: Sequence[str], most: int, temperature: float, sample_id: int) -> str:
        """The text a sampler puts after `context`: at most `most` tokens, up to the first stop or end of document."""
        most = min(most, self.length - 1)
        before = self.tokenizer.encode(context)[-(self.length - most) :] or [self.tokenizer.eos_id]
        ids = torch.tensor([before + [self.model.mask_id] * most], device=self.compute.device)
        with self.compute.autocast():
            drawn = sample(
                self.model, ids, steps=self.steps or most, sampler=self.sampler, temperature=max(temperature, COLDEST),
                seed=self.seed, sample_ids=torch.tensor([sample_id], device=ids.device),
            )  # fmt: skip
        said = drawn[0, len(before) :].tolist()
        if self.tokenizer.eos_id in said:
            said = said[: said.index(self.tokenizer.eos_id)]
        text = self.tokenizer.decode(said)
        ends = [text.find(stop) for stop in stops if stop and stop in text]
        return text[: min(ends)] if ends else text


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
    """Answers from the harness's model_args: a run or a saved model, and what `Answers` takes. Raises UsageError."""
    from atat_fast.models import hub
    from atat_fast.training import checkpoint as checkpoints

    if (run is None) == (model is None):
        raise UsageError("model_args names what is asked: run=runs/NAME, or model=FOLDER for a saved model")
    known = ("likelihood", "draws", "steps", "sampler", "seed")
    for name in options.keys() - set(known):
        raise UsageError(f"there is no model argument {name!r}{nearest(name, known)}")
    size = 16 if str(batch_size).startswith("auto") else int(batch_size)
    where: Any = (device or "auto").split(":")[0]
    if where == "cuda" and not torch.cuda.is_available():
        where = "auto"  # the harness says cuda:0 where its user said nothing
    kind: Any = dtype
    compute = resolve(TrainConfig(device=where, dtype=kind, compile="off"))
    if run is not None:
        found, reads = checkpoints.load_model(checkpoints.find(Path(run), checkpoint), average=weights == "ema")
    else:
        saved = hub.from_pretrained(str(model), tokenizer=tokenizer)
        found, reads = saved.model, saved.tokenizer
    return Answers(found, reads, compute, per_pass=tokens_per_pass, batch=size, **options)


def register() -> type[Any]:
    """Makes the model known to lm-eval as atat_fast; returns its class. Raises UsageError where lm-eval is missing."""
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
            """What names the tokenizer in the harness's caches."""
            return self.answers.tokenizer.fingerprint

        def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            """Of continuations: requests' args are (context, continuation)."""
            return [self._kept("loglikelihood", r.args, self.answers.continuation(*r.args)) for r in requests]

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            """Of whole texts: requests' args are (text,)."""
            return [self._kept("loglikelihood_rolling", r.args, self.answers.whole(r.args[0])) for r in requests]

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            """Requests' args are (context, settings): until, max_gen_toks, do_sample, temperature."""
            return [self._kept("generate_until", r.args, self._generate(i, *r.args)) for i, r in enumerate(requests)]

        def _generate(self, i: int, context: str, settings: dict[str, Any]) -> str:
            stops = settings.get("until") or []
            warm = settings.get("do_sample", settings.get("temperature", 0) > 0)
            return self.answers.generated(
                context,
                stops=[stops] if isinstance(stops, str) else stops,
                most=int(settings.get("max_gen_toks") or settings.get("max_new_tokens") or 256),
                temperature=float(settings.get("temperature") or 1.0) if warm else 0.0,
                sample_id=i,
            )

        def _kept(self, what: str, arguments: Any, answer: Any) -> Any:
            self.cache_hook.add_partial(what, arguments, answer)
            return answer

    _registered = register_model(NAME)(AtatFastLM)
    return AtatFastLM


_registered: type[Any] | None = None


def main(arguments: Sequence[str]) -> int:
    """The harness's own command line, with our model known to it and taken where no other is named."""
    register()
    from lm_eval.__main__ import cli_evaluate

    given = list(arguments)
    if not any(argument in ("--model", "-M", "ls", "validate") or argument.startswith("--model=") for argument in given):
        given = [*given, "--model", NAME]
    sys.argv = ["lm_eval", *given]
    cli_evaluate()
    return 0


if __name__ == "__main__":
    # Run as a module this file has another name; what is registered must be what importers get.
    from atat_fast.cli import run_door
    from atat_fast.evaluation import lm_eval as module

    run_door(module.main)
