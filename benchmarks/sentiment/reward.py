"""The true reward: VADER's compound score of an answer, from -1 (negative) to 1 (positive), whatever the prompt.

python dpo.py --judge-name-or-path benchmarks/sentiment/reward.py ...
"""

from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer


def reward(prompts, completions, **columns):
    analyzer = SentimentIntensityAnalyzer()
    texts = [text if isinstance(text, str) else text[-1]["content"] for text in completions]
    return [analyzer.polarity_scores(text)["compound"] for text in texts]
