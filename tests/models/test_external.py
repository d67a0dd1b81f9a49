"""Names of other packages' networks, and what is said where the packages are missing; runs without them."""

import inspect
import sys
import textwrap

import pytest
from torch import nn

from flatmin.models.external import external
from flatmin.words import explained

SPECS = ("timm:resnet18", "torchvision:resnet18")


@pytest.fixture
def packages(monkeypatch, tmp_path):
    """Puts files in the place of timm and torchvision: called with the source text of each."""
    for name in [name for name in sys.modules if name.partition(".")[0] in ("timm", "torchvision")]:
        monkeypatch.delitem(sys.modules, name)

    def put(**sources):
        for name, text in sources.items():
            (tmp_path / f"{name}.py").write_text(textwrap.dedent(text), encoding="utf-8")
        monkeypatch.syspath_prepend(tmp_path)

    yield put
    for name in ("timm", "torchvision"):
        sys.modules.pop(name, None)


def test_any_other_spec():
    for spec in ["resnet18", "timm", "torchvision", "timm.models:resnet18", "mine:net", ":timm", ""]:
        assert external(spec) is None


@pytest.mark.parametrize("spec", SPECS)
def test_the_builder_says_what_it_takes(spec):
    """`train.sources.build_model` goes by the signature."""
    known = inspect.signature(external(spec)).parameters
    defaults = {"num_classes": 10, "in_channels": 3, "image_size": None, "pretrained": False}
    assert {name: p.default for name, p in known.items() if p.kind is p.KEYWORD_ONLY} == defaults
    assert set(known) - set(defaults) == {"options"}


@pytest.mark.parametrize("spec", SPECS)
def test_absence_is_said_with_the_extra(monkeypatch, spec):
    package = spec.partition(":")[0]
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        ModuleNotFoundError, match=rf"^{spec} needs {package}: pip install '\.\[vision\]' in a clone of flatmin\.$"
    ) as said:
        external(spec)()
    assert explained(said.value) and said.value.name == package


def test_timm_without_torchvision(monkeypatch, packages):
    packages(timm="import torchvision")
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ModuleNotFoundError, match=r"^timm:resnet18 needs torchvision: pip install"):
        external("timm:resnet18")()


@pytest.mark.parametrize("spec", SPECS)
def test_a_torchvision_of_another_torch(packages, spec):
    packages(timm="import torchvision", torchvision='raise RuntimeError("operator torchvision::nms does not exist")')
    sentence = rf"^{spec} needs torchvision, but .* does not match the installed torch \d[^ ]* \(operator"
    with pytest.raises(ImportError, match=sentence) as said:
        external(spec)()
    assert explained(said.value) and "\n" not in str(said.value)


def test_another_error_of_the_import_stays(packages):
    packages(timm='raise RuntimeError("no GPU")')
    with pytest.raises(RuntimeError, match=r"^no GPU$"):
        external("timm:resnet18")()


TIMM = """
    import types
    from torch import nn

    calls = []

    def list_models():
        return ["resnet18", "vit_tiny"]

    def is_model(name):
        return name.partition(".")[0] in list_models()

    def get_pretrained_cfg(name):
        return types.SimpleNamespace(fixed_input_size=True) if name == "vit_tiny" else None

    def create_model(name, **options):
        calls.append(options)
        if options.get("img_size") == 5:
            raise AssertionError("5 is no multiple\\nof 4.")
        if options.get("img_size") == 6:
            raise AssertionError
        return nn.Linear(1, options["num_classes"])
"""
PLAIN = {"num_classes": 10, "in_chans": 3, "pretrained": False}


@pytest.mark.parametrize(
    ("name", "given", "called"),
    [
        ("resnet18", {}, PLAIN),
        ("resnet18", {"image_size": 32, "in_channels": 1}, {**PLAIN, "in_chans": 1}),
        ("vit_tiny", {}, PLAIN),
        ("vit_tiny", {"image_size": 32, "num_classes": 7}, {**PLAIN, "num_classes": 7, "img_size": 32}),
        ("vit_tiny", {"image_size": 32, "img_size": 64}, {**PLAIN, "img_size": 64}),
        (
            "resnet18",
            {"pretrained": True, "drop_rate": 0.1},
            {**PLAIN, "pretrained": True, "drop_rate": 0.1},
        ),
    ],
)
def test_what_timm_is_told(packages, name, given, called):
    packages(timm=TIMM)
    assert isinstance(external(f"timm:{name}")(**given), nn.Module)
    assert sys.modules["timm"].calls == [called]


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("resnet1", "timm has no model 'resnet1'; did you mean 'resnet18'?"),
        ("vit_tny.augreg_in21k", "timm has no model 'vit_tny.augreg_in21k'; did you mean 'vit_tiny'?"),
        ("", "timm has no model ''"),
    ],
)
def test_a_name_that_timm_does_not_have(packages, name, sentence):
    packages(timm=TIMM)
    with pytest.raises(ValueError) as said:
        external(f"timm:{name}")()
    assert str(said.value) == f"{sentence} (timm.list_models() lists them)" and explained(said.value)


@pytest.mark.parametrize(
    ("size", "reason"), [(5, " and 5x5 pixels: 5 is no multiple"), (6, " and 6x6 pixels: AssertionError")]
)
def test_settings_that_a_network_refuses(packages, size, reason):
    packages(timm=TIMM)
    with pytest.raises(ValueError) as said:
        external("timm:vit_tiny")(image_size=size, in_channels=1)
    assert str(said.value) == (f"timm:vit_tiny cannot be built for 10 classes and images of 1 channels{reason}.")
