"""The held-out likelihood bound of a model on a split of a corpus, and the split's unigram entropy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from atat_fast.config import EvalConfig
from atat_fast.data import TokenSplit
from atat_fast.data.packing import MUCH_UNKNOWN
from atat_fast.diffusion.bound import Estimate, NllFunction, Spread, estimate_nll
from atat_fast.diffusion.process import Process
from atat_fast.errors import UsageError
from atat_fast.models.dit import DiT


def evaluate(
    model: DiT,
    split: TokenSplit,
    config: EvalConfig,
    autocast: AbstractContextManager[Any],
    spread: Spread = Spread(),  # noqa: B008, it cannot change
    *,
    process: Process | None = None,
) -> Estimate:
    """The exact-count bound over `config.sequences` sequences of the split, in nats a token with its standard error.

    The sequences are spread evenly over the split. Neither they nor the masks depend on the model, so two models, or two steps
    of one run, are compared on the same masked tokens. Dropout is off. spread: for processes that share the work.
    process: if it has its own bound, compute that instead, which is never called nll.
    """
    if config.draws < 1 or config.batch < 1:
        raise UsageError(f"eval.draws and eval.batch must be at least 1, got {config.draws} and {config.batch}")
    length = model.config.length
    tokens, wanted = spread_sequences(split, length, config.sequences, model.cos.device)
    available = split.num_sequences(length)

    def extents(first: int, count: int) -> Tensor:
        found = split.extents([i * available // wanted for i in range(first, first + count)], length)
        assert found is not None
        return torch.from_numpy(found)

    with torch.no_grad(), autocast, evaluating(model):
        return estimate_nll(
            model_nll(model),
            tokens,
            wanted,
            mask_id=model.mask_id,
            draws=config.draws,
            batch=config.batch,
            seed=config.seed,
            document_end=split.eos_id if model.config.document_mask else None,
            spread=spread,
            process=None if process is None else process.hide,
            extents=None if split.rows is None else extents,
            block=model.config.block,
        )


def model_nll(model: DiT) -> NllFunction:
    """The model as a function for the bound."""
    return lambda masked: model.nll(masked.noisy, masked.rows, masked.target, masked.hidden_share, masked.documents, masked.tilt)


def require_whole_texts(model: DiT, split: TokenSplit) -> None:
    """Raise UsageError for prompts and responses, and for models of blocks, to which only `evaluate` does justice."""
    if split.rows is not None:
        raise UsageError(
            "this is not made for prompts and responses (data.prompt_column): it would count prompts; only the plain bound, with "
            "--draws masks of each row, leaves them out"
        )
    if model.config.block:
        raise UsageError(
            f"this is not made for models of blocks (model.block {model.config.block}), whose masks go block by block; only the "
            "plain bound, with --draws masks of each block, is theirs"
        )


def spread_sequences(
    split: TokenSplit, length: int, sequences: int, device: torch.device
) -> tuple[Callable[[int, int], Tensor], int]:
    """tokens(first, count) [count, L] of up to `sequences` sequences (0: all) spread evenly over the split, and their number."""
    split.require_sequences(length)
    available = split.num_sequences(length)
    wanted = min(sequences or available, available)

    def tokens(first: int, count: int) -> Tensor:
        which = [i * available // wanted for i in range(first, first + count)]
        rows = np.stack([split.sequence(i, length) for i in which]).astype(np.int64)
        return torch.from_numpy(rows).to(device)

    return tokens, wanted


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Inside, the model is in evaluation mode."""
    before = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(before)


def report(estimate: Estimate, split: TokenSplit, own: Estimate | None = None) -> dict[str, Any]:
    """The figures of an estimate, as a row of metrics.jsonl or a JSON file. own: the bound of the model's training schedule, if
    it has one (schedule_nll).

    If the tokenizer loses so much text that bits per byte bound nothing, bits_per_byte is None and unknown_share says why.
    """
    bytes_per_token = split.bytes_per_token
    lossy = split.unknown_share > MUCH_UNKNOWN
    return {
        "nll": estimate.nll,
        "nll_se": estimate.se,
        "perplexity": estimate.perplexity,
        "bits_per_token": estimate.bits_per_token(),
        "bits_per_byte": None if lossy else estimate.bits_per_byte(bytes_per_token),
        "unigram_entropy": split.unigram_entropy(),
        "bytes_per_token": bytes_per_token,
        "sequences": estimate.sequences,
        "length": estimate.length,
        **({} if own is None else {"schedule_nll": own.nll, "schedule_nll_se": own.se}),
        **({"unknown_share": split.unknown_share} if lossy else {}),
    }


def per_byte(row: dict[str, Any]) -> str:
    """A row's bits per byte in words."""
    if row["bits_per_byte"] is None:
        return f"no bound on bits per byte (the tokenizer lacks {row['unknown_share']:.1%} of the characters)"
    return f"{row['bits_per_byte']:.4f} bits per byte"
