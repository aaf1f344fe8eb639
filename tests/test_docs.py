"""README and docs/ name only flags and files that exist."""

import re

import pytest
from conftest import ROOT, SCRIPTS

MORE = ["sample", "benchmarks/plot", "docs/iterated_dpo"]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MORE_PAGES = [ROOT / "DIFFS.md", ROOT / "toy/README.md", *sorted((ROOT / "benchmarks").rglob("*.md"))]
# Of torchrun, Slurm and git.
OTHERS = {"nproc-per-node", "nnodes", "node-rank", "master-addr", "master-port", "nodes", "ntasks-per-node"}
OTHERS |= {"gpus-per-node", "requeue"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_flags_exist(page):
    texts = [(ROOT / f"{name}.py").read_text(encoding="utf-8") for name in [*SCRIPTS, *MORE]]
    known = {flag.replace("_", "-") for text in texts for flag in re.findall(r"^    (\w+): ", text, re.M)}
    assert not set(re.findall(r"(?<![\w-])--([a-z][a-z-]+)", page.read_text(encoding="utf-8"))) - known - OTHERS


@pytest.mark.parametrize("page", PAGES + MORE_PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        if not link.startswith("http"):
            path, _, anchor = link.partition("#")
            target = page.parent / path if path else page
            assert target.exists(), link
            headings = re.findall(r"^#+ (.*)", target.read_text(encoding="utf-8"), re.M) if anchor else []
            anchors = [re.sub(r"[^\w-]", "", heading.lower().replace(" ", "-")) for heading in headings]
            assert not anchor or anchor in anchors, link


def test_the_heart_of_dpo_is_quoted_to_the_letter():
    quoted = re.search(r"```python\n(.*?)    \.\.\.\n```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)[1]
    assert quoted in (ROOT / "dpo.py").read_text(encoding="utf-8")
