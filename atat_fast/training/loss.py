"""From clean tokens to a loss: what is hidden, its weights, and what the importance estimator learns.

    counts -> context -> scores -> masks and weights -> backbone -> loss, and the estimator's loss from the backbone's errors

Without an estimator this is the plain process: uniform masks and the weights of `diffusion.weighting`. With one, its scores
tilt the masks and the weights by the curriculum's level, and the same backward pass trains it. The trainer and the benchmarks
both use `Objective`; no reported likelihood comes from here.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from atat_fast.config import Config
from atat_fast.diffusion.adaptive import hide_by_importance, relative_weights
from atat_fast.diffusion.count_law import CountLaw
from atat_fast.diffusion.counts import count_chances, weighting_at
from atat_fast.diffusion.curriculum import Curriculum
from atat_fast.diffusion.gaps import GapTable, cells_of
from atat_fast.diffusion.masking import hidden_in_batch, hide_for_training
from atat_fast.diffusion.process import MaskedBatch, Process, Scored
from atat_fast.diffusion.uniform import UNIFORM, hide
from atat_fast.distributed.wrap import compile_blocks
from atat_fast.hardware.compute import Compute
from atat_fast.models.dit import DiT
from atat_fast.models.importance import ImportanceEstimator, error_chance, importance_loss
from atat_fast.models.trunk import Randomness
from atat_fast.ops.attention import Documents

PREFIX = "importance."
"""Prefix of the estimator's parameters beside the model's."""
QUARTERS = 4
"""Number of groups of hidden tokens, by importance, in the record."""


class Objective:
    """The training loss of a model under a run's settings.

    Args:
        model: The backbone.
        config: The run's settings; diffusion, importance, curriculum and the model's dropout are read.
        compute: Device and dtype. torch.compile makes one graph of the model's forward and one of the estimator's.
        by_block: Compile each block by itself instead, for runs on several ranks.
        seed: Seed of masks and dropout.
        total: Sequences in a global batch.
        estimator: Makes the scores if config.importance has a source. On the model's device.
        process: Chooses the masks if there is no estimator. On the model's device.
    """

    def __init__(
        self,
        model: DiT,
        config: Config,
        compute: Compute,
        *,
        seed: int,
        total: int,
        estimator: ImportanceEstimator | None = None,
        process: Process = UNIFORM,
        by_block: bool = False,
    ) -> None:
        if (estimator is None) != (config.importance.source == "none"):
            have = "no estimator" if estimator is None else "an estimator"
            raise ValueError(f"importance.source is {config.importance.source}, but {have} is given")
        self.model, self.config, self.compute, self.estimator, self.process = model, config, compute, estimator, process
        self.seed, self.total = seed, total
        self.curriculum = Curriculum(config.curriculum)
        self.gaps = GapTable(config.diffusion.gap_power, compute.device) if config.diffusion.gap_power else None
        self.count_law: CountLaw | None = None
        if config.diffusion.counts == "learned":
            start = count_chances(config.diffusion, config.model.length, 0.0)
            assert start is not None
            self.count_law = CountLaw(start, compute.device)
        network = None if estimator is None else estimator.network
        if compute.compile and by_block:
            compile_blocks(model)
        self.forward: Any = torch.compile(model) if compute.compile and not by_block else model
        self.score: Any = torch.compile(network) if compute.compile and network is not None else network

    def alike(self, *, seed: int, total: int) -> Objective:
        """This objective for evaluation: another seed and batch size, not compiled, at the same place in the curriculum."""
        compute = dataclasses.replace(self.compute, compile=False)
        other = Objective(
            self.model, self.config, compute, seed=seed, total=total, estimator=self.estimator, process=self.process
        )
        other.curriculum.load(self.curriculum.state())
        return other

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """All trained parameters: the model's under their own names, then the estimator's with the prefix `importance.`."""
        named = dict(self.model.named_parameters())
        if self.estimator is not None:
            named |= {PREFIX + name: p for name, p in self.estimator.named_parameters()}
        return named

    def parameters(self) -> Iterator[nn.Parameter]:
        """All trained parameters."""
        return iter(self.named_parameters().values())

    def loss(
        self,
        tokens: Tensor,
        sample_ids: Tensor,
        *,
        first: int,
        step: int,
        progress: float = 0.0,
        documents: Documents | None = None,
        frozen: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of slots first .. first + B - 1 of step `step`'s global batch.

        tokens [B, L] and sample_ids [B] on the model's device. progress: the share of the run that is over. documents: attention
        stays inside them. frozen, lengths: tokens that are never hidden nor counted, as in `hide_for_training`.
        Returns the loss to backpropagate, divided by the global batch's tokens so that micro-batches add up, and detached parts
        that also add up: diffusion (nats a token); with an estimator also importance (its cross-entropy), target, score and
        square_error (means over the global batch's hidden tokens), and nll_quarters and hidden_quarters [4], sums of nll and
        numbers of tokens by rising score.
        Raises BadScores, on a CPU, if the estimator's scores are not numbers in [0, 1].
        """
        how: dict[str, Any] = {"first": first, "step": step, "progress": progress, "documents": documents}
        batch = self.hide(tokens, sample_ids, frozen=frozen, lengths=lengths, **how)
        return self.loss_of(batch, sample_ids, step=step, progress=progress)

    def loss_of(self, batch: MaskedBatch, sample_ids: Tensor, *, step: int, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """`loss` of a batch that is already masked."""
        loss, nll = self.forward_loss(batch, sample_ids, torch.full((), step, device=batch.noisy.device))
        parts = {"diffusion": loss.detach()}
        if self.gaps is not None and batch.gaps is not None:
            self.gaps.observe(batch.gaps, nll[: batch.hidden])
        if self.count_law is not None:
            self.count_law.observe(batch.hidden_share, batch.rows[: batch.hidden], nll[: batch.hidden])
        if batch.importance is not None:
            own, more = self._importance(batch, batch.importance, nll, batch.noisy.shape[1], step, progress)
            loss, parts = loss + self.config.importance.loss_weight * own, parts | more
        return loss, parts

    def forward_loss(self, batch: MaskedBatch, sample_ids: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        """The backbone's part of `loss` for a masked batch, and the nll of its rows. step: 0-d int64."""
        if self.compute.compile:  # one graph for every number of hidden rows
            for tensor in (batch.rows, batch.target, batch.weights, *(batch.tilt or ())[1:]):
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
        with self.compute.autocast():
            loss, nll = self.forward(
                batch.noisy,
                batch.rows,
                batch.target,
                batch.weights,
                batch.hidden_share,
                Randomness(self.seed, step, sample_ids),
                batch.documents,
                batch.tilt,
            )
        return loss / (self.total * batch.tokens / len(batch.noisy)), nll

    def hide(
        self,
        tokens: Tensor,
        sample_ids: Tensor,
        *,
        first: int,
        step: int,
        progress: float = 0.0,
        documents: Documents | None = None,
        frozen: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> MaskedBatch:
        """The masked batch: masks, rows and weights of slots first .. first + B - 1. Arguments are those of `loss`."""
        config, importance = self.config.diffusion, self.config.importance
        shape, blocks = tokens.shape, self.blocks
        if blocks > 1:  # each is masked as a sequence of its own
            tokens = tokens.view(-1, self.config.model.block)
            sample_ids = (sample_ids[:, None] * blocks + torch.arange(blocks, device=sample_ids.device)).flatten()
            lengths = self.lengths_of_blocks()
        place: dict[str, Any] = {
            "first": first * blocks,
            "total": self.total * blocks,
            "mask_id": self.model.mask_id,
            "sample_ids": sample_ids,
            "seed": self.seed,
            "step": step,
            "learned": self.learned_counts(),
            "frozen": frozen,
            "lengths": lengths,
        }
        level = self.curriculum.at(progress).level
        if self.estimator is None:
            choose: Any = functools.partial(hide, spread=level * config.spread) if config.spread else self.process.hide
            batch = hide_for_training(tokens, config, progress=progress, choose=choose, **place)
            batch.documents = documents
            return self._whole(self._weigh_gaps(batch), shape)
        tilt, focus = level * importance.tilt, level * importance.focus

        def score(seen: Tensor, clean: Tensor, share: Tensor) -> Scored:
            return self.scores(seen, clean, share, documents)

        choose = functools.partial(
            hide_by_importance, score=score, sees=importance.sees, rho=importance.rho, tilt=tilt, focus=focus
        )

        learned = importance.differentiable_weights and weighting_at(config, progress) != "ce"
        batch = hide_for_training(
            tokens,
            dataclasses.replace(config, weighting="uniform") if learned else config,
            progress=progress,
            choose=choose,
            **place,
        )
        if learned and batch.importance is not None:
            exponent = focus if config.weighting == "importance" else -tilt
            relative = relative_weights(batch.importance.scores, batch.noisy == self.model.mask_id, exponent)
            batch.weights = batch.weights * relative.flatten()[batch.rows]
        batch.documents = documents
        return self._whole(self._weigh_gaps(batch), shape)

    @property
    def blocks(self) -> int:
        """Blocks of a sequence that are masked each by itself; 1 without model.block."""
        model = self.config.model
        return model.length // model.block if model.block else 1

    def lengths_of_blocks(self) -> Tensor | None:
        """Lengths of all blocks of a global batch, for counts that are dealt to them in a random order; None without blocks."""
        return torch.full((self.total * self.blocks,), self.config.model.block) if self.blocks > 1 else None

    def _whole(self, batch: MaskedBatch, shape: torch.Size) -> MaskedBatch:
        """A batch of blocks as one of sequences [B, L] again. Flat rows are the same."""
        if self.blocks > 1:
            batch.noisy = batch.noisy.view(shape)
        return batch

    def _weigh_gaps(self, batch: MaskedBatch) -> MaskedBatch:
        """The batch, its weights times those of its tokens' gaps if there are any."""
        if self.gaps is not None:
            batch.gaps = cells_of(batch.noisy == self.model.mask_id).flatten()[batch.rows[: batch.hidden]]
            batch.weights[: batch.hidden] *= self.gaps.weights(batch.gaps)
        return batch

    def end_step(self, step: int, ranks: int) -> None:
        """Take in what all ranks' losses of this step say. Every rank calls it, after its last micro-batch."""
        if self.gaps is not None:
            self.gaps.step(ranks)
        if self.count_law is not None:
            self.count_law.step(step, ranks)

    def learned_counts(self) -> Tensor | None:
        """The law that counts learned has come to, or None."""
        return None if self.count_law is None else self.count_law.chances()

    def tensors(self) -> dict[str, Tensor]:
        """State that a checkpoint keeps beside parameters, the same on every rank."""
        found = {} if self.gaps is None else {"gaps": self.gaps.sums}
        return found if self.count_law is None else found | self.count_law.tensors()

    def scores(self, seen: Tensor, clean: Tensor, hidden_share: Tensor, documents: Documents | None = None) -> Scored:
        """The estimator's score of every token. seen, clean [B, L]: ids it may see, and clean ids. hidden_share [B]."""
        assert self.estimator is not None
        if self.score is None:
            return self.estimator.combine(None, clean)
        with self.compute.autocast():
            read = self.estimator.read(self.model, seen, hidden_share, documents)
            logits = self.score(read, hidden_share, documents)
        return self.estimator.combine(logits, clean)

    def _importance(
        self, batch: MaskedBatch, scored: Scored, nll: Tensor, length: int, step: int, progress: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The estimator's loss at the hidden tokens, as their share of the global batch's mean, and the parts to record."""
        hidden, rows = batch.hidden, batch.rows[: batch.hidden]  # the rest is padding
        nll, target = nll[:hidden], error_chance(nll[:hidden])
        scores = scored.scores.detach().flatten()[rows]
        place: dict[str, Any] = {"seed": self.seed, "step": step, "progress": progress, "learned": self.learned_counts()}
        everywhere = hidden_in_batch(
            self.config.diffusion, length, self.total * self.blocks, lengths=self.lengths_of_blocks(), **place
        )
        mean = 1 / max(1.0, everywhere)
        loss = torch.zeros((), device=nll.device)
        if scored.logits is not None:
            loss = importance_loss(scored.logits.flatten()[rows], target).sum() * mean
        order = torch.argsort(scores, stable=True)
        quarters = nll[order].tensor_split(QUARTERS)
        sizes = torch.tensor([len(part) for part in quarters], dtype=torch.float32)
        return loss, {
            "importance": loss.detach(),
            "target": target.sum() * mean,
            "score": scores.sum() * mean,
            "square_error": (scores - target).square().sum() * mean,
            "nll_quarters": torch.stack([part.sum() for part in quarters]),
            "hidden_quarters": sizes.to(nll.device, non_blocking=True),
        }


def baseline(target: float) -> float:
    """Binary cross-entropy, in nats, of always predicting the mean target: the loss of an estimator that knows nothing."""
    return sum(-p * math.log(p) for p in (target, 1 - target) if p > 0)
