"""Settings of `flatmin train`: presets, words, given fields, and what the machine has."""

import dataclasses
import sys
from types import SimpleNamespace

import pytest
import torch

from flatmin.data.dataset import Data, Split
from flatmin.data.images import STATISTICS, Statistics
from flatmin.methods import compose, method_table
from flatmin.models.zoo import MODELS
from flatmin.train.config import RunConfig
from flatmin.train.options import Options
from flatmin.train.preset import load_options, load_run
from flatmin.train.radii import radius_of
from flatmin.train.settings import preset_names
from flatmin.train.trainer import Trainer

NAMES = preset_names("train")


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    """The same tests on every machine; `gpu` gives one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def gpu(monkeypatch):
    """A GPU, as far as the settings can see; its `bf16` may be switched off."""
    seen = SimpleNamespace(checked=[], bf16=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: seen.bf16)
    monkeypatch.setattr("flatmin.train.sources.check_device", seen.checked.append)
    return seen


@pytest.fixture
def write(tmp_path):
    """A preset file with this text."""

    def written(text):
        path = tmp_path / "mine.toml"
        path.write_text(text)
        return str(path)

    return written


def config(preset="smoke", *words, **given):
    return load_run(preset, words, **given)[0]


def stand_in(name):
    """Data of the shape that a preset's data have, so that its run can be built without the files."""
    classes, channels, side = {
        "cifar10": (10, 3, 32),
        "cifar100": (100, 3, 32),
        "fashion-mnist": (10, 1, 28),
        "tiny-imagenet": (200, 3, 64),
    }[name]
    n = 256
    x = torch.randint(0, 256, (n, channels, side, side), dtype=torch.uint8)
    part = Split(x, torch.arange(n) % classes)
    known = STATISTICS.get(name) or Statistics.of(x)
    return Data(part, part, part, num_classes=classes, name=name, statistics=known)


class TestEveryPreset:
    def test_there_is_one_for_every_protocol(self):
        protocols = {f"cifar{k}-{net}" for k in (10, 100) for net in ("resnet18", "resnet56", "wrn28-10")}
        assert protocols | {"smoke", "digits", "fashion-mnist", "tiny-imagenet-resnet18"} <= set(NAMES)

    def test_loads(self):
        for name in NAMES:
            found, options = load_run(name)
            assert isinstance(found, RunConfig) and options == Options()
            assert found.rho is not None and found.rho > 0
            assert found.model in MODELS or ":" in found.model
            assert (found.device, found.precision) == ("cpu", "float32")

    @pytest.mark.parametrize(
        "name", [n for n in NAMES if not n.startswith(("imagenet", "pets", "flowers")) and "wrn" not in n]
    )
    def test_builds(self, name):
        """All that a dry run does but read the files, which are not there."""
        found = config(name)
        trainer = Trainer(found, data=None if found.data == "digits" else stand_in(found.data))
        assert trainer.schedule.at(0) == found.lr
        assert trainer.recipe == compose("sam").for_length(found.epochs * trainer.feed.steps)

    @pytest.mark.parametrize("name", [name for name in NAMES if "wrn" in name])
    def test_the_script_of_vasso(self, name):
        """Its own rule, the best epoch on the test part of a training on all of the official training part."""
        found = config(name, "train_on_val=true", "selection=max-test")
        assert (found.train_on_val, found.selection, found.drop_last) == (True, "max-test", True)
        assert (found.model, found.epochs, found.batch_size) == ("wrn28-10", 200, 128)

    @pytest.mark.parametrize("name", [name for name in NAMES if "resnet56" in name])
    def test_the_protocol_of_bisam(self, name):
        found = config(name)
        assert (found.label_smoothing, found.smoothing, found.batch_size) == (0.1, "others", 128)
        assert (found.lr, found.momentum, found.weight_decay, found.epochs) == (0.1, 0.9, 5e-4, 200)

    @pytest.mark.parametrize("name", [name for name in NAMES if name.endswith("-resnet18") and "cifar" in name])
    def test_the_protocol_of_the_empirical_study(self, name):
        found = config(name)
        assert (found.batch_size, found.epochs, found.schedule, found.schedule_unit) == (256, 200, "cosine", "epoch")
        assert (found.lr, found.momentum, found.weight_decay) == (0.1, 0.9, 1e-3)
        assert (found.cutout, found.cutout_p, found.split_seed, found.val_share) == (16, 0.5, 42, 0.1)


class TestAutomatic:
    """What "auto" stands for."""

    def test_without_a_gpu(self):
        found = config()
        assert (found.device, found.precision, found.channels_last, found.tf32) == ("cpu", "float32", True, False)

    def test_with_one(self, gpu):
        found = config()
        assert (found.device, found.precision, found.channels_last, found.tf32) == ("cuda", "bf16", True, True)
        assert gpu.checked == ["cuda"]

    @pytest.mark.parametrize("key", ["device", "precision", "channels_last", "tf32"])
    def test_the_word_itself(self, key, gpu, write):
        assert config("smoke", f"{key}=auto") == config()
        assert config(write(f'{key} = "auto"\nmodel = "mlp"\n')) == config(write('model = "mlp"\n'))

    @pytest.mark.parametrize(
        ("word", "field", "value"),
        [
            ("precision=float32", "precision", "float32"),
            ("precision=fp16", "precision", "fp16"),
            ("channels_last=false", "channels_last", False),
            ("tf32=no", "tf32", False),
        ],
    )
    def test_what_is_said_stays(self, gpu, word, field, value):
        assert getattr(config("smoke", word), field) == value

    def test_the_cpu_of_a_machine_with_a_gpu(self, gpu):
        found = config("smoke", "device=cpu")
        assert (found.device, found.precision, found.channels_last, found.tf32) == ("cpu", "float32", True, False)

    def test_auto_takes_back_what_a_preset_says(self, gpu, write):
        own = write('device = "cpu"\nprecision = "fp16"\n')
        found = config(own, "device=auto", "precision=auto")
        assert (found.device, found.precision) == ("cuda", "bf16")

    def test_a_gpu_without_bf16(self, gpu):
        gpu.bf16 = False
        with pytest.raises(ValueError, match=r"^this GPU does not support bf16; set precision=fp16 or "):
            config()
        assert config("smoke", "precision=fp16").precision == "fp16"

    def test_bf16_on_a_cpu(self):
        assert config("smoke", "precision=bf16").precision == "bf16"

    @pytest.mark.parametrize(
        ("device", "words"),
        [
            ("cuda", r"^device=cuda cannot be used here: "),
            ("gpu", r"^device=gpu is not known.*\(device: cpu, cuda\)"),
            ("meta", r"^device=meta is not known \(device: cpu, cuda\)"),
            ("cuda:1", r"^device=cuda:1 (cannot be used here|is not known)"),
        ],
    )
    def test_devices_that_cannot_be_used(self, device, words):
        if device.startswith("cuda") and torch.cuda.device_count():
            pytest.skip("this machine has a GPU")
        with pytest.raises(ValueError, match=words):
            config("smoke", f"device={device}")


RADII = """
[rho]
sam = 0.11
asam = 0.77
vasso = 0.22
"""


class TestRadii:
    def test_by_method(self, write):
        for method, rho in [
            ("sam", 0.11),
            ("asam", 0.77),
            ("vasso", 0.22),  # its own entry
            ("fsam", 0.11),  # that of the first in its geometry
            ("bisam-log", 0.11),
            ("fsam+asam", 0.77),
            ("vasso+asam", 0.77),
            ("asam+vasso", 0.77),
            ("usam", compose("usam").default_rho),  # nothing in its geometry
            ("sgd", None),
            ("sgdhess", compose("sgdhess").default_rho),  # a factor, and no length
        ]:
            assert config(write(RADII), f"method={method}").rho == rho

    def test_without_a_table(self, write):
        own = write("epochs = 2\n")
        assert config(own).rho == compose("sam").default_rho
        assert config(own, "method=asam").rho == compose("asam").default_rho

    def test_a_factor_has_an_entry_of_its_own(self, write):
        assert config(write("[rho]\nsgdhess = 0.3\n"), "method=sgdhess").rho == 0.3
        assert config(write("[rho]\nsgdhess = 0.3\n"), "method=sam").rho == compose("sam").default_rho

    def test_a_radius_that_is_said_is_taken(self, write):
        assert config(write(RADII), "method=fsam", "rho=0.4").rho == 0.4
        assert config(write(RADII), rho=0.4).rho == 0.4
        assert config(write(RADII), "rho=0").rho == 0.0

    def test_none_is_as_if_nothing_was_said(self, write):
        assert config(write(RADII), "rho=none").rho == 0.11

    def test_the_first_entry_of_the_geometry(self):
        table = method_table()
        assert radius_of("fsam", compose("fsam"), {"vasso": 0.3, "sam": 0.1}, table) == 0.3
        assert radius_of("fsam", compose("fsam"), {"elsewhere": 0.3, "sam": 0.1}, table) == 0.1

    def test_a_method_that_states_its_own(self):
        table = method_table()
        assert radius_of("gam", compose("gam"), {"sam": 0.1}, table) == compose("gam").default_rho == 0.02
        assert radius_of("gam", compose("gam"), {"sam": 0.1, "gam": 0.3}, table) == 0.3

    def test_a_method_without_one_refuses_one(self):
        with pytest.raises(ValueError, match=r"^sgd has no radius; leave out rho\.$"):
            config("smoke", "method=sgd", "rho=0.1")

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("rho = 0.1\n", r"^rho = 0\.1 is a float, expected a table\.$"),
            ('[rho]\nsam = "much"\n', r"rho\.sam = 'much' is a str, expected a number"),
        ],
    )
    def test_a_table_of_another_form(self, write, text, words):
        with pytest.raises(ValueError, match=words):
            config(write(text))


class TestPrecedence:
    """A preset, then words, then given fields."""

    def test_words_beat_the_preset_and_given_fields_beat_both(self, write):
        own = write("epochs = 7\nlr = 0.5\nseed = 3\n")
        found = config(own, "lr=0.25", "seed=4", seed=5)
        assert (found.epochs, found.lr, found.seed) == (7, 0.25, 5)

    def test_fields_that_are_not_given(self):
        assert config("smoke", "epochs=4", epochs=None).epochs == 4

    def test_the_last_word_counts(self):
        assert config("smoke", "epochs=4", "epochs=5").epochs == 5

    def test_spaces_around_a_word(self):
        assert config("smoke", " epochs = 4 ").epochs == 4

    def test_the_method(self, write):
        assert config(write('method = "asam"\n')).method == "asam"
        assert config(write('method = "asam"\n'), "method=vasso").method == "vasso"
        assert config(write("epochs = 1\n")).method == "sam"

    def test_values_of_every_type(self):
        words = ("betas=0.8,0.95", "milestones=1,3", "schedule=multistep", "epochs=5", "ema=0.99", "nesterov=yes")
        found = config("smoke", *words, "crop=none", "clip_norm=2", "model=conv")
        assert (found.betas, found.milestones, found.ema) == ((0.8, 0.95), (1, 3), 0.99)
        assert (found.nesterov, found.crop, found.clip_norm, found.model) == (True, None, 2.0, "conv")

    def test_nothing_of_the_package_is_changed(self):
        before = config()
        config("smoke", "method=vasso", "theta=0.5", "epochs=9", "model.maxpool=true")
        assert config() == before


class TestParameters:
    @pytest.mark.parametrize("word", ["theta=0.8", "direction.theta=0.8", "theta=.8"])
    def test_of_the_parts(self, word):
        assert config("smoke", "method=vasso", word).params == {"direction.theta": 0.8}

    def test_of_several_parts(self):
        found = config("smoke", "method=vasso+bisam-log", "theta=0.8", "mu=3")
        assert found.params == {"direction.theta": 0.8, "objective.mu": 3}

    def test_words_and_switches(self):
        assert config("smoke", "method=ssam-d", "drop=random").params == {"mask.drop": "random"}
        assert config("smoke", "method=asam", "weights_only=true").params == {"geometry.weights_only": True}

    def test_a_name_that_two_parts_have(self):
        words = r"^several parts of 'ssam-d\+late' have a parameter 'total'; write mask\.total or schedule\.total\.$"
        with pytest.raises(ValueError, match=words):
            config("smoke", "method=ssam-d+late", "total=3")
        assert config("smoke", "method=ssam-d+late", "when.total=3").params == {"schedule.total": 3}

    def test_of_a_preset(self, write):
        own = write('method = "vasso"\n[params]\n"direction.theta" = 0.5\n')
        assert config(own).params == {"direction.theta": 0.5}
        assert config(own, "theta=0.7").params == {"direction.theta": 0.7}
        assert config(own, "method=vasso+asam").params == {"direction.theta": 0.5}
        assert config(own, "method=fsam").params == {}, "another method has other parts"
        assert config(write('method = "vasso"\n[params]\ntheta = 0.5\n')).params == {"direction.theta": 0.5}

    def test_of_the_model(self, write):
        own = write('model = "resnet18"\n[model_params]\nmaxpool = true\nwidth = 8\n')
        assert config(own).model_params == {"maxpool": True, "width": 8}
        assert config(own, "model.width=16", "model.kind=x").model_params == {"maxpool": True, "width": 16, "kind": "x"}

    def test_a_parameter_that_the_method_does_not_have(self):
        with pytest.raises(ValueError, match=r"^unknown setting 'theta'.*parameters of sam: none; .*model\.NAME"):
            config("smoke", "theta=0.8")
        with pytest.raises(ValueError, match=r"unknown setting 'thetta'; did you mean 'theta'\?"):
            config("smoke", "method=vasso", "thetta=0.8")


PLUGIN = """
from flatmin.methods import Direction
from flatmin.methods import Method
from dataclasses import dataclass

@dataclass(frozen=True, kw_only=True)
class Sign(Direction):
    scale: float = 1.0

    def __call__(self, g, state, c):
        return [x.sign() for x in g], {}

METHODS = {"sign": Method(name="sign", title="Sign SAM", parts=(Sign(),), formula="d = sign(g)", paper="none yet")}
"""


class TestPlugins:
    @pytest.fixture(autouse=True)
    def here(self, tmp_path, monkeypatch):
        (tmp_path / "train_plugin.py").write_text(PLUGIN)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
        yield
        sys.modules.pop("train_plugin", None)

    def test_a_method_of_ones_own(self):
        found = config("smoke", "plugins=train_plugin", "method=sign+asam", "scale=2", "epochs=1")
        assert (found.method, found.plugins, found.params) == ("sign+asam", ("train_plugin",), {"direction.scale": 2})
        assert found.rho == compose("asam").default_rho
        assert Trainer(found).recipe.direction.scale == 2

    def test_in_a_preset_with_a_radius(self, write):
        own = write('plugins = ["train_plugin"]\nmethod = "sign"\n[rho]\nsign = 0.3\n')
        assert (config(own).method, config(own).rho) == ("sign", 0.3)

    def test_without_it(self):
        with pytest.raises(ValueError, match="unknown method 'sign'"):
            config("smoke", "method=sign")

    @pytest.mark.parametrize("word", ["plugins=no_such_plugin"])
    def test_one_that_is_not_there(self, word):
        with pytest.raises(ValueError, match="plugin: there is no module 'no_such_plugin'"):
            config("smoke", word)

    def test_text_in_place_of_a_list(self, write):
        with pytest.raises(ValueError, match="plugins = 'train_plugin' is a str, expected a list of text"):
            config(write('plugins = "train_plugin"\n'))


class TestRefused:
    def test_words(self):
        for words, message in [
            (["epoch=3"], r"^unknown setting 'epoch'; did you mean 'epochs'\? \(parameters of sam: "),
            (["log_evry=3"], r"did you mean 'log_every'\?"),
            (
                ["model_params=3"],
                r"^unknown setting 'model_params'.*; all settings: flatmin settings\)$",
            ),
            (["params=3"], r"^unknown setting 'params'"),
            (["xyzzy=3"], r"^unknown setting 'xyzzy' \(parameters "),
            (["rho.sam=3"], r"^unknown setting 'rho.sam'"),
            (["epochs=many"], r"^epochs=many is not a whole number\.$"),
            (["betas=a,b"], r"^betas=a is not a number\.$"),
            (["method=samm"], r"^unknown method 'samm'; did you mean 'sam'"),
            (["epochs=0"], r"^epochs must be at least 1, got 0\.$"),
            (["batch_size=-4"], r"^batch_size must be at least 1, got -4\.$"),
            (["lr=-1"], r"^lr must be at least 0, got -1\.0\.$"),
            (["lr=nan"], r"^lr must be at least 0, got nan\.$"),
            (["lr=inf"], r"^lr must be at least 0, got inf\.$"),
            (["rho=-1"], r"^rho must be at least 0, got -1\.0\.$"),
            (["momentum=-0.1"], r"^momentum must be at least 0"),
            (["noise=2"], r"^noise must be at least 0 and at most 1, got 2\.0\.$"),
            (["label_smoothing=1"], r"^label_smoothing must be .*below 1, got 1\.0\.$"),
            (["val_share=0"], r"^val_share must be above 0 and at most 0\.9, got 0\.0\.$"),
            (["ema=1"], r"^ema must lie between 0 and 1, or be none, got 1\.0\.$"),
            (["ema=nan"], r"^ema must lie between 0 and 1"),
            (["clip_norm=0"], r"^clip_norm must be above 0, got 0\.0\.$"),
            (["betas=0.9"], r"^betas must be two numbers from 0 to below 1, got \(0\.9,\)\.$"),
            (["betas=0.9,1"], r"^betas must be two numbers from 0 to below 1"),
            (["cutout_p=2"], r"^cutout_p must be at least 0 and at most 1, got 2\.0\.$"),
            (["train_size=0"], r"^train_size must be at least 1, got 0\.$"),
            (["optimizer=adm"], r"^optimizer=adm is not known; did you mean 'adam'\? \(optimizer: sgd, adam, adamw\)$"),
            (["schedule=cos"], r"^schedule=cos is not known; did you mean 'cosine'\?"),
            (["precision=bf17"], r"^precision=bf17 is not known; did you mean 'bf16'\? \(precision: float32, bf16"),
            (["selection=best"], r"^selection=best is not known.* \(selection: val, last, max-test\)$"),
            (["smoothing=others2"], r"did you mean 'others'\?"),
            (["noise_kind=sym"], r"did you mean 'symmetric'\?"),
            (["parallel=dp"], r"^parallel=dp is not known"),
            (["nonfinite=go"], r"^nonfinite=go is not known"),
            (["schedule_unit=batch"], r"^schedule_unit=batch is not known \(schedule_unit: epoch, step\)$"),
            (["tf32=maybe"], r"^tf32=maybe is not auto or true or false\.$"),
            (["ascent_sync=some"], r"^ascent_sync=some is not known"),
            (["nesterov=true", "momentum=0"], r"^nesterov=true needs optimizer=sgd and a momentum above 0\.$"),
            (["nesterov=true", "optimizer=adam"], r"^nesterov=true needs optimizer=sgd"),
            (["train_on_val=true"], r"^train_on_val=true leaves no validation part to choose on; set selection=last, "),
            (["graph=true"], r"^graph=true captures a CUDA graph; it needs device=cuda\.$"),
            (["keep_checkpoints=0"], r"^keep_checkpoints must be at least 1, got 0\.$"),
            (["measure_examples=0"], r"^measure_examples must be at least 1, got 0\.$"),
            (["log_every=-1"], r"^log_every must be at least 0, got -1\.$"),
            (["measure_m=-1"], r"^measure_m must be at least 0, got -1\.$"),
            (["measure_rho=0"], r"^measure_rho must be above 0, got 0\.0\.$"),
            (["measure_m=64", "measure_examples=50"], r"^measure_m=64 is more than the 50 .*\.$"),
            (["measure_m=8", "measures=hessian"], r"^measure_m=8 needs the section sharpness"),
            (
                ["measures=hesian"],
                r"^measures=hesian: what must be of .*; got hesian; did you mean 'hessian'\?$",
            ),
        ]:
            with pytest.raises(ValueError, match=message):
                config("smoke", *words)

    def test_files(self, write):
        for text, message in [
            ("epoch = 3\n", r"unknown option 'epoch'; did you mean 'epochs'\?"),
            ("log_every = 1.5\n", r"^log_every = 1\.5 is a float, expected a whole number\.$"),
            ("weights = 1\n", r"^weights = 1 is an int, expected true or false\.$"),
            ("[model_params]\nwidth = [1]\n", r"^model_params\.width = \[1\] is a list, expected .*number.*\.$"),
            ("model_params = 3\n", r"^model_params = 3 is an int, expected a table\.$"),
            (
                'method = "vasso"\n[params]\nsigma = 0.5\n',
                r"^unknown setting 'sigma'.*parameters of vasso: direction\.theta",
            ),
            ('method = "vasso"\n[params]\ntheta = [1]\n', r"^params\.theta = \[1\] is a list, expected "),
        ]:
            with pytest.raises(ValueError, match=message):
                config(write(text))

    def test_presets_that_are_not_there(self):
        with pytest.raises(ValueError, match=r"unknown preset 'smok'; did you mean 'smoke'\? \(presets: "):
            config("smok")

    def test_given_fields_that_are_none(self):
        with pytest.raises(ValueError, match="unknown option 'epoch'"):
            config("smoke", epoch=3)


class TestOptions:
    WORDS = ("log_every=7", "diagnostics=true", "trackers=tensorboard,mlflow", "weights=false", "project=mine")
    EXPECTED = Options(log_every=7, diagnostics=True, trackers=("tensorboard", "mlflow"), weights=False, project="mine")

    def test_among_the_words(self):
        found, options = load_run("smoke", [*self.WORDS, "epochs=1"])
        assert options == self.EXPECTED
        assert found == config("smoke", "epochs=1")

    def test_in_a_preset(self, write):
        own = write('log_every = 7\ncheckpoint_every = 5\ntrackers = ["mlflow"]\n')
        options = load_run(own, ["log_every=9"])[1]
        assert options == Options(log_every=9, checkpoint_every=5, trackers=("mlflow",))

    def test_given(self):
        assert load_run("smoke", ["log_every=9"], log_every=3, weights=False)[1] == Options(log_every=3, weights=False)

    def test_alone(self):
        assert load_options(self.WORDS) == (self.EXPECTED, [])
        assert load_options(["epochs=3", "log_every=7", "rho=1"]) == (Options(log_every=7), ["epochs=3", "rho=1"])
        assert load_options([]) == (Options(), [])

    def test_of_another_kind(self):
        with pytest.raises(ValueError, match=r"^log_every must be at least 0"):
            load_options(["log_every=-1"])

    def test_no_name_stands_for_two_things(self):
        both = {f.name for f in dataclasses.fields(RunConfig)} & {f.name for f in dataclasses.fields(Options)}
        assert not both
