"""The repository's own rules: sizes, shared code, headers, isolation, the diff in the README."""

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
SECTIONS = ["Arguments", "Replay", "Networks", "Optimizer", "SAC", "Model", "Rollouts"]
SECTIONS += ["Termination", "Environment", "Evaluation", "Run", "Training"]
OF_MODELS = {"Model", "Rollouts", "Termination"}
SIZES = {"sac": 862, "mbpo": 1231, "mbpo_ftfl": 1233, "mbpo_residual_ablation": 1242}
BATCHES = {"Args", "ReplayBuffer", "check_args", "learn"}
REPAIRS = {"model_targets", "fit_ensemble", "predict"}
ABLATION = REPAIRS | {"Args"}
MAY_DIFFER = {
    ("sac", "mbpo"): BATCHES,
    ("sac", "mbpo_ftfl"): BATCHES,
    ("sac", "mbpo_residual_ablation"): BATCHES,
    ("mbpo", "mbpo_ftfl"): REPAIRS,
    ("mbpo", "mbpo_residual_ablation"): ABLATION,
    ("mbpo_ftfl", "mbpo_residual_ablation"): ABLATION,
}


def diff(one: str, other: str) -> str:
    """What `diff` prints about two scripts."""
    command = ["diff", f"{one}.py", f"{other}.py"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout


def blocks(name: str) -> dict[str, str]:
    """The lines of every top-level function, class and assignment, by name, in order."""
    found, lines = {}, SOURCE[name].splitlines(keepends=True)
    for node in ast.parse(SOURCE[name]).body:
        decorators = getattr(node, "decorator_list", [])
        first = min(part.lineno for part in [node, *decorators])
        source = "".join(lines[first - 1 : node.end_lineno])
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = source
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {ast.unparse(target): source for target in targets}
    return found


@pytest.mark.parametrize("name", NAMES)
def test_a_script_stays_short(name):
    """A script keeps to its number of lines, 100 columns, and 120 or 150 lines in its loop."""
    lines = SOURCE[name].splitlines()
    assert len(lines) <= SIZES[name]
    assert max(map(len, lines)) <= 100
    assert len(blocks(name)["learn"].splitlines()) <= (120 if name == "sac" else 150)


@pytest.mark.parametrize("name", NAMES)
def test_a_script_is_in_sections(name):
    """The sections stand in one order, each under a rule as wide as a line may be."""
    rules = re.findall("^# --- .*", SOURCE[name], re.MULTILINE)
    expected = [each for each in SECTIONS if name != "sac" or each not in OF_MODELS]
    assert [rule.strip("# -") for rule in rules] == expected
    assert {len(rule) for rule in rules} == {100}


def test_the_repair_is_a_small_diff():
    """From MBPO to FTFL at most 24 lines change, in at most 8 places."""
    lines = diff("mbpo", "mbpo_ftfl").splitlines()
    assert 1 <= sum(line[0] in "<>" for line in lines) <= 24
    assert 1 <= sum(line[0].isdigit() for line in lines) <= 8


def test_mbpo_takes_little_out_of_sac():
    """From SAC to MBPO lines are added, and at most 20 removed."""
    assert 1 <= sum(line[0] == "<" for line in diff("sac", "mbpo").splitlines()) <= 20


@pytest.mark.parametrize("pair", list(itertools.combinations(NAMES, 2)), ids="-".join)
def test_what_two_scripts_share_is_the_same(pair):
    """Blocks of one name are equal to the letter, but for an explicit few, and in one order."""
    one, other = map(blocks, pair)
    common = [name for name in one if name in other]
    assert common == [name for name in other if name in one]
    assert {name for name in common if one[name] != other[name]} == MAY_DIFFER[pair]
    assert len(common) >= 40


def test_headers_and_pyproject_name_the_same_packages():
    """The four headers are equal, and ask for what pyproject.toml asks for."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for source in SOURCE.values():
        first, *lines = source.split("# ///\n")[0].splitlines()
        assert first == "# /// script"
        assert all(line.startswith("# ") for line in lines)
        header = tomllib.loads("\n".join(line[2:] for line in lines))
        assert header.keys() == {"requires-python", "dependencies"}
        assert header["requires-python"] == project["requires-python"]
        assert sorted(header["dependencies"]) == sorted(project["dependencies"])


@pytest.mark.parametrize("script", NAMES)
def test_a_script_imports_nothing_of_ours(script):
    """No script imports another one, or anything else of this repository."""
    ours = {path.stem for path in ROOT.iterdir()}
    for node in ast.walk(ast.parse(SOURCE[script])):
        if isinstance(node, ast.Import):
            assert not ours & {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            assert node.module.split(".")[0] not in ours
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "import_module":
            name = node.args[0]  # a constant, or the module that --env-id names
            assert not isinstance(name, ast.Constant) or name.value.split(".")[0] not in ours


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


def test_the_readme_shows_the_diff():
    """The README has what `diff mbpo.py mbpo_ftfl.py` prints, but for the docstring at the top."""
    text = (ROOT / "README.md").read_text()
    shown = text.split("```diff\n")[1].split("```")[0]
    hunks = re.split(r"^(?=\d)", diff("mbpo", "mbpo_ftfl"), flags=re.MULTILINE)[1:]
    top = SOURCE["mbpo"].split("import")[0].count("\n")
    assert shown == "".join(hunk for hunk in hunks if int(re.match(r"\d+", hunk)[0]) > top)
    assert "scaler" in shown


@pytest.mark.parametrize("name", ["README.md", "benchmarks/README.md"])
def test_links_within_the_repository_lead_somewhere(name):
    """Each names a file and, after #, a heading of it as GitHub writes it in addresses."""
    targets = re.findall(r"\]\(([^)\s]+)\)", (ROOT / name).read_text())
    within = [target.partition("#") for target in targets if not target.startswith("http")]
    assert len(within) > 5
    for path, _, heading in within:
        file = (ROOT / name).parent / path if path else ROOT / name
        assert file.exists(), path
        if heading:
            titles = re.findall(r"^#+ (.*)", file.read_text().lower(), re.M)
            assert heading in [re.sub(r"[^\w -]", "", x).replace(" ", "-") for x in titles], heading
