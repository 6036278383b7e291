"""accelerate for transformers' classes: the class's own losses and gradients, from hidden rows alone."""

from __future__ import annotations

import copy
import inspect
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from atat_fast.models import accelerate as room
from atat_fast.models.accelerate import accelerate, masked_diffusion_loss, restore

peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
from masked_lms import MAKERS, MASK, SIZES, VOCABULARY, batch, make  # noqa: E402
from plain_decoders import LLaDA, decoder  # noqa: E402

EVERY = pytest.mark.parametrize("name", MAKERS)
SHIFTED = ("Dream", "Dream, tied")


def own_loss(model, inputs, name):
    """The class's loss; LLaDA's has none, so the mean over its labels."""
    out = model(**inputs)
    if out.loss is not None:
        return out.loss
    return F.cross_entropy(out.logits.flatten(0, 1), inputs["labels"].flatten())


def gradients(loss, model):
    return torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)


def pair(name, **settings):
    model = make(name, **settings)
    return model, accelerate(copy.deepcopy(model))


@EVERY
@pytest.mark.parametrize("share", [0.3, 1.1])
def test_loss_and_gradients_are_the_classs_own(name, share):
    (plain, fast), inputs = pair(name), batch(share=share)
    want, out = own_loss(plain, inputs, name), fast(**inputs)
    assert out.logits is None and type(out) is type(plain(**inputs)) and out["loss"] is out.loss and want > 0.1
    torch.testing.assert_close(out.loss, want, rtol=1e-5, atol=1e-5)
    for (which, _), a, b in zip(plain.named_parameters(), gradients(out.loss, fast), gradients(want, plain), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=lambda m, which=which: f"{which}: {m}")


@EVERY
def test_bf16_is_within_torchs_own_error(name):
    (plain, fast), inputs = pair(name), batch(rows=5, length=13)
    exact = copy.deepcopy(plain).double()
    want = gradients(own_loss(exact, inputs, name), exact)

    def error(model, loss):
        pairs = zip(gradients(loss, model), want, strict=True)
        return sum(float((g.double() - w).square().sum()) for g, w in pairs if w is not None) ** 0.5

    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = fast(**inputs).loss, own_loss(plain, inputs, name)
    assert error(fast, ours) <= 1.2 * error(plain, theirs)
    assert abs(float(ours) - float(own_loss(exact, inputs, name))) <= 0.02
    half = copy.deepcopy(fast).bfloat16()
    assert abs(float(half(**inputs).loss) - float(ours)) <= 0.1


@EVERY
def test_only_hidden_rows_reach_the_transform_and_the_head(name):
    model, inputs, sizes = make(name), batch(), []
    head = model.get_output_embeddings()
    accelerate(model)
    transforms = [m for _, m in model.named_modules() if isinstance(m, nn.LayerNorm | nn.RMSNorm)][-1:]
    for module in [head, *transforms]:
        module.register_forward_pre_hook(lambda m, x: sizes.append(x[0].shape[:-1].numel()))
    model(**inputs)
    rows = int((inputs["labels"] != -100).sum())
    inside = name not in ("BERT", "BERT, untied", "RoBERTa", "DistilBERT", "ModernBERT")  # no transform: a norm of the backbone
    if not inside:
        assert set(sizes) == {rows} and len(sizes) == 2
    elif not name.startswith("LLaDA"):
        assert sizes[-1] == rows


@EVERY
def test_nothing_else_changes(name):
    plain, fast = pair(name)
    inputs = batch()
    unlabelled = {key: value for key, value in inputs.items() if key != "labels"}
    assert torch.equal(fast(**unlabelled).logits, plain(**unlabelled).logits)
    assert inspect.signature(fast.forward) == inspect.signature(plain.forward)
    assert list(fast.state_dict()) == list(plain.state_dict())
    assert [p.shape for p in fast.parameters()] == [p.shape for p in plain.parameters()]
    fast.eval(), plain.eval()
    got, want = fast(**inputs), plain(**inputs)
    assert torch.equal(got.logits, want.logits) and (want.loss is None or torch.equal(got.loss, want.loss))


@EVERY
def test_restore_gives_the_class_back(name):
    model = make(name)
    before = {which: set(module.__dict__) for which, module in model.named_modules()}
    accelerate(accelerate(model))
    other = copy.deepcopy(model)
    inputs = batch()
    want = model(**inputs).loss
    assert restore(model) is model
    assert {which: set(module.__dict__) for which, module in model.named_modules()} == before
    assert model(**inputs).logits is not None
    assert torch.equal(other(**inputs).loss, want) and other(**inputs).logits is None  # a copy is a model of its own
    with pytest.raises(ValueError, match=r"is not accelerated; call accelerate\(model\) first"):
        restore(model)


def test_ways_to_call_it():
    (plain, fast), inputs = pair("BERT"), batch()
    ids, labels, mask = inputs["input_ids"], inputs["labels"], inputs["attention_mask"]
    want = plain(**inputs).loss
    torch.testing.assert_close(fast(ids, mask, None, None, None, None, None, labels).loss, want)
    as_tuple = fast(**inputs, return_dict=False)
    assert isinstance(as_tuple, tuple) and len(as_tuple) == 1
    torch.testing.assert_close(as_tuple[0], want)
    fast.config.return_dict = False
    assert isinstance(fast(**inputs), tuple)
    fast.config.return_dict = True
    more = fast(**inputs, output_hidden_states=True)
    assert len(more.hidden_states) == 3 and more.hidden_states[0].shape == (3, 11, 32)
    nothing = fast(**inputs | {"labels": torch.full_like(labels, -100)})
    assert nothing.loss.isnan() and plain(**inputs | {"labels": torch.full_like(labels, -100)}).loss.isnan()
    with pytest.raises(ValueError, match="target has id 97, outside the vocabulary of 97"):
        fast(**inputs | {"labels": torch.where(labels == -100, -100, VOCABULARY)})


@pytest.mark.parametrize("name", ["BERT", "ModernBERT", "Dream"])
def test_num_items_in_batch_means_what_the_class_means(name):
    """ModernBERT's and Dream's losses divide by it; BERT's takes the mean whatever it is."""
    (plain, fast), inputs = pair(name), batch()
    for count in (7, torch.tensor(19)):
        torch.testing.assert_close(fast(**inputs, num_items_in_batch=count).loss, plain(**inputs, num_items_in_batch=count).loss)
    if name == "ModernBERT":
        inputs["labels"] = inputs["labels"].masked_fill(inputs["labels"] == -100, 50)
        torch.testing.assert_close(fast(**inputs, ignore_index=50).loss, plain(**inputs, ignore_index=50).loss)
        assert fast(**inputs, ignore_index=50).logits is not None  # another loss than ours: the class computes it


def test_sparse_prediction_of_modernbert():
    (plain, fast), inputs = pair("ModernBERT", sparse_prediction=True), batch()
    torch.testing.assert_close(fast(**inputs).loss, plain(**inputs).loss)


def lora(model, *targets):
    torch.manual_seed(5)
    settings = peft.LoraConfig(r=2, target_modules=list(targets or ("query", "value")), init_lora_weights=False)
    return peft.get_peft_model(model, settings).train()


@pytest.mark.parametrize("first", ["accelerate", "lora"])
def test_lora_before_and_after(first):
    plain, inputs = lora(make("BERT")), batch()
    fast = lora(accelerate(make("BERT"))) if first == "accelerate" else accelerate(lora(make("BERT")))
    trained = [p for p in fast.parameters() if p.requires_grad]
    theirs = [p for p in plain.parameters() if p.requires_grad]
    got, want = fast(**inputs), plain(**inputs)
    torch.testing.assert_close(got.loss, want.loss)
    assert got.logits is None and len(trained) == 8
    for a, b in zip(torch.autograd.grad(got.loss, trained), torch.autograd.grad(want.loss, theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    loss = masked_diffusion_loss(fast, inputs["input_ids"], mask_id=MASK, seed=1, step=0)
    assert all(g is not None for g in torch.autograd.grad(loss, trained))
    restore(fast)
    assert fast(**inputs).logits is not None


def test_an_adapter_on_the_head_is_refused():
    with pytest.raises(ValueError, match=r"gives a Linear, not an nn\.Linear: the head has to be a linear layer"):
        accelerate(lora(make("BERT"), "decoder"))
    with pytest.raises(ValueError, match="BertForMaskedLM changes its logits after its head, or an adapter was put on the head"):
        lora(accelerate(make("BERT")), "decoder")(**batch())


@pytest.mark.slow
def test_two_ranks_under_ddp(forked, tmp_path):
    done = forked(2, "accelerated", tmp_path / "found.json")
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "found.json").read_text())
    (want, theirs), (got, ours) = found["plain"], found["fast"]
    assert got == pytest.approx(want, rel=1e-5) and len(ours) == len(theirs) > 10
    for a, b in zip(ours, theirs, strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-6)
    assert found["bounds"][0] / 2 == pytest.approx(found["whole"][0], rel=1e-5)


def test_gradient_checkpointing():
    for use_reentrant in (False, True):
        (plain, fast), inputs = pair("ModernBERT"), batch()
        fast.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        fast(**inputs).loss.backward()
        for p, want in zip(fast.parameters(), gradients(plain(**inputs).loss, plain), strict=True):
            torch.testing.assert_close(p.grad, want, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["BERT", "ModernBERT", "LLaDA", "Dream", "LLaDA, tied"])
@torch._dynamo.config.patch(recompile_limit=64)
def test_torch_compile(name):
    """Losses and gradients of steps with different numbers of hidden rows, in few graphs. A limit of graphs would hide what is
    wrong with the next one, for what is beyond it runs uncompiled.
    """
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    plain, fast = pair(name)
    compiled, frames = torch.compile(fast, backend="aot_eager"), []
    for share in (0.2, 0.4, 0.6, 0.8):
        inputs = batch(share=share)
        got, want = compiled(**inputs).loss, own_loss(plain, inputs, name)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        frames.append(torch._dynamo.utils.counters["frames"]["ok"])
    for a, b in zip(gradients(got, fast), gradients(want, plain), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert frames[1] == frames[-1] <= 12


# What is not recognised.


class Scaled(transformers.BertForMaskedLM):
    def forward(self, input_ids=None, labels=None, return_dict=None):
        out = super().forward(input_ids=input_ids)
        logits = out.logits * 0.5
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return transformers.modeling_outputs.MaskedLMOutput(loss=loss, logits=logits)


class Capped(Scaled):
    def forward(self, input_ids=None, labels=None, return_dict=None):
        logits = transformers.BertForMaskedLM.forward(self, input_ids=input_ids).logits
        logits = torch.cat((logits, logits), -1)[..., : logits.shape[-1]]
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return transformers.modeling_outputs.MaskedLMOutput(loss=loss, logits=logits)


class Smoothed(transformers.BertForMaskedLM):
    def forward(self, input_ids=None, labels=None, return_dict=None):
        logits = super().forward(input_ids=input_ids).logits
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=0.5)
        return transformers.modeling_outputs.MaskedLMOutput(loss=loss, logits=logits)


def bert(kind, **more):
    torch.manual_seed(0)
    return kind(transformers.BertConfig(vocab_size=VOCABULARY, initializer_range=0.5, **SIZES, **more))


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        (lambda: bert(transformers.BertModel), "the forward of BertModel takes no labels"),
        (lambda: bert(transformers.BertForSequenceClassification), r"get_output_embeddings\(\) of BertForSequence.* gives None"),
        (lambda: bert(Scaled), "Scaled has the parts of a masked language model but computes something else: its loss is"),
        (lambda: bert(Capped), r"Capped changes its logits after its head, .* \(zero-dimensional tensor .* concatenated\)"),
        (lambda: bert(Smoothed), "the loss of Smoothed is .* where the mean of -log p over its labels is .*; it keeps its own"),
        (lambda: decoder(LLaDA, scale_logits=True), "LLaDA has the parts of a masked language model but computes something else"),
        (lambda: nn.Linear(2, 3), "Linear is not built as MDLM's network: it has no vocab_embed.embedding"),
        (lambda: make("BERT").to("meta"), "on the meta device has no loss to compare .* pass check=False"),
        (lambda: nn.DataParallel(make("BERT")), "accelerate the model before DataParallel wraps it"),
    ],
)
def test_what_is_refused_keeps_its_forward(model, sentence):
    model = model()
    before = {which: set(module.__dict__) for which, module in model.named_modules()}
    with pytest.raises(ValueError, match=sentence):
        accelerate(model)
    assert {which: set(module.__dict__) for which, module in model.named_modules()} == before


def test_settings_of_the_other_kind_are_refused():
    with pytest.raises(ValueError, match="time_conditioning is a setting of MDLM's networks, and BertForMaskedLM is none"):
        accelerate(make("BERT"), time_conditioning=True)
    with pytest.raises(ValueError, match=r"pass shift=True; it keeps its own forward"):
        accelerate(make("Dream"), shift=False)
    shifted = accelerate(make("LLaDA"), shift=True)  # a class without a loss: the caller says
    inputs = batch(pads=False)
    logits, labels = make("LLaDA")(**inputs).logits, inputs["labels"]
    torch.testing.assert_close(shifted(**inputs).loss, F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()))


def test_a_forward_wrapped_later_is_not_thrown_away():
    model = accelerate(make("BERT"))
    ours = model.forward
    model.forward = lambda *args, **kwargs: ours(*args, **kwargs)
    with pytest.raises(ValueError, match="the forward of this BertForMaskedLM was wrapped after accelerate; undo that first"):
        restore(model)
    assert model(**batch()).logits is None


def test_a_forward_wrapped_earlier_is_still_called():
    model, called = make("BERT"), []
    own = model.forward
    model.forward = lambda *args, **kwargs: called.append(1) or own(*args, **kwargs)
    model.forward.__signature__ = inspect.signature(own)
    accelerate(model, check=False)
    inputs = batch()
    torch.testing.assert_close(model(**inputs).loss, make("BERT")(**inputs).loss)
    assert called == [1]
    assert restore(model)(**inputs).logits is not None and called == [1, 1]


# masked_diffusion_loss.


def by_hand(model, name, noisy, rows, weights, tokens, mask):
    """sum of weights * -log p over rows, from all logits, the mask never predicted."""
    logits = model(input_ids=noisy, attention_mask=mask).logits.index_fill(2, torch.tensor([MASK]), -torch.inf)
    nll = -torch.log_softmax(logits.double(), 2).flatten(0, 1)[rows - int(name in SHIFTED)]
    return (weights * nll.gather(1, tokens.flatten()[rows, None])[:, 0]).sum()


@EVERY
@pytest.mark.parametrize("masking", ["exact", "bernoulli"])
@pytest.mark.parametrize("weighting", ["uniform", "ce"])
def test_masked_diffusion_loss_by_hand(name, masking, weighting, monkeypatch):
    """Frozen tokens and padding are never hidden nor counted; the rest by (n + 1) / k, or a plain mean."""
    (plain, fast), inputs, seen = pair(name), batch(rows=6), []
    tokens, mask = inputs["input_ids"], inputs["attention_mask"]
    hide = room.hide_for_training
    monkeypatch.setattr(room, "hide_for_training", lambda *a, **k: seen.append(hide(*a, **k)) or seen[-1])
    frozen = torch.zeros_like(tokens, dtype=torch.bool)
    frozen[:, :2] = True
    how = {"mask_id": MASK, "seed": 3, "step": 4, "masking": masking, "weighting": weighting}
    loss = masked_diffusion_loss(fast, tokens, frozen=frozen, attention_mask=mask, **how)
    masked, may = seen[0], ~frozen & (mask == 1)
    hidden = masked.noisy == MASK
    assert hidden.any() and not (hidden & ~may).any() and torch.equal(masked.noisy[~hidden], tokens[~hidden])
    assert torch.equal(hidden.flatten().nonzero()[:, 0], masked.rows) and masked.tokens == int(may.sum())
    k, n = hidden.sum(1), may.sum(1)
    weights = masked.weights.double()
    if masking == "exact":
        of_row = ((n + 1) / k.clamp(min=1)) if weighting == "uniform" else (n.sum() / k.sum()).expand(6)
        torch.testing.assert_close(weights, of_row.double().repeat_interleave(k), rtol=1e-6, atol=0)
    want = by_hand(plain, name, masked.noisy, masked.rows, weights, tokens, mask) / may.sum()
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-6)
    for a, b in zip(gradients(loss, fast), gradients(want, plain), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("weighting", ["uniform", "ce"])
@pytest.mark.parametrize("masking", ["exact", "bernoulli"])
def test_parts_of_a_batch_average_to_the_whole(masking, weighting):
    model, inputs = accelerate(make("BERT")), batch(rows=6)
    tokens, mask = inputs["input_ids"], inputs["attention_mask"]
    how = {"mask_id": MASK, "seed": 3, "step": 4, "masking": masking, "weighting": weighting}
    whole = masked_diffusion_loss(model, tokens, attention_mask=mask, **how)
    lengths = mask.sum(1)
    parts = [
        masked_diffusion_loss(model, tokens[i : i + 2], attention_mask=mask[i : i + 2], first=i, total=6, lengths=lengths, **how)
        for i in (0, 2, 4)
    ]
    torch.testing.assert_close(torch.stack(parts).mean(), whole)
    with pytest.raises(ValueError, match="lengths of all 6 sequences of the global batch are needed beside frozen tokens of 2"):
        masked_diffusion_loss(model, tokens[:2], attention_mask=mask[:2], total=6, **how)
    with pytest.raises(ValueError, match=r"lengths must be int64 \(6,\) on the CPU"):
        masked_diffusion_loss(model, tokens[:2], attention_mask=mask[:2], total=6, lengths=lengths[:2], **how)


def test_a_shifted_model_never_predicts_a_first_token():
    model, tokens = accelerate(make("Dream")), torch.randint(4, VOCABULARY, (4, 2))
    seen = []
    model.model.register_forward_pre_hook(lambda m, args, kwargs: seen.append(kwargs.get("input_ids", *args)), with_kwargs=True)
    for step in range(8):
        assert masked_diffusion_loss(model, tokens, mask_id=MASK, seed=1, step=step).isfinite()
    assert torch.stack(seen)[:, :, 0].ne(MASK).all() and torch.stack(seen)[:, :, 1].eq(MASK).any()


def test_what_masked_diffusion_loss_refuses():
    tokens = torch.randint(4, VOCABULARY, (2, 5))
    how = {"mask_id": MASK, "seed": 0, "step": 0}
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "n_positions": 16, "n_embd": 16, "n_layer": 1, "n_head": 2}
    causal = accelerate(transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=1, eos_token_id=1)).train())
    assert causal(tokens, labels=tokens).logits is None
    with pytest.raises(ValueError, match="GPT2LMHeadModel is causal: its early tokens do not see late ones"):
        masked_diffusion_loss(causal, tokens, **how)
    with pytest.raises(ValueError, match="this BertForMaskedLM is not accelerated"):
        masked_diffusion_loss(make("BERT"), tokens, **how)
    bert = accelerate(make("BERT"))
    with pytest.raises(ValueError, match="mask_id 97 is outside the vocabulary of 97"):
        masked_diffusion_loss(bert, tokens, **how | {"mask_id": 97})
    with pytest.raises(ValueError, match=r"attention_mask must have the shape of tokens, \(2, 5\), got \(2, 4\)"):
        masked_diffusion_loss(bert, tokens, attention_mask=torch.ones(2, 4), **how)


# Under the tools people train with.


class Rows(torch.utils.data.Dataset):
    def __init__(self):
        torch.manual_seed(7)
        self.rows = [{key: value[0] for key, value in batch(rows=1).items()} for _ in range(24)]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.rows[i]


def train(model, folder, evaluate=True, **settings):
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=4,
        per_device_train_batch_size=3,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **settings,
    )
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=Rows(), eval_dataset=Rows())
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return losses, trainer.evaluate()["eval_loss"] if evaluate else None, trainer


@pytest.mark.parametrize("name", ["BERT", "RoBERTa", "DistilBERT", "ModernBERT", "Dream"])
def test_a_trainers_losses_are_the_same(name, tmp_path):
    (plain, fast) = pair(name)
    settings = {"gradient_accumulation_steps": 2} if name in ("BERT", "ModernBERT") else {}
    want, evaluated, _ = train(plain, tmp_path / "plain", **settings)
    got, ours, _ = train(fast, tmp_path / "fast", **settings)
    assert got == pytest.approx(want, rel=1e-4) and len(got) == 4 and got[0] != got[-1]
    assert ours == pytest.approx(evaluated, rel=1e-3)


@pytest.mark.parametrize("name", ["LLaDA", "LLaDA, tied"])
def test_a_trainer_trains_a_class_that_has_no_loss_of_its_own(name, tmp_path):
    plain, fast = pair(name)
    with pytest.raises(ValueError, match="did not return a loss"):
        train(plain, tmp_path / "plain")
    before = copy.deepcopy(fast.state_dict())
    losses = train(fast, tmp_path / "fast", evaluate=False)[0]
    assert len(losses) == 4 and all(0 < loss < 20 for loss in losses)
    assert all(not torch.equal(value, before[name]) for name, value in fast.state_dict().items())


def test_a_trainer_in_bf16_with_checkpoints_of_activations(tmp_path):
    (plain, fast) = pair("ModernBERT")
    settings = {"bf16": True, "gradient_checkpointing": True}
    want = train(plain, tmp_path / "plain", **settings)[0]
    got, _, trainer = train(fast, tmp_path / "fast", **settings)
    assert got == pytest.approx(want, rel=0.02)
    with pytest.raises(ValueError, match="was wrapped after accelerate; undo that first"):
        restore(fast)
    unwrapped = trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False)
    assert restore(unwrapped)(**batch()).logits is not None
