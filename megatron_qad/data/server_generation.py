"""Sampling of documents from an OpenAI-compatible server, such as ``vllm serve``.

Requests run at the same time, and the lines are written in the order of their numbers. A server computes a request in
batches of its own, so a second run with the same seeds can give other texts. See ``openai_server``.
"""

import itertools
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from megatron_qad.data.generate import GenerateOptions
from megatron_qad.data.generation_identity import prompts_digest
from megatron_qad.data.openai_server import SERVER_FIELDS, error_text, find_server
from megatron_qad.data.prompts import Prompt
from megatron_qad.engine.errors import QADError

_FINISH = {"stop": "eos", "length": "length"}


class ServerModel:
    """A source of documents (``generate.Source``): a model behind an OpenAI-compatible API.

    Args:
        url: base URL with the version, such as ``http://localhost:8000/v1``.
        prompts: one per document, rendered by the server; None starts from BOS alone.
        options: see ``GenerateOptions``; ``batch_size`` requests run at the same time, and ``dtype`` has no effect.
        name: the model's name on the server; None if it serves only one.
        bos: id of the BOS token, needed without prompts.
        fields: additional fields of every request.

    Raises:
        QADError: the package openai is missing, or the server does not answer or does not serve the model.
            ``documents`` raises it if the server fails or rejects a request.
    """

    batch_size = 1
    """Each document can be drawn alone."""

    def __init__(
        self,
        url: str,
        prompts: Sequence[str | Prompt] | None,
        options: GenerateOptions,
        name: str | None = None,
        bos: int | None = None,
        fields: Mapping[str, Any] = SERVER_FIELDS,
    ):
        if prompts is None and bos is None:
            raise QADError("Without prompts a server needs the id of the BOS token: pass --model with the tokenizer.")
        self._options, self._bos, self._fields = options, bos, dict(fields)
        self._prompts = None if prompts is None else [Prompt.of(prompt) for prompt in prompts]
        self._server = find_server(url, name)

    def settings(self) -> dict[str, Any]:
        """Return what the server says about its model, the digest of the prompts and the sampling options.

        If the model is a directory of this machine, as it is when the server runs here, the sums of its files, too.
        """
        names = ("max_new_tokens", "temperature", "top_p", "seed")
        settings = self._server.identity() | {"prompts": prompts_digest(self._prompts), "fields": self._fields}
        return settings | {name: getattr(self._options, name) for name in names}

    def documents(self, first: int, end: int) -> Iterator[dict[str, Any]]:
        """Yield the lines of documents ``first`` to ``end - 1`` in order, with a window of requests in flight."""
        waiting, numbers = deque(), iter(range(first, end))
        pool = ThreadPoolExecutor(self._options.batch_size)
        try:
            for number in itertools.islice(numbers, 2 * self._options.batch_size):
                waiting.append(pool.submit(self._document, number))
            while waiting:
                yield waiting.popleft().result()
                for number in itertools.islice(numbers, 1):
                    waiting.append(pool.submit(self._document, number))
        except self._server.error as error:
            raise QADError(
                f"--server {self._server.url}: {error_text(error)}. What is complete is written. "
                "Start the command again to resume."
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _document(self, number: int) -> dict[str, Any]:
        options = self._options
        sampling = {"temperature": options.temperature, "top_p": options.top_p, "seed": options.seed + number}
        if self._prompts is None:
            # The text keeps its special tokens (an option of vLLM and SGLang): tokenizing it restores them.
            answer = self._server.client.completions.create(
                model=self._server.model,
                prompt=[self._bos],
                max_tokens=options.max_new_tokens,
                extra_body=self._fields | {"skip_special_tokens": False},
                **sampling,
            ).choices[0]
            return {"text": answer.text, "finish": self._finish(answer.finish_reason)}
        prompt = self._prompts[number % len(self._prompts)]
        answer = self._server.client.chat.completions.create(
            model=self._server.model,
            messages=prompt.messages,
            max_tokens=options.max_new_tokens,
            extra_body=self._fields,
            **sampling,
        ).choices[0]
        turn = {"role": "assistant", "content": answer.message.content or ""}
        # Servers with a reasoning parser return the thought apart; vLLM has used both names.
        for key in ("reasoning_content", "reasoning"):
            if thought := getattr(answer.message, key, None):
                turn["reasoning_content"] = thought
        return {**prompt.fields, "messages": [*prompt.messages, turn], "finish": self._finish(answer.finish_reason)}

    def _finish(self, reason: str | None) -> str:
        if reason not in _FINISH:
            raise QADError(
                f"--server {self._server.url}: an answer ended with {reason!r}, expected {' or '.join(_FINISH)}."
            )
        return _FINISH[reason]
