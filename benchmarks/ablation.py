"""Measure what each part of the preset `scratch` gives: train with all, and once without each part.

    python benchmarks/ablation.py --data_dir data --epochs 6

It trains `--preset scratch --amp`; further options are handed on, as here. Prints a table in Markdown. Runs stand in
--checkpoint_dir; those that are finished are only tested again, so that the same command goes on where it was stopped,
and two of them with other --rows may share the folder. Runs with other options there are refused.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROWS = {
    "all parts": (),
    "one size": ("--start_size", "0"),
    "no crops": ("--augment", "flip"),
    "no label smoothing": ("--label_smoothing", "0"),
    "no moving average": ("--ema", "0"),
    "decay on norms, too": ("--decay_norms",),
    "a fifth held out": ("--split", "80,20"),
    "Adam": ("--optimizer", "ADAM", "--weight_decay", "1e-4"),
}


def train(row: str, folder: Path, words: list[str]) -> dict:
    """Return the result of the run of `row`, trained to its end. Raise CalledProcessError if it fails."""
    name = row.replace(" ", "_").replace(",", "")
    begun = (folder / name / "last.pt").exists()
    place = ["--checkpoint_dir", str(folder), "--checkpoint_name", name, "--resume" if begun else "--overwrite"]
    command = [sys.executable, str(ROOT / "main.py"), *words, *ROWS[row], *place, "--quiet"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)  # hide the run's own table
    return json.loads((folder / name / "result.json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint_dir", type=Path, default=Path("checkpoint", "ablation"))
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW")
    arguments, words = parser.parse_known_args()
    whole = None
    print("| | Test Accuracy | Difference | Time without evaluation |\n|---|---:|---:|---:|")
    for row in arguments.rows:
        found = train(row, arguments.checkpoint_dir, ["--preset", "scratch", "--amp", *words])
        whole = found["test_acc"] if row == "all parts" else whole
        change = "" if whole is None or row == "all parts" else f"{found['test_acc'] - whole:+.2f}"
        minutes = found["train_seconds"] / 60
        print(f"| {row} | {found['test_acc']:.2f} % | {change} | {minutes:.1f} min |", flush=True)


if __name__ == "__main__":
    main()
