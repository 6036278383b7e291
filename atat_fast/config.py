"""One typed tree of settings. Presets are YAML files in `presets/` that override these defaults.

The defaults are the seed run's (WikiText-103, GPT-2 tokens, a 12-layer DiT), so a preset says only where it differs.
Nothing here imports jsonargparse: commands parse, and the rest of the package takes these objects.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from importlib import resources
from typing import Any, Literal

import yaml

from atat_fast.errors import UsageError, nearest


@dataclass
class ModelConfig:
    """The DiT.

    Args:
        dim: Width D of the residual stream.
        layers: Number of blocks.
        heads: Attention heads; dim / heads must be an even number.
        length: Sequence length L in training, and the longest the model takes.
        mlp_ratio: Width of the MLP divided by dim.
        conditioning_dim: Width of the time embedding.
        time_conditioning: Whether the model is told how much is hidden. If not, all sequences share one conditioning row.
        tie_embeddings: Whether the vocabulary head shares the token embedding's weight.
        qk_norm: Whether queries and keys are normalised before the rotation.
        activation: Nonlinearity of the MLP: tanh-GELU, or the square of ReLU.
        dropout: Chance of dropping an element of a branch before it joins the residual stream.
        document_mask: Whether attention stays inside a document if a sequence holds several. Likelihoods are then those of text
            with known document ends.
        block: Tokens K of a block, which divide the length: hidden tokens see their own block and all earlier ones whole, and
            text is made block by block, from a cache. 1 is autoregressive; 0 is one block, the whole sequence.
    """

    dim: int = 768
    layers: int = 12
    heads: int = 12
    length: int = 1024
    mlp_ratio: int = 4
    conditioning_dim: int = 128
    time_conditioning: bool = False
    tie_embeddings: bool = False
    qk_norm: bool = False
    activation: Literal["gelu", "relu2"] = "gelu"
    dropout: float = 0.1
    document_mask: bool = False
    block: int = 0


@dataclass
class DataConfig:
    """The text to read.

    Args:
        corpus: A known name (python-docs, wikitext2, wikitext103, openwebtext, lm1b, text8), a path to a .txt, .jsonl, .json,
            .csv or .parquet file (.gz and .zst too) or to a folder of them, or any data set on the hub as hub:owner/name or
            hub:owner/name:configuration.
        tokenizer: bytes, bpe-N (trained on the training split, N tokens in all), a path to a tokenizer.json, or a hub id.
        valid: Path of the held-out text if corpus is a path. Without it valid_fraction of the documents is held out, or the end
            of a single document.
        valid_fraction: Share of documents held out if the corpus has no validation split.
        text_column: Column of the text in rows of files and hub data sets; by default `text`, or the only column of text.
        prompt_column: Column of prompts. Each row is then a sequence of its own: a prompt, the text of text_column (by default
            `response`) and an end of document. Prompts are seen, and are never hidden nor counted. Needs model.document_mask.
        max_documents: Most documents read of each split; 0 reads all.
        cache_dir: Folder of token files; by default $ATAT_FAST_CACHE, else ~/.cache/atat_fast.
        num_workers: Threads that tokenise; 0 is one for each core.
    """

    corpus: str = "wikitext103"
    tokenizer: str = "gpt2"
    valid: str | None = None
    valid_fraction: float = 0.05
    text_column: str | None = None
    prompt_column: str | None = None
    max_documents: int = 0
    cache_dir: str | None = None
    num_workers: int = 0


@dataclass
class DiffusionConfig:
    """What is hidden, and how the training loss weighs it. Reported likelihoods never depend on `weighting`.

    Args:
        masking: exact hides exactly k tokens, k uniform on 0..L; bernoulli hides each token with the log-linear schedule's
            rate, as MDLM does.
        pairing: antithetic draws counts in pairs (k, L-k), stratified over the whole global batch; stratified draws one in each
            of global_batch equal parts, as MDLM does; independent draws each alone.
        mirror: Whether both slots of an antithetic pair hold the same sequence, with complementary masks. A step then sees
            global_batch / 2 sequences and hides each of their tokens exactly once. global_batch must be even.
        counts: Law of k in training: uniform on 0..L; bell, a Gaussian in k/L cut to 1..L; or learned, which begins as a bell and
            follows the slope of the loss in k/L. All but uniform need exact masking.
        counts_centre: Centre of the bell, a share of L.
        counts_width: Standard deviation of the bell before it is cut, a share of L.
        counts_anneal_from: Share of the run after which that law turns into uniform counts, linearly until the end; 1 is never.
        weighting: uniform is the bound's weight, (L+1)/k, divided by the ratio of the law of k to uniform counts; ce is the plain
            mean over hidden tokens (no time weight); importance is uniform times exp(focus * score), normalised to mean 1 over a
            sequence's hidden tokens; order is (L+1) times the chance that a hidden token is revealed next. importance and order
            need an importance.source.
        ce_until: Share of the run that uses ce before `weighting` takes over.
        sigma_min: Least total noise of the log-linear schedule (bernoulli only).
        sigma_max: Greatest total noise of the log-linear schedule (bernoulli only).
        schedule: The masking process. log_linear hides every token at the same rate. token_identity gives each token a rate by
            its frequency in the training text, and has its own bound (docs/atat.md). All but log_linear need exact masking and
            importance.source none.
        spread: Chance, at curriculum level 1, that a sequence's hidden tokens lie evenly, one in each of k equal cells; below 0,
            that they are one span. Blind to the text, so what the model learns is unbiased. Needs exact masking, log_linear,
            importance.source none and no mirror.
        gap_power: Weights (expected loss + 0.1)^-gap_power of hidden tokens, relative to a mean of 1. The expected loss is a
            running mean for the distances to the nearest visible tokens, so contexts that tell little weigh less above 0.
        identity_strength: Tokens are revealed at rates exp(-identity_strength * log-rank) (token_identity only). Above 0 rare
            tokens stay hidden longer; 0 is the uniform process.
    """

    masking: Literal["exact", "bernoulli"] = "exact"
    pairing: Literal["antithetic", "stratified", "independent"] = "antithetic"
    mirror: bool = False
    counts: Literal["uniform", "bell", "learned"] = "uniform"
    counts_centre: float = 0.35
    counts_width: float = 0.2
    counts_anneal_from: float = 1.0
    weighting: Literal["uniform", "order", "importance", "ce"] = "uniform"
    ce_until: float = 0.0
    sigma_min: float = 1e-4
    sigma_max: float = 20.0
    schedule: str = "log_linear"
    identity_strength: float = 1.0
    spread: float = 0.0
    gap_power: float = 0.0


@dataclass
class ImportanceConfig:
    """How hard each token is estimated to be, and its effect on training (docs/atat.md). Reported likelihoods never depend on it.

    Args:
        source: learned scores come from a small network trained with the model; frequency is a token's log-rank in the training
            text; full is 0.7 learned + 0.3 frequency; none leaves masks and weights alone.
        sees: visible scores tokens from what stays visible, so masks tell nothing of what they hide; clean scores the text
            itself, an ablation whose training is biased. frequency is the clean token's either way.
        rho: Share of the visible tokens that are hidden too while scores are made (visible only).
        tilt: Odds exp(-tilt * score) of being revealed, at curriculum level 1. Above 0 hard tokens stay hidden longer.
        focus: Weight exp(focus * score) of a hidden token, at curriculum level 1 (diffusion.weighting importance only).
        loss_weight: Weight of the estimator's own loss.
        differentiable_weights: Whether the model's loss reaches the estimator through the weights it makes.
        reads: embedding: a transformer of its own reads the backbone's token embeddings; hidden: one linear map reads the
            backbone's own hidden states after its first `depth` blocks, which run once more on the context, without gradients.
        depth: Blocks of the backbone that it reads behind (reads hidden only).
        width: Width of the estimator (reads embedding only, as are layers and heads).
        layers: Transformer layers of the estimator.
        heads: Attention heads of the estimator; width / heads must be an even number.
    """

    source: Literal["none", "learned", "frequency", "full"] = "none"
    sees: Literal["visible", "clean"] = "visible"
    rho: float = 0.5
    tilt: float = 2.0
    focus: float = 1.0
    loss_weight: float = 0.1
    differentiable_weights: bool = False
    reads: Literal["embedding", "hidden"] = "embedding"
    depth: int = 1
    width: int = 256
    layers: int = 2
    heads: int = 4


@dataclass
class CurriculumConfig:
    """The level over the run. It multiplies importance.tilt, importance.focus and diffusion.spread.

    Args:
        kind: none is level 1 throughout; step keeps each phase's level; linear goes from each phase's level to the next one's;
            exponential too, but mostly at the phase's start; adaptive keeps a level until the watched loss stops falling.
        phases: Names of the phases.
        boundaries: Shares of the run at which phases end, one fewer than phases (adaptive finds its own).
        levels: Level of each phase: below 0 easy tokens are stressed, above 0 hard ones.
        cooldown: Last share of the run, over which the level returns to 0, so that training ends on the uniform bound.
        watch: What adaptive watches: the held-out bound at evaluations, or the training loss at log lines.
        patience: Values in a row without improvement after which adaptive starts the next phase.
        threshold: Nats a token by which a value must beat the phase's best to count as an improvement.
    """

    kind: Literal["none", "linear", "step", "exponential", "adaptive"] = "none"
    phases: list[str] = field(default_factory=lambda: ["easy", "mixed", "hard"])
    boundaries: list[float] = field(default_factory=lambda: [0.3, 0.7])
    levels: list[float] = field(default_factory=lambda: [-1.0, 0.0, 1.0])
    cooldown: float = 0.05
    watch: Literal["valid", "train"] = "valid"
    patience: int = 3
    threshold: float = 0.01


@dataclass
class OptimConfig:
    """The optimizer and its schedule: linear warm-up, flat, cosine to final_lr.

    Args:
        name: adamw (fused), or muon for the blocks' matrices with adamw for the rest.
        lr: Peak learning rate. muon's updates are scaled to the size of adamw's, so one rate serves both.
        final_lr: Learning rate at the last step.
        warmup: Share of the run that warms up.
        decay_from: Share of the run after which the cosine starts.
        beta1: Decay of adamw's first moment.
        beta2: Decay of adamw's second moment.
        weight_decay: Decoupled weight decay, on matrices only.
        clip: Greatest global gradient norm; 0 does not clip.
        ema: Decay of the averaged weights, which are evaluated and sampled; early steps use (1 + step) / (10 + step) if less.
        state: Precision of the moments. bf16 halves their memory, with stochastic rounding; 8bit (adamw only, needs torchao)
            quarters it. Weights, summed gradients and the average stay fp32.
    """

    name: Literal["adamw", "muon"] = "adamw"
    lr: float = 1e-4
    final_lr: float = 1e-6
    warmup: float = 0.3
    decay_from: float = 0.7
    beta1: float = 0.9
    beta2: float = 0.999
    weight_decay: float = 0.01
    clip: float = 1.0
    ema: float = 0.9999
    state: Literal["fp32", "bf16", "8bit"] = "fp32"


@dataclass
class TrainConfig:
    """The training loop.

    Args:
        max_steps: Optimizer steps. A resumed run may be given more; shares of the run then mean shares of the longer run.
        init_from: Weights to start from: a run folder, a saved model or an MDLM checkpoint. The optimizer starts anew.
        global_batch: Sequences in one optimizer step, over all ranks and accumulation.
        micro_batch: Sequences in one forward pass; 0 chooses the largest divisor of global_batch up to 32.
        seed: Seed of initial weights, data order, masks and dropout.
        device: cuda, cpu, or auto: cuda if there is one.
        dtype: bf16 (autocast, fp32 master weights), fp32, or auto: bf16 on GPUs and on CPUs with AMX or AVX512-BF16.
        compile: Whether torch.compile is used; auto is on a GPU only.
        cuda_graphs: Whether forward and backward passes are replayed as CUDA graphs, which saves host time; auto is in one
            process on a GPU, without an importance estimator and document boundaries.
        log_every: Steps between lines of metrics.jsonl.
        checkpoint_every: Steps between `last` checkpoints; 0 saves only at evaluations.
        keep: How many of the newest checkpoints to keep; the best one is always kept.
    """

    max_steps: int = 50_000
    init_from: str | None = None
    global_batch: int = 24
    micro_batch: int = 0
    seed: int = 1
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    compile: Literal["auto", "on", "off"] = "auto"
    cuda_graphs: Literal["auto", "on", "off"] = "auto"
    log_every: int = 50
    checkpoint_every: int = 0
    keep: int = 1


@dataclass
class ParallelConfig:
    """How ranks share a run (docs/distributed.md). It changes what is learned by rounding only.

    Args:
        mode: none is one process; ddp gives every rank a whole copy of the model; fsdp shards weights, gradients, moments and the
            average over all ranks; hsdp shards them over shard_size ranks and copies the shards to the rest; auto chooses by
            memory and link, and says why.
        world_size: Ranks that --dry_run plans for; 0 is the number started. A run uses what torchrun started.
        device: Card that --dry_run plans for, such as rtx4090 or h100; empty is this machine's.
        shard_size: Ranks that share one copy of the model under hsdp; 0 is the ranks of one host.
        reshard_after_forward: Whether fsdp frees a block's gathered weights between forward and backward. auto keeps them if
            memory allows, which gathers every block once less a step.
        param_dtype: Dtype in which fsdp gathers the blocks' weights; auto is bf16 if products are and cards cannot read each
            other's memory, as GeForce cards cannot, else fp32. The master weights are fp32 either way.
        reduce_dtype: Dtype in which gradients are summed over ranks; auto as for param_dtype.
        timeout: Seconds without progress after which a run stops and names the rank that holds it back.
        activation_checkpointing: Recompute every n-th block in the backward pass instead of keeping its activations; 0 is none,
            1 every block.
    """

    mode: Literal["auto", "none", "ddp", "fsdp", "hsdp"] = "auto"
    world_size: int = 0
    device: str = ""
    shard_size: int = 0
    reshard_after_forward: Literal["auto", "always", "never"] = "auto"
    param_dtype: Literal["auto", "fp32", "bf16"] = "auto"
    reduce_dtype: Literal["auto", "fp32", "bf16"] = "auto"
    timeout: float = 600.0
    activation_checkpointing: int = 0


@dataclass
class EvalConfig:
    """The held-out likelihood, on a seeded set of sequences and masks that every evaluation shares.

    Args:
        every: Steps between evaluations.
        sequences: Held-out sequences read; 0 reads all of them.
        draws: Masks drawn for each sequence.
        batch: Sequences in one forward pass.
        seed: Seed of the masks and of the choice of sequences.
    """

    every: int = 5_000
    sequences: int = 0
    draws: int = 1
    batch: int = 32
    seed: int = 1234


@dataclass
class SampleConfig:
    """Samples drawn at the end of a run.

    Args:
        num_samples: How many; 0 draws none.
        steps: Denoising steps.
        sampler: ddpm_cache or ancestral.
        temperature: Divides the logits.
    """

    num_samples: int = 4
    steps: int = 128
    sampler: Literal["ddpm_cache", "ancestral"] = "ddpm_cache"
    temperature: float = 1.0


@dataclass
class RunConfig:
    """Where results go.

    Args:
        name: Folder under `root`. One that already holds a run needs --resume. Without a name the preset's is used, or the next
            free one of NAME-2, NAME-3, ...
        root: Folder of all runs.
        tensorboard: Whether to write TensorBoard events too.
        wandb: Whether to send rows to Weights & Biases too; needs the package wandb.
        trackio: Whether to send rows to Trackio too; needs the package trackio.
    """

    name: str | None = None
    root: str = "runs"
    tensorboard: bool = True
    wandb: bool = False
    trackio: bool = False


@dataclass
class Config:
    """Everything a run depends on; saved as config.yaml in the run and inside each checkpoint."""

    preset: str = "demo"
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    importance: ImportanceConfig = field(default_factory=ImportanceConfig)
    curriculum: CurriculumConfig = field(default_factory=CurriculumConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    run: RunConfig = field(default_factory=RunConfig)


def preset_names() -> list[str]:
    """Names of the presets that ship with the package."""
    folder = resources.files("atat_fast") / "presets"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def preset_settings(name: str) -> dict[str, Any]:
    """The preset's own settings, a nested dictionary. Raises UsageError for an unknown name."""
    if name not in preset_names():
        raise UsageError(f"there is no preset {name!r}{nearest(name, preset_names())}; presets are {', '.join(preset_names())}")
    text = (resources.files("atat_fast") / "presets" / f"{name}.yaml").read_text(encoding="utf-8")
    return dict(yaml.safe_load(text) or {}, preset=name)


def load_preset(name: str) -> Config:
    """The preset as a Config. Raises UsageError for an unknown name."""
    return from_dict(preset_settings(name))


def from_dict(settings: dict[str, Any]) -> Config:
    """A Config from a nested dictionary such as a run's config.yaml. Unknown names raise UsageError."""
    config: Config = _build(Config, settings, "")
    return config


def to_dict(config: Config) -> dict[str, Any]:
    """The whole tree as plain nested dictionaries."""
    return dataclasses.asdict(config)


def _build(kind: Any, settings: dict[str, Any], where: str) -> Any:
    known = {f.name: f for f in dataclasses.fields(kind)}
    values = {}
    for name, value in settings.items():
        if name not in known:
            raise UsageError(f"there is no setting {where + name!r}{nearest(name, known)}")
        default = known[name].default_factory
        nested = default is not dataclasses.MISSING and dataclasses.is_dataclass(default)
        values[name] = _build(default, value, f"{where}{name}.") if nested else value
    return kind(**values)
