"""A GPU that is none: fake CUDA tensors have shapes, types and devices, so real sizes run on any machine in seconds.

    with fake_cuda() as gpu:
        net = build().to("cuda"); gpu.weigh(net)
        net(torch.empty(..., device="cuda"))
    gpu.peak_gib, gpu.waits, gpu.copies

Forward passes only: a backward pass over fake CUDA tensors wants a driver; fake_cuda("cpu") counts it on fake CPU tensors. What
mixes devices or types raises as on a GPU.
"""

import traceback
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from teachers.codecs import wan_vae

GIB = 2**30
ROOT = Path(__file__).resolve().parents[3]
aten = torch.ops.aten
COPIES = (aten._to_copy.default, aten.copy_.default)
WAITS = ("aten::nonzero", "aten::masked_select", "aten::_unique2")


class FakeGPU(TorchDispatchMode):
    """Bytes of the storages on `device` that are alive, now and at most; `phases`: at most between calls of `begin_phase`.

    By source line, `waits`: values that the host asked the device for (such a value is 1, for what needs one to go on), and streams
    that it waited for; `copies` between host and device that it waited for: all but queued ones (non_blocking) from and to pinned
    memory."""

    def __init__(self, device: str = "cuda") -> None:
        super().__init__()
        self.device = device
        self.waits: Counter[str] = Counter()
        self.copies: Counter[str] = Counter()
        self._pinned: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()
        self.live = self.peak = 0
        self.phases = [0]
        self._held: dict[int, tuple[weakref.ref, int]] = {}

    @property
    def peak_gib(self) -> float:
        return self.peak / GIB

    def weigh(self, *modules: nn.Module) -> None:
        """Count the parameters and buffers of these modules."""
        for module in modules:
            self._hold((*module.parameters(), *module.buffers()))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if torch.is_inference_mode_enabled() and func.namespace == "aten" and func._can_decompose():  # it comes whole
            with self:
                return func.decompose(*args, **kwargs)
        if func is aten.is_pinned.default:
            return args[0].untyped_storage() in self._pinned
        if func is aten._pin_memory.default or kwargs.pop("pin_memory", None):
            out = args[0].clone() if func is aten._pin_memory.default else func(*args, **kwargs)
            self._pinned.add(out.untyped_storage())
            return out
        if func is aten._local_scalar_dense.default:
            if args[0].device.type == "cuda":
                self.waits[_line()] += 1
                return 1
        elif func.name() in WAITS and args[0].device.type == "cuda":
            self.waits[_line()] += 1
        out = func(*args, **kwargs)
        if func in COPIES:
            self._note_copy(out, args[func is aten.copy_.default], kwargs.get("non_blocking") or args[2:] == (True,))
        self._hold(tree_leaves(out))
        return out

    def _note_copy(self, target: Tensor, source: Tensor, queued: bool) -> None:
        host = [x for x in (target, source) if x.device.type != "cuda"]
        if len(host) == 1 and not (queued and host[0].untyped_storage() in self._pinned):
            self.copies[_line()] += 1

    def _hold(self, tensors: Any) -> None:
        for tensor in tensors:
            if not isinstance(tensor, Tensor) or tensor.device.type != self.device:
                continue
            storage = (tensor._local_tensor if isinstance(tensor, DTensor) else tensor).untyped_storage()
            key = storage._cdata
            if key not in self._held:
                self._held[key] = (weakref.ref(storage, lambda _, key=key: self._forget(key)), 0)
                self._grow(key, storage.nbytes())

    def _grow(self, key: int, size: int) -> None:
        """The storage takes so many bytes now."""
        held, before = self._held[key]
        self._held[key] = held, size
        self.live += size - before
        self.peak, self.phases[-1] = max(self.peak, self.live), max(self.phases[-1], self.live)

    def resize(self, storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
        """In the place of UntypedStorage.resize_, by which FSDP2 takes and gives back the memory of gathered weights."""
        found = _resize(storage, size)
        if storage._cdata in self._held:
            self._grow(storage._cdata, size)
        return found

    def begin_phase(self, *_) -> None:
        """What is alive from now on is a phase of its own; a forward hook."""
        self.phases.append(self.live)

    def _forget(self, key: int) -> None:
        if (found := self._held.pop(key, None)) is not None:
            self.live -= found[1]


class FakeStream:
    """A stream that is waited for at once."""

    def __init__(self, gpu: FakeGPU):
        self.gpu = gpu

    def wait_stream(self, other: "FakeStream") -> None:
        """On the device."""

    def synchronize(self) -> None:
        """On the host."""
        self.gpu.waits[_line()] += 1


def _line() -> str:
    """The innermost line of the project on the stack."""
    for frame in reversed(traceback.extract_stack()):
        file = Path(frame.filename)
        if file.is_relative_to(ROOT) and not file.is_relative_to(ROOT / "tests"):
            return f"{file.relative_to(ROOT)}:{frame.lineno}"
    return "?"


def _attention(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
) -> Tensor:
    """The kernels that a GPU would take: flash for half precision, the memory-efficient one for fp32."""
    kind = query.device.type
    if attn_mask is not None:
        return _sdpa(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    if torch.is_autocast_enabled(kind):
        query, key, value = (x.to(torch.get_autocast_dtype(kind)) for x in (query, key, value))
    assert query.dtype == key.dtype == value.dtype, (query.dtype, key.dtype, value.dtype)
    if kind != "cuda":
        return aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, is_causal, scale=scale)[0]
    if query.dtype in (torch.bfloat16, torch.float16):
        return aten._scaled_dot_product_flash_attention(query, key, value, 0.0, is_causal, False, scale=scale)[0]
    return aten._scaled_dot_product_efficient_attention(query, key, value, None, False, 0.0, is_causal, scale=scale)[0]


_sdpa: Callable[..., Tensor] = F.scaled_dot_product_attention
_resize = torch.UntypedStorage.resize_


@contextmanager
def fake_cuda(device: str = "cuda") -> Iterator[FakeGPU]:
    """Inside, every tensor is fake, and may be on "cuda" where there is none; what is on `device` is counted."""
    gpu = FakeGPU(device)
    stream = FakeStream(gpu)
    with (
        mock.patch("weakref.getweakrefs", return_value=[]),  # or module.to would not replace fake parameters
        mock.patch("torch.cuda.Stream", return_value=stream),
        mock.patch("torch.cuda.current_stream", return_value=stream),
        mock.patch("torch.cuda.synchronize", side_effect=lambda *_: stream.synchronize()),
        mock.patch("torch.cuda.stream", nullcontext),
        mock.patch("torch.cuda.device", nullcontext),
        mock.patch.object(Tensor, "record_stream", return_value=None),
        mock.patch("torch.cuda.amp.common.amp_definitely_not_available", return_value=False),
        mock.patch("torch.cuda.is_bf16_supported", return_value=True),
        mock.patch.object(F, "scaled_dot_product_attention", _attention),
        mock.patch.object(torch.UntypedStorage, "resize_", lambda storage, size: gpu.resize(storage, size)),  # noqa: PLW0108
        mock.patch.object(
            FakeTensorMode, "__deepcopy__", lambda mode, memo: mode, create=True
        ),  # copies are fake here too
        FakeTensorMode(),
        gpu,
    ):
        yield gpu
    wan_vae._row.cache_clear()  # it holds fake tensors now
