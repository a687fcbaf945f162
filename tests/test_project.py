"""The repository's own rules: sizes, shared code, headers, isolation, links."""

import ast
import itertools
import os
import re
import shutil
import subprocess
import sys
import tomllib

import pytest
from helpers_run import NAMES, ROOT, flags, folder_of, small

SOURCE = {name: (ROOT / f"{name}.py").read_text() for name in NAMES}
SIZES = {"sac": 862, "mbpo": 1231, "mbpo_ftfl": 1233, "mbpo_residual_ablation": 1242}
REPAIRS = {"model_targets", "fit_ensemble", "predict"}


def diff(one: str, other: str) -> list[str]:
    """What `diff` prints about two scripts."""
    command = ["diff", f"{one}.py", f"{other}.py"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.splitlines()


def blocks(name: str) -> dict[str, str]:
    """The lines of every top-level function, class and assignment, by name, in order."""
    found, lines = {}, SOURCE[name].splitlines()
    for node in ast.parse(SOURCE[name]).body:
        first = min(part.lineno for part in [node, *getattr(node, "decorator_list", [])])
        targets = getattr(node, "targets", [getattr(node, "target", node)])
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Assign | ast.AnnAssign):
            names = [getattr(target, "name", None) or ast.unparse(target) for target in targets]
            found |= dict.fromkeys(names, "\n".join(lines[first - 1 : node.end_lineno]))
    return found


@pytest.mark.parametrize("name", NAMES)
def test_a_script_stays_short(name):
    """It keeps to its lines, 100 columns, and 120 or 150 lines in its loop."""
    lines = SOURCE[name].splitlines()
    assert len(lines) <= SIZES[name]
    assert max(map(len, lines)) <= 100
    assert len(blocks(name)["learn"].splitlines()) <= (120 if name == "sac" else 150)


def test_the_diffs_are_small():
    """To FTFL at most 24 lines change, in at most 8 places; SAC loses at most 20 to MBPO."""
    lines = diff("mbpo", "mbpo_ftfl")
    assert 1 <= sum(line[0] in "<>" for line in lines) <= 24
    assert 1 <= sum(line[0].isdigit() for line in lines) <= 8
    assert 1 <= sum(line[0] == "<" for line in diff("sac", "mbpo")) <= 20


@pytest.mark.parametrize("pair", list(itertools.combinations(NAMES, 2)), ids="-".join)
def test_what_two_scripts_share_is_the_same(pair):
    """Blocks of one name are equal to the letter, but for an explicit few, and in one order."""
    one, other = map(blocks, pair)
    common = [name for name in one if name in other]
    assert common == [name for name in other if name in one]
    expected = REPAIRS | ({"Args"} if "mbpo_residual_ablation" in pair else set())
    expected = {"Args", "ReplayBuffer", "check_args", "learn"} if "sac" in pair else expected
    assert {name for name in common if one[name] != other[name]} == expected
    assert len(common) >= 40


@pytest.mark.parametrize("name", NAMES)
def test_headers_and_imports(name):
    """A header asks for what pyproject.toml asks for; nothing of this repository is imported."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    _, *lines = SOURCE[name].split("# ///\n")[0].splitlines()
    header = tomllib.loads("\n".join(line.removeprefix("# ") for line in lines))
    assert header["requires-python"] == project["requires-python"]
    assert sorted(header["dependencies"]) == sorted(project["dependencies"])
    imported = re.findall(r"^ *(?:from|import) +([\w.]+)", SOURCE[name], re.M)
    imported += re.findall(r"import_module\(\"([\w.]+)", SOURCE[name])
    assert "torch" in imported
    assert not {path.stem for path in ROOT.iterdir()} & {x.split(".")[0] for x in imported}


def test_a_script_runs_alone(tmp_path):
    """Copied into an empty folder, a script trains without a warning, and writes to runs/."""
    shutil.copy(ROOT / "mbpo_ftfl.py", tmp_path)
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    env["PYTHONDONTWRITEBYTECODE"] = "1"
    command = [sys.executable, "mbpo_ftfl.py", *flags(small("mbpo_ftfl"))]
    child = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert (child.returncode, child.stderr) == (0, "")
    assert {path.name for path in tmp_path.iterdir()} == {"mbpo_ftfl.py", "runs"}
    assert (folder_of(tmp_path / "runs", "mbpo_ftfl") / "checkpoint.pt").exists()


@pytest.mark.parametrize("name", ["README.md", "benchmarks/README.md"])
def test_links_within_the_repository_lead_somewhere(name):
    """Each names a file and, after #, a heading of it as GitHub writes it in addresses."""
    targets = re.findall(r"\]\(([^)\s]+)\)", (ROOT / name).read_text())
    within = [target.partition("#") for target in targets if not target.startswith("http")]
    assert len(within) > 5
    for path, _, heading in within:
        file = (ROOT / name).parent / path if path else ROOT / name
        assert file.exists(), path
        titles = re.findall(r"^#+ (.*)", file.read_text().lower(), re.M) if heading else [""]
        assert heading in [re.sub(r"[^\w -]", "", x).replace(" ", "-") for x in titles], heading
