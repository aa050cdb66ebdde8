"""Training recipes: learning rates against torch's own, and the options of speed by real commands."""

import pytest
import torch
from torch.optim import SGD, lr_scheduler

from fmlightning.cli import device as native
from fmlightning.cli import trainer_options as cli
from fmlightning.cli.build import instantiate_model
from fmlightning.cli.load import load
from fmlightning.flow.determinism import seeded
from fmlightning.flow.keys import Key
from fmlightning.runs.directory import Run
from fmlightning.runs.weights import read_weights
from fmlightning.training.lr_schedules import (
    Constant,
    Cosine,
    InverseSquareRoot,
    LinearDecay,
    PolynomialDecay,
)

TOTAL, WARM = 40, 8


def optimizer():
    return SGD([torch.nn.Parameter(torch.zeros(()))], lr=0.3)


def rates(make, steps=TOTAL, **settings):
    opt = optimizer()
    schedule = make(opt, **settings)
    if hasattr(schedule, "end_at"):
        schedule.end_at(TOTAL)
    found = []
    for _ in range(steps):
        found.append(opt.param_groups[0]["lr"])
        opt.step()
        schedule.step()
    return found


def warmed(make):
    """torch's warm-up, then one of torch's schedules over the steps that are left."""

    def build(opt):
        first = lr_scheduler.LinearLR(opt, start_factor=1 / (WARM + 1), total_iters=WARM)
        return lr_scheduler.SequentialLR(opt, [first, make(opt)], [WARM])

    return build


LEFT = TOTAL - WARM
TORCHS = {
    "constant": (Constant, {}, lambda o: lr_scheduler.ConstantLR(o, factor=1.0)),
    "cosine": (Cosine, {}, lambda o: lr_scheduler.CosineAnnealingLR(o, LEFT)),
    "line": (LinearDecay, {}, lambda o: lr_scheduler.PolynomialLR(o, LEFT, power=1.0)),
    "polynomial": (
        PolynomialDecay, {"power": 2.5}, lambda o: lr_scheduler.PolynomialLR(o, LEFT, power=2.5),
    ),
    "to a last rate": (
        PolynomialDecay, {"final": 0.1}, lambda o: lr_scheduler.LinearLR(o, 1.0, 0.1, total_iters=LEFT),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TORCHS)
def test_the_rates_are_those_of_torch(name):
    ours, settings, theirs = TORCHS[name]
    # torch multiplies from step to step, and its rounding adds up
    assert rates(ours, warmup_steps=WARM, **settings) == pytest.approx(
        rates(warmed(theirs)), rel=1e-9, abs=1e-12
    )


def test_the_inverse_square_root_is_edm2s():
    found = rates(InverseSquareRoot, warmup_steps=3, constant_steps=10)
    assert found[:3] == pytest.approx([0.075, 0.15, 0.225])
    assert found[3:11] == pytest.approx([0.3] * 8)
    assert found[20] == pytest.approx(0.3 / 2**0.5)
    assert found[39] == pytest.approx(0.3 / 3.9**0.5)


@pytest.mark.parametrize(
    ("make", "settings"),
    [(PolynomialDecay, {"power": 0.0}), (PolynomialDecay, {"final": 1.5}),
     (InverseSquareRoot, {"constant_steps": 0}), (Constant, {"warmup_steps": -1})],
)  # fmt: skip
def test_settings_that_make_no_schedule_are_refused(make, settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        make(optimizer(), **settings)


SHORT = ("--model.network.width=16", "--data.val_size=64", "--data.eval_batch_size=64")


def short(fit, name, *options, steps=2):
    end = (f"--trainer.max_steps={steps}", f"--trainer.val_check_interval={steps}")
    return fit("toy/mixture", *SHORT, *end, *options, name=name)


def initial(folder):
    """The weights a run started from."""
    config = Run.open(folder).config
    with seeded(Key(config["seed_everything"]).fold("weights")):
        return instantiate_model(config).network.state_dict()


def moved(folder):
    """How far its raw weights are from there."""
    weights, start = read_weights(folder, ema=False)[0], initial(folder)
    return float(sum((weights[k] - v).square().sum() for k, v in start.items()).sqrt())


def test_gradients_are_clipped(fit):
    """Gradient descent with a rate of one moves by the gradient, whose norm is at most the bound."""
    descent = ("--model.optimizer=SGD", "--model.optimizer.lr=1", "--model.scheduler=null")
    free = moved(short(fit, "free", *descent, steps=1))
    bound = free / 2
    clipped = moved(
        short(fit, "clipped", *descent, f"--trainer.gradient_clip_val={bound}", steps=1)
    )
    assert clipped == pytest.approx(bound, rel=1e-4)  # torch adds 1e-6 to the norm


def test_a_polynomial_decay_by_its_name_reaches_the_optimiser(fit):
    folder = short(
        fit, "decay", "--model.optimizer=SGD", "--model.optimizer.lr=1e-3",
        "--model.scheduler=PolynomialDecay", "--model.scheduler.final=0.25",
        "--model.scheduler.warmup_steps=1", "--trainer.log_every_n_steps=1", steps=5,
    )  # fmt: skip
    header, *rows = (folder / "metrics.csv").read_text().splitlines()
    column = header.split(",").index("train/lr")
    found = [float(r.split(",")[column]) for r in rows if r.split(",")[column]]
    assert found == pytest.approx([5e-4, 1e-3, 8.125e-4, 6.25e-4, 4.375e-4])


def test_a_decay_without_an_end_is_refused(fmlightning):
    status, shown = fmlightning(
        "fit", "--config", "configs/toy/mixture.yaml", "--model.scheduler=PolynomialDecay",
        "--trainer.max_steps=-1", "--trainer.max_time=00:00:01:00",
    )  # fmt: skip
    assert status == 2
    assert "model.scheduler=PolynomialDecay" in shown


def weights_of(folder):
    return torch.cat([v.flatten() for v in read_weights(folder, ema=False)[0].values()])


def test_fused_adamw_is_adamw(fit):
    fused, plain = (
        weights_of(short(fit, name, f"--model.optimizer.fused={value}", steps=5))
        for name, value in (("fused", "true"), ("plain", "false"))
    )
    # the same operations in another order; 5 steps of 5e-3
    torch.testing.assert_close(fused, plain, rtol=0, atol=1e-5)


def test_compiled_training_is_the_same(fit, monkeypatch):
    traced = []

    def trace(module, *args, **kwargs):
        traced.append(module)
        module._compiled_call_impl = torch.compile(module._call_impl, backend="eager")

    plain = weights_of(short(fit, "plain", steps=3))
    monkeypatch.setattr(torch.nn.Module, "compile", trace)
    compiled = weights_of(short(fit, "compiled", "--model.compile=true", steps=3))
    assert traced
    torch.testing.assert_close(compiled, plain, rtol=0, atol=1e-5)  # rounding, as above


DIGITS = ("--trainer.max_steps=2", "--trainer.val_check_interval=2", "--model.network.channels=8",
          "--model.network.head_channels=8")  # fmt: skip


def test_channels_last_trains_the_same_network(fit):
    plain = fit("images/digits", *DIGITS, name="plain")
    folder = fit("images/digits", *DIGITS, "--model.channels_last=true", name="last")
    torch.testing.assert_close(weights_of(folder), weights_of(plain), rtol=0, atol=1e-4)
    kernels = [p for p in load(folder).network.parameters() if p.ndim == 4 and p.shape[2] > 1]
    assert kernels
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in kernels)


def test_channels_last_is_refused_where_there_are_no_channels(fmlightning):
    status, shown = fmlightning(
        "fit", "--config", "configs/toy/mixture.yaml", "--model.channels_last=true"
    )
    assert status == 2
    assert "model.channels_last=true" in shown
    assert "TimeMLP" in shown


def test_the_options_of_speed_go_together(fit, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "compile", lambda *_, **__: None)
    folder = fit(
        "images/digits", *DIGITS, "--config=configs/trainer/gpu.yaml", "--trainer.accelerator=cpu",
        "--model.scheduler=PolynomialDecay", "--trainer.gradient_clip_val=0.5",
    )  # fmt: skip
    weights = read_weights(folder)[0]
    assert all(w.dtype == torch.float32 and bool(w.isfinite().all()) for w in weights.values())


@pytest.mark.parametrize("has", [False, True])
def test_bf16_on_a_processor_without_it_is_warned_of(
    fmlightning, fit, monkeypatch, tmp_path, capsys, has
):
    monkeypatch.setattr(native, "native_bf16", lambda: has)
    shown = []
    monkeypatch.setattr(cli, "say", shown.append)
    short(fit, "bf16", "--trainer.precision=bf16-mixed")
    warned = [s for s in shown if "no bf16 instructions" in s]
    assert bool(warned) is not has
    assert all("trainer.precision=bf16-mixed" in s and "32-true" in s for s in warned)
