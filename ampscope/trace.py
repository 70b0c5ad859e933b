"""What one step did, operator by operator, as two modes noted it."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

from ampscope.execution import Event, Execution
from ampscope.finite import Lineage
from ampscope.places import Place, shown
from ampscope.products import Product


@dataclass
class Trace:
    """What one step did.

    `rows`: counts by (phase, module, operator, input types, output type, cast, view); `seconds` by the same key.
    `synchronisations`: counts by (place, what) of reads that make the host wait for the device.
    `zeroed`: places at which gradients are filled with zeros. `with_gradient`: parameters that a gradient reached.
    `evaluated`: classes of modules, by name, that were trained through in evaluation mode.
    `round_trips`: counts by (place, function) of casts to float32 that autocast undoes, and their bytes; `needed` are
    the places of those whose result something else computes with. `narrow`: operator and type by place, of a loss that
    is computed in 16 bits outside autocast. `went_back`: the places through which the backward pass went.
    """

    execution: Execution
    lineage: Lineage
    rows: Counter = field(default_factory=Counter)
    seconds: defaultdict[tuple, float] = field(default_factory=lambda: defaultdict(float))
    synchronisations: Counter = field(default_factory=Counter)
    products: list[Product] = field(default_factory=list)
    zeroed: set[Place] = field(default_factory=set)
    round_trips: Counter = field(default_factory=Counter)
    round_trip_bytes: Counter = field(default_factory=Counter)
    needed: set[Place] = field(default_factory=set)
    narrow: dict[Place, tuple[str, str]] = field(default_factory=dict)
    went_back: set[Place | None] = field(default_factory=set)
    float32_places: dict[tuple, tuple] = field(default_factory=dict)
    first_events: list[Event] = field(default_factory=list)
    first_ended: bool = False
    unsafe: dict[Place, str] = field(default_factory=dict)  # functions that CUDA's autocast refuses
    unfused: dict[Place, list[str]] = field(default_factory=dict)  # of calls of attention: what no fused kernel takes
    with_gradient: set[str] = field(default_factory=set)
    evaluated: dict[str, str] = field(default_factory=dict)
    error: BaseException | None = None
    error_place: Place | None = None
    refused: tuple[str, Place | None] = ("", None)  # what raised in the backward pass, and the line of its forward

    def records(self, kinds: dict[str, str]) -> list[dict[str, Any]]:
        """Return the rows as records in order of first appearance; `kinds` are the modules' classes by name.

        Keys: phase (forward, loss, backward), module (its name, "" if there is none), kind (its class), op, inputs
        (distinct dtypes, in order), output (dtype), cast (shape and stride of the tensor if the operator changed its
        dtype, else None), view (whether it only reshaped), calls, seconds (spent in it while it was traced).
        """
        names = ("phase", "module", "op", "inputs", "output", "cast", "view")
        return [
            dict(zip(names, key, strict=True))
            | {"inputs": list(key[3]), "kind": kinds.get(key[1], ""), "calls": calls, "seconds": self.seconds[key]}
            for key, calls in self.rows.items()
        ]

    def waits(self) -> list[dict[str, Any]]:
        """Return what the host waits for, by line: the user's own first, then the most frequent."""
        rows = [
            {
                "where": f"{shown(place.file)}:{place.line}",
                "file": place.file,
                "line": place.line,
                "own": place.own,
                "what": what,
                "count": count,
            }
            for (place, what), count in self.synchronisations.items()
        ]
        return sorted(rows, key=lambda row: (not row["own"], -row["count"]))
