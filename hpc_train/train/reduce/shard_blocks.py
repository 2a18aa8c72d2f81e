"""Which weights of a model are gathered together: its blocks, by name, as the model repeats them, or by size."""

from collections import Counter
from fnmatch import fnmatchcase

from torch import nn

from hpc_train.core.errors import UserError
from hpc_train.train.models.blocks import repeated_blocks
from hpc_train.train.reduce.buckets import trainable_parameters

_MOST_OF_MODEL = 1 / 8  # of all weights, in a block that was found by size: two blocks are whole on a rank at a time


def find_blocks(model: nn.Module, patterns: list[str] | None) -> dict[str, nn.Module]:
    """Modules by name, in the model's order; none is part of another.

    patterns: `reduce.shard_blocks`. Raises UserError for a pattern without a module, and for modules within others.
    """
    if patterns:
        return _by_name(model, patterns)
    blocks = repeated_blocks(model)
    if isinstance(getattr(model, "blocks", None), nn.ModuleList | nn.Sequential):
        return blocks
    # A repeated block stays in one piece: activation checkpointing comes to it twice.
    return _by_size(model, "", _num_weights(model) * _MOST_OF_MODEL, set(blocks.values()))


def parameters_of(model: nn.Module, blocks: dict[str, nn.Module]) -> dict[str, dict[str, nn.Parameter]]:
    """Block -> its trainable parameters by their name in the model; "" -> those of no block.

    A parameter that two blocks share, such as a tied embedding, is in no block: it must not be freed with either.
    """
    num_users = Counter(id(each) for block in blocks.values() for each in set(block.parameters()))
    outside = [module for name, module in model.named_modules() if not _is_within(name, blocks)]
    num_users.update({id(each) for module in outside for each in module.parameters(recurse=False)})
    block_of = {id(each): name for name, block in blocks.items() for each in block.parameters()}
    groups: dict[str, dict[str, nn.Parameter]] = {"": {}, **{name: {} for name in blocks}}
    for name, parameter in trainable_parameters(model).items():
        is_own = num_users[id(parameter)] == 1
        groups[block_of.get(id(parameter), "") if is_own else ""][name] = parameter
    return {name: group for name, group in groups.items() if group}


def _is_within(name: str, blocks: dict[str, nn.Module]) -> bool:
    return any(name == block or name.startswith(f"{block}.") for block in blocks)


def _by_name(model: nn.Module, patterns: list[str]) -> dict[str, nn.Module]:
    modules = dict(model.named_modules())
    found: dict[str, nn.Module] = {}
    for pattern in patterns:
        matching = {name: module for name, module in modules.items() if name and fnmatchcase(name, pattern)}
        # "encoder.*" also matches what is inside encoder.0: the outermost modules count.
        outermost = {name: each for name, each in matching.items() if not _is_within(_parent(name), matching)}
        if not outermost:
            raise UserError(
                f"reduce.shard_blocks: no module of {type(model).__name__} is called '{pattern}'",
                f"Its modules: {', '.join(list(modules)[1:9])}, ...",
            )
        found |= outermost
    for name in found:
        if _is_within(_parent(name), found):
            raise UserError(
                f"reduce.shard_blocks = {patterns}: {name} is part of another block",
                "Name modules of which none contains another.",
            )
    return found


def _parent(name: str) -> str:
    return name.rpartition(".")[0] or " "  # no module has this name


def _by_size(module: nn.Module, prefix: str, most: float, whole: set[nn.Module]) -> dict[str, nn.Module]:
    found: dict[str, nn.Module] = {}
    for child_name, child in module.named_children():
        name, is_container = f"{prefix}{child_name}", isinstance(child, nn.ModuleList | nn.ModuleDict)
        num_weights = _num_weights(child)
        is_leaf = child in whole or next(child.children(), None) is None
        if num_weights and not is_container and (is_leaf or num_weights <= most):
            found[name] = child
        else:
            found |= _by_size(child, f"{name}.", most, whole)
    return found


def _num_weights(module: nn.Module) -> int:
    return sum(each.numel() for each in module.parameters())
