"""Initial weights that depend on the seed and their names, and neither on the number of ranks nor on other weights.

A model is made on torch's meta device, where tensors have shapes but no memory, and every operation of its constructor
is recorded. The operations behind a parameter can then be replayed on real memory, one parameter at a time: its random
numbers come from a generator of its own, seeded by the job's seed and its name.
"""

import hashlib
import inspect
import sys
import weakref
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterator
from math import nan
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from hpc_train.core.errors import UserError

_META = torch.device("meta")
_aten = torch.ops.aten
# They give every element a value that does not depend on the one before: what was written earlier need not be drawn.
_OVERWRITE = {_aten.normal_.default, _aten.uniform_.default, _aten.zero_.default, _aten.fill_.Scalar}
# Not executed on meta, where they change nothing: torch would import its compiler for some, which takes 2 s.
_SKIPPED = _OVERWRITE | {_aten.mul_.Tensor, _aten.add_.Tensor, _aten.clamp_.default, _aten.erfinv_.default}
_EMPTY = {"empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided"}
_RESHAPE = {"set_", "resize_", "resize_as_", "t_", "transpose_", "squeeze_", "unsqueeze_", "as_strided_"}


class _NotReplayable(Exception):
    """Why the weights of a model cannot be drawn one by one."""


class _Place(NamedTuple):
    """A meta tensor at the time of an operation: later ones may give it another shape."""

    storage: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def on(self, storage: torch.UntypedStorage) -> torch.Tensor:
        return torch.empty(0, dtype=self.dtype).set_(storage, self.offset, self.shape, self.stride)


class _Operation(NamedTuple):
    """What the constructor did. A constant has no function: its value is the only argument."""

    function: Callable[..., Any] | None
    args: Any  # (args, kwargs), a _Place for each meta tensor
    reads: list[int]  # storages
    writes: list[int]
    outputs: list[_Place]
    is_random: bool


class _Recorder(TorchDispatchMode):
    """Records operations on meta tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[_Operation] = []
        self.writers: dict[int, list[int]] = {}  # storage -> the operations that write it, in order
        self.overwriters: dict[int, list[int]] = {}  # those of them that leave nothing of earlier ones
        self._kept: dict[int, torch.UntypedStorage] = {}  # so that no address is used again

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch imports its compiler, which takes 2 s

    def place(self, tensor: torch.Tensor) -> _Place:
        storage = tensor.untyped_storage()
        self._kept[storage._cdata] = storage
        return _Place(
            storage._cdata, tensor.dtype, tuple(tensor.shape), tuple(tensor.stride()), int(tensor.storage_offset())
        )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [each for each in pytree.tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
        before = {id(each): self.place(each) for each in given if each.is_meta}
        result = args[0] if func in _SKIPPED and args[0].is_meta else func(*args, **kwargs)
        made = [each for each in pytree.tree_leaves(result) if isinstance(each, torch.Tensor) and each.is_meta]
        if before or made:
            self._record(func, args, kwargs, before, [self.place(each) for each in made])
        return result

    def constant(self, value: torch.Tensor) -> torch.Tensor:
        """A meta tensor whose value is `value`."""
        made = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=_META)
        place = self.place(made)
        self._add(_Operation(None, value, [], [place.storage], [place], False), place.storage)
        return made.requires_grad_(value.requires_grad)

    def call(self, function: Callable[..., Any], arguments: dict[str, Any]) -> None:
        """A function of torch.nn.init that does nothing on meta: it changes its first argument, `tensor`."""
        place = self.place(arguments["tensor"])
        if arguments.get("generator") is not None:
            raise _NotReplayable(f"the constructor draws from a generator of its own ({function.__name__})")
        kwargs = {**arguments, "tensor": place}
        self._add(_Operation(function, ((), kwargs), [place.storage], [place.storage], [], True), None)

    def _record(self, func: Any, args: Any, kwargs: Any, before: dict[int, _Place], outputs: list[_Place]) -> None:
        schema = func._schema
        if schema.name.split("::")[1] in _RESHAPE:
            raise _NotReplayable(f"the constructor changes a tensor's shape in place ({func})")
        reads = [each.storage for each in before.values()]
        named = {each.name: value for each, value in zip(schema.arguments, args, strict=False)} | kwargs
        changed = [
            before[id(tensor)]
            for each in schema.arguments
            if each.alias_info is not None and each.alias_info.is_write and each.name in named
            for tensor in pytree.tree_leaves(named[each.name])
            if id(tensor) in before
        ]
        made = [each for each in outputs if each.storage not in reads]
        if not changed and not made:
            return  # a view: a _Place says where it looks
        if any(isinstance(each, torch.Generator) for each in pytree.tree_leaves((args, kwargs))):
            raise _NotReplayable(f"the constructor draws from a generator of its own ({func})")
        kept = pytree.tree_map(lambda each: _kept(each, before), (args, kwargs))
        is_random = torch.Tag.nondeterministic_seeded in func.tags
        writes = list(dict.fromkeys(each.storage for each in (*changed, *made)))
        whole = changed[0] if func in _OVERWRITE and changed and self._is_whole(changed[0]) else None
        self._add(_Operation(func, kept, reads, writes, outputs, is_random), whole.storage if whole else None)

    def _is_whole(self, place: _Place) -> bool:
        size = torch.Size(place.shape).numel() * place.dtype.itemsize
        contiguous = place.stride == torch.empty(place.shape, device=_META).stride()
        return place.offset == 0 and contiguous and size == self._kept[place.storage].nbytes()

    def _add(self, operation: _Operation, overwritten: int | None) -> None:
        index = len(self.operations)
        self.operations.append(operation)
        for storage in operation.writes:
            self.writers.setdefault(storage, []).append(index)
        if overwritten is not None:
            self.overwriters.setdefault(overwritten, []).append(index)

    def slice(self, storage: int) -> set[int]:
        """The operations that give `storage` its final value."""
        needed: set[int] = set()
        asked = {(storage, len(self.operations))}
        left = list(asked)
        while left:
            storage, end = left.pop()
            for index in self._writers_before(storage, end):
                needed.add(index)
                more = {(read, index) for read in self.operations[index].reads} - asked
                asked |= more
                left.extend(more)
        return needed

    def digest(self) -> str:
        """The same wherever the constructor did the same, with the same values."""
        whole = hashlib.sha256()
        for operation in self.operations:
            leaves = pytree.tree_leaves(operation.args, is_leaf=lambda each: isinstance(each, _Place))
            name = getattr(operation.function, "__name__", None)  # of torch's operations and of those in torch.nn.init
            whole.update(f"{name} {[_told(each) for each in leaves]}".encode())
        return whole.hexdigest()

    def is_empty(self, operations: set[int]) -> bool:
        """Whether they only take memory."""
        functions = [self.operations[index].function for index in operations]
        return all(isinstance(each, torch._ops.OpOverload) and each._opname in _EMPTY for each in functions)

    def _writers_before(self, storage: int, end: int) -> list[int]:
        writers, overwriters = self.writers.get(storage, []), self.overwriters.get(storage, [])
        if not writers:
            raise _NotReplayable("the constructor takes values from a tensor that torch made unseen")
        num_over = bisect_left(overwriters, end)
        first = bisect_left(writers, overwriters[num_over - 1]) if num_over else 0
        return sorted({writers[0], *writers[first : bisect_left(writers, end)]} - {end})


def _kept(value: Any, before: dict[int, _Place]) -> Any:
    if isinstance(value, torch.Tensor):
        return before[id(value)] if id(value) in before else value.detach().clone()
    return torch.device("cpu") if value == _META and isinstance(value, torch.device) else value


def _told(value: Any) -> Any:
    """An argument without the addresses in it."""
    if isinstance(value, _Place):
        return value[1:]
    if isinstance(value, torch.Tensor):
        data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        return value.dtype, tuple(value.shape), hashlib.sha256(data.tobytes()).hexdigest()
    return value


class _Questions(TorchFunctionMode):
    """Answers what a constructor must not notice: that tensors are on meta, and have no values.

    `torch.tensor(...)` keeps its values. Some functions of torch.nn.init return at once if `tensor.is_meta`: each is
    recorded as one operation.
    """

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is None:
            given = args[0] if args else kwargs.get("data")
            if not any(isinstance(each, torch.Tensor) for each in pytree.tree_leaves(given)):
                return self._recorder.constant(func(*args, **{**kwargs, "device": "cpu"}))
        result = func(*args, **kwargs)
        if result is True and func == _IS_META:
            self._asked_if_meta(sys._getframe(1))
        if result == _META and func == _DEVICE and not _is_torch(sys._getframe(1)):
            return torch.device("cpu")  # transformers gives its weights no values on meta
        return result

    def _asked_if_meta(self, frame: FrameType) -> None:
        module, name = frame.f_globals.get("__name__", ""), frame.f_code.co_name
        if module == "torch.nn.init":
            function = getattr(nn.init, name)
            taken = inspect.signature(function).parameters
            self._recorder.call(function, {key: value for key, value in frame.f_locals.items() if key in taken})
        elif not _is_torch(frame):
            raise _NotReplayable(f"{module}.{name} does something else for meta tensors")


def _is_torch(frame: FrameType) -> bool:
    return f"{frame.f_globals.get('__name__', '')}.".startswith("torch.")


_IS_META = torch.Tensor.is_meta.__get__  # type: ignore[attr-defined]
_DEVICE = torch.Tensor.device.__get__


class InitialWeights:
    """The values with which a model begins, each of which can be drawn without the others.

    model: on the meta device until `materialise`. whole_because: None, or why the weights of this model cannot be
    drawn one by one, in words: `model` then holds all of them already.
    """

    def __init__(self, make: Callable[[], nn.Module], seed: int) -> None:
        self._make, self._seed = make, seed
        self._recorder = _Recorder()
        self._left: dict[str, _Place] = {}
        self.whole_because: str | None = None
        try:
            torch.manual_seed(seed)  # of tensors that a constructor puts on a real device in spite of meta
            with _META, _Questions(self._recorder), self._recorder:
                self.model = make()
            self._slices = self._plan()
        except Exception as error:  # noqa: BLE001  # whatever a user's constructor does on meta; a real error comes again below
            self._make_whole(error)

    def draw(self, name: str) -> torch.Tensor:
        """The whole initial value of a parameter or buffer, on the CPU.

        Raises KeyError for an unknown name, and UserError if the CPU cannot do what gives it its value.
        """
        place = self._left.get(name)
        if place is None:
            tensor = dict(_named_tensors(self.model))[name]
            if not tensor.is_meta:
                return tensor.detach()
            place = self._recorder.place(tensor)
        try:
            return place.on(self._replay(place.storage))
        except Exception as error:  # any operation of a user's constructor
            raise UserError(
                f"the initial value of {name} cannot be made without the whole model: {error}",
                "Use reduce.stage = 1, or write the constructor with functions of torch.nn.init.",
            ) from error

    def materialise(self, leave: Collection[str] = (), device: torch.device | None = None) -> nn.Module:
        """The model with all its values, on the CPU: tensors that were tied or views of each other still are.

        leave: names of parameters that get their shape on `device`, no memory, and NaN as their value: `draw` knows
        them. Not if `whole_because` says why they cannot be drawn.
        """
        if self.whole_because is not None:
            return self.model
        try:
            left = {id(each): name for name, each in _named_tensors(self.model) if name in leave}
            tensors = {id(each): each for each in _all_tensors(self.model) if each.is_meta}
            places = {key: self._recorder.place(each) for key, each in tensors.items()}
            storages: dict[int, torch.UntypedStorage] = {}
            for key, tensor in tensors.items():
                place = places[key]
                if key in left:
                    self._left[left[key]] = place
                    _fill(tensor, torch.full((), nan, dtype=place.dtype, device=device).expand(place.shape))
                    continue
                if place.storage not in storages:
                    storages[place.storage] = self._replay(place.storage)
                _fill(tensor, place.on(storages[place.storage]))
        except Exception as error:  # noqa: BLE001  # of an operation that the CPU cannot do
            self._make_whole(error)
        return self.model

    def digest(self) -> str:
        """Equal on two ranks if `draw` is."""
        return self._recorder.digest()

    def make_whole(self) -> nn.Module:
        """The whole model, made anew unless it is whole already: for ranks of which another could not do otherwise."""
        if self.whole_because is None:
            self._make_whole(_NotReplayable("another rank cannot draw its weights one by one"))
        return self.model

    def _make_whole(self, error: Exception) -> None:
        torch.manual_seed(self._seed)
        self.model = self._make()
        self.whole_because = f"{type(error).__name__}: {error}" if not isinstance(error, _NotReplayable) else str(error)

    def _plan(self) -> dict[int, tuple[str, set[int]]]:
        """Storage -> the first name of a tensor in it, and the operations behind it. Raises _NotReplayable."""
        slices: dict[int, tuple[str, set[int]]] = {}
        self._owners: dict[int, int] = {}  # a random operation -> the first storage that needs it
        names = {id(each): name for name, each in reversed(list(_named_tensors(self.model)))}
        for number, tensor in enumerate(_all_tensors(self.model)):
            if not tensor.is_meta:
                continue
            name = names.get(id(tensor), f"attribute {number}")
            _check_fillable(name, tensor)
            storage = self._recorder.place(tensor).storage
            if storage not in slices:
                slices[storage] = name, self._recorder.slice(storage)
                if self._recorder.is_empty(slices[storage][1]):
                    raise _NotReplayable(f"the constructor gives {name} no value")
                for index in slices[storage][1]:
                    if self._recorder.operations[index].is_random:
                        self._owners.setdefault(index, storage)
        return slices

    def _replay(self, storage: int) -> torch.UntypedStorage:
        """The value of `storage`.

        A tensor made from another's random numbers (a target network) replays those of the other under its name.
        """
        needed, owners, left = set(), {storage}, [storage]
        while left:
            more = self._slices[left.pop()][1]
            needed |= more
            new = {self._owners[index] for index in more if index in self._owners} - owners
            owners |= new
            left.extend(new)
        real: dict[int, torch.UntypedStorage] = {}
        streams = {owner: _stream(self._seed, self._slices[owner][0]) for owner in owners}
        before = torch.get_rng_state()
        try:
            for index in sorted(needed):
                owner = self._owners.get(index)
                if owner is not None:
                    torch.set_rng_state(streams[owner])
                _execute(self._recorder.operations[index], real)
                if owner is not None:
                    streams[owner] = torch.get_rng_state()
        finally:
            torch.set_rng_state(before)
        return real[storage]


def build(make: Callable[[], nn.Module], seed: int) -> InitialWeights:
    """The initial weights of the model that `make` makes, which is called once, and once more if it cannot run on meta.

    It cannot if it reads values while it makes the model (`.item()`, numpy) or draws from a generator of its own. All
    values are then drawn in its order after `torch.manual_seed(seed)`. The choice depends on the model alone. Raises
    what `make` raises.
    """
    return InitialWeights(make, seed)


def _stream(seed: int, name: str) -> torch.Tensor:
    """The state of the generator of a parameter."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little")).get_state()


@torch.no_grad()
def _execute(operation: _Operation, real: dict[int, torch.UntypedStorage]) -> None:
    if operation.function is None:
        made = [operation.args.detach().clone()]
    else:
        args, kwargs = pytree.tree_map(
            lambda each: each.on(real[each.storage]) if isinstance(each, _Place) else each,
            operation.args,
            is_leaf=lambda each: isinstance(each, _Place),
        )
        result = operation.function(*args, **kwargs)
        made = [each for each in pytree.tree_leaves(result) if isinstance(each, torch.Tensor)]
    if not operation.outputs:
        return  # of `_Recorder.call`
    for place, tensor in zip(operation.outputs, made, strict=True):
        if place.storage in real and operation.function is not None:
            continue
        if (tensor.stride(), tensor.storage_offset(), tensor.dtype) != (place.stride, place.offset, place.dtype):
            raise _NotReplayable(f"{operation.function} has another layout on the CPU than on meta")
        real[place.storage] = tensor.untyped_storage()


def _check_fillable(name: str, tensor: torch.Tensor) -> None:
    if tensor.grad_fn is not None:
        raise _NotReplayable(f"{name} is computed from parameters with gradients in the constructor")
    if tensor._backward_hooks or getattr(tensor, "_post_accumulate_grad_hooks", None):
        raise _NotReplayable(f"the constructor puts a hook on {name}")
    if weakref.getweakrefcount(tensor):
        raise _NotReplayable(f"the model refers to {name} weakly")


def _fill(tensor: torch.Tensor, value: torch.Tensor) -> None:
    """Gives a meta tensor its value; it stays the same Python object, wherever the model refers to it."""
    filled = value
    if type(tensor) is not torch.Tensor:
        filled = torch.Tensor._make_subclass(type(tensor), value, tensor.requires_grad)
    else:
        filled.requires_grad_(tensor.requires_grad)
    filled.__dict__.update(tensor.__dict__)
    torch.utils.swap_tensors(tensor, filled)


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters, then buffers; a tied one under each of its names, the canonical one first."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _all_tensors(model: nn.Module) -> Iterator[torch.Tensor]:
    """Those, then tensors that modules have as plain attributes or in lists, tuples and dicts."""
    for _, tensor in _named_tensors(model):
        yield tensor
    hidden = {"_parameters", "_buffers", "_modules"}
    for module in model.modules():
        for each in pytree.tree_leaves([value for key, value in vars(module).items() if key not in hidden]):
            if isinstance(each, torch.Tensor):
                yield each
