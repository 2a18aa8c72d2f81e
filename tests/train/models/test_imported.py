"""Models of other packages, by their import path: what they are given and give, and what is refused in words."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from hpc_train.core.errors import UserError
from hpc_train.train.device import recompute_blocks
from hpc_train.train.initial_weights import build
from hpc_train.train.models import classifier, context_length, language_model, regressor
from hpc_train.train.reduce.shard_blocks import find_blocks

HERE = __name__
TINY_GPT = {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 12}
TINY_BERT = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 32}


class Convolution(nn.Module):
    def __init__(self, in_channels: int = 3, classes: int = 4) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))  # no layer: the first one decides what the model is given
        self.first = nn.Conv2d(in_channels, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.last = nn.Linear(8, classes)

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        self.given = pictures
        features = self.norm(self.first(pictures)).relu().amax((2, 3))
        return self.last(features.reshape(-1, 8))


class Perceptron(nn.Module):
    def __init__(self, input_shape: tuple[int, ...], num_outputs: int, width: int = 5) -> None:
        super().__init__()
        self.input_shape = input_shape
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(input_shape[0] * input_shape[1], width), nn.Linear(width, num_outputs)
        )

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.layers(inputs)


class Windows(nn.Module):
    def __init__(self, vocab_size: int, context: int = 7) -> None:
        super().__init__()
        self.context = context
        self.layer = nn.Sequential(nn.Embedding(vocab_size, 8), nn.Linear(8, vocab_size))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.layer(tokens)


def makes_nothing(**options: object) -> None:
    return None


class Hidden(Windows):
    def forward(self, tokens: torch.Tensor) -> Any:
        return {"hidden": tokens}


@pytest.mark.parametrize("shape", [(9, 9), (9, 9, 3), (3, 9, 9), (9, 9, 1)])
def test_pictures_come_with_channels_first(shape: tuple[int, ...]) -> None:
    model = classifier(f"{HERE}:Convolution", shape, 4, {})
    inputs = torch.rand(2, *shape)
    assert model(inputs).shape == (2, 4) and model.given.shape == (2, 3, 9, 9)
    grey = inputs.reshape(2, 1, 9, 9).expand(2, 3, 9, 9) if len(shape) == 2 or shape[2] == 1 else None
    expected = inputs.movedim(-1, 1) if shape == (9, 9, 3) else inputs if grey is None else grey
    assert torch.equal(model.given, expected)


def test_samples_of_any_number_of_channels_are_found_by_the_convolution() -> None:
    model = classifier(f"{HERE}:Convolution", (9, 9, 13), 4, {"in_channels": 13})
    inputs = torch.rand(2, 9, 9, 13)
    model(inputs)
    assert torch.equal(model.given, inputs.movedim(-1, 1))


def test_a_factory_gets_what_the_data_decide_and_other_samples_as_they_are() -> None:
    model = regressor(f"{HERE}:Perceptron", (4, 6), (3,), {"width": 2})
    assert model.input_shape == (4, 6) and model(torch.rand(5, 4, 6)).shape == (5, 3)
    assert (
        context_length(f"{HERE}:Windows", {}, False) == 7
        and context_length(f"{HERE}:Windows", {"context": 5}, True) == 5
    )
    text = language_model(f"{HERE}:Windows", 11, 5, {"context": 5}, masked=False)
    assert text.context == 5 and text(torch.zeros(2, 5, dtype=torch.int64)).shape == (2, 5, 11)


def test_a_rank_with_one_sample_or_none_computes() -> None:
    model = classifier(f"{HERE}:Convolution", (3, 3), 4, {"in_channels": 1})
    running = model.norm.running_mean.clone()
    for num in (1, 0):
        outputs = model(torch.rand(num, 3, 3))
        functional.cross_entropy(outputs, torch.zeros(num, dtype=torch.int64), reduction="sum").backward()
        assert outputs.shape == (num, 4) and torch.equal(model.norm.running_mean, running) and model.norm.training
    model(torch.rand(2, 3, 3))
    assert not torch.equal(model.norm.running_mean, running)


class Dead(nn.Module):
    def __init__(self, width: int = 1) -> None:
        raise LookupError("boom")


REFUSED: list[tuple[Callable[[], object], tuple[str, ...]]] = [
    (lambda: classifier("no.such:Model", (3,), 2, {}), ("task.model = 'no.such:Model': no module no",)),
    (lambda: classifier("torch.nn:Nothing", (3,), 2, {}), ("torch.nn has no model Nothing",)),
    (lambda: classifier("os:system", (3,), 2, {"command": "true"}), ("os is a part of Python and has no model",)),
    (lambda: classifier("torch:pi", (3,), 2, {}), ("is float, which makes no model",)),
    (lambda: classifier(":", (3,), 2, {}), ("is no import path", "'package.module:name'")),
    (lambda: classifier(f"{HERE}:makes_nothing", (3,), 2, {}), ("returned NoneType, no torch module",)),
    (lambda: classifier(f"{HERE}:Convolution", (9, 9), 4, {"widht": 2}), ("refuses them", "'widht'")),
    (
        lambda: classifier(f"{HERE}:Dead", (9,), 4, {}),
        (f"{HERE}:Dead cannot be made: LookupError: boom, at {__file__}:",),
    ),
    (
        lambda: classifier(f"{HERE}:Dead", (9,), 4, {"width": 2}),
        (f"cannot be made with task.options = {{'width': 2}}: LookupError: boom, at {__file__}:",),
    ),
    (lambda: classifier("torch.nn:Linear", (9,), 4, {}), ("torch.nn:Linear cannot be made: TypeError", "task.options")),
    (lambda: classifier(f"{HERE}:Convolution", (9, 9, 3), 4, {"in_channels": 5}), ("3 channels", "convolution of 5")),
    (lambda: classifier(f"{HERE}:Convolution", (9,), 4, {}), ("that is no image",)),
    (
        lambda: classifier(f"{HERE}:Convolution", (9, 9), 10, {})(torch.rand(2, 9, 9)),
        ("gives 4 numbers for each sample, and the targets have 10 classes", "num_classes"),
    ),
    (
        lambda: language_model(f"{HERE}:Hidden", 11, 7, {}, False)(torch.zeros(2, 7, dtype=torch.int64)),
        ("returns dict, neither a tensor nor something with logits", "BertForMaskedLM"),
    ),
    (lambda: recompute_blocks(classifier(f"{HERE}:Convolution", (9, 9), 4, {})), ("has no blocks to recompute",)),
]


@pytest.mark.parametrize("case", range(len(REFUSED)))
def test_what_does_not_go_is_told_with_its_remedy(case: int) -> None:
    make, words = REFUSED[case]
    with pytest.raises(UserError) as caught:
        make()
    for word in words:
        assert word in str(caught.value)
    assert caught.value.remedy


def test_a_missing_package_and_a_module_that_fails_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fails_so.py").write_text("\nimport no_such_package\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"No module named 'no_such_package', at .*fails_so.py:2"):
        classifier("fails_so:Model", (3,), 2, {})


# ----------------------------------------------------------------------------------------------------- transformers


@pytest.fixture(scope="module")
def gpt() -> nn.Module:
    pytest.importorskip("transformers")
    torch.manual_seed(1)
    return language_model("transformers:GPT2LMHeadModel", 50, 12, TINY_GPT, masked=False)


def test_a_gpt_of_transformers_gives_the_logits_of_its_package(gpt: nn.Module) -> None:
    tokens = torch.arange(24).reshape(2, 12)
    own = type(gpt).forward(gpt.eval(), input_ids=tokens).logits
    assert torch.equal(gpt(tokens), own) and own.shape == (2, 12, 50)
    assert context_length("transformers:GPT2LMHeadModel", TINY_GPT, False) == 12
    assert gpt.config.use_cache is False and gpt.config.eos_token_id is None
    assert gpt(torch.zeros(0, 12, dtype=torch.int64)).shape == (0, 12, 50), "reshapes with -1 do not take nothing"
    assert find_blocks(gpt, None).keys() >= {"transformer.h.0", "transformer.h.1"}


def test_a_bert_of_transformers_gives_logits_of_masked_positions() -> None:
    pytest.importorskip("transformers")
    model = language_model(
        "transformers:BertForMaskedLM", 50, 16, TINY_BERT | {"max_position_embeddings": 16}, True
    ).eval()
    tokens, positions = torch.arange(32).reshape(2, 16), torch.tensor([[0, 3], [5, 15]])
    whole = type(model).forward(model, input_ids=tokens).logits
    assert torch.equal(model(tokens, positions), whole[torch.arange(2)[:, None], positions])


def test_a_misspelt_option_of_a_configuration_is_found() -> None:
    pytest.importorskip("transformers")
    with pytest.raises(UserError, match=r"task\.options\.n_layers: GPT2Config has no such option\n.*n_layer"):
        language_model("transformers:GPT2LMHeadModel", 50, 12, {"n_layers": 2}, masked=False)


def test_weights_begin_as_the_package_makes_them_and_can_be_drawn_one_by_one() -> None:
    """transformers gives weights no values where it finds itself on meta."""
    pytest.importorskip("transformers")
    options = TINY_GPT | {"n_embd": 64}
    initial = build(lambda: language_model("transformers:GPT2LMHeadModel", 500, 12, options, masked=False), seed=3)
    assert initial.whole_because is None
    drawn = {name: initial.draw(name) for name, _ in initial.model.named_parameters()}
    model = initial.materialise()
    assert all(torch.equal(drawn[name], value) for name, value in model.named_parameters())
    direct = language_model("transformers:GPT2LMHeadModel", 500, 12, options, masked=False)
    for name, value in direct.named_parameters():
        assert drawn[name].detach().std().item() == pytest.approx(value.detach().std().item(), rel=0.15), name
    assert model.lm_head.weight is model.transformer.wte.weight
