"""Quality of generated text: how varied it is, and how likely another model finds it.

No figure here is a likelihood of the model that wrote the text. They are printed together because each can be gamed alone:
repeated text has a low perplexity, noise a high entropy.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from atat_fast.data import Tokenizer, local
from atat_fast.data import network as hub
from atat_fast.errors import UsageError
from atat_fast.files import expanded

if TYPE_CHECKING:
    from atat_fast.hardware.compute import Compute

LONGEST_N = 4
CONTEXT = 1_024  # most tokens a causal LM reads at once, as in MDLM's evaluation
LOGIT_BYTES = 1 << 30  # of a causal LM's logits in one forward pass
INSTALL = "pip install 'atat_fast[eval]'"


def read_texts(path: str, what: str = "samples") -> list[str]:
    """The texts of a .jsonl (column text), .parquet or .txt file. Raises UsageError if there are none."""
    texts = list(local.documents(path, None))
    if not any(text.strip() for text in texts):
        raise UsageError(f"{what} {path} hold no text")
    return texts


class Sample(NamedTuple):
    """A generated text, and its ids if the file has them."""

    text: str
    ids: list[int] | None = None


def read_samples(path: str, tokenizer: Tokenizer | None) -> list[Sample]:
    """The samples of a file: texts, with `ids` if a .jsonl has them, as `python -m atat_fast.sample --jsonl` writes them.

    Raises UsageError if there are none, and for ids that are outside the tokenizer's vocabulary, hold its mask, or decode to
    another text than the one beside them. Without a tokenizer ids are ignored.
    """
    rows = list(local.json_lines(expanded(path)))
    if not any(row.get("ids") is not None for _, row in rows):
        return [Sample(text) for text in read_texts(path)]
    return [_sample(place, row.get("text"), row.get("ids"), tokenizer) for place, row in rows]


def _sample(place: str, text: Any, ids: Any, tokenizer: Tokenizer | None) -> Sample:
    if text is not None and not isinstance(text, str):
        raise UsageError(f"{place}: text must be a string, got {text!r}")
    if ids is None or tokenizer is None:
        if text is None:
            more = "" if ids is None else "; give --run or --model, whose tokenizer reads its ids"
            raise UsageError(f"{place} has no text{more}")
        return Sample(text)
    if not isinstance(ids, list) or not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise UsageError(f"{place}: ids must be a list of whole numbers")
    own = f"tokenizer {tokenizer.name}"
    if outside := [i for i in ids if not 0 <= i < tokenizer.model_vocab_size]:
        raise UsageError(
            f"{place} has token id {outside[0]}, outside the {tokenizer.model_vocab_size:,} of {own}: it was written with "
            "another; give the run that wrote it"
        )
    if tokenizer.mask_id in ids:
        raise UsageError(
            f"{place} has the mask (token id {tokenizer.mask_id}) at place {ids.index(tokenizer.mask_id)}: it is not a finished "
            "sample; leave it out, or fill it with python -m atat_fast.sample --infill"
        )
    said = tokenizer.decode(ids)
    if text is not None and text != said:
        raise UsageError(
            f"{place}: by {own} its ids say {_short(said)}, but its text is {_short(text)}; give the run that wrote it, or take "
            "out one of the two"
        )
    return Sample(said, ids)


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "...")


def tokens_of(sample: Sample, tokenizer: Tokenizer) -> list[int]:
    """A sample's own ids, or its text's; there the end of document's name is one token, not letters."""
    if sample.ids is not None:
        return sample.ids
    first, *others = tokenizer.encode_batch(sample.text.split(tokenizer.decode([tokenizer.eos_id])))
    return first + [i for part in others for i in (tokenizer.eos_id, *part)]


def entropy(tokens: Sequence[Hashable]) -> float:
    """Entropy in nats of a token drawn from this text: -sum over kinds of f log f. 0 for a text that repeats one token."""
    counts = Counter(tokens)
    return -sum(n / len(tokens) * math.log(n / len(tokens)) for n in counts.values()) + 0.0


def distinct(texts: Sequence[Sequence[Hashable]], n: int) -> float:
    """Distinct n-grams divided by all n-grams of all texts (Li et al. 2016); n-grams do not cross texts. NaN without any."""
    grams = [tuple(tokens[i : i + n]) for tokens in texts for i in range(len(tokens) - n + 1)]
    return len(set(grams)) / len(grams) if grams else math.nan


def measure_samples(
    path: str, *, tokenizer: Tokenizer | None, causal_lm: str | None, reference: str | None, batch: int, compute: Compute
) -> dict[str, Any]:
    """Entropy and distinct-n of the texts in a file; with a causal LM also generative perplexity; with references also MAUVE.

    tokenizer: makes the tokens, unless the file has ids; None counts words between blanks. causal_lm: a folder or hub id that
    transformers reads. Raises UsageError.
    """
    if reference is not None and causal_lm is None:
        raise UsageError("--reference needs --causal_lm, whose features of the texts are compared; give for example gpt2-large")
    if batch < 1:
        raise UsageError(f"--batch must be at least 1, got {batch}")
    samples = read_samples(path, tokenizer)
    references = read_texts(reference, "references") if reference is not None else []
    split: list[Sequence[Hashable]] = [
        sample.text.split() if tokenizer is None else tokens_of(sample, tokenizer) for sample in samples
    ]
    entropies = [entropy(tokens) for tokens in split if tokens]
    if not entropies:
        raise UsageError(f"samples {path} hold no text")
    found: dict[str, Any] = {
        "samples": path,
        "texts": len(samples),
        "texts_with_ids": sum(sample.ids is not None for sample in samples),
        "empty": sum(not tokens for tokens in split),
        "tokens": sum(map(len, split)),
        "unit": "words" if tokenizer is None else f"tokens of {tokenizer.name}",
        "entropy": sum(entropies) / len(entropies),
        "entropy_se": _error(entropies),
    }
    found |= {f"distinct_{n}": distinct(split, n) for n in range(1, LONGEST_N + 1)}
    if causal_lm is not None:
        model = CausalLM(causal_lm, compute)
        texts = [sample.text for sample in samples]
        if tokenizer is not None and model.end is not None:  # one token for the causal LM too, under its own name
            texts = [text.replace(tokenizer.decode([tokenizer.eos_id]), model.end) for text in texts]
        found |= model.perplexity(texts, batch)
        if references:
            found |= {"reference": reference, "mauve": mauve(model, texts, references, batch)}
    return found


class CausalLM:
    """A transformers causal language model to score texts, from a local folder or the hub, with safetensors weights.

    Raises UsageError if transformers is not installed, or the model cannot be loaded.
    """

    def __init__(self, name: str, compute: Compute) -> None:
        try:
            import transformers
        except ImportError as error:
            raise UsageError(f"--causal_lm needs the package transformers, which is not installed: {INSTALL}") from error
        here = Path(name).is_dir()
        if not here and not hub.is_repository(name):
            raise UsageError(
                f"there is no folder {name}, and it is no hub id; give --causal_lm a folder or a hub id such as gpt2"
            )
        reachable = not here and hub.reachable()
        kind: Any = transformers
        try:
            self.tokenizer = kind.AutoTokenizer.from_pretrained(name, local_files_only=not reachable, trust_remote_code=False)
            self.model = kind.AutoModelForCausalLM.from_pretrained(
                name, local_files_only=not reachable, trust_remote_code=False, use_safetensors=True
            )
        except Exception as error:
            why = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
            if here or reachable:
                raise UsageError(f"causal LM {name} cannot be loaded: {why}") from error
            raise UsageError(
                f"causal LM {name} is no folder here, it is not in the local cache, and the hub cannot be reached; download it "
                "where there is a network and give its folder"
            ) from error
        self.name, self.compute = name, compute
        self.end: str | None = self.tokenizer.eos_token
        self.model.to(compute.device).eval()
        longest = getattr(self.model.config, "max_position_embeddings", None) or CONTEXT
        self.context = min(CONTEXT, longest)

    def perplexity(self, texts: Sequence[str], batch: int) -> dict[str, Any]:
        """exp of the mean nats a token over all texts, in windows of at most 1,024 tokens that do not overlap.

        The first token of a window is given, not scored. Nothing is put before a text.
        """
        windows = [(i, ids) for i, text in enumerate(texts) for ids in self._windows(text) if len(ids) > 1]
        if not windows:
            raise UsageError(f"no text has two tokens of {self.name}, so none can be scored by it")
        nll, count = (torch.zeros(len(texts), dtype=torch.float64) for _ in range(2))
        for part, logits, ids in self._forward(windows, batch):
            for row, (i, window) in enumerate(part):
                target = ids[row, 1 : len(window)]
                nll[i] += F.cross_entropy(logits[row, : len(window) - 1].float(), target, reduction="sum").double().cpu()
                count[i] += len(window) - 1
        mean = float(nll.sum() / count.sum())
        scored = count > 0
        residual = (nll - mean * count)[scored]
        texts_scored = int(scored.sum())
        spread = texts_scored / (texts_scored - 1) if texts_scored > 1 else math.inf
        return {
            "causal_lm": self.name,
            "causal_nll": mean,
            "causal_nll_se": math.sqrt(float(residual.square().sum()) * spread) / float(count.sum()),
            "causal_tokens": int(count.sum()),
            "generative_perplexity": math.exp(mean) if mean < 700 else math.inf,
        }

    def features(self, texts: Sequence[str], batch: int) -> Tensor:
        """The last hidden state at the last token of each text's first window: [texts, width] fp32, without empty texts."""
        windows = [(i, next(self._windows(text), [])) for i, text in enumerate(texts)]
        rows = []
        for part, states, _ in self._forward([w for w in windows if w[1]], batch, states=True):
            rows += [states[row, len(window) - 1].float().cpu() for row, (_, window) in enumerate(part)]
        return torch.stack(rows)

    def _windows(self, text: str) -> Iterator[list[int]]:
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        for first in range(0, len(ids), self.context):
            yield ids[first : first + self.context]

    @torch.no_grad()
    def _forward(
        self, windows: Sequence[tuple[int, list[int]]], batch: int, *, states: bool = False
    ) -> Iterator[tuple[Sequence[tuple[int, list[int]]], Tensor, Tensor]]:
        """(some of the windows, logits [b, T, V] or last hidden states [b, T, D], ids [b, T]), padded after each window's end."""
        windows = sorted(windows, key=lambda window: -len(window[1]))
        device = self.compute.device
        first = 0
        while first < len(windows):
            longest = len(windows[first][1])
            size = max(1, min(batch, LOGIT_BYTES // (4 * longest * self.model.config.vocab_size)))
            part = windows[first : first + size]
            ids = torch.zeros(len(part), longest, dtype=torch.int64)
            seen = torch.zeros_like(ids)
            for row, (_, window) in enumerate(part):
                ids[row, : len(window)], seen[row, : len(window)] = torch.tensor(window), 1
            ids = ids.to(device)
            with self.compute.autocast():
                out = self.model(input_ids=ids, attention_mask=seen.to(device), output_hidden_states=states)
            yield part, out.hidden_states[-1] if states else out.logits, ids
            first += size


def mauve(model: CausalLM, texts: Sequence[str], references: Sequence[str], batch: int) -> float:
    """MAUVE (Pillutla et al. 2021) of texts against as many references, by the causal LM's features. Raises UsageError."""
    try:
        from mauve import compute_mauve
    except ImportError as error:
        raise UsageError("--reference needs the package mauve-text, which is not installed: pip install mauve-text") from error
    ours, theirs = model.features(texts, batch), model.features(references[: len(texts)], batch)
    return float(compute_mauve(p_features=theirs.numpy(), q_features=ours.numpy(), verbose=False).mauve)


def describe(found: dict[str, Any]) -> list[str]:
    """The figures as lines."""
    lines = [
        (
            "samples",
            f"{found['texts']:,} texts, {found['tokens']:,} {found['unit']}"
            + (f", {found['texts_with_ids']:,} of them read as ids" if found["texts_with_ids"] else "")
            + (f", {found['empty']} of them empty" if found["empty"] else ""),
        ),
        ("entropy", f"{found['entropy']:.4f} ± {found['entropy_se']:.4f} nats, of a token of one sample"),
        *((f"distinct-{n}", f"{found[f'distinct_{n}']:.4f}") for n in range(1, LONGEST_N + 1)),
    ]
    if "causal_lm" in found:
        perplexity = (
            f"{found['generative_perplexity']:.3f}  ({found['causal_nll']:.4f} ± {found['causal_nll_se']:.4f} nats a token)"
        )
        lines.append(("generative ppl", f"{perplexity} under {found['causal_lm']}, {found['causal_tokens']:,} tokens"))
    if "mauve" in found:
        lines.append(("MAUVE", f"{found['mauve']:.4f} against {found['reference']}"))
    return [f"{name:17}{value}" for name, value in lines]


def _error(values: Sequence[float]) -> float:
    """Standard error of a mean; inf for one value."""
    if len(values) < 2:
        return math.inf
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))
