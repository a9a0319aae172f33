"""A parser of PTX modules.

It follows NVIDIA's "Parallel Thread Execution ISA" and supports the part that compilers emit for kernels. Device
functions are inlined, scoped registers get numbers, and variables get addresses in their space.
"""

import re
from bisect import bisect
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import count

GUARD = 128  # bytes of the guard zone behind every shared variable; a multiple of 32 banks of 4 bytes
COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.S)
IGNORED = re.compile(r"^[ \t]*\.(version|target|address_size|file|loc)\b.*$", re.M)
HEADER = re.compile(r"\.(entry|func)\b")
SIGNATURE = re.compile(r"\.(entry|func)\s*(?:\(([^)]*)\))?\s*([\w$.]+)\s*(?:\(([^)]*)\))?")
INSTRUCTION = re.compile(r"(?:@(!?)(%?[\w$]+)\s+)?([a-z][\w.:]*)\s*(.*)", re.S)
VARIABLE = re.compile(r"\.(global|const|shared|local|param)\b(.*?)\.(\w\d+)\s+([\w$.%]+)\s*(\[\d*\])?\s*(=.*)?$", re.S)
OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|\([^)]*\)|[^,\s][^,]*")


class PTXError(Exception):
    """A program that cannot be executed, or that performed an invalid operation."""


class UnknownInstruction(PTXError):
    """An instruction, or one of its modifiers, is not supported."""


@dataclass(frozen=True)
class Register:
    index: int
    type: str


@dataclass(frozen=True)
class Literal:
    text: str


@dataclass(frozen=True)
class Special:
    """A special register, such as %tid.x."""

    name: str


@dataclass(frozen=True)
class Symbol:
    """The address of a variable within its state space."""

    space: str
    name: str
    offset: int


@dataclass(frozen=True)
class Address:
    base: "Operand"
    offset: int


Operand = Register | Literal | Special | Symbol | Address | str | tuple  # str: a label, tuple: of operands


@dataclass(frozen=True)
class Instruction:
    """One instruction, `@guard opcode.modifiers operands`, and its line in the module."""

    line: int
    text: str
    guard: Register | None
    negated: bool
    opcode: str
    modifiers: tuple[str, ...]
    operands: tuple[Operand, ...]

    @property
    def type(self) -> str:
        return self.modifiers[-1]


@dataclass(frozen=True)
class Variable:
    """A variable of the module, and its initial values if it has any."""

    space: str
    name: str
    type: str
    length: int
    align: int
    data: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        return self.length * int(self.type[1:]) // 8


@dataclass(eq=False)
class Kernel:
    """An entry of a module, ready to be decoded."""

    name: str
    parameters: list[tuple[str, str]]
    instructions: list[Instruction] = field(default_factory=list)
    registers: list[str] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    shared: dict[str, tuple[int, int]] = field(default_factory=dict)  # name: offset and size
    dynamic: int = 0  # offset of dynamic shared memory
    shared_bytes: int = 0  # of static shared memory, as ptxas counts it
    local_bytes: int = 0  # of one thread
    variables: tuple[Variable, ...] = ()  # global and constant ones

    def label(self, pc: int) -> str:
        """The location of an instruction, for messages."""
        instruction = self.instructions[pc]
        text = re.sub(r"_ZN\w+", lambda m: demangle(m[0]), instruction.text)
        return f"kernel {demangle(self.name)}, line {instruction.line}: {text}"


def align(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment


def _statements(text: str) -> list[tuple[int, str]]:
    """(line, text) of instructions, declarations, headers, scope braces, and labels with their colon."""
    text = COMMENT.sub(lambda m: re.sub(r"[^\n]", " ", m[0]), text)
    text = re.split(r"\n\s*\.section", IGNORED.sub("", text))[0]
    newlines = [m.start() for m in re.finditer("\n", text)]
    found, start, nested = [], 0, 0
    for mark in re.finditer(r"[;{}]|(?<!:):(?!:)", text):
        pending = text[start : mark.start()]
        line = 1 + bisect(newlines, mark.start() - len(pending.lstrip()))
        words = " ".join(pending.split())
        if nested or (mark[0] == "{" and words and not HEADER.search(words)):  # the braces of an operand
            nested += {"{": 1, "}": -1}.get(mark[0], 0)
            continue
        start = mark.end()
        if mark[0] == ":":
            found.append((line, words + ":"))
            continue
        if words:
            found.append((line, words))
        if mark[0] != ";":
            found.append((line, mark[0]))
    return found


def _variable(text: str) -> Variable:
    m = VARIABLE.search(text)
    if m is None:
        raise UnknownInstruction(f"cannot read the declaration {text!r}")
    space, attributes, kind, name, length, initial = m.groups()
    alignment = re.search(r"\.align\s+(\d+)", attributes or "")
    size = 1 if length is None else int(length[1:-1] or 0)
    values = tuple(v.strip() for v in initial.strip("= {}").split(",")) if initial else ()
    return Variable(space, name, kind, size, int(alignment[1]) if alignment else int(kind[1:]) // 8, values)


def _parameters(text: str | None) -> list[tuple[str, str]]:
    """Names and types of a list of parameters."""
    parts = [p for p in (text or "").split(",") if p.strip()]
    return [(re.search(r"([\w$%]+)\s*(\[\d+\])?\s*$", p)[1], re.search(r"\.([bsuf]\d+)\b", p)[1]) for p in parts]


class _Body:
    """Builds the instructions of one entry, with called functions inlined."""

    def __init__(self, kernel: Kernel, functions: dict):
        self.kernel, self.functions = kernel, functions
        self.symbols: dict[str, Symbol] = {}  # visible in every function
        self.fresh = count()

    def add(self, statements: list[tuple[int, str]], names: dict, end: str) -> None:
        """Append the body of a function. `names` maps its parameters; `ret` becomes a jump to `end`, if it is given."""
        inlining = next(self.fresh)
        scopes = [self.symbols | names]
        for line, text in statements:
            if text == "{":
                scopes.append(dict(scopes[-1]))
            elif text == "}":
                scopes.pop()
            elif text.endswith(":"):
                self.kernel.labels[f"{text[:-1]}#{inlining}"] = len(self.kernel.instructions)
            elif text.startswith(".reg"):
                self._registers(text, scopes[-1])
            elif text.startswith((".local", ".param")):
                variable = _variable(text)
                offset = align(self.kernel.local_bytes, max(variable.align, 16))
                self.kernel.local_bytes = align(offset + variable.nbytes, 16)
                scopes[-1][variable.name] = Symbol("local", variable.name, offset)
            elif text.startswith(".shared"):
                self.share(_variable(text), scopes[-1])
            elif not text.startswith("."):
                self._instruction(line, text, scopes[-1], inlining, end)

    def _registers(self, text: str, scope: dict) -> None:
        kind, names = re.fullmatch(r"\.reg\s+\.(\w+)\s+(.*)", text).groups()
        for name in names.replace(" ", "").split(","):
            stem, number = re.fullmatch(r"([%\w$]+)(?:<(\d+)>)?", name).groups()
            for full in [stem] if number is None else [f"{stem}{i}" for i in range(int(number))]:
                scope[full] = Register(len(self.kernel.registers), kind)
                self.kernel.registers.append(kind)

    def share(self, variable: Variable, scope: dict) -> None:
        """Place a shared variable; a variable of unknown length is the dynamic shared memory."""
        kernel = self.kernel
        kernel.shared_bytes = align(kernel.shared_bytes, variable.align) + variable.nbytes
        offset = align(kernel.dynamic, max(variable.align, GUARD))
        scope[variable.name] = Symbol("shared", variable.name, offset)
        if variable.nbytes:
            kernel.shared[variable.name] = (offset, variable.nbytes)
            kernel.dynamic = align(offset + variable.nbytes + GUARD, GUARD)

    def _instruction(self, line: int, text: str, scope: dict, inlining: int, end: str) -> None:
        negated, guard, opcode, rest = INSTRUCTION.fullmatch(text).groups()
        opcode, *modifiers = opcode.replace("::", "_").split(".")
        if opcode == "call":
            self._call(line, text, rest, scope, guard)
            return
        operands = OPERAND.findall(rest)
        if opcode == "bra":
            operands = [f"{operands[0].strip()}#{inlining}"]
        elif opcode == "ret" and end:
            opcode, operands = "bra", [end]
        else:
            operands = [self._operand(o.strip(), scope, line, text) for o in operands]
        if guard is not None:
            guard = scope[guard]
        self.kernel.instructions.append(
            Instruction(line, text, guard, negated == "!", opcode, tuple(modifiers), tuple(operands))
        )

    def _call(self, line: int, text: str, rest: str, scope: dict, guard: str | None) -> None:
        lists = OPERAND.findall(rest)
        name = next(o.strip() for o in lists if not o.startswith("("))
        if guard is not None or not self.functions.get(name, (None,))[-1]:
            raise UnknownInstruction(
                f"kernel {demangle(self.kernel.name)}, line {line}: {text}: the called function has no body"
            )
        results, parameters, body = self.functions[name]
        groups = [[n.strip() for n in o.strip("()").split(",")] for o in lists if o.startswith("(")]
        given = [n for group in groups for n in group if n]
        names = {n: scope[g] for (n, _), g in zip(results + parameters, given, strict=True)}
        end = f"end of call {len(self.kernel.labels)}"
        self.add(body, names, end)
        self.kernel.labels[end] = len(self.kernel.instructions)

    def _operand(self, text: str, scope: dict, line: int, statement: str) -> Operand:
        if text[0] == "{":
            return tuple(self._operand(o.strip(), scope, line, statement) for o in text.strip("{}").split(","))
        if text[0] == "[":
            base, sign, offset = re.fullmatch(r"([^+\-\s]+)\s*(?:([+-]\s*-?)\s*(\w+))?", text.strip("[] ")).groups()
            value = int(offset, 0) if offset else 0
            return Address(
                self._operand(base, scope, line, statement), -value if sign and sign.count("-") % 2 else value
            )
        if "|" in text:
            return tuple(self._operand(o.strip(), scope, line, statement) for o in text.split("|"))
        if text in scope:
            return scope[text]
        if text[0] == "!" and text[1:] in scope:
            return ("!", scope[text[1:]])
        if text[0] in "-0123456789":
            return Literal(text)
        if text in ("_", "WARP_SZ") or text[0] == "%":
            return Special(text)
        where = f"kernel {demangle(self.kernel.name)}, line {line}: {statement}"
        raise UnknownInstruction(f"{where}: unknown operand {text!r}")


@lru_cache(maxsize=256)
def parse(text: str) -> dict[str, Kernel]:
    """The kernels of a module, by name."""
    variables, functions, entries = [], {}, {}
    statements = iter(_statements(text))
    following = next(statements, None)
    while following is not None:
        _, statement = following
        following = next(statements, None)
        if not HEADER.search(statement):
            variables += [_variable(statement)] if VARIABLE.search(statement) else []
            continue
        kind, results, name, parameters = SIGNATURE.search(statement).groups()
        body, depth = [], 0
        while following is not None and (depth or (not body and following[1] == "{")):
            body.append(following)
            depth += {"{": 1, "}": -1}.get(following[1], 0)
            following = next(statements, None)
        (entries if kind == "entry" else functions)[name] = (_parameters(results), _parameters(parameters), body)
    return {name: _kernel(name, *entry[1:], functions, variables) for name, entry in entries.items()}


def _kernel(name: str, parameters: list, body: list, functions: dict, variables: list[Variable]) -> Kernel:
    kernel = Kernel(name, parameters, variables=tuple(v for v in variables if v.space != "shared"))
    builder = _Body(kernel, functions)
    builder.symbols |= {v.name: Symbol("global", v.name, 0) for v in kernel.variables}
    for variable in variables:
        if variable.space == "shared":
            builder.share(variable, builder.symbols)
    builder.add(body, {n: Symbol("param", n, 0) for n, _ in parameters}, "")
    return kernel


def demangle(name: str) -> str:
    """The dotted name in Numba's mangled name (_ZN6module6kernel…), or the name itself if it is not mangled."""
    parts, rest = [], name.removeprefix("_ZN")
    while rest != name and (m := re.match(r"\d+", rest)):
        parts.append(rest[m.end() : m.end() + int(m[0])])
        rest = rest[m.end() + int(m[0]) :]
    return ".".join(parts) or name
