"""From one floating-point dtype to another, to the nearest, ties to even: as ``torch.Tensor.to`` gives it on a CPU.

numpy has no bfloat16 and no 8-bit floats, so these are integers here. Everything goes through float32, as in torch (c10/util/BFloat16.h,
Half.h, Float8_*.h); a NaN stays a NaN.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, TypeAlias

import numpy

from assayer.tensors import DTYPES, Dtype

__all__ = ["Array", "as_float32", "cast", "from_float32", "raw_type"]

Array: TypeAlias = "numpy.ndarray[Any, Any]"

_FLOATS = {"float64": numpy.float64, "float32": numpy.float32, "float16": numpy.float16}


def raw_type(dtype: Dtype) -> type[Any]:
    """The unsigned integer type of numpy's that is as wide as one element."""
    return {1: numpy.uint8, 2: numpy.uint16, 4: numpy.uint32, 8: numpy.uint64}[dtype.size]


def cast(values: Array, source: Dtype, target: Dtype) -> Array:
    """Raw elements (unsigned integers) of one floating-point dtype as raw elements of another."""
    if source is target:
        return values
    return from_float32(as_float32(values, source), target)


def as_float32(values: Array, source: Dtype) -> Array:
    """Raw elements as float32; exact but for float64, which is rounded to the nearest."""
    if source.torch == "bfloat16":
        return (values.astype(numpy.uint32) << 16).view(numpy.float32)
    if source.torch in _FLOATS:
        with numpy.errstate(over="ignore", invalid="ignore"):
            return values.view(_FLOATS[source.torch]).astype(numpy.float32, copy=False)
    return _table_of_eight_bits(source.torch)[values]


def from_float32(values: Array, target: Dtype) -> Array:
    """float32 as raw elements of bfloat16, float16, float32 or float64."""
    if target.torch == "bfloat16":
        bits = values.view(numpy.uint32)
        rounded = (bits + (((bits >> 16) & 1) + 0x7FFF)) >> 16
        return numpy.where(numpy.isnan(values), numpy.uint32(0x7FC0), rounded).astype(numpy.uint16)
    with numpy.errstate(over="ignore", invalid="ignore"):
        return values.astype(_FLOATS[target.torch], copy=False).view(raw_type(target))


@cache
def _table_of_eight_bits(name: str) -> Array:
    """The 256 values of an 8-bit float, as the OCP specification and torch's headers give them."""
    decode = _DECODERS[name]
    return numpy.array([decode(code) for code in range(256)], dtype=numpy.float32)


def _float8(exponent_bits: int, bias: int, finite: bool, negative_zero_is_nan: bool) -> Callable[[int], float]:
    mantissa_bits = 7 - exponent_bits
    top = (1 << exponent_bits) - 1

    def decode(code: int) -> float:
        sign = -1.0 if code & 0x80 else 1.0
        exponent, mantissa = (code & 0x7F) >> mantissa_bits, code & ((1 << mantissa_bits) - 1)
        if negative_zero_is_nan and code == 0x80:
            return float("nan")
        if not negative_zero_is_nan and exponent == top:
            if not finite:
                return sign * float("inf") if mantissa == 0 else float("nan")
            if mantissa == (1 << mantissa_bits) - 1:
                return float("nan")
        if exponent == 0:
            return float(sign * mantissa * 2.0 ** (1 - bias - mantissa_bits))
        return float(sign * (1 + mantissa / (1 << mantissa_bits)) * 2.0 ** (exponent - bias))

    return decode


_DECODERS: dict[str, Callable[[int], float]] = {
    "float8_e4m3fn": _float8(4, 7, finite=True, negative_zero_is_nan=False),
    "float8_e5m2": _float8(5, 15, finite=False, negative_zero_is_nan=False),
    "float8_e4m3fnuz": _float8(4, 8, finite=True, negative_zero_is_nan=True),
    "float8_e5m2fnuz": _float8(5, 16, finite=True, negative_zero_is_nan=True),
    "float8_e8m0fnu": lambda code: float("nan") if code == 255 else 2.0 ** (code - 127),
}

assert set(_DECODERS) <= set(DTYPES)
