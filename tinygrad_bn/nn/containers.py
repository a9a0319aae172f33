"""Modules in lists and dictionaries, with PyTorch's keys: `blocks.0.weight`, `heads.left.weight`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Self

from tinygrad_bn.arguments import expect_integer, full_name, shown
from tinygrad_bn.nn.module import Module


class Numbered(Module):
    """Modules by number. Their names are "0", "1", …, as in PyTorch's state dict."""

    def append(self, module: Module) -> Self:
        """Add a module at the end. Raises TypeError unless it is one."""
        setattr(self, str(len(self)), self._checked(module, len(self)))
        return self

    def extend(self, modules: Iterable[Module]) -> Self:
        """Add several at the end."""
        for module in modules:
            self.append(module)
        return self

    def insert(self, index: int, module: Module) -> None:
        """Add a module before the one at `index`, as a list does."""
        modules = list(self)
        modules.insert(expect_integer("the index of a module", index), self._checked(module, index))
        for i, each in enumerate(modules):
            setattr(self, str(i), each)

    def _checked(self, module: Any, i: int) -> Module:
        if not isinstance(module, Module):
            cure = "; unpack it with *" if isinstance(module, Iterable) and not isinstance(module, str) else ""
            got = full_name(module)
            if isinstance(module, type):
                got, cure = f"the class {module.__name__}", f"; make an object of it: {module.__name__}(…)"
            raise TypeError(f"{type(self).__name__} takes modules; module {i} is {got}, not a module{cure}")
        return module

    def __iter__(self) -> Iterator[Module]:
        return (child for _, child in self.named_children())

    def __len__(self) -> int:
        return sum(1 for _ in self.named_children())

    def _place(self, index: Any) -> str:
        """The name of the module at `index`. Raises IndexError if there is none."""
        position, n = expect_integer("the index of a module", index), len(self)
        if not -n <= position < n:
            raise IndexError(
                f"there is no module {position}; this {type(self).__name__} has {n} modules, counted from 0"
            )
        return str(position % n)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return type(self)(*list(self)[index])
        return getattr(self, self._place(index))

    def __setitem__(self, index: int, module: Module) -> None:
        setattr(self, self._place(index), self._checked(module, index))


class ModuleList(Numbered):
    """A list of modules, for a `forward` that says how they are called.

    >>> from tinygrad_bn import nn
    >>> blocks = nn.ModuleList([nn.Linear(2, 2) for _ in range(3)])
    >>> list(blocks.state_dict())[:2], len(blocks)
    (['0.weight', '0.bias'], 3)
    """

    def __init__(self, modules: Iterable[Module] = ()) -> None:
        if not isinstance(modules, Iterable):
            raise TypeError(f"ModuleList takes several modules, as in ModuleList([a, b]); got {full_name(modules)}")
        self.extend(modules)

    def __getitem__(self, index: Any) -> Any:
        return ModuleList(list(self)[index]) if isinstance(index, slice) else super().__getitem__(index)


class ModuleDict(Module):
    """A dictionary of modules, whose keys are names.

    >>> from tinygrad_bn import nn
    >>> heads = nn.ModuleDict({"left": nn.Linear(2, 1), "right": nn.Linear(2, 1)})
    >>> list(heads), list(heads.state_dict())[0]
    (['left', 'right'], 'left.weight')
    """

    def __init__(self, modules: Mapping[str, Module] | None = None) -> None:
        self.update(modules or {})

    def update(self, modules: Mapping[str, Module]) -> None:
        """Set several. Raises TypeError unless they are modules with names in a dictionary."""
        if not isinstance(modules, Mapping):
            raise TypeError(f"ModuleDict takes modules by name in a dictionary; got {full_name(modules)}")
        for name, module in modules.items():
            self[name] = module

    def __setitem__(self, name: str, module: Module) -> None:
        if not isinstance(name, str) or not name or "." in name:
            raise TypeError(f"a name in a ModuleDict is a text without dots; got {shown(name)}")
        if not isinstance(module, Module):
            raise TypeError(f"ModuleDict takes modules; {name!r} is {full_name(module)}")
        if name not in self and hasattr(self, name):
            raise KeyError(f"{name!r} is an attribute of ModuleDict; take another name")
        setattr(self, name, module)

    def __getitem__(self, name: str) -> Module:
        if name not in self:
            raise KeyError(f"there is no module {shown(name)}; there are {', '.join(self) or 'none'}")
        module: Module = getattr(self, name)
        return module

    def __delitem__(self, name: str) -> None:
        self[name]
        delattr(self, name)

    def __contains__(self, name: object) -> bool:
        return any(name == own for own in self)

    def __iter__(self) -> Iterator[str]:
        return (name for name, _ in self.named_children())

    def __len__(self) -> int:
        return sum(1 for _ in self.named_children())

    def keys(self) -> Iterator[str]:
        """The names."""
        return iter(self)

    def values(self) -> Iterator[Module]:
        """The modules."""
        return self.children()

    def items(self) -> Iterator[tuple[str, Module]]:
        """Names and modules."""
        return self.named_children()
