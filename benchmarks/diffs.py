"""Write DIFFS.md: what each script changes in dpo.py.

python benchmarks/diffs.py            # writes the page
python benchmarks/diffs.py --check    # writes nothing, and ends with 1 if the page does not match the scripts
"""

import difflib
import itertools
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parent.parent

INTRODUCTION = r"""# The methods as diffs

Each section has the equations of DPO and of a method, and the diff of its script against [dpo.py](dpo.py), without the
docstrings at the top, with two lines of context and the line numbers of the files. `python benchmarks/diffs.py` writes
this page from the scripts.

$`x`$ is a prompt, $`y_w`$ the chosen and $`y_l`$ the rejected answer, $`\pi`$ the policy, $`\pi_\text{ref}`$ the frozen
reference, which is the initial policy unless stated otherwise, and $`\sigma`$ the logistic function. $`p`$ is 1,
or another probability with `--label-smoothing` or soft labels. $`L`$ is the loss of a pair: a step lowers its mean.

| script | method | lines | changed lines |
| --- | --- | --- | --- |
"""

ANY_TWO = """
## Changed lines between any two scripts

Counted as above: lines added and removed, without the docstrings at the top.

"""

DPO = r"""
\text{DPO:} && h &= \log\frac{\pi(y_w \mid x)}{\pi_\text{ref}(y_w \mid x)}
- \log\frac{\pi(y_l \mid x)}{\pi_\text{ref}(y_l \mid x)} \\
&& L &= -p \log\sigma(\beta h) - (1 - p) \log\sigma(-\beta h) \\[3ex]
"""

METHODS = {  # GitHub refuses a few macros in equations, such as operatorname
    "ipo": (
        "Identity Preference Optimisation",
        r"""
\text{IPO:} && L &= p \Bigl(h - \frac{1}{2\beta}\Bigr)^2 + (1 - p) \Bigl(h + \frac{1}{2\beta}\Bigr)^2
""",
        r"""
DPO's log-sigmoid rewards every widening of the margin $`h`$, if less and less. IPO's square has its minimum at a finite
margin, $`1 / (2 \beta)`$, and pulls back what has gone beyond it, so $`\beta`$ sets where $`h`$ comes to rest.
`--length-normalize` divides each log-ratio by its number of tokens. The logged rewards are DPO's, so that the curves of
the two methods can be compared.
""",
    ),
    "simpo": (
        "Simple Preference Optimisation",
        r"""
\text{SimPO:} && r(y) &= \frac{\beta}{|y|} \log\pi(y \mid x) \\
&& L &= -p \log\sigma\bigl(r(y_w) - r(y_l) - \gamma\bigr) - (1 - p) \log\sigma\bigl(r(y_l) - r(y_w) - \gamma\bigr)
""",
        r"""
There is no reference, and nothing is computed for the pairs before training. The reward of an answer is the mean
log-probability of its tokens, so that length by itself earns nothing, and the chosen answer has to win by a margin
$`\gamma`$. A small learning rate and few steps, not $`\beta`$, keep the policy near the initial one.
""",
    ),
    "kto": (
        "Kahneman-Tversky Optimisation",
        r"""
\text{KTO:} && r &= \log\frac{\pi(y \mid x)}{\pi_\text{ref}(y \mid x)} \\
&& z_0 &= \max\Bigl(0,\ \text{mean of } \log\frac{\pi(y' \mid x)}{\pi_\text{ref}(y' \mid x)}
\text{ over the step}\Bigr) \\
&& L &= \begin{cases}
w_D \bigl(1 - \sigma(\beta (r - z_0))\bigr) & \text{if } y \text{ is desirable} \\
w_U \bigl(1 - \sigma(\beta (z_0 - r))\bigr) & \text{if not}
\end{cases}
""",
        r"""
An answer $`y`$ needs no partner: it is desirable or not, and a preference pair serves as two such answers
(`make_examples`). Its log-ratio is compared with $`z_0`$, an estimate of how far the policy has moved from the
reference, which is made from the answers $`y'`$ of other examples (`add_others`) and passes no gradient. So a step goes
over its micro-batches twice, first for $`z_0`$. The loss flattens on both sides: an answer that is far on the right
side of $`z_0`$, or hopelessly far on the wrong one, has little pull. The weights $`w_D`$ and $`w_U`$ make up for
unequal numbers of both kinds.
""",
    ),
    "pre_dpo": (
        "Pre-DPO",
        r"""
\text{Pre-DPO:} && h &= \log\frac{\pi(y_w \mid x)}{\pi_\text{guide}(y_w \mid x)}
- \log\frac{\pi(y_l \mid x)}{\pi_\text{guide}(y_l \mid x)} \\
&& L &= -p \log\sigma(\beta h) - (1 - p) \log\sigma(-\beta h)
""",
        r"""
Only the reference changes: it is a guide, trained on the same pairs beforehand by DPO or SimPO (`train_guide`). The
policy still starts from the initial model. So $`h`$ is not 0 at first, and $`\sigma(-\beta h)`$, the weight of a
pair's gradient, which is logged, is not the same for all. `train_stage` is the training loop of dpo.py, called for the
guide and then for the policy. By then only the guide's log-probabilities of the pairs' answers are needed,
so it takes no memory.
""",
    ),
    "spin": (
        "Self-play fine-tuning",
        r"""
\text{SPIN:} && y' &\sim \pi_t(\cdot \mid x) \\
&& h &= \log\frac{\pi(y \mid x)}{\pi_t(y \mid x)} - \log\frac{\pi(y' \mid x)}{\pi_t(y' \mid x)} \\
&& L &= -\log\sigma(\beta h)
""",
        r"""
The loss is DPO's without soft labels; the pairs differ. The chosen answer $`y`$ is the ground truth of supervised
data, and the rejected one $`y'`$ is the policy's own. In iteration $`t`$ of `main` the current policy is the
opponent $`\pi_t`$: it answers the prompts (`play`), and is the reference. Then the policy is trained to prefer the
truth (`train_iteration`, with the training loop of dpo.py), and is the next opponent. The pairs are kept in a file,
because the policy that wrote them is gone when a run is resumed.
""",
    ),
    "oaif": (
        "Online AI feedback",
        r"""
\text{OAIF:} && y_1, y_2 &\sim \pi(\cdot \mid x) \\
&& P &= \tfrac{1}{2} \bigl(q(1 \mid x, y_1, y_2) + q(2 \mid x, y_2, y_1)\bigr) \\
&& (y_w, y_l) &= \begin{cases} (y_1, y_2) & \text{if } P > \tfrac{1}{2} \\
(y_2, y_1) & \text{if } P < \tfrac{1}{2} \end{cases} \\
&& L &= -\log\sigma(\beta h) \quad\text{or}\quad \Bigl(h - \frac{1}{2\beta}\Bigr)^2
\quad\text{or}\quad \max(0, 1 - \beta h)
""",
        r"""
The pairs are made during training: before each update the policy answers every prompt of the batch twice, and an
annotator says which answer is better (`make_pairs`). Most of the new lines are this annotator: the question, put in
both orders of the two answers, and $`q`$, the probability of its reply `1` or `2`. A tie gives no gradient, and a cut
answer loses against one that ended. Of the training data only the prompts are used. The reference is needed in every
step, so it stays in memory. The loss, with DPO's $`h`$, is that of DPO, IPO or SLiC.
""",
    ),
    "grpo": (
        "Group-relative policy optimisation",
        r"""
\text{GRPO:} && A_i &= \frac{r_i - \text{mean}(r_1, \dots, r_G)}{\text{std}(r_1, \dots, r_G) + 10^{-4}} \\
&& \rho_t &= \frac{\pi(y_t \mid x, y_{\lt t})}{\pi_\text{old}(y_t \mid x, y_{\lt t})}, \qquad
u_t = \frac{\pi_\text{ref}(y_t \mid x, y_{\lt t})}{\pi(y_t \mid x, y_{\lt t})} \qquad \text{for the tokens } y_t
\text{ of answer } i \\
&& L_i &= \frac{1}{|y|} \sum_t \Bigl[ -\min\bigl(\rho_t A_i,\
\text{clip}(\rho_t, 1 - \epsilon, 1 + \epsilon_\text{high}) A_i\bigr) + \beta (u_t - \log u_t - 1) \Bigr]
""",
        r"""
There are no pairs: a row is a prompt, and whatever the reward function needs. In every step the policy, as
$`\pi_\text{old}`$, answers each prompt $`G`$ times (`respond`), and the answers get rewards $`r_i`$ (`score_answers`).
The advantage $`A_i`$ says how an answer compares with the others of its group (`group_advantages`): that takes the
place of PPO's value model. $`L_i`$ is the loss of an answer. In dr_grpo, rloo and dapo the advantage, the divisor
$`|y|`$, the place of the KL divergence and the defaults differ: grpo.py begins with a table of them.
""",
    ),
    "rlhf_ppo": (
        "Supervised fine-tuning, reward model, PPO",
        r"""
\text{1. SFT:} && L_t &= -\log\pi(y_t \mid x, y_{\lt t}) \qquad \text{for the tokens } y_t \text{ of } y_w \\
\text{2. reward model:} && L &= -p \log\sigma\bigl(r(x, y_w) - r(x, y_l)\bigr)
- (1 - p) \log\sigma\bigl(r(x, y_l) - r(x, y_w)\bigr) \\
\text{3. PPO:} && r_t &= -\kappa \log\frac{\pi_\text{old}(y_t \mid x, y_{\lt t})}{\pi_\text{ref}(y_t \mid x, y_{\lt t})}
+ \begin{cases} r(x, y) & \text{if } y_t \text{ is the last token} \\ 0 & \text{if not} \end{cases} \\
&& \delta_t &= r_t + \gamma V^\text{old}_{t+1} - V^\text{old}_t, \qquad A_t = \delta_t + \gamma \lambda A_{t+1}, \qquad
R_t = A_t + V^\text{old}_t \\
&& L_t &= \max\bigl(-\rho_t \hat{A}_t,\ -\text{clip}(\rho_t, 1 - \epsilon, 1 + \epsilon) \hat{A}_t\bigr)
\qquad \text{with } \rho_t = \frac{\pi(y_t \mid x, y_{\lt t})}{\pi_\text{old}(y_t \mid x, y_{\lt t})} \\
&& &\quad + \frac{c}{2} \max\Bigl((V_t - R_t)^2,\
\bigl(\text{clip}(V_t, V^\text{old}_t - \epsilon_V, V^\text{old}_t + \epsilon_V) - R_t\bigr)^2\Bigr)
""",
        r"""
This is the long way that DPO cuts short: there the policy is its own reward model, so that one loss on pairs will do.
Here the reward model is a separate model, trained with the same Bradley-Terry likelihood (`compute_reward_loss`), and
the policy learns to please it by reinforcement learning, at a price $`\kappa`$, `--kl-coef`, on its KL divergence from
the SFT model $`\pi_\text{ref}`$. In each step the policy, as $`\pi_\text{old}`$, answers prompts (`roll_out`), a value
model $`V`$ tells what each token was worth (`estimate_advantages`), and $`\hat{A}_t`$, which is $`A_t`$ whitened over
the step, goes into the losses $`L_t`$ of the tokens (`compute_loss`, with $`c`$ from `--value-coef`). The reward
model's $`r(x, y)`$ is shifted so that answers of the SFT model have mean 0, and `--missing-eos-score` takes its place
where an answer was cut off. Begin with `train_ppo`.
""",
    ),
}


@dataclass
class Args:
    check: bool = False  # compare the page with the scripts, and write nothing


def read_script(name: str) -> tuple[list[str], int]:
    """The lines of a script, and how many of them the region with the docstring takes."""
    lines = (ROOT / f"{name}.py").read_text(encoding="utf-8").splitlines()
    return lines, lines.index("# endregion") + 1


def make_diff(old_name: str, new_name: str, context: int) -> list[str]:
    """The diff of two scripts, with the line numbers of the files."""
    (old, old_start), (new, new_start) = read_script(old_name), read_script(new_name)
    options = {"fromfile": f"{old_name}.py", "tofile": f"{new_name}.py", "n": context, "lineterm": ""}
    lines = list(difflib.unified_diff(old[old_start:], new[new_start:], **options))
    for i, line in enumerate(lines):
        if mark := re.fullmatch(r"@@ -(\d+)(.*) \+(\d+)(.*) @@", line):
            lines[i] = f"@@ -{int(mark[1]) + old_start}{mark[2]} +{int(mark[3]) + new_start}{mark[4]} @@"
    return lines


def make_page() -> str:
    names, changed, table, sections = ["dpo", *METHODS], {}, INTRODUCTION, ""
    for old, new in itertools.combinations(names, 2):
        count = sum(line.startswith(("+", "-")) for line in make_diff(old, new, context=0)[2:])
        changed[old, new] = changed[new, old] = count
    for name, (method, equations, text) in METHODS.items():
        table += f"| [{name}.py](#{name}py) | {method} | {len(read_script(name)[0])} | {changed['dpo', name]} |\n"
        sections += f"\n## {name}.py\n\n[{method}]({name}.py)\n\n"
        sections += f"```math\n\\begin{{aligned}}{DPO}{equations.lstrip()}\\end{{aligned}}\n```\n{text}\n"
        sections += "```diff\n" + "\n".join(make_diff("dpo", name, context=2)) + "\n```\n"
    table += ANY_TWO + "| | " + " | ".join(names) + " |\n" + "| --- " * (len(names) + 1) + "|\n"
    for old in names:
        table += f"| {old} | " + " | ".join([str(changed.get((old, new), "-")) for new in names]) + " |\n"
    return table + sections


def main(args: Args) -> None:
    file, page = ROOT / "DIFFS.md", make_page()
    if not args.check:
        file.write_text(page, encoding="utf-8")
    elif not file.exists() or file.read_text(encoding="utf-8") != page:
        sys.exit(f"error: {file.name} does not match the scripts: run python benchmarks/diffs.py")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
