"""Bad input, row by row: what is asked for, and the words that the one message must have.

`{run}` is a finished run, `{broken}` a folder of broken copies of it, `{tmp}` an empty folder, `{file}` a file with
nothing useful in it. `yaml` is the content of a second config, over that of the first.
"""

from typing import NamedTuple

MOONS = ("fit", "--config", "configs/toy/moons.yaml", "--wandb.mode=disabled")
DIGITS = ("fit", "--config", "configs/images/digits.yaml", "--wandb.mode=disabled")
NAN = "must be a finite number"


class Row(NamedTuple):
    argv: tuple[str, ...]
    words: tuple[str, ...]
    yaml: str | bytes | None = None


def option(text: str, *words: str) -> Row:
    """An option over the moons; the message names it."""
    name, _, value = text.partition("=")
    return Row((*MOONS, f"--{text}"), (name, *([value] if value else []), *words))


def digits(text: str, *words: str) -> Row:
    name, _, value = text.partition("=")
    return Row((*DIGITS, f"--{text}"), (name, *([value] if value else []), *words))


def several(texts: str, *words: str) -> Row:
    return Row((*MOONS, *(f"--{text}" for text in texts.split())), words)


def config(content: str | bytes, *words: str) -> Row:
    return Row((*MOONS, "--config", "{tmp}/second.yaml"), ("second.yaml", *words), content)


def overlay(content: str, *words: str) -> Row:
    """As `config`, for what is found only when all configs are together."""
    return Row((*MOONS, "--config", "{tmp}/second.yaml"), words, content)


def command(text: str, *words: str) -> Row:
    return Row(tuple(text.split()), words)


OPTIONS = {
    "misspelt": Row(
        (*MOONS, "--model.class_drop_prob=0.1"),
        ("--model.class_drop_prob", "did you mean --model.class_dropout_prob?"),
    ),
    "renamed": Row(
        (*MOONS, "--model.label_drop=0.1"),
        ("--model.label_drop", "it is now --model.class_dropout_prob"),
    ),
    "renamed class": option(
        "data.target=ScatteredGaussians", "did you mean RandomGaussianMixture?"
    ),
    "class that has moved": option(
        "model.path=fmlightning.flow.schedules.Linear", "no such class", "did you mean Linear?"
    ),
    "abbreviated": Row(
        (*MOONS, "--trainer.max_step=3"),
        ("--trainer.max_step", "did you mean --trainer.max_steps?"),
    ),
    "without dashes": Row(
        (*MOONS, "trainer.max_steps=3"), ("trainer.max_steps", "did you mean --trainer.max_steps?")
    ),
    "without value": Row((*MOONS, "--model.path"), ("--model.path", "expected one argument")),
    "empty value": Row((*MOONS, "--trainer.max_steps="), ("--trainer.max_steps", "a whole number")),
    "of another class": Row(
        (*MOONS, "--model.path.sigma=2"),
        ("--model.path.sigma", "unknown option", "--model.path.help"),
    ),
    "text for a number": option("trainer.max_steps=many", "a whole number"),
    "fraction for a count": option("trainer.max_steps=1.5", "a whole number"),
    "flag for a count": Row(
        (*MOONS, "--trainer.max_steps=true"), ("--trainer.max_steps", "a whole number")
    ),
    "list for a number": Row(
        (*MOONS, "--data.batch_size=[1,2]"), ("--data.batch_size [1, 2]", "a whole number")
    ),
    "text for a width": option("model.network.width=wide", "a whole number"),
    "text for a flag": option("rerun=maybe", "true or false"),
    "word for a group": option("wandb=online", "--wandb.NAME"),
    "method for a solver": option("model.solver=dopri5", "no such class", "ODESolver"),
    "renamed argument": Row(
        (*MOONS, "--model.path=IndependentCFM", "--model.path.s=0.1"),
        ("--model.path.s", "it is now noise_std"),
    ),
    "null for a class": Row(
        (*MOONS, "--model.path=null"), ("--model.path None", "Known: ", "Linear")
    ),
    "list for a class": Row(
        (*MOONS, "--model.path=[Linear,Linear]"), ("--model.path", "Known: ", "Linear")
    ),
    "number for a class": option("model.path=3", "no such class", "Linear"),
    "abstract class": option("model.path=AffinePath", "abstract", "Linear"),
    "class of another kind": option("model.path=Gaussian", "no such class", "Linear"),
    "network for a path": option("model.path=fmlightning.nets.mlp.TimeMLP", "no Path", "Linear"),
    "layer for an optimiser": option("model.optimizer=torch.nn.Linear", "no Optimizer", "AdamW"),
    "layer for a network": Row(
        (*MOONS, "--model.network=torch.nn.Linear"),
        ("--model.network.in_features", "must be given"),
    ),
    "module that is not there": option("model.network=fmlightning.nets.nowhere.Net", "TimeMLP"),
    "class that is not there": option("model.network=fmlightning.nets.mlp.Net", "TimeMLP"),
    "class of others": option("model.network=timm.models.VisionTransformer", "--allow timm"),
    "seed below 0": option("seed_everything=-1", "from 0 to 4294967295"),
    "seed with a fraction": option("seed_everything=1.5", "a whole number"),
    "seed too large": option("seed_everything=99999999999999999999", "from 0 to 4294967295"),
    "width 0": option("model.network.width=0", "at least 1"),
    "width below 0": option("model.network.width=-4", "at least 1"),
    "dimension": option("model.network.dim=3", "(2, 2)"),
    "dropout of 1": option("model.network.dropout=1.5", "[0, 1)"),
    "UNet for points": Row((*MOONS, "--model.network=UNet"), ("UNet", "TimeMLP")),
    "TimeMLP for images": Row((*DIGITS, "--model.network=TimeMLP"), ("TimeMLP", "UNet for images")),
    "UNet with odd channels": Row(
        (*DIGITS, "--model.network.channels=7"), ("model.network", "7", "even")
    ),
    "UNet without channels": Row(
        (*DIGITS, "--model.network.channels=0"), ("model.network", "channels=0", "at least 1")
    ),
    "UNet's heads": digits("model.network.head_channels=7", "divisor"),
    "UNet's attention": Row(
        (*DIGITS, "--model.network.attention_levels=[9]"),
        ("attention_levels=(9,)", "between 0 and 2"),
    ),
    "UNet without levels": Row(
        (*DIGITS, "--model.network.channel_mult=[]"), ("channel_mult", "at least 1")
    ),
    "UNet that halves too often": Row(
        (*DIGITS, "--model.network.channel_mult=[1,2,2,2,2]"), ("8 x 8", "16")
    ),
    "channels of the images": digits("model.network.in_channels=3", "(B, 3, H, W)"),
    "fewer labels than classes": Row(
        (*DIGITS, "--model.network.num_classes=5"),
        ("model.network.num_classes=10", "10 of DigitsData"),
    ),
    "labels below 0": digits("model.network.num_classes=-1", "0 for no labels"),
    "hidden labels without labels": option("model.class_dropout_prob=0.1", "has none"),
    "label drop above 1": digits("model.class_dropout_prob=1.5", "[0, 1)"),
    "label drop nan": Row(
        (*DIGITS, "--model.class_dropout_prob=.nan"), ("model.class_dropout_prob=nan", NAN)
    ),
    "prediction": option("model.objective.prediction=speed", "velocity"),
    "score of a toy source": option("model.objective.prediction=score", "Gaussian source"),
    "source of another shape": Row(
        (*DIGITS, "--model.source=EightGaussians"), ("EightGaussians", "(1, 8, 8)")
    ),
    "source misspelt": option("model.source=Gausian", "did you mean Gaussian?"),
    "sigma_min below 0": option("model.path.sigma_min=-0.1", "[0, 1)"),
    "sigma_min nan": Row(
        (*MOONS, "--model.path.sigma_min=.nan"), ("model.path.sigma_min=nan", NAN)
    ),
    "sigmas in the wrong order": several(
        "model.path=VarianceExploding model.path.sigma_max=0.001",
        "model.path.sigma_min",
        "sigma_max=0.001",
    ),
    "betas in the wrong order": several(
        "model.path=VariancePreserving model.path.beta_max=-1", "beta_max=-1", "beta_min"
    ),
    "power of a path": several(
        "model.path=Polynomial model.path.n=-1", "model.path.n=-1", "at least 1"
    ),
    "bridge without noise": several(
        "model.path=SchrodingerBridge model.path.noise_std=0",
        "model.path.noise_std=0",
        "use Linear",
    ),
    "times of Beta": several("model.times=Beta model.times.a=-1", "model.times.a=-1", "positive"),
    "times of LogitNormal": several(
        "model.times=LogitNormal model.times.std=-1", "model.times.std=-1", "positive"
    ),
    "times of Mode": several("model.times=Mode model.times.scale=5", "model.times.scale=5", "[-1,"),
    "times of Power": several(
        "model.times=Power model.times.power=-1", "model.times.power=-1", "above -1"
    ),
    "times misspelt": option("model.times=LogitNorml", "did you mean LogitNormal?"),
    "weight misspelt": option("model.objective.weighting=SNR", "did you mean MinSNR?"),
    "coupling misspelt": option("model.coupling=OT", "MinibatchOT"),
    "entropy below 0": several(
        "model.coupling=Entropic model.coupling.reg=-1", "model.coupling.reg=-1", "use MinibatchOT"
    ),
    "OT across labels": Row(
        (*DIGITS, "--model.coupling=MinibatchOT"), ("model.coupling", "MinibatchOT", "ClasswiseOT")
    ),
    "classes without labels": option("model.coupling=ClasswiseOT", "labels", "MinibatchOT"),
    "rate below 0": Row((*MOONS, "--model.optimizer.lr=-1"), ("learning rate", "-1.0")),
    "rate nan": Row((*MOONS, "--model.optimizer.lr=.nan"), ("model.optimizer.lr=nan", NAN)),
    "rate infinite": Row((*MOONS, "--model.optimizer.lr=.inf"), ("model.optimizer.lr=inf", NAN)),
    "rate text": option("model.optimizer.lr=nan", "a number"),
    "one beta": Row(
        (*MOONS, "--model.optimizer.betas=[0.9]"), ("--model.optimizer.betas", "2 values")
    ),
    "beta above 1": Row((*MOONS, "--model.optimizer.betas=[0.9,2]"), ("model.optimizer", "2.0")),
    "optimiser misspelt": option("model.optimizer=Adamm", "did you mean Adam?"),
    "optimiser's option": Row(
        (*MOONS, "--model.optimizer.rate=1"), ("--model.optimizer.rate", "--model.optimizer.help")
    ),
    "scheduler misspelt": option("model.scheduler=Cosin", "did you mean Cosine?"),
    "warm-up below 0": option("model.scheduler.warmup_steps=-1", "negative"),
    "decay of the average": option("ema.decay=1.5", "[0, 1)"),
    "decay nan": Row((*MOONS, "--ema.decay=.nan"), ("ema.decay=nan", NAN)),
    "solver": option("model.solver.method=rk99", "dopri5"),
    "solver without steps": option("model.solver.num_steps=0", "positive"),
    "tolerance below 0": option("model.solver.rtol=-1", "positive"),
    "grid misspelt": option("model.solver.grid=Even", "UniformGrid"),
    "grid that goes back": several(
        "model.solver.method=euler model.solver.grid=CustomGrid "
        "model.solver.grid.times=[0,0.7,0.5,1]",
        "model.solver.grid.times",
        "increase",
    ),
    "data misspelt": option("data=ToyDat", "did you mean ToyData?"),
    "law misspelt": option("data.target=Mons", "did you mean Moons?"),
    "law without a shape": Row((*MOONS, "--data.target=Gaussian"), ("data.target", "Moons")),
    "batch 0": option("data.batch_size=0", "at least 1"),
    "batch below 0": option("data.batch_size=-8", "at least 1"),
    "batch above the data": digits("data.batch_size=5000", "1297"),
    "batch above a finite toy": several(
        "data.train_size=10", "data.batch_size=256", "10 training samples"
    ),
    "no training data": option("data.train_size=0", "at least 1"),
    "no validation data": option("data.val_size=0", "at least 1"),
    "test data below 0": option("data.test_size=-1", "at least 1"),
    "blocks of 0": option("data.eval_batch_size=0", "at least 1"),
    "epochs of 0": option("data.steps_per_epoch=0", "at least 1"),
    "items that are no tensors": several(
        "data=DatasetData data.train=torchvision.datasets.FakeData",
        "data.train=FakeData: item 0",
        "PILToTensor",
    ),
    "law for digits": Row(
        (*DIGITS, "--data.target=Moons"), ("--data.target", "unknown option", "--data.help")
    ),
    "metric misspelt": Row(
        (*MOONS, "--evaluation.metrics=[{class_path: Fid}]"),
        ("--evaluation.metrics Fid", "Wasserstein"),
    ),
    "labels in an unknown order": option("evaluation.labels=sorted", "balanced"),
    "metric not in a list": option("evaluation.metrics=Wasserstein", "a list"),
    "metric of nothing": Row(
        (*MOONS, "--evaluation.metrics=[{class_path: Wasserstein, init_args: {size: 0}}]"),
        ("evaluation.metrics", "size=0", "at least 1"),
    ),
    "metric of images": Row(
        (*MOONS, "--evaluation.metrics=[{class_path: Frechet}]"), ("Frechet", "Wasserstein")
    ),
    "metric of labels": Row(
        (*DIGITS, "--data.labelled=false", "--model.network.num_classes=0"),
        ("evaluation.metrics", "labelled"),
    ),
    "metric of more than the data": option("data.test_size=512", "10000", "data.test_size"),
    "evaluation in blocks of 0": option("evaluation.batch_size=0", "at least 1"),
    "pictures of nothing": option("samples.num_samples=0", "at least 1"),
    "pictures every -1 steps": option("samples.every_n_steps=-1", "negative"),
    "no end": Row(
        (*MOONS, "--trainer.max_steps=-1"),
        ("trainer.max_steps=-1", "never stop", "trainer.max_epochs"),
    ),
    "no known end": several(
        "trainer.max_steps=-1 trainer.max_time=00:00:00:10",
        "model.scheduler=Cosine",
        "trainer.max_steps",
    ),
    "no steps": option("trainer.max_steps=0", "positive"),
    "steps below 0": option("trainer.max_steps=-5", "positive"),
    "time": option("trainer.max_time=soon", "DD:HH:MM:SS"),
    "accumulation of 0": option("trainer.accumulate_grad_batches=0", "positive"),
    "validation every 0 steps": option("trainer.val_check_interval=0", "positive"),
    "validation every 1.7 steps": option("trainer.val_check_interval=1.7", "integer"),
    "log every -1 steps": option("trainer.log_every_n_steps=-1", "negative"),
    "limit below 0": option("trainer.limit_train_batches=-1", "[0.0, 1.0]"),
    "clipping below 0": option("trainer.gradient_clip_val=-1", "must not be negative"),
    "clipping nan": option("trainer.gradient_clip_val=nan", "a number"),
    "clipping by what": option("trainer.gradient_clip_algorithm=nrm", "norm"),
    "precision": option("trainer.precision=bf17", "bf16-mixed"),
    "half precision on the CPU": option("trainer.precision=16-mixed", "bf16-mixed"),
    "accelerator": option("trainer.accelerator=gpuu", "cpu"),
    "accelerator that needs a library": option("trainer.accelerator=tpu", "torch_xla"),
    "devices 0": option("trainer.devices=0", "positive"),
    "devices -7": option("trainer.devices=-7", "-1 for all"),
    "devices by a word": option("trainer.devices=many", "int > 0"),
    "list of CPUs": Row((*MOONS, "--trainer.devices=[0,1]"), ("trainer.devices=[0, 1]", "int > 0")),
    "nodes 0": option("trainer.num_nodes=0", "positive"),
    "strategy": option("trainer.strategy=dpp", "ddp"),
    "strategy of GPUs": option("trainer.strategy=fsdp", "GPU"),
    "batch and processes": several(
        "trainer.strategy=ddp trainer.devices=3", "data.batch_size=256", "3 processes"
    ),
    "profiler": option("trainer.profiler=nope", "simple"),
    "logger": option("trainer.logger=Nope", "no such class"),
    "callback": Row(
        (*MOONS, "--trainer.callbacks=[{class_path: Earl}]"),
        ("--trainer.callbacks Earl", "no such class"),
    ),
    "callback without what it needs": Row(
        (*MOONS, "--trainer.callbacks=[{class_path: EarlyStopping}]"),
        ("--trainer.callbacks.monitor", "must be given"),
    ),
    "checkpoint every -1 steps": option("checkpoints.every_n_train_steps=-1", "at least 1"),
    "checkpoint of no metric": option("checkpoints.monitor=loss", "val/loss"),
    "best by which end": Row(
        (*MOONS, "--checkpoints.mode=low"), ("--checkpoints.mode low", "'min', 'max'")
    ),
    "checkpoint interval": option("checkpoints.train_time_interval=soon", "0:30:00"),
    "W&B mode": option("wandb.mode=onlin", "offline"),
    "W&B without a key": option("wandb.mode=online", "wandb login"),
    "W&B tags": option("wandb.tags=one", "a list"),
    "pickles": Row((*MOONS, "--weights_only=false"), ("unknown option --weights_only",)),
    "experiment outside": Row(
        (*MOONS, "--experiment=../../out"), ("experiment='../../out'", "letters")
    ),
    "experiment absolute": Row(
        (*MOONS, "--experiment=/tmp/out"), ("experiment='/tmp/out'", "letters")
    ),
    "experiment in a folder": Row((*MOONS, "--experiment=a/b"), ("experiment='a/b'", "letters")),
    "experiment without a name": Row((*MOONS, "--experiment="), ("experiment=''", "letters")),
    "allow nothing": Row((*MOONS, "--allow"), ("--allow ''", "import my_package")),
    "allow a path": Row(
        (*MOONS, "--allow=../my_package"), ("--allow '../my_package'", "import my_package")
    ),
    "no config": command("fit", "model.network", "--config"),
    "no config of that name": command(
        "fit --config configs/none.yaml", "--config configs/none.yaml", "no such file"
    ),
    "config without a name": command("fit --config", "--config", "expected one argument"),
    "config is a folder": command("fit --config configs", "--config configs", "directory"),
    "config is a picture": Row(
        (*MOONS, "--config", "experiments/demo_moons/path.png"), ("path.png", "UTF-8")
    ),
}

CONFIGS = {
    "tab": config("trainer:\n\tmax_steps: 3\n", "line 2", "spaces, not tabs"),
    "key twice": config(
        "trainer: {max_steps: 3}\ntrainer: {devices: 1}\n", "line 2", "trainer stands twice"
    ),
    "key twice inside": config(
        "trainer:\n  max_steps: 3\n  max_steps: 4\n", "line 3", "max_steps stands twice"
    ),
    "not closed": config("trainer: {max_steps: 3\n", "line 2", "'}'"),
    "indent": config("trainer:\n  max_steps: 3\n devices: 1\n", "line 3", "not YAML"),
    "two documents": config(
        "seed_everything: 1\n---\nseed_everything: 2\n", "line 2", "second --config"
    ),
    "tag of Python": config(
        "model: !!python/object/apply:os.system ['true']\n", "line 1", "no tags"
    ),
    "empty": config("", "holds no options", "mapping"),
    "comments only": config("# later\n", "holds no options", "mapping"),
    "list": config("- trainer\n", "holds no options", "mapping"),
    "text": config("moons", "holds no options", "mapping"),
    "bytes": config(bytes(range(256)), "UTF-8"),
    "Latin-1": config("experiment: caf\u00e9".encode("latin1"), "UTF-8"),
    "UTF-16": config("seed_everything: 1".encode("utf-16"), "UTF-8"),
    "number as a key": config("1: 2\n", "1 is no option"),
    "aliases of aliases": config(
        "a: &a [x, x, x, x, x, x, x, x, x, x]\n"
        + "".join(
            f"{b}: &{b} [{', '.join(['*' + a] * 10)}]\n"
            for a, b in zip("abcdef", "bcdefg", strict=True)
        ),
        "aliases expand",
    ),
    "alias of itself": config("trainer: &t {max_steps: *t}\n", "aliases expand"),
    "null section": config("trainer: null\n", "trainer: None", "mapping"),
    "section of one value": config("ema: 0.9\n", "ema: 0.9", "mapping"),
    "section of a list": config("trainer: [max_steps]\n", "trainer: ['max_steps']", "mapping"),
    "class by a number": config(
        "model: {path: {class_path: 7}}\n", "model.path.class_path: 7", "name of a class"
    ),
    "class by a list": config(
        "model: {path: {class_path: [Linear]}}\n", "model.path.class_path", "name of a class"
    ),
    "arguments in a list": config(
        "model: {path: {class_path: Linear, init_args: [0.1]}}\n", "model.path.init_args", "mapping"
    ),
    "class of others": config(
        "model: {network: {class_path: timm.Net}}\n", "timm.Net", "--allow timm"
    ),
    "class of others in a list": config(
        "evaluation: {metrics: [{class_path: mine.Metric}]}\n", "mine.Metric", "--allow mine"
    ),
    "unknown section": overlay(
        "modle: {coupling: Independent}\n", "modle.coupling", "did you mean --model.coupling?"
    ),
    "renamed option": overlay(
        "model: {label_drop: 0.1}\n", "model.label_drop", "it is now --model.class_dropout_prob"
    ),
    "unknown option": overlay(
        "trainer: {max_stepz: 3}\n", "trainer.max_stepz", "did you mean --trainer.max_steps?"
    ),
    "unknown argument": overlay(
        "model: {path: {class_path: Linear, init_args: {sigma: 1}}}\n",
        "--model.path.sigma",
        "unknown option",
    ),
    "class and more": config(
        "model: {path: {class_path: Linear, sigma_min: 0}}\n",
        "model.path",
        "sigma_min",
        "init_args",
    ),
    "null for a number": overlay("ema: {decay: null}\n", "ema.decay=null", "must have a value"),
    "null inside a class": overlay(
        "model: {network: {init_args: {width: null}}}\n",
        "model.network.width=null",
        "must have a value",
    ),
    "null seed": overlay("seed_everything: null\n", "--seed_everything", "a whole number"),
    "null experiment": overlay("experiment: null\n", "experiment", "must"),
    "number for a name": overlay("experiment: 5\n", "--experiment 5", "text"),
    "null byte in a name": overlay('experiment: "a\\0b"\n', "experiment=", "letters"),
    "null byte in a path": overlay('run_dir: "/tmp/a\\0b"\n', "run_dir=", "is no path"),
    "line end in a name": overlay('experiment: "a\\n"\n', "experiment=", "letters"),
    "no length": overlay(
        "trainer: {max_steps: null}\n", "trainer.max_steps=null", "must have a value"
    ),
    "a config that allows itself": overlay("allow: [os]\n", "allow", "unknown option"),
}

RUNS = {
    "run is a file": Row(
        (*MOONS, "--run_dir={file}"), ("run_dir={file}", "is a file", "--run_dir")
    ),
    "run below a file": Row(
        (*MOONS, "--run_dir={file}/run"), ("run_dir={file}/run", "is a file", "--run_dir")
    ),
    "run holds other files": Row(
        (*MOONS, "--run_dir=configs"), ("run_dir=configs", "no run", "--run_dir")
    ),
    "other files moved aside": Row(
        (*MOONS, "--run_dir=configs", "--rerun=true"), ("run_dir=configs", "no run")
    ),
    "run is finished": Row(
        ("fit", "--config", "{run}/config.yaml", "--run_dir={run}"),
        ("finished", "fmlightning show", "--rerun"),
    ),
    "no checkpoint of that name": Row(
        (*MOONS, "--ckpt_path={tmp}/none.ckpt"), ("none.ckpt", "no such checkpoint")
    ),
    "checkpoint by address": Row(
        (*MOONS, "--ckpt_path=https://example.com/a.ckpt"),
        ("https://example.com/a.ckpt", "no such checkpoint"),
    ),
    "checkpoint is a config": Row(
        (*MOONS, "--ckpt_path=configs/toy/moons.yaml"), ("moons.yaml", "no checkpoint")
    ),
    "checkpoint is a folder": Row(
        (*MOONS, "--ckpt_path=configs"), ("configs", "not a run directory")
    ),
    "other network": command(
        "validate --ckpt_path {run} --config {run}/config.yaml --model.network.width=32",
        "model.network",
    ),
    "nothing to validate": command(
        "validate --config configs/toy/moons.yaml", "no checkpoint", "Train it first"
    ),
    "nothing to test": command("test --ckpt_path nowhere", "nowhere", "config.yaml"),
    "nothing to predict": command(
        "predict --config configs/toy/moons.yaml", "no checkpoint", "Train it first"
    ),
    "torn checkpoint": command("sample {broken}/torn", "last.ckpt", "damaged"),
    "torn checkpoint, to validate": command(
        "validate --ckpt_path {broken}/torn", "last.ckpt", "damaged"
    ),
    "torn checkpoint, to resume": Row(
        (
            "fit",
            "--config",
            "{broken}/torn/config.yaml",
            "--run_dir={broken}/torn",
            "--ckpt_path={broken}/torn",
        ),
        ("last.ckpt", "damaged"),
    ),
    "one bit": command("sample {broken}/bit", "last.ckpt", "damaged"),
    "empty checkpoint": command("sample {broken}/empty", "last.ckpt", "damaged"),
    "checkpoint of others": command("sample {broken}/foreign", "last.ckpt", "no checksum"),
    "no checkpoint": command(
        "sample {broken}/none", "{broken}/none", "no checkpoint", "Train it first"
    ),
    "config torn": command("sample {broken}/config_torn", "config.yaml", "damaged"),
    "config empty": command("sample {broken}/config_empty", "config.yaml", "damaged"),
    "config of bytes": command("show {broken}/config_bytes", "config.yaml", "damaged"),
    "config of a class of others": command(
        "sample {broken}/config_class", "elsewhere.Net", "--allow elsewhere"
    ),
    "manifest torn": command("show {broken}/manifest_torn", "manifest.json", "damaged"),
    "manifest a list": command("show {broken}/manifest_list", "manifest.json", "damaged"),
    "manifest without its parts": command(
        "show {broken}/manifest_short", "{broken}/manifest_short", "damaged"
    ),
    "scores torn": command("report {broken}/scores_torn", "evaluation.json", "damaged"),
    "sample without a run": command("sample", "run", "--help"),
    "sample of nowhere": command("sample nowhere", "nowhere", "config.yaml"),
    "sample 0": command("sample {run} --n=0", "--n 0", "above 0"),
    "sample -3": command("sample {run} --n=-3", "--n -3", "above 0"),
    "sample by a word": command("sample {run} --n=all", "--n all", "a whole number"),
    "sample in blocks of 0": command("sample {run} --batch_size=0", "--batch_size 0", "above 0"),
    "sample from -1": command("sample {run} --first=-1", "--first -1", "from 0 on"),
    "sample by an unknown option": command("sample {run} --samples=3", "unknown option --samples"),
    "sample by an unknown solver": command(
        "sample {run} --solver.method=euller", "--solver.method euller", "euler"
    ),
    "sample in no steps": command("sample {run} --solver.num_steps=0", "num_steps=0", "positive"),
    "sample in steps by a method that has none": command(
        "sample {run} --solver.method=dopri5 --solver.num_steps=5",
        "solver.num_steps=5 does nothing",
        "heun2",
    ),
    "sample to a tolerance that nothing looks at": command(
        "sample {run} --solver.method=euler --solver.rtol=1e-3",
        "solver.rtol=0.001 does nothing",
        "dopri5",
    ),
    "sample to a tolerance that is no option of the class": command(
        "sample {run} --solver=SDESolver --solver.rtol=1e-3", "--solver.rtol", "unknown option"
    ),
    "sample by an unknown solver class": command(
        "sample {run} --solver=ODESolvr", "--solver ODESolvr", "did you mean ODESolver?"
    ),
    "sample by an SDE from a source without a score": command(
        "sample {run} --solver=SDESolver --out={tmp}/out", "not Gaussian", "ODE solver"
    ),
    "sample along no path": command("sample {run} --path=Linar", "--path Linar", "Linear"),
    "sample along the path of the run": command(
        "sample {run} --path=Linear --out={tmp}/out", "--path Linear", "leave it out"
    ),
    "sample along a bridge": command(
        "sample {run} --path=SchrodingerBridge --out={tmp}/out", "SchrodingerBridge", "gamma > 0"
    ),
    "evaluate by an unknown method": command(
        "evaluate {run} --solvers=heun", "--solvers heun", "euler_maruyama"
    ),
    "evaluate by an unknown class": command(
        "evaluate {run} --solvers=ODESolvr", "ODESolvr", "did you mean ODESolver?"
    ),
    "evaluate by an SDE from a source without a score": command(
        "evaluate {run} --solvers=stochastic_heun", "not Gaussian", "ODE solver"
    ),
    "evaluate guidance as a list": command(
        "evaluate {run} --guidance=1,2", "--guidance", "--guidance.scale 1,2"
    ),
    "evaluate along the path of the run": command(
        "evaluate {run} --path=Linear", "--path Linear", "leave it out"
    ),
    "overwrite maybe": command(
        "sample {run} --overwrite=maybe", "--overwrite maybe", "true or false"
    ),
    "sample a class": command(
        "sample {run} --label=3 --out={tmp}/out", "--label 3", "not conditional"
    ),
    "sample balanced labels that there are not": command(
        "sample {run} --labels=balanced --out={tmp}/out", "--labels balanced", "not conditional"
    ),
    "sample labels in an unknown order": command(
        "sample {run} --labels=sorted --out={tmp}/out", "--labels sorted", "balanced"
    ),
    "evaluate balanced labels that there are not": command(
        "evaluate {run} --labels=balanced", "--labels balanced", "no labels"
    ),
    "sample elsewhere": command(
        "sample {run} --device=nope --out={tmp}/out", "--device nope", "not available"
    ),
    "sample into a file": command("sample {run} --n=2 --out={file}", "{file}"),
    "show without a run": command("show", "run", "show --help"),
    "show nowhere": command("show nowhere", "nowhere", "config.yaml"),
    "show a file": command("show README.md", "README.md", "not a run directory"),
    "list nowhere": command("ls nowhere", "nowhere", "fmlightning fit"),
    "report without a run": command("report", "runs", "report --help"),
    "report nowhere": command("report nowhere", "nowhere", "config.yaml"),
    "report without scores": command("report {broken}/scores_none", "evaluation.json"),
    "report beside nothing": command(
        "report {run} --expected nowhere.json", "--expected nowhere.json", "no such file"
    ),
    "report beside what is no summary": command(
        "report {run} --expected {file}", "--expected {file}", "JSON"
    ),
    "report into no folder": command("report {run} --out {file}/out.json", "{file}/out.json"),
    "reproduce nowhere": command("reproduce nowhere", "nowhere", "config.yaml"),
    "reproduce something else": command(
        "reproduce {run} --trainer.max_steps 3", "--trainer.max_steps", "fmlightning fit"
    ),
    "verify an unknown path": command("verify --path Nope", "--path", "Nope", "Linear"),
    "doctor's option": command("doctor --nope", "--nope"),
    "option with a hyphen": command("sweep x.yaml --dry-run", "did you mean --dry_run?"),
    "option with a hyphen and a value": command("ema {run} --sigma-rel 0.1", "--sigma_rel?"),
    "flag of some other value": command("ema {run} --overwrite=maybe", "maybe", "true or false"),
    "command misspelt": command("fitt", "fitt", "did you mean 'fit'?"),
    "option for a command": command(
        "--config configs/toy/moons.yaml", "unknown command '--config'", "fit"
    ),
}

ROWS = {**OPTIONS, **{f"config: {k}": v for k, v in CONFIGS.items()}, **RUNS}
