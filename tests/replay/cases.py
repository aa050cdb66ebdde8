"""What the table of replay runs: every training and every sampling by name, with all that the commands are told.

Each option, config file and class is written here and nowhere else in the table, so that one that gets another name
is changed in one place. What a case computes must stay the same bits.
"""

from dataclasses import dataclass

CONFIGS = "configs"
FIT = (
    "--wandb.mode=disabled", "--samples.at_end=false", "--trajectories.at_end=false", "--evaluation.at_end=false",
    "--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu", "--trainer.devices=1",
)  # fmt: skip
SAMPLE = ("--n=64", "--device=cpu")
RUN_DIR, OUT = "--run_dir={}", "--out={}"
DOUBLE = ("--trainer.precision=64-true",)

BLIND = ("--trainer.limit_val_batches=0", "--trainer.num_sanity_val_steps=0")
"""No validation: it costs more than the few steps, and has cases of its own."""


def steps(number: int) -> tuple[str, ...]:
    return (f"--trainer.max_steps={number}",)


@dataclass(frozen=True)
class Training:
    """A run of `fit`: the config, and what the command line changes of it."""

    config: str
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sampling:
    """A run of `sample`: the training whose run it is of, and what it is told."""

    of: str
    options: tuple[str, ...] = ()


MOONS, MIXTURE, DIGITS = "toy/moons", "toy/mixture", "images/digits"
SHORT = (*BLIND, *steps(20))

# -- every config that trains without a download ---------------------------------------------------

WHOLE = (
    MOONS, "toy/checkerboard", MIXTURE, "toy/likelihood", "toy/two_dim_tong2024",
    DIGITS, "images/denoise_digits", "images/digits_latent", "images/photos",
)  # fmt: skip
SHRUNK = {
    # the autoencoder is trained before the flow, and would take most of the time
    "images/digits_latent": ("--data.autoencoder.steps=20",),
    # its steps are so large that rounding grows tenfold in each five of them, to 1e-7 in float64 after fifty
    "images/photos": steps(20),
}
TRAININGS = {name: Training(name, (*BLIND, *steps(50), *SHRUNK.get(name, ()))) for name in WHOLE}

# -- couplings, on the moons; those under conditions on digits --------------------------------------

COUPLING = "--model.coupling="
SMALL = ("--model.network.channels=8", "--model.network.head_channels=8")
PLAIN = {
    "MinibatchOT": ("MinibatchOT",),
    "MinibatchOT-simplex": ("{class_path: MinibatchOT, init_args: {method: simplex}}",),
    "MinibatchOT-blocks": ("{class_path: MinibatchOT, init_args: {ot_batch_size: 64}}",),
    "MinibatchOT-pool": ("{class_path: MinibatchOT, init_args: {ot_batch_size: 1024}}",),
    "MinibatchOT-at-once": ("MinibatchOT", "--model.prefetch=0"),
    "OTPlanWithReplacement": ("OTPlanWithReplacement",),
    "Entropic": ("Entropic",),
    "SchrodingerBridge": ("SchrodingerBridgeCoupling", "--model.path=SchrodingerBridge"),
    "UnbalancedOT": ("UnbalancedOT",),
    "SemidiscreteOT": ("SemidiscreteOT", "--data.train_size=500"),
    # within the step: in threads its random numbers have the precision that is the default at that moment, which in
    # double precision changes between the steps
    "SemidiscreteOT-entropic": (
        "{class_path: SemidiscreteOT, init_args: {reg: 0.1}}", "--data.train_size=500", "--model.prefetch=0",
    ),
}  # fmt: skip
CONDITIONAL = {
    "ClasswiseOT": "ClasswiseOT",
    "ClasswiseOT-entropic": "{class_path: ClasswiseOT, init_args: {within: Entropic}}",
    "ClasswiseOT-pool": "{class_path: ClasswiseOT, init_args: {ot_batch_size: 192}}",
    "C2OT": "{class_path: C2OT, init_args: {ratio: 0.3}}",
    "C2OT-weight": "{class_path: C2OT, init_args: {weight: 10.0}}",
}
TRAININGS |= {
    f"coupling/{name}": Training(MOONS, (*BLIND, *steps(50), COUPLING + value, *more))
    for name, (value, *more) in PLAIN.items()
}
TRAININGS |= {
    f"coupling/{name}": Training(DIGITS, (*SHORT, *SMALL, COUPLING + value))
    for name, value in CONDITIONAL.items()
}

# -- paths, predictions, times and weights, on the moons --------------------------------------------

PATHS = {
    "Linear": "{class_path: Linear, init_args: {sigma_min: 0.1}}",
    **{
        name: name
        for name in (
            "IndependentCFM", "SchrodingerBridge", "VariancePreserving", "VarianceExploding", "Trigonometric",
            "Polynomial", "LinearVP",
        )
    },
}  # fmt: skip
PREDICTIONS = ("velocity", "data", "noise", "score")
TIMES = {
    "LogitNormal": "LogitNormal",
    "Mode": "Mode",
    "CosMap": "CosMap",
    "Beta": "{class_path: Beta, init_args: {a: 2.0, b: 1.5}}",
    "Power": "{class_path: Power, init_args: {power: 1.0}}",
    "Stratified": "{class_path: Stratified, init_args: {of: LogitNormal}}",
}
WEIGHTINGS = ("Unweighted", "AsVelocity", "EDM", "MinSNR")
GAUSSIAN = "--model.source=Gaussian"
TRAININGS |= {f"path/{k}": Training(MOONS, (*SHORT, f"--model.path={v}")) for k, v in PATHS.items()}
TRAININGS |= {
    f"predicts/{k}": Training(MOONS, (*SHORT, GAUSSIAN, f"--model.objective.prediction={k}"))
    for k in PREDICTIONS
}
TRAININGS |= {
    f"times/{k}": Training(MOONS, (*SHORT, f"--model.times={v}")) for k, v in TIMES.items()
}
TRAININGS |= {
    f"weight/{k}": Training(
        MOONS,
        (*SHORT, GAUSSIAN, "--model.objective.prediction=data", f"--model.objective.weighting={k}"),
    )
    for k in WEIGHTINGS
}

# -- what else has numbers of its own ---------------------------------------------------------------

POINTS = "points.npy"
"""A file of points in three dimensions, in the folder of the runs."""

SPACE = ("--model.network.dim=3", GAUSSIAN, "--data.batch_size=100")
TRAININGS |= {
    "space/points": Training(
        MOONS, (*SHORT, *SPACE, "--data.target=PointsFile", f"--data.target.file={POINTS}")
    ),
    "space/mixture": Training(
        MOONS,
        (
            *SHORT, *SPACE,
            "--data.target={class_path: GaussianMixture, init_args: {weights: [0.5, 0.3, 0.2], "
            "means: [[2.0, 0.0, 1.0], [-1.0, 1.5, 0.0], [-0.5, -2.0, -1.0]], stds: [0.5, 0.4, 0.7]}}",
        ),
    ),
    "digits/dropout": Training(
        DIGITS,
        (
            *SHORT, *SMALL, "--model.network.dropout=0.2", "--model.class_dropout_prob=0.3",
            "--trainer.accumulate_grad_batches=2",
        ),
    ),
    "digits/transformer": Training(
        DIGITS,
        (
            *SHORT,
            "--model.network={class_path: DiT, init_args: {in_channels: 1, num_classes: 10, "
            "size: {width: 32, depth: 2, heads: 2, patch: 2}}}",
        ),
    ),
    "averages": Training(
        MOONS, (*SHORT, "--ema.decay=[0.9, 0.99]", "--ema.sigma_rel=[0.05, 0.1]")
    ),
    "hutchinson": Training(
        "toy/likelihood", (*BLIND, *steps(10), "--model.objective.divergence=hutchinson")
    ),
}  # fmt: skip

# -- samples ------------------------------------------------------------------------------------------

METHOD, NUMBER = "--solver.method={}", "--solver.num_steps={}"
GRID = "--model.solver={{method: {}, num_steps: 20, grid: {}}}"
GRIDS = {"EDMGrid": "ab3", "ShiftedGrid": "euler", "LogSNRGrid": "dpmpp_2m"}
ON_A_GRID = {
    name: Training(MOONS, (*SHORT, GRID.format(method, name))) for name, method in GRIDS.items()
}
"""Only the config of a run names the grid of its solver."""

IN_TURN = "--labels=balanced"
"""The labels that the first version dealt."""

SAMPLINGS = {
    f"moons/{method}": Sampling(MOONS, (METHOD.format(method), NUMBER.format(20)))
    for method in ("euler", "heun2", "ab3", "dpmpp_2m")
}
SAMPLINGS |= {f"moons/{name}": Sampling(f"grid/{name}") for name in ON_A_GRID}
SAMPLINGS |= {
    "moons/dopri5": Sampling(MOONS, (METHOD.format("dopri5"),)),
    "moons/raw": Sampling(MOONS, ("--ema=false",)),
    "digits/guided": Sampling(
        "digits/dropout", (NUMBER.format(10), "--guidance.scale=2", IN_TURN)
    ),
    "digits/zero-star": Sampling(
        "digits/dropout",
        (NUMBER.format(10), "--guidance.scale=2", "--guidance.rescale=true", "--guidance.zero_until=0.04",
         IN_TURN),
    ),
    "digits/restored": Sampling("images/denoise_digits", (NUMBER.format(5),)),
    "digits/decoded": Sampling("images/digits_latent", (NUMBER.format(5), IN_TURN)),
}  # fmt: skip

# -- scores ---------------------------------------------------------------------------------------------

METRICS = {
    "moons": Training(
        MOONS, (*steps(50), "--trainer.val_check_interval=25", "--trainer.log_every_n_steps=10")
    ),
    "mixture": Training(
        MIXTURE,
        (
            *steps(50), "--trainer.val_check_interval=25", "--trainer.log_every_n_steps=10", "--data.val_size=2000",
        ),
    ),
    "digits": Training(
        DIGITS,
        (
            *steps(20), *SMALL, "--trainer.val_check_interval=10", "--trainer.log_every_n_steps=5",
            "--evaluation.at_end=true", "--evaluation.metrics=[{class_path: Wasserstein, init_args: {subsets: 1, "
            "size: 100}}]", "--model.solver.num_steps=5", "--evaluation.labels=balanced",
        ),
    ),
}  # fmt: skip
EVALUATE = (
    "--solvers=euler,dopri5", "--nfe=10", "--device=cpu",
    "--metrics=[{class_path: NegativeLogLikelihood, init_args: {size: 500}}, "
    "{class_path: Wasserstein, init_args: {subsets: 2, size: 500}}]",
)  # fmt: skip

DEMO = {
    "moons": (Training(MOONS, ("--evaluation.at_end=true",)), ("--n=2000", "--device=cpu")),
    "digits": (
        Training(DIGITS, ("--evaluation.at_end=true", "--evaluation.labels=balanced")),
        ("--n=100", "--device=cpu", IN_TURN),
    ),
}
"""The runs of `make demo`: their training, and what `sample` is told of them."""

OLD_SAMPLE, RESUMED = ("--n=16", "--device=cpu"), "--ckpt_path=auto"
"""What is done with the runs of an earlier version."""

CHEAP = (
    MOONS, "coupling/MinibatchOT", "path/IndependentCFM", "predicts/noise", "times/LogitNormal",
    "samples/moons/euler", "samples/moons/dopri5", "metrics/moons", "likelihood",
)  # fmt: skip
"""Cases of the fast tests; the others are slow."""
