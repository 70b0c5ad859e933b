"""A program for the ranks of a job in the tests: main(argv) on networks whose mathematics does not depend on ranks.

Dropout is off and BatchNorm keeps its statistics, so that any number of processes computes the same losses.
It can also kill, stop or spoil one rank at a given update. Knows nothing of what the tests look for.

    python -m torch.distributed.run --nproc_per_node=2 tests/long/ranks.py SCENARIOS.json FOLDER
"""

import contextlib
import io
import json
import math
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import tiny
import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

import assemble
import main as program
import train
from distributed import Ranks
from system import meeting


def steady(build):
    """Return a `build` with dropout off and with batch statistics that never change."""

    def built(*positional, **options):
        network = build(*positional, **options)
        for module in network.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
                module.train = lambda mode=True, module=module: module
        return network

    return built


class Counting(nn.parallel.DistributedDataParallel):
    """Count the exchanges of all gradients."""

    exchanges = 0

    def __init__(self, *positional, **options):
        super().__init__(*positional, **options)

        def count(group, bucket):
            Counting.exchanges += bucket.is_last()
            return allreduce_hook(group, bucket)

        self.register_comm_hook(None, count)


def disturbing(update_weights, what, at):
    """Return `update_weights`, disturbed at update number `at` (from 1): kill, stop or spoil this process."""
    calls = [0]

    def disturbed(network, *positional, **options):
        calls[0] += 1
        if calls[0] == at and what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if calls[0] == at and what == "stop":
            os.kill(os.getpid(), signal.SIGTERM)
        if calls[0] == at and what == "spoil":
            parameter = list(network.parameters())[-1]
            handle = parameter.register_hook(lambda gradient: gradient * math.inf)
            try:
                return update_weights(network, *positional, **options)
            finally:
                handle.remove()
        return update_weights(network, *positional, **options)

    return disturbed


def play(scenario, ranks, attempt):
    """Run one command line; return what this rank observed."""
    update_weights = train.update_weights
    wrapper = nn.parallel.DistributedDataParallel
    trainers = []
    begin = train.Trainer.train
    if scenario.get("rank") == ranks.rank and attempt == "0":
        train.update_weights = disturbing(update_weights, scenario["what"], scenario["at"])
    if scenario.get("count"):
        nn.parallel.DistributedDataParallel = Counting
        Counting.exchanges = 0
    train.Trainer.train = lambda self, **options: trainers.append(self) or begin(self, **options)
    out = io.StringIO()
    err = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = program.main(scenario["words"])
    sys.stdout.write(out.getvalue())
    sys.stderr.write(err.getvalue())
    train.update_weights = update_weights
    nn.parallel.DistributedDataParallel = wrapper
    train.Trainer.train = begin
    seen = {"status": status, "out": out.getvalue(), "err": err.getvalue(), "exchanges": Counting.exchanges}
    if trainers:
        seen["skips"] = [skip for line in trainers[0].progress.history for skip in line["skips"]]
        seen["scale"] = trainers[0].scaler.get_scale()
        seen["weights"] = [float(tensor.double().sum()) for tensor in trainers[0].network.model.state_dict().values()]
    return seen


def run(scenarios, folder):
    """Run all scenarios in one process group and write the observations of each rank to FOLDER/rankN.json."""
    torch.set_num_threads(1)
    assemble.build_model = steady(assemble.build_model)
    assemble.empty_model = steady(assemble.empty_model)
    tiny.register_classifier()
    tiny.leave_out_pictures()
    ranks = Ranks.from_environment()
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    join = meeting.join
    leave = meeting.leave
    meeting.join = lambda ranks: None if torch.distributed.is_initialized() else join(ranks)
    if len(scenarios) > 1:
        meeting.leave = lambda ranks: None
    seen = {}
    for name, scenario in scenarios.items():
        if len(scenarios) > 1:  # each has its own first failure
            os.environ["TORCHELASTIC_RESTART_COUNT"] = f"{attempt} {name}"
        seen[name] = play(scenario, ranks, attempt)
    (folder / f"rank{ranks.rank}.json").write_text(json.dumps(seen))
    leave(ranks)
    return max(entry["status"] for entry in seen.values()) if len(scenarios) == 1 else 0


if __name__ == "__main__":
    meeting.end(run(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])))
