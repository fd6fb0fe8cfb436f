"""Collectives of a compiled program, parsed from its text (`jax.stages.Compiled.as_text()`).

The text is a list of computations; an instruction may call others: a loop its body, a fusion its parts. A collective
within a loop counts once for each iteration. Asynchronous ones are written as several instructions (start, update,
done) or, on a TPU, as parts of one chain spread over fusions, and count once.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# Between slices the TPU's runtime carries data that the program hands to it; these are its names for the exchanges.
_TRANSFERS = {"ALL_REDUCE": "all-reduce", "ALL_GATHER": "all-gather", "REDUCE_SCATTER": "reduce-scatter"}

_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^  (ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\(([^)]*)\)(.*)$")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


@dataclasses.dataclass(frozen=True)
class Collective:
    """An exchange among chips, of which a step makes `count`.

    payload: bytes of the whole array: what an all-gather yields, what a reduction or an all-to-all is given, what a
      permutation sends; of one exchange.
    group: the places in the mesh of one set of chips that exchange; the other sets are like it.
    across_slices: carried by the network between slices.
    chain: those of one chain are parts of one exchange; "" stands alone.
    """

    kind: str
    payload: float
    group: tuple[int, ...]
    count: int
    across_slices: bool = False
    chain: str = dataclasses.field(default="", compare=False)

    @property
    def ring_bytes(self) -> float:
        """Returns the bytes that leave a chip in one exchange in a ring of chips, the least possible."""
        if self.kind == "collective-permute":
            return self.payload
        n = len(self.group)
        return self.payload * ((2 if self.kind == "all-reduce" else 1) * (n - 1) / n)


@dataclasses.dataclass(frozen=True)
class _Instruction:
    """`root name = shape opcode(inputs), attributes`; of a constant, `inputs` is its value."""

    root: str  # not "" if it gives the computation's value
    name: str
    shape: str
    opcode: str
    inputs: str
    attributes: str

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", self.inputs)

    def attribute(self, name: str) -> str:
        found = re.search(rf"\b{name}=%?([\w.\-]+)", self.attributes)
        assert found is not None, (name, self)
        return found[1]


_Computation = dict[str, _Instruction]  # by name


class Program:
    """The computations of a compiled program, and their collectives."""

    def __init__(self, text: str, num_devices: int, num_slices: int = 1):
        """Reads `text`; `num_devices` are those that one program's replica groups number: on TPU slices, of one."""
        self.num_devices, self.num_slices = num_devices, num_slices
        self.uncounted_loops: list[str] = []  # with exchanges and an unknown number of iterations
        self._computations: dict[str, _Computation] = {}
        self._entry, instructions = "", {}
        for line in text.splitlines():
            if head := _HEAD.match(line):
                instructions = self._computations[head[2]] = {}
                self._entry = head[2] if head[1] else self._entry
            elif found := _INSTRUCTION.match(line):
                instructions[found[2]] = _Instruction(*found.groups(default=""))
        assert self._entry, "no ENTRY computation in the program's text"

    def collectives(self) -> list[Collective]:
        """Returns every exchange of one run of the program, those in loops counted for each iteration."""
        return self._within(self._entry)

    def _within(self, name: str) -> list[Collective]:
        """Returns the exchanges of a computation and those it calls, each chain once."""
        inside = self._computations[name]
        found = [item for instruction in inside.values() for item in self._of(instruction, inside)]
        chains = {item.chain: item for item in found if item.chain}
        return [item for item in found if not item.chain or chains[item.chain] is item]

    def _of(self, op: _Instruction, inside: _Computation) -> Iterator[Collective]:
        """Yields the exchanges of one instruction and of what it calls."""
        if op.opcode.endswith(("-done", "-update")):
            return
        kind = op.opcode.removesuffix("-start")
        if kind in KINDS:
            yield self._exchange(kind, op)
        elif op.opcode == "send" and "_xla_megascale_transfer_type" in op.attributes:
            yield self._transfer(op)
        elif op.opcode == "while":
            body = op.attribute("body")
            found = self._within(body)
            turns = self._turns(op, inside) if found else 0
            if turns is None:
                self.uncounted_loops.append(body)
                turns = 1
            for item in found:
                yield dataclasses.replace(item, count=item.count * turns, chain="")
        else:
            names = _CALLED.findall(op.attributes)
            if branches := _BRANCHES.search(op.attributes):
                names += [name.strip().lstrip("%") for name in branches[1].split(",")]
            for name in names:
                # The TPU writes a reduce-scatter as a fusion: an all-reduce of which each chip keeps a part.
                is_scatter = op.opcode == "fusion" and name.startswith("all-reduce-scatter")
                for item in self._within(name):
                    summed = is_scatter and item.kind == "all-reduce"
                    yield dataclasses.replace(item, kind="reduce-scatter") if summed else item

    def _exchange(self, kind: str, op: _Instruction) -> Collective:
        arrays = [_num_bytes(*array) for array in _ARRAY.findall(op.shape)]
        if op.opcode == "all-gather-start":  # (what went in, what comes out)
            arrays = arrays[len(arrays) // 2 :]
        elif op.opcode == "collective-permute-start":  # (what went in, what comes out, and on a TPU more)
            arrays = arrays[:1]
        group = self._group(op.attributes)
        payload = sum(arrays) * (len(group) if kind == "reduce-scatter" else 1)
        chain = re.search(r'chain_id="(\d+)"', op.attributes)
        channel = re.search(r"channel_id=(\d+)", op.attributes)
        key = f"{kind} {chain[1]} {channel[1] if channel else ''}" if chain else ""
        return Collective(kind, payload, group, 1, chain=key)

    def _transfer(self, op: _Instruction) -> Collective:
        """Returns an exchange between slices; the first array is the part that one chip hands over."""
        kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', op.attributes)
        first = _ARRAY.search(op.shape)
        assert kind is not None, op
        assert first is not None, op
        group = tuple(range(0, self.num_devices * self.num_slices, self.num_devices))
        name = _TRANSFERS.get(kind[1], "all-to-all")
        return Collective(name, _num_bytes(first[1], first[2]), group, 1, across_slices=True)

    def _group(self, attributes: str) -> tuple[int, ...]:
        """Returns the first set of chips that exchange; of a permutation, its first path."""
        if pairs := re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", attributes):
            return _first_path(re.findall(r"\{(\d+),(\d+)\}", pairs[1]))
        found = re.search(r"\breplica_groups=(.*)", attributes)
        return _first_group(found[1] if found else "{}") or tuple(range(self.num_devices))

    def _turns(self, loop: _Instruction, inside: _Computation) -> int | None:
        """Returns a loop's number of iterations; None where neither the compiler nor the loop itself gives it.

        A loop gives it where an element of its tuple begins at a constant, grows by one and is compared with one.
        """
        if known := re.search(r'"known_trip_count":\{"n":"?(\d+)', loop.attributes):
            return int(known[1])
        condition, body = (self._computations[loop.attribute(name)] for name in ("condition", "body"))
        compare, after = _root(condition), _root(body)
        if compare.opcode != "compare" or compare.attribute("direction") not in ("LT", "LE"):
            return None
        counter, begin = condition[compare.operands[0]], inside[loop.operands[0]]
        if counter.opcode != "get-tuple-element" or begin.opcode != "tuple" or after.opcode != "tuple":
            return None
        place = int(counter.attribute("index"))
        start, limit = _constant(inside, begin.operands[place]), _constant(condition, compare.operands[1])
        added = body[after.operands[place]]
        steps = [_constant(body, name) for name in added.operands] if added.opcode == "add" else []
        step = next((value for value in steps if value is not None), None)
        if limit is None or start is None or not step:
            return None
        return max(0, math.ceil((limit + (compare.attribute("direction") == "LE") - start) / step))


def _root(inside: _Computation) -> _Instruction:
    return next(instruction for instruction in inside.values() if instruction.root)


def _constant(inside: _Computation, name: str) -> int | None:
    """Returns the value of an integer constant, also of a copy of one; None for anything else."""
    found = inside.get(name)
    while found is not None and found.opcode in ("copy", "bitcast") and found.operands:
        found = inside.get(found.operands[0])
    is_integer = found is not None and found.opcode == "constant" and re.fullmatch(r"-?\d+", found.inputs)
    return int(found.inputs) if found is not None and is_integer else None


def _num_bytes(dtype: str, shape: str) -> int:
    bits = 8 if dtype == "pred" else int(re.sub(r"^[a-z]+(\d*).*$", r"\1", dtype) or 0)  # tokens have none
    return math.prod(int(size) for size in shape.split(",") if size) * bits // 8


def _first_path(pairs: Sequence[tuple[str, str]]) -> tuple[int, ...]:
    targets = {int(source): int(target) for source, target in pairs}
    path = [min(targets, default=0)]
    while targets.get(path[-1], path[0]) not in path:
        path.append(targets[path[-1]])
    return tuple(path)


def _first_group(text: str) -> tuple[int, ...]:
    """Returns the first of the sets that `replica_groups=text…` lists, in whichever form; () for all devices.

    `{{0,1},{2,3}}`; `[2,4]<=[4,2]T(1,0)`: device numbers cut into two groups of four; `mesh['a'=2,'b'=4], device_ids=
    ([4,2]T(1,0)) {'b'}`: device numbers on a mesh, grouped along the axes named.
    """
    if text.startswith("{}"):
        return ()
    if listed := re.match(r"\{\{([\d,]+)\}", text):
        return tuple(_ints(listed[1]))
    if cut := re.match(r"\[([\d,]+)\]<=(\S+)", text):
        return tuple(_device_numbers(cut[2]).reshape(_ints(cut[1]))[0].tolist())
    on_mesh = re.match(r"mesh\[([^\]]*)\](?:, device_ids=\(([^{]*)\))? \{((?:'[^']+',?)+)\}", text)
    assert on_mesh is not None, f"replica groups in an unknown form: {text[:200]}"
    axes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", on_mesh[1])}
    along = re.findall(r"'([^']+)'", on_mesh[3])
    numbers = _device_numbers(on_mesh[2] or f"[{math.prod(axes.values())}]").reshape(list(axes.values()))
    names = list(axes)
    order = [names.index(name) for name in (*[n for n in names if n not in along], *along)]
    size = math.prod(axes[name] for name in along)
    return tuple(numbers.transpose(order).reshape(-1, size)[0].tolist())


def _device_numbers(text: str) -> np.ndarray:
    """Parses `[4,2]T(1,0)`, the numbers from 0 in a shape whose axes are then permuted, or a list as `0,2,1,3`."""
    found = re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if found is None:
        return np.array(_ints(text))
    shape = _ints(found[1])
    numbers = np.arange(math.prod(shape)).reshape(shape)
    return numbers.transpose(_ints(found[2])) if found[2] else numbers


def _ints(text: str) -> list[int]:
    return [int(i) for i in text.split(",")]
