"""Every defence behind one protocol, by name."""

from typing import Any

from panacea_jax.defences.booster import Booster, BoosterVaccine
from panacea_jax.defences.loss import Loss
from panacea_jax.defences.panacea import Panacea
from panacea_jax.defences.protocol import Defence, LossFn
from panacea_jax.defences.random_perturbation import RandomPerturbation
from panacea_jax.defences.random_vaccine import RandomVaccine
from panacea_jax.defences.repnoise import RepNoise
from panacea_jax.defences.sft import Sft
from panacea_jax.defences.tar import Tar
from panacea_jax.defences.vaccine import Vaccine

DEFENCES: dict[str, type[Any]] = {
    "sft": Sft,
    "vaccine": Vaccine,
    "random_vaccine": RandomVaccine,
    "booster": Booster,
    "booster_vaccine": BoosterVaccine,
    "repnoise": RepNoise,
    "tar": Tar,
    "panacea": Panacea,
    "random_perturbation": RandomPerturbation,
}

__all__ = [
    "Booster",
    "BoosterVaccine",
    "DEFENCES",
    "Defence",
    "Loss",
    "LossFn",
    "Panacea",
    "RandomPerturbation",
    "RandomVaccine",
    "RepNoise",
    "Sft",
    "Tar",
    "Vaccine",
]
