"""The first code cell of the notebooks, as it stands there, on a simulated Colab: it installs the course and nothing else.

Colab has torch and its friends but not the course, and a package `google.colab`. Here: a new virtual environment that
sees the packages of the current one, without the course. Nothing is downloaded: the source is a local git repository.
"""

import json
import os
import shutil
import site
import subprocess
import venv
from pathlib import Path

import nbformat
import pytest
import torch
from jupyter_client import KernelManager
from jupyter_client.kernelspec import KernelSpecManager
from nbclient import NotebookClient

from conftest import ROOT
from dpo_helpers.tools.skeleton import REPOSITORY

pytestmark = [
    pytest.mark.slow(40),
    pytest.mark.skipif(shutil.which("git") is None, reason="no git here"),
    pytest.mark.skipif(os.name == "nt", reason="the simulation needs symbolic links"),
]
SOURCE = ("dpo_helpers", "pyproject.toml", "README.md", "LICENSE")  # what an install of the course needs
# Nothing from this machine's own set-up, and nothing over the network. pip enables a "no-" option with a false value.
ALONE = {
    "GIT_CONFIG_NOSYSTEM": "1", "GIT_CONFIG_GLOBAL": os.devnull, "GIT_TERMINAL_PROMPT": "0", "GIT_ALLOW_PROTOCOL": "file",
    "PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "false", "PIP_CONFIG_FILE": os.devnull,
    "PIP_DISABLE_PIP_VERSION_CHECK": "1", "NO_COLOR": "1", "OMP_NUM_THREADS": "1",
}  # fmt: skip
IS_THERE = "import importlib.util, google.colab; print(importlib.util.find_spec('dpo_helpers'))"
PROBE = """
import json
from importlib.metadata import distribution
from importlib.resources import files

import dpo_helpers
import google.colab
import torch
from dpo_helpers.run.loading import load_model
from dpo_helpers.run.machine import compute_of
from dpo_helpers.settings import load_settings

settings = load_settings("mini")
print(json.dumps({
    "package": dpo_helpers.__file__,
    "source": json.loads(distribution("dpo_helpers").read_text("direct_url.json"))["url"],
    "torch": torch.__version__,
    "weights": files("dpo_helpers.worlds").joinpath("mini/model/model.safetensors").stat().st_size,
    "parameters": sum(p.numel() for p in load_model(settings).parameters()),
    "device": str(compute_of(settings).device),
}))
"""


def first_cell():
    notebook = nbformat.read(ROOT / "notebooks/01_data.ipynb", as_version=4)
    return next(cell.source for cell in notebook.cells if cell.cell_type == "code")


class Colab:
    """An environment in `folder` that looks like Colab's to the cell; `packages` is where pip installs into."""

    def __init__(self, folder):
        venv.create(folder / "venv", with_pip=False, symlinks=True)
        self.python = folder / "venv/bin/python"
        self.packages = next((folder / "venv/lib").glob("python*/site-packages"))
        self.content = folder / "content"  # the working folder, as on Colab
        self.content.mkdir()
        self._link_packages(folder / "preinstalled")
        (self.packages / "google/colab").mkdir(parents=True)
        (self.packages / "google/colab/__init__.py").touch()
        kernel = {
            "argv": [str(self.python), "-m", "ipykernel_launcher", "-f", "{connection_file}"],
            "language": "python",
        }
        (folder / "kernels/colab").mkdir(parents=True)
        (folder / "kernels/colab/kernel.json").write_text(json.dumps(kernel | {"display_name": "Colab"}))
        self.kernels = KernelSpecManager(kernel_dirs=[str(folder / "kernels")], ensure_native_kernel=False)
        dropped = ("PYTHONPATH", "VIRTUAL_ENV", "MPLBACKEND")
        kept = {k: v for k, v in os.environ.items() if k not in dropped and not k.startswith(("DPO_", "PIP_", "GIT_"))}
        self.environment = kept | ALONE | {"IPYTHONDIR": str(folder / "ipython")}

    def _link_packages(self, folder):
        """A link to each installed package but the course, whose metadata too would tell pip that it is there."""
        folder.mkdir()
        for path in (Path(p) for p in site.getsitepackages() if Path(p).is_dir()):
            for entry in path.iterdir():
                if not entry.name.startswith(("dpo_helpers", "__editable__", "__pycache__")):
                    (folder / entry.name).symlink_to(entry)
        (self.packages / "preinstalled.pth").write_text(f"{folder}\n")

    def run(self, *sources, **variables):
        """What each cell prints, and the message of the error that stopped the last one, if one did."""
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
        manager = KernelManager(kernel_name="colab", kernel_spec_manager=self.kernels)
        where = {"metadata": {"path": str(self.content)}}
        client = NotebookClient(notebook, km=manager, timeout=300, allow_errors=True, resources=where)
        client.execute(cleanup_kc=True, env=self.environment | variables)
        printed = ["".join(o.get("text", "") for o in cell.outputs) for cell in notebook.cells]
        errors = [f"{o.ename}: {o.evalue}" for cell in notebook.cells for o in cell.outputs if o.output_type == "error"]
        return printed, *errors[:1]


@pytest.fixture
def colab(tmp_path):
    return Colab(tmp_path)


def git(folder, *command):
    named = ("-c", "user.name=a", "-c", "user.email=a@example.org")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")} | ALONE
    subprocess.run(["git", *named, *command], cwd=folder, env=environment, check=True, capture_output=True)


@pytest.fixture
def source(tmp_path):
    """The course of the working tree as the only commit of a git repository."""
    folder = tmp_path / "course"
    for name in SOURCE:
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            folder.mkdir(exist_ok=True)
            shutil.copy(path, folder)
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "commit", "-q", "-m", "course")
    return folder.as_uri()


def test_the_cell_installs_the_course_and_leaves_torch_alone(colab, source):
    assert colab.run(IS_THERE) == (["None\n"],), "the course must not be there before"
    printed, *errors = colab.run(first_cell(), PROBE, DPO_COURSE_SOURCE=source)
    assert not errors, printed
    found = json.loads(printed[-1])
    assert Path(found["package"]) == colab.packages / "dpo_helpers/__init__.py"
    assert found["source"] == source
    assert found["torch"] == torch.__version__
    assert found["weights"] == (ROOT / "dpo_helpers/worlds/mini/model/model.safetensors").stat().st_size
    assert found["parameters"] > 1_000_000
    assert found["device"].split(":")[0] in ("cpu", "cuda")
    installed = {path.name.split("-")[0] for path in colab.packages.glob("*.dist-info")}
    assert installed == {"dpo_helpers"}, "and nothing else"
    assert (colab.content / "keep-torch.txt").read_text() == f"torch=={torch.__version__}\n"
    assert colab.run(first_cell(), DPO_COURSE_SOURCE="file:///nowhere") == ([""],), "a second time nothing is installed"


def test_without_the_variable_the_own_address_is_asked_and_a_failing_install_says_so_in_a_line(colab, tmp_path):
    """git takes a folder that is not there for that address, so that nothing is asked over the network."""
    elsewhere = {
        "GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": f"url.file://{tmp_path}/nowhere.insteadOf",
        "GIT_CONFIG_VALUE_0": REPOSITORY,
    }  # fmt: skip
    (printed,), error = colab.run(first_cell(), **elsewhere)
    assert f"{tmp_path}/nowhere" in printed, "git asked for the address, and its own words are shown too"
    assert "ModuleNotFoundError" not in error
    assert f"the course could not be installed from {REPOSITORY}" in error
