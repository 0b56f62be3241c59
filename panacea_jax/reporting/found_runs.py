"""What runs left: the scores of each, and the stages that made it."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from panacea_jax.config.methods import method_defaults
from panacea_jax.defences.protocol import STAGES
from panacea_jax.defences.spec import Part
from panacea_jax.evaluate.scores import Json
from panacea_jax.reporting.outcomes import Estimate, Found, Outcome, Trained, figures_of
from panacea_jax.train.metrics import seconds_of_steps
from panacea_jax.untrusted import parsing, read_object
from panacea_jax.workdir import MANIFEST

SCORES = "scores.json"
READING = (
    "Figures are percentages; lower is better for HS and HS+. Intervals: 95 %, Wilson, over the prompts of one model; of several seeds "
    "the bootstrap's, over these."
)


def is_run(folder: Path) -> bool:
    """Whether there are scores, or what a stage of training left."""
    return (folder / SCORES).is_file() or any((folder / stage / MANIFEST).is_file() for stage in STAGES)


def stages_of(workdir: Path) -> dict[str, Path]:
    """The folders of a run's stages, by name."""
    return {path.parent.name: path.parent for path in sorted(workdir.glob(f"*/{MANIFEST}"))}


def read_runs(folder: Path, workdirs: Sequence[Path]) -> Found:
    """Runs side by side, each called by its folder's name.

    Args:
        folder: of the report.
        workdirs: of the runs.

    Raises:
        InputError: a damaged file.
    """
    runs, outcomes, scored, notes = [], [], {}, []
    for workdir in workdirs:
        name, path = workdir.resolve().name, workdir / SCORES
        stages = stages_of(workdir)
        run = Trained(name, None, workdir, stages)
        manifests = run.manifests()
        seeds = [m["config"]["seed"] for m in manifests.values() if "seed" in m["config"]]
        runs.append(run._replace(seed=seeds[0] if seeds else None))
        if path.is_file():
            scores = read_object(path, strict=True)
            outcomes.append(_of_run(name, manifests, stages, figures_of(scores, path)))
            scored[name] = path
            with parsing(path, "not a scores.json of ours"):
                notes.append(f"Judge {scores['judge']['name']}, version {scores['judge']['version']}. {READING}")
    return Found(folder, outcomes, runs, notes=list(dict.fromkeys(notes)), scores=scored)


def _of_run(name: str, manifests: Mapping[str, Json], stages: Mapping[str, Path], figures: Mapping[str, Estimate]) -> Outcome:
    """The outcome of one run, with what it cost."""
    tuned, trained = manifests.get("finetune"), [s for s in STAGES if s in manifests]
    data = tuned["config"].get("data", {}) if tuned else {}
    seconds = [seconds_of_steps(stages[s], n) for s in trained if (n := int(manifests[s]["outcome"].get("steps", 0)))]
    megabytes = max((int(manifests[s]["outcome"].get("step_bytes", 0)) for s in trained), default=0) / 2**20
    return Outcome(
        name,
        figures,
        attacked=trained != ["align"],
        costs={
            "poison ratio": f"{data['poison_ratio']:g}" if data.get("attack") else "–",
            "defence": "; ".join(f"{stage}: {_defence(manifests[stage])}" for stage in trained) or "–",
            "steps": ", ".join(str(manifests[s]["outcome"].get("steps", 0)) for s in trained) or "–",
            "seconds of steps": f"{sum(filter(None, seconds)):.0f}" if seconds and None not in seconds else "–",
            "step MiB": f"{megabytes:.0f}" if megabytes else "–",
        },
    )


def _defence(manifest: Json) -> str:
    """A stage's method and its hyper-parameters in a line."""
    section = manifest["config"].get("defence", {"name": ""})
    values = ((key, section.get(key)) for key in method_defaults(section["name"]))
    return str(Part(section["name"] or "none", tuple((key, value) for key, value in values if value is not None)))
