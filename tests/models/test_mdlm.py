"""MDLM's checkpoints: the same logits, the same bits on the way back, and a sentence for each file that is not one."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from atat_fast.errors import UsageError
from atat_fast.models import DiT
from atat_fast.models.mdlm import NAMES, ROTARY, by_block, names, to_mdlm_state_dict
from atat_fast.models.mdlm_files import Absent

HERE = Path(__file__).parent


def _plain():
    spec = importlib.util.spec_from_file_location("plain_mdlm", HERE / "plain_mdlm.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["plain_mdlm"] = module
    spec.loader.exec_module(module)
    return module


plain = _plain()


@pytest.fixture
def dit():
    return plain.filled(plain.DIT())


def logits_of(model, tokens, sigma):
    """Ours, told the share that sigma stands for."""
    return model.head(model.features(tokens, 1 - torch.exp(-sigma))).view(*tokens.shape, -1)


@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize("length", [1, 9, 1024])
def test_it_gives_the_originals_logits(dit, told, length):
    tokens, sigma = torch.randint(0, plain.VOCABULARY, (2, length)), torch.tensor([0.3, 2.0])
    want = dit(tokens, sigma if told else torch.zeros(2))
    got = logits_of(DiT.from_mdlm(dit.state_dict(), time_conditioning=told), tokens, sigma)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert want.std() > 0.1


def test_there_and_back_are_the_same_bits(dit):
    original = dit.state_dict()
    back = to_mdlm_state_dict(DiT.from_mdlm(original))
    assert back.keys() == original.keys() and all(torch.equal(back[name], original[name]) for name in original)
    assert [name for name in back if name != ROTARY] == [name for name, _ in dit.named_parameters()]
    fresh = plain.DIT()
    fresh.load_state_dict(back)  # strict: MDLM's own loading takes it
    assert not any(tensor.data_ptr() == p.data_ptr() for tensor, p in zip(back.values(), dit.parameters(), strict=False))


def test_ours_goes_out_and_comes_back():
    ours = plain.filled(DiT(13, 4, dim=16, layers=2, heads=2, length=12, conditioning_dim=8, tie_embeddings=True))
    back = DiT.from_mdlm(to_mdlm_state_dict(ours), mask_id=4, length=12)
    tokens = torch.randint(0, 13, (2, 12))
    assert torch.equal(back.logits(back.features(tokens)), ours.logits(ours.features(tokens)))
    for option in ({"qk_norm": True}, {"activation": "relu2"}):
        with pytest.raises(UsageError, match=f"this model has {next(iter(option))} .*, which MDLM's network does not"):
            to_mdlm_state_dict(DiT(13, 4, dim=16, layers=2, heads=2, **option))


@pytest.mark.parametrize(
    "prefix", ["", "backbone.", "model.", "model.backbone.", "_orig_mod.module.backbone.", "backbone._orig_mod."]
)
def test_prefixes_do_not_matter(dit, prefix):
    state = {prefix + name: value for name, value in dit.state_dict().items()}
    got = to_mdlm_state_dict(DiT.from_mdlm(state))
    assert all(torch.equal(got[published], dit.state_dict()[published]) for published in names(plain.LAYERS))


def test_modulation_kept_as_one_table_is_taken_apart(dit):
    ours = {names(plain.LAYERS)[name]: value for name, value in dit.state_dict().items() if name != ROTARY}
    packed = dict(ours)
    for what in ("weight", "bias"):
        parts = [f"blocks.{i}.modulation.{what}" for i in range(plain.LAYERS)] + [f"final_modulation.{what}"]
        packed[f"modulation.{what}"] = torch.cat([packed.pop(part) for part in parts])
    for state in (packed, ours):
        apart = by_block(state, plain.LAYERS, plain.WIDTH)
        assert apart.keys() == ours.keys() and all(torch.equal(apart[name], ours[name]) for name in ours)


def test_heads_come_from_the_rotary_buffer_or_the_width_or_the_caller(dit):
    wide = plain.filled(plain.DIT(width=128, heads=4, layers=1)).state_dict()
    assert DiT.from_mdlm(wide).config.heads == 4
    del wide[ROTARY]
    assert DiT.from_mdlm(wide).config.heads == 2 and DiT.from_mdlm(wide, heads=8).config.heads == 8
    with pytest.raises(UsageError, match=r"width 128 does not divide into 3 heads of an even size; try 1, 2, 4, 8, 16, 32, 64"):
        DiT.from_mdlm(wide, heads=3)
    with pytest.raises(UsageError, match="does not divide into 0 heads"):
        DiT.from_mdlm(wide, heads=0)
    with pytest.raises(UsageError, match=r"heads 4 contradicts the state dict, whose rotary_emb\.inv_freq is that of 2 heads"):
        DiT.from_mdlm(dit.state_dict(), heads=4)
    small = {name: value for name, value in dit.state_dict().items() if name != ROTARY}
    with pytest.raises(UsageError, match="width 16 does not divide into heads of 64; say how many there are with --heads"):
        DiT.from_mdlm(small)
    other = dit.state_dict() | {ROTARY: dit.state_dict()[ROTARY] ** 1.2}
    with pytest.raises(UsageError, match="is not base 10,000"):
        DiT.from_mdlm(other)


def test_the_mask_is_the_heads_untouched_row_else_the_last_id_or_berts(dit):
    state = dit.state_dict()
    assert DiT.from_mdlm(state).mask_id == plain.VOCABULARY - 1
    assert DiT.from_mdlm(state, mask_id=2).mask_id == 2
    for name in ("output_layer.linear.weight", "output_layer.linear.bias"):
        state[name][5] = 0
    assert DiT.from_mdlm(state).mask_id == 5
    bert = plain.filled(plain.DIT(vocabulary=30_522, width=2, heads=1, layers=1))
    assert DiT.from_mdlm(bert.state_dict()).mask_id == 103
    with pytest.raises(UsageError, match="mask_id 13 is outside the vocabulary of 13"):
        DiT.from_mdlm(state, mask_id=13)


def test_training_with_subs_leaves_the_masks_row_at_zero():
    """What the rule above stands on."""
    d = plain.DIT()
    with torch.no_grad():
        for name, p in d.named_parameters():
            if "linear" not in name:
                p.add_(0.2 * torch.randn_like(p))
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
    whole = plain.Diffusion()
    with torch.no_grad():
        for p in whole.backbone.parameters():
            p.add_(1)
    whole.update()
    file = tmp_path / "last.ckpt"
    torch.save(whole.checkpoint() | {"state_dict": whole.state_dict() | {"noise.sigmas": torch.ones(2)}}, file)
    averaged, raw = (to_mdlm_state_dict(DiT.from_mdlm(source, ema=ema)) for source, ema in ((file, True), (str(file), False)))
    order = list(names(plain.LAYERS))
    assert order == [name for name, _ in whole.backbone.named_parameters()]
    for name, shadow in zip(order, whole.shadow_params, strict=True):
        assert torch.equal(averaged[name], shadow)
        assert torch.equal(raw[name], whole.backbone.state_dict()[name]) and not torch.equal(raw[name], shadow)
    checkpoint = whole.checkpoint()
    del checkpoint["ema"]
    assert torch.equal(DiT.from_mdlm(checkpoint).head.weight, whole.backbone.output_layer.linear.weight)


def test_an_average_that_does_not_fit_is_refused():
    whole = plain.Diffusion()
    checkpoint = whole.checkpoint()
    shadow = checkpoint["ema"]["shadow_params"]
    for change, message in (
        (shadow[:-1], r"averages 39 parameters \(ema.shadow_params\) and has 40; take the weights themselves with --no_ema"),
        (
            [*shadow[1:], shadow[0]],
            "do not have the parameters' shapes: blocks.0.adaLN_modulation.bias .* more; take the weights",
        ),
        ("none", "has an ema without a list shadow_params"),
    ):
        with pytest.raises(UsageError, match=message):
            DiT.from_mdlm(checkpoint | {"ema": {"shadow_params": change}})
        assert DiT.from_mdlm(checkpoint | {"ema": {"shadow_params": change}}, ema=False).vocab_size == 13


def _refused(state, message, **options):
    with pytest.raises(UsageError) as refused:
        DiT.from_mdlm(state, **options)
    assert re.search(message, str(refused.value)), refused.value
    assert "\n" not in str(refused.value)


def test_whatever_does_not_fit_is_listed(dit):
    state = dit.state_dict()
    without = lambda *gone: {k: v for k, v in state.items() if k not in gone}  # noqa: E731
    _refused(without("sigma_map.mlp.0.bias"), "the state dict is not an MDLM checkpoint: missing sigma_map.mlp.0.bias$")
    _refused(without(*[k for k in state if k.startswith("blocks.1.")]), "missing blocks.1.*unexpected blocks.2|missing blocks.1")
    _refused(without(*[k for k in state if k.startswith("blocks.")]), "missing blocks.0.adaLN_modulation.bias.* and 6 more")
    _refused(state | {"cond_map.weight": torch.ones(1), "a": torch.ones(1)}, "unexpected a, cond_map.weight$")
    _refused(without("blocks.2.mlp.0.bias") | {"b": torch.ones(1)}, "missing blocks.2.mlp.0.bias; unexpected b$")
    _refused(state | {"blocks.1.norm2.weight": torch.ones(7)}, r"of another shape blocks.1.norm2.weight \(7,\), not \(16,\)$")
    _refused(state | {"vocab_embed.embedding": torch.ones(7)}, r"vocab_embed.embedding \(7,\), not a matrix")
    _refused(state | {"output_layer.linear.bias": torch.ones(13).long()}, "output_layer.linear.bias of torch.int64")
    narrow = {k: v[:-2] if v.shape and v.shape[0] == 64 else v for k, v in state.items()}
    narrow = {k: v[:, :-2] if v.dim() == 2 and v.shape[1] == 64 else v for k, v in narrow.items()}
    _refused(narrow, r"\(62, 16\), not a multiple of 16 rows")
    _refused(state | {"backbone.output_layer.linear.bias": torch.ones(13)}, "has output_layer.linear.bias twice")
    _refused({"a": 3}, "holds no state dict of tensors")
    _refused({}, "holds no state dict of tensors")
    _refused(state, "dim is not yours to choose.*; what can be given is heads, length", dim=8)
    _refused(state, r"head is not yours to choose for a checkpoint \(did you mean heads\?\)", head=8)


def test_bf16_weights_are_read_into_fp32(dit):
    state = {name: value.bfloat16() for name, value in dit.state_dict().items()}
    model = DiT.from_mdlm(state)
    assert model.head.weight.dtype is torch.float32 and torch.equal(
        model.head.weight.bfloat16(), dit.output_layer.linear.weight.bfloat16()
    )


def test_files_and_folders(tmp_path, dit):
    state = dit.state_dict()
    save_file(state, tmp_path / "weights.safetensors")
    torch.save(state, tmp_path / "weights.pt")
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for name, store in (
        ("a", lambda f: save_file(state, f / "model.safetensors")),
        ("b", lambda f: torch.save(state, f / "pytorch_model.bin")),
    ):
        (tmp_path / name).mkdir()
        store(tmp_path / name)
    (tmp_path / "a" / "config.json").write_text(
        json.dumps({"model_length": 77, "time_conditioning": True, "dropout": 0, "n_heads": 8})
    )
    for source in ("weights.safetensors", "weights.pt", "old.pt", "a", "b", "a/model.safetensors"):
        model = DiT.from_mdlm(tmp_path / source)
        assert torch.equal(model.head.weight, state["output_layer.linear.weight"]), source
        stated = (77, True, 0.0) if source.startswith("a") else (1024, False, 0.1)
        assert (model.config.length, model.time_conditioning, model.config.dropout) == stated
        assert model.config.heads == 2  # the rotary buffer knows better than config.json
    assert DiT.from_mdlm(tmp_path / "a", length=5, time_conditioning=False).config.length == 5
    (tmp_path / "a" / "config.json").write_text(json.dumps({"model_length": "long"}))
    with pytest.raises(UsageError, match=r"config\.json says model_length is 'long', which is not of type int"):
        DiT.from_mdlm(tmp_path / "a")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"holds neither model.safetensors nor pytorch_model.bin"):
        DiT.from_mdlm(tmp_path / "empty")


def test_what_is_no_checkpoint_is_a_sentence(tmp_path):
    cut = tmp_path / "cut.ckpt"
    torch.save({"a": torch.ones(1000)}, cut)
    cut.write_bytes(cut.read_bytes()[:900])
    (tmp_path / "text.ckpt").write_text("to be or not to be")
    (tmp_path / "empty.ckpt").write_bytes(b"")
    (tmp_path / "text.safetensors").write_text("to be or not to be, that is the question")
    torch.save([torch.ones(2)], tmp_path / "list.ckpt")
    for name, message in (
        ("cut.ckpt", "is no checkpoint that torch can read"), ("text.ckpt", "is no checkpoint that torch can read"),
        ("empty.ckpt", "is no checkpoint that torch can read"), ("text.safetensors", "cannot be read as safetensors"),
        ("list.ckpt", "holds a list, not a dictionary"), ("none.ckpt", "there is no file or folder"),
        ("no/such/file.ckpt", "there is no file or folder"),
    ):  # fmt: skip
        _refused(tmp_path / name, message)
    _refused("somebody/mdlm-not-here", "somebody/mdlm-not-here is neither a file nor a folder here.*the hub cannot be reached")


class Bomb:
    def __reduce__(self):
        return exec, ("import pathlib; pathlib.Path('went-off').touch()",)


class System:
    def __reduce__(self):
        return os.system, ("touch went-off",)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("bomb", [Bomb(), System(), Path("x"), types.SimpleNamespace(a=1)])
def test_pickled_code_is_refused_and_never_runs(tmp_path, monkeypatch, dit, bomb, zipped):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "model.ckpt"
    torch.save({"state_dict": dit.state_dict(), "hyper_parameters": bomb}, file, _use_new_zipfile_serialization=zipped)
    _refused(file, r"holds more than tensors and settings.*could run code.*weights_only=False.*tensors.ckpt")
    assert not (tmp_path / "went-off").exists()


def test_the_way_out_that_the_refusal_gives_works(tmp_path, dit):
    file = tmp_path / "model.ckpt"
    torch.save({"state_dict": dit.state_dict(), "callbacks": Path("x")}, file)
    with pytest.raises(UsageError) as refused:
        DiT.from_mdlm(file)
    command = re.search(r'python -c "(.*)"  and give', str(refused.value))[1]
    subprocess.run([sys.executable, "-c", command], cwd=tmp_path, check=True)
    assert DiT.from_mdlm(tmp_path / "tensors.ckpt").vocab_size == 13


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
    text = (HERE.parents[1] / "docs" / "mdlm.md").read_text(encoding="utf-8")
    for published, ours, shape in NAMES:
        assert f"| `{published}` | `{ours}` | {shape.replace(' ', ', ')} |" in text


def door(*arguments, cwd):
    env = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "atat_fast.convert", *map(str, arguments)], cwd=cwd, env=env, capture_output=True, text=True
    )


def convert(*arguments):
    """The door in this process: its exit status."""
    from atat_fast.cli import run_door
    from atat_fast.convert import main

    with pytest.raises(SystemExit) as left:
        run_door(main, [str(a) for a in arguments])
    return left.value.code


def test_the_door(tmp_path):
    whole = plain.Diffusion()
    torch.save(whole.checkpoint(), tmp_path / "last.ckpt")
    done = door("last.ckpt", "ours", "--length", 64, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (
        "3 layers of 16, 2 heads, length 64" in done.stdout and "vocabulary 13 with mask 12, time conditioning off" in done.stdout
    )
    assert sorted(f.name for f in tmp_path.iterdir()) == ["last.ckpt", "ours"]
    tokens = torch.randint(0, 13, (2, 64))
    want = whole(tokens, torch.ones(2))
    model = DiT.from_pretrained(tmp_path / "ours", strict=True)
    torch.testing.assert_close(model.head(model.features(tokens)).view(2, 64, -1), want, rtol=1e-5, atol=1e-5)

    assert convert(tmp_path / "last.ckpt", tmp_path / "ours") == 2
    assert convert(tmp_path / "ours", tmp_path / "back.safetensors", "--to", "mdlm") == 0
    tensors = load_file(tmp_path / "back.safetensors")
    assert all(torch.equal(tensors[name], value) for name, value in whole.backbone.state_dict().items())
    with safe_open(tmp_path / "back.safetensors", "pt") as opened:
        assert opened.metadata()["model_length"] == "64"
    assert DiT.from_mdlm(tmp_path / "back.safetensors").config == model.config


def test_the_door_replaces_only_a_saved_model_and_only_when_asked(tmp_path, capsys):
    whole = plain.Diffusion()
    torch.save(whole.checkpoint(), tmp_path / "last.ckpt")
    ours, file = tmp_path / "ours", tmp_path / "m.safetensors"
    assert convert(tmp_path / "last.ckpt", ours) == convert(tmp_path / "last.ckpt", file, "--to", "mdlm") == 0
    whole.update(0.0)
    with torch.no_grad():
        whole.backbone.vocab_embed.embedding.add_(1)
    torch.save(whole.checkpoint(), tmp_path / "last.ckpt")
    before = load_file(file)
    for arguments in ((ours,), (file, "--to", "mdlm")):
        assert convert(tmp_path / "last.ckpt", *arguments, "--no_ema") == 2
    assert all(torch.equal(before[name], value) for name, value in load_file(file).items())
    for arguments in ((ours,), (file, "--to", "mdlm")):
        assert convert(tmp_path / "last.ckpt", *arguments, "--no_ema", "--overwrite") == 0
    want = whole.backbone.vocab_embed.embedding
    assert torch.equal(DiT.from_pretrained(ours).embedding.weight, want)
    assert torch.equal(load_file(file)["vocab_embed.embedding"], want)
    (ours / "notes.txt").write_text("mine")
    capsys.readouterr()
    assert convert(tmp_path / "last.ckpt", ours, "--overwrite") == 2
    assert "holds more than a saved model (notes.txt)" in capsys.readouterr().err and (ours / "notes.txt").exists()
    assert sorted(f.name for f in tmp_path.iterdir()) == ["last.ckpt", "m.safetensors", "ours"]


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
def test_bad_input_at_the_door(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save(plain.Diffusion().checkpoint(), "last.ckpt")
    assert convert("last.ckpt", "ours") == 0
    capsys.readouterr()
    assert convert(*arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1, error
    assert sorted(f.name for f in tmp_path.iterdir()) == ["last.ckpt", "ours"]


def test_a_disk_that_refuses_leaves_what_was_there(tmp_path, monkeypatch, capsys):
    torch.save(plain.Diffusion().checkpoint(), tmp_path / "last.ckpt")
    ours = tmp_path / "ours"
    assert convert(tmp_path / "last.ckpt", ours) == 0
    before = (ours / "model.safetensors").read_bytes()

    def full(self, folder, **_):
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(DiT, "save_pretrained", full)
    assert convert(tmp_path / "last.ckpt", ours, "--overwrite") == 2
    assert "No space left on device" in capsys.readouterr().err
    assert (ours / "model.safetensors").read_bytes() == before
    assert sorted(f.name for f in tmp_path.iterdir()) == ["last.ckpt", "ours"]


def test_the_hubs_cache_serves_without_a_network(tmp_path, monkeypatch, dit):
    import huggingface_hub

    commit = "0123456789abcdef0123456789abcdef01234567"
    folder = tmp_path / "models--somebody--mdlm"
    snapshot = folder / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit)
    save_file({f"backbone.{name}": value for name, value in dit.state_dict().items()}, snapshot / "model.safetensors")
    (snapshot / "config.json").write_text(json.dumps({"model_length": 33, "cond_dim": 8}))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    model = DiT.from_mdlm("somebody/mdlm")
    assert model.config.length == 33 and torch.equal(model.head.weight, dit.output_layer.linear.weight)


def test_a_run_goes_to_mdlm_or_to_a_folder(tmp_path, capsys):
    from atat_fast.config import from_dict
    from atat_fast.data import make_tokenizer
    from atat_fast.runs import checkpoint

    tokenizer = make_tokenizer("bytes")
    size = {"dim": 16, "layers": 2, "heads": 2, "length": 12, "conditioning_dim": 8, "time_conditioning": True}
    raw, averaged = (plain.filled(DiT(tokenizer.model_vocab_size, tokenizer.mask_id, **size)) for _ in range(2))
    tensors = {checkpoint.WEIGHTS: dict(raw.named_parameters()), checkpoint.EMA: dict(averaged.named_parameters())}
    checkpoint.save(tmp_path / "run", 3, from_dict({"model": size}), tensors, tokenizer, {})
    file, folder = tmp_path / "out.safetensors", tmp_path / "out"
    assert convert(tmp_path / "run", file, "--to", "mdlm") == convert(tmp_path / "run", folder, "--no_ema") == 0
    assert "step 3 of a run, averaged weights" in capsys.readouterr().out
    back = DiT.from_mdlm(file)
    assert back.mask_id == tokenizer.mask_id and back.config == averaged.config
    assert all(torch.equal(a, b) for a, b in zip(back.parameters(), averaged.parameters(), strict=True))
    assert torch.equal(DiT.from_pretrained(folder).head.weight, raw.head.weight)
    assert convert(tmp_path / "run", tmp_path / "other", "--length", "5") == 2
    assert "is a run and says itself what it is; leave --length out" in capsys.readouterr().err
