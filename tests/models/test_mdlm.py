"""MDLM's checkpoints: the same logits, the same bits on the way back, and a sentence for each file that is not one."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import huggingface_hub
import plain_mdlm as plain
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small import SIZE, filled, small_dit

from atat_fast.cli import run_command
from atat_fast.config import from_dict
from atat_fast.convert import main
from atat_fast.data import make_tokenizer
from atat_fast.errors import UsageError
from atat_fast.models import DiT
from atat_fast.models.mdlm import NAMES, ROTARY, names, to_mdlm_state_dict
from atat_fast.models.mdlm_files import Absent
from atat_fast.runs import checkpoint


def logits_of(model, tokens, sigma):
    """Ours, told the share that sigma stands for."""
    return model.head(model.features(tokens, 1 - torch.exp(-sigma))).view(*tokens.shape, -1)


@pytest.fixture
def dit():
    return filled(plain.DIT())


@pytest.fixture
def state(dit):
    return dit.state_dict()


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder, which the process is in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused_by_us(state, message, **options):
    with pytest.raises(UsageError, match=message) as refused:
        DiT.from_mdlm(state, **options)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize("length", [1, 9, 1024])
def test_it_gives_the_originals_logits(dit, told, length):
    tokens, sigma = torch.randint(0, plain.VOCABULARY, (2, length)), torch.tensor([0.3, 2.0])
    want = dit(tokens, sigma if told else torch.zeros(2))
    got = logits_of(DiT.from_mdlm(dit.state_dict(), time_conditioning=told), tokens, sigma)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert want.std() > 0.1


def test_there_and_back_are_the_same_bits(dit, state):
    back = to_mdlm_state_dict(DiT.from_mdlm(state))
    assert same(back, state) and [name for name in back if name != ROTARY] == [name for name, _ in dit.named_parameters()]
    plain.DIT().load_state_dict(back)  # strict: MDLM's own loading takes it
    assert not any(tensor.data_ptr() == p.data_ptr() for tensor, p in zip(back.values(), dit.parameters(), strict=False))
    low = DiT.from_mdlm({name: value.bfloat16() for name, value in state.items()}).head.weight
    assert low.dtype is torch.float32 and torch.equal(low, state["output_layer.linear.weight"].bfloat16().float())


def test_ours_goes_out_and_comes_back():
    ours = small_dit(13, 4, tie_embeddings=True)
    back = DiT.from_mdlm(to_mdlm_state_dict(ours), mask_id=4, length=12)
    tokens = torch.randint(0, 13, (2, 12))
    assert torch.equal(back.logits(back.features(tokens)), ours.logits(ours.features(tokens)))
    for option in ({"qk_norm": True}, {"activation": "relu2"}):
        with pytest.raises(UsageError, match=f"this model has {next(iter(option))} .*, which MDLM's network does not"):
            to_mdlm_state_dict(small_dit(13, 4, **option))


@pytest.mark.parametrize(
    "prefix", ["", "backbone.", "model.", "model.backbone.", "_orig_mod.module.backbone.", "backbone._orig_mod."]
)
def test_prefixes_do_not_matter(state, prefix):
    got = to_mdlm_state_dict(DiT.from_mdlm({prefix + name: value for name, value in state.items()}))
    assert all(torch.equal(got[published], state[published]) for published in names(plain.LAYERS))


def test_heads_come_from_the_rotary_buffer_or_the_width_or_the_caller(state):
    wide = filled(plain.DIT(width=128, heads=4, layers=1)).state_dict()
    assert DiT.from_mdlm(wide).config.heads == 4
    del wide[ROTARY]
    assert DiT.from_mdlm(wide).config.heads == 2 and DiT.from_mdlm(wide, heads=8).config.heads == 8
    refused_by_us(wide, r"width 128 does not divide into 3 heads of an even size; try 1, 2, 4, 8, 16, 32, 64", heads=3)
    refused_by_us(wide, "does not divide into 0 heads", heads=0)
    refused_by_us(state, r"heads 4 contradicts the state dict, whose rotary_emb\.inv_freq is that of 2 heads", heads=4)
    small = {name: value for name, value in state.items() if name != ROTARY}
    refused_by_us(small, "width 16 does not divide into heads of 64; say how many there are with --heads")
    refused_by_us(state | {ROTARY: state[ROTARY] ** 1.2}, "is not base 10,000")


def test_the_mask_is_the_heads_untouched_row_else_the_last_id_or_berts(state):
    assert DiT.from_mdlm(state).mask_id == plain.VOCABULARY - 1
    assert DiT.from_mdlm(state, mask_id=2).mask_id == 2
    for name in ("output_layer.linear.weight", "output_layer.linear.bias"):
        state[name][5] = 0
    assert DiT.from_mdlm(state).mask_id == 5
    bert = filled(plain.DIT(vocabulary=30_522, width=2, heads=1, layers=1))
    assert DiT.from_mdlm(bert.state_dict()).mask_id == 103
    refused_by_us(state, "mask_id 13 is outside the vocabulary of 13", mask_id=13)


def test_training_with_subs_leaves_the_masks_row_at_zero():
    """What the rule above stands on."""
    d = plain.DIT()
    for name, p in d.named_parameters():
        torch.nn.init.normal_(p, std=0.2) if "linear" not in name else None
    optimizer = torch.optim.AdamW(d.parameters(), lr=0.1)
    for _ in range(3):
        tokens = torch.randint(0, plain.MASK, (2, 6))
        noisy = torch.where(torch.rand(2, 6) < 0.5, plain.MASK, tokens)
        plain.subs_loss(d, tokens, noisy, torch.ones(2, 6), torch.zeros(2)).backward()
        optimizer.step()
        optimizer.zero_grad()
    zero = (d.output_layer.linear.weight == 0).all(1) & (d.output_layer.linear.bias == 0)
    assert zero.nonzero().flatten().tolist() == [plain.MASK]


def test_a_lightning_checkpoint_gives_its_average_or_its_weights(tmp_path):
    whole, file = plain.Diffusion(), tmp_path / "last.ckpt"
    filled(whole.backbone)
    whole.update()
    torch.save(whole.checkpoint() | {"state_dict": whole.state_dict() | {"noise.sigmas": torch.ones(2)}}, file)
    averaged, raw = (to_mdlm_state_dict(DiT.from_mdlm(source, ema=ema)) for source, ema in ((file, True), (str(file), False)))
    for (name, p), shadow in zip(whole.backbone.named_parameters(), whole.shadow_params, strict=True):
        assert torch.equal(averaged[name], shadow) and torch.equal(raw[name], p) and not torch.equal(p, shadow)
    assert list(names(plain.LAYERS)) == [name for name, _ in whole.backbone.named_parameters()]
    checkpoint = whole.checkpoint()
    shadow = checkpoint["ema"]["shadow_params"]
    for params, message in (
        (shadow[:-1], r"averages 39 parameters \(ema.shadow_params\) and has 40; take the weights themselves with --no_ema"),
        ([*shadow[1:], shadow[0]], "do not have the parameters' shapes: blocks.0.adaLN_modulation.bias .* more; take the"),
        ("none", "has an ema without a list shadow_params"),
    ):
        refused_by_us(checkpoint | {"ema": {"shadow_params": params}}, message)
        assert DiT.from_mdlm(checkpoint | {"ema": {"shadow_params": params}}, ema=False).vocab_size == 13
    del checkpoint["ema"]
    assert torch.equal(DiT.from_mdlm(checkpoint).head.weight, whole.backbone.output_layer.linear.weight)


UNFIT = [
    (["sigma_map.mlp.0.bias"], {}, "the state dict is not an MDLM checkpoint: missing sigma_map.mlp.0.bias$"),
    (["blocks.1."], {}, "missing blocks.1"),
    (["blocks."], {}, "missing blocks.0.adaLN_modulation.bias.* and 6 more"),
    ([], {"cond_map.weight": torch.ones(1), "a": torch.ones(1)}, "unexpected a, cond_map.weight$"),
    (["blocks.2.mlp.0.bias"], {"b": torch.ones(1)}, "missing blocks.2.mlp.0.bias; unexpected b$"),
    ([], {"blocks.1.norm2.weight": torch.ones(7)}, r"of another shape blocks.1.norm2.weight \(7,\), not \(16,\)$"),
    ([], {"vocab_embed.embedding": torch.ones(7)}, r"vocab_embed.embedding \(7,\), not a matrix"),
    ([], {"output_layer.linear.bias": torch.ones(13).long()}, "output_layer.linear.bias of torch.int64"),
    ([], {"backbone.output_layer.linear.bias": torch.ones(13)}, "has output_layer.linear.bias twice"),
]


@pytest.mark.parametrize(("gone", "more", "message"), UNFIT)
def test_whatever_does_not_fit_is_listed(gone, more, message, state):
    kept = {name: value for name, value in state.items() if not name.startswith(tuple(gone))}
    refused_by_us(kept | more, message)


def test_what_is_no_state_dict_or_asks_for_what_is_not_there(state):
    narrow = {k: v[:-2] if v.shape and v.shape[0] == 64 else v for k, v in state.items()}
    narrow = {k: v[:, :-2] if v.dim() == 2 and v.shape[1] == 64 else v for k, v in narrow.items()}
    refused_by_us(narrow, r"\(62, 16\), not a multiple of 16 rows")
    for nothing in ({"a": 3}, {}):
        refused_by_us(nothing, "holds no state dict of tensors")
    refused_by_us(state, "dim is not yours to choose.*; what can be given is heads, length", dim=8)
    refused_by_us(state, r"head is not yours to choose for a checkpoint \(did you mean heads\?\)", head=8)


def test_files_and_folders(here, state):
    save_file(state, "weights.safetensors")
    torch.save(state, "weights.pt")
    torch.save(state, "old.pt", _use_new_zipfile_serialization=False)
    for name in ("a", "b", "empty"):
        Path(name).mkdir()
    save_file(state, "a/model.safetensors")
    torch.save(state, "b/pytorch_model.bin")
    known = {"model_length": 77, "time_conditioning": True, "dropout": 0, "n_heads": 8}
    Path("a/config.json").write_text(json.dumps(known))
    for source in ("weights.safetensors", "weights.pt", "old.pt", "a", "b", "a/model.safetensors"):
        model = DiT.from_mdlm(here / source)
        assert torch.equal(model.head.weight, state["output_layer.linear.weight"]), source
        stated = (77, True, 0.0) if source.startswith("a") else (1024, False, 0.1)
        assert (model.config.length, model.time_conditioning, model.config.dropout) == stated
        assert model.config.heads == 2  # the rotary buffer knows better than config.json
    assert DiT.from_mdlm("a", length=5, time_conditioning=False).config.length == 5
    Path("a/config.json").write_text(json.dumps({"model_length": "long"}))
    refused_by_us(here / "a", r"config\.json says model_length is 'long', which is not of type int")
    refused_by_us(here / "empty", r"holds neither model.safetensors nor pytorch_model.bin")


def test_what_is_no_checkpoint_is_a_sentence(here):
    torch.save({"a": torch.ones(1000)}, "cut.ckpt")
    files = {"cut.ckpt": Path("cut.ckpt").read_bytes()[:900], "text.ckpt": b"to be or not to be", "empty.ckpt": b""}
    for name, content in (files | {"text.safetensors": b"to be or not to be, that is the question"}).items():
        Path(name).write_bytes(content)
    torch.save([torch.ones(2)], "list.ckpt")
    for name in files:
        refused_by_us(here / name, "is no checkpoint that torch can read")
    refused_by_us(here / "text.safetensors", "cannot be read as safetensors")
    refused_by_us(here / "list.ckpt", "holds a list, not a dictionary")
    for name in ("none.ckpt", "no/such/file.ckpt"):
        refused_by_us(here / name, "there is no file or folder")
    refused_by_us("somebody/mdlm-not-here", "mdlm-not-here is neither a file nor a folder here.*the hub cannot be reached")


class Bomb:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


BOMBS = [Bomb(exec, ("open('went-off', 'w')",)), Bomb(os.system, ("touch went-off",)), Path("x"), types.SimpleNamespace(a=1)]


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("bomb", BOMBS)
def test_pickled_code_is_refused_and_never_runs(here, state, bomb, zipped):
    torch.save({"state_dict": state, "hyper_parameters": bomb}, "model.ckpt", _use_new_zipfile_serialization=zipped)
    said = refused_by_us(
        here / "model.ckpt", r"holds more than tensors and settings.*could run code.*weights_only=False.*tensors.ckpt"
    )
    assert not Path("went-off").exists()
    if isinstance(bomb, Path) and zipped:  # the way out that the refusal gives works
        command = re.search(r'python -c "(.*)"  and give', said)[1]
        subprocess.run([sys.executable, "-c", command], check=True)
        assert DiT.from_mdlm("tensors.ckpt").vocab_size == 13


def test_settings_of_known_packages_are_read_as_nothing(tmp_path, monkeypatch, dit):
    """Lightning keeps the configuration and the tokenizer; neither their packages nor their classes are needed or touched."""
    touched = []

    class DictConfig:
        def __init__(self, content):
            self.content = content

        def __reduce__(self):
            return _make, (DictConfig, self.content), {"parent": None}

    def _make(kind, content):
        touched.append(kind)
        return kind(content)

    module = types.ModuleType("omegaconf.dictconfig")
    for thing in (DictConfig, _make):
        thing.__module__, thing.__qualname__ = "omegaconf.dictconfig", thing.__name__
        setattr(module, thing.__name__, thing)
    for name in ("omegaconf", "omegaconf.dictconfig"):
        monkeypatch.setitem(sys.modules, name, module)
    file = tmp_path / "last.ckpt"
    torch.save({"state_dict": dit.state_dict(), "hyper_parameters": {"config": DictConfig({"kind": dict})}}, file)
    for name in ("omegaconf", "omegaconf.dictconfig"):
        monkeypatch.delitem(sys.modules, name)
    model = DiT.from_mdlm(file)
    assert torch.equal(model.head.weight, dit.output_layer.linear.weight)
    assert not touched and "omegaconf" not in sys.modules
    assert not any(isinstance(known, tuple) and known[0] is Absent for known in torch.serialization.get_safe_globals())


def test_the_page_lists_the_names():
    text = (Path(__file__).parents[2] / "docs" / "mdlm.md").read_text(encoding="utf-8")
    for published, ours, shape in NAMES:
        assert f"| `{published}` | `{ours}` | {shape.replace(' ', ', ')} |" in text


def convert(*arguments):
    """The command's exit status."""
    with pytest.raises(SystemExit) as left:
        run_command(main, [str(a) for a in arguments])
    return left.value.code


def test_the_command(here, python):
    whole = plain.Diffusion()
    torch.save(whole.checkpoint(), "last.ckpt")
    done = python("-m", "atat_fast.convert", "last.ckpt", "ours", "--length", 64, cwd=here)
    assert done.returncode == 0, done.stderr
    for words in ("3 layers of 16, 2 heads, length 64", "vocabulary 13 with mask 12, time conditioning off"):
        assert words in done.stdout
    assert sorted(os.listdir()) == ["last.ckpt", "ours"]
    tokens, model = torch.randint(0, 13, (2, 64)), DiT.from_pretrained(here / "ours", strict=True)
    want = whole(tokens, torch.ones(2))
    torch.testing.assert_close(model.head(model.features(tokens)).view(2, 64, -1), want, rtol=1e-5, atol=1e-5)
    assert convert("last.ckpt", "ours") == 2
    assert convert("ours", "back.safetensors", "--to", "mdlm") == 0
    assert same(load_file("back.safetensors"), whole.backbone.state_dict())
    with safe_open("back.safetensors", "pt") as opened:
        assert opened.metadata()["model_length"] == "64"
    assert DiT.from_mdlm(here / "back.safetensors").config == model.config


def test_it_replaces_only_a_saved_model_and_only_when_asked(here, capsys, monkeypatch):
    whole, targets = plain.Diffusion(), (("ours",), ("m.safetensors", "--to", "mdlm"))
    torch.save(whole.checkpoint(), "last.ckpt")
    assert [convert("last.ckpt", *target) for target in targets] == [0, 0]
    filled(whole.backbone)
    torch.save(whole.checkpoint(), "last.ckpt")
    before = load_file("m.safetensors")
    assert [convert("last.ckpt", *target, "--no_ema") for target in targets] == [2, 2]
    assert same(load_file("m.safetensors"), before)
    assert [convert("last.ckpt", *target, "--no_ema", "--overwrite") for target in targets] == [0, 0]
    want = whole.backbone.vocab_embed.embedding
    assert torch.equal(DiT.from_pretrained(here / "ours").embedding.weight, want)
    assert torch.equal(load_file("m.safetensors")["vocab_embed.embedding"], want)
    Path("ours/notes.txt").write_text("mine")
    capsys.readouterr()
    assert convert("last.ckpt", "ours", "--overwrite") == 2
    assert "holds more than a saved model (notes.txt)" in capsys.readouterr().err and Path("ours/notes.txt").exists()
    Path("ours/notes.txt").unlink()

    def full(self, folder, **_):
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(DiT, "save_pretrained", full)  # a disk that refuses leaves what was there
    assert convert("last.ckpt", "ours", "--overwrite") == 2 and "No space left on device" in capsys.readouterr().err
    assert torch.equal(load_file("ours/model.safetensors")["embedding.weight"], want)
    assert sorted(os.listdir()) == ["last.ckpt", "m.safetensors", "ours"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.ckpt", "out"], "there is no file or folder nowhere.ckpt"),
        (["last.ckpt"], "DESTINATION must be given"),
        (["last.ckpt", "no/folder/out"], "cannot write no/folder/out: its folder does not exist"),
        (["last.ckpt", "out", "--to", "mdlm"], "its name ends in .safetensors; got out"),
        (["last.ckpt", "last.ckpt", "--overwrite"], "last.ckpt holds more than a saved model"),
        (["last.ckpt", "out", "--heads", "3"], "heads 3 contradicts last.ckpt"),
        (["last.ckpt", "out", "--haeds", "3"], "there is no setting --haeds (did you mean --heads?)"),
        (["last.ckpt", "out", "--mask_id", "99"], "mask_id 99 is outside the vocabulary of 13"),
        (["ours", "out", "--heads", "2"], "leave --heads out"),
        (["ours", "out", "--no_ema"], "--no_ema has nothing to choose"),
        (["last.ckpt", "out", "--length", "0"], "model.length must be at least 1"),
    ],
)
def test_bad_input_of_the_command(arguments, message, here, refused):
    torch.save(plain.Diffusion().checkpoint(), "last.ckpt")
    assert convert("last.ckpt", "ours") == 0
    assert message in refused(main, *arguments)
    assert sorted(os.listdir()) == ["last.ckpt", "ours"]


def test_the_hubs_cache_serves_without_a_network(tmp_path, monkeypatch, state):
    commit, folder = "0123456789abcdef0123456789abcdef01234567", tmp_path / "models--somebody--mdlm"
    (snapshot := folder / "snapshots" / commit).mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit)
    save_file({f"backbone.{name}": value for name, value in state.items()}, snapshot / "model.safetensors")
    (snapshot / "config.json").write_text(json.dumps({"model_length": 33, "cond_dim": 8}))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    model = DiT.from_mdlm("somebody/mdlm")
    assert model.config.length == 33 and torch.equal(model.head.weight, state["output_layer.linear.weight"])


def test_a_run_goes_to_mdlm_or_to_a_folder(here, capsys, refused):
    tokenizer = make_tokenizer("bytes")
    size = SIZE | {"time_conditioning": True}
    raw, averaged = (small_dit(tokenizer.model_vocab_size, tokenizer.mask_id, seed=seed, **size) for seed in range(2))
    tensors = {checkpoint.WEIGHTS: dict(raw.named_parameters()), checkpoint.EMA: dict(averaged.named_parameters())}
    checkpoint.save(here / "run", 3, from_dict({"model": size}), tensors, tokenizer, {})
    assert convert("run", "out.safetensors", "--to", "mdlm") == convert("run", "out", "--no_ema") == 0
    assert "step 3 of a run, averaged weights" in capsys.readouterr().out
    back = DiT.from_mdlm(here / "out.safetensors")
    assert back.mask_id == tokenizer.mask_id and back.config == averaged.config
    assert all(torch.equal(a, b) for a, b in zip(back.parameters(), averaged.parameters(), strict=True))
    assert torch.equal(DiT.from_pretrained(here / "out").head.weight, raw.head.weight)
    assert "is a run and has its own settings; leave --length out" in refused(main, "run", "other", "--length", 5)


@pytest.mark.parametrize("block", [1, 3, 4])
def test_bd3lms_weights_give_its_logits_and_go_back(dit, here, block, capsys):
    clean = torch.randint(0, plain.MASK, (2, 12))
    noisy = torch.where(torch.rand(2, 12) < 0.5, plain.MASK, clean)
    want = dit.of_blocks(noisy, clean, block)
    model = DiT.from_mdlm(dit.state_dict(), block=block, length=12)
    got = model.head(model.features(noisy, clean=clean)).view(want.shape)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    (folder := here / "theirs").mkdir()
    save_file({f"backbone.{name}": value for name, value in dit.state_dict().items()}, folder / "model.safetensors")
    settings = {"block_size": block, "model_length": 12, "n_heads": plain.HEADS, "causal": False, "cross_attn": True}
    (folder / "config.json").write_text(json.dumps(settings))
    assert main(["theirs", "ours"]) == 0 and f"blocks of {block}" in capsys.readouterr().out
    saved = DiT.from_pretrained("ours")
    assert saved.config.block == block and torch.equal(saved.head(saved.features(noisy, clean=clean)), got.flatten(0, 1))
    assert main(["ours", "back.safetensors", "--to", "mdlm"]) == 0
    again = DiT.from_mdlm("back.safetensors")
    assert again.config.block == block and torch.equal(again.features(noisy, clean=clean), saved.features(noisy, clean=clean))
    (folder / "config.json").write_text(json.dumps(settings | {"causal": True}))
    with pytest.raises(UsageError, match=r"config\.json says that the model is causal: an autoregressive baseline"):
        main(["theirs", "more"])
    (folder / "config.json").write_text(json.dumps(settings | {"block_size": 12}))
    assert DiT.from_mdlm("theirs").config.block == 0
    with pytest.raises(UsageError, match=r"model.block 5 does not divide model.length 12"):
        DiT.from_mdlm("theirs", block=5)
