"""`make wheels` against an index of made-up packages, and what docs/offline.md says of it."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from programs import ROOT

UV = Path(sys.prefix) / "bin" / "uv"
PAGE = (ROOT / "docs" / "offline.md").read_text()
REQUIRED = re.findall(r"^(\w[\w-]*)>=([\d.]+)", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
NEEDS = {  # what some of them ask for
    "torch": ["fsspec", "sympy", "setuptools<82"],
    "torchvision": ["numpy", "pillow"],
    "datasets": ["fsspec<=2026", "pandas"],
    "timm": ["torch", "safetensors"],
    "tensorboard": ["setuptools", "numpy"],
}
OTHERS = [("fsspec", "2025"), ("fsspec", "2027"), ("sympy", "1"), ("pandas", "3"), ("setuptools", "81"),
          ("setuptools", "84"), ("newcomer", "1")]  # fmt: skip


def make_wheel(folder: Path, name: str, version: str, needs: list[str], tag: str = "py3-none-any") -> None:
    """A wheel without content."""
    described = f"{name.replace('-', '_')}-{version}"
    metadata = [f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {need}" for need in needs)]
    with zipfile.ZipFile(folder / f"{described}-{tag}.whl", "w") as wheel:
        wheel.writestr(f"{described}.dist-info/METADATA", "\n".join(["Metadata-Version: 2.1", *metadata, ""]))
        wheel.writestr(f"{described}.dist-info/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n")
        wheel.writestr(f"{described}.dist-info/RECORD", "")


@pytest.mark.skipif(not UV.is_file(), reason="this environment was not made by make: it has no uv")
def test_the_folder_has_what_the_oldest_torch_does_not_bring(tmp_path: Path) -> None:
    index = tmp_path / "index"
    index.mkdir()
    for name, version in REQUIRED:
        tag = {"pyarrow": "cp312-cp312-manylinux_2_26_x86_64", "psutil": "cp36-abi3-manylinux2014_x86_64"}.get(name)
        make_wheel(index, name, version, NEEDS.get(name, []), *([tag] if tag else []))
    make_wheel(index, "torch", "2.99", [*NEEDS["torch"], "newcomer"])  # a newer one brings more
    make_wheel(index, "torchvision", "0.99", ["torch==2.99"])
    make_wheel(index, "accelerate", "1.13", ["newcomer"])
    for name, version in OTHERS:
        make_wheel(index, name, version, [])
    for file in ("Makefile", "requirements.txt"):
        shutil.copy(ROOT / file, tmp_path)

    (tmp_path / "uv.toml").write_text('no-index = true\noffline = true\nfind-links = ["index"]\ncache-dir = "cache"\n')
    only = {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(index)}
    command = ["make", "wheels", f"VENV={sys.prefix}", "WHEELS_PYTHON=3.12"]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | only, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    found = {"-".join(path.name.split("-")[:2]) for path in (tmp_path / "wheels").iterdir()}
    brought = {"torch", "torchvision", "numpy", "pillow"}
    expected = {f"{name}-{version}".replace("scikit-", "scikit_") for name, version in REQUIRED if name not in brought}
    expected = expected - {"accelerate-1.12"} | {"accelerate-1.13", "newcomer-1", "pandas-3"}
    # fsspec as old as datasets wants it, whatever torch's own is; setuptools for the project.
    assert found == expected | {"fsspec-2025", "setuptools-81"}


def test_the_page_names_what_the_makefile_has() -> None:
    makefile = (ROOT / "Makefile").read_text()
    (command,) = re.findall(r"^make wheels\b.*", PAGE, re.MULTILINE)
    assert subprocess.run([*command.split()[:2], "--dry-run"], cwd=ROOT, capture_output=True).returncode == 0
    variables = set(re.findall(r"\b(WHEELS_[A-Z]+)=", PAGE))
    assert variables and all(re.search(rf"^{name} \?=", makefile, re.MULTILINE) for name in variables)
    (install,) = re.findall(r"^pip install (.*)", PAGE, re.MULTILINE)
    (filled,) = re.findall(r"--dest (\S+)", makefile)
    assert install.split("  #")[0] == f"--no-index --find-links {filled} -r requirements.txt"
