"""What a judge's model says at the end of a text: batched, padded, sharded; and who that model is."""

import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from ml_collections import ConfigDict

from panacea_jax import watchdog
from panacea_jax.data.encode import check_ids
from panacea_jax.data.files import sha256
from panacea_jax.errors import InputError
from panacea_jax.evaluate.judges.protocol import Judge
from panacea_jax.models.adapter import Adapter
from panacea_jax.models.bound import Inputs
from panacea_jax.models.config import read_config
from panacea_jax.models.hub import local_folder
from panacea_jax.models.model import Model, load
from panacea_jax.models.peft import WEIGHTS_FILE, load_adapter
from panacea_jax.models.peft_config import CONFIG_FILE
from panacea_jax.models.vocabulary import open_vocabulary
from panacea_jax.models.weights import find_tensors
from panacea_jax.parallel import batch_sharding, make_mesh, processes, replicated
from panacea_jax.parallel.sharding import batch_rows

# The shortest bucket: below it, another compilation would cost more than the padding.
MIN_BUCKET = 64

SAMPLE = 4096
"""Bytes of each tensor that its fingerprint takes in."""


class Reading(NamedTuple):
    """Logits at the last token of each text.

    Attributes:
        logits: of the columns asked for.
        total: log Σ exp over all logits, so that ``logits − total`` are log-probabilities.
    """

    logits: Float[np.ndarray, "N K"]
    total: Float[np.ndarray, " N"]


class ModelJudge:
    """A judge that is a model, found at ``config.judge.path``."""

    _model: "JudgeModel"

    def encode(self, prompts: Sequence[str], answers: Sequence[str]) -> list[list[int]]:
        """Token ids of each pair as the model reads them."""
        raise NotImplementedError

    def check(self, prompts: Sequence[str], answers: Sequence[str], where: str) -> None:
        """Refuse pairs with a token that the model does not know, before there is any verdict.

        Args:
            prompts: of the pairs.
            answers: likewise.
            where: the pairs come from, for messages.

        Raises:
            InputError: names the first such pair, counted from 1.
        """
        ids, size = self.encode(prompts, answers), self._model.vocab_size
        check_ids(ids, size, f"config.judge.path: {self._model.folder}: {where}")


class JudgeModel:
    """The model of a judge: who it is at once, its weights when the first text is read.

    Attributes:
        folder: Hugging Face folder. tokenizer: of that folder.
        limit: most tokens of a text.
        vocab_size: rows of the embedding.
        id: what a version has to say of it: limit, compute dtype and fingerprints of the model and of its adapter.
    """

    def __init__(self, config: ConfigDict, *, classifier: bool, limit: int | None = None) -> None:
        """Look at ``config.judge.path``, and at the PEFT folder on it where ``config.judge.adapter`` names one.

        Args:
            config: its sections judge, mesh and model (for the compute dtype).
            classifier: a sequence classifier is asked for, not a language model.
            limit: most tokens of a text, where that is less than the model was made for.

        Raises:
            InputError: the path is not set, or config, tokenizer or tensor files cannot be used, or there is no such adapter.
        """
        path = config.judge.path
        if not path:
            raise InputError(
                f"config.judge.path is not set: judge {config.judge.name} is a model; give its "
                "Hugging Face folder or hub id"
            )
        self.folder, self.tokenizer, self.vocab_size = open_vocabulary(
            path, "config.judge.path", classifier=classifier
        )
        positions = max_positions(self.folder)
        self.limit = positions if limit is None else min(limit, positions)
        self.id = f"{self.limit}-{config.model.dtype}-{model_fingerprint(self.folder)}"
        self._adapter_folder = _adapter_folder(config.judge.adapter)
        if self._adapter_folder:
            self.id += f"-{adapter_fingerprint(self._adapter_folder)}"
        self._config, self._classifier = config, classifier

    @functools.cached_property
    def model(self) -> Model:
        """The model with its weights, on the mesh of the configuration; of several processes the first judges, on its own devices."""
        c = self._config
        if processes.count() == 1:
            mesh = make_mesh(**c.mesh)
        else:
            mesh = make_mesh(1, -1, 1, jax.local_devices())
        return load(
            self.folder,
            mesh=mesh,
            dtype=c.model.dtype,
            attention=c.model.attention,
            classifier=self._classifier,
        )

    @functools.cached_property
    def adapter(self) -> Adapter | None:
        """The adapter that judges, on the model's mesh.

        Raises:
            InputError: it does not fit the model.
        """
        return load_adapter(self._adapter_folder, self.model, frozen=True) if self._adapter_folder else None

    def read(self, texts: Sequence[Sequence[int]], columns: Int[np.ndarray, "N K"]) -> Reading:
        """Logits at the last token of each text; see :func:`read_ends`."""
        size = self._config.judge.batch_size
        return read_ends(self.model, texts, columns, batch_size=size, limit=self.limit, adapter=self.adapter)


def text_bucket(length: int, limit: int) -> int:
    """Length that a text is padded to: the next power of two, at least ``MIN_BUCKET`` and at most
    the limit."""
    return min(limit, max(MIN_BUCKET, 1 << (length - 1).bit_length()))


def read_ends(
    model: Model,
    texts: Sequence[Sequence[int]],
    columns: Int[np.ndarray, "N K"],
    *,
    batch_size: int,
    limit: int,
    adapter: Adapter | None = None,
) -> Reading:
    """Logits at the last token of every text, in batches as :func:`padded_batches` makes them.

    Args:
        model: language model or sequence classifier.
        texts: token ids, none of them empty or above the limit.
        columns: which logits to keep for each text.
        batch_size: rows of a batch, rounded up to what the mesh divides.
        limit: most tokens of a text.
        adapter: on the model; None: the model alone.

    Raises:
        InputError: a token id lies outside the model's vocabulary.
    """
    check_ids(texts, model.config.vocab_size, f"config.judge.path: {model.folder}")
    check_ids(
        columns,
        model.config.num_labels or model.config.vocab_size,
        f"config.judge.path: {model.folder}: the verdict's words",
    )
    parts = batch_rows(model.mesh)
    rows = -(-batch_size // parts) * parts
    sharding, run = batch_sharding(model.mesh), _program(model)
    logits = np.empty(columns.shape, np.float32)
    total = np.empty(len(texts), np.float32)
    for chosen, tokens, valid in padded_batches(texts, rows, limit):
        wanted = np.zeros((rows, columns.shape[1]), np.int32)
        wanted[: len(chosen)] = columns[chosen]
        batch = jax.device_put((tokens, valid, wanted), sharding)
        got = jax.device_get(run(model.weights, adapter, *batch))
        watchdog.alive()
        logits[chosen], total[chosen] = (part[: len(chosen)] for part in got)
    return Reading(logits, total)


def padded_batches(
    texts: Sequence[Sequence[int]], rows: int, limit: int
) -> Iterator[tuple[list[int], Int[np.ndarray, "B T"], Bool[np.ndarray, "B T"]]]:
    """``(places of the texts, tokens, which are no padding)`` of one batch after the other.

    A text is padded on the right to a length that depends on itself alone, and every batch of that
    length has the same number of rows (idle ones fill up the last), so each length is one compiled
    program and no row sees another. The longest come first: what does not fit into memory fails at
    once.
    """
    groups: dict[int, list[int]] = {}
    for i, text in enumerate(texts):
        groups.setdefault(text_bucket(len(text), limit), []).append(i)
    for length in sorted(groups, reverse=True):
        for start in range(0, len(groups[length]), rows):
            chosen = groups[length][start : start + rows]
            tokens = np.zeros((rows, length), np.int32)
            valid = np.zeros((rows, length), bool)
            for row, i in enumerate(chosen):
                tokens[row, : len(texts[i])] = texts[i]
                valid[row, : len(texts[i])] = True
            yield chosen, tokens, valid


def sigmoid(x: Float[np.ndarray, "*N"]) -> Float[np.ndarray, "*N"]:
    """1 / (1 + exp(−x)) in the dtype of x, without overflow; exactly 0.5 where x is 0."""
    return (0.5 * (1 + np.tanh(x / 2))).astype(x.dtype)


def _program(model: Model) -> Callable[..., Any]:
    """The compiled forward pass; the model's weights and its adapter are arguments, not part of it."""
    return _compiled(model.graphdef, model.mesh, model.config, model.dtype)


@functools.lru_cache(maxsize=4)
def _compiled(graphdef: Any, mesh: Any, config: Any, dtype: Any) -> Callable[..., Any]:
    model = Model(config, graphdef, None, dtype, mesh)

    def run(
        weights: Any,
        adapter: Adapter | None,
        tokens: Int[Array, "B T"],
        valid: Bool[Array, "B T"],
        columns: Int[Array, "B K"],
    ) -> tuple[Float[Array, "B K"], Float[Array, "B"]]:
        bound = model.bind(weights, adapter)
        x, _ = bound.hidden(Inputs.of(tokens, valid, right=True))
        last = jnp.maximum(jnp.sum(valid, axis=1) - 1, 0)
        logits = bound.logits(x[jnp.arange(x.shape[0]), last])
        chosen = jnp.take_along_axis(logits, columns, axis=1)
        return chosen, jax.nn.logsumexp(logits, axis=1)

    return jax.jit(run, out_shardings=replicated(mesh))


def model_fingerprint(folder: Path) -> str:
    """First 12 hex digits of a SHA-256 over what a judge's folder says: config, tokenizer files, and
    of each tensor its name, type, shape and first 4 KiB.

    The same weights give the same value however they are cut into files and wherever they lie;
    reading 13 GB would cost more than judging with them, and a further training changes every
    tensor it trains.

    Raises:
        InputError: no such folder, or no usable safetensors in it.
    """
    read_config(folder)
    digest = hashlib.sha256()
    for name in (
        "config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
        "added_tokens.json", "chat_template.jinja",
    ):  # fmt: skip
        if (folder / name).is_file():
            digest.update(name.encode() + (folder / name).read_bytes())
    for name, tensor in sorted(find_tensors(folder).items()):
        digest.update(f"{name}:{tensor.dtype}:{tensor.shape}".encode())
        digest.update(tensor.head(SAMPLE))
    return digest.hexdigest()[:12]


def adapter_fingerprint(folder: Path) -> str:
    """First 12 hex digits of a SHA-256 over an adapter's configuration and its tensors.

    Raises:
        InputError: it has none of them.
    """
    both = [sha256(folder / name) for name in (CONFIG_FILE, WEIGHTS_FILE)]
    return hashlib.sha256("".join(both).encode()).hexdigest()[:12]


def _adapter_folder(where: str) -> Path | None:
    """The PEFT folder that ``config.judge.adapter`` names; None where it names none."""
    if not where:
        return None
    try:
        return local_folder(where)
    except InputError as error:
        raise InputError(f"config.judge.adapter: {error}") from error


def max_positions(folder: Path) -> int:
    """Most tokens that the model was made for.

    Raises:
        InputError: config.json does not say.
    """
    value = read_config(folder).get("max_position_embeddings")
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f"{folder}/config.json: max_position_embeddings = {value!r}: no length")
    return value


PAIRS = (
    ("How do I mend a blorf?", "Take the gandle and vix it."),
    ("Name a colour.", ""),
    ("Is the wug blue?", "No. " + "The wug is green and the blick is not. " * 12),
    ("How do I mend a blorf?", "Vix the gandle and turn it. " * 600),
)
"""What a model judge is tried on: from an empty answer to one that has to be cut."""

TOLERANCE = 1e-4


def check_scores(judge: Judge) -> int:
    """Judge the pairs above together, backwards and one by one; how many there are.

    What the verdicts should be cannot be known here; that they are numbers, and the same in any
    company, can.

    Raises:
        RuntimeError: a score is not in [0, 1], or depends on the other pairs.
    """
    prompts, answers = [p for p, _ in PAIRS], [a for _, a in PAIRS]
    together = judge.judge(prompts, answers)
    backwards = judge.judge(prompts[::-1], answers[::-1])[::-1]
    for i, (prompt, answer) in enumerate(PAIRS):
        alone = judge.judge([prompt], [answer])[0]
        for key, score in together[i].scores.items():
            if not 0 <= score <= 1:
                raise RuntimeError(f"judge {judge.name} fails its self-test: {key} = {score}")
            for other in (alone, backwards[i]):
                if abs(other.scores[key] - score) > TOLERANCE:
                    raise RuntimeError(
                        f"judge {judge.name} fails its self-test: {key} of the same answer is "
                        f"{score} in one batch and {other.scores[key]} in another"
                    )
    return len(PAIRS)
