"""`fmlightning evaluate RUN`: solvers x NFE x grids x guidance x weights, on the same noise.

Each combination is a cell: a file in RUN/evaluations, written when its scores are complete. The same command again
reads what is there and computes the rest. The samples of a cell are made once, and every metric sees them.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch
from jsonargparse.typing import NonNegativeInt, PositiveFloat, PositiveInt
from torch import distributed

from fmlightning.cli.parser import FlowParser
from fmlightning.cli.quiet import quiet
from fmlightning.cli.sampling_options import add_flag, add_guide_model, add_path, path_of, set_own
from fmlightning.data.order import Shard
from fmlightning.flow.guidance import Guidance
from fmlightning.flow.labels import LabelOrder
from fmlightning.flow.precision import Precision
from fmlightning.metrics.metric import FlowMetric
from fmlightning.studies.evaluate.lists import BOOLEANS, FLOATS, INTEGERS, Classes
from fmlightning.studies.evaluate.scoring import Scorer
from fmlightning.studies.evaluate.table import show

DESCRIPTION = """Score a trained run under many solvers, budgets and guidance scales.

Writes a file a cell, evaluations.json, table.md and nfe.png into RUN/evaluations; the same command again computes
only what is missing. Starts on several processes under torchrun, with the same result."""


def main(argv: list[str]) -> int:
    """Parse the command line, fill in the cells that are missing, and show the table."""
    options = parse(argv)
    with quiet(), processes() as shard:
        bench = Scorer.open(options, shard)
        records = bench.records()
        if shard.rank == 0:
            show(bench.folder, records)
    return 0


def parse(argv: list[str]) -> Any:
    parser = FlowParser(
        prog="fmlightning evaluate",
        usage="%(prog)s RUN [--OPTION VALUE ...]",
        description=DESCRIPTION,
        allow_abbrev=False,
    )
    parser.add_argument("run", type=str, help="Run directory, or a checkpoint in one.")
    parser.add_argument(
        "--solvers",
        type=Classes(),
        default=["euler", "heun2", "dopri5"],
        help="Methods of ODESolver and SDESolver, or classes.",
    )
    parser.add_argument(
        "--nfe", type=INTEGERS, default=[5, 10, 20, 50, 100],
        help="Budgets of the fixed-step methods, in evaluations of the field; each takes as many whole steps as fit.",
    )  # fmt: skip
    parser.add_argument(
        "--tolerances", type=FLOATS, default=[1e-5], help="rtol = atol of the adaptive methods."
    )
    parser.add_class_arguments(
        Guidance, "guidance", skip={"scale"}, help="By default the run's own."
    )
    parser.add_argument(
        "--guidance.scale", type=FLOATS, default=None, help="Scales; by default the run's own."
    )
    add_guide_model(parser)
    add_path(parser)
    parser.add_argument(
        "--grids", type=Classes(), default=None,
        help="Where fixed steps stop: UniformGrid,EDMGrid or a list of classes; by default the run's own.",
    )  # fmt: skip
    parser.add_argument(
        "--metrics",
        type=list[FlowMetric] | None,
        default=None,
        help="By default evaluation.metrics of the run.",
    )
    parser.add_argument(
        "--labels", type=LabelOrder | None, default=None,
        help="Of samples: as frequent as in the reference data (the default), or balanced, each class in turn.",
    )  # fmt: skip
    parser.add_argument(
        "--batch_size",
        type=PositiveInt | None,
        default=None,
        help="Samples at once; by default the run's.",
    )
    parser.add_argument(
        "--seed", type=NonNegativeInt | None, default=None, help="By default the run's."
    )
    parser.add_argument(
        "--ema", type=BOOLEANS, default=[True], help="Averaged weights (true), raw ones (false), or true,false."
    )  # fmt: skip
    parser.add_argument(
        "--reference", type=PositiveFloat | None, default=None,
        help="Also score how far each sample is from its exact end: dopri5 at this tolerance, in float64.",
    )  # fmt: skip
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda, cuda:1, mps.")
    parser.add_argument(
        "--precision", type=Precision | None, default=None,
        help="Of the network alone: fp64, fp32, bf16 or fp16; time and samples keep theirs. By default the run's.",
    )  # fmt: skip
    add_flag(parser, "--compile", "Compile the network, and measure what that brings.")
    add_flag(parser, "--overwrite", "Compute all cells again.")
    if any(word.partition("=")[0] == "--guidance" for word in argv):
        raise ValueError("--guidance is a group of options: scales are --guidance.scale 1,2")
    set_own(parser, argv, *(f.name for f in fields(Guidance) if f.name != "scale"))
    options = parser.parse_args(argv)
    options.path = path_of(options)
    return options


@contextmanager
def processes() -> Iterator[Shard]:
    """This process among those of torchrun, or alone."""
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if world_size == 1:
        yield Shard()
        return
    distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield Shard(distributed.get_rank(), world_size)
    finally:
        distributed.destroy_process_group()
