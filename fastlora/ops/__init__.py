"""The torch.library ops: schema, fake, gradient, and the functions that call them.

Ops are opaque to `torch.compile`; the backend is chosen inside them. In plain eager mode an
autograd.Function calls the same implementation without the dispatcher, which saves more than ten
microseconds per call.
"""

from fastlora.ops.columns import scale_columns
from fastlora.ops.dropout import drop, dropout_seed
from fastlora.ops.experts import experts_linear
from fastlora.ops.group import linear_group
from fastlora.ops.kron import add_kron, kron_linear
from fastlora.ops.linear import linear
from fastlora.ops.scaled import finds_norms, over_norms, scaled_linear
from fastlora.ops.sums import weight_dots, weight_squares

__all__ = [
    "add_kron",
    "drop",
    "dropout_seed",
    "experts_linear",
    "finds_norms",
    "kron_linear",
    "linear",
    "linear_group",
    "over_norms",
    "scale_columns",
    "scaled_linear",
    "weight_dots",
    "weight_squares",
]
