"""Reward of 1 if the last number of an answer is that of the column `answer`, and 0 if not.

1,234 and 1234.0 are the same; an `answer` in the form of GSM8K has its number after "####".
"""

import re

NUMBER = r"(?<![\d.])-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?"


def reward(prompts, completions, answer, **columns):
    rewards = []
    for completion, right in zip(completions, answer, strict=True):
        said = numbers_in(completion[-1]["content"])
        rewards.append(float(said != [] and said[-1] == numbers_in(str(right).split("####")[-1])[-1]))
    return rewards


def numbers_in(text):
    return [float(number.replace(",", "")) for number in re.findall(NUMBER, text)]
