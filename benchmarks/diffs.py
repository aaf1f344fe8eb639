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
from the scripts. pre_dpo.py, spin.py, oaif.py and rlhf_ppo.py still stand on an older core, which pads its rows and has
its training loop in a function `train`: compare them with each other, as in `git diff --no-index pre_dpo.py spin.py`.

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
