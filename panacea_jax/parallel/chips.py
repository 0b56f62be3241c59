"""What the makers' data sheets say of accelerators."""

from typing import NamedTuple


class Chip(NamedTuple):
    """What the makers' data sheets say of one chip.

    Attributes:
        flops: dense bf16 FLOP/s.
        memory: bytes of HBM.
        bandwidth: bytes/s of HBM.
        links: bytes/s that the chip can send to its neighbours, all links together, one way.
        network: bytes/s that it can send out of its slice: its share of its host's or pod's network; 0 where no page says.
        devices: JAX devices a chip.
        platform: as JAX names it.
        compute_capability: of an NVIDIA GPU.
    """

    flops: float
    memory: float
    bandwidth: float
    links: float
    network: float = 0.0
    devices: int = 1
    platform: str = "tpu"
    compute_capability: str = ""


GB = 1e9
# TPU: cloud.google.com/tpu/docs, pages "TPU v4" … "TPU7x" (interconnect figures there are both ways together). H100 SXM, H200, A100, L4
# and B200 (an eighth of HGX B200): NVIDIA's data sheets, dense figures, NVLink (L4: PCIe) halved likewise.
CHIPS = {
    "v4": Chip(275e12, 32 * 2**30, 1228 * GB, 150 * GB),
    "v5e": Chip(197e12, 16 * 2**30, 819 * GB, 100 * GB, 3.125 * GB),
    "v5p": Chip(459e12, 95 * 2**30, 2765 * GB, 300 * GB, 6.25 * GB),
    "v6e": Chip(918e12, 32 * 2**30, 1640 * GB, 224 * GB, 12.5 * GB),
    "tpu7x": Chip(2307e12, 192 * 2**30, 7380 * GB, 600 * GB, devices=2),
    "l4": Chip(121e12, 24e9, 300 * GB, 32 * GB, 0, 1, "gpu", "8.9"),
    "a100": Chip(312e12, 80 * 2**30, 2039 * GB, 300 * GB, 0, 1, "gpu", "8.0"),
    "h100": Chip(989e12, 80 * 2**30, 3350 * GB, 450 * GB, 0, 1, "gpu", "9.0"),
    "h200": Chip(989e12, 141 * 2**30, 4800 * GB, 450 * GB, 0, 1, "gpu", "9.0"),
    "b200": Chip(2250e12, 180e9, 7700 * GB, 900 * GB, 0, 1, "gpu", "10.0"),
}
