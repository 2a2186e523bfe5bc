"""The model of an OpenAI-compatible server, such as ``vllm serve``. Needs the package openai.

The API key is taken from OPENAI_API_KEY; a server without authentication needs none.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_qad.data.generation_identity import model_files
from megatron_qad.engine.errors import QADError

SERVER_FIELDS = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
"""Fields of a request that switch off other limits than temperature and top-p, as vLLM and SGLang name them. Without
them a server takes the limits of the model's generation_config.json, which change the distribution."""
_RETRIES = 8
"""Retries of a request after a failed connection, a full server or an error of it: two minutes in all."""
_TIMEOUT = 3600.0
"""Seconds that one answer may take."""


@dataclass(frozen=True)
class OpenAIServer:
    """A server and one of its models."""

    url: str
    client: Any
    """``openai.OpenAI``."""
    error: type[Exception]
    """Base class of the errors of ``client``."""
    model: str
    root: str | None
    """Path from which the server loaded the model, if it tells."""

    def identity(self) -> dict[str, Any]:
        """Return the model's name and the sums of its files, or, unless they are on this machine, its path."""
        if self.root is not None and Path(self.root).is_dir():
            return {"model": self.model, "model files": model_files(self.root)}
        return {"model": self.model, "root": self.root}


def find_server(url: str, name: str | None = None) -> OpenAIServer:
    """Connect to a server and find its model.

    Args:
        url: base URL with the version, such as ``http://localhost:8000/v1``.
        name: the model's name on the server; None if it serves only one.

    Raises:
        QADError: the package openai is missing, or the server does not answer or does not serve the model.
    """
    try:
        import openai
    except ImportError as error:
        raise QADError("--server needs the package openai: pip install 'megatron_qad[data]'.") from error
    key = os.environ.get("OPENAI_API_KEY", "none")
    client = openai.OpenAI(base_url=url, api_key=key, max_retries=_RETRIES, timeout=_TIMEOUT)
    try:
        models = {model.id: model for model in client.with_options(max_retries=2, timeout=30).models.list()}
    except openai.OpenAIError as error:
        raise QADError(
            f"--server {url} does not list its models: {error_text(error)}. Expected the base URL of an "
            "OpenAI-compatible API, such as http://localhost:8000/v1."
        ) from error
    found = name if name is not None or len(models) != 1 else next(iter(models))
    if found not in models:
        wanted = f"not {name!r}" if name else "so --served-model must name one"
        raise QADError(f"--server {url} serves {', '.join(models) or 'no model'}, {wanted}.")
    root = getattr(models[found], "root", None)
    return OpenAIServer(url, client, openai.OpenAIError, found, root if isinstance(root, str) else None)


def error_text(error: Exception) -> str:
    """Return the class and the beginning of the message of an error, without a full stop."""
    return f"{type(error).__name__}: {' '.join(str(error).split()):.300}".rstrip(".")
