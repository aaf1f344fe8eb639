"""The rules that keep a diff of two scripts to what their methods differ in."""

import ast
import difflib
import re
import shutil
import subprocess
import sys

import pytest
from conftest import MINIMAL, ROOT, SCRIPTS, load_script, run_script

REGIONS = ["header", "args", "method", "procedure"]
BUDGET = {"pre_dpo": 1300, "spin": 1300, "oaif": 1330, "rlhf_ppo": 1620}
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


def functions(tree):
    return [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


def first_line(node):
    return min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])


def is_args(node):
    """`args`, `run.args` and the like."""
    return (isinstance(node, ast.Name) and node.id == "args") or (
        isinstance(node, ast.Attribute) and node.attr == "args"
    )


# === One script ===


@every_script
def test_regions(name):
    regions, _ = split_regions(read_lines(name))
    names = [region for region, _ in regions]
    assert set(names) == set(REGIONS) and names == sorted(names, key=REGIONS.index) and len(names) <= 6
    assert len(regions[0][1]) <= 30, "the header has at most 30 lines"
    assert not [region for region, lines in regions if not any(line.strip() for line in lines)], "an empty region"


@every_script
def test_length(name):
    assert len(read_lines(name)) <= BUDGET[name]


@every_script
def test_length_of_functions(name):
    long = {node.name: node.end_lineno - first_line(node) + 1 for node in functions(read_tree(name))}
    assert not {n: lines for n, lines in long.items() if lines > (120 if n in ("main", "train") else 60)}


@every_script
def test_imports_are_of_packages(name):
    nodes = [node for node in ast.walk(read_tree(name)) if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert not [node for node in nodes if isinstance(node, ast.ImportFrom) and node.level > 0]
    modules = [
        module
        for node in nodes
        for module in getattr(node, "module", None) and [node.module] or [a.name for a in node.names]
    ]
    local = {path.stem for path in ROOT.iterdir() if path.suffix == ".py" or path.is_dir()} - {"wandb"}
    assert not {module.split(".")[0] for module in modules} & local
    calls = [node.func for node in ast.walk(read_tree(name)) if isinstance(node, ast.Call)]
    assert not {"__import__", "exec", "eval", "import_module"} & {getattr(call, "id", None) for call in calls}


@every_script
def test_every_flag_is_read_and_none_is_set(name):
    tree = read_tree(name)
    flags = set(load_script(name).Args.__dataclass_fields__)
    uses = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and is_args(node.value)]
    read = {node.attr for node in uses if isinstance(node.ctx, ast.Load)}
    assert not flags - read, "flags that nothing reads"
    assert not {node.attr for node in uses if not isinstance(node.ctx, ast.Load)}, "flags that are assigned to"
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and node.args and is_args(node.args[0])]
    assert not {"setattr", "vars", "delattr"} & {getattr(node.func, "id", None) for node in calls}


@every_script
def test_flags_have_help(name):
    (args,) = [node for node in read_tree(name).body if isinstance(node, ast.ClassDef) and node.name == "Args"]
    lines = read_lines(name)
    fields = [node for node in args.body if isinstance(node, ast.AnnAssign)]
    assert len(fields) > 20
    for node, following in zip(fields, [*fields[1:], None], strict=True):
        end = following.lineno - 1 if following else node.end_lineno + 3
        assert re.search(r'  # \w|"""', "\n".join(lines[node.lineno - 1 : end])), f"--{node.target.id} has no help"


@every_script
def test_no_path_of_a_machine(name):
    for line in read_lines(name):
        assert not re.search(r"/(home|root|work|mnt|tmp|opt|usr|Users)/", line), line


@every_script
def test_every_number_has_a_range(name):
    script = load_script(name)
    flags = script.Args.__annotations__
    assert set(script.RANGES) == {
        flag for flag, kind in flags.items() if kind in (int, float, int | None, float | None)
    }
    assert not set(script.FREE_ON_RESUME) - set(flags)


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n != "pre_dpo" else []) for n in SCRIPTS])
def test_a_copy_in_an_empty_folder(name, tmp_path):
    shutil.copy(ROOT / f"{name}.py", tmp_path)
    result = run_script(tmp_path / f"{name}.py", "--help", cwd=tmp_path)
    assert result.returncode == 0 and result.stderr == ""
    for flag in load_script(name).Args.__dataclass_fields__:
        assert "--" + flag.replace("_", "-") in result.stdout
    result = run_script(tmp_path / f"{name}.py", cwd=tmp_path)
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    for flag in ("--model-name-or-path", "--dataset-name", "--judge-name-or-path"):
        assert flag in result.stderr
    assert [path.name for path in tmp_path.iterdir() if path.name != "__pycache__"] == [f"{name}.py"]


# === Many scripts ===


@every_script
def test_text_outside_the_regions_is_the_same_in_all_scripts(name):
    expected, actual = (split_regions(read_lines(script))[1] for script in ("pre_dpo", name))
    if name == "rlhf_ppo":  # which may leave out whole functions
        own = {node.name for node in read_tree(name).body if isinstance(node, ast.FunctionDef)}
        missing = [
            node
            for node in ast.parse("\n".join(expected)).body
            if isinstance(node, ast.FunctionDef) and node.name not in own
        ]
        left_out = {number for node in missing for number in range(first_line(node), node.end_lineno + 1)}
        expected = [line for number, line in enumerate(expected, 1) if number not in left_out and line]
        actual = [line for line in actual if line]
    assert not list(difflib.unified_diff(expected, actual, "pre_dpo", name, n=0, lineterm=""))


def test_functions_of_one_name_have_one_body():
    """compute_loss is the method, main holds a region."""
    bodies = {}
    for name in SCRIPTS:
        text = (ROOT / f"{name}.py").read_text(encoding="utf-8")
        for node in ast.parse(text).body:
            if isinstance(node, ast.FunctionDef) and node.name not in ("compute_loss", "main"):
                bodies.setdefault(node.name, {})[ast.get_source_segment(text, node)] = name
    assert not {name: list(scripts.values()) for name, scripts in bodies.items() if len(scripts) > 1}


def test_shared_flags_have_one_default():
    """Outside the regions; flags of a method's own may differ."""
    args = load_script("pre_dpo").Args
    own = {line.split(":")[0].strip() for name in SCRIPTS for line in split_regions(read_lines(name))[0][1][1]}
    for name in SCRIPTS:
        other = load_script(name).Args
        shared = set(args.__annotations__) & set(other.__annotations__) - own - {"exp_name"}
        assert len(shared) > 20 and not {flag for flag in shared if getattr(args, flag) != getattr(other, flag)}


def test_ruff():
    for command in (["check"], ["format", "--check"]):
        result = subprocess.run([sys.executable, "-m", "ruff", *command, "."], cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr


# === README ===


def read_readme_table():
    """{script: (lines, changed lines)} of the table with such columns."""
    header, rows = None, {}
    for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")] if line.startswith("|") else []
        if {"lines", "changed lines"} <= {cell.lower() for cell in cells}:
            header = [cell.lower() for cell in cells]
        elif not cells:
            header = None
        elif header and (script := re.match(r"\[?`?(\w+)\.py", cells[0])):
            row = dict(zip(header, cells, strict=True))
            lines, changed = (re.sub(r"\D", "", row[column]) for column in ("lines", "changed lines"))
            rows[script[1]] = int(lines or 0), int(changed or 0)
    return rows


def test_readme_has_the_measured_lines():
    measured = {name: len(read_lines(name)) for name in [*MINIMAL, *SCRIPTS]}
    changed = {name: count_changed_lines(read_lines("dpo"), read_lines(name)) for name in MINIMAL}
    changed |= dict.fromkeys(SCRIPTS, 0)  # they have other shared text, for now
    assert read_readme_table() == {name: (lines, changed[name]) for name, lines in measured.items()}
