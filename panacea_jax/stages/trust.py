"""What ``verify`` looks at beside the figures: whether a work directory is still what its manifests say, and what is deployed is w + ε.

Nothing is taken from a report: hashes are taken anew, checkpoints read, scores counted again.
"""

import functools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import load_file

from panacea_jax.data.files import sha256
from panacea_jax.data.sources import fingerprint
from panacea_jax.errors import InputError
from panacea_jax.export import tensors_in_checkpoint
from panacea_jax.models.names import alone
from panacea_jax.models.peft import WEIGHTS_FILE, read_notes
from panacea_jax.models.peft_config import CONFIG_FILE
from panacea_jax.models.weights import find_tensors
from panacea_jax.records.judged import load_judged
from panacea_jax.stages import lineage
from panacea_jax.stores import by_address, direct, stand_in
from panacea_jax.sums import SUMS, difference, read_sums, sha256_folder, sha256_model, unnamed
from panacea_jax.train.checkpoints import checkpoint_steps, newest_checkpoint, read_checkpoint
from panacea_jax.untrusted import read_object
from panacea_jax.workdir import MANIFEST, read_manifest, run_id

HOLDS, DIFFERS, UNKNOWN = "holds", "differs", "unknown"
# How far a deployed tensor may be from w + ε, relative to its largest entry: float32 in another order of additions.
_CLOSE = 1e-5
# Folders of a stage that are deployed.
_WEIGHTS = ("adapter", "model")
_Read = Callable[[Path, str], tuple[dict[str, np.ndarray], dict[str, Any]]]
_Signed = Callable[[Path], str]


class Check(NamedTuple):
    """What was looked at, and how it was found.

    Attributes:
        what: such as "finetune: files".
        outcome: ``HOLDS``, ``DIFFERS``, or ``UNKNOWN`` where nothing tells.
        why: what differs, or what was compared.
    """

    what: str
    outcome: str
    why: str = ""


def check_workdir(workdir: Path, base: str = "", signed: _Signed | None = None) -> list[Check]:
    """Every check that a work directory has something for; none where no manifest is in it.

    Args:
        workdir: the work directory.
        base: folder of the base that the models in it are to be of; "": whatever their manifests name.
        signed: tells of a file who signed it, ``signatures.signed_by``, where every stage is to be signed.
    """
    stages = sorted(path.parent for path in workdir.glob(f"*/{MANIFEST}"))
    found = [check for stage in stages for check in _of_stage(stage, base, signed)]
    if not stages:
        return found
    if (left := lineage.newest(workdir)) and left.parent not in stages:
        found.append(Check(f"{left.parent.name}: manifest", DIFFERS, f"there is none, so nobody knows what made {left}"))
    verdicts = workdir / "judgements"
    if verdicts.is_dir():
        if signed:
            found.append(_tried("judgements: signature", lambda: (HOLDS, signed(verdicts / SUMS))))
        found += [_tried("judgements: files", lambda: _verdicts(verdicts)), _tried("scores", lambda: _scores(workdir))]
    return found


def _tried(what: str, check: Callable[[], tuple[str, str]]) -> Check:
    """A check; what makes it impossible is a difference."""
    try:
        outcome, why = check()
    except Exception as error:  # readers of files raise many kinds for a damaged one
        said = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {str(error)[:200]}"
        outcome, why = DIFFERS, " ".join(said.split())
    return Check(what, outcome, by_address(why))


def _of_stage(stage: Path, base: str, signed: _Signed | None) -> Iterator[Check]:
    """The checks of one stage's folder."""
    name = stage.name
    if signed:
        yield _tried(f"{name}: signature", lambda: _signature(stage, signed))
    try:
        manifest = read_manifest(stage)
    except InputError as error:
        yield Check(f"{name}: manifest", DIFFERS, str(error))
        return
    if manifest["status"] != "done":
        yield Check(f"{name}: files", UNKNOWN, f"status {manifest['status']}")
    else:
        yield _tried(f"{name}: files", lambda: _files(stage, manifest.get("files", {})))
    if manifest["inputs"]:
        yield _tried(f"{name}: inputs", lambda: _inputs(manifest))
    read = functools.lru_cache(1)(read_checkpoint)  # the newest comes last, and is asked for w next
    if direct(stage / "checkpoints").is_dir():
        yield _tried(f"{name}: checkpoints", lambda: _checkpoints(stage, run_id(manifest), read))
    if (stage / "adapter").is_dir() or ((stage / "model").is_dir() and name != "base"):
        yield _tried(f"{name}: base", lambda: _base(stage, manifest, base))
    if (stage / "epsilon.safetensors").is_file():
        yield _tried(f"{name}: ε applied", lambda: _epsilon(stage, manifest, read))
    if name == "generations":
        yield _tried("answers", lambda: _answers(stage.parent, manifest))


def _signature(stage: Path, signed: _Signed) -> tuple[str, str]:
    """That the manifest is signed, and stands for files."""
    said = signed(stage / MANIFEST)
    return (HOLDS, said) if read_manifest(stage).get("files") else (DIFFERS, "signed, but the manifest names the hash of no file")


def _files(folder: Path, sums: Mapping[str, str]) -> tuple[str, str]:
    if not sums:
        return UNKNOWN, "made before hashes were kept"
    wrong = difference(folder, sums)
    if not wrong:  # whoever loads weights takes whatever lies beside them
        weights = (name for name in _WEIGHTS if (folder / name).is_dir())
        beside = next(filter(None, (unnamed(folder / name, _below(name, sums), MANIFEST) for name in weights)), "")
        wrong = f"{beside} is not of this stage" if beside else ""
    return (DIFFERS, wrong) if wrong else (HOLDS, f"{len(sums)} files as they were written")


def _below(name: str, sums: Mapping[str, str]) -> dict[str, str]:
    """Hashes of one folder's files, by their paths in it."""
    return {path.removeprefix(f"{name}/"): digest for path, digest in sums.items() if path.startswith(f"{name}/")}


def _verdicts(folder: Path) -> tuple[str, str]:
    """As ``_files``; a judge from before there were hashes may have left some of them."""
    sums = read_sums(folder)
    outcome, why = _files(folder, sums)
    unnamed = sorted({path.name for path in folder.glob("*.jsonl")} - sums.keys())
    return (UNKNOWN, f"no hash of {unnamed[0]} is noted") if outcome == HOLDS and unnamed else (outcome, why)


def _inputs(manifest: Mapping[str, Any]) -> tuple[str, str]:
    """That what a stage read is still there, the same, and made by the same."""
    gone = []
    for name, digest in manifest["inputs"].items():
        now = _hashes_now(name, stand_in(name))
        if not now:
            gone.append(name)
        elif digest not in now:
            return DIFFERS, f"{name} is not what was read"
    for name, digest in manifest.get("made_by", {}).items():
        made = stand_in(name).parent
        if made.is_dir() and read_manifest(made).get("sha256") != digest:
            return DIFFERS, f"{made / MANIFEST} is another than that of the stage which made {name}"
    if gone:
        return UNKNOWN, f"{gone[0]} is not there any more, or is no file, folder or source"
    return HOLDS, f"{len(manifest['inputs'])} inputs as they were read"


def _hashes_now(name: str, path: Path) -> tuple[str, ...]:
    """What a manifest could say of an input as it is now; nothing where it is not there."""
    if path.is_dir():
        return (sha256_model(path),)
    if path.is_file() and not name.startswith("generations/"):  # of answers made elsewhere, or read by a method; not of a folder brought in
        return sha256(path), sha256_folder(path.parent, (path.name,))
    try:
        return (fingerprint(name),) if "@" in name else ()
    except InputError:
        return ()


def _checkpoints(stage: Path, run: str, read: _Read) -> tuple[str, str]:
    folder = stage / "checkpoints"
    steps = checkpoint_steps(folder)
    old = sum("checksums" not in read(folder / str(step), run)[1] for step in steps)
    if old:
        return UNKNOWN, f"{old} of {len(steps)} made before checksums were kept"
    return HOLDS, f"every array of {len(steps)} as it was saved"


def _base(stage: Path, manifest: Mapping[str, Any], named: str) -> tuple[str, str]:
    """That the weights say the base that they were trained on, and that it is the one which is named."""
    base = str(manifest["outcome"].get("base") or manifest["config"]["model"]["path"])
    if (stage / "adapter" / CONFIG_FILE).is_file():
        said = str(read_object(stage / "adapter" / CONFIG_FILE)["base_model_name_or_path"])
        if said != base:
            return DIFFERS, f"{stage / 'adapter' / CONFIG_FILE} says {said}, the manifest {base}"
    if not named:
        return HOLDS, base
    known = manifest["inputs"].get(by_address(stand_in(base).expanduser()))
    if known is None or not stand_in(named).is_dir():
        same = named == base
    else:
        same = sha256_model(stand_in(named)) == known
    return (HOLDS, base) if same else (DIFFERS, f"trained on {base}, which is not {named}")


def _epsilon(stage: Path, manifest: Mapping[str, Any], read: _Read) -> tuple[str, str]:
    """That what is deployed is w + ε: w from the newest checkpoint, or for a method without steps from the adapter that it began with."""
    adapter = stage / "adapter"
    if adapter.is_dir() and (said := read_notes(adapter).get("epsilon")) != "applied":
        return DIFFERS, f"{adapter} says: {said or 'nothing'}; w alone must not be deployed"
    epsilon = load_file(stage / "epsilon.safetensors")
    w, where = _before_epsilon(stage, manifest, read)
    if not w:
        return UNKNOWN, "no checkpoint is left to compare with"
    deployed = _of_adapter(adapter) if adapter.is_dir() else _of_model(stage / "model")
    for name, value in epsilon.items():
        wanted, found = (w[name] + value).astype(deployed[name].dtype), deployed[name].astype(np.float32)
        far = np.abs(found - wanted.astype(np.float32)).max(initial=0)
        if not far <= _CLOSE * np.abs(found).max(initial=1e-30):
            bare = "w alone" if np.array_equal(found, w[name].astype(deployed[name].dtype).astype(np.float32)) else "another"
            return DIFFERS, f"tensor {name} is not w + ε of {where}, but {bare}"
    return HOLDS, f"{len(epsilon)} tensors are w + ε, w of {where}"


def _before_epsilon(stage: Path, manifest: Mapping[str, Any], read: _Read) -> tuple[dict[str, np.ndarray], str]:
    """w by tensor name, and where it is from; empty where nothing has it."""
    if newest := newest_checkpoint(stage):
        return tensors_in_checkpoint(*read(newest, run_id(manifest))), str(newest)
    began = str(manifest["config"].get("lora", {}).get("init_from", ""))
    stood = not manifest["outcome"].get("steps")  # else w is another by now
    if stood and began and (stand_in(began) / WEIGHTS_FILE).is_file():
        return _of_adapter(stand_in(began)), began
    return {}, ""


def _of_adapter(folder: Path) -> dict[str, np.ndarray]:
    """The factors of a PEFT folder, by the names that they have without a vision tower beside the decoder."""
    return {name.replace(".language_model.", "."): x for name, x in load_file(folder / WEIGHTS_FILE).items()}


def _of_model(folder: Path) -> dict[str, np.ndarray]:
    """The tensors of a Hugging Face folder."""
    files = {tensor.file for tensor in find_tensors(folder).values()}
    return {alone(name): x for file in files for name, x in load_file(file).items()}


def _answers(workdir: Path, manifest: Mapping[str, Any]) -> tuple[str, str]:
    """That the answers are of the weights that the work directory would deploy, as they are now; of those that are named, where it has
    none."""
    answered = lineage.answered_by(manifest)
    weights, known = lineage.newest(workdir) or stand_in(answered), manifest["inputs"].get(answered)
    if known is None or not weights.is_dir():
        return UNKNOWN, f"{answered or 'the weights'} cannot be compared"
    same = sha256_model(weights) == known
    return (HOLDS, f"of {weights} as it is") if same else (DIFFERS, f"they are of {answered} as it was then, not of {weights} as it is")


def _so(said: Any, found: Any) -> bool:
    """Whether what a file says is so; there may be more figures than when it was written."""
    if isinstance(said, dict) and isinstance(found, dict):
        return all(_so(value, found.get(name)) for name, value in said.items())
    return bool(said == found)


def _scores(workdir: Path) -> tuple[str, str]:
    """That the verdicts are on these answers, and that counting them again gives the scores."""
    judges = load_judged(workdir)
    again = {name: json.loads(json.dumps(judged.scores())) for name, judged in judges.items()}
    compared = 0
    for file in sorted(workdir.glob("scores*.json")):
        found = read_object(file)
        if not _so(found, again[found["judge"]["name"]]):
            return DIFFERS, f"{file} is not what the verdicts say"
        compared += 1
    return HOLDS, f"{compared} files are what the verdicts on these answers say"
