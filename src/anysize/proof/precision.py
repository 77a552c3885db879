"""Run transformers in double precision throughout, so that algebra is not hidden behind single-precision norms."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_SINGLE = torch.float32


class DoubleThroughout(TorchFunctionMode):
    """While active, double-precision tensors stay double where model code asks for float32 (norms, softmax)."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        named = dict(kwargs or {})
        double = bool(args) and isinstance(args[0], torch.Tensor) and args[0].dtype == torch.float64
        if double and func is torch.Tensor.float:
            return args[0]
        if double:
            args = tuple(torch.float64 if arg is _SINGLE else arg for arg in args)
            if named.get("dtype") is _SINGLE:
                named["dtype"] = torch.float64
        return func(*args, **named)
