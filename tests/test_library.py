"""The rooms as a library: the examples of their docstrings run, and the names are what they say."""

import doctest
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("package", ["curvature", "surgery", "evals", "rl"])
def test_the_examples_of_a_package_run(package):
    module = importlib.import_module(package)
    result = doctest.testmod(module)
    assert result.attempted >= 8
    assert result.failed == 0


@pytest.mark.parametrize(
    "name", ["curvature.collect_factors", "surgery.plan_surgery", "surgery.operate", "evals.judge"]
)
def test_names_of_modules_and_functions_do_not_hide_each_other(name):
    """`surgery.operate` is a module's name too: the function must win in every order of imports."""
    package, function = name.split(".")
    importlib.import_module(f"{package}.{function}") if function in ("operate", "judge") else None
    found = getattr(importlib.import_module(package), function)
    assert inspect.isfunction(found), name
    assert inspect.getdoc(found)


def test_the_tour_runs(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "docs" / "tour.py"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**__import__("os").environ, "PYTHONPATH": str(ROOT), "TQDM_DISABLE": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "recall" in done.stdout
    assert "neurons" in done.stdout
