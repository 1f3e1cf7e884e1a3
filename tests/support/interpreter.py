"""Mends what Triton's interpreter gets wrong in some versions, so that kernels run as they do when compiled."""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def mend() -> None:
    """Before the first kernel runs."""
    _allow_device_values_as_loop_bounds()
    _keep_conditions_boolean()


def _allow_device_values_as_loop_bounds() -> None:
    """A scalar is kept as an array of one element, which NumPy 2.4 does not take for an index."""
    patch_tensor = interpreter._patch_lang_tensor

    def patched(tensor: type, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched


def _keep_conditions_boolean() -> None:
    """A comparison's result is labelled with its operands' type, into which a broadcast scalar is then converted."""
    create_splat = interpreter.InterpreterBuilder.create_splat

    def patched(self: Any, ret_ty: Any, arg: Any) -> Any:
        if arg.data.dtype == np.bool_:
            arg = interpreter.TensorHandle(arg.data, tl.int1)
        return create_splat(self, ret_ty, arg)

    interpreter.InterpreterBuilder.create_splat = patched
