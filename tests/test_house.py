"""The house's rules that a machine can check: arrows between packages, lists in pyproject.toml."""

import ast
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "taming": {"taming"},
    "stage1_vq": {"taming", "stage1_vq"},
    "stage2_ar": {"taming", "stage1_vq", "stage2_ar"},
}
SOURCES = sorted(path for package in MAY_IMPORT for path in (ROOT / package).rglob("*.py"))


def imported_packages(path: Path) -> set[str]:
    """Top-level names of all imports in a file, those inside functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module":
            names |= {a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)}
    return {name.partition(".")[0] for name in names}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_arrows_go_one_way(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    wrong = (imported_packages(path) & MAY_IMPORT.keys()) - MAY_IMPORT[package]
    assert not wrong, f"{path} imports {wrong}: arrows go taming <- stage1_vq <- stage2_ar"


def test_the_arrow_test_sees_a_wrong_arrow(tmp_path: Path) -> None:
    file = tmp_path / "wrong.py"
    file.write_text("def f():\n    from stage2_ar.pipeline import ARPipeline\n")
    assert "stage2_ar" in imported_packages(file)


def test_every_package_is_listed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    listed = set(project["tool"]["setuptools"]["packages"])
    found = {str(path.parent.relative_to(ROOT)).replace("/", ".") for path in SOURCES}
    configs = {
        "taming." + str(path.parent.relative_to(ROOT)).replace("/", ".")
        for path in (ROOT / "configs").rglob("*.yaml")
    }
    assert found | configs | {"taming.configs"} == listed
