"""The quick tests and the notebooks on other machines, as far as this one can act as them: `make test-machines`.

`python tests/machines.py NAME ...` takes some of the machines. Exit code 1 if any is red.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
AS_USER = ("--reuid=54321", "--regid=54321")  # without a name, as in a container
SMALL_SHM = "mount -t tmpfs -o size=64m tmpfs /dev/shm"
READS_ALL = ("--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search")  # an interpreter in root's home too
OLD_LIBC = "glibc.cpu.hwcaps=-AVX2,-FMA,-AVX2_Usable,-FMA_Usable"


class Machine(NamedTuple):
    """Environment (None: unset), and what goes before a command; `copy` is a folder for a copy of the clone."""

    environment: dict[str, str | None]
    prefix: tuple[str, ...] = ()
    copy: str = ""
    root: bool = False


MACHINES = {
    "aten-default": Machine({"ATEN_CPU_CAPABILITY": "default"}),
    "aten-avx2": Machine({"ATEN_CPU_CAPABILITY": "avx2"}),
    "onednn-sse41": Machine({"ONEDNN_MAX_CPU_ISA": "SSE41"}),
    "onednn-avx2": Machine({"ONEDNN_MAX_CPU_ISA": "AVX2"}),
    "mkl-compatible": Machine({"MKL_CBWR": "COMPATIBLE"}),
    "old-libm": Machine({"NPY_DISABLE_CPU_FEATURES": "X86_V3 X86_V4", "GLIBC_TUNABLES": OLD_LIBC}),
    "one-thread": Machine({"OMP_NUM_THREADS": "1"}, ("taskset", "-c", "0")),
    "no-interrupt": Machine({}, ("sh", "-c", """trap '' INT; exec "$@" """, "sh")),
    "no-home": Machine({"HOME": None}),
    "c-locale": Machine({"LC_ALL": "C", "LANG": None}),
    "odd-path": Machine({}, copy="a clone über uns"),
    "no-shm": Machine({}, ("unshare", "-m", "sh", "-c", f"""{SMALL_SHM} && exec "$@" """, "sh"), root=True),
    "ordinary-user": Machine({}, ("setpriv", *AS_USER, "--clear-groups", *READS_ALL), "clone", root=True),
}


def copied(folder: Path) -> Path:
    """A copy of what git would keep of the clone; only its owner may write there."""
    listed = subprocess.run(
        ["git", "ls-files", "-zco", "--exclude-standard"], cwd=ROOT, capture_output=True, check=True
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    return folder


def run(machine: Machine, name: str, folder: Path) -> str:
    """What came of it: "green", what was red, or why this machine cannot act as that one; the output is in a log."""
    if machine.root and os.geteuid():
        return "not here: needs root"
    if not shutil.which(tool := [*machine.prefix, "sh"][0]):
        return f"not here: needs {tool}"
    tree = copied(folder / machine.copy) if machine.copy else ROOT
    temporary = folder / "tmp"
    temporary.mkdir()
    temporary.chmod(0o1777)
    own = {"PYTHONPATH": str(tree), "TMPDIR": str(temporary), "HOME": str(temporary)}
    environment = {**os.environ, **own, **machine.environment}
    kept = {key: value for key, value in environment.items() if value is not None}
    spread = ["-n", "2"] if machine.prefix[:1] != ("taskset",) else []
    check = ["sptseg.cli", "notebooks", "check", "--jobs", "2", "--output", str(temporary / "notebooks")]
    steps = {"tests": ["pytest", "-q", *spread], "notebooks": check}
    red = []
    with (Path("runs") / "machines" / f"{name}.log").open("w") as log:
        for step, words in steps.items():
            command = [*machine.prefix, sys.executable, "-m", *words]
            done = subprocess.run(command, cwd=tree, env=kept, stdout=log, stderr=subprocess.STDOUT)
            red += [step] if done.returncode else []
    return f"red: {', '.join(red)}; see {log.name}" if red else "green"


def main(names: Sequence[str]) -> int:
    if unknown := set(names) - set(MACHINES):
        raise SystemExit(f"there is no machine {', '.join(unknown)}; there are {', '.join(MACHINES)}")
    Path("runs/machines").mkdir(parents=True, exist_ok=True)
    print("| machine | seconds | |\n|---|---|---|")
    results = []
    for name in names or MACHINES:
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            Path(folder).chmod(0o755)
            results.append(run(MACHINES[name], name, Path(folder)))
        print(f"| {name} | {time.perf_counter() - started:.0f} | {results[-1]} |", flush=True)
    return int(any(result.startswith("red") for result in results))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
