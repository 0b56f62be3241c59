"""Every defence behind one protocol, by name."""

from panacea_jax.defences.antidote import Antidote
from panacea_jax.defences.ascent import Ascent
from panacea_jax.defences.asft import Asft
from panacea_jax.defences.bds import Bds
from panacea_jax.defences.booster import Booster, BoosterVaccine
from panacea_jax.defences.constrained_sft import ConstrainedSft
from panacea_jax.defences.ewc import Ewc
from panacea_jax.defences.kl import Kl
from panacea_jax.defences.ldifs import Ldifs
from panacea_jax.defences.lisa import Lisa
from panacea_jax.defences.loss import Loss
from panacea_jax.defences.lox import Lox
from panacea_jax.defences.magnitude_prune import MagnitudePrune
from panacea_jax.defences.panacea import Panacea
from panacea_jax.defences.protocol import Defence, LossFn, Method, StreamSpec
from panacea_jax.defences.random_perturbation import RandomPerturbation
from panacea_jax.defences.random_prune import RandomPrune
from panacea_jax.defences.random_vaccine import RandomVaccine
from panacea_jax.defences.realign import Realign
from panacea_jax.defences.repnoise import RepNoise
from panacea_jax.defences.resta import Resta
from panacea_jax.defences.safe_delta import SafeDelta
from panacea_jax.defences.safegrad import SafeGrad
from panacea_jax.defences.safelora import SafeLora
from panacea_jax.defences.safemerge import SafeMerge
from panacea_jax.defences.sbr import Sbr
from panacea_jax.defences.sft import Sft
from panacea_jax.defences.t_vaccine import TVaccine
from panacea_jax.defences.tar import Tar
from panacea_jax.defences.triplet import Triplet
from panacea_jax.defences.unlearn import Unlearn
from panacea_jax.defences.vaccine import Vaccine
from panacea_jax.defences.vlguard import Vlguard

DEFENCES: dict[str, type[Method]] = {
    "sft": Sft,
    "vaccine": Vaccine,
    "random_vaccine": RandomVaccine,
    "t_vaccine": TVaccine,
    "booster": Booster,
    "booster_vaccine": BoosterVaccine,
    "repnoise": RepNoise,
    "tar": Tar,
    "panacea": Panacea,
    "lisa": Lisa,
    "ldifs": Ldifs,
    "ewc": Ewc,
    "kl": Kl,
    "vlguard": Vlguard,
    "sbr": Sbr,
    "constrained_sft": ConstrainedSft,
    "safegrad": SafeGrad,
    "bds": Bds,
    "ascent": Ascent,
    "random_perturbation": RandomPerturbation,
    "antidote": Antidote,
    "random_prune": RandomPrune,
    "magnitude_prune": MagnitudePrune,
    "safelora": SafeLora,
    "realign": Realign,
    "unlearn": Unlearn,
    "triplet": Triplet,
    "safe_delta": SafeDelta,
    # What alignment changed, by the weights before it.
    "asft": Asft,
    "lox": Lox,
    "resta": Resta,
    "safemerge": SafeMerge,
}

__all__ = [
    "Booster",
    "BoosterVaccine",
    "DEFENCES",
    "Antidote",
    "Ascent",
    "ConstrainedSft",
    "Bds",
    "Defence",
    "Ewc",
    "Kl",
    "Ldifs",
    "Lisa",
    "Loss",
    "LossFn",
    "MagnitudePrune",
    "Method",
    "Panacea",
    "RandomPerturbation",
    "RandomPrune",
    "RandomVaccine",
    "Realign",
    "SafeDelta",
    "SafeGrad",
    "SafeLora",
    "RepNoise",
    "Sbr",
    "Sft",
    "StreamSpec",
    "Tar",
    "TVaccine",
    "Triplet",
    "Unlearn",
    "Vaccine",
    "Vlguard",
    "Asft",
    "Lox",
    "Resta",
    "SafeMerge",
]
