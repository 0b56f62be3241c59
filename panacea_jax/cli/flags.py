"""Every flag besides ``--config``: what it is for, and its default."""

from typing import NamedTuple


class Flag(NamedTuple):
    """A flag of some commands: what ``--help`` says, and the default, whose type is the flag's."""

    help: str
    default: str | int | float | bool | list[str] = ""


FLAGS = {
    "workdir": Flag("folder for the results; a run in it goes on where it stopped; for layers several with commas"),
    "world": Flag("seed of the miniature world", 0),
    "base": Flag("miniature, or smollm2: SmolLM2-135M-Instruct, about two hours on two cores", "miniature"),
    "data": Flag("folder of the public sets that --base=smollm2 draws on"),
    "task": Flag("the user's task on --base=smollm2: sst2 or ag_news", "sst2"),
    "prompts_only": Flag("write the prompts alone, for a server that answers in our place; loads no weights", False),
    "generations": Flag("answers made elsewhere: [TASK@]FILE, several with commas, or a folder"),
    "template": Flag("id of the template that --generations were made with, like alpaca-1"),
    "against": Flag("work directories to compare with, with commas; verify: one; probe, try: a PEFT or model folder, or none (the base)"),
    "undefended": Flag("work directory of the model attacked without a defence"),
    "aligned": Flag("work directory of the model before the attack"),
    "epsilon": Flag("exported ε (epsilon.safetensors); for layers several with commas"),
    "gguf": Flag("GGUF file: to convert in place of a base, or the model of --base=smollm2"),
    "checkpoint": Flag("checkpoint folder (…/checkpoints/<step>), several with commas"),
    "label": Flag("names of the models that several sources are runs of, with commas; by default those of their bases"),
    "probe": Flag("number of harmful batches to look at without training", 0),
    "topology": Flag("machine to plan for: v5e:4x4, 2*v5p:2x2x1 (two slices), tpu7x:2x2x1, gpu:h100x8 …"),
    "search": Flag("try meshes, batch sizes and remat policies; the cheapest that fits comes first", False),
    "explain": Flag("print where the time of a compiled step goes: by scope, and the three largest operations", False),
    "price": Flag("dollars a chip-hour; 0: of the table that comes with the package", 0.0),
    "out": Flag("folder to write: of convert a Hugging Face folder, of layers and report one in place of their own"),
    "gate": Flag("JSON file of bounds, in place of config.gate"),
    "signed_by": Flag("public key of minisign by which every stage has to be signed"),
    "over": Flag("what a sweep goes over, KEY=A,B,C or KEY=LOW..HIGH[:N, :logN or :log]; several times for several keys", []),
    "sampler": Flag("grid, random, tpe or nsga2; in place of config.sweep.sampler"),
    "trials": Flag("runs of a sampler that draws; in place of config.sweep.trials", 0),
    "list": Flag("print one command for each run, for xargs or a scheduler's array", False),
    "index": Flag("number of the only run that is wanted, from 1 on", 0),
    "adapter": Flag("PEFT folder to push or to try; try answers without it as --workdir does"),
    "to": Flag("repository to push to, owner/name; the token is HF_TOKEN of the environment"),
    "public": Flag("for everyone to see; without it a new repository is private", False),
    "show_records": Flag("show texts of records, in errors and in the end of a run or report; else only numbers and hashes", False),
    "profile": Flag("record steps with jax.profiler, STEP:COUNT, into WORKDIR/<stage>/profile"),
    "print": Flag("name of the script; without it all names are listed"),
}

# Where a process stands among several; without them the launcher's environment says so.
PROCESS_FLAGS = {
    "coordinator": "HOST:PORT of process 0, the same for all; auto on a TPU slice",
    "num_processes": "how many there are",
    "process_id": "which one this is, 0 …",
}
