"""What the tools share: bad input in one line, the repository's scripts as modules, tables."""

import re
import sys
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr
from importlib.util import module_from_spec, spec_from_file_location
from io import StringIO
from pathlib import Path
from types import ModuleType

import tyro

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
sys.path.append(str(ROOT))  # where an id <module>:<id> finds a module that lies beside the scripts


class InputError(ValueError):
    """What was asked for can't be done; one line says why. Each script has one of this name."""


def load_script(path: Path | str) -> ModuleType:
    """A script as a module, by its path in the repository or elsewhere."""
    path = (ROOT / path).resolve()
    if getattr(sys.modules.get(path.stem), "__file__", None) != str(path):
        spec = spec_from_file_location(path.stem, path)
        sys.modules[path.stem] = module_from_spec(spec)
        spec.loader.exec_module(sys.modules[path.stem])
    return sys.modules[path.stem]


def parse(options: type, doc: str, words: list[str] | None = None, **how):
    """The words of the command line as options; InputError for what they don't fit."""
    said = StringIO()
    try:
        with redirect_stderr(said):
            return tyro.cli(options, description=doc, args=words, **how)
    except SystemExit as ending:
        if not ending.code:  # --help
            raise
        text = " ".join(re.sub("[─│╭╮╰╯]+", " ", said.getvalue()).split())
        text = re.sub(r"^(.+?) \1", r"\1", text)  # the title of the box, and its first words
        raise InputError(text.partition(" For full helptext")[0]) from None


def run_tool(do: Callable, options: type, doc: str, words: list | None = None, **how) -> None:
    """Calls do(options); bad input is one line on stderr and exit code 2, Ctrl-C exit code 1."""
    warnings.showwarning = lambda *_, **__: None  # libraries' words about libraries
    try:
        do(parse(options, doc, words, **how))
    except (ValueError, OSError) as error:
        if not isinstance(error, OSError) and type(error).__name__ != "InputError":
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit("error: interrupted")


def markdown(table) -> str:
    """A data frame in Markdown, with three digits to a number and nothing where there is none."""

    def text(value) -> str:
        if isinstance(value, float):
            return "" if value != value else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
        return str(value)

    return table.map(text).to_markdown(index=False, disable_numparse=True)
