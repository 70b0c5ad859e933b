"""Draw docs/roofline.png from a ladder's numbers: why the gain of AMP ends.

Each bar is the least time that one update can take on the machine that the ladder ran on. In the last but one bar it is
split by group of operators; the last bar is the same without products, which no 16-bit type can make shorter.

    python main.py compare --ladder --checkpoint_name ladder
    python docs/roofline.py checkpoint/ladder/ladder.json
"""

import json
import sys
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ampscope.look import FAINT, INK, STYLES, picture  # noqa: E402

PRODUCTS = ("convolutions", "matrix products")


def rungs_of(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rungs that were kept and have a bound, up to the one with a known roofline."""
    rungs = []
    for rung in found["rungs"]:
        if rung["skipped"] or not rung["kept"]:
            continue
        rungs.append(rung)
        if rung["name"] == found["roofline_of"]:
            break
    return rungs


def groups_of(found: dict[str, Any]) -> dict[str, float]:
    """Return the bound of each group of operators in milliseconds: products first, then the longest."""
    times = {name: 1e3 * group["bound_seconds"] for name, group in found["roofline"]["groups"].items()}
    small = 0.02 * sum(times.values())
    groups = {name: times[name] for name in PRODUCTS if times.get(name, 0) >= small}
    rest = {name: time for name, time in times.items() if name not in groups}
    groups |= dict(sorted(((name, time) for name, time in rest.items() if time >= small), key=lambda row: -row[1]))
    others = sum(time for time in rest.values() if time < small)
    return groups | ({"others": others} if others else {})


def draw(axes: Axes, found: dict[str, Any]) -> str:
    """Draw the bars; return their message in one sentence."""
    rungs = rungs_of(found)
    batch = found["setting"]["batch_size"]
    names = [rung["name"] for rung in rungs]
    bounds = [1e3 * batch / rung["bound_images_per_second"] for rung in rungs]
    measured = [1e3 * rung["seconds_per_update"] for rung in rungs]
    groups = groups_of(found)
    before = len(rungs) - 1
    axes.barh(range(before), bounds[:before], 0.6, color=FAINT, label="bound, all operators")
    floor = sum(time for name, time in groups.items() if name not in PRODUCTS)
    for place, shown in (
        (before, groups),
        (before + 1, {name: t for name, t in groups.items() if name not in PRODUCTS}),
    ):
        left = 0.0
        for number, (name, time) in enumerate(groups.items()):
            if name not in shown:
                continue
            color, *_, hatch = STYLES[number % len(STYLES)]
            label = name if place == before else None
            axes.barh(place, time, 0.6, left=left, color=color, hatch=hatch, edgecolor="white", label=label)
            left += time
    axes.plot(measured, range(len(rungs)), "D", color=INK, markersize=6, label="measured")
    axes.set_yticks(range(before + 2), [*names, "the same without products"])
    axes.invert_yaxis()
    axes.set_xlabel(f"milliseconds for one update of {batch} images of {found['setting']['image_size']} pixels")
    axes.grid(axis="y", visible=False)
    axes.legend(loc="lower right", fontsize=9)
    top = max(bounds)
    axes.set_title(f"The least time of an update: {found['setting']['model_name']}, {found['machine']['name']}")
    return (
        f"Without any time for products an update would still take {floor:.0f} ms of {bounds[-1]:.0f}: "
        f"the bound falls by {top / bounds[-1]:.1f} from the first rung, and could fall by {top / floor:.1f} at most."
    )


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: python docs/roofline.py LADDER.json")
    found = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    with picture(Path(__file__).with_suffix(".png"), 9, 1.6 + 0.5 * (len(rungs_of(found)) + 1)) as figure:
        print(draw(figure.subplots(), found))


if __name__ == "__main__":
    main()
