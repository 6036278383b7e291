"""accelerate: run an existing model, with its own class and parameters, on this package's ops.

    model = atat_fast.accelerate(model)            # in place; restore(model) undoes it
    loss = masked_diffusion_loss(model, tokens, mask_id=50_257, seed=1, step=step)

Two kinds are recognised, by their parts and not by their names: MDLM's networks (`mdlm`), and transformers' masked language
models and bidirectional decoders (`hidden_rows`).
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from atat_fast.config import DiffusionConfig
from atat_fast.diffusion.masking import hide_for_training
from atat_fast.models.accelerate import hidden_rows, mdlm
from atat_fast.models.accelerate.mdlm import features, weighted_loss

__all__ = ["accelerate", "features", "masked_diffusion_loss", "restore", "weighted_loss"]


def accelerate(
    model: nn.Module,
    *,
    time_conditioning: bool | None = None,
    autocast: torch.dtype | None = torch.bfloat16,
    shift: bool | None = None,
    check: bool = True,
) -> nn.Module:
    """Replace the forward of a model by a faster one that gives the same, in place.

    model: one of these, not compiled or wrapped (accelerate first, then compile or wrap; PEFT's models may come before or after):
        MDLM's network, or a module that holds it as `backbone` (MDLM's Lightning module, the hub's class);
        a model with `get_output_embeddings()` and a loss for `labels`, as transformers' classes for masked language modelling,
        LLaDA and Dream have. With labels and in training its forward then gives the loss of the tokens whose label is not -100,
        and logits None: no logits of other tokens are made. Everything else is as before.
    time_conditioning: for MDLM, whether sigma is read. False takes every sigma as 0, and modulation then costs nothing. The
        default is the setting of the module around the network (MDLM zeroes sigma itself if its time_conditioning is False), else
        True.
    autocast: for MDLM on a GPU, the blocks and the head run under autocast to this dtype, as in its own forward; None leaves the
        precision to the caller. On a CPU, and for other models, it is always the caller's.
    shift: for others than MDLM, whether a state predicts the next position's token (Dream's does). The default is what the
        class's loss does, and False for a class without one (LLaDA's).
    check: run the model before and after on two short sequences, and refuse if logits, or losses, differ. It runs without
        dropout, with small random numbers in place of parameters that are all zero. The model must be able to run on its device.

    MDLM's forward(indices [B, L], sigma [B]) gives logits [B, L, V] as before. A block in training mode drops at its own rate.
    Each forward takes a new seed from torch's generator, so torch.manual_seed repeats its masks, but they are not the masks of
    torch's dropout. Activation checkpointing uses the same mask twice.

    Returns model. Raises ValueError, and changes nothing, if the model is not one of these; the error says what is missing.
    """
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise ValueError(f"accelerate the model before {type(model).__name__} wraps it, or its .module")
    if _is_accelerated(model):
        restore(model)
    inner = _without_adapters(model)
    if mdlm.looks_alike(model) or not hidden_rows.looks_alike(inner):
        if shift is not None:
            raise ValueError("shift is a setting of models with get_output_embeddings(), and this one has none; leave it out")
        mdlm.accelerate(model, time_conditioning=time_conditioning, autocast=autocast, check=check)
    elif time_conditioning is not None:
        raise ValueError(f"time_conditioning is a setting of MDLM's networks, and {type(inner).__name__} is none; leave it out")
    else:
        hidden_rows.accelerate(inner, shift=shift, check=check)
    return model


def restore(model: nn.Module) -> nn.Module:
    """Give an accelerated model its own forward back. Returns model. Raises ValueError if it is not accelerated."""
    inner = _without_adapters(model)
    if hidden_rows.is_accelerated(inner):
        hidden_rows.restore(inner)
    else:
        mdlm.restore(model)
    return model


def masked_diffusion_loss(
    model: nn.Module,
    tokens: Tensor,
    *,
    mask_id: int,
    seed: int,
    step: int,
    sample_ids: Tensor | None = None,
    weighting: str = "uniform",
    masking: str = "exact",
    first: int = 0,
    total: int | None = None,
    frozen: Tensor | None = None,
    attention_mask: Tensor | None = None,
    lengths: Tensor | None = None,
    **inputs: Any,
) -> Tensor:
    """The training loss of an accelerated model on clean tokens, in nats a token: hide, run, weigh.

    tokens:      [B, L] ids without mask_id.
    seed, step:  fix the masks, together with sample_ids [B] (int64, by default first + 0 .. B - 1) and the position.
    weighting:   "uniform" is the likelihood bound's own weight; "ce" the plain mean over hidden tokens (docs/training.md).
    masking:     "exact" hides exactly k tokens, k stratified over the global batch; "bernoulli" is MDLM's and LLaDA's process.
    first, total: this call's sequences are first .. first + B - 1 of a global batch of `total`, B by default.
    frozen:      [B, L] bool: tokens that are never hidden nor counted, as those of a prompt.
    attention_mask: [B, L], 0 at padding, which is frozen too. The model gets it. Not for MDLM's networks, which have none.
    lengths:     [total] int64 on a CPU: the number of tokens that are not frozen in each sequence of the global batch. Needed if
                 some are frozen and total is more than B; without it they are counted, which waits for a GPU.
    inputs:      more arguments of the model's forward, such as position_ids.

    With n tokens that are not frozen, k follows the law of n, and the bound's weight is (n + 1) / k. mask_id is never predicted.
    A network with time conditioning gets -log(1 - share hidden), with a share of at most 0.999 as in MDLM's own schedule.
    Where a state predicts the next position's token, first tokens are frozen.
    Returns a scalar to call backward on. Under DDP, call it inside the wrapped module's forward.
    Raises ValueError if the model is not accelerated or cannot do this, masking or weighting is unknown, or ids are bad.
    """
    network = _without_adapters(model)
    of_rows = hidden_rows.is_accelerated(network)
    for name, value, known in (("masking", masking, ("exact", "bernoulli")), ("weighting", weighting, ("uniform", "ce"))):
        if value not in known:
            raise ValueError(f"{name} {value!r} is unknown; choose {' or '.join(known)}")
    if not of_rows:
        network = mdlm.accelerated(model)
        if attention_mask is not None or inputs:
            given = ", ".join([*(["attention_mask"] if attention_mask is not None else []), *inputs])
            raise ValueError(f"MDLM's networks take no {given}; leave it out, and pad with frozen tokens if you must")
    elif not hidden_rows.is_bidirectional(network):
        raise ValueError(
            f"{type(network).__name__} is causal: its early tokens do not see late ones, so it cannot fill in tokens in any "
            "order; turn its causal mask off before accelerate"
        )
    vocabulary = (hidden_rows if of_rows else mdlm).vocabulary_of(network)
    if not 0 <= mask_id < vocabulary:
        raise ValueError(f"mask_id {mask_id} is outside the vocabulary of {vocabulary}")
    batch = tokens.shape[0]
    total = batch if total is None else total
    if sample_ids is None:
        sample_ids = torch.arange(first, first + batch, device=tokens.device)
    masked = hide_for_training(
        tokens,
        DiffusionConfig(masking=masking, weighting=weighting),  # type: ignore[arg-type]
        first=first,
        total=total,
        mask_id=mask_id,
        sample_ids=sample_ids,
        seed=seed,
        step=step,
        frozen=_all_frozen(tokens, frozen, attention_mask, shift=of_rows and hidden_rows.is_shifted(network)),
        lengths=lengths,
    )
    if of_rows:
        if attention_mask is not None:
            inputs["attention_mask"] = attention_mask
        loss = hidden_rows.weighted_loss(
            network, masked.rows, masked.target, masked.weights, forbidden=mask_id, input_ids=masked.noisy, **inputs
        )
    else:
        sigma = mdlm.sigma_of(network, masked.hidden_share)
        loss = weighted_loss(network, masked.noisy, masked.rows, masked.target, masked.weights, sigma, mask_id=mask_id)
    return loss / masked.tokens


def _all_frozen(tokens: Tensor, frozen: Tensor | None, attention_mask: Tensor | None, *, shift: bool) -> Tensor | None:
    """Tokens that are never hidden: frozen, padding, and with a shift the first of each sequence; None if there are none."""
    for name, tensor in (("frozen", frozen), ("attention_mask", attention_mask)):
        if tensor is not None and tensor.shape != tokens.shape:
            raise ValueError(f"{name} must have the shape of tokens, {tuple(tokens.shape)}, got {tuple(tensor.shape)}")
    if attention_mask is not None:
        padding = attention_mask == 0
        frozen = padding if frozen is None else frozen | padding
    if shift:
        frozen = torch.zeros_like(tokens, dtype=torch.bool) if frozen is None else frozen.clone()
        frozen[:, :1] = True
    return frozen


def _without_adapters(model: nn.Module) -> nn.Module:
    """The model inside of PEFT's wrapper, or the model."""
    base = getattr(model, "get_base_model", None)
    return cast(nn.Module, base()) if callable(base) else model


def _is_accelerated(model: nn.Module) -> bool:
    return hidden_rows.is_accelerated(_without_adapters(model)) or mdlm.is_accelerated(model)
