"""A reward for grpo.py on the test bed: the annotator's probability that an answer is better than the row's chosen one.

The annotator is that of oaif.py, asked the same question in both orders, so that both methods have the same source.
"""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

QUESTION = """Prefer the more positive review.

Request: {}

Answer 1:
{}

Answer 2:
{}

Which answer is better? Reply with 1 or 2."""
FOLDER = Path(__file__).parent / "annotator"  # read again at each call, which is quick for a model this small
MODEL, TOKENIZER = AutoModelForCausalLM.from_pretrained(FOLDER, dtype="float32"), AutoTokenizer.from_pretrained(FOLDER)


def reward(prompts, completions, chosen, **columns):
    rewards = []
    for prompt, completion, other in zip(prompts, completions, chosen, strict=True):
        request, ours, theirs = prompt[-1]["content"], completion[-1]["content"], other[-1]["content"]
        first = probability_of_1(QUESTION.format(request, ours, theirs))
        second = probability_of_1(QUESTION.format(request, theirs, ours))
        rewards.append((first + 1 - second) / 2)
    return rewards


@torch.no_grad()
def probability_of_1(question):
    messages = [{"role": "user", "content": question}]
    ids = TOKENIZER.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt").input_ids
    one, two = TOKENIZER.convert_tokens_to_ids(["1", "2"])
    logits = MODEL(ids).logits[0, -1]
    return torch.sigmoid(logits[one] - logits[two]).item()
