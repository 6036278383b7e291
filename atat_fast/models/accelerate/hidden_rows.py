"""Models of transformers' kind: the vocabulary head on hidden rows alone.

While the class's own forward computes a training loss, two of its modules do something else:

    backbone     gives the hidden rows of its last hidden state (if the head is not a part of it)
    transform    the class's own steps between the two, if it has any, run on those rows
    head         get_output_embeddings(): gives their loss, by linear_cross_entropy, in place of logits

So nothing is known of a class but these parts, and everything else in it keeps working. A model is recognised by them, then run
once as it is and once changed, and both must give the same loss.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from atat_fast.models.accelerate.probe import allowed_error, evaluating, first_line, stand_ins
from atat_fast.ops.linear_cross_entropy import linear_cross_entropy

IGNORED = -100
"""The label of a token that is not predicted, as everywhere in torch."""

_STATE = "_atat_fast_hidden_rows"
_OWN = "_atat_fast_own_forward"
_OTHER_LOSSES = ("ignore_index", "shift_labels")  # arguments that make the class's loss another one
_LENGTH = 7
_PREDICTED = ((1, 2, 4), (0, 3, 5, 6))  # positions with labels in the check's two sequences


@dataclass(frozen=True)
class _Rows:
    """Which rows count: flat indices of states [R], their ids [R], weights [R] or None for ones; an id that is never said."""

    index: Tensor
    target: Tensor
    weights: Tensor | None = None
    forbidden: int | None = None


@dataclass
class _State:
    """How a model is changed; its three modules share one.

    shift: the state at i predicts the label at i + 1.   divides: the class divides by num_items_in_batch where that is given.
    inside: the head is called by the backbone.   bidirectional: early tokens see late ones.   functions: in place of forwards.
    rows: of the loss in progress.
    """

    shift: bool
    divides: bool
    inside: bool
    labels_at: int
    returns_dict: bool
    bidirectional: bool = True
    functions: tuple[Any, ...] = ()
    rows: _Rows | None = None


def looks_alike(network: nn.Module) -> bool:
    """Whether the model says what its head is."""
    return callable(getattr(network, "get_output_embeddings", None))


def is_accelerated(network: nn.Module) -> bool:
    """Whether `accelerate` changed this model."""
    return _STATE in network.__dict__


def accelerate(network: nn.Module, *, shift: bool | None, check: bool) -> None:
    """Change the model in place. Raises ValueError, and changes nothing, if it is not built as expected."""
    head, backbone = _parts(network)
    rule = _loss_rule(network)
    parameters = inspect.signature(network.forward).parameters
    state = _State(
        shift=rule[0] if shift is None else shift,
        divides=rule[1],
        inside=backbone is None,
        labels_at=list(parameters).index("labels"),
        returns_dict="return_dict" in parameters or _takes_any(parameters),
    )
    probe = _Probe(network, head, state) if check else None
    _replace(network, _forward_like(network.forward), state)
    if backbone is not None:
        _replace(backbone, _backbone_forward, state)
    if isinstance(head, nn.Linear):
        _replace(head, _head_forward, state)
    if probe is not None:
        try:
            probe.compare()
        except Exception:
            restore(network)
            raise


def restore(network: nn.Module) -> None:
    """Undo `accelerate`. Raises ValueError, and changes nothing, if something wrapped the forward since."""
    state = _state(network)
    changed = [module for module in network.modules() if module.__dict__.get(_STATE) is state]
    if not all(getattr(module.__dict__.get("forward"), "__func__", None) in state.functions for module in changed):
        raise ValueError(
            f"the forward of this {type(network).__name__} was wrapped after accelerate; undo that first, after a Trainer in "
            "bf16 by trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)"
        )
    for module in changed:
        del module.__dict__["forward"], module.__dict__[_STATE]
        own = module.__dict__.pop(_OWN)
        if own is not None:
            module.__dict__["forward"] = own


def weighted_loss(network: nn.Module, rows: Tensor, target: Tensor, weights: Tensor, *, forbidden: int, **inputs: Any) -> Tensor:
    """sum(weights * -log p(target)) in nats, an fp32 scalar. inputs: of the class's forward.

    rows [R]: flat indices of the tokens that are predicted; with a shift, none is a first position.
    """
    state = _state(network)
    given = _Rows(rows - int(state.shift), target, weights, forbidden)
    return cast(Tensor, _run(network, state, given, (), inputs).logits)


def vocabulary_of(network: nn.Module) -> int:
    """Number of ids that the head predicts."""
    return int(cast(Any, network).get_output_embeddings().weight.shape[0])


def is_shifted(network: nn.Module) -> bool:
    """Whether a state predicts the next position's token, so that a first token cannot be predicted."""
    return _state(network).shift


def is_bidirectional(network: nn.Module) -> bool:
    """Whether early tokens see late ones, as far as the check can tell."""
    return _state(network).bidirectional


def _state(network: nn.Module) -> _State:
    return cast(_State, network.__dict__[_STATE])


def _forward_like(own: Callable[..., Any]) -> Callable[..., Any]:
    """A function for `forward` with the arguments of `own`, a bound method: a Trainer reads them to choose its columns."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return _forward(self, args, kwargs)

    own_signature = inspect.signature(own)
    first = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    parameters = [first, *own_signature.parameters.values()]
    forward.__signature__ = own_signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    forward.__doc__ = own.__doc__
    return forward


def _forward(self: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The class's own forward; with labels, in training, the loss of hidden rows alone, and logits None."""
    state = _state(self)
    at = state.labels_at
    labels = args[at] if at < len(args) else kwargs.get("labels")
    if labels is None or not self.training or any(name in kwargs for name in _OTHER_LOSSES):
        return _own(self, *args, **kwargs)
    if at < len(args):
        args = (*args[:at], None, *args[at + 1 :])
    else:
        kwargs["labels"] = None
    as_tuple = _wants_tuple(self, kwargs)
    rows = hidden_rows(labels, state.shift)
    count = kwargs.get("num_items_in_batch") if state.divides else None
    output = _run(self, state, rows, args, kwargs)
    loss = output.logits / (len(rows.index) if count is None else count)
    rest = {name: value for name, value in output.items() if name not in ("loss", "logits")}
    output = type(output)(loss=loss, **rest)
    return output.to_tuple() if as_tuple else output


def hidden_rows(labels: Tensor, shift: bool) -> _Rows:
    """The rows of labels [B, L] that are not IGNORED. Their number is read back from the device."""
    if shift:
        labels = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
    labels = labels.flatten()
    index = (labels != IGNORED).nonzero()[:, 0]
    return _Rows(index, labels[index])


def _run(network: nn.Module, state: _State, rows: _Rows, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The class's own forward with the weighted sum of the rows' losses in place of logits."""
    if state.returns_dict:
        kwargs = {**kwargs, "return_dict": True}
    head = cast(Any, network).get_output_embeddings()
    state.rows = rows
    try:
        if isinstance(head, nn.Linear):
            output = _own(network, *args, **kwargs)
        else:
            output = _with_a_table(network, _TableAsHead(head, state), args, kwargs)
    finally:
        state.rows = None
    logits = getattr(output, "logits", None)
    if logits is None or logits.dim():
        raise ValueError(_changed(network, "they are not what the head gave"))
    return output


def _changed(network: nn.Module, how: str) -> str:
    return (
        f"{type(network).__name__} changes its logits after its head, or an adapter was put on the head after accelerate "
        f"({how}): the loss cannot be taken there; leave the head out of the adapter, or use the model as it is"
    )


def _backbone_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The backbone's own output, its first tensor [B, L, D] cut to the rows of the loss in progress: [1, R, D]."""
    output, rows = _own(self, *args, **kwargs), self.__dict__[_STATE].rows
    if rows is None:
        return output
    if isinstance(output, Tensor):
        return _pick(output, rows)[None]
    if isinstance(output, tuple):
        return (_pick(output[0], rows)[None], *output[1:])
    first, *rest = output.items()
    return type(output)(**{first[0]: _pick(first[1], rows)[None]}, **dict(rest))


def _head_forward(self: nn.Linear, x: Tensor) -> Tensor:
    """The head's own output, or the loss in progress."""
    state = self.__dict__[_STATE]
    return cast(Tensor, _own(self, x)) if state.rows is None else _loss(state, x, self.weight, self.bias)


@torch.compiler.disable
def _with_a_table(network: nn.Module, table: _TableAsHead, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The class's own forward inside of `table`. Never compiled: dynamo traces such a mode, and the loss comes out wrong."""
    with table:
        return _own(network, *args, **kwargs)


class _TableAsHead(TorchFunctionMode):
    """Computes the loss in progress where the class calls F.linear with its table of embeddings, as a tied LLaDA does."""

    def __init__(self, table: nn.Embedding, state: _State) -> None:
        super().__init__()
        self.table, self.state = table, state

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Every torch function that is called inside."""
        if func is F.linear and args[1] is self.table.weight:
            return _loss(self.state, args[0], args[1], None)
        return func(*args, **(kwargs or {}))


def _loss(state: _State, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The loss in progress, from what the head reads: x [B, L, D] if the head is inside of the backbone, else [1, R, D]."""
    rows = state.rows
    assert rows is not None
    x = _pick(x, rows) if state.inside else x.flatten(0, -2)
    return linear_cross_entropy(  # type: ignore[no-any-return]
        x, weight, rows.target.to(x.device), bias=bias, token_weight=rows.weights, forbidden=rows.forbidden
    )


def _pick(states: Tensor, rows: _Rows) -> Tensor:
    return states.flatten(0, -2).index_select(0, rows.index.to(states.device))


def _replace(module: nn.Module, function: Callable[..., Any], state: _State) -> None:
    module.__dict__[_OWN] = module.__dict__.get("forward")
    module.__dict__[_STATE] = state
    module.__dict__["forward"] = MethodType(function, module)
    state.functions += (function,)


def _own(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The forward that the module had before."""
    own = module.__dict__[_OWN]
    return type(module).forward(module, *args, **kwargs) if own is None else own(*args, **kwargs)


def _wants_tuple(network: Any, kwargs: dict[str, Any]) -> bool:
    asked = kwargs.get("return_dict")
    return not (getattr(getattr(network, "config", None), "return_dict", True) if asked is None else asked)


def _takes_any(parameters: Any) -> bool:
    return any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())


def _parts(network: Any) -> tuple[nn.Linear | nn.Embedding, nn.Module | None]:
    """The head, and the backbone, or None if the head is a part of it. Raises ValueError with what is missing."""
    name = type(network).__name__
    if "labels" not in inspect.signature(network.forward).parameters:
        raise ValueError(f"the forward of {name} takes no labels, so it has no loss to make faster")
    head = network.get_output_embeddings()
    if head is None:
        raise ValueError(f"get_output_embeddings() of {name} gives None; this needs a model with a vocabulary head")
    if not isinstance(head, nn.Linear | nn.Embedding):
        raise ValueError(
            f"get_output_embeddings() of {name} gives a {type(head).__name__}, not an nn.Linear: the head has to be a linear "
            "layer (its weight may be tied) without an adapter"
        )
    if not head.weight.is_floating_point():
        raise ValueError(f"the head of {name} is quantized ({head.weight.dtype}); leave it out of quantization")
    backbone = getattr(network, "base_model", None)
    if not isinstance(backbone, nn.Module) or backbone is network or _inside(head, backbone):
        return head, None
    return head, backbone


def _inside(head: nn.Module, backbone: nn.Module) -> bool:
    """Whether the backbone applies the head; a table of embeddings is in both, and so is used by the backbone."""
    return any(module is head for module in backbone.modules())


def _loss_rule(network: Any) -> tuple[bool, bool]:
    """Whether the class's loss shifts labels, and whether it divides by num_items_in_batch: what transformers' own losses do."""
    code = getattr(inspect.unwrap(type(network).forward), "__code__", None)
    if code is None or "loss_function" not in code.co_names:
        return False, False
    return getattr(getattr(network, "loss_function", None), "__name__", "") == "ForCausalLMLoss", True


class _Probe:
    """A model's own loss on two short sequences, taken before it is changed."""

    def __init__(self, network: Any, head: nn.Linear | nn.Embedding, state: _State) -> None:
        self.network, self.state = network, state
        if head.weight.is_meta:
            raise ValueError("a model on the meta device has no loss to compare with that of the ops; pass check=False")
        generator, device = torch.Generator().manual_seed(0), head.weight.device
        ids = torch.randint(head.weight.shape[0], (2, _LENGTH), generator=generator).to(device)
        labels = torch.full_like(ids, IGNORED)
        for b, positions in enumerate(_PREDICTED):
            labels[b, list(positions)] = ids[b, list(positions)]
        parameters = inspect.signature(network.forward).parameters
        self.inputs: dict[str, Any] = {"input_ids": ids, "labels": labels}
        if "attention_mask" in parameters:
            self.inputs["attention_mask"] = torch.ones_like(ids)
        if state.returns_dict:
            self.inputs["return_dict"] = True
        self.stand_ins = stand_ins(network, generator)
        other = ids.clone()
        other[:, -1] = (other[:, -1] + 1) % head.weight.shape[0]
        try:
            said = self._call(self.inputs).loss
            logits, turned = (self._call({**self.inputs, "input_ids": x, "labels": None}).logits for x in (ids, other))
        except Exception as error:
            raise ValueError(
                f"the model cannot be run on {device} to compare its loss with that of the ops ({first_line(error)}); move it to "
                "where it runs first, or pass check=False"
            ) from error
        state.bidirectional = not torch.equal(logits[:, 0], turned[:, 0])
        self.dtype = logits.dtype
        self.want = self._plain(logits, state.shift)
        if said is not None and not self._near(said, self.want):
            shifted = self._near(said, self._plain(logits, not state.shift))
            hint = f"; pass shift={not state.shift}" if shifted else ""
            raise ValueError(
                f"the loss of {type(network).__name__} is {float(said):.6g} where the mean of -log p over its labels is "
                f"{float(self.want):.6g}{hint}; it keeps its own forward"
            )

    def compare(self) -> None:
        """Raise ValueError if the present forward gives another loss."""
        try:
            got = self._call(self.inputs, training=True).loss
        except (IndexError, RuntimeError, TypeError) as error:  # what follows the head expects logits
            raise ValueError(_changed(self.network, first_line(error))) from error
        if not self._near(got, self.want):
            raise ValueError(
                f"{type(self.network).__name__} has the parts of a masked language model but computes something else: its loss "
                f"is {float(self.want):.6g} and that of the ops {float(got):.6g}; it keeps its own forward"
            )

    def _plain(self, logits: Tensor, shift: bool) -> Tensor:
        rows = hidden_rows(self.inputs["labels"], shift)
        return F.cross_entropy(logits.flatten(0, 1)[rows.index].double(), rows.target)

    def _near(self, got: Tensor, want: Tensor) -> bool:
        return abs(float(got) - float(want)) <= allowed_error(self.dtype) * max(1.0, abs(float(want)))

    @torch.no_grad()
    def _call(self, inputs: dict[str, Any], training: bool = False) -> Any:
        with evaluating(self.network):
            self.network.training = training  # its modules are not: they drop nothing
            return torch.func.functional_call(self.network, self.stand_ins, (), inputs)
