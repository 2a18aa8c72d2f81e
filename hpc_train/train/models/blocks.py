"""The blocks that a deep model repeats: what activation checkpointing recomputes, and sharding gathers, at a time."""

from torch import nn


def repeated_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """By name: those in its attribute `blocks`, or in the list of modules of one class that holds the most weights."""
    blocks = getattr(model, "blocks", None)
    if isinstance(blocks, nn.ModuleList | nn.Sequential):
        return {f"blocks.{name}": block for name, block in blocks.named_children()}
    lists = {name: each for name, each in model.named_modules() if isinstance(each, nn.ModuleList)}
    repeated = {name: each for name, each in lists.items() if len(each) > 1 and len(set(map(type, each))) == 1}
    if not repeated:
        return {}
    most = max(repeated, key=lambda name: sum(weight.numel() for weight in repeated[name].parameters()))
    return {f"{most}.{name}".lstrip("."): block for name, block in repeated[most].named_children()}
