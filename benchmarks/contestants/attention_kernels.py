"""Attention kernels by name, forward and backward on the same queries, keys and values: those that this torch and this device have."""

from collections.abc import Callable
from functools import partial
from typing import Any

from benchmarks.contestants.device import milliseconds

Kernel = Callable[[Any, Any, Any], Any]
"""From queries, keys and values (B, H, T, D), no padding, to the output in any layout of the same size."""


def table(tokens: int, length: int, heads: int, width: int, dtype: str, repeats: int) -> dict[str, float | str]:
    """Milliseconds of each kernel, or in one line why there are none."""
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape = (max(1, tokens // length), heads, length, width)
    inputs = [torch.randn(shape, device=device, dtype=getattr(torch, dtype)).requires_grad_() for _ in range(3)]
    found: dict[str, float | str] = {}
    for name, kernel in kernels().items():
        try:
            found[name] = milliseconds(partial(_forward_backward, kernel, inputs), repeats)
        except Exception as error:  # noqa: BLE001 - a kernel that this machine lacks is a row of the table
            found[name] = f"not here: {(str(error).strip().splitlines() or [type(error).__name__])[0][:100]}"
    return found


def _forward_backward(kernel: Kernel, inputs: list[Any]) -> None:
    for tensor in inputs:
        tensor.grad = None
    kernel(*inputs).sum().backward()


def kernels() -> dict[str, Kernel]:
    """All that are tried."""
    from torch.nn.attention import SDPBackend

    fused = ("MATH", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION")
    return {
        "matrix products": matrix_products,
        **{f"SDPA {name.lower()}": partial(_sdpa, getattr(SDPBackend, name)) for name in fused if hasattr(SDPBackend, name)},
        "flex_attention, compiled": _flex,
        "torch varlen_attn": _torch_varlen,
        "flash_attn varlen": _flash_varlen,
    }


def matrix_products(queries: Any, keys: Any, values: Any) -> Any:
    """Scores, softmax and output one after the other."""
    scores = queries @ keys.transpose(-1, -2) * queries.shape[-1] ** -0.5
    return scores.softmax(-1) @ values


def _sdpa(backend: Any, queries: Any, keys: Any, values: Any) -> Any:
    from torch.nn.attention import sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    with sdpa_kernel(backend):
        return scaled_dot_product_attention(queries, keys, values)


def _flex(queries: Any, keys: Any, values: Any) -> Any:
    return _compiled_flex()(queries, keys, values)


_COMPILED: list[Any] = []


def _compiled_flex() -> Any:
    import torch

    if not torch.cuda.is_available():
        raise RuntimeError("it has no backward pass on a CPU")
    if not _COMPILED:
        from torch.nn.attention.flex_attention import flex_attention

        _COMPILED.append(torch.compile(flex_attention))
    return _COMPILED[0]


def _torch_varlen(queries: Any, keys: Any, values: Any) -> Any:
    from torch.nn.attention.varlen import varlen_attn

    (queries, keys, values), ends, length = _unpadded(queries, keys, values)
    return varlen_attn(queries, keys, values, ends, ends, length, length)


def _flash_varlen(queries: Any, keys: Any, values: Any) -> Any:
    from flash_attn import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]

    (queries, keys, values), ends, length = _unpadded(queries, keys, values)
    return flash_attn_varlen_func(queries, keys, values, ends, ends, length, length)


def _unpadded(*tensors: Any) -> tuple[list[Any], Any, int]:
    """(B*T, H, D) each, where the sequences end, and their length."""
    import torch

    batch, _, length, _ = tensors[0].shape
    ends = torch.arange(batch + 1, device=tensors[0].device, dtype=torch.int32) * length
    return [tensor.transpose(1, 2).flatten(0, 1) for tensor in tensors], ends, length
