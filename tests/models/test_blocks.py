"""The parts of the networks against direct formulas."""

import pytest
import torch
from torch import nn

from flatmin.models.common import Subsample, ZeroChannels
from flatmin.models.densenet import Dense, DenseNet, transition
from flatmin.models.pyramidnet import Pyramidal, PyramidNet
from flatmin.models.resnet import ResNet, basic, bottleneck
from flatmin.models.resnet_cifar import option_a
from flatmin.models.vgg import VGG
from flatmin.models.vit import Attention, Layer, Tokens, ViT
from flatmin.models.wide_resnet import PreActivated


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def without_body(block):
    """The block with nothing but its shortcut: the last layer of its body gives zero."""
    nn.init.zeros_(block.body[-1].weight)
    return block.eval()


@pytest.mark.parametrize("size", [4, 7])
def test_option_a(size):
    x = torch.randn(2, 3, size, size)
    out = without_body(option_a(3, 8, 2))(x)
    expected = torch.zeros(2, 8, (size + 1) // 2, (size + 1) // 2)
    for c in range(3):
        for i in range(expected.shape[2]):
            for j in range(expected.shape[3]):
                expected[:, c, i, j] = x[:, c, 2 * i, 2 * j].clamp(min=0)
    assert torch.equal(out, expected)


def test_option_a_has_no_parameters():
    assert not list(option_a(3, 8, 2).shortcut.parameters())
    assert isinstance(option_a(8, 8, 1).shortcut, nn.Identity)
    x = torch.randn(1, 2, 5, 5)
    assert torch.equal(Subsample(2)(x), x[:, :, [0, 2, 4]][:, :, :, [0, 2, 4]])
    assert torch.equal(ZeroChannels(3)(x), torch.cat([x, torch.zeros(1, 3, 5, 5)], 1))


@pytest.mark.parametrize("size", [5, 6])
def test_subsampling_keeps_the_memory_format_of_gradients(size):
    """A gradient of another format makes every operation before it slower."""
    plain = torch.randn(2, 3, size, size)
    last = plain.to(memory_format=torch.channels_last)
    gradients = []
    for x in (plain.requires_grad_(), last.requires_grad_()):
        out = Subsample(2)(x)
        gradients.append(torch.autograd.grad(out.square().sum(), x)[0])
        assert torch.equal(out, x[:, :, ::2, ::2])
    assert torch.equal(*gradients)
    assert gradients[1].is_contiguous(memory_format=torch.channels_last)
    traced = torch.fx.symbolic_trace(Subsample(2))
    assert torch.equal(traced(last), traced(plain))


@pytest.mark.parametrize(("block", "channels"), [(basic, 4), (bottleneck, 8), (option_a, 4)])
def test_residual_blocks_begin_with_the_input(block, channels):
    x = torch.randn(2, channels, 6, 6)
    assert torch.equal(without_body(block(channels, channels, 1))(x), x.relu())
    out = block(channels, 2 * channels, 2).eval()
    torch.testing.assert_close(out(x), (out.body(x) + out.shortcut(x)).relu())
    assert out(x).shape == (2, 2 * channels, 3, 3)


@pytest.mark.parametrize("block", [basic, bottleneck])
def test_projection(block):
    x = torch.randn(2, 4, 6, 6)
    net = without_body(block(4, 8, 2))
    kernel = net.shortcut[0].weight[:, :, 0, 0]
    picked = torch.einsum("oi,nihw->nohw", kernel, x[:, :, ::2, ::2]) / (1 + net.shortcut[1].eps) ** 0.5
    torch.testing.assert_close(net(x), picked.relu())


def test_the_stem_keeps_the_image_unless_it_pools():
    x = torch.randn(2, 3, 32, 32)
    assert ResNet(18, width=4).stem(x).shape == (2, 4, 32, 32)
    assert ResNet(18, width=4, max_pool=True).stem(x).shape == (2, 4, 16, 16)


def test_the_stem_of_the_paper():
    stem = ResNet(50, width=4, stem="imagenet").stem
    assert [type(module).__name__ for module in stem] == ["Conv2d", "BatchNorm2d", "ReLU", "MaxPool2d"]
    assert (stem[0].kernel_size, stem[0].stride, stem[0].padding) == ((7, 7), (2, 2), (3, 3))
    assert stem(torch.randn(1, 3, 224, 224)).shape == (1, 4, 56, 56)
    assert len(ResNet(50, width=4, stem="imagenet", max_pool=True).stem) == 4


def test_a_bottleneck_strides_at_its_3x3():
    strides = [module.stride[0] for module in bottleneck(4, 8, 2).body if isinstance(module, nn.Conv2d)]
    assert strides == [1, 2, 1]


def test_wide_blocks():
    x = torch.randn(2, 3, 6, 6)
    same, wider = without_body(PreActivated(3, 3, 1)), without_body(PreActivated(3, 5, 2))
    assert same.project is None and torch.equal(same(x), x)
    torch.testing.assert_close(wider(x), wider.project((x / (1 + 1e-5) ** 0.5).relu()))
    assert wider(x).shape == (2, 5, 3, 3)


def test_dropout_between_the_convolutions():
    block = PreActivated(3, 3, 1, dropout=0.5)
    kinds = [type(module).__name__ for module in block.body]
    assert kinds == ["Conv2d", "BatchNorm2d", "ReLU", "Dropout", "Conv2d"]
    assert not any(isinstance(module, nn.Dropout) for module in PreActivated(3, 3, 1).modules())


def test_dense_layers_keep_what_they_were_given():
    x = torch.randn(2, 5, 4, 4)
    layer = Dense(5, 3).eval()
    assert torch.equal(layer(x)[:, :5], x) and torch.equal(layer(x)[:, 5:], layer.body(x))
    assert transition(8)(torch.randn(2, 8, 6, 6)).shape == (2, 4, 3, 3)


def test_dense_blocks():
    net = DenseNet(growth=4, blocks=(2, 3))
    assert [name for name, _ in net.named_children()] == [
        "stem", "block1", "transition1", "block2", "last", "pool", "head",
    ]  # fmt: skip
    assert net.head.in_features == (8 + 2 * 4) // 2 + 3 * 4


def test_pyramidal_blocks():
    x = torch.randn(2, 3, 4, 4)
    means = x.reshape(2, 3, 2, 2, 2, 2).mean((3, 5))
    out = without_body(Pyramidal(3, 5, 2))(x)
    torch.testing.assert_close(out, torch.cat([means, torch.zeros(2, 2, 2, 2)], 1))
    assert torch.equal(without_body(Pyramidal(3, 3, 1))(x), x)  # no ReLU after the sum
    assert Pyramidal(3, 5, 2)(torch.randn(2, 3, 7, 7)).shape == (2, 5, 4, 4)


def test_channels_of_the_pyramid():
    with torch.device("meta"):
        blocks = [module for module in PyramidNet().modules() if isinstance(module, Pyramidal)]
        uneven = [m.body[1].out_channels for m in PyramidNet(14, 20).modules() if isinstance(m, Pyramidal)]
    assert [block.body[1].out_channels for block in blocks] == list(range(21, 287, 5))
    assert [k for k, block in enumerate(blocks) if block.body[1].stride == (2, 2)] == [18, 36]
    assert uneven == [19, 22, 26, 29, 32, 36]


def test_two_dropouts_in_the_classifier():
    kinds = [type(module).__name__ for module in VGG(11, width=4).hidden]
    assert kinds == ["Linear", "ReLU", "Dropout"] * 2
    assert [m.p for m in VGG(11, width=4).modules() if isinstance(m, nn.Dropout)] == [0.5, 0.5]


def test_attention_against_torch():
    ours, theirs = Attention(12, 3).double(), nn.MultiheadAttention(12, 3, batch_first=True).double()
    theirs.in_proj_weight.data, theirs.in_proj_bias.data = ours.qkv.weight.data, ours.qkv.bias.data
    theirs.out_proj.weight.data, theirs.out_proj.bias.data = ours.out.weight.data, ours.out.bias.data
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x, x, x, need_weights=False)[0])


def test_layer_against_torch():
    ours = Layer(12, 3).double()
    theirs = nn.TransformerEncoderLayer(
        12, 3, 48, dropout=0.0, activation="gelu", batch_first=True, norm_first=True, dtype=torch.float64
    )
    values = [
        ours.attend[1].qkv.weight, ours.attend[1].qkv.bias, ours.attend[1].out.weight, ours.attend[1].out.bias,
        ours.mlp[1].weight, ours.mlp[1].bias, ours.mlp[3].weight, ours.mlp[3].bias,
    ]  # fmt: skip
    for parameter, value in zip(theirs.parameters(), values, strict=False):  # the norms come last
        parameter.data = value.data
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x))


def test_tokens():
    tokens = Tokens(3, 8, 4, 6)
    nn.init.normal_(tokens.token)
    nn.init.normal_(tokens.positions)
    x = torch.randn(2, 3, 8, 8)
    out = tokens(x)
    assert out.shape == (2, 5, 6)
    torch.testing.assert_close(out[:, 0], (tokens.token + tokens.positions)[:, 0].expand(2, -1))
    patch = x[:, :, 4:, :4].flatten(1)  # second row, first column: the third of four
    expected = patch @ tokens.embed.weight.flatten(1).T + tokens.embed.bias + tokens.positions[:, 3]
    torch.testing.assert_close(out[:, 3], expected)


def test_only_positions_tell_patches_apart():
    net = ViT(image_size=8, depth=2, width=12, heads=3).double()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    swapped = torch.cat([x[..., 4:], x[..., :4]], -1)
    assert not torch.allclose(net(x), net(swapped), rtol=1e-12, atol=0)
    nn.init.zeros_(net.tokens.positions)
    torch.testing.assert_close(net(x), net(swapped))
