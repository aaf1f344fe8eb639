"""Reward of 1 if an answer keeps the constraint that its prompt names, and 0 if not; checks like those of IFEval.

Columns of a row, besides `prompt`: `constraint` and `value`, as docs/tasks/make_data.py writes them.
"""

import re


def reward(prompts, completions, constraint, value, **columns):
    rewards = []
    for completion, kind, wanted in zip(completions, constraint, value, strict=True):
        text = completion[-1]["content"].strip()
        if kind == "sentences":
            kept = len(re.findall(r"[.!?]+(?=\s|$)", text)) == int(wanted)
        elif kind == "lower case":
            kept = text != "" and text == text.lower()
        elif kind == "ending":
            kept = text.endswith(wanted)
        elif kind == "word":
            kept = re.search(rf"\b{re.escape(wanted)}\b", text, re.IGNORECASE) is not None
        else:
            raise ValueError(f"no such constraint: {kind}")
        rewards.append(float(kept))
    return rewards
