"""A config, a checkpoint or a run of others runs no code; secrets stay out of files; names stay in their folder."""

import ast
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import warm

import fmlightning as package
from fmlightning.cli.allowed import allowing, guarded, require_allowed
from fmlightning.cli.parser import FlowParser
from fmlightning.runs.checksum import append_checksum
from fmlightning.runs.directory import run_directory
from fmlightning.runs.secrets import in_environment, require_no_secret, without_secrets

PACKAGE = Path(package.__file__).parent
STEPS = ("--trainer.max_steps=2",)


# -- classes of others ------------------------------------------------------------------------------


@pytest.fixture
def others(tmp_path, monkeypatch):
    """A module that leaves a mark when it is imported; returns whether it was."""
    mark = tmp_path / "imported"
    folder = tmp_path / "path"
    folder.mkdir()
    (folder / "others.py").write_text(
        f"import pathlib, torch\npathlib.Path({str(mark)!r}).touch()\n"
        "from fmlightning.flow.paths.schedules import Linear\n"
        "class Net(torch.nn.Module):\n"
        "    def __init__(self, width: int = 8):\n"
        "        super().__init__()\n"
        "        self.layer = torch.nn.Linear(3, 2)\n"
        "    def forward(self, x, t, y=None):\n"
        "        return self.layer(torch.cat((x, t[:, None]), 1))\n"
        "class Path(Linear): pass\n"
        "def build() -> torch.nn.Module:\n"
        "    return Net()\n"
    )
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "others", raising=False)
    return mark.exists


NET = "{class_path: others.Net, init_args: {width: 4}}"
WAYS = {
    "by its path": ["--model.network=others.Net"],
    "as a mapping": [f"--model.network={NET}"],
    "by its class_path": ["--model.network.class_path=others.Net"],
    "a path": ["--model.path=others.Path"],
    "a source": ["--model.source=others.Source"],
    "an optimiser": ["--model.optimizer=others.SGD"],
    "an objective": ["--model.objective=others.Loss"],
    "a law inside the data": ["--data.target=others.Law"],
    "the data": ["--data=others.Data"],
    "in a list": ["--evaluation.metrics=[{class_path: others.Metric}]"],
    "the second of a list": [
        "--evaluation.metrics=[{class_path: Wasserstein}, {class_path: others.Metric}]"
    ],
    "added to a list": ["--evaluation.metrics+=others.Metric"],
    "a callback": ["--trainer.callbacks=[{class_path: others.Callback}]"],
    "inside a callback": [
        "--trainer.callbacks=[{class_path: LambdaCallback, init_args: {on_fit_start: others.build}}]"
    ],
    "a logger": ["--trainer.logger={class_path: others.Logger}"],
    "a plugin": ["--trainer.plugins=[{class_path: others.Plugin}]"],
    "a grid inside the solver": ["--model.solver.grid=others.Grid"],
    "a law inside a law": ["--model.times={class_path: Stratified, init_args: {of: others.Times}}"],
    "help": ["--model.network.help=others.Net"],
    "a coupling inside a coupling": [
        "--model.coupling={class_path: ClasswiseOT, init_args: {within: {class_path: others.OT}}}"
    ],
    "a prefix of an allowed name": ["--model.network=torchothers.Net"],
}


QUICK_WAYS = (
    "by its path",
    "a path",
    "in a list",
    "inside a callback",
    "a law inside a law",
    "help",
)


def some(names, quick):
    """All, of which `make test` asks for the quick ones."""
    return [pytest.param(n, marks=[] if n in quick else pytest.mark.slow) for n in names]


@pytest.mark.parametrize("way", some(WAYS, QUICK_WAYS))
def test_a_class_of_others_is_refused_before_it_is_imported(
    way, others, fmlightning, repository, runs_below_tmp
):
    moons = repository / "configs/toy/moons.yaml"
    status, shown = fmlightning("fit", "--config", moons, *WAYS[way], "--wandb.mode=disabled")
    assert status == 2
    assert "is not imported" in shown
    assert "--allow" in shown
    assert not others()
    assert not runs_below_tmp.exists()


OVERLAYS = {
    "class_path": f"model: {{network: {NET}}}",
    "path alone": "model: {network: others.Net}",
    "deep": "model: {times: {class_path: Stratified, init_args: {of: {class_path: others.Times}}}}",
    "in a list": "evaluation: {metrics: [{class_path: Wasserstein}, {class_path: others.Metric}]}",
    "in what any value is good for": "trainer: {strategy: {class_path: DDPStrategy, dict_kwargs: "
    "{static_graph: {class_path: others.Net}}}}",
    "that allows itself": f"allow: [others]\nmodel: {{network: {NET}}}",
}


@pytest.mark.parametrize("name", OVERLAYS)
def test_an_overlay_cannot_name_it_either(name, others, fmlightning, repository, tmp_path):
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text(OVERLAYS[name])
    moons = repository / "configs/toy/moons.yaml"
    status, shown = fmlightning("fit", "--config", moons, "--config", overlay, *STEPS)
    assert status == 2, shown
    assert not others()


def test_a_config_of_one_option_is_checked_too(others, fmlightning, repository, tmp_path):
    part = tmp_path / "part.yaml"
    part.write_text("network: others.Net")
    moons = repository / "configs/toy/moons.yaml"
    status, shown = fmlightning(
        "fit", "--config", moons, f"--model={part}", "--wandb.mode=disabled"
    )
    assert status == 2
    assert "--allow others" in shown
    assert not others()


RUN_OF_OTHERS = {
    "sample": ["sample", "{run}", "--n=2"],
    "validate": ["validate", "--ckpt_path", "{run}"],
    "resume": ["fit", "--config", "{run}/config.yaml", "--run_dir={run}", "--ckpt_path=auto"],
}


def test_a_run_is_read_with_the_same_care_and_one_s_own_classes_are_allowed(
    others, fit, fmlightning
):
    """The way of one's own network, from training to sampling; without --allow every step of it is refused."""
    run = fit("toy/moons", "--model.network=others.Net", "--allow=others", *STEPS)
    (mark,) = run.parent.glob("imported")
    assert "others.Net" in (run / "config.yaml").read_text()
    assert fmlightning("sample", run, "--n=2", "--allow", "others")[0] == 0
    field = package.load(run, allow=["others"])
    assert field(torch.zeros(3, 2), torch.tensor(0.5)).shape == (3, 2)

    del sys.modules["others"]
    mark.unlink()
    for argv in RUN_OF_OTHERS.values():
        status, shown = fmlightning(*(a.format(run=run) for a in argv))
        assert status == 2, shown
        assert "--allow others" in shown
    with pytest.raises(ValueError, match="--allow others"):
        package.load(run)
    assert fmlightning("show", run)[0] == 0  # text only
    assert not others()


def test_reproduce_hands_its_permission_on(others, fit, fmlightning, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "fmlightning.cli.reproduce.watch", lambda command, *_: asked.append(command) or 2
    )
    logged = ("--trainer.log_every_n_steps=1", *STEPS)
    run = fit("toy/moons", "--model.network=others.Net", "--allow=others", *logged)
    fmlightning("reproduce", run, "--allow", "others")
    fmlightning("reproduce", run)
    assert asked[0][-2:] == ["--allow", "others"]
    assert "--allow" not in asked[1], "a manifest is no permission"


CALLS = {
    "a function of torch": "--model.network=torch.hub.load",
    "a function of the system": "--model.network={class_path: os.system, init_args: {command: touch MARK}}",
    "a function by way of torch": "--model.network={class_path: torch.os.system, init_args: {command: touch MARK}}",
    "a function that gives a network": "--model.network={class_path: torchvision.models.resnet18}",
    "a class by way of ours": "--trainer.callbacks=[{class_path: "
    "fmlightning.training.callbacks.provenance.subprocess.Popen, "
    "init_args: {args: [touch, MARK]}}]",
    "a class of torch that starts a process": "--trainer.callbacks=[{class_path: "
    "torch.distributed.elastic.multiprocessing.subprocess_handler.SubprocessHandler, "
    "init_args: {entrypoint: touch, args: [MARK], env: {}, stdout: '', stderr: '', local_rank_id: 0}}]",
    "a function for an event": "--trainer.callbacks=[{class_path: LambdaCallback, "
    "init_args: {on_fit_start: torch.load}}]",
    "a function for an optimiser": "--model.optimizer=torch.save",
    "a module": "--model.network=torch.hub",
    "a tag": "--model.path=!!python/object/apply:os.system [touch MARK]",
}


@pytest.mark.parametrize("name", CALLS)
def test_only_classes_of_the_right_kind_are_built(name, fmlightning, repository, tmp_path):
    mark = tmp_path / "mark"
    moons = repository / "configs/toy/moons.yaml"
    argv = CALLS[name].replace("MARK", str(mark))
    status, shown = fmlightning("fit", "--config", moons, argv, "--wandb.mode=disabled")
    assert status == 2, shown
    assert "Traceback" not in shown
    assert not mark.exists()


def test_an_option_of_any_type_builds_nothing(tmp_path):
    """jsonargparse would build any class there by default, and this one starts a process."""
    mark = tmp_path / "mark"
    handler = "torch.distributed.elastic.multiprocessing.subprocess_handler.SubprocessHandler"
    arguments = {
        "entrypoint": "touch",
        "args": [str(mark)],
        "env": {},
        "stdout": "",
        "stderr": "",
        "local_rank_id": 0,
        "numa_options": None,
    }
    parser = FlowParser()
    parser.add_argument("--anything", type=Any)
    spec = {"class_path": handler, "init_args": arguments}
    built = parser.instantiate(parser.parse_object({"anything": spec}))
    assert type(built.anything).__name__ in ("dict", "Namespace")
    assert not mark.exists()


@pytest.mark.parametrize("path", ["torch.nn.Linear", "fmlightning.x", "lightning.pytorch.Trainer"])
def test_the_packages_of_the_house_are_allowed(path):
    require_allowed(path)


@pytest.mark.parametrize(
    "path", ["torch_x.A", "torchx.A", "os.system", "wandb.init", "my.A", ".torch.A", ""]
)
def test_nothing_else_is_unless_it_was_named(path):
    with pytest.raises(ValueError, match="is not imported"):
        require_allowed(path)
    with allowing(["my"]):
        require_allowed("my.A")
        with pytest.raises(ValueError, match="is not imported"):
            require_allowed("myself.A")
    with pytest.raises(ValueError, match="is not imported"):
        require_allowed("my.A")


def test_the_text_is_looked_at_before_the_import():
    asked = []
    with pytest.raises(ValueError, match="is not imported"):
        guarded(asked.append)("os.system")
    assert asked == []


# -- files of others --------------------------------------------------------------------------------


class Bomb:
    """Unpickling this leaves a mark."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("forced", some(["", "1"], ["1"]))
def test_a_checkpoint_runs_no_code(forced, fit, fmlightning, monkeypatch, tmp_path):
    """Nor where the environment asks torch to unpickle everything."""
    run = fit("toy/moons", *STEPS)
    manifest = json.loads((run / "manifest.json").read_text())
    (run / "manifest.json").write_text(json.dumps({**manifest, "status": "stopped"}))
    mark = tmp_path / "mark"
    for path in (run / "checkpoints").glob("*.ckpt"):
        content = torch.load(path, weights_only=True)
        with path.open("w+b") as file:
            torch.save({**content, "extra": Bomb(mark)}, file)
            append_checksum(file, 0)
    if forced:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", forced)
    for argv in (
        ["sample", run, "--n=2"],
        ["validate", "--ckpt_path", run],
        [
            "fit",
            "--config",
            run / "config.yaml",
            f"--run_dir={run}",
            "--ckpt_path=auto",
            "--trainer.max_steps=4",
        ],
    ):
        status, shown = fmlightning(*argv)
        assert status == 2, shown
        assert "last.ckpt" in shown
        assert "weights_only" not in shown, "advice to unpickle it"
    with pytest.raises(ValueError, match=r"last\.ckpt"):
        package.load(run)
    assert not mark.exists()


def test_the_config_of_a_run_is_plain_yaml(fit, fmlightning, tmp_path):
    run, mark = fit("toy/moons", *STEPS), tmp_path / "mark"
    with (run / "config.yaml").open("a") as file:
        file.write(f"extra: !!python/object/apply:os.system ['touch {mark}']\n")
    for argv in (
        ["show", run],
        ["sample", run],
        ["validate", "--ckpt_path", run],
        ["reproduce", run],
    ):
        status, shown = fmlightning(*argv)
        assert status == 2, shown
        assert "config.yaml" in shown
    assert not mark.exists()


SOURCES = sorted(PACKAGE.rglob("*.py"))
CODE_FROM_FILES = ("pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal")
"""Modules that run what is in a file."""
UNPACKERS = ("extractall", "unpack_archive", "extract_archive", "download_and_extract_archive")


def calls(path):
    """Every call in a file, as (name, keywords)."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            words = {k.arg: ast.unparse(k.value) for k in node.keywords}
            yield ast.unparse(node.func), words, [ast.unparse(a) for a in node.args]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_the_source_opens_no_pickle_and_unpacks_no_archive(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [a.name for a in node.names]
            roots = {(getattr(node, "module", None) or name).split(".")[0] for name in names}
            errors = all(name.endswith("Error") for name in names)  # to catch one is fine
            assert errors or not roots & set(CODE_FROM_FILES), ast.unparse(node)
    for name, words, args in calls(path):
        if name == "torch.load":
            assert words.get("weights_only") == "True", f"{path.name}: {name}"
        if name in ("np.load", "numpy.load"):
            assert words.get("allow_pickle", "False") == "False", f"{path.name}: {name}"
        if name == "yaml.load":
            assert [*args, *words.values()][1:] == ["PlainYAML"], f"{path.name}: {name}"
        assert name not in (
            "eval",
            "exec",
            "torch.jit.load",
            "torch.hub.load",
            "yaml.unsafe_load",
            "yaml.full_load",
        ), f"{path.name}: {name}"
        assert name.rsplit(".", 1)[-1] not in UNPACKERS, f"{path.name}: {name}"


# -- secrets ------------------------------------------------------------------------------------------

SECRETS = {
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "HF_TOKEN": "hf_ThisIsNotARealToken",
    "GITLAB_PAT": "glpat-notARealToken0123",
    "SLACK_WEBHOOK_URL": "hooks-services-T000-B000-XXXX",
    "REGISTRY_AUTH": "bm90OmEtcmVhbC1sb2dpbg==",
    "AWS_SECRET_ACCESS_KEY": "not/a/real+secret0123456789",
    "AWS_ACCESS_KEY_ID": "AKIANOTAREALKEYID",
    "GITHUB_TOKEN": "ghp_notARealToken0123",
    "MY_DATABASE_PASSWORD": "correct-horse-battery",
    "OPENAI_API_KEY": "sk-notARealKey0123456789",
}
NETRC, REMOTE = "netrcnotarealkey0123456789abcdef01234567", "remoteNotARealToken01234"


def found(folder, texts):
    """Which texts are in any file of a folder, or in any part of an archive there."""
    hits = set()
    for path in folder.rglob("*"):
        if path.is_file():
            parts = [path.read_bytes()]
            if zipfile.is_zipfile(path):
                with zipfile.ZipFile(path) as archive:
                    parts += [archive.read(name) for name in archive.namelist()]
            hits |= {t for t in texts if any(t.encode() in part for part in parts)}
    return hits


def test_secrets_of_the_environment_reach_no_file(tmp_path, repository):
    """The real command, with W&B offline, in a git repository whose remote has a token."""
    here = tmp_path / "here"
    home = here / "home"
    home.mkdir(parents=True)
    (home / ".netrc").write_text(f"machine api.wandb.ai\n  login user\n  password {NETRC}\n")
    (home / ".netrc").chmod(0o600)
    for words in (
        ["init", "-q"],
        ["remote", "add", "origin", f"https://{REMOTE}@example.com/a.git"],
        ["-c", "user.name=a", "-c", "user.email=a@b.c", "commit", "-q", "--allow-empty", "-m", "a"],
    ):
        subprocess.run(["git", *words], cwd=here, check=True)
    environment = {**os.environ, **SECRETS, "HOME": str(home), "WANDB_MODE": "offline"}
    for name in ("WANDB_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        environment.pop(name, None)
    config = str(repository / "configs/toy/moons.yaml")
    result = warm.run(
        [
            sys.executable,
            "-m",
            "fmlightning",
            "fit",
            "--config",
            config,
            "--run_dir=run",
            *STEPS,
            "--trainer.log_every_n_steps=1",
            "--evaluation.at_end=false",
            "--wandb.tags=[seen-in-the-mirror]",
        ],
        cwd=here,
        env=environment,
    )
    assert result.returncode == 0, result.stderr
    run = here / "run"
    texts = [*SECRETS.values(), NETRC, REMOTE]
    assert list(run.rglob("*.wandb"))
    assert found(run, ["seen-in-the-mirror"]), "the search itself finds what is there"
    assert not found(run, texts)
    assert not any(text in result.stdout + result.stderr for text in texts)


GIVEN = {
    "a key as an option": (
        ["--wandb.entity=" + SECRETS["HF_TOKEN"]],
        "--wandb.entity holds the value of $HF_TOKEN",
    ),
    "a key as the next word": (
        ["--wandb.entity", SECRETS["HF_TOKEN"]],
        "--wandb.entity holds the value of $HF_TOKEN",
    ),
    "a key inside a value": (
        [f"--wandb.tags=[a, x{SECRETS['OPENAI_API_KEY']}]"],
        "--wandb.tags holds the value of $OPENAI_API_KEY",
    ),
    "a password in an address": (
        ["--wandb.group=https://me:pass@example.com/x"],
        "--wandb.group holds an address",
    ),
    "a token in an address": (
        ["--wandb.group=https://atokeninanaddress@example.com/x"],
        "--wandb.group holds an address",
    ),
}


@pytest.mark.parametrize("name", GIVEN)
@pytest.mark.parametrize("where", some(["command line", "config"], ["command line"]))
def test_a_secret_in_an_option_is_refused_and_not_repeated(
    name, where, fmlightning, repository, monkeypatch, tmp_path, runs_below_tmp
):
    for variable in ("HF_TOKEN", "OPENAI_API_KEY"):
        monkeypatch.setenv(variable, SECRETS[variable])
    words, expected = GIVEN[name]
    if where == "config":
        option, _, value = "=".join(words).removeprefix("--wandb.").partition("=")
        overlay = tmp_path / "overlay.yaml"
        overlay.write_text(f"wandb: {{{option}: {value}}}")
        words = ["--config", str(overlay)]
    moons = repository / "configs/toy/moons.yaml"
    status, shown = fmlightning("fit", "--config", moons, *words)
    assert status == 2
    assert expected in shown
    assert not any(s in shown for s in (*SECRETS.values(), "pass@", "atokeninanaddress"))
    assert not runs_below_tmp.exists()


def test_what_is_called_a_secret_is_one(monkeypatch):
    for name in ("data.api_key", "model.network.token", "x.password"):
        with pytest.raises(ValueError, match="secret by its name"):
            require_no_secret([(name, "anything")])
    require_no_secret(
        [("data.token", None), ("model.num_tokens", "5"), ("model.network.class_token", True)]
    )


def test_names_of_variables_that_hold_secrets(monkeypatch, tmp_path):
    for name in SECRETS:
        monkeypatch.setenv(name, SECRETS[name])
    monkeypatch.setenv("SSH_PRIVATE_KEY", str(tmp_path))  # a path is no secret
    monkeypatch.setenv("SHORT_TOKEN", "abc")
    monkeypatch.setenv("KEYBOARD", "azerty-azerty")
    held = in_environment()
    assert SECRETS.items() <= held.items()
    assert not {"SSH_PRIVATE_KEY", "SHORT_TOKEN", "KEYBOARD"} & held.keys()


def test_an_error_is_recorded_without_them(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", SECRETS["HF_TOKEN"])
    text = f"401 for https://me:word@example.com?key={SECRETS['HF_TOKEN']}"
    assert without_secrets(text) == "401 for https://example.com?key=<HF_TOKEN>"


def test_the_manifest_of_a_failed_run_has_none(fmlightning, repository, monkeypatch, tmp_path):
    secret = SECRETS["GITHUB_TOKEN"]
    monkeypatch.setenv("GITHUB_TOKEN", secret)

    def fail(*args):
        raise ValueError(f"no access with {secret}")

    monkeypatch.setattr("fmlightning.training.module.FlowMatching.training_step", fail)
    run = tmp_path / "run"
    moons = repository / "configs/toy/moons.yaml"
    status, _ = fmlightning("fit", "--config", moons, f"--run_dir={run}", "--wandb.mode=disabled")
    assert status == 2
    assert json.loads((run / "manifest.json").read_text())["status"] == "failed"
    assert found(run, ["<GITHUB_TOKEN>"])
    assert not found(run, [secret])


# -- names --------------------------------------------------------------------------------------------

RESOLVED = {"seed_everything": 0, "experiment": "e", "trainer": {}}


@pytest.mark.parametrize(
    "name",
    [
        "..",
        "../x",
        "a/../../x",
        "/tmp/x",
        "~",
        "",
        ".hidden",
        "a b",
        "a\0b",
        "a\n",
        "-x",
        "a" * 129,
        None,
    ],
)
def test_an_experiment_stays_below_the_root(name):
    with pytest.raises(ValueError, match="experiment="):
        run_directory({**RESOLVED, "experiment": name})


def test_no_link_leads_out_of_the_root(runs_below_tmp, tmp_path, fmlightning, repository):
    outside = tmp_path / "outside"
    outside.mkdir()
    runs_below_tmp.mkdir()
    (runs_below_tmp / "e").symlink_to(outside)
    with pytest.raises(ValueError, match="leads out of"):
        run_directory(RESOLVED)
    moons = repository / "configs/toy/moons.yaml"
    status, shown = fmlightning("fit", "--config", moons, "--experiment=e", "--wandb.mode=disabled")
    assert status == 2
    assert "--run_dir" in shown
    assert not list(outside.iterdir())


def test_a_root_that_is_a_link_is_fine(tmp_path, monkeypatch):
    (tmp_path / "scratch").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "scratch")
    monkeypatch.setenv("FMLIGHTNING_RUNS", str(tmp_path / "link"))
    assert run_directory(RESOLVED).parent == tmp_path / "link" / "e"


def test_rerun_moves_nothing_but_runs(fmlightning, repository, tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("years of work")
    moons = repository / "configs/toy/moons.yaml"
    status, shown = fmlightning(
        "fit",
        "--config",
        moons,
        f"--run_dir={mine}",
        "--rerun",
        "--wandb.mode=disabled",
        *STEPS,
    )
    assert status == 2
    assert "no run" in shown
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith("mine")] == ["mine"]
    assert (mine / "thesis.tex").read_text() == "years of work"
