"""The formats of stored kernels in numpy: codes, scales and numbers, block by block and number by number."""

import ml_dtypes
import numpy as np

# As bitsandbytes publishes them: create_normal_map, and the thresholds of its dQuantizeNF4.
VALUES = np.array([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
], np.float32)  # fmt: skip
THRESHOLDS = np.array([
    -0.8480964004993439, -0.6106329262256622, -0.4599952697753906, -0.33967943489551544, -0.23460740596055984,
    -0.13791173323988914, -0.045525018125772476, 0.03979014977812767, 0.1202552504837513, 0.2035212516784668,
    0.2920137718319893, 0.3893125355243683, 0.5016634166240692, 0.6427869200706482, 0.8614784181118011,
], np.float32)  # fmt: skip


def numpy_nf4(kernel: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes, scales and dequantised numbers of one kernel [in, out], block after block of each column."""
    size, out = kernel.shape
    blocks = -(-size // 64)
    codes, scales, numbers = np.full((size + size % 2, out), 7), np.zeros((blocks, out), np.float32), np.zeros_like(kernel)
    for column in range(out):
        for block in range(blocks):
            rows = slice(64 * block, min(64 * block + 64, size))
            largest = np.abs(kernel[rows, column]).max()
            normal = kernel[rows, column] / (largest or np.float32(1))
            codes[rows, column] = np.searchsorted(THRESHOLDS, normal, side="left")
            scales[block, column] = largest
            numbers[rows, column] = VALUES[codes[rows, column]] * largest
    return (codes[0::2] * 16 + codes[1::2]).astype(np.uint8), scales, numbers


def numpy_scaled(kernel: np.ndarray, dtype, largest: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The same of a format with one scale a column."""
    scales = np.abs(kernel).max(axis=0, keepdims=True) * np.float32(1 / largest)
    codes = kernel / np.where(scales == 0, np.float32(1), scales)
    codes = np.clip(np.rint(codes) if dtype == np.int8 else codes, -largest, largest).astype(dtype)
    return codes, scales, codes.astype(np.float32) * scales


REFERENCES = {
    "nf4": numpy_nf4,
    "int8": lambda kernel: numpy_scaled(kernel, np.int8, 127.0),
    "fp8": lambda kernel: numpy_scaled(kernel, ml_dtypes.float8_e4m3fn, 448.0),
}
