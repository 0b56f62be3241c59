"""What a chip costs, in US dollars an hour on demand, its share of the host included.

Read on 2026-11-30 in stored copies of the catalogue that SkyPilot keeps of the clouds' own price lists
(github.com/skypilot-org/skypilot-catalog, catalogs/v8, the files and commits below). Prices differ by region and contract, and change:
`panacea plan --price=DOLLARS` takes another.
"""

from typing import NamedTuple

READ = "2026-11-30"


class Price(NamedTuple):
    """Dollars a chip-hour, and whose price that is."""

    dollars: float
    source: str


# gcp/vms.csv at 006059e0f18a: tpu-v4-6144 of 3072 chips, tpu-v5litepod-1, tpu-v5p-1024 of 512 chips, tpu-v6e-16; L4 with a g2-standard-4 as
# `sky show-gpus` lists it. lambda/vms.csv at 0f4070387edc: gpu_8x_a100_80gb_sxm4. nebius/vms.csv at 0082b0435f39: the machines of eight.
PRICES = {
    "v4": Price(3.22, "Google Cloud, us-central2"),
    "v5e": Price(1.20, "Google Cloud, us-central1"),
    "v5p": Price(4.20, "Google Cloud, us-central1"),
    "v6e": Price(2.70, "Google Cloud, us-central1"),
    "l4": Price(0.705, "Google Cloud, us-east4"),
    "a100": Price(2.79, "Lambda"),
    "h100": Price(2.95, "Nebius, eu-north1"),
    "h200": Price(3.50, "Nebius, us-central1"),
}
