"""The rules that keep the scripts minimal, and the diff of two scripts limited to where their methods differ."""

import ast
import difflib
import re
import shutil

import pytest
from conftest import ROOT, SCRIPTS, load_script, run_script

LINES = {"dpo": 650, "ipo": 650, "simpo": 650, "pre_dpo": 740, "spin": 740, "kto": 740, "oaif": 800, "grpo": 850}
LINES["rlhf_ppo"] = 1000
CHANGED = {"ipo": 30, "simpo": 40, "kto": 180, "pre_dpo": 120, "spin": 170, "oaif": 170, "grpo": 290, "rlhf_ppo": 460}
REGIONS = ["header", "args", "loss", "rows", "functions", "procedure"]
OPENING, CLOSING = re.compile(r" *# region method: (\w+)"), re.compile(r" *# endregion")

every_script = pytest.mark.parametrize("name", SCRIPTS)


def read_lines(name):
    return (ROOT / f"{name}.py").read_text(encoding="utf-8").splitlines()


def read_tree(name):
    return ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8"))


def split_regions(lines):
    """The regions as (name, lines), and the lines outside; the marks are in neither."""
    regions, outside, inside = [], [], False
    for number, line in enumerate(lines, 1):
        if opening := OPENING.fullmatch(line):
            assert not inside, f"line {number}: a region in a region"
            regions.append((opening[1], []))
            inside = True
        elif CLOSING.fullmatch(line):
            assert inside, f"line {number}: the end of no region"
            inside = False
        else:
            assert not re.match(r"\s*#\s*(end)?region", line), f"line {number}: a malformed mark"
            (regions[-1][1] if inside else outside).append(line)
    assert not inside, "a region without an end"
    return regions, outside


def count_changed_lines(first, second):
    """The + and - lines of a diff without the headers."""

    def body(lines):
        start, end = lines.index("# region method: header"), lines.index("# endregion")
        return lines[:start] + lines[end + 1 :]

    diff = list(difflib.unified_diff(body(first), body(second), n=0, lineterm=""))[2:]
    return sum(line.startswith(("+", "-")) for line in diff)


# === One script ===


@every_script
def test_length(name):
    assert len(read_lines(name)) <= LINES[name]
    tops = [node for node in read_tree(name).body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    long = [node.name for node in tops if node.end_lineno - node.lineno + 1 > 65]
    assert not long
    if LINES[name] == 650:
        assert len(tops) <= 35
        assert next(node.lineno for node in tops if node.name == "compute_loss") < 140


@every_script
def test_no_nested_comprehension(name):
    kinds = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
    for node in ast.walk(read_tree(name)):
        if isinstance(node, kinds):
            inner = [child for child in ast.walk(node) if isinstance(child, kinds) and child is not node]
            assert len(node.generators) == 1 and not inner, f"line {node.lineno}"


@every_script
def test_regions(name):
    regions = [region for region, _ in split_regions(read_lines(name))[0]]
    assert regions == [region for region in REGIONS if region in regions]
    assert {"header", "args", "loss", "procedure"} <= set(regions)


@every_script
def test_text_outside_the_regions_is_that_of_dpo(name):
    assert split_regions(read_lines(name))[1] == split_regions(read_lines("dpo"))[1]


@pytest.mark.parametrize("name", CHANGED)
def test_changed_lines(name):
    assert count_changed_lines(read_lines("dpo"), read_lines(name)) <= CHANGED[name]


def test_functions_of_one_name_have_one_body():
    """Except for those that are meant to differ between methods."""
    bodies, their_own = {}, {"compute_loss", "encode_rows", "split_row", "main"}
    for name in SCRIPTS:
        for node in read_tree(name).body:
            if isinstance(node, ast.FunctionDef) and node.name not in their_own:
                bodies.setdefault(node.name, set()).add(ast.unparse(node))
    assert [name for name, texts in bodies.items() if len(texts) > 1] == []


@every_script
def test_every_flag_is_read_explained_and_never_set(name):
    text = (ROOT / f"{name}.py").read_text(encoding="utf-8")
    for flag in load_script(name).Args.__dataclass_fields__:
        assert re.search(rf"args\.{flag}\b", text), flag
        assert not re.search(rf"args\.{flag} = ", text), flag
        assert re.search(rf"^    {flag}: .*  # \w", text, re.M), flag


@pytest.mark.parametrize(
    "name", ["dpo", *[pytest.param(name, marks=pytest.mark.slow) for name in ("spin", "rlhf_ppo")]]
)
def test_help_of_a_copy_has_the_methods_flags_first(name, tmp_path):
    shutil.copy(ROOT / f"{name}.py", tmp_path)
    ended = run_script(f"{name}.py", "--help", cwd=tmp_path)
    assert ended.returncode == 0 and ended.stderr == "" and "https://arxiv.org/abs/" in ended.stdout
    flags = re.findall(r"^│ --([a-z-]+)", ended.stdout, re.M)
    flags = [flag.removeprefix("no-").replace("-", "_") for flag in flags]
    fields = list(load_script(name).Args.__dataclass_fields__)
    assert flags == ["help" for _ in flags[:1] if flags[0] == "help"] + fields
    own = "\n".join(split_regions(read_lines(name))[0][1][1])
    assert re.search(rf"^    {fields[0]}: ", own, re.M)


@every_script
def test_readme_has_the_measured_lines(name):
    lines, changed = len(read_lines(name)), count_changed_lines(read_lines("dpo"), read_lines(name))
    (row,) = re.findall(rf"^\| \[{name}\.py\].*", (ROOT / "README.md").read_text(encoding="utf-8"), re.M)
    assert f" | {lines} | {f'[{changed}](DIFFS.md#{name}py)' if changed else '-'} | " in row
