"""The model card of a saved model: what it is, what it learned from, and how good it was, from the run's own records."""

from __future__ import annotations

import re
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

TAGS = ["masked-diffusion", "diffusion-language-model", "text-generation"]
HUB_DATASETS = {
    "wikitext2": "Salesforce/wikitext",
    "wikitext103": "Salesforce/wikitext",
    "openwebtext": "Skylion007/openwebtext",
    "lm1b": "billion-word-benchmark/lm1b",
    "text8": "afmck/text8",
}
TEXT_LICENCES = {
    "python-docs": "the Python Software Foundation's licence (PSF-2.0)",
    "wikitext2": "CC BY-SA 3.0 and the GFDL, Wikipedia's",
    "wikitext103": "CC BY-SA 3.0 and the GFDL, Wikipedia's",
    "text8": "CC BY-SA 3.0 and the GFDL, Wikipedia's",
    "openwebtext": "CC0 as a collection; each page's own as a text",
}
MOST_SAMPLES, SAMPLE_CHARACTERS = 3, 1_200
BOUND = (
    "The negative log-likelihood is the exact-count bound (NELBO) in nats a token on the averaged weights: an upper bound, and "
    "so are the perplexity and the bits that follow from it. The number after ± is its standard error."
)


def model_card(facts: dict[str, Any], *, name: str, licence: str | None = None) -> str:
    """README.md of the model that `facts` describes (see `push.with_card`): the hub's metadata, then text for people.

    name: of the model, owner/name if it is on the hub. licence: of the weights, an identifier the hub knows; None writes
    "unknown". What `facts` lacks is left out.
    """
    corpus = str(facts.get("data", {}).get("corpus", "")) or None
    parts = [f"# {name.rsplit('/', 1)[-1]}", _summary(facts), _use(name)]
    parts += [_table("Model", _model_rows(facts)), _table("Data", _data_rows(facts, corpus))]
    evaluation = facts.get("evaluation") or {}
    if "nll" in evaluation:
        parts.append(_table("Evaluation", _evaluation_rows(evaluation)) + "\n\n" + BOUND)
    parts += [_samples(facts.get("samples") or []), _licence(licence, corpus)]
    metadata = _metadata(facts, name, licence, corpus, evaluation)
    return f"---\n{metadata.to_yaml()}\n---\n\n" + "\n\n".join(part for part in parts if part) + "\n"


def _metadata(
    facts: dict[str, Any], name: str, licence: str | None, corpus: str | None, evaluation: dict[str, Any]
) -> ModelCardData:
    results = None
    if "nll" in evaluation:
        shared: dict[str, Any] = {
            "task_type": "text-generation",
            "dataset_type": corpus or "unknown",
            "dataset_name": corpus or "unknown",
        }
        results = [
            EvalResult(metric_type=kind, metric_value=round(evaluation[key], 4), metric_name=title, **shared)
            for kind, key, title in (
                ("nll", "nll", "NELBO, nats a token (upper bound)"),
                ("perplexity", "perplexity", "perplexity (upper bound)"),
                ("bits_per_byte", "bits_per_byte", "bits per byte (upper bound)"),
            )
            if evaluation.get(key) is not None
        ]
    dataset = HUB_DATASETS.get(corpus or "")
    if dataset is None and corpus is not None and corpus.startswith("hub:"):
        dataset = corpus.removeprefix("hub:").split(":")[0]
    return ModelCardData(
        model_name=name if results else None,
        license=licence or "unknown",
        library_name="atat_fast",
        tags=TAGS,
        datasets=[dataset] if dataset else None,
        eval_results=results,
    )


def _summary(facts: dict[str, Any]) -> str:
    total = facts.get("parameters", {}).get("total")
    size = f" with {total:,} parameters" if total else ""
    return (
        f"A masked-diffusion language model (MDLM's DiT){size}, trained and saved with `atat_fast`. It fills in masked tokens, "
        "anywhere in a text: it infills and continues, and writes from nothing."
    )


def _use(name: str) -> str:
    return f"""```python
from atat_fast.models.hub import from_pretrained
from atat_fast.sampling.samplers import sample
import torch

saved = from_pretrained("{name}")
ids = torch.tensor([saved.tokenizer.encode_prompt("The [MASK] [MASK] is")])
print(saved.tokenizer.decode(sample(saved.model.eval(), ids, steps=16)[0]))
```

`python -m atat_fast.evaluate --model {name}` measures it again. Files are safetensors and JSON; loading runs no code from here.
`AutoTokenizer.from_pretrained("{name}")` reads the tokenizer."""


def _model_rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    model = facts.get("config", {}).get("model", {})
    rows = [("architecture", f"{model['layers']} layers of {model['dim']}, {model['heads']} heads")] if "layers" in model else []
    rows += [("sequence length", f"{model['length']:,} tokens")] if "length" in model else []
    rows += [("vocabulary", f"{facts['vocabulary']:,} ids, the mask among them")] if "vocabulary" in facts else []
    rows += [("parameters", ", ".join(f"{part} {count:,}" for part, count in facts.get("parameters", {}).items()))]
    rows += [("weights", {"ema": "moving average", "raw": "last step"}.get(str(facts.get("weights")), ""))]
    if "importance" in facts:
        rows.append(("importance estimator", "included (`importance.safetensors`)"))
    if "schedule" in facts:
        rows.append(("masking schedule", f"{facts['schedule']} (`schedule.safetensors`)"))
    return [row for row in rows if row[1]]


def _data_rows(facts: dict[str, Any], corpus: str | None) -> list[tuple[str, str]]:
    data = facts.get("data", {})
    rows = [("corpus", corpus or ""), ("counts", str(data.get("counts", ""))), ("tokenizer", str(data.get("tokenizer", "")))]
    rows += [("steps", f"{facts['step']:,}")] if "step" in facts else []
    rows += [("tokens seen", f"{facts['tokens']:,}")] if "tokens" in facts else []
    rows += [(f"SHA-256 of {split} tokens", f"`{value}`") for split, value in data.get("sha256", {}).items()]
    return [row for row in rows if row[1]]


def _evaluation_rows(evaluation: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [("negative log-likelihood", f"{evaluation['nll']:.4f} ± {evaluation.get('nll_se', float('nan')):.4f} nats a token")]
    for key, title in (
        ("perplexity", "perplexity"),
        ("bits_per_byte", "bits per byte"),
        ("unigram_entropy", "unigram entropy, nats a token"),
    ):
        if evaluation.get(key) is not None:
            rows.append((title, f"{evaluation[key]:.4g}"))
    if "sequences" in evaluation:
        rows.append(("held-out text", f"{evaluation['sequences']:,} sequences of {evaluation.get('length', 0):,} tokens"))
    return rows


def _samples(samples: list[str]) -> str:
    shown = [fenced(text[:SAMPLE_CHARACTERS]) for text in samples[:MOST_SAMPLES]]
    return "## Samples\n\nUnconditional, not chosen.\n\n" + "\n\n".join(shown) if shown else ""


def _licence(licence: str | None, corpus: str | None) -> str:
    weights = (
        f"Weights: {licence}." if licence else "Weights: no licence was stated by whoever saved them; ask before you use them."
    )
    text = TEXT_LICENCES.get(corpus or "")
    of_text = f"under {text}" if text else "under its own terms, which are not recorded here"
    return f"## Licence\n\n{weights} The text they were trained on is {of_text}. The code of `atat_fast` is Apache-2.0."


def _table(title: str, rows: list[tuple[str, str]]) -> str:
    if not rows:
        return ""
    lines = [f"| {what} | {value.replace('|', chr(92) + '|')} |" for what, value in rows]
    return "\n".join([f"## {title}", "", "| | |", "|---|---|", *lines])


def fenced(text: str) -> str:
    """Text as a Markdown block that shows it unchanged; control characters become U+FFFD."""
    text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", "\ufffd", text.replace("\r\n", "\n"))
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"
