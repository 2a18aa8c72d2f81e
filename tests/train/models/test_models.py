"""Image models: the papers' sizes, any layout and size of image, shares too small for batch statistics."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional

from hpc_train.core.errors import UserError
from hpc_train.train.device import recompute_blocks
from hpc_train.train.models import classifier
from hpc_train.train.models.images import BatchNorm, image_layout
from hpc_train.train.models.resnet import ResNet
from hpc_train.train.models.vgg import Vgg

# He et al. (2016) and Simonyan and Zisserman (2015), as everybody builds them for 224x224x3 and 1,000 classes.
PUBLISHED: list[tuple[Callable[..., nn.Module], int, int]] = [
    (ResNet, 18, 11_689_512),
    (ResNet, 34, 21_797_672),
    (ResNet, 50, 25_557_032),
    (ResNet, 101, 44_549_160),
    (ResNet, 152, 60_192_808),
    (Vgg, 11, 132_863_336),
    (Vgg, 13, 133_047_848),
    (Vgg, 16, 138_357_544),
    (Vgg, 19, 143_667_240),
]
SMALL = {"resnet": {"stem": "small", "width": 4}, "vgg": {"width": 4, "hidden": [8]}}


def small(name: str, shape: tuple[int, ...] = (28, 28), **options: object) -> nn.Module:
    torch.manual_seed(0)
    return classifier(name, shape, 10, {**SMALL[name], **options})


def num_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("make, depth, published", PUBLISHED)
def test_parameters_are_the_published(make: Callable[..., nn.Module], depth: int, published: int) -> None:
    with torch.device("meta"):  # no memory
        assert num_parameters(make((224, 224, 3), 1000, depth=depth)) == published


def test_normalisation_takes_the_place_of_the_biases() -> None:
    with torch.device("meta"):
        plain, normalised = (Vgg((224, 224, 3), 1000, depth=16, batch_norm=each) for each in (False, True))
    num_channels = sum(part.num_features for part in normalised.modules() if isinstance(part, BatchNorm))
    assert num_parameters(normalised) == num_parameters(plain) + num_channels  # gamma and beta for one bias


@pytest.mark.parametrize(
    "name, options",
    [("resnet", {"depth": depth, "stem": stem}) for depth in (18, 34, 50, 101, 152) for stem in ("imagenet", "small")]
    + [("vgg", {"depth": depth, "batch_norm": norm}) for depth in (11, 13, 16, 19) for norm in (False, True)],
)
def test_every_depth_learns(name: str, options: dict[str, object]) -> None:
    """One step of gradient descent lowers the loss and changes every parameter."""
    model = small(name, **options, **({"dropout": 0.0} if name == "vgg" else {}))
    inputs, targets = torch.rand(4, 28, 28), torch.arange(4)
    before = functional.cross_entropy(model(inputs), targets)
    before.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            assert parameter.grad is not None and torch.isfinite(parameter.grad).all()
            parameter -= 1e-3 * parameter.grad
    assert functional.cross_entropy(model(inputs), targets) < before
    assert isinstance(model.blocks, nn.ModuleList), "blocks can be recomputed in backward"


@pytest.mark.parametrize("name", SMALL)
def test_a_picture_is_the_same_in_every_layout(name: str) -> None:
    grey, colour = torch.rand(3, 20, 30), torch.rand(3, 20, 30, 3)
    with torch.no_grad():
        first, *others = [
            small(name, tuple(each.shape[1:])).eval()(each) for each in (grey, grey[..., None], grey[:, None])
        ]
        assert first.shape == (3, 10) and all(torch.allclose(each, first, atol=1e-6) for each in others)
        channels_last, channels_first = colour, colour.permute(0, 3, 1, 2)
        one, other = (small(name, tuple(each.shape[1:])).eval()(each) for each in (channels_last, channels_first))
        assert torch.allclose(one, other, atol=1e-6) and not torch.allclose(one, first, atol=1e-2)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("size", [1, 7, 33])
def test_pictures_of_any_size(name: str, size: int) -> None:
    assert small(name, (size, size + 1))(torch.rand(2, size, size + 1)).shape == (2, 10)


@pytest.mark.parametrize(
    "shape, words", [((784,), "that is no image"), ((32, 32, 4), "that is no image"), ((3, 32, 3), "either end")]
)
def test_other_shapes_are_refused(shape: tuple[int, ...], words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        classifier("vgg", shape, 10, {})
    assert f"data.inputs has samples of {shape}" in str(error.value) and "Store (height, width)" in error.value.remedy


@pytest.mark.parametrize(
    "name, options, words",
    [
        ("resnet", {"depth": 20}, "depth = 20: one of 18, 34, 50, 101, 152"),
        ("resnet", {"width": 0}, "width = 0: a positive integer"),
        ("resnet", {"stem": "large"}, "stem = 'large': 'imagenet' or 'small'"),
        ("resnet", {"layers": 3}, "task.options.layers: resnet has no such option"),
        ("vgg", {"depth": 18}, "depth = 18: one of 11, 13, 16, 19"),
        ("vgg", {"hidden": [64, 0]}, "hidden = [64, 0]: a list of positive integers"),
        ("vgg", {"hidden": 64}, "hidden = 64: a list"),
        ("vgg", {"width": "wide"}, "width = 'wide': a positive integer"),
        ("vgg", {"dropout": 1.0}, "dropout = 1.0: at least 0 and below 1"),
    ],
)
def test_options_that_do_not_fit_are_refused(name: str, options: dict[str, object], words: str) -> None:
    with pytest.raises(UserError) as error:
        classifier(name, (28, 28), 10, options)
    assert words in str(error.value)


def test_residual_blocks_begin_as_the_identity() -> None:
    model = small("resnet", depth=50)
    x = torch.rand(2, 16, 7, 7)
    assert torch.equal(model.blocks[1](x), x)  # positive, so that the last ReLU leaves it alone


@pytest.mark.parametrize("name, options", [("resnet", {}), ("vgg", {"batch_norm": True})])
@pytest.mark.parametrize("num_samples, shape", [(0, (28, 28)), (0, (8, 8, 3)), (1, (1, 1)), (1, (28, 28))])
def test_a_share_of_one_sample_or_none(
    name: str, options: dict[str, object], num_samples: int, shape: tuple[int, ...]
) -> None:
    """An epoch's last batch on many ranks: the step works and running statistics stay finite."""
    model = small(name, shape, **options)
    model(torch.rand(8, *shape)).sum().backward()
    model.zero_grad()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    logits = model(torch.rand(num_samples, *shape))
    functional.cross_entropy(logits, torch.zeros(num_samples).long(), reduction="sum").backward()
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())
    if num_samples == 0 or shape == (1, 1):
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_statistics_are_those_of_the_share() -> None:
    ours, theirs = BatchNorm(3), nn.BatchNorm2d(3)
    x = torch.randn(4, 3, 5, 5)
    assert torch.equal(ours(x), theirs(x)) and torch.equal(ours.running_var, theirs.running_var)
    assert torch.equal(ours.eval()(x), theirs.eval()(x))


@pytest.mark.parametrize("name, options", [("resnet", {}), ("vgg", {"batch_norm": True, "dropout": 0.0})])
def test_blocks_computed_again_count_a_batch_once(name: str, options: dict[str, object]) -> None:
    """Activation checkpointing changes neither gradients nor running statistics."""
    plain, again = small(name, **options), small(name, **options)
    recompute_blocks(again)
    inputs = torch.rand(4, 28, 28)
    for model in (plain, again):
        model(inputs).logsumexp(1).sum().backward()
    for one, other in zip(plain.parameters(), again.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)
    for (key, one), other in zip(plain.named_buffers(), again.buffers(), strict=True):
        assert key.endswith("num_batches_tracked") or torch.equal(one, other), key


def test_on_a_cpu_each_channel_is_a_plane_of_its_own() -> None:
    """For every layout: oneDNN's bug 6035 is in channels_last. Images stored contiguously are not copied."""
    for shape in ((3, 8, 6), (8, 6, 3), (1, 8, 6), (8, 6, 1), (8, 6)):
        stored = torch.rand(5, *shape)
        pictures = image_layout(shape, "resnet").channels_first(stored)
        num_channels = 3 if 3 in shape else 1
        assert pictures.shape == (5, num_channels, 8, 6) and pictures.stride() == (num_channels * 48, 48, 6, 1)
        assert (pictures.data_ptr() == stored.data_ptr()) == (shape != (8, 6, 3))


def test_on_a_gpu_channels_lie_side_by_side() -> None:
    pictures = image_layout((8, 6, 3), "resnet").channels_first(torch.empty(5, 8, 6, 3, device="meta"))
    assert pictures.is_contiguous(memory_format=torch.channels_last)
