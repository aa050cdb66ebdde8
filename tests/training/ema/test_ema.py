"""The average of the weights: what it is, and the six ways in which Lightning's own loses weights."""

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import nn

from fmlightning.data.toy import ToyData
from fmlightning.nets.mlp import TimeMLP
from fmlightning.training.ema.callback import EMA, evaluation_weights
from fmlightning.training.module import FlowMatching


def train(ema, *callbacks, steps=12, tmp_path=None, **options):
    module = FlowMatching(TimeMLP(width=16, depth=2))
    trainer = Trainer(
        max_steps=steps, callbacks=[ema, *callbacks], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, accelerator="cpu", default_root_dir=tmp_path,
        use_distributed_sampler=False, **options,
    )  # fmt: skip
    data = ToyData(batch_size=32, val_size=64, test_size=64, steps_per_epoch=6)
    return trainer, module, data


class Recorder(Callback):
    """The raw weights after every optimiser step."""

    def __init__(self):
        self.weights = []

    def on_train_batch_end(self, trainer, module, *args):
        self.weights.append([p.detach().double().clone() for p in module.network.parameters()])


def test_it_is_the_average_of_equation_1(tmp_path):
    ema, recorder = EMA(decay=0.8), Recorder()
    trainer, module, data = train(ema, recorder, tmp_path=tmp_path)
    initial = [p.detach().double().clone() for p in module.network.parameters()]
    trainer.fit(module, data)
    expected = initial
    for n, weights in enumerate(recorder.weights, start=1):
        d = min(0.8, (1 + n) / (10 + n))
        expected = [d * e + (1 - d) * w for e, w in zip(expected, weights, strict=True)]
    assert ema.updates == 12
    for e, s in zip(expected, ema.shadow.values(), strict=True):
        torch.testing.assert_close(s.double(), e, atol=1e-6, rtol=1e-5)  # float32 sums of 12 terms


def test_it_counts_optimiser_steps_not_batches(tmp_path):
    ema = EMA()
    trainer, module, data = train(ema, steps=5, accumulate_grad_batches=3, tmp_path=tmp_path)
    trainer.fit(module, data)
    assert ema.updates == 5


def test_raw_weights_survive_the_end_of_training(tmp_path):
    recorder = Recorder()
    trainer, module, data = train(EMA(decay=0.99), recorder, tmp_path=tmp_path)
    trainer.fit(module, data)
    for p, w in zip(module.network.parameters(), recorder.weights[-1], strict=True):
        assert torch.equal(p.double(), w)


def test_an_exception_inside_validation_leaves_raw_weights_raw(tmp_path):
    class Fails(Exception):
        pass

    class Breaks(Callback):
        def on_validation_batch_end(self, *args):
            raise Fails

    recorder = Recorder()
    ema = EMA(decay=0.99)
    trainer, module, data = train(
        ema, recorder, Breaks(), val_check_interval=4, num_sanity_val_steps=0, tmp_path=tmp_path
    )
    with pytest.raises(Fails):
        trainer.fit(module, data)
    for p, w in zip(module.network.parameters(), recorder.weights[-1], strict=True):
        assert torch.equal(p.double(), w)


def test_validation_sees_the_average_and_gives_it_back(tmp_path):
    ema = EMA(decay=0.99)
    trainer, module, data = train(ema, tmp_path=tmp_path)
    trainer.fit(module, data)
    raw = [p.detach().clone() for p in module.network.parameters()]
    # else giving back the wrong ones would not show
    assert not all(torch.equal(r, s) for r, s in zip(raw, ema.shadow.values(), strict=True))
    with evaluation_weights(trainer, module.network):
        assert not module.network.training
        for p, s in zip(module.network.parameters(), ema.shadow.values(), strict=True):
            assert torch.equal(p, s)
    for p, r in zip(module.network.parameters(), raw, strict=True):
        assert torch.equal(p, r)


def test_before_the_first_step_the_raw_weights_are_used():
    network, ema = nn.Linear(2, 2), EMA()
    before = network.weight.detach().clone()
    with ema.swapped(network):
        assert torch.equal(network.weight, before)


def test_zero_switches_it_off(tmp_path):
    ema = EMA(decay=0.0)
    trainer, module, data = train(ema, tmp_path=tmp_path)
    trainer.fit(module, data)
    assert not ema.ready
    assert ema.state_dict()["shadow"] == {}


def test_bf16_weights_do_not_round_the_average(tmp_path):
    ema = EMA(decay=0.9)
    trainer, module, data = train(ema, precision="bf16-true", tmp_path=tmp_path)
    trainer.fit(module, data)
    before = {n: s.clone() for n, s in ema.shadow.items()}
    assert all(s.dtype == torch.float32 for s in before.values())
    with ema.swapped(module.network):
        pass
    assert all(torch.equal(s, before[n]) for n, s in ema.shadow.items())


def test_it_is_in_the_checkpoint_and_read_without_running_code(tmp_path):
    ema = EMA(decay=0.9)
    trainer, module, data = train(ema, tmp_path=tmp_path)
    trainer.fit(module, data)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    state = torch.load(tmp_path / "a.ckpt", weights_only=True)["callbacks"]["EMA"]
    assert state["updates"] == 12
    other = EMA(decay=0.9)
    other.load_state_dict(state)
    assert all(torch.equal(s, other.shadow[n]) for n, s in ema.shadow.items())


@pytest.mark.parametrize("decay", [-0.1, 1.0, 2.0, [], [0.99, 0.99]])
def test_a_decay_outside_its_range_is_refused(decay):
    with pytest.raises(ValueError, match="decay"):
        EMA(decay=decay)
