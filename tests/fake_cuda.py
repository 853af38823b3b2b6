"""A GPU that is not there: meta tensors that say they are on cuda:0. torch needs no CUDA for it.

    with FakeCuda(vocabulary) as gpu:
        ...                      # code for "cuda" runs; nothing is computed, CPU tensors are real
    gpu.peak, gpu.waits, gpu.attention, gpu.kernels, gpu.flops, gpu.rows

torch's FakeTensorMode needs a CUDA build for a backward. What is fetched from the device is a
constant: 0.5 or 1, or the next of `truths`.
"""

import collections
import functools
import itertools
import sys
import weakref
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.initialization import no_init_weights

ROOT = Path(__file__).resolve().parents[1]
CUDA, META = torch.device("cuda:0"), torch.device("meta")
aten, Plain = torch.ops.aten, torch._C.TensorBase
LLAMA_2_7B = {
    **{"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008},
    **{"num_hidden_layers": 32, "num_attention_heads": 32, "max_position_embeddings": 4096},
}
LLAMA_3_8B = {
    **{**LLAMA_2_7B, "vocab_size": 128256, "intermediate_size": 14336},
    **{"num_key_value_heads": 8, "max_position_embeddings": 8192},
}
# Ops that launch no kernel.
VIEWS = set(
    "view _unsafe_view reshape t transpose permute expand unsqueeze squeeze slice select split "
    "split_with_sizes detach alias as_strided unbind lift_fresh empty empty_like empty_strided "
    "new_empty new_empty_strided diagonal narrow _reshape_alias view_as unfold".split()
)
ASK_THE_DEVICE = {"nonzero", "masked_select", "_unique2", "unique_consecutive", "equal"}


def llama(**changes) -> LlamaForCausalLM:
    """LLaMA-2-7B, or another of its family, in bf16 on the pretended GPU, without values."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"), no_init_weights():
            model = LlamaForCausalLM(LlamaConfig(**{**LLAMA_2_7B, **changes}))
    finally:
        torch.set_default_dtype(before)
    return model.eval()


def on_gpu(tensor) -> bool:
    return Plain.is_meta.__get__(tensor)


def is_cuda(value) -> bool:
    """Whether `value` names the GPU."""
    return isinstance(value, str | torch.device) and torch.device(value).type == "cuda"


def place() -> str:
    """The innermost function of the project that is at work, as "file.function"."""
    frame = sys._getframe(1)
    while frame:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(ROOT) and path != Path(__file__):
            # From Python 3.12 on a comprehension is part of its function.
            return f"{path.stem}.{frame.f_code.co_qualname.partition('.<locals>')[0]}"
        frame = frame.f_back
    return "?"


class _Flash(torch.autograd.Function):
    """What the flash kernels keep and take; each key head is read once for its query heads."""

    @staticmethod
    def forward(ctx, gpu, q, k, v):
        out, sums = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, sums)
        ctx.gpu = gpu
        gpu.count("flash", 4 * q.numel() * k.shape[2] // 2)
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, *_ = ctx.saved_tensors
        ctx.gpu.count("flash_backward", 10 * q.numel() * k.shape[2] // 2, kernels=3)
        # dq is summed up in fp32; dk and dv come a query head each.
        wide = [torch.empty_like(q, dtype=torch.float32), torch.empty_like(q), torch.empty_like(q)]
        grads = None, torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        del wide
        return grads


class _Norm(torch.autograd.Function):
    """The fused norm of a frozen weight: one kernel each way."""

    @staticmethod
    def forward(ctx, gpu, x, weight):
        ctx.save_for_backward(x, x.new_empty(x.shape[:-1], dtype=torch.float32))
        ctx.gpu = gpu
        gpu.count("rms_norm")
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, grad):
        ctx.gpu.count("rms_norm_backward")
        return None, torch.empty_like(grad), None


class FakeCuda(TorchDispatchMode):
    """
    Attributes:
        peak: most bytes alive at once; `now` those alive.
        waits: place -> how often the host waited for the device there.
        attention: (kernel, masked) -> calls.
        kernels: op -> launches, about.
        flops: of matrix products and attention.
        rows: dtype -> most rows of a tensor over the whole vocabulary.
        capacity: bytes above which memory runs out; None: never.
        truths: what questions to the device are answered with.
    """

    def __init__(self, vocabulary: int, capacity: int | None = None):
        super().__init__()
        self.vocabulary, self.capacity = vocabulary, capacity
        self.truths = itertools.repeat(True)
        self.now, self._alive, self._refs, self._inside = 0, {}, {}, False
        self._pinned, self._undo = weakref.WeakSet(), []
        self.reset()

    def reset(self) -> None:
        """Counts anew."""
        self.peak, self.flops = self.now, 0
        self.waits, self.attention = collections.Counter(), collections.Counter()
        self.kernels, self.rows = collections.Counter(), collections.Counter()

    def count(self, kernel: str, flops: int = 0, kernels: int = 1) -> None:
        self.kernels[kernel] += kernels
        self.flops += flops

    def wait(self) -> None:
        self.waits[place()] += 1

    def _fetched(self, dtype):
        return next(self.truths) if dtype == torch.bool else 0.5 if dtype.is_floating_point else 1

    # What Python sees of the GPU and its tensors.

    def __enter__(self):
        self._lifted = torch._C._only_lift_cpu_tensors()
        # torch.tensor(..., device="cuda") is made on the CPU and moved where the mode sees it.
        torch._C._set_only_lift_cpu_tensors(True)
        free = 80 * 2**30
        for name, value in {
            **{"_lazy_init": None, "is_available": True, "device_count": 1, "empty_cache": None},
            **{"is_bf16_supported": True, "current_device": 0, "set_device": None},
            **{"get_device_name": "a GPU", "mem_get_info": (free, free)},
            **{"get_device_capability": (9, 0), "synchronize": None},
        }.items():
            self._patch(torch.cuda, name, lambda *_, value=value, **__: value)
        # A build for CUDA asks the driver, which is not there: as one for CPUs, it knows of none.
        self._patch(torch.accelerator, "current_accelerator", lambda *_, **__: None)
        to = torch.Tensor.to

        def moved(tensor, *args, **kwargs):
            if on_gpu(tensor) and not self._inside:
                args = [META if is_cuda(arg) else arg for arg in args]
                kwargs = {k: META if is_cuda(v) else v for k, v in kwargs.items()}
            return to(tensor, *args, **kwargs)

        def tolist(tensor):
            if not on_gpu(tensor):
                return Plain.tolist(tensor)
            self.wait()
            return torch.full(tensor.shape, self._fetched(tensor.dtype)).tolist()

        shown = {
            "device": lambda t: CUDA if on_gpu(t) and not self._inside else Plain.device.__get__(t),
            "is_cuda": lambda t: on_gpu(t) and not self._inside,
            "is_meta": lambda t: on_gpu(t) and self._inside,
        }
        for name, value in shown.items():
            self._patch(torch.Tensor, name, property(value))
        methods = {"to": moved, "tolist": tolist, "cuda": lambda t, *_, **__: moved(t, "cuda")}
        for name, value in {**methods, "pin_memory": lambda t, *_: self._pin(t.clone())}.items():
            self._patch(torch.Tensor, name, value)
        for owner, name in ((F, "scaled_dot_product_attention"), (F, "dropout"), (F, "rms_norm")):
            self._patch(owner, name, functools.partial(getattr(self, f"_{name}"), getattr(F, name)))
        foreach = "_get_foreach_kernels_supported_devices"
        self._patch(_foreach_utils, foreach, lambda: ["cuda", "meta"])
        return super().__enter__()

    def __exit__(self, *error):
        result = super().__exit__(*error)
        torch._C._set_only_lift_cpu_tensors(self._lifted)
        for owner, name, value in reversed(self._undo):
            delattr(owner, name) if value is self else setattr(owner, name, value)
        self._undo.clear()
        return result

    def _patch(self, owner, name, value):
        self._undo.append((owner, name, owner.__dict__.get(name, self)))
        setattr(owner, name, value)

    def _pin(self, tensor):
        self._pinned.add(tensor.untyped_storage())
        return tensor

    # What C++ chooses by the device.

    def _dropout(self, plain, x, p=0.5, training=True, inplace=False):
        if not on_gpu(x) or not training or p == 0:
            return plain(x, p, training, inplace)
        return torch.native_dropout(x, p, True)[0]

    def _rms_norm(self, plain, x, shape, weight=None, eps=None):
        return _Norm.apply(self, x, weight) if on_gpu(x) else plain(x, shape, weight, eps)

    def _scaled_dot_product_attention(
        self, plain, q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, **options
    ):
        if not on_gpu(q):
            return plain(q, k, v, attn_mask, dropout_p, is_causal, **options)
        half = q.dtype in (torch.float16, torch.bfloat16)
        kernel = "flash" if attn_mask is None and half else "efficient"
        if half and torch.backends.cuda.cudnn_sdp_enabled():
            # What torch prefers on an H100.
            kernel = "cudnn"
        self.attention[kernel, attn_mask is not None] += 1
        if attn_mask is not None:
            # A mask of truth values becomes one of numbers.
            attn_mask = torch.empty(attn_mask.shape, dtype=q.dtype, device=CUDA)
        return _Flash.apply(self, q, k, v)

    # What the device does.

    def _track(self, tensor):
        storage = tensor.untyped_storage()
        key, size = storage._cdata, -(-storage.nbytes() // 512) * 512
        if key not in self._alive:
            self._alive[key] = size
            self._refs[key] = weakref.ref(storage, functools.partial(self._free, key))
            self.now += size
            if self.capacity and self.now > self.capacity:
                raise torch.OutOfMemoryError("CUDA out of memory (pretended)")
            self.peak = max(self.peak, self.now)
            if tensor.dim() and tensor.shape[-1] == self.vocabulary:
                rows = tensor.numel() // self.vocabulary
                self.rows[tensor.dtype] = max(self.rows[tensor.dtype], rows)

    def _free(self, key, _):
        self.now -= self._alive.pop(key)
        del self._refs[key]

    def _copied(self, name, args, kwargs):
        """A copy between host and device, and whether it was one."""
        if name == "_to_copy":
            source, device = args[0], kwargs.get("device")
            if not on_gpu(source) and is_cuda(device):
                is_pinned = source.untyped_storage() in self._pinned
                if not (is_pinned and kwargs.get("non_blocking")):
                    self.wait()
                dtype = kwargs.get("dtype") or source.dtype
                out = torch.empty_strided(source.shape, source.stride(), dtype=dtype, device=META)
                self._track(out)
                return out, True
            if on_gpu(source) and device is not None and torch.device(device).type == "cpu":
                self.wait()
                dtype = kwargs.get("dtype") or source.dtype
                return torch.full(source.shape, self._fetched(dtype), dtype=dtype), True
        if name == "copy_" and on_gpu(args[0]) != on_gpu(args[1]):
            if args[1].dim():
                self.wait()
            fetched = self._fetched(args[0].dtype)
            return args[0] if on_gpu(args[0]) else args[0].fill_(fetched), True
        return None, False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), func.overloadpacket.__name__
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        here, elsewhere = ([t for t in tensors if on_gpu(t) is side] for side in (True, False))
        makes_here = is_cuda(kwargs.get("device"))
        if not here and not makes_here:
            pinned = kwargs.pop("pin_memory", None)
            out = self._call(func, args, kwargs)
            return self._pin(out) if pinned else out
        out, was_copy = self._copied(name, args, kwargs)
        if was_copy:
            return out
        if name in ("_local_scalar_dense", *ASK_THE_DEVICE):
            self.wait()
            if name in ("_local_scalar_dense", "equal"):
                return True if name == "equal" else self._fetched(args[0].dtype)
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            indices = [i for i in args[1] if i is not None]
            if any(i.dtype == torch.bool or not on_gpu(i) for i in indices):
                self.wait()
        elif any(t.dim() for t in elsewhere):
            raise RuntimeError(f"{name}: tensors on cuda:0 and cpu, in {place()}")
        args, kwargs = tree_map(self._as_meta, (args, kwargs))
        kwargs.pop("pin_memory", None)
        out = self._call(func, args, kwargs)
        if name not in VIEWS:
            formula = flop_registry.get(func.overloadpacket)
            self.count(name, formula(*args, **kwargs, out_val=out) if formula else 0)
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._track(tensor)
        return out

    def _as_meta(self, value):
        if isinstance(value, torch.Tensor) and not on_gpu(value):
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=META)
        return META if isinstance(value, torch.device) and value.type == "cuda" else value

    def _call(self, func, args, kwargs):
        # Meta kernels that are written in Python ask for the true device.
        self._inside = True
        try:
            return func(*args, **kwargs)
        finally:
            self._inside = False
