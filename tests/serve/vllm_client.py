"""Asks a running ``vllm serve`` through the OpenAI client, as its users do. Runs in the serving environment.

    python vllm_client.py PORT MODEL QUESTION TOKENS.json OUTPUT.json

Writes the answer to a chat with QUESTION, and the log-probabilities of the prompt TOKENS.json, a list of token ids.
"""

import json
import sys
from pathlib import Path

from openai import OpenAI


def main(port: str, model: str, question: str, tokens: str, output: str) -> None:
    client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=120)
    # No temperature and no length: they come from the model's generation config.
    chat = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": question}], extra_body={"return_token_ids": True}
    )
    prompt = client.completions.create(
        model=model,
        prompt=json.loads(Path(tokens).read_text()),
        max_tokens=1,
        temperature=0,
        extra_body={"prompt_logprobs": -1},
    )
    answer = {
        "models": [served.id for served in client.models.list()],
        "prompt_tokens": chat.prompt_token_ids,
        "answer_tokens": chat.choices[0].token_ids,
        "answer": chat.choices[0].message.content,
        "finish_reason": chat.choices[0].finish_reason,
        "prompt_logprobs": [
            entries and {token: entry["logprob"] for token, entry in entries.items()}
            for entries in prompt.choices[0].prompt_logprobs
        ],
    }
    Path(output).write_text(json.dumps(answer))


if __name__ == "__main__":
    main(*sys.argv[1:])
