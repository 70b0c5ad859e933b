"""Write the parts of inspect.json that the reports on a step and on a script have in common."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from ampscope.execution import Execution
from ampscope.model_rules import WHY
from ampscope.subject import Subject, core
from ampscope.tensors import dtype_name


def subject_record(subject: Subject, execution: Execution, form: str, types: Iterable[torch.dtype]) -> dict[str, Any]:
    """Return the models, and what the step brings of its own; `types` are those of its autocast regions."""
    models: dict[str, dict[str, Any]] = {
        name: {"class": type(core(model)).__name__, "parameters": sum(part.numel() for part in model.parameters())}
        for name, model in subject.models.items()
    }
    return {
        "name": ", ".join(entry["class"] for entry in models.values()),
        "models": models,
        "form": form,
        "own_autocast": sorted(map(dtype_name, types)),
        "own_scaler": any(event.kind.startswith("scaler.") for event in execution.events),
    }


def product_record(row: dict[str, Any]) -> dict[str, Any]:
    """Return a product left in float32 as plain values, with the reason in words."""
    place = row["place"]
    record = {key: value for key, value in row.items() if key not in ("place", "written_cast")}
    return record | {
        "why": WHY[row["reason"]],
        "where": str(place) if place else None,
        "file": place.file if place else None,
        "line": place.line if place else None,
    }
