"""Stop and resume a real training, and compare its files bit for bit with those of one that nothing disturbed.

The options are those of `python main.py train`, on your own data, model, precision and machine. SIGINT stops the
training after an update, `--resume` goes on, as often as `--stops` says. Both checkpoints, the metrics, the result and
the predictions must be equal. Off the CPU a second undisturbed training tells whether there is anything to prove.

    python benchmarks/verify_resume.py --demo --amp --epochs 2
    python benchmarks/verify_resume.py --stops 5 --data_dir data --model resnet50 --cache none --epochs 3
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from tiny import config, outcome  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stops", type=int, default=3, help="how often the training is stopped and resumed")
    arguments, words = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        runs = Path(folder)
        finish(start(words, runs, "straight"), 0)
        straight = outcome(runs / "straight")
        if config(runs / "straight")["device"] != "cpu":
            finish(start(words, runs, "again"), 0)
            if differences(straight, outcome(runs / "again")):
                sys.exit("two trainings that nothing disturbed differ on this device: a resumed one proves nothing.")
        for number in range(1, arguments.stops + 1):
            stop_after(number, start(words, runs, "stopped"), runs / "stopped" / "last.pt")
        finish(start(words, runs, "stopped"), 0)
        different = differences(straight, outcome(runs / "stopped"))
    if different:
        sys.exit(f"the resumed run differs in {len(different)} of {len(straight)} values:\n  " + "\n  ".join(different))
    print(f"resume verified ({arguments.stops} stops): {len(straight)} tensors and values are equal bit for bit")


def start(words: list[str], runs: Path, name: str) -> subprocess.Popen:
    """Start a training, or continue it, that saves after each update."""
    own = [f"--checkpoint_dir={runs}", f"--checkpoint_name={name}", "--checkpoint_every=1u", "--resume=auto"]
    return subprocess.Popen([sys.executable, str(ROOT / "main.py"), "train", *words, *own])


def stop_after(count: int, training: subprocess.Popen, file: Path) -> None:
    """Send SIGINT after `file` was replaced `count` times; exit if the training ends before."""
    seen = {file.stat().st_mtime_ns} if file.exists() else {0}
    goal = len(seen) + count
    while len(seen) < goal and training.poll() is None:
        if file.exists():
            seen.add(file.stat().st_mtime_ns)
        time.sleep(0.002)
    training.send_signal(signal.SIGINT)
    finish(training, 128 + signal.SIGINT)


def finish(training: subprocess.Popen, expected: int) -> None:
    """Wait for a training; exit unless it ends with the expected status."""
    if training.wait() != expected:
        sys.exit(f"exit status {training.returncode} instead of {expected}: train for more --epochs, or fewer --stops.")


def differences(one: dict, other: dict) -> list[str]:
    """Return the names of the values that differ between two finished runs."""
    return [name for name in one | other if one.get(name) != other.get(name)]


if __name__ == "__main__":
    main()
