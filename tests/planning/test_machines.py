"""Names of machines, in the units that Google and users count in."""

import pytest

from sft_jax.errors import UserError
from sft_jax.planning.machines import CHIPS, GIB, machine
from sft_jax.planning.program import has_tpu_compiler, tpu_devices
from sft_jax.training.hardware import PEAK_FLOPS


@pytest.mark.parametrize(
    ("name", "devices", "topology"),
    [
        ("v5p-16", 8, "v5p:2x2x2"),  # 16 TensorCores
        ("v5p-64", 32, "v5p:2x4x4"),
        ("v4-8", 4, "v4:2x2x1"),
        ("v5e-16", 16, "v5e:4x4"),  # 16 chips
        ("v5litepod-64", 64, "v5e:8x8"),
        ("v6e-256", 256, "v6e:16x16"),
        ("v5p:2x2x4", 16, "v5p:2x2x4"),
        ("v5e-1", 1, "v5e:1x1"),
        ("2xv5p-64", 64, "v5p:2x4x4"),  # of each slice
        ("3xv5e:2x4", 24, "v5e:2x4"),
    ],
)
def test_slices(name, devices, topology):
    found = machine(name)
    assert (found.devices, found.topology, found.chip.platform) == (devices, topology, "tpu")


def test_what_is_said_of_several_slices():
    assert machine("2xv5p-16").describe() == (
        "2xv5p-16: 2 slices of 8 chips of TPU v5p (16 TensorCores, 2x2x2), which JAX sees as 16 devices of 95.74 GiB"
    )


def test_gpus():
    assert (machine("h100x8").devices, machine("H200x16").devices, machine("a100").devices) == (8, 16, 1)
    assert [machine(name).kind for name in ("a100-40", "A100-40x8", "l40sx4", "l4", "rtx4090x2")] == ["a100-40", "a100-40", "l40s", "l4", "rtx4090"]
    assert (machine("a100-40x8").devices, machine("l40sx4").devices, machine("rtx4090").devices) == (8, 4, 1)
    assert (machine("h100").nodes, machine("h100x8").nodes, machine("h100x32").nodes, machine("v5p-64").nodes) == (1, 1, 4, 1)
    assert (machine("2xv5p-64").nodes, machine("2xv5p-64").name_of_nodes, machine("h100x32").name_of_nodes) == (2, "slices", "nodes")
    assert machine("h100x8").collective_bandwidth == machine("h100x16").collective_bandwidth == 450e9  # over links; test_nodes.py has the network


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5p-6", "there is no slice v5p-6; there are v5p-8, v5p-16"),
        ("v5p-7", "there is no slice"),
        ("v5x-8", "unknown chip 'v5x'; .*v5"),
        ("h10x8", "unknown chip 'h10'"),
        ("h100x9", "nodes of 8"),
        ("a100-41", "unknown chip 'a100-41'; .*a100-40"),
        ("v5p:2x2", "along 3 axes"),
        ("v5e:0x2", "along 2 axes"),
        ("pod", "is no machine"),
        ("0xv5e-4", "is no machine"),
        ("2xv5e-5", "there is no slice v5e-5"),
        ("2xh100x8", "is no machine"),
    ],
)
def test_what_is_no_machine(name, message):
    with pytest.raises(UserError, match=message):
        machine(name)


def test_the_torus_counts():
    """Rings are closed from 16 chips (v5e) and 4 (v5p) on, so both directions carry data there."""
    assert machine("v5e-256").collective_bandwidth == 4 * CHIPS["v5e"].link
    assert machine("v5e-16").collective_bandwidth == 2 * CHIPS["v5e"].link
    assert machine("v5p-128").collective_bandwidth == 6 * CHIPS["v5p"].link


def test_peaks_agree_with_those_that_runs_report():
    for kind, chip in CHIPS.items():
        known = [name for name in PEAK_FLOPS if chip.label.startswith(name)]
        assert chip.flops == PEAK_FLOPS[max(known, key=len)], kind


@pytest.mark.skipif(not has_tpu_compiler(), reason="libtpu is not installed (pip install 'sft_jax[tpu]')")
@pytest.mark.parametrize("name", ["v4-8", "v5p-16", "v5e-8", "v5e-1", "v6e-16", "2xv5e-4", "3xv5e-1", "2xv5p-16"])
def test_libtpu_counts_the_same_devices(name):
    devices = tpu_devices(machine(name))
    assert len(devices) == machine(name).devices
    assert all(device.platform == "tpu" for device in devices)
    assert len({getattr(device, "slice_index", 0) for device in devices}) == machine(name).nodes


def test_usable_memory_is_below_that_of_the_chip():
    for kind, gigabytes in {"v4": 32, "v5e": 16, "v6e": 32, "h100": 80, "h200": 141, "a100-40": 40, "l4": 24, "l40s": 48, "rtx4080": 16, "rtx4090": 24}.items():
        assert 0.9 * gigabytes * 1e9 <= CHIPS[kind].memory <= gigabytes * GIB
