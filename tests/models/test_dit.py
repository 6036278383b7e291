"""The DiT: its size, its start, its two halves, and the ways it is saved and compiled."""

from __future__ import annotations

import copy
import pickle

import plain_mdlm
import pytest
import torch
from small import SIZE, small_dit
from torch._subclasses.fake_tensor import FakeTensorMode

from atat_fast.config import ImportanceConfig, ModelConfig, load_preset, preset_names
from atat_fast.errors import UsageError
from atat_fast.models import DiT
from atat_fast.models.dit import Randomness, merge_modulation, step_cost
from atat_fast.models.importance import Network
from atat_fast.models.mdlm import by_block, names
from atat_fast.ops import Documents, documents_of

OPTIONS = [
    {}, {"time_conditioning": True}, {"tie_embeddings": True}, {"qk_norm": True, "activation": "relu2"},
    {"layers": 1, "time_conditioning": True},
]  # fmt: skip
SHARE = torch.tensor([0.2, 0.5, 1 / 3])


def ids(batch=2, length=12):
    return torch.randint(0, 11, (batch, length))


def model(**options):
    return small_dit(scale=0.1, **options)


@pytest.mark.parametrize("options", OPTIONS)
def test_logits_losses_and_gradients_are_those_of_mdlms_network(options):
    m, tokens = model(**options), torch.randint(0, 10, (3, 9))
    c, rows, weights = m.config, torch.tensor([0, 4, 9, 10, 26]), torch.rand(5)
    plain = plain_mdlm.DIT(11, 16, 2, c.layers, 8, qk_norm=c.qk_norm, activation=c.activation)
    apart, ours = by_block(m.state_dict(), c.layers, 16), names(c.layers)
    plain.load_state_dict({theirs: apart[own] for theirs, own in ours.items()}, strict=False)
    noisy, target = tokens.flatten().index_fill(0, rows, 10).view(3, 9), tokens.flatten()[rows]
    theirs = plain(noisy, -torch.log1p(-SHARE) if c.time_conditioning else torch.zeros(3))
    theirs[..., 10] = -torch.inf
    torch.testing.assert_close(m.logits(m.features(noisy, SHARE)).view(3, 9, 11), theirs, rtol=1e-4, atol=1e-5)
    loss, nll = m(noisy, rows, target, weights, SHARE)
    want = -torch.log_softmax(theirs.view(27, 11)[rows], -1)[range(5), target]
    torch.testing.assert_close(nll, want.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(m.nll(noisy, rows, target, SHARE), want, rtol=1e-4, atol=1e-5)
    loss.backward()
    (weights * want).sum().backward()
    gradients = {ours[name]: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    merge_modulation(gradients)
    if c.tie_embeddings:
        gradients["embedding.weight"] += gradients["head.weight"]
    for name, p in m.named_parameters():
        torch.testing.assert_close(p.grad, gradients.get(name), rtol=2e-3, atol=1e-5, msg=name)


def test_it_starts_by_knowing_nothing():
    m = DiT(11, 10, **SIZE)
    assert (m.logits(m.features(ids()))[:, :10] == 0).all()


COUNTS = {(50_258, preset, False): None for preset in preset_names()} | {
    (50_258, "small", False): 169_627_218, (30_522, "small", False): 139_292_986, (50_258, "medium", False): 424_477_010,
    (50_258, "small", True): 169_627_218 - 38_598_144,
}  # fmt: skip


@pytest.mark.parametrize("which", COUNTS, ids=str)
def test_parameter_counts_of_presets(which):
    vocabulary, preset, tied = which
    with torch.device("meta"):
        m = DiT(vocabulary, vocabulary - 1, **vars(load_preset(preset).model) | {"tie_embeddings": tied})
    counts = m.parameter_counts()
    assert counts["total"] == sum(p.numel() for p in m.parameters()) == sum(v for k, v in counts.items() if k != "total")
    assert COUNTS[which] in (None, counts["total"]) and (preset != "large" or 1.2e9 < counts["total"] < 1.4e9)


@pytest.mark.parametrize("options", OPTIONS[:3])
def test_it_goes_to_a_folder_and_back(tmp_path, options):
    m, tokens, share = model(**options), ids(), SHARE[:2]
    m.save_pretrained(tmp_path / "model")
    assert not list((tmp_path / "model").glob("*.bin")) and (tmp_path / "model" / "model.safetensors").is_file()
    back = DiT.from_pretrained(tmp_path / "model")
    assert back.config == m.config and back.mask_id == 10
    assert torch.equal(back.features(tokens, share), m.features(tokens, share))
    assert not options.get("tie_embeddings") or back.head.weight is back.embedding.weight


def test_dropout_is_on_only_where_randomness_is_given():
    m, tokens, samples = model(dropout=0.5), ids(), torch.tensor([7, 8])
    plain, draw = m.features(tokens), lambda step: m.features(tokens, randomness=Randomness(1, step, samples))
    assert torch.equal(plain, m.features(tokens)) and torch.equal(draw(5), draw(torch.tensor(5)))
    assert not torch.equal(draw(5), plain) and not torch.equal(draw(5), draw(6))
    swapped = m.features(tokens.flip(0), randomness=Randomness(1, 5, samples.flip(0)))
    torch.testing.assert_close(swapped.view(2, 12, -1).flip(0), draw(5).view(2, 12, -1))


CASES = [
    {}, {"time_conditioning": True}, {"dropout": 0.4}, {"time_conditioning": True, "dropout": 0.4, "qk_norm": True},
    {"layers": 1, "tie_embeddings": True},
]  # fmt: skip


@pytest.mark.parametrize("options", CASES)
@pytest.mark.parametrize("documents", [False, True])
def test_rows_of_the_last_block_are_those_of_the_dense_path(options, documents):
    """Values, dropout masks and every gradient, in fp64. Rows 0 and weight 0 at the end are padding."""
    m, tokens = model(**options).double(), ids(3, 9)
    rows, upstream = torch.tensor([1, 4, 9, 10, 26, 0, 0]), torch.randn(7, 16, dtype=torch.float64)
    upstream[5:] = 0
    given = (tokens, SHARE, Randomness(3, torch.tensor(11), torch.tensor([7, 2**33, 5])))
    inside = documents_of(tokens, 4) if documents else None
    dense, sparse = m.features(*given, documents=inside)[rows], m.features(*given, rows=rows, documents=inside)
    torch.testing.assert_close(sparse, dense, rtol=1e-12, atol=1e-12)
    assert torch.equal(sparse[5], sparse[6])
    theirs, ours = (torch.autograd.grad(x, list(m.parameters()), upstream, allow_unused=True) for x in (dense, sparse))
    for (name, _), a, b in zip(m.named_parameters(), theirs, ours, strict=True):
        if a is None or not a.any():
            assert (name.startswith("head.") and b is None) or not b.any(), name
        else:
            torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-11, msg=name)


@pytest.mark.parametrize("options", CASES[:4])
def test_no_rows_and_padding_alone_are_harmless(options):
    m, tokens, share, randomness = model(**options), ids(), torch.zeros(2), Randomness(1, 2, torch.tensor([0, 1]))
    none, padding = (torch.zeros(n, dtype=torch.int64) for n in (0, 5))
    assert m.features(tokens, share, randomness, rows=none).shape == (0, 16)
    loss, nll = m(tokens, padding, padding, torch.zeros(5), share, randomness)
    loss.backward()
    assert float(loss.detach()) == 0 and (nll == 0).all()
    assert all(p.grad is None or not p.grad.any() for p in m.parameters())


@pytest.mark.parametrize("length", [9, 12])
def test_a_token_does_not_see_another_document(length):
    m, tokens = model(document_mask=True), torch.randint(1, 10, (2, length))
    tokens[:, 3] = 0  # ends the first document of each row
    inside, noisy = documents_of(tokens, 0), tokens.clone()
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
    m, tokens, share = model(layers=3, time_conditioning=True), ids(), SHARE[:2]
    apart, other = by_block(m.state_dict(), 3, 16), DiT(11, 10, **SIZE | {"layers": 3, "time_conditioning": True})
    assert other.load_state_dict(apart).missing_keys == []
    assert torch.equal(other.features(tokens, share), m.features(tokens, share))
    moments = {f"{name}/exp_avg": value for name, value in apart.items()} | {f"{name}/step": torch.tensor(5.0) for name in apart}
    merge_modulation(moments)
    assert torch.equal(moments["modulation.weight/exp_avg"], m.modulation.weight) and moments["modulation.bias/step"] == 5
    assert {name.split("/")[0] for name in moments} == set(m.state_dict())
    del apart["blocks.1.modulation.bias"]
    with pytest.raises(RuntimeError, match=r"modulation\.bias"):
        other.load_state_dict(apart)


def of_presets():
    """Options of presets cut down to this file's sizes, each once: what decides about graphs is the options."""
    found = {}
    for name in preset_names():
        options = vars(load_preset(name).model)
        options = options | SIZE | {"dropout": options["dropout"], "block": min(4, options["block"])}
        if options not in found.values():
            found[name] = options
    return found


OF_PRESETS = of_presets()


@pytest.mark.parametrize(
    ("options", "counts"),
    [
        ({}, (12, 7, 20, 2)),
        *(
            pytest.param(options, (12, 7, 20, 2), marks=pytest.mark.slow)
            for options in ({"dropout": 0.4}, {"document_mask": True}, {"time_conditioning": True}, CASES[3])
        ),
        *(pytest.param(options, (12, 5), id=name, marks=pytest.mark.slow) for name, options in OF_PRESETS.items()),
    ],
)
def test_one_graph_serves_any_number_of_hidden_rows(options, counts):
    """What was compiled is compared with what was not."""
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    m, randomness = model(**options), lambda step: Randomness(1, torch.tensor(step), torch.tensor([0, 1]))
    compiled = torch.compile(m, fullgraph=True, backend="aot_eager")
    for step, count in enumerate(counts):
        noisy, rows = ids(), torch.randperm(24)[:count].sort().values
        args = (noisy, rows, torch.randint(0, 10, (count,)), torch.rand(count), torch.rand(2) * 0.9)
        for tensor in args[1:4]:
            torch._dynamo.maybe_mark_dynamic(tensor, 0)  # as the trainer does
        documents = documents_of(noisy, 3) if m.config.document_mask else None
        got, want = (f(*args, randomness(step), documents) for f in (compiled, m))
        torch.testing.assert_close(got, want)
        ours, theirs = (torch.autograd.grad(loss, list(m.parameters()), allow_unused=True) for loss in (got[0], want[0]))
        for a, b in zip(ours, theirs, strict=True):
            assert (a is None) == (b is None) or not (a if b is None else b).any()
            assert a is None or b is None or torch.allclose(a, b, rtol=1e-4, atol=1e-6)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


def test_bf16_autocast_keeps_the_stream_and_gives_bf16_rows():
    m, tokens = model(), ids()
    with torch.autocast("cpu", torch.bfloat16):
        low = m.features(tokens)
    assert low.dtype is torch.bfloat16
    torch.testing.assert_close(low.float(), m.features(tokens), rtol=0.1, atol=0.1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dim": 15}, "model.dim 15 does not divide into 2 heads of an even size; try model.heads"),
        ({"heads": 0}, "model.heads must be at least 1"),
        ({"dropout": 1.0}, "model.dropout must be in"),
        ({"mask_id": 11}, "mask_id 11 is outside the vocabulary of 11"),
    ],
)
def test_bad_sizes(change, message):
    with pytest.raises(UsageError, match=message):
        model(**change)


def test_shorter_sequences_are_taken_longer_ones_refused_and_the_time_is_needed_if_it_conditions():
    m, timed, zeros = model(), model(time_conditioning=True), lambda length: torch.zeros(2, length, dtype=torch.int64)
    assert m.features(zeros(5)).shape == (10, 16)
    with pytest.raises(ValueError, match="has 13 tokens, but this model takes at most 12"):
        m.features(zeros(13))
    with pytest.raises(ValueError, match="pass hidden_share"):
        timed.features(zeros(5))
    assert timed.features(zeros(5), torch.tensor([1.0, 0.0])).isfinite().all()  # with everything hidden too


def test_the_cost_of_a_step_is_what_the_papers_count():
    """854 MFLOP a token forward and backward with every row through the head, at small and GPT-2's vocabulary."""
    cost = step_cost(ModelConfig(), 50_258, 1, 1024)
    assert cost.flops / 1024 == pytest.approx(854e6, rel=0.01)
    half = step_cost(ModelConfig(), 50_258, 1, 512)
    assert cost.flops - half.flops == 6 * 512 * 768 * (9 * 768 + 50_258)  # out, MLP and head of the rows that are not hidden


@pytest.mark.parametrize("options", [*OPTIONS, {"recompute": True}, {"picked": True}])
def test_forward_mode_through_the_whole_network(options):
    """What consistency and flow distillation need: the tangent is the reverse mode's number, in parameters of every kind."""
    rows, plain = torch.tensor([17, 2, 5]) if "picked" in options else None, options.keys() & {"recompute", "picked"}
    m, tokens = model(**{} if plain else options).double(), ids()
    for block in m.blocks:
        block.recompute = "recompute" in options
    upstream = torch.randn(24 if rows is None else 3, 16, dtype=torch.float64)
    m.forward = lambda: (m.features(tokens, SHARE[:2], rows=rows) * upstream).sum()
    number = lambda parameters: torch.func.functional_call(m, parameters, ())  # noqa: E731
    leaves, parameters = list(m.parameters()), {k: p.detach() for k, p in m.named_parameters()}
    along = {k: torch.randn_like(p) for k, p in parameters.items()}
    reverse = torch.autograd.grad(m(), leaves, allow_unused=True, materialize_grads=True)
    want = sum((g * v).sum() for g, v in zip(reverse, along.values(), strict=True))
    torch.testing.assert_close(torch.func.jvp(number, (parameters,), (along,))[1], want)
    found = torch.func.grad(number)(parameters)
    torch.testing.assert_close(sum((g * along[k]).sum() for k, g in found.items()), want)


def test_gradients_of_each_sequence_and_second_derivatives(monkeypatch):
    """torch.func's per-sample gradients of the loss, and a Hessian's product, against one sequence and pass at a time."""
    monkeypatch.setenv("ATAT_FAST_ATTENTION", "sdpa_math")
    m, noisy, target = model().double(), ids(3), torch.randint(0, 10, (3, 4))
    rows, weights = torch.tensor([1, 4, 6, 9]), torch.rand(3, 4, dtype=torch.float64)
    leaves, parameters = list(m.parameters()), {k: p.detach() for k, p in m.named_parameters()}
    always = {"allow_unused": True, "materialize_grads": True}

    def loss(parameters, noisy, target, weights):
        return torch.func.functional_call(m, parameters, (noisy[None], rows, target, weights))[0]

    found = torch.func.vmap(torch.func.grad(loss), (None, 0, 0, 0))(parameters, noisy, target, weights)
    for i in range(3):
        plain = torch.autograd.grad(m(noisy[i : i + 1], rows, target[i], weights[i])[0], leaves, **always)
        torch.testing.assert_close([g[i] for g in found.values()], list(plain))
    along, one = {k: torch.randn_like(p) for k, p in parameters.items()}, (noisy[0], target[0], weights[0])
    _, want = torch.func.jvp(lambda p: torch.func.grad(loss)(p, *one), (parameters,), (along,))
    first = torch.autograd.grad(m(noisy[:1], rows, target[0], weights[0])[0], leaves, create_graph=True, **always)
    dot = sum((g * v).sum() for g, v in zip(first, along.values(), strict=True))
    second = torch.autograd.grad(dot, leaves, **always)
    torch.testing.assert_close(dict(zip(along, second, strict=True)), want)


WAYS = {
    "to_empty": lambda m: m.to_empty(device="cpu"), "overwritten": lambda m: m.cos.fill_(torch.nan),
    "assign": lambda m: m.to("meta"), "one by one": lambda m: m.to("meta"),
    "half": lambda m: m.half().bfloat16().double().float(),
    "within": lambda m: torch.nn.ModuleDict({"m": m.to("meta")}).to_empty(device="cpu"),
    "copied": lambda m: pickle.loads(pickle.dumps(copy.deepcopy(m.bfloat16()))).float(),
}  # fmt: skip


def lost(m, way, state):
    """A model whose tables were lost, and its weights put back."""
    made = WAYS[way](m)
    if way == "one by one":
        for name, value in state.items():
            path, _, last = name.rpartition(".")
            setattr(m.get_submodule(path), last, torch.nn.Parameter(value))
    elif way == "within":
        made.load_state_dict({f"m.{k}": v for k, v in state.items()})
    else:
        m = made if way == "copied" else m
        m.load_state_dict(state, assign=way == "assign")
    return m


@pytest.mark.parametrize("way", WAYS)
def test_tables_are_what_the_configuration_says_whatever_was_done(way):
    tokens, embedded, share = ids(), torch.randn(2, 12, 16), torch.tensor([0.1, 0.6])
    network = Network(ImportanceConfig(width=16, heads=2, layers=1), 16, 12)
    torch.nn.init.normal_(network.head.weight)
    for m, ask in ((model(), lambda m: m.features(tokens)), (network, lambda m: m(embedded, share))):
        want, state = ask(m), {k: v.clone() for k, v in m.state_dict().items()}
        assert torch.equal(ask(lost(m, way, state)), want)
    m = model()
    table, where = m.cos.clone(), m.bfloat16().cos.data_ptr()
    m.load_state_dict(m.state_dict())
    assert m.to("cpu").cos.data_ptr() == where  # a captured graph reads it there
    assert torch.equal(m.cos, table) and m.cos.dtype is torch.float32


@pytest.mark.parametrize("options", OPTIONS)
def test_shapes_on_the_meta_device_and_with_fake_tensors(options):
    for place in (torch.device("meta"), FakeTensorMode()):
        with place:
            m = DiT(11, 10, **(SIZE | options))
            tokens, rows, share = torch.zeros(2, 12, dtype=torch.int64), torch.zeros(5, dtype=torch.int64), torch.zeros(2)
            loss, nll = m(tokens, rows, rows, torch.ones(5), share)
            loss.backward()
            assert nll.shape == (5,) and m.head.weight.grad.shape == (11, 16)
            if isinstance(place, torch.device):
                assert m.logits(m.features(tokens, share, documents=documents_of(tokens, 0))).shape == (24, 11)


@pytest.mark.parametrize("options", OPTIONS)
def test_initial_values_one_at_a_time_are_the_bits_that_a_constructor_draws(options):
    """So a model can be sharded on the meta device; the importance network's are drawn after them."""
    settings = ImportanceConfig(source="learned", width=8, heads=2, layers=2)
    torch.manual_seed(3)
    made = DiT(11, 10, **SIZE | options), Network(settings, 16, 12)
    after = torch.rand(3)
    with torch.device("meta"):
        empty = DiT(11, 10, **SIZE | options), Network(settings, 16, 12)
    torch.manual_seed(3)
    for model, unmade in zip(made, empty, strict=True):
        drawn = list(unmade.initial_values())
        values = dict(drawn)
        assert len(drawn) == len(values) and values.keys() == dict(model.named_parameters()).keys()
        for name, p in model.named_parameters():
            assert torch.equal(values[name], p), name
        unmade.to_empty(device="cpu").load_state_dict(values, strict=False)
        assert all(torch.equal(p, q) for p, q in zip(unmade.parameters(), model.parameters(), strict=True))
    assert torch.equal(torch.rand(3), after)
