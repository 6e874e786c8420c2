"""A TensorBoard event file, written where it is called.

Records are framed as TFRecord and hold one `tensorflow.Event` each (tensorflow/core/util/event.proto), of which a scalar needs
a handful of fields; so they are put together here. tensorboardX, whose classes would do it, is imported in 0.7 s, with torch
beside it in 1.5 s, all before the first step; its SummaryWriter writes in a thread that a full disk ends silently, so that the
run waits for ever for room in its queue.
"""

import os
import socket
import struct
import time
from pathlib import Path

from sft_jax.checkpoint.disk import explained

_FLUSH_SECONDS = 30.0
_START = 1  # SessionLog.START


class EventFile:
    """One event file of a run; a run that was started several times has several, which TensorBoard reads as one."""

    def __init__(self, folder: Path, purge_step: int):
        """Begins a file. TensorBoard hides what earlier files say of steps from `purge_step` on."""
        self._folder = folder
        with explained(folder, "the TensorBoard log"):
            folder.mkdir(parents=True, exist_ok=True)
            # Two starts within a second would otherwise share a name, and the second would erase the first.
            name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}.{time.time_ns()}"
            self._file = open(folder / name, "xb")
        self._flushed = time.monotonic()
        self._write(_bytes_field(3, b"brain.Event:2"))  # file_version
        self._write(_number_field(2, purge_step) + _bytes_field(7, _number_field(1, _START)))

    def scalar(self, name: str, value: float, step: int) -> None:
        point = _bytes_field(1, name.encode()) + b"\x15" + struct.pack("<f", value)  # tag, simple_value
        self._write(_number_field(2, step) + _bytes_field(5, _bytes_field(1, point)))

    def _write(self, event: bytes) -> None:
        with explained(self._folder, "the TensorBoard log"):
            self._file.write(_record(b"\x09" + struct.pack("<d", time.time()) + event))  # wall_time
            if time.monotonic() - self._flushed > _FLUSH_SECONDS:
                self._file.flush()
                self._flushed = time.monotonic()

    def close(self) -> None:
        with explained(self._folder, "the TensorBoard log"):
            self._file.close()


def _number_field(number: int, value: int) -> bytes:
    """Returns an integer field of a protocol buffer."""
    return bytes([number << 3]) + _varint(value)


def _bytes_field(number: int, value: bytes) -> bytes:
    """Returns a field of a protocol buffer that is a text or another message."""
    return bytes([number << 3 | 2]) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    parts = bytearray()
    while value > 127:
        parts.append(value & 127 | 128)
        value >>= 7
    return bytes(parts) + bytes([value])


def _record(content: bytes) -> bytes:
    """Returns `content` as a TFRecord: its length and itself, each with a masked CRC-32C."""
    length = struct.pack("<Q", len(content))
    return length + _masked_checksum(length) + content + _masked_checksum(content)


def _masked_checksum(content: bytes) -> bytes:
    checksum = 0xFFFFFFFF
    for byte in content:
        checksum = _TABLE[(checksum ^ byte) & 255] ^ checksum >> 8
    checksum ^= 0xFFFFFFFF
    rotated = (checksum >> 15 | checksum << 17) & 0xFFFFFFFF
    return struct.pack("<I", (rotated + 0xA282EAD8) & 0xFFFFFFFF)


def _remainder(byte: int) -> int:
    """Returns what CRC-32C (RFC 3720, reflected polynomial 0x82F63B78) makes of one byte."""
    for _ in range(8):
        byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
    return byte


_TABLE = [_remainder(byte) for byte in range(256)]
