"""Which prompt is in which row of the batch, on the host: longest first, a group of one bucket at a time."""

import itertools
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

import numpy as np

# Prompts read together, and tokens decoded between two looks at which rows have ended.
ADMITTED, CHUNK = 8, 16
# Tokens that prompts must have in common for these to be kept apart.
WORTH_SHARING = 16


class Answer(NamedTuple):
    """A text that has ended.

    Attributes:
        prompt: place of its prompt.
        tokens: ids up to and without the end token.
        finished: whether it ended by one.
    """

    prompt: int
    tokens: list[int]
    finished: bool


class Group(NamedTuple):
    """Prompts that are read together.

    Attributes:
        prompts: their places.
        rows: of the batch, one for each.
        width: tokens that they are padded to.
    """

    prompts: list[int]
    rows: list[int]
    width: int


def common_prefix(prompts: Sequence[Sequence[int]]) -> int:
    """How many tokens all prompts begin with, leaving each at least one of its own; 0 where they are too few to be worth it."""
    first, last = min(map(list, prompts)), max(map(list, prompts))
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, last))
    found = min(sum(1 for _ in same), min(map(len, prompts)) - 1)
    return found if found >= WORTH_SHARING else 0


def prompt_bucket(length: int) -> int:
    """Length that a prompt is padded to: 16, 24, 32, 48, 64, 96 … (below 16 a compilation would cost more than padding)."""
    power = max(16, 1 << (length - 1).bit_length())
    return power * 3 // 4 if power > 16 and length <= power * 3 // 4 else power


class Schedule:
    """The rows of a batch as the host sees them.

    Attributes:
        most: tokens of the longest text, prompt and answer.
    """

    def __init__(
        self, prompts: Sequence[Sequence[int]], rows: int, admitted: int, max_new_tokens: int
    ) -> None:
        """
        Args:
            prompts: token ids of each.
            rows: of the batch.
            admitted: prompts that are read together at most.
            max_new_tokens: most tokens to add.
        """
        self._lengths = [len(prompt) for prompt in prompts]
        self._admitted, self._new = admitted, max_new_tokens
        self._queue = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        self._texts: dict[int, list[int]] = {}
        self._prompt_in = np.full(rows, -1)
        self._left = np.zeros(rows, np.int32)
        self._settled, self._end = np.zeros(rows, int), np.zeros(rows, int)
        self.most = self._lengths[self._queue[0]] + max_new_tokens

    def __bool__(self) -> bool:
        """Whether a text is not ended yet."""
        return bool(self._queue) or bool(self._left.any())

    def admit(self) -> Iterator[Group]:
        """Give free rows to the next prompts, once as many are free as are read together."""
        free = np.flatnonzero(self._left == 0).tolist()
        ready = len(free) >= min(self._admitted, len(self._queue))
        while ready and self._queue and free:
            width = prompt_bucket(self._lengths[self._queue[0]])
            near = self._queue[: min(self._admitted, len(free))]
            group = [i for i in near if prompt_bucket(self._lengths[i]) == width]
            self._queue = self._queue[len(group) :]
            rows, free = free[: len(group)], free[len(group) :]
            self._prompt_in[rows], self._left[rows] = group, self._new
            self._settled[rows] = [self._lengths[i] - 1 for i in group]
            self._end[rows] = self._settled[rows] + self._new
            self._texts |= {i: [] for i in group}
            yield Group(group, rows, width)

    def slots(self) -> int:
        """Slots that the next chunk needs; a row that ends needs none."""
        return int(np.minimum(self._settled + CHUNK, self._end)[self._left > 0].max())

    def take(self, out: np.ndarray, left: np.ndarray, ends: Collection[int]) -> Iterator[Answer]:
        """Take in a chunk of tokens; what has ended comes out.

        Args:
            out: new tokens ``[B, N]``, -1 behind a row's end.
            left: tokens that each row may still add.
            ends: ids that end a text.
        """
        for row in np.flatnonzero(self._left).tolist():
            self._texts[self._prompt_in[row]] += [t for t in out[row].tolist() if t >= 0]
        ended = np.flatnonzero((self._left > 0) & (left == 0)).tolist()
        self._left = np.array(left)
        self._settled += CHUNK  # of those that go on
        for row in ended:
            text = self._texts.pop(self._prompt_in[row])
            finished = text[-1] in ends
            yield Answer(int(self._prompt_in[row]), text[:-1] if finished else text, finished)
