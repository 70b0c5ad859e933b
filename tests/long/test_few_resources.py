"""Few open files, few processes, little shared memory: real limits of a real process, whose start counts, too.

Each ends with status 0, or with one sentence, and none stands still.
"""

import os
import shutil
import subprocess
import sys

import pytest
import tiny

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="as Linux does it")
CAPABILITIES = "-all,+dac_read_search,+dac_override"  # the limit of processes does not hold for root


def ended(words, shell: str, **variables: str) -> tuple[int, str, str]:
    """Status, output and errors of the program, started by a shell that does `shell` with it."""
    command = ["bash", "-c", f'{shell} "$@"', "bash", sys.executable, str(tiny.ROOT / "main.py"), *map(str, words)]
    environment = tiny.environment(**variables)
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, env=environment)
    assert "Traceback" not in done.stdout + done.stderr and "Exception ignored" not in done.stderr, done.stderr
    return done.returncode, done.stdout, done.stderr


def streaming(data, runs, *more) -> list[str]:
    words = tiny.words(data, runs, "--model=squeezenet1_1", "--cache=none", "--num_workers=8", "--epochs=1", *more)
    return [word for word in words if word != "--quiet"]


@pytest.mark.parametrize("count", [16, 28, 64, 128])
def test_few_open_files(data, tmp_path, count):
    process = tiny.start(tiny.words(data, tmp_path, "--cache=none", "--num_workers=8"), limits={"NOFILE": count})
    status, out, err = tiny.finish(process, 120)
    assert status == 0 or (status == 1 and err.startswith("error: ")), err
    assert "Traceback" not in out + err and "Exception ignored" not in err, err


def test_few_open_files_from_the_start(data, tmp_path):
    status, out, err = ended(streaming(data, tmp_path), "ulimit -n 16;")
    assert status == 0 or (status == 1 and err.startswith("error: ")), err


@pytest.mark.parametrize("count", [1, 40])
def test_few_processes(data, tmp_path, count):
    if shutil.which("setpriv") is None or os.getuid():
        pytest.skip("this process may not become another user")
    tmp_path.chmod(0o777)
    user = f"setpriv --reuid=12345 --regid=12345 --clear-groups --inh-caps={CAPABILITIES} --ambient-caps={CAPABILITIES}"
    shell = f"{user} bash -c 'ulimit -u {count}; exec \"$@\"' bash"
    status, out, err = ended(streaming(data, tmp_path), shell, OPENBLAS_NUM_THREADS="1", HOME=str(tmp_path))
    assert status == 0, err
    assert "instead of 8" in out


@pytest.mark.parametrize("options", ["size=1m", "ro,size=1m"])
def test_little_shared_memory(data, tmp_path, options):
    mount = ["unshare", "-m", "mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", "/dev/shm"]
    if shutil.which("unshare") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this process may not mount")
    process = tiny.start(streaming(data, tmp_path), shared_memory=options)
    status, out, err = tiny.finish(process, 120)
    assert status == 0, err
    assert ("by no workers" in out) == ("ro" in options)  # without locks there are none


def test_a_comparison_with_closed_streams(data, tmp_path):
    words = [word for word in tiny.words(data, tmp_path, "--epochs=1", name="all")[1:] if "tiny_classifier" not in word]
    words = ["compare", "--model=squeezenet1_1", "--precisions=fp32", *words]
    command = ["bash", "-c", '"$@" <&- >&- 2>&-', "bash", sys.executable, str(tiny.ROOT / "main.py"), *words]
    assert subprocess.run(command, timeout=180, env=tiny.environment()).returncode == 0
    assert (tmp_path / "all" / "fp32" / "result.json").exists()
    assert (tmp_path / "all" / "performance_table.md").read_text().startswith("| Algorithm")
