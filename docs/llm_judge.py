"""An LLM behind an OpenAI-compatible endpoint as the judge: it scores each response from 1 to 10.

    pip install openai
    export OPENAI_BASE_URL=http://localhost:8000/v1 OPENAI_API_KEY=none LLM_JUDGE_MODEL=Qwen/Qwen3-4B-Instruct-2507
    vllm serve Qwen/Qwen3-4B-Instruct-2507  # or `transformers serve`; in a terminal and on a GPU of its own
    python dpo.py --judge-name-or-path docs/llm_judge.py

Without OPENAI_BASE_URL the requests go to OpenAI. Each evaluation costs one request per response. Take a model that
answers at once: one that reasons first runs out of tokens before its number.

A reply without exactly one number from 1 to 10 (7, 7.5, 7/10 and "Score: 7" are fine) ends the run with an error that
shows it, since a default in its place would falsify the results. LLMs tend to prefer long responses: watch
eval/response_length too.
"""

import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat

import openai

QUESTION = """Rate the response to this conversation, from 1 (useless) to 10 (could not be better).

<conversation>
{prompt}
</conversation>

<response>
{response}
</response>

Reply with the number alone."""


def reward(prompts, completions, **columns):
    client = openai.OpenAI(timeout=60, max_retries=4)
    try:
        with ThreadPoolExecutor(max_workers=16) as pool:  # map ends at the first error, and cancels the other requests
            return list(pool.map(score, repeat(client), range(len(prompts)), prompts, completions))
    except openai.APIConnectionError as error:
        sys.exit(f"error: the judge at {client.base_url} cannot be reached: {error}")


def score(client, index, prompt, completion):
    if not isinstance(prompt, str):
        prompt = "\n".join([f"{message['role']}: {message['content']}" for message in prompt])
    response = completion if isinstance(completion, str) else completion[0]["content"]
    messages = [{"role": "user", "content": QUESTION.format(prompt=prompt, response=response)}]
    answer = client.chat.completions.create(
        model=os.environ["LLM_JUDGE_MODEL"], messages=messages, temperature=0, max_tokens=16
    )
    reply = answer.choices[0].message.content or ""
    numbers = re.findall(r"-?\d+(?:\.\d+)?", re.sub(r"/ ?10\b", "", reply))
    if len(numbers) != 1 or not 1 <= float(numbers[0]) <= 10:
        raise ValueError(f"response {index}: the judge's reply has no number from 1 to 10, or several: {reply!r}")
    return float(numbers[0])
