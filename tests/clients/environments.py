"""One virtual environment per published client: made once, remade when its pins change.

It knows pip and a folder, and nothing of servers or of what the scripts do.
"""

import fcntl
import hashlib
import json
import subprocess
import sys
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
ENVIRONMENTS = ROOT / ".venv-clients"
INSTALL_TIMEOUT_S = 600
SCRIPT_TIMEOUT_S = 240


def run_script(name: str, *arguments: str, script: str = "") -> dict[str, Any]:
    """Runs `<script or name>_script.py` with the client's own Python; its last line is the
    result."""
    path = HERE / f"{script or name}_script.py"
    command = [str(python_of(name)), "-I", str(path), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SCRIPT_TIMEOUT_S)
    if done.returncode != 0:
        raise AssertionError(f"{path.name} failed:\n{done.stdout}\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def python_of(name: str) -> Path:
    """The client's interpreter, with exactly what `requirements-<name>.txt` pins."""
    requirements = HERE / f"requirements-{name}.txt"
    folder = ENVIRONMENTS / name
    with _locked(name):
        stamp = folder / "installed"
        wanted = hashlib.sha256(sys.version.encode() + requirements.read_bytes()).hexdigest()
        if not stamp.exists() or stamp.read_text() != wanted:
            _install(folder, requirements)
            stamp.write_text(wanted)
    return folder / "bin" / "python"


def _install(folder: Path, requirements: Path) -> None:
    venv.create(folder, with_pip=True, clear=True)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "--disable-pip-version-check"]
    done = subprocess.run(
        [*pip, "install", "--quiet", "--requirement", str(requirements)],
        capture_output=True,
        text=True,
        timeout=INSTALL_TIMEOUT_S,
    )
    if done.returncode != 0:
        raise AssertionError(f"pip could not install {requirements.name}:\n{done.stderr}")


@contextmanager
def _locked(name: str) -> Iterator[None]:
    """Test processes that run at once install once."""
    ENVIRONMENTS.mkdir(exist_ok=True)
    with (ENVIRONMENTS / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
