"""Bytes that are alive, and FLOPs, while code runs on the meta device, where tensors have shapes but no memory."""

import functools
import weakref
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import flop_registry

Points = tuple[tuple[int, int], ...]
"""(gradient elements held, most bytes of everything else but weights meanwhile): when activations and gradients meet."""
Phases = tuple[tuple[frozenset[str], int], ...]
"""(networks called by then, most bytes of everything but weights and gradients): from one network's call to the next one's."""


_ATEN = torch.ops.aten
_FORMULAS: dict[Any, Any] = {
    **flop_registry,
    _ATEN._scaled_dot_product_flash_attention_for_cpu: flop_registry[_ATEN._scaled_dot_product_flash_attention],
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        _ATEN._scaled_dot_product_flash_attention_backward
    ],
}
"""FLOPs by operation: torch's own, and the attention that `OnMeta` puts in the place of every kernel."""
_SHAPES: dict[Any, tuple[Any, int]] = {}  # and FLOPs
_VIEWS: set[Any] = set()  # operations whose result may share memory with an input


class LiveBytes(TorchDispatchMode):
    """Adds up the meta storages that are alive, `points` as a dict, and in `flops` the FLOPs of matrix products, convolutions and
    attention (a multiply-add is two; attention's backward computes its scores again, as flash kernels do).

    Networks repeat themselves and torch is slow to infer shapes: each operation and input is inferred once.
    """

    def __init__(self):
        super().__init__()
        self.points: dict[int, int] = {}
        self.flops = 0
        self.phases = [0]  # most bytes between the marks of `begin_phase`
        self.called = [frozenset[str]()]  # names of those marks up to each phase
        self._held: dict[int, weakref.ref] = {}
        self._own: set[int] = set()  # storages that count: neither weights nor gradients
        self._live = self._gradients = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = self._run(func, args, kwargs or {})
        self.count((out,) if isinstance(out, Tensor) else _tensors(out))
        return out

    def count(self, tensors: Iterable[Tensor]) -> None:
        """These are alive from now on, if they were not."""
        for tensor in tensors:
            if tensor.device.type == "meta":
                self._hold(tensor, counts=True)
        live = self._live
        if live > self.points.get(self._gradients, -1):
            self.points[self._gradients] = live
        if live > self.phases[-1]:
            self.phases[-1] = live

    def begin_phase(self, *names: str) -> None:
        """What is alive from now on is a phase of its own, of the call of a network of this name."""
        self.phases.append(self._live)
        self.called.append(self.called[-1] | set(names))

    def weigh(self, net: nn.Module) -> None:
        """Parameters and buffers of `net` are weights, and what backward leaves in them gradients: not counted here."""
        for tensor in (*net.parameters(), *net.buffers()):
            self._hold(tensor, counts=False)
        for parameter in net.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._claim)

    def _run(self, func, args, kwargs) -> Any:
        """func(*args, **kwargs), or an empty tensor as it would give."""
        if func in _VIEWS:
            return func(*args, **kwargs)
        key = (func, _describe(args), _describe(tuple(kwargs.items())) if kwargs else ())
        known = _SHAPES.get(key)
        if known is None:
            out = func(*args, **kwargs)
            formula = _FORMULAS.get(func._overloadpacket)
            flops = 0 if formula is None else formula(*args, **kwargs, out_val=out)
            self.flops += flops
            new = list(_tensors(out))
            given = {tensor.untyped_storage()._cdata for tensor in _tensors((args, tuple(kwargs.values())))}
            shares = any(tensor.untyped_storage()._cdata in given for tensor in new)
            if shares or func._schema.is_mutable or any(result.alias_info for result in func._schema.returns):
                _VIEWS.add(func)
            elif new and all(tensor.device.type == "meta" for tensor in new) and _plain(out):
                _SHAPES[key] = _describe(out), flops
            return out
        self.flops += known[1]
        return _like(known[0])

    def _hold(self, tensor: Tensor, counts: bool) -> None:
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self._held:
            return
        forget = functools.partial(self._forget, address, storage.nbytes())
        self._held[address] = weakref.ref(storage, forget)
        if counts:
            self._own.add(address)
            self._live += storage.nbytes()

    def _forget(self, address: int, size: int, _: weakref.ref) -> None:
        del self._held[address]
        if address in self._own:
            self._own.remove(address)
            self._live -= size

    def _claim(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        storage = parameter.grad.untyped_storage()
        if storage._cdata in self._own:
            self._own.remove(storage._cdata)
            self._live -= storage.nbytes()
            self._gradients += parameter.numel()
            self.points[self._gradients] = max(self.points.get(self._gradients, 0), self._live)


class OnMeta(TorchFunctionMode):
    """Three functions as a plan wants them: attention as every real device computes it, without a matrix of all pairs; noise
    that has no memory; and integers drawn from the generator `shared` at the quantile `quantile` of their range, 1 the largest."""

    def __init__(self, shared: torch.Generator | None = None, quantile: float = 1.0):
        super().__init__()
        self.shared, self.quantile, self.draws = shared, quantile, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is nn.functional.scaled_dot_product_attention:
            query, key, value = (*args, *(kwargs[name] for name in ("query", "key", "value")[len(args) :]))[:3]
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)[0]
        if func is torch.randn:
            return torch.empty(*args, dtype=kwargs.get("dtype"), device="meta")
        if func is torch.randint and self.shared is not None and kwargs.get("generator") is self.shared:
            self.draws += 1
            low, high, size = args if len(args) == 3 else (0, *args)
            return torch.full(size, min(high - 1, low + int(self.quantile * (high - low))))
        return func(*args, **kwargs)


def checkpointed(block: nn.Module, *inputs) -> Any:
    """What diffusers' checkpointing does, with our attention in the second forward too, which runs inside of backward."""
    context = (nullcontext(), OnMeta())
    return checkpoint(block.__call__, *inputs, use_reentrant=False, context_fn=lambda: context)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)


def _plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(_plain(item) for item in value)
    return value is None or isinstance(value, Tensor)


class _Shape(tuple):
    """Size, strides, type and device of a tensor."""

    __slots__ = ()


def _describe(value: Any) -> Any:
    """A hashable value: of tensors all that decides the shape of a result, of numbers their type too."""
    kind = type(value)
    if kind is int or kind is float:
        return (kind, value)
    if isinstance(value, Tensor):
        return _Shape((value.shape, value.stride(), value.dtype, value.device))
    if isinstance(value, tuple | list):
        return (kind, *map(_describe, value))
    return (kind, value) if isinstance(value, int | float) else value


def _like(shape: Any) -> Any:
    if isinstance(shape, _Shape):
        size, stride, dtype, device = shape
        return torch.empty_strided(size, stride, dtype=dtype, device=device)
    return shape if shape is None else shape[0](_like(item) for item in shape[1:])
