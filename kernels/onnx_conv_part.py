"""The part of the portable body of LutConvInt8 that is its own, in ONNX's text form (see onnx_parts.py).

The matrix `W_t` (k, n) becomes a kernel (n, channels, height, width), an image is rounded as lut_conv.py says.
"""

from __future__ import annotations

CONV_INT8 = """
    taps = Constant <value_ints: ints = @taps> ()
    by_tap = Reshape (W_t, taps)
    kernel_filled = Transpose <perm = [3, 2, 0, 1]> (by_tap)
    channels = Constant <value_int: int = @channels> ()
    channels_1d = Reshape (channels, one_1d)
    kernel = Slice (kernel_filled, zero_1d, channels_1d, one_1d)

    x_float = Cast <to = 1> (x)
    x_magnitude = Abs (x_float)
    image_axes = Constant <value_ints = [1, 2, 3]> ()
    largest = ReduceMax <keepdims = 1> (x_magnitude, image_axes)
    least = Constant <value_float = 3.73219479e-37> ()
    something = Constant <value_float = 1.0> ()
    most = Constant <value_float = 127.0> ()
    nothing = Less (largest, least)
    largest_or_one = Where (nothing, something, largest)
    factor = Div (most, largest_or_one)
    step_of_x = Div (largest, most)
    x_scaled = Mul (x_float, factor)
    x_whole = Round (x_scaled)
    x_again = Mul (x_whole, step_of_x)
    x_rounded = Cast <to: int = @dtype> (x_again)

    product = Conv <strides: ints = @strides, dilations: ints = @dilations, pads: ints = @pads> (x_rounded, kernel)
    bias_shape = Constant <value_ints = [1, -1, 1, 1]> ()
    bias_planes = Reshape (bias, bias_shape)
"""
