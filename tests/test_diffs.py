"""DIFFS.md, the page of what each script changes in dpo.py."""

import re
import subprocess

import pytest
from conftest import ROOT, SCRIPTS, load_script
from test_contract import read_lines

diffs = load_script("benchmarks/diffs")
PAGE = (ROOT / "DIFFS.md").read_text(encoding="utf-8")
SIBLINGS = [name for name in SCRIPTS if name != "dpo"]


def read_diff(name):
    (diff,) = re.findall(rf"^## {name}\.py\n.*?^```diff\n(.*?)\n```$", PAGE, re.M | re.S)
    return diff.split("\n")


def test_page_matches_the_scripts(tmp_path, monkeypatch):
    diffs.main(diffs.Args(check=True))
    monkeypatch.setattr(diffs, "ROOT", tmp_path)
    for name in ["dpo", *SIBLINGS]:
        (tmp_path / f"{name}.py").write_text("\n".join(read_lines(name)) + "\n")
    (tmp_path / "DIFFS.md").write_text(PAGE)
    diffs.main(diffs.Args(check=True))
    with (tmp_path / "dpo.py").open("a") as file:
        file.write("# one more line\n")
    with pytest.raises(SystemExit, match="error: DIFFS.md does not match the scripts"):
        diffs.main(diffs.Args(check=True))


@pytest.mark.parametrize("name", SIBLINGS)
def test_diff_makes_the_script_out_of_dpo(name):
    """Each hunk stands at its line numbers, and what is between hunks is equal; all but the docstrings."""
    old, new = read_lines("dpo"), read_lines(name)
    made, place = new[: new.index("# endregion") + 1], old.index("# endregion") + 1
    for line in read_diff(name)[2:]:
        if mark := re.fullmatch(r"@@ -(\d+),\d+ \+(\d+),\d+ @@", line):
            made += old[place : int(mark[1]) - 1]
            place = int(mark[1]) - 1
            assert len(made) == int(mark[2]) - 1
        elif line.startswith("+"):
            made.append(line[1:])
        else:
            assert line[0] in " -" and old[place] == line[1:]
            made += [old[place]] * (line[0] == " ")
            place += 1
    assert made + old[place:] == new


@pytest.mark.parametrize("name", SIBLINGS)
def test_tables_count_lines_and_changes(name, tmp_path):
    """Between any two scripts: no fewer than the fewest changes, which diff -d looks for, and not many more."""
    changed = sum(line[:1] in ("+", "-") for line in read_diff(name)[2:])
    assert re.search(rf"^\| \[{name}\.py\]\(#{name}py\) .* \| {len(read_lines(name))} \| {changed} \|$", PAGE, re.M)
    (cells,) = re.findall(rf"^\| {name} \| ({changed} .*) \|$", PAGE, re.M)
    for script in SCRIPTS:
        (tmp_path / script).write_text("\n".join(read_lines(script)).partition("# endregion")[2])
    for other, cell in zip(["dpo", *diffs.METHODS], cells.split(" | "), strict=True):
        fewest = len(re.findall("^[<>]", subprocess.getoutput(f"cd {tmp_path}; diff -d {name} {other}"), re.M))
        assert cell == "-" if other == name else fewest <= int(cell) <= 1.2 * fewest
