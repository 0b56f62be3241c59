"""Our model behind the interface of lm-evaluation-harness (``pip install 'panacea_jax[harness]'``), for its tasks.

Nothing else imports this file, and the package does without ``lm_eval``. Texts are tokenised, cut and given their prefix as the
harness's own ``hf`` model does, so figures can be compared with its.
"""

from collections.abc import Sequence
from typing import Any

from lm_eval import utils
from lm_eval.api.model import TemplateLM

from panacea_jax.errors import InputError
from panacea_jax.evaluate.judges.reading import max_positions
from panacea_jax.generate.decode import GREEDY, generate
from panacea_jax.generate.likelihood import log_likelihoods
from panacea_jax.generate.sample import Sampling
from panacea_jax.models.model import Model

# Of a request to generate; anything else would be ignored, so it is refused.
KNOWN = ("until", "max_gen_toks", "do_sample", "temperature", "top_p")


class HarnessModel(TemplateLM):
    """What ``lm_eval.simple_evaluate(model=…)`` takes::

        model = pj.load(folder)
        params = pj.lora.load("run/finetune/adapter", model)
        lm_eval.simple_evaluate(HarnessModel(model, load_tokenizer(folder), params), tasks=["arc_easy"])
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Any,
        params: Any = None,
        *,
        batch_size: int = 16,
        max_length: int = 0,
        max_gen_toks: int = 256,
        stop_token_ids: Sequence[int] = (),
    ) -> None:
        """
        Args:
            model: base.
            tokenizer: of its folder.
            params: adapter, complete weights, or None.
            batch_size: rows read or decoded together.
            max_length: most tokens of a text; 0: the positions that the model was made for.
            max_gen_toks: tokens of an answer where the task does not say.
            stop_token_ids: what ends an answer besides the tokenizer's end token.

        Raises:
            InputError: ``max_length`` is 0 and the model's folder does not say it.
        """
        super().__init__()
        if not max_length:
            if model.folder is None:
                raise InputError("max_length is not set, and the model is of no folder that says it")
            max_length = max_positions(model.folder)
        self.tokenizer, self.max_length = tokenizer, max_length
        self._model, self._params, self._batch_size = model, params, batch_size
        self._max_gen_toks = max_gen_toks
        self._ends = sorted({int(tokenizer.eos_token_id), *stop_token_ids})

    @property
    def eot_token_id(self) -> int:
        """The tokenizer's end token."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has nothing before it: the beginning token, else the end token."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def tokenizer_name(self) -> str:
        """For the harness's caches of requests."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Ids with the tokenizer's special tokens, unless the text brings its beginning token along (a chat template's does)."""
        if add_special_tokens is None:
            begin = self.tokenizer.bos_token
            add_special_tokens = not (begin and string.startswith(begin))
        ids = self.tokenizer(string, add_special_tokens=add_special_tokens, verbose=False).input_ids
        return list(ids)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The text of a chat, ready for an answer or to go on with its last turn."""
        return str(
            self.tokenizer.apply_chat_template(
                chat_history, tokenize=False, add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )  # fmt: skip

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """Contexts too long lose their beginning. Of a continuation all tokens count."""
        texts, starts = [], []
        for _request, context, continuation in requests:
            if not context or not continuation or len(continuation) > self.max_length:
                raise InputError(
                    f"lm_eval: a request of {len(context)} tokens and {len(continuation)} to be scored: there must be both, the latter "
                    f"at most {self.max_length}"
                )
            texts.append((context + continuation)[-(self.max_length + 1) :])
            starts.append(len(texts[-1]) - len(continuation))
        found = log_likelihoods(
            self._model, self._params, texts, starts, batch_size=self._batch_size
        )
        for (request, *_ids), answer in zip(requests, found):
            if request is not None:
                self.cache_hook.add_partial("loglikelihood", request, answer)
        return found

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in windows where they are longer than the model."""
        windows: list[tuple[None, list[int], list[int]]] = []
        counts = []
        for request in requests:
            (text,) = request.args
            found = utils.get_rolling_token_windows(
                self.tok_encode(text), self.prefix_token_id, max_seq_len=self.max_length, context_len=1
            )  # fmt: skip
            pairs = [utils.make_disjoint_window(pair) for pair in found]
            windows += [(None, *pair) for pair in pairs]
            counts.append(len(pairs))
        values = iter(self._loglikelihood_tokens(windows))
        totals = [sum(next(values)[0] for _ in range(count)) for count in counts]
        for request, total in zip(requests, totals):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Answers, cut before the first of the texts in ``until``; contexts too long lose their beginning.

        Decoding goes on to the end token or the length and is cut afterwards.

        Raises:
            InputError: a way of decoding that we do not have.
        """
        answers = [""] * len(requests)
        groups: dict[tuple[int, Sampling], list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(self._how(request.args[1]), []).append(i)
        for (length, sampling), places in groups.items():
            room = self.max_length - length
            if room < 1:
                raise InputError(
                    f"lm_eval: max_gen_toks = {length} leaves no room for a prompt in {self.max_length} tokens"
                )
            prompts = [self.tok_encode(requests[i].args[0])[-room:] for i in places]
            for place, tokens, _ in generate(
                self._model, self._model.weights, self._params, prompts,
                batch_size=self._batch_size, max_new_tokens=length, eos_ids=self._ends, pad_id=0,
                sampling=sampling, indices=places,
            ):  # fmt: skip
                i = places[place]
                text = str(self.tokenizer.decode(tokens, skip_special_tokens=True))
                for stop in _until(requests[i].args[1]):
                    text = text.partition(stop)[0]
                answers[i] = text
        for request, answer in zip(requests, answers):
            self.cache_hook.add_partial("generate_until", request.args, answer)
        return answers

    def _how(self, kwargs: dict[str, Any]) -> tuple[int, Sampling]:
        """Length and way of decoding that a request asks for."""
        for key in kwargs:
            if key not in KNOWN:
                raise InputError(f"lm_eval: generation_kwargs: {key} is not one of {', '.join(KNOWN)}")
        length = int(kwargs.get("max_gen_toks", self._max_gen_toks))
        temperature = float(kwargs.get("temperature") or 0.0)
        if not kwargs.get("do_sample", temperature > 0):
            return length, GREEDY
        return length, Sampling(temperature or 1.0, float(kwargs.get("top_p", 1.0)))


def _until(kwargs: dict[str, Any]) -> list[str]:
    until = kwargs.get("until") or []
    return [stop for stop in ([until] if isinstance(until, str) else until) if stop]
