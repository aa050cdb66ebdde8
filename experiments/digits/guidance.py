"""Draw what guidance does to digits, from the scores of the sweep beside this file.

python experiments/digits/guidance.py
"""

import argparse
import json
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

HERE = Path(__file__).parent
PANELS = {
    "accuracy@350": "digits read as asked for",
    "frechet_digits@350": "frechet_digits@350",
}
MODEL, REAL = "#00798c", "#444444"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--scores", type=Path, default=HERE / "expected_guidance.json")
    parser.add_argument("--out", type=Path, default=HERE / "guidance.png")
    options = parser.parse_args()
    cells = json.loads(options.scores.read_text())["cells"]
    guided = [cell for cell in cells if "guidance" in cell["axes"]]
    guided.sort(key=lambda cell: cell["axes"]["guidance"])
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    for axis, (metric, label) in zip(figure.subplots(1, 2), PANELS.items(), strict=True):
        curve(axis, guided, metric)
        axis.set(xlabel="guidance scale w", ylabel=label, xticks=[0, 1, 1.5, 2, 4])
        axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(options.out, dpi=130)
    print(f"written: {options.out}")


def curve(axis: Axes, cells: list[dict], metric: str) -> None:
    """The mean over seeds, the seeds, and real digits."""
    w = [cell["axes"]["guidance"] for cell in cells]
    scores = [cell["metrics"][metric] for cell in cells]
    axis.plot(w, [score["mean"] for score in scores], color=MODEL, label="mean of 3 seeds")
    for x, score in zip(w, scores, strict=True):
        axis.plot([x] * score["n"], score["values"], ".", color=MODEL)
    real = cells[0]["metrics"][f"{metric}_real"]["mean"]
    axis.axhline(real, color=REAL, linestyle="--", linewidth=1, label="held-out real digits")


if __name__ == "__main__":
    main()
