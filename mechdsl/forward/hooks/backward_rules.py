"""Backward passes with changed rules: values of the forward pass stay, their derivatives change.

`BackwardRules` of an estimator are applied to the functions of torch that a model calls, and
afterwards the graph of autograd is searched for functions that no rule was applied to.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import (
    TorchFunctionMode,
    _get_current_function_mode,  # pyright: ignore[reportPrivateUsage]
    _pop_mode_temporarily,  # pyright: ignore[reportPrivateUsage]
)
from torch.utils import checkpoint
from transformers.cache_utils import Cache

from mechdsl.forward.hooks.model import LoadedModel
from mechdsl.forward.hooks.module_exchange import replace_forward
from mechdsl.program.estimators import BackwardRules

_AUTOGRAD = ("inplace operation", "in-place operation", "Inference tensor", "derivative for")


class _PlainFunction:
    """Replacement of the function by which PyTorch checkpoints code with reentrant autograd."""

    @staticmethod
    def apply(function: Callable[..., Any], preserves_random_state: bool, *args: Any) -> Any:
        return function(*args)


class _BlockFunction:
    """A block whose checkpoint is ours."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


_checkpointed = checkpoint._checkpoint_without_reentrant_generator  # pyright: ignore[reportPrivateUsage]


def _checkpoint_blocks(function: object, *args: Any, **kwargs: Any) -> Generator[None]:
    if isinstance(function, _BlockFunction):
        yield from _checkpointed(function, *args, **kwargs)
    else:
        yield


@contextmanager
def disable_checkpoints() -> Generator[None]:
    """Store all activations for a backward pass in the context, also those in checkpoints
    (`torch.utils.checkpoint`).

    A checkpoint would compute them again during the backward pass, without the pass's hooks. Only
    those of `recompute_blocks` stay.
    """
    names = {
        "CheckpointFunction": _PlainFunction,
        "_checkpoint_without_reentrant_generator": _checkpoint_blocks,
    }
    before = {name: getattr(checkpoint, name) for name in names}
    try:
        for name, replacement in names.items():
            setattr(checkpoint, name, replacement)
        yield
    finally:
        for name, value in before.items():
            setattr(checkpoint, name, value)


class _Reopened:
    """A context that can be opened several times, once for each backward pass."""

    def __init__(self, make: Callable[[], AbstractContextManager[object]]) -> None:
        self.make, self.stack = make, ExitStack()

    def __enter__(self) -> None:
        self.stack.enter_context(self.make())

    def __exit__(self, *problem: Any) -> bool:
        return bool(self.stack.__exit__(*problem))


@contextmanager
def recompute_blocks(
    blocks: Iterable[nn.Module], again: Callable[[], AbstractContextManager[object]]
) -> Generator[None]:
    """Store only the inputs of blocks for a backward pass, which computes their activations again
    (gradient checkpointing, Chen et al. 2016, arXiv:1604.06174).

    Args:
        blocks: Modules whose hooks, apart from those on the module itself, depend on nothing
            outside the block. A block that gets a cache of keys runs as usual.
        again: The context in which a block runs again, with hooks of the pass.
    """

    def run_checkpointed(function: _BlockFunction, *args: Any, **kwargs: Any) -> Any:
        if any(isinstance(each, Cache) for each in (*args, *kwargs.values())):
            return function.function(*args, **kwargs)  # a second run would add keys again
        return checkpoint.checkpoint(
            function,
            *args,
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=lambda: (nullcontext(), _Reopened(again)),
            **kwargs,
        )

    with ExitStack() as stack:
        for block in blocks:
            function = partial(run_checkpointed, _BlockFunction(block.forward))
            stack.enter_context(replace_forward(block, function))
        yield


class AutogradFailed(Exception):
    """Autograd can't differentiate the model's code; the text is autograd's message."""


@contextmanager
def catch_autograd_errors() -> Generator[None]:
    """Convert autograd's errors about the model's code to `AutogradFailed`."""
    try:
        yield
    except RuntimeError as error:
        said = " ".join(str(error).split())
        if not any(words in said for words in _AUTOGRAD):
            raise
        raise AutogradFailed(said) from error


def compute_gradients(total: Tensor, leaves: Sequence[Tensor], *, keep: bool) -> Sequence[Tensor]:
    """Return the gradient per leaf, zeros without a dependency; keep: further calls follow.

    Raises AutogradFailed.
    """
    if not total.requires_grad:
        if not torch.is_grad_enabled():
            raise AutogradFailed("gradients are switched off, for example by a Python function")
        return [torch.zeros_like(leaf) for leaf in leaves]
    with catch_autograd_errors():
        return torch.autograd.grad(
            total, leaves, retain_graph=keep, allow_unused=True, materialize_grads=True
        )


_ACTIVATION_NAME = re.compile(r"[gsr]elu|silu|swish|mish|tanh|activation", re.I)
_SMALL = 1e-6
"""Inputs of an activation function that are nearer to 0 have the ratio of this input."""

_NORM_NODES = re.compile(r"NativeLayerNorm|RmsNorm|RMSNorm|Rsqrt|^Pow|^Std|^Var|LinalgVectorNorm")
_ACTIVATION_NODES = re.compile(r"Gelu|Silu|Relu|Elu|Sigmoid|Mish|Hardswish|Softplus")
_PRODUCT_NODES = re.compile(r"^Glu|^Addcmul")
"""Nodes of autograd that are absent if each norm, activation function and product has its rule."""


class RuleNotApplied(AutogradFailed):
    """A rule of the backward pass doesn't know a function of the model; the text names it."""


def keep_value(value: Tensor, surrogate: Tensor) -> Tensor:
    """Return `value`, differentiated like `surrogate`; both have one shape."""
    return value.detach() + (surrogate - surrogate.detach())


def scale_gradient(value: Tensor, factor: float) -> Tensor:
    """Return `value`; gradients that pass it are multiplied by the factor."""
    return keep_value(value, value * factor)


class _RuledFunctions(TorchFunctionMode):
    """Functions of torch with changed derivatives, while the context is open."""

    def __init__(self, rules: BackwardRules) -> None:
        super().__init__()
        self.rules = rules
        self.products = 0
        """Number of products of two tensors that both depend on the written values."""
        self.in_attention = False
        self._by_function: dict[Any, Callable[..., Any]] = {}
        if rules.fixed_norms:
            self._by_function |= {
                functional.layer_norm: _layer_norm,
                torch.layer_norm: _layer_norm,
                functional.rms_norm: _rms_norm,
                torch.rms_norm: _rms_norm,
                torch.rsqrt: _detached,
                Tensor.rsqrt: _detached,
            }
        if rules.halved_products:
            self._by_function |= {Tensor.mul: self._product, torch.mul: self._product}
        softmax: Callable[..., Any] | None = None
        if rules.softmax_temperature is not None:
            softmax = partial(_softmax, temperature=rules.softmax_temperature)
        elif rules.constant_patterns:
            softmax = _detached
        if softmax is not None:
            for function in (Tensor.softmax, torch.softmax, functional.softmax):
                self._by_function[function] = partial(self._of_attention, softmax)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        rule = self._by_function.get(func)
        if rule is None:
            return func(*args, **(kwargs or {}))
        return rule(func, *args, **(kwargs or {}))

    def _product(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Half rule: each factor passes on half of its gradient."""
        product = func(*args, **kwargs)
        factors = [each for each in args if isinstance(each, Tensor) and each.requires_grad]
        if len(factors) < 2:
            return product
        self.products += 1
        return product if self.in_attention else scale_gradient(product, 0.5)

    def _of_attention(
        self, rule: Callable[..., Any], func: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        return (rule if self.in_attention else _unchanged)(func, *args, **kwargs)


class _DecomposedFunctions(TorchFunctionMode):
    """Functions of torch by the rules of contextual decomposition, while the context is open.

    The first group of lanes has whole activations x, and each further group irrelevant parts γ.
    Functions without a rule here act on γ as they act on x.
    """

    def __init__(self, parts: int) -> None:
        super().__init__()
        self._groups = 1 + parts
        self._by_function: dict[Any, Callable[..., Tensor]] = {
            functional.linear: self._linear,
            torch.addmm: self._addmm,
            **dict.fromkeys((functional.layer_norm, torch.layer_norm), self._layer_norm),
            **dict.fromkeys((functional.rms_norm, torch.rms_norm), self._rms_norm),
            **dict.fromkeys((torch.rsqrt, Tensor.rsqrt), self._of_whole),
            **dict.fromkeys((torch.pow, Tensor.pow, Tensor.__pow__), self._power),
        }

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func in _UNDECOMPOSED:
            raise RuleNotApplied(f"no rule applies to its function `{func.__name__}`")
        rule = self._by_function.get(func)
        if rule is None:
            return func(*args, **(kwargs or {}))
        return rule(func, *args, **(kwargs or {}))

    def copy_whole(self, value: Tensor) -> Tensor:
        """Give irrelevant parts the values of whole activations."""
        whole, *_ = value.chunk(self._groups)
        return torch.cat([whole] * self._groups)

    def copy_routing(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Give irrelevant parts the experts and the router weights of whole activations."""
        tokens, *routing = (*args, *kwargs.values())
        return (tokens, *map(self.copy_whole, routing)), {}

    def _of_whole(self, func: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        return self.copy_whole(func(*args, **kwargs))

    def _power(
        self, func: Callable[..., Tensor], value: Any, exponent: Any, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Take a power; 1 / the size of a vector is that of the whole (Gemma 4's norms)."""
        rule = self._of_whole if isinstance(exponent, float) and exponent < 0 else _unchanged
        return rule(func, value, exponent, *args, **kwargs)

    def _share_bias(self, mapped: Tensor, bias: Tensor) -> Tensor:
        """Add a bias: γ gets a share in proportion to |Wγ| and |Wβ|, and all where both are 0."""
        whole, *parts = mapped.chunk(self._groups)
        biases = [whole + bias]
        for irrelevant in parts:
            relevant_size, irrelevant_size = (whole - irrelevant).abs(), irrelevant.abs()
            sizes = relevant_size + irrelevant_size
            biases.append(irrelevant + torch.where(sizes > 0, irrelevant_size / sizes, 1.0) * bias)
        return torch.cat(biases)

    def _linear(
        self,
        func: Callable[..., Tensor],
        value: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
    ) -> Tensor:
        mapped = func(value, weight)
        return mapped if bias is None else self._share_bias(mapped, bias)

    def _addmm(
        self, func: Callable[..., Tensor], bias: Tensor, value: Tensor, weight: Tensor
    ) -> Tensor:
        return self._share_bias(value @ weight, bias)

    def _layer_norm(
        self,
        func: Callable[..., Tensor],
        value: Tensor,
        shape: Any,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
        *given: Any,
    ) -> Tensor:
        """Divide all parts, each less its mean, by the standard deviation of the whole vector."""
        centered = _center(value, shape)
        scaled = _weigh(centered / _size(self.copy_whole(centered), shape, eps), weight)
        return (scaled if bias is None else self._share_bias(scaled, bias)).to(value.dtype)

    def _rms_norm(
        self,
        func: Callable[..., Tensor],
        value: Tensor,
        shape: Any,
        weight: Tensor | None = None,
        eps: float | None = None,
    ) -> Tensor:
        """Divide all parts by the root of the mean square of the whole vector."""
        wide, least = _widen(value), torch.finfo(value.dtype).eps if eps is None else eps
        return _weigh(wide / _size(self.copy_whole(wide), shape, least), weight).to(value.dtype)


@contextmanager
def suspend_decomposition() -> Generator[None]:
    """Let functions of torch act on all lanes alike while hooks compute written values."""
    if not isinstance(_get_current_function_mode(), _DecomposedFunctions):
        yield
        return
    with _pop_mode_temporarily():
        yield


_UNDECOMPOSED: frozenset[Callable[..., Any]] = frozenset(
    {
        *(torch.sqrt, Tensor.sqrt, torch.std, Tensor.std, torch.var, Tensor.var, Tensor.norm),
        *(torch.linalg.vector_norm, functional.normalize, functional.group_norm),
        *(functional.bilinear, torch.baddbmm, Tensor.addmm, Tensor.baddbmm),
    }
)
"""Functions of norms and biases that have no rule."""


@contextmanager
def _fix_experts(model: LoadedModel, functions: _DecomposedFunctions) -> Generator[None]:
    """Fix the selection of experts, before hooks that read or write router weights.

    Raises RuleNotApplied.
    """
    stacks = [model.anatomy, *(stack.anatomy for stack in model.others.values())]
    handles: list[Any] = []
    try:
        for block in (block for anatomy in stacks for block in anatomy.blocks):
            if "router" not in block.taps:
                continue
            experts = model.module.get_submodule(block.taps["router"].path)
            if any("bias" in name for name, _ in experts.named_parameters()):
                raise RuleNotApplied("no rule applies to the biases of its experts")
            given: Any = {"with_kwargs": True, "prepend": True}
            handles.append(experts.register_forward_pre_hook(functions.copy_routing, **given))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _widen(value: Tensor) -> Tensor:
    """Convert to at least 32 bits, as norms do."""
    return value.to(torch.promote_types(value.dtype, torch.float32))


def _center(value: Tensor, shape: Any) -> Tensor:
    """Subtract the mean over the last axes, which have a shape."""
    wide = _widen(value)
    return wide - wide.mean(tuple(range(-len(shape), 0)), keepdim=True)


def _size(value: Tensor, shape: Any, eps: float) -> Tensor:
    """Return the root of the mean square over the last axes, which have a shape."""
    return (value.square().mean(tuple(range(-len(shape), 0)), keepdim=True) + eps).sqrt()


def _weigh(value: Tensor, weight: Tensor | None) -> Tensor:
    return value if weight is None else value * weight


def _unchanged(func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return func(*args, **kwargs)


def _detached(func: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
    """Return a value without a derivative: of a norm 1 / the size of its input."""
    return func(*args, **kwargs).detach()


def _layer_norm(
    func: Callable[..., Tensor],
    value: Tensor,
    shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *given: Any,
) -> Tensor:
    """LN rule: the standard deviation is a constant."""
    centered = _center(value, shape)
    surrogate = _weigh(centered / _size(centered, shape, eps).detach(), weight)
    return keep_value(func(value, shape, weight, bias, eps, *given), surrogate.to(value.dtype))


def _rms_norm(
    func: Callable[..., Tensor],
    value: Tensor,
    shape: Any,
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    """LN rule: the root of the mean square is a constant."""
    wide, least = _widen(value), torch.finfo(value.dtype).eps if eps is None else eps
    surrogate = _weigh(wide / _size(wide, shape, least).detach(), weight)
    return keep_value(func(value, shape, weight, eps), surrogate.to(value.dtype))


def _softmax(
    func: Callable[..., Tensor], value: Tensor, *args: Any, temperature: float, **kwargs: Any
) -> Tensor:
    """Softmax with the derivative of a softmax at a temperature, without the factor 1 / T."""
    pattern = func(value, *args, **kwargs)
    dim = kwargs.get("dim", args[0] if args else -1)
    scores = value.to(pattern.dtype)
    weights = (scores.detach() / temperature).softmax(dim).nan_to_num(0.0)
    scores = torch.where(weights > 0, scores, torch.zeros_like(scores))
    surrogate = weights * scores - weights * (weights * scores).sum(dim, keepdim=True)
    return keep_value(pattern, surrogate)


def _activation_rule(module: nn.Module, *, identity: bool) -> Callable[..., Tensor]:
    """Build an elementwise function f(x) that is one factor times x in the graph of autograd.

    The factor is the constant f(x) / x with the identity rule, and else the derivative of f.
    """
    own = module.forward

    def forward(value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        with torch._C.DisableTorchFunction():  # pyright: ignore[reportPrivateUsage]
            given = value.detach().requires_grad_()
            with torch.enable_grad():
                output = own(given, *args, **kwargs)
            if identity:
                small = given.abs() < _SMALL
                safe = torch.where(small, torch.full_like(given, _SMALL), given).detach()
                factor = own(safe, *args, **kwargs) / safe
            else:
                (factor,) = torch.autograd.grad(output.sum(), given)
        return keep_value(output, value * factor)

    return forward


def is_activation(module: nn.Module) -> bool:
    """Return whether a module is an elementwise activation function, judged by its class."""
    plain = not any(True for _ in module.parameters()) and not any(True for _ in module.children())
    return plain and _ACTIVATION_NAME.search(type(module).__name__) is not None


class RuledPass:
    """A forward pass whose backward pass has changed rules."""

    def __init__(self, model: LoadedModel, rules: BackwardRules) -> None:
        self.model = model
        self.rules = rules
        self._functions = _RuledFunctions(rules)
        self._decomposed = _DecomposedFunctions(rules.parts) if rules.decomposed else None

    @contextmanager
    def opened(self) -> Generator[None]:
        """Apply the rules to passes of the model."""
        if self._decomposed is not None:
            with _fix_experts(self.model, self._decomposed), self._decomposed:
                yield
            return
        with ExitStack() as stack:
            for part in self.model.module.modules():
                if is_activation(part):
                    rule = _activation_rule(part, identity=self.rules.identity_activations)
                    stack.enter_context(replace_forward(part, rule))
            stack.enter_context(self._functions)
            yield

    @contextmanager
    def attention(
        self, query: Tensor, key: Tensor, value: Tensor
    ) -> Generator[tuple[Tensor, Tensor, Tensor]]:
        """Mark a call of attention, whose products and softmax have their own rules.

        Yields its arguments, with the factors of their gradients.
        """
        if self._decomposed is not None:
            query, key = map(self._decomposed.copy_whole, (query, key))
            yield query, key, value
            return
        self._functions.in_attention = True
        factors = self.rules.attention_factors
        try:
            if factors is not None:
                first, second, third = factors
                query, key = scale_gradient(query, first), scale_gradient(key, second)
                value = scale_gradient(value, third)
            yield query, key, value
        finally:
            self._functions.in_attention = False

    def check(self, logits: Tensor) -> None:
        """Check that the rules were applied to each function that logits depend on.

        Raises RuleNotApplied.
        """
        patterns = [_NORM_NODES] if self.rules.fixed_norms else []
        patterns += [_ACTIVATION_NODES] if self.rules.identity_activations else []
        patterns += [_PRODUCT_NODES] if self.rules.halved_products else []
        products = 0
        for node in _iter_nodes(logits):
            name = node.name()
            if any(pattern.search(name) for pattern in patterns):
                function = name.removesuffix("0").removesuffix("Backward")
                raise RuleNotApplied(f"no rule applies to its function `{function}`")
            if name == "MulBackward0" and all(each is not None for each, _ in node.next_functions):
                products += 1
        if self.rules.halved_products and products > self._functions.products:
            raise RuleNotApplied("it multiplies activations with an operation that has no rule")


def _iter_nodes(value: Tensor) -> Generator[Any]:
    """Yield the nodes of autograd that a tensor depends on."""
    due, seen = [value.grad_fn], {value.grad_fn}
    while due:
        node = due.pop()
        if node is None:
            continue
        yield node
        for further, _ in node.next_functions:
            if further not in seen:
                seen.add(further)
                due.append(further)
