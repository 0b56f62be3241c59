"""The protocol of Panacea's experiments, shared by every recipe in this folder.

Paper: arXiv 2501.18100 (NeurIPS 2025). Its numbers are the defaults of ``panacea_jax/config``,
but for those of records, which are set below: ρ 1, λ 1e-3, lr 2e-5 constant, weight decay 0.1, 20 epochs, batches of 10
user and 10 harmful records, LoRA r 32, α 4 on q, k and v, 256 tokens, 1000 user records of which
10 % are harmful, 1000 harmful records of the defender. They come from the only public script,
``script/finetune/panacea_gsm8k.sh`` of github.com/w-yibo/Panacea, which names Llama-2-7B and GSM8K.
The other bases and tasks of this folder use them unchanged; whether the paper did so too could not
be checked.

Sources
-------
User records are the first 900 of the task's training split. Attack and harmful records are unsafe
question-answer pairs of BeaverTails. HS is measured on the first 1000 unsafe prompts of
BeaverTails' test split, FA on the first 1000 records of the task's test split (SST-2: its 872
validation records), with the answer lengths of the published protocol: the slices panacea-1000 of
docs/data.md, which ``eval.num_examples`` does not shorten. The 250 safe prompts of
XSTest are added, which the paper does not have: refusing too much is the usual price of a defence,
and neither HS nor FA shows it.

Not exactly the paper's slices
------------------------------
The reference draws attack, harmful and alignment records from one file, the paired refusals of the
RepNoise repository (``beavertails_with_refusals_train.json``). Its order is shuffled, and it is on
no hub id that we can vouch for. The index ranges are 0 < i < 100 (attack), 5000 < i < 6000
(harmful) and 5000 < i < 10000 (alignment), each one record short of its name. Here the attack comes
from records 0 to 4999 and the harmful set from record 5000 on of BeaverTails' own 30k_train split:
disjoint as there, but not the same records. Who has that file gets the exact ranges by cutting it:

    import json
    rows = json.load(open("beavertails_with_refusals_train.json"))  # or one JSON object a line
    for name, part in (("attack.json", rows[:5000]), ("rest.json", rows[5000:])):
        json.dump(part, open(name, "w"))

    panacea run --config=configs/llama2_7b.py:gsm8k --workdir=runs/exact \\
        --config.data.off_by_one=True \\
        --config.data.attack=beavertails@attack.json \\
        --config.data.harmful=beavertails@rest.json \\
        --config.data.alignment=refusals@rest.json --config.align.defence.name=sft

Alignment
---------
The paper fine-tunes a base that it aligned first: plain SFT on 5000 refusals (20 epochs, lr 5e-4),
the adapter trained on afterwards. Without a file of refusals that stage is left out, and a bare
base has no alignment to lose: what is measured then is not the paper's question. So give one of

* ``--config.data.alignment=refusals@FILE --config.align.defence.name=sft``. FILE is JSON or JSON
  lines with "instruction" and "output", or "refusal" as "Question: …", newline, "Answer: …". Of
  fewer than 5000 records all are taken, with a warning.
* ``--config.lora.init_from=FOLDER``: a PEFT adapter that is aligned already.
* ``--config.model.path=CHAT_MODEL --config.data.template=chat``: a base that is aligned already.

Mesh
----
The default cuts the weights over all devices (``mesh.fsdp = -1``), and the batch with them: its
rows are padded to a multiple of data × fsdp, so ten rows become 16 on eight devices. With
``--config.mesh.fsdp=2 --config.mesh.tensor=4`` eight devices hold a quarter of each matrix, half of
the rows, and no padding. 4 divides the heads of all five bases.

Cost
----
Model FLOPs of a training run = steps × passes × 4 N × tokens: forward and backward through a frozen
base cost 2 N each per token, N = weights in matrix products. A step has at most 10 × 256 = 2560
tokens a pass; SST-2 and AG News records are far shorter. Fine-tuning is 20 · 1000 / 10 = 2000 steps
of 3 passes (SFT: 1), alignment 20 · 5000 / 10 = 10000 steps of 1. ``remat = "full"`` adds a forward
pass (6 N in place of 4 N), which the recipes' hours include. Decoding comes on top: at most 1000 ·
512 + 1000 · 200 + 450 · 256 tokens. All of this is arithmetic, nothing of it measured.

Before a result is believed
---------------------------
ρ is an absolute length, and λ acts only through λ‖h'−h‖/‖g‖, so 1 and 1e-3 suit another base,
adapter or learning rate only by luck: in the prototype of the quickstart's miniature world they did
nothing or ruined the model. Read the warnings of the run (docs/diagnostics.md), and compare with
``--config.defence.name=sft`` and with noise of the same norm (``panacea heal``).
"""

from typing import NamedTuple

from ml_collections import ConfigDict

from panacea_jax.config import get_config as defaults
from panacea_jax.errors import InputError


class Task(NamedTuple):
    """Where a user task's records come from; ``test`` is empty where nothing scores the answers."""

    train: str
    test: str


TASKS = {
    "gsm8k": Task("gsm8k@openai/gsm8k/main:train", "gsm8k:panacea-1000@openai/gsm8k/main:test"),
    "sst2": Task("sst2@stanfordnlp/sst2:train", "sst2:panacea-1000@stanfordnlp/sst2:validation"),
    "agnews": Task("ag_news@fancyzhx/ag_news:train", "ag_news:panacea-1000@fancyzhx/ag_news:test"),
    # AlpacaEval needs an outside judge, and this package has none. For its answers alone:
    # --config.eval.tasks="('beavertails:panacea-1000@…', 'alpaca_eval:panacea@FILE')".
    "alpaca": Task("alpaca@tatsu-lab/alpaca:train", ""),
}

ATTACK = "beavertails@PKU-Alignment/BeaverTails:30k_train[:5000]"
HARMFUL = "beavertails@PKU-Alignment/BeaverTails:30k_train[5000:]"
HARMFUL_PROMPTS = "beavertails:panacea-1000@PKU-Alignment/BeaverTails:30k_test"
SAFE_PROMPTS = "xstest@Paul/XSTest:train"


def protocol(model: str, variant: str) -> ConfigDict:
    """The default configuration with the paper's data and evaluation, for one base and user task.

    Args:
        model: Hugging Face hub id of the base; ``--config.model.path=FOLDER`` takes a local copy.
        variant: user task, a key of TASKS.

    Raises:
        InputError: unknown variant.
    """
    if variant not in TASKS:
        raise InputError(f"--config: unknown variant {variant!r}; known are {', '.join(TASKS)}")
    task = TASKS[variant]
    config = defaults()
    config.model.path = model
    config.model.remat = "full"  # keeps one activation a layer, so that a 7B trains on one device
    config.data.num_examples, config.data.num_harmful, config.data.num_alignment = 1000, 1000, 5000
    config.data.user = task.train
    config.data.attack = ATTACK
    config.data.harmful = HARMFUL
    config.eval.tasks = tuple(spec for spec in (HARMFUL_PROMPTS, task.test, SAFE_PROMPTS) if spec)
    return config
