"""The DiT: its size, its start, its two halves, and the ways it is saved and compiled."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from atat_fast.config import ImportanceConfig, ModelConfig, load_preset, preset_names
from atat_fast.errors import UsageError
from atat_fast.models import DiT
from atat_fast.models.dit import Randomness, merge_modulation, step_cost
from atat_fast.models.importance import Network
from atat_fast.ops import Documents, documents_of
from atat_fast.ops.adaptive_norm import dropout_scale

SMALL = {"dim": 16, "layers": 2, "heads": 2, "length": 12, "conditioning_dim": 8, "dropout": 0.0}
OPTIONS = [
    {},
    {"time_conditioning": True},
    {"tie_embeddings": True},
    {"qk_norm": True, "activation": "relu2"},
    {"layers": 1, "time_conditioning": True},
]


def model(**options):
    built = DiT(11, 10, **(SMALL | options))
    with torch.no_grad():  # away from the all-zero start, where half of the model has no gradient
        for p in built.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return built


def plain_logits(m, tokens, share):
    """The same network written out with PyTorch's own modules and no ops of ours: MDLM's DiT."""
    c = m.config
    sigma = -torch.log1p(-share) if c.time_conditioning else torch.zeros(1)
    frequency = torch.exp(-math.log(10_000) * torch.arange(128) / 128)
    angle = sigma[:, None] * frequency
    t = F.silu(m.time.outer(F.silu(m.time.inner(torch.cat([angle.cos(), angle.sin()], -1)))))
    x = m.embedding(tokens)
    batch, length, width = x.shape
    size = width // c.heads
    inverse = 1.0 / 10_000 ** (torch.arange(0, size, 2).float() / size)
    turn = torch.outer(torch.arange(length).float(), inverse)
    cos, sin = (torch.cat([f, f], -1)[None, :, None] for f in (turn.cos(), turn.sin()))

    def rotate(v):
        half = torch.cat([-v[..., size // 2 :], v[..., : size // 2]], -1)
        return v * cos + half * sin

    def norm(v, weight, shift, scale):
        return F.layer_norm(v, (width,), weight) * (1 + scale[:, None]) + shift[:, None]

    *tables, final = m.modulation(t).split([6 * width] * c.layers + [2 * width], -1)
    for b, table in zip(m.blocks, tables, strict=True):
        s1, c1, g1, s2, c2, g2 = table.chunk(6, -1)
        q, k, v = b.qkv(norm(x, b.norm1, s1, c1)).view(batch, length, 3, c.heads, size).unbind(2)
        if c.qk_norm:
            q, k = (u * torch.rsqrt(u.pow(2).mean(-1, keepdim=True) + torch.finfo(u.dtype).eps) for u in (q, k))
        scores = torch.einsum("blhe,bmhe->bhlm", rotate(q), rotate(k)) / size**0.5
        a = torch.einsum("bhlm,bmhe->blhe", scores.softmax(-1), v).reshape(batch, length, width)
        x = x + g1[:, None] * b.out(a)
        inner = b.up(norm(x, b.norm2, s2, c2))
        inner = F.gelu(inner, approximate="tanh") if c.activation == "gelu" else F.relu(inner) ** 2
        x = x + g2[:, None] * b.down(inner)
    shift, scale = final.chunk(2, -1)
    logits = m.head(norm(x, m.final_norm, shift, scale))
    logits[..., m.mask_id] = -torch.inf
    return logits


@pytest.mark.parametrize("options", OPTIONS)
def test_it_is_mdlms_network(options):
    m, tokens, share = model(**options), torch.randint(0, 11, (3, 9)), torch.tensor([0.2, 0.5, 1 / 3])
    got = m.logits(m.features(tokens, share)).view(3, 9, 11)
    want = plain_logits(m, tokens, share)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert (got[..., 10] == -torch.inf).all()


@pytest.mark.parametrize("options", OPTIONS)
def test_the_loss_and_its_gradients_are_those_of_the_plain_network(options):
    m, tokens, share = model(**options), torch.randint(0, 10, (3, 9)), torch.tensor([0.2, 0.5, 1 / 3])
    rows = torch.tensor([0, 4, 9, 10, 26])
    noisy = tokens.flatten().index_fill(0, rows, 10).view(3, 9)
    target, weights = tokens.flatten()[rows], torch.rand(5)
    loss, nll = m(noisy, rows, target, weights, share)
    ours = torch.autograd.grad(loss, list(m.parameters()), allow_unused=True)
    plain = -torch.log_softmax(plain_logits(m, noisy, share).view(27, 11)[rows], -1)[range(5), target]
    theirs = torch.autograd.grad((weights * plain).sum(), list(m.parameters()), allow_unused=True)
    torch.testing.assert_close(nll, plain.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(m.nll(noisy, rows, target, share), plain, rtol=1e-4, atol=1e-5)
    for (name, _), a, b in zip(m.named_parameters(), ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=1e-5, msg=name)


def test_it_starts_by_knowing_nothing():
    m = DiT(11, 10, **SMALL)
    logits = m.logits(m.features(torch.randint(0, 10, (2, 12))))
    assert (logits[:, :10] == 0).all()


@pytest.mark.parametrize(
    ("vocabulary", "preset", "changes", "total"),
    [
        (50_258, "small", {}, 169_627_218),
        (30_522, "small", {}, 139_292_986),
        (50_258, "medium", {}, 424_477_010),
        (50_258, "small", {"tie_embeddings": True}, 169_627_218 - 38_598_144),
    ],
)
def test_parameter_counts(vocabulary, preset, changes, total):
    with torch.device("meta"):
        m = DiT(vocabulary, vocabulary - 1, **(vars(load_preset(preset).model) | changes))
    counts = m.parameter_counts()
    assert counts["total"] == total == sum(p.numel() for p in m.parameters())
    assert sum(v for k, v in counts.items() if k != "total") == total


def test_every_preset_builds():
    for name in preset_names():
        with torch.device("meta"):
            DiT(50_258, 50_257, **vars(load_preset(name).model))
    large = load_preset("large")
    with torch.device("meta"):
        assert 1.2e9 < DiT(50_258, 50_257, **vars(large.model)).parameter_counts()["total"] < 1.4e9


@pytest.mark.parametrize("options", OPTIONS[:3])
def test_it_goes_to_a_folder_and_back(tmp_path, options):
    m, tokens, share = model(**options), torch.randint(0, 11, (2, 12)), torch.tensor([0.2, 0.5])
    m.save_pretrained(tmp_path / "model")
    assert not list((tmp_path / "model").glob("*.bin")) and (tmp_path / "model" / "model.safetensors").is_file()
    back = DiT.from_pretrained(tmp_path / "model")
    assert back.config == m.config and back.mask_id == 10
    assert torch.equal(back.features(tokens, share), m.features(tokens, share))
    if options.get("tie_embeddings"):
        assert back.head.weight is back.embedding.weight


def test_dropout_is_on_only_where_randomness_is_given():
    m, tokens = model(dropout=0.5), torch.randint(0, 11, (2, 12))
    ids = torch.tensor([7, 8])
    plain = m.features(tokens)
    assert torch.equal(plain, m.features(tokens))
    one = m.features(tokens, randomness=Randomness(1, 5, ids))
    assert torch.equal(one, m.features(tokens, randomness=Randomness(1, torch.tensor(5), ids)))
    assert not torch.equal(one, plain) and not torch.equal(one, m.features(tokens, randomness=Randomness(1, 6, ids)))
    swapped = m.features(tokens.flip(0), randomness=Randomness(1, 5, ids.flip(0)))
    torch.testing.assert_close(swapped.view(2, 12, -1).flip(0), one.view(2, 12, -1))


CASES = [
    {},
    {"time_conditioning": True},
    {"dropout": 0.4},
    {"time_conditioning": True, "dropout": 0.4, "qk_norm": True},
    {"layers": 1, "tie_embeddings": True},
]


@pytest.mark.parametrize("options", CASES)
@pytest.mark.parametrize("documents", [False, True])
def test_rows_of_the_last_block_are_those_of_the_dense_path(options, documents):
    """Values, dropout masks and every gradient, in fp64. Rows 0 and weight 0 at the end are padding."""
    m = model(**options).double()
    tokens, share, ids = torch.randint(0, 11, (3, 9)), torch.tensor([0.2, 0.5, 1 / 3]), torch.tensor([7, 2**33, 5])
    rows = torch.tensor([1, 4, 9, 10, 26, 0, 0])
    upstream = torch.randn(7, 16, dtype=torch.float64)
    upstream[5:] = 0
    randomness = Randomness(3, torch.tensor(11), ids)
    inside = documents_of(tokens, 4) if documents else None
    dense = m.features(tokens, share, randomness, documents=inside)[rows]
    sparse = m.features(tokens, share, randomness, rows=rows, documents=inside)
    torch.testing.assert_close(sparse, dense, rtol=1e-12, atol=1e-12)
    assert torch.equal(sparse[5], sparse[6])
    names = [name for name, _ in m.named_parameters()]
    theirs, ours = (torch.autograd.grad(x, list(m.parameters()), upstream, allow_unused=True) for x in (dense, sparse))
    for name, a, b in zip(names, theirs, ours, strict=True):
        if a is None or not a.any():
            assert (name.startswith("head.") and b is None) or not b.any(), name
        else:
            torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-11, msg=name)


def test_dropout_of_picked_rows_is_the_same_bits():
    """A token's mask is named by sample * L + position, whatever the shape it comes in."""
    ids, rows = torch.tensor([7, 2**40]), torch.tensor([3, 0, 17, 23])
    seed, step = torch.tensor(1), torch.tensor(2)
    dense = dropout_scale(torch.Size((2, 12, 10)), 0.5, seed, step, ids, 3)
    picked = dropout_scale(torch.Size((4, 1, 10)), 0.5, seed, step, ids[rows // 12] * 12 + rows % 12, 3)
    assert torch.equal(picked[:, 0], dense.flatten(0, 1)[rows])


@pytest.mark.parametrize("options", CASES[:4])
def test_no_rows_and_padding_alone_are_harmless(options):
    m, tokens, share = model(**options), torch.randint(0, 11, (2, 12)), torch.tensor([0.0, 0.0])
    randomness = Randomness(1, 2, torch.tensor([0, 1]))
    none = torch.zeros(0, dtype=torch.int64)
    assert m.features(tokens, share, randomness, rows=none).shape == (0, 16)
    padding = torch.zeros(5, dtype=torch.int64)
    loss, nll = m(tokens, padding, padding, torch.zeros(5), share, randomness)
    loss.backward()
    assert float(loss.detach()) == 0 and (nll == 0).all()
    assert all(p.grad is None or not p.grad.any() for p in m.parameters())


@pytest.mark.parametrize("length", [9, 12])
def test_a_token_does_not_see_another_document(length):
    m = model(document_mask=True)
    tokens = torch.randint(1, 10, (2, length))
    tokens[:, 3] = 0  # ends the first document of each row
    inside = documents_of(tokens, 0)
    noisy = tokens.clone()
    noisy[:, 1] = noisy[:, 6] = 10
    changed = noisy.clone()
    changed[0, 5:] = torch.randint(1, 10, (length - 5,))  # in the first row's second document
    rows = torch.tensor([1, 6, length + 1, length + 6])
    for picked in (None, rows):
        before, after = (m.features(x, rows=picked, documents=inside) for x in (noisy, changed))
        if picked is None:
            before, after = before[rows], after[rows]
        same = [torch.equal(a, b) for a, b in zip(m.logits(before), m.logits(after), strict=True)]
        assert same == [True, False, True, True]
    free = [m.logits(m.features(x, rows=rows)) for x in (noisy, changed)]
    assert not torch.equal(free[0][0], free[1][0])
    whole = Documents(torch.zeros(2, length, dtype=torch.int32))
    torch.testing.assert_close(m.features(noisy, documents=whole), m.features(noisy))


def test_tables_kept_block_by_block_are_taken():
    """MDLM's layout, and that of checkpoints written before the tables were one."""
    m, tokens, share = model(layers=3, time_conditioning=True), torch.randint(0, 11, (2, 12)), torch.tensor([0.2, 0.5])
    apart = m.state_dict()
    for what in ("weight", "bias"):
        whole = apart.pop(f"modulation.{what}")
        for i in range(3):
            apart[f"blocks.{i}.modulation.{what}"] = whole[96 * i : 96 * (i + 1)].clone()
        apart[f"final_modulation.{what}"] = whole[288:].clone()
    other = DiT(11, 10, **(SMALL | {"layers": 3, "time_conditioning": True}))
    assert other.load_state_dict(apart).missing_keys == []
    assert torch.equal(other.features(tokens, share), m.features(tokens, share))
    moments = {f"{name}/exp_avg": value for name, value in apart.items()} | {f"{name}/step": torch.tensor(5.0) for name in apart}
    merge_modulation(moments)
    assert torch.equal(moments["modulation.weight/exp_avg"], m.modulation.weight) and moments["modulation.bias/step"] == 5
    assert {name.split("/")[0] for name in moments} == set(m.state_dict())
    del apart["blocks.1.modulation.bias"]
    with pytest.raises(RuntimeError, match=r"modulation\.bias"):
        other.load_state_dict(apart)


def steps(m, compiled, counts):
    """Steps with these numbers of hidden rows; what was compiled is compared with what was not."""
    batch, length = 2, m.config.length
    for step, count in enumerate(counts):
        noisy, rows = torch.randint(0, 11, (batch, length)), torch.randperm(batch * length)[:count].sort().values
        args = (noisy, rows, torch.randint(0, 10, (count,)), torch.rand(count), torch.rand(batch) * 0.9)
        for tensor in args[1:4]:
            torch._dynamo.maybe_mark_dynamic(tensor, 0)  # as the trainer does
        randomness = Randomness(1, torch.tensor(step), torch.tensor([0, 1]))
        documents = documents_of(noisy, 3) if m.config.document_mask else None
        got, want = (f(*args, randomness, documents) for f in (compiled, m))
        torch.testing.assert_close(got, want)
        ours, theirs = (torch.autograd.grad(loss, list(m.parameters()), allow_unused=True) for loss in (got[0], want[0]))
        for a, b in zip(ours, theirs, strict=True):
            assert (a is None) == (b is None) or not (a if b is None else b).any()
            assert a is None or b is None or torch.allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"dropout": 0.4}, marks=pytest.mark.slow),
        pytest.param({"document_mask": True}, marks=pytest.mark.slow),
        pytest.param({"time_conditioning": True}, marks=pytest.mark.slow),
        pytest.param({"time_conditioning": True, "dropout": 0.4, "qk_norm": True}, marks=pytest.mark.slow),
    ],
)
def test_one_graph_serves_any_number_of_hidden_rows(options):
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    m = model(**options)
    compiled = torch.compile(m, fullgraph=True, backend="aot_eager")
    steps(m, compiled, (12, 7, 20, 2))
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


@pytest.mark.slow
@pytest.mark.parametrize("name", preset_names())
def test_every_preset_is_one_graph(name):
    """Sizes are cut down, for what decides about graphs is the options."""
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    settings = vars(load_preset(name).model) | {"dim": 16, "heads": 2, "layers": 2, "length": 12, "conditioning_dim": 8}
    m = model(**settings)
    steps(m, torch.compile(m, fullgraph=True, backend="aot_eager"), (12, 5))
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


def test_bf16_autocast_keeps_the_stream_and_gives_bf16_rows():
    m, tokens = model(), torch.randint(0, 11, (2, 12))
    with torch.autocast("cpu", torch.bfloat16):
        low = m.features(tokens)
    assert low.dtype is torch.bfloat16
    torch.testing.assert_close(low.float(), m.features(tokens), rtol=0.1, atol=0.1)


def test_shorter_sequences_are_taken_and_longer_ones_refused():
    m = model()
    assert m.features(torch.zeros(1, 5, dtype=torch.int64)).shape == (5, 16)
    with pytest.raises(ValueError, match="has 13 tokens, but this model takes at most 12"):
        m.features(torch.zeros(1, 13, dtype=torch.int64))


def test_time_conditioning_needs_the_time_and_survives_everything_hidden():
    m = model(time_conditioning=True)
    with pytest.raises(ValueError, match="pass hidden_share"):
        m.features(torch.zeros(1, 5, dtype=torch.int64))
    assert m.features(torch.zeros(2, 5, dtype=torch.int64), torch.tensor([1.0, 0.0])).isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dim": 15}, "model.dim 15 does not divide into 2 heads of an even size; try model.heads"),
        ({"heads": 0}, "model.heads must be at least 1"),
        ({"dropout": 1.0}, "model.dropout must be in"),
    ],
)
def test_bad_sizes(change, message):
    with pytest.raises(UsageError, match=message):
        DiT(11, 10, **(SMALL | change))
    with pytest.raises(UsageError, match="mask_id 11 is outside the vocabulary of 11"):
        DiT(11, 11, **SMALL)


def test_the_cost_of_a_step_is_what_the_papers_count():
    """854 MFLOP a token forward and backward with every row through the head, at small and GPT-2's vocabulary."""
    cost = step_cost(ModelConfig(), 50_258, 1, 1024)
    assert cost.flops / 1024 == pytest.approx(854e6, rel=0.01)
    half = step_cost(ModelConfig(), 50_258, 1, 512)
    assert cost.flops - half.flops == 6 * 512 * 768 * (9 * 768 + 50_258)  # out, MLP and head of the rows that are not hidden


@pytest.mark.parametrize("options", [*OPTIONS, {"recompute": True}, {"picked": True}])
def test_forward_mode_through_the_whole_network(options):
    """What consistency and flow distillation need: the tangent is the reverse mode's number, in parameters of every kind."""
    options = dict(options)
    recompute, rows = options.pop("recompute", False), torch.tensor([17, 2, 5]) if options.pop("picked", False) else None
    m, tokens, share = model(**options).double(), torch.randint(0, 11, (2, 12)), torch.tensor([0.2, 0.5])
    for block in m.blocks:
        block.recompute = recompute
    upstream = torch.randn(24 if rows is None else 3, 16, dtype=torch.float64)

    def number(parameters):
        features = torch.func.functional_call(Features(m), {f"m.{k}": p for k, p in parameters.items()}, (tokens, share, rows))
        return (features * upstream).sum()

    parameters = {k: p.detach() for k, p in m.named_parameters()}
    along = {k: torch.randn_like(p) for k, p in parameters.items()}
    want = sum(
        (g * along[k]).sum()
        for (k, p), g in zip(m.named_parameters(), torch.autograd.grad(
            (m.features(tokens, share, rows=rows) * upstream).sum(), list(m.parameters()), allow_unused=True
        ), strict=True)
        if g is not None
    )  # fmt: skip
    _, got = torch.func.jvp(number, (parameters,), (along,))
    torch.testing.assert_close(got, want)
    found = torch.func.grad(number)(parameters)
    torch.testing.assert_close(sum((g * along[k]).sum() for k, g in found.items()), want)


class Features(torch.nn.Module):
    def __init__(self, m):
        super().__init__()
        self.m = m

    def forward(self, tokens, share, rows):
        return self.m.features(tokens, share, rows=rows)


def test_gradients_of_each_sequence_and_second_derivatives(monkeypatch):
    """torch.func's per-sample gradients of the loss, and a Hessian's product, against one sequence and pass at a time."""
    monkeypatch.setenv("ATAT_FAST_ATTENTION", "sdpa_math")
    m = model().double()
    noisy, target = torch.randint(0, 11, (3, 12)), torch.randint(0, 10, (3, 4))
    rows, weights = torch.tensor([1, 4, 6, 9]), torch.rand(3, 4, dtype=torch.float64)
    parameters = {k: p.detach() for k, p in m.named_parameters()}

    def loss(parameters, noisy, target, weights):
        return torch.func.functional_call(m, parameters, (noisy[None], rows, target, weights))[0]

    found = torch.func.vmap(torch.func.grad(loss), (None, 0, 0, 0))(parameters, noisy, target, weights)
    for i in range(3):
        plain = torch.autograd.grad(m(noisy[i : i + 1], rows, target[i], weights[i])[0], list(m.parameters()), allow_unused=True)
        for g, want in zip(found.values(), plain, strict=True):
            torch.testing.assert_close(g[i], torch.zeros_like(g[i]) if want is None else want)
    along = {k: torch.randn_like(p) for k, p in parameters.items()}
    one = (noisy[0], target[0], weights[0])
    _, want = torch.func.jvp(lambda p: torch.func.grad(loss)(p, *one), (parameters,), (along,))
    leaves = list(m.parameters())
    first = torch.autograd.grad(
        m(noisy[:1], rows, target[0], weights[0])[0], leaves, create_graph=True, materialize_grads=True, allow_unused=True
    )
    dot = sum((g * v).sum() for g, v in zip(first, along.values(), strict=True))
    second = torch.autograd.grad(dot, leaves, materialize_grads=True, allow_unused=True)
    torch.testing.assert_close(dict(zip(along, second, strict=True)), want)


def lost(m, way, state):
    """A model whose tables were lost, and its weights put back."""
    if way == "to_empty":
        m.to_empty(device="cpu")
        m.load_state_dict(state)
    elif way == "overwritten":
        m.cos.fill_(torch.nan)
        m.load_state_dict(state)
    elif way == "assign":
        m = m.to("meta")
        m.load_state_dict(state, assign=True)
    elif way == "one by one":
        m = m.to("meta")
        for name, value in state.items():
            *path, last = name.split(".")
            setattr(m.get_submodule(".".join(path)), last, torch.nn.Parameter(value))
    elif way == "half":
        m.half().bfloat16().double().float()
        m.load_state_dict(state)
    elif way == "within":
        outer = torch.nn.ModuleDict({"m": m.to("meta")}).to_empty(device="cpu")
        outer.load_state_dict({f"m.{k}": v for k, v in state.items()})
    elif way == "copied":
        m = pickle.loads(pickle.dumps(copy.deepcopy(m.bfloat16()))).float()
        m.load_state_dict(state)
    return m


@pytest.mark.parametrize("way", ["to_empty", "overwritten", "assign", "one by one", "half", "within", "copied"])
def test_tables_are_what_the_configuration_says_whatever_was_done(way):
    m, tokens = model(), torch.randint(0, 11, (2, 12))
    want, state = m.features(tokens), {k: v.clone() for k, v in m.state_dict().items()}
    m = lost(m, way, state)
    assert torch.equal(m.features(tokens), want)
    network = Network(ImportanceConfig(width=16, heads=2, layers=1), 16, 12)
    embedded, share = torch.randn(2, 12, 16), torch.tensor([0.1, 0.6])
    torch.nn.init.normal_(network.head.weight)
    want, state = network(embedded, share), {k: v.clone() for k, v in network.state_dict().items()}
    assert torch.equal(lost(network, way, state)(embedded, share), want)


def test_tables_stay_in_fp32_and_where_they_were():
    m = model()
    table = m.cos.clone()
    assert torch.equal(m.bfloat16().cos, table) and m.cos.dtype is torch.float32
    where = m.cos.data_ptr()
    m.load_state_dict(m.state_dict())
    assert m.to("cpu").cos.data_ptr() == where  # a captured graph reads it there


@pytest.mark.parametrize("options", OPTIONS)
def test_shapes_on_the_meta_device_and_with_fake_tensors(options):
    with torch.device("meta"):
        m = DiT(11, 10, **(SMALL | options))
        tokens, rows, share = torch.zeros(2, 12, dtype=torch.int64), torch.zeros(5, dtype=torch.int64), torch.zeros(2)
        loss, nll = m(tokens, rows, rows, torch.ones(5), share)
        documents = documents_of(tokens, 0)
        assert m.logits(m.features(tokens, share, documents=documents)).shape == (24, 11)
    loss.backward()
    assert nll.shape == (5,) and m.head.weight.grad.shape == (11, 16)
    with FakeTensorMode():
        m = DiT(11, 10, **(SMALL | options))
        tokens, rows, share = torch.zeros(2, 12, dtype=torch.int64), torch.zeros(5, dtype=torch.int64), torch.zeros(2)
        loss, nll = m(tokens, rows, rows, torch.ones(5), share)
        loss.backward()
    assert nll.shape == (5,) and m.head.weight.grad.shape == (11, 16)
