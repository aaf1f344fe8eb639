"""Write DIFFS.md: what each script changes of dpo.py.

python benchmarks/diffs.py            # writes the page
python benchmarks/diffs.py --check    # writes nothing, and ends with 1 if the page is not what the scripts give
"""

import difflib
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parent.parent

INTRODUCTION = """\
# The methods as diffs

Each section shows what a method changes of DPO: the diff of its script against [dpo.py](dpo.py), without the docstrings
at the top, with two lines of context and the line numbers of the files. `python benchmarks/diffs.py` writes this page
from the scripts.

| script | method | lines | changed lines |
| --- | --- | --- | --- |
"""

METHODS = {
    "ipo": (
        "Identity Preference Optimisation",
        """\
Only the loss and its flags change, and the heart of it is one line. DPO's log-sigmoid rewards every widening of the
margin `h`, if less and less. IPO's square has its minimum at a finite margin, 1/(2 beta), and pulls back what has gone
beyond it. So beta does not scale a reward here: it sets where `h` comes to rest. `--length-normalize` takes the margin
per token. The logged rewards are DPO's all the same, so that the curves of the two methods can be compared.""",
    ),
    "simpo": (
        "Simple Preference Optimisation",
        """\
There is no reference: `main` has two lines fewer, and nothing is computed for the pairs before training. Two ideas take
its place. The reward of an answer is the mean log-probability of its tokens, so that length by itself earns nothing,
and the chosen answer has to win by a margin gamma. In DPO beta keeps the policy near the model that it started from;
here only a small learning rate and few steps do.""",
    ),
    "kto": (
        "Kahneman-Tversky Optimisation",
        """\
An answer needs no partner: it is marked as desirable or undesirable by itself. (A preference pair serves as two such
answers, see `make_examples`.) As in DPO there is a log-ratio to the reference, but it is not compared with that of
another answer. It is compared with `z0`, an estimate of how far the policy has moved from the reference on the whole,
which is made from answers to other prompts and passes no gradient. So the fields of a pair mean other things in
training: `chosen_ids` is the example's answer, `preference_prob` is 1 if that is desirable and 0 if not, and
`rejected_ids` is the answer to another prompt (`add_others`). The step passes over its micro-batches twice: first for
`z0`, without gradients, then for the losses. The loss flattens on both sides: an answer that is far on
the right side already, or hopelessly far on the wrong one, has little pull. `find_weights` makes up for unequal numbers
of good and bad answers.""",
    ),
    "pre_dpo": (
        "Pre-DPO",
        """\
The loss is DPO's, with one more metric. What changes is the reference: it is not the initial policy but a guide, which
was trained on the same pairs before. `train_stage` is the training loop of dpo.py, called twice: for the guide, by the
loss of DPO or of SimPO, and for the policy. The guide is kept in the run's folder, and all that stage 2 needs of it is
how likely it finds the answers of the pairs, so it takes no memory there. Then the policy is loaded afresh: it starts
from the initial model, not from the guide.""",
    ),
    "spin": (
        "Self-play fine-tuning",
        """\
The loss is DPO's without soft labels; the pairs are others. The chosen answer is the ground truth of supervised data,
which is all that `split_row` reads, and the rejected one is the policy's own. `main` becomes a loop. In each iteration
the policy as it stands is the opponent: it answers the prompts (`play`) and is the reference as well. Then it is
trained to prefer the truth to these answers (`train_iteration`, which has the training loop), and the result is the
next opponent. The pairs of an iteration are kept in a file, because the policy that wrote them is gone when a run is
resumed.""",
    ),
    "oaif": (
        "Online AI feedback",
        """\
The pairs are made during training. Before each update, `make_pairs` lets the policy answer every prompt of the batch
twice, and an annotator says which answer is better; of the training data only the prompts are used. Most of the new
lines are this annotator: the question, put in both orders of the two answers, and the reply, read from the
probabilities of `1` and `2`. The reference is needed in every step, so it stays in memory. The loss is one line for
three methods: DPO, IPO and SLiC.""",
    ),
    "grpo": (
        "Group-relative policy optimisation",
        """\
There are no pairs: a row is a prompt, and what the reward function wants to know of it. In every step the policy
answers each prompt several times (`respond`), the answers are scored (`score_answers`), and an answer's advantage is
what its reward is above or below those of its group (`group_advantages`): the group takes the place of PPO's value
model. Then the answers are passed over as in PPO, with the clipped ratio of `compute_loss`. grpo,
dr_grpo, rloo and dapo differ in the advantage, in what `loss_of_answers` divides a sum over tokens by, in where the KL
divergence goes, and in defaults.""",
    ),
    "rlhf_ppo": (
        "Supervised fine-tuning, reward model, PPO",
        """\
This is the long way that DPO cuts short. DPO's insight is that the policy can be its own reward model, so that one loss
on pairs will do. Here the reward model is a model of its own, trained on the pairs with the same Bradley-Terry
likelihood (`compute_reward_loss`), and the policy learns to please it by reinforcement learning, with a price on its KL
divergence from the reference. So there is a stage of supervised fine-tuning to start from, a scalar head
(`token_scores`), answers sampled in every step (`roll_out`), a value model with its advantages (`estimate_advantages`)
and PPO's clipped ratio (`compute_loss`). Begin with `train_ppo`: its loop shows sampling, then the passes over the
samples. What is not in the diff is shared even so far from DPO: data, batches, forward passes, sampling and
evaluation.""",
    ),
}


@dataclass
class Args:
    check: bool = False  # compare the page with the scripts, and write nothing


def read_script(name: str) -> tuple[list[str], int]:
    """The lines of a script, and how many of them the region with the docstring takes."""
    lines = (ROOT / f"{name}.py").read_text(encoding="utf-8").splitlines()
    return lines, lines.index("# endregion") + 1


def make_diff(name: str, context: int) -> list[str]:
    """The diff of a script against dpo.py, by the line numbers of the files."""
    (old, old_start), (new, new_start) = read_script("dpo"), read_script(name)
    options = {"fromfile": "dpo.py", "tofile": f"{name}.py", "n": context, "lineterm": ""}
    lines = list(difflib.unified_diff(old[old_start:], new[new_start:], **options))
    for i, line in enumerate(lines):
        if mark := re.fullmatch(r"@@ -(\d+)(.*) \+(\d+)(.*) @@", line):
            lines[i] = f"@@ -{int(mark[1]) + old_start}{mark[2]} +{int(mark[3]) + new_start}{mark[4]} @@"
    return lines


def make_page() -> str:
    table, sections = INTRODUCTION, ""
    for name, (method, text) in METHODS.items():
        if (ROOT / f"{name}.py").exists():
            changed = sum(line.startswith(("+", "-")) for line in make_diff(name, context=0)[2:])
            table += f"| [{name}.py](#{name}py) | {method} | {len(read_script(name)[0])} | {changed} |\n"
            diff = "\n".join(make_diff(name, context=2))
            sections += f"\n## {name}.py\n\n[{method}]({name}.py)\n\n{text}\n\n```diff\n{diff}\n```\n"
    return table + sections


def main(args: Args) -> None:
    file, page = ROOT / "DIFFS.md", make_page()
    if not args.check:
        file.write_text(page, encoding="utf-8")
    elif not file.exists() or file.read_text(encoding="utf-8") != page:
        sys.exit(f"error: {file.name} is not what the scripts give: run python benchmarks/diffs.py")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
