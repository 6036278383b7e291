"""bench/peers.py: versions without imports, and calls whose values and gradients are the specification's."""

import functools
import importlib.util
import os
import sys

import pytest
import torch

from atat_fast.ops import linear_cross_entropy_reference

CPU = torch.device("cpu")
N, D, V = 37, 24, 101


def inputs(dtype=torch.float32):
    """Random data: signed token weights with a zero among them."""
    torch.manual_seed(0)
    token_weight = torch.randn(N)
    token_weight[3] = 0
    leaves = {"hidden": torch.randn(N, D, dtype=dtype), "weight": torch.randn(V, D), "bias": torch.randn(V)}
    leaves["token_weight"] = token_weight
    return {name: leaf.requires_grad_() for name, leaf in leaves.items()}, torch.randint(0, V, (N,))


def run(call, leaves, target, *, with_bias=True, with_weight=True, rows=None):
    """Loss, and its gradients times a factor no peer may lose."""
    given = {k: v.detach().clone().requires_grad_() for k, v in leaves.items()}
    bias, token_weight = given["bias"] if with_bias else None, given["token_weight"] if with_weight else None
    if rows is not None:
        target, token_weight = target[rows], None if token_weight is None else token_weight[rows]
    loss = call(given["hidden"], given["weight"], target, bias, token_weight, rows=rows)
    (-3 * loss).backward()
    return loss.detach(), {k: v.grad for k, v in given.items()}


def reference(hidden, weight, target, bias, token_weight, rows=None):
    """The op's own specification, in fp64."""
    wide = lambda t: None if t is None else t.double()  # noqa: E731
    return linear_cross_entropy_reference(wide(hidden), wide(weight), target, wide(bias), wide(token_weight), rows).sum()


NATIVE = ["eager", "torch", "torch chunked", "torch chunked 4096"]


def agree(found, leaves, target, *, atol=3e-5, **options):
    """The call's loss and gradients are the specification's, and it gives no others."""
    loss, grads = run(found, leaves, target, **options)
    want, want_grads = run(reference, leaves, target, **options)
    assert loss.dtype is torch.float32 and loss.shape == ()
    torch.testing.assert_close(loss.double(), want, rtol=1e-6, atol=1e-5)
    for key, grad in grads.items():
        assert (grad is None) == (want_grads[key] is None), key
        if grad is not None:
            assert grad.dtype is leaves[key].dtype
            torch.testing.assert_close(grad.double(), want_grads[key].double(), rtol=1e-4, atol=atol)


@pytest.fixture
def native(load):
    def native(name):
        if name not in (found := load("peers").linear_cross_entropy_peers(CPU)):
            pytest.skip(f"torch {torch.__version__} has no F.linear_cross_entropy")
        return found[name]

    return native


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("with_weight", [True, False])
@pytest.mark.parametrize("rows", [None, [0, 5, 6, 36]])
@pytest.mark.parametrize("name", NATIVE)
def test_values_and_gradients_are_the_references(native, name, rows, with_weight, with_bias):
    rows = None if rows is None else torch.tensor(rows)
    agree(native(name), *inputs(), with_bias=with_bias, with_weight=with_weight, rows=rows)


@pytest.mark.slow
def test_the_compiled_one_too(native, monkeypatch):
    """By its graph: the benchmark itself checks the code that it times."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    agree(native("eager compiled"), *inputs(), with_bias=True, with_weight=True, rows=torch.tensor([0, 5, 6, 36]))


@pytest.mark.parametrize("name", NATIVE)
def test_bf16_hidden_with_a_master_weight_in_fp32(native, name):
    leaves, target = inputs(torch.bfloat16)
    loss, grads = run(native(name), leaves, target)
    want, _ = run(reference, leaves, target)
    assert grads["weight"].dtype is torch.float32 and grads["hidden"].dtype is torch.bfloat16
    assert abs(float(loss) - float(want)) < 2e-2 * N


def test_each_says_what_it_cannot_do_and_leaves_no_bias_out_in_silence(load):
    peers = load("peers")
    found = peers.linear_cross_entropy_peers(CPU)
    assert found["eager"].cannot == "" and "row losses" in found["torch chunked"].cannot
    assert all(peer.read for peer in found.values())
    assert peers.versions()["torch.compile"] == torch.__version__
    missing = peers.linear_cross_entropy_missing(CPU)
    assert missing["liger"] in ("it is not installed", "it runs on CUDA tensors") and not set(found) & {"liger", "cce"}
    plain = peers.HeadPeer("plain", peers.eager, "no bias in this version", "nothing", takes_bias=False)
    leaves, target = inputs()
    assert plain(leaves["hidden"], leaves["weight"], target).isfinite()
    with pytest.raises(ValueError, match="plain takes no bias here"):
        plain(leaves["hidden"], leaves["weight"], target, leaves["bias"])


def test_the_namesake_of_apex_is_not_taken_for_it(load, tmp_path, monkeypatch):
    apex = next(peer for peer in load("peers").PEERS if peer.module == "apex")
    if importlib.util.find_spec("apex"):
        pytest.skip("an apex is installed here")
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    assert apex.version is None
    (tmp_path / "apex" / "normalization").mkdir()
    assert apex.version == "unknown version"


FAKE_CUT = """
import torch.nn.functional as F
def linear_cross_entropy(e, c, targets, {bias}reduction="mean", filter_eps="auto", {more}impl="cce"):
    seen.append((filter_eps, {seen}))
    return F.cross_entropy(F.linear(e, c{use}).float(), targets, reduction=reduction)
seen = []
"""
OLD_CUT = FAKE_CUT.format(bias="", more="", seen="None", use="")
NEW_CUT = FAKE_CUT.format(
    bias="bias=None, ",
    more="accum_e_fp32=False, accum_c_fp32=False, filter_c_grad=True, ",
    seen="(accum_e_fp32, accum_c_fp32, filter_c_grad)",
    use=", bias",
)


@pytest.mark.parametrize(
    ("source", "takes_bias", "exact"), [(OLD_CUT, False, (None, None)), (NEW_CUT, True, (None, (True, True, True)))]
)
def test_settings_follow_the_installed_versions_arguments(load, tmp_path, monkeypatch, source, takes_bias, exact):
    """A stand-in with the arguments of 25.1.1, and one with those of later versions."""
    peers = load("peers")
    (tmp_path / "cut_cross_entropy.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "cut_cross_entropy", raising=False)
    monkeypatch.setattr(peers, "needs", lambda module, device: None if module == "cut_cross_entropy" else "not here")
    found = peers.linear_cross_entropy_peers(CPU)
    stand_in = sys.modules.pop("cut_cross_entropy")
    leaves, target = inputs()
    assert found["cce"].takes_bias is takes_bias and ("no bias" in found["cce"].cannot) is not takes_bias
    assert ("cce_kahan_full_c" in found) is takes_bias
    agree(found["cce_exact"], leaves, target, with_bias=takes_bias, atol=1e-4)
    assert stand_in.seen == [exact]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("liger_kernel") is None, reason="liger-kernel is not installed")
def test_liger_under_the_interpreter(load, python):
    """Values and gradients of all its forms."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        test = f"{__file__}::test_liger_under_the_interpreter"
        done = python("-m", "pytest", "-q", "-m", "slow", test, TRITON_INTERPRET="1")
        assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout
        return
    peers = load("peers")
    for call in (peers.liger(None, None), peers.liger(torch.float32, None), peers.liger(torch.float32, 16)):
        for options in ({}, {"with_weight": False}, {"with_bias": False}):
            agree(peers.HeadPeer("liger", call, "", ""), *inputs(), atol=1e-4, **options)


def test_the_table_has_a_line_for_every_peer_and_imports_none(load, capsys):
    before = set(sys.modules)
    assert load("peers").main() == 0
    lines = capsys.readouterr().out.splitlines()
    names = "mdlm, eager; liger-kernel; cut-cross-entropy; flash-attn; apex (NVIDIA's); F.linear_cross_entropy; quack"
    for name in names.split("; "):
        assert any(line.startswith(name) for line in lines), name
    if importlib.util.find_spec("quack") is None:
        assert any("not installed" in line for line in lines) and any("pip install quack-kernels" in line for line in lines)
    assert not {"liger_kernel", "cut_cross_entropy", "flash_attn", "apex", "quack"} & (set(sys.modules) - before)
