"""Drafts a family file for a model that no family describes, from its module tree, its shapes and one forward pass."""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from fusionpl.errors import FusionError
from fusionpl.families.family import STEM, TAIL, VOCABULARY, attribute
from fusionpl.families.tree import Seen, offset_of, rooted, stack_of, traced

_HEADS = ("num_attention_heads", "num_heads", "n_heads", "n_head", "heads")
_WIDTHS = ("hidden_size", "embed_dim", "n_embd", "d_model", "dim")
_FIXED = (VOCABULARY, "positions", "types", "classes", "channels", "kernel_h", "kernel_w", "registers", "features",
          "q_gain", "k_gain")  # fmt: skip
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_FUSED = re.compile(r"qkv|query_key_value|c_attn|in_proj", re.IGNORECASE)
_SINGLE = re.compile(r"(?:^|[._])(?:to_)?w?(q|k|v|query|key|value)(?:_?(?:proj|lin|linear))?$", re.IGNORECASE)
_GAIN = re.compile(r"(?:^|[._])(q|k|query|key)_?(?:norm|ln|layernorm)", re.IGNORECASE)
_GATE = re.compile(r"gate|w1$|wi_0|fc1_g")
_POSITION = re.compile(r"pos|wpe", re.IGNORECASE)


def draft(model: nn.Module, run: Callable[[nn.Module], Any]) -> str:
    """The YAML text of a family for `model`: a guess for a person to mend. What is guessed stands in its comments.

    Args:
        model: with a list of blocks that are alike.
        run: runs the model on a few samples; this shows the order of its modules, and which reads what another writes.

    Raises:
        FusionError: no list of blocks, or several that attend.
    """
    return _Draft(model.eval(), run).text()


def _numbered(model: nn.Module, stack: str) -> tuple[str, list[str]]:
    """The path of the blocks of a list, in which `{l}` stands for their number, and the paths of all."""
    names = [name for name, _ in model.get_submodule(stack).named_children()]
    before = names[0].removesuffix("0")
    if names != [f"{before}{number}" for number in range(len(names))]:
        raise FusionError(
            f"{type(model).__name__}: the blocks of {stack} are called {', '.join(names[:3])}, and a family tells them "
            "apart by their number, from 0"
        )
    return f"{stack}.{before}{{l}}", [f"{stack}.{name}" for name in names]


@dataclass
class _Part:
    """A section of the file in the making."""

    lines: list[str] = field(default_factory=list)
    taps: dict[str, str] = field(default_factory=dict)
    joins: dict[str, list[str]] = field(default_factory=dict)
    norms: dict[str, list[str]] = field(default_factory=dict)
    more: list[str] = field(default_factory=list)

    def add(self, name: str, dims: str, guess: str = "") -> None:
        self.lines.append(f"{name}: {dims}" + (f"  # guess: {guess}" if guess else ""))

    def text(self) -> Iterator[str]:
        yield "  parameters:"
        yield from (f"    {line}" for line in self.lines)
        yield "  taps: {" + ", ".join(f"{axis}: {place}" for axis, place in self.taps.items()) + "}"
        for key, lists in (("joins", self.joins), ("norms", self.norms)):
            if lists:
                yield f"  {key}: {{" + ", ".join(f"{name}: [{', '.join(its)}]" for name, its in lists.items()) + "}"
        yield from (f"  {line}" for line in self.more)


class _Draft:
    def __init__(self, model: nn.Module, run: Callable[[nn.Module], Any]) -> None:
        self.model, self.parameters = model, dict(model.named_parameters(remove_duplicate=False))
        self.config = getattr(model, "config", None)
        self.stack, self.others = stack_of(model)
        if stacks := [other for other in self.others if any(map(_ATTENTION.search, self._modules(f"{other}.")))]:
            raise FusionError(
                f"{type(model).__name__} has several stacks of blocks ({', '.join([self.stack, *stacks])}), and "
                "drafts are of one; write the file by hand, like families/library/t5.yaml and clip.yaml of fusionpl"
            )
        self.path, names = _numbered(model, self.stack)
        blocks = list(model.get_submodule(self.stack).children())
        full = max(range(len(blocks)), key=lambda index: len(list(blocks[index].parameters())))
        self.block = names[full]  # the first may lack a norm
        for name, module in model.get_submodule(self.block).named_modules():
            if isinstance(module, nn.MultiheadAttention):
                raise FusionError(
                    f"{type(model).__name__}: '{self.block}.{name}' is torch's MultiheadAttention, in which no module "
                    "shows queries, keys and values, and a family has to see them; take such a model of timm or "
                    "transformers"
                )
        self.trace = traced(model, self.stack, self.block, run)
        shapes = [tensor.shape for tensor in blocks[full].parameters()]
        common = Counter(size for shape in shapes for size in shape)
        named: Iterator[Any] = (getattr(self.config or model, key, None) for key in _WIDTHS)
        self.width: int = next((size for size in named if size in common), common.most_common(1)[0][0])
        self.vocabulary = getattr(self.config, "vocab_size", None)
        self.post = self.rms = False
        self.offset: int | None = None  # as the first norm does
        self.sizes: dict[str, str] = {}

    def text(self) -> str:
        parts = {"block": self._blocks(), STEM: self._stem(), TAIL: self._tail()}
        body = [f"{STEM}:", *parts[STEM].text(), "block:", f"  path: {self.path}", *parts["block"].text()]
        body += [f"{TAIL}:", *parts[TAIL].text()]
        used = set(re.findall(r"\w+", "\n".join(line.partition("#")[0] for line in body)))
        cls = type(self.model)
        head = [
            "# A draft. Mend what `python -m fusionpl.cli.family MODEL --family THIS_FILE` says is wrong.",
            *(f"# guess: {other} repeats too, and is left out: a draft has one stack" for other in self.others),
            f"name: {getattr(self.config, 'model_type', cls.__name__.lower())}",
            f"models: [{cls.__module__}.{cls.__qualname__}]",
            f"norm: {'post' if self.post else 'rms' if self.rms else 'pre'}  # guess: by what reads the block's norms",
            *["offset: 1"] * (self.offset or 0),
            "sizes: {" + ", ".join(f"{group}: {path}" for group, path in self.sizes.items()) + "}",
            f"fixed: [{', '.join(axis for axis in _FIXED if axis in used)}]",
        ]
        return "\n".join([*head, *body]) + "\n"

    # the block

    def _blocks(self) -> _Part:
        part = _Part()
        seen = {name: self.trace.of(f"{self.block}.{name}") for name in self._modules(f"{self.block}.")}
        order = sorted(seen, key=lambda name: seen[name].rank)
        linear = [name for name in order if self._is_linear(f"{self.block}.{name}")]
        attention = [name for name in linear if _ATTENTION.search(name) or _SINGLE.search(name)]
        role: dict[str, str] = {}
        for name in attention:
            if _FUSED.search(name):
                role[name] = "qkv"
            elif single := _SINGLE.search(name):
                role[name] = single[1][0].lower()
        out = next((name for name in reversed(attention) if name not in role), None)
        mlp = [name for name in linear if name not in attention]
        down = next((name for name in reversed(mlp) if self._flow(f"{self.block}.{name}")[0] == self.width), None)
        ups = [name for name in mlp if name != down and self._flow(f"{self.block}.{name}")[1] == self.width]
        norms = [name for name in order if name not in linear]
        # A norm stands before a branch (pre), in the stream behind it (post), or at the branch's end.
        ends = [seen[name] for name in (out, down) if name]
        pre = any(seen[reader].reads(seen[norm]) for norm in norms for reader in role)
        self.post = bool(norms) and not pre and not any(seen[norm].reads(end) for norm in norms for end in ends)
        before_mlp = next((norm for norm in norms if any(seen[up].reads(seen[norm]) for up in ups)), None)
        parallel = pre and before_mlp is not None and (
            seen[before_mlp].source == self.trace.entry or any(seen[reader].reads(seen[before_mlp]) for reader in role)
        )  # fmt: skip
        self._attention(part, role, out, any(_GAIN.search(name) for name in norms))
        for name in norms:
            self._norm(part, name, seen, (out, down), [*role, *ups], "in" if parallel else "mid")
        self._mlp(part, ups, down, "in" if parallel else "mid")
        part.lines += [f"# not understood: {name}.weight" for name in linear if name not in (*role, *ups, out, down)]
        part.joins = {"mid": ["in", "attn"], "out": ["mid", "mlp"]}
        return part

    def _attention(self, part: _Part, role: dict[str, str], out: str | None, gains: bool) -> None:
        written = {key: self._flow(f"{self.block}.{name}")[0] for name, key in role.items()}
        grouped = written.get("q") != written.get("k")
        if grouped:
            self.sizes |= {"kv": "config.num_key_value_heads", "group": self._count("num_key_value_groups", "n_rep")}
        else:
            self.sizes["head"] = self._count(*_HEADS)
        products = ["(kv group q)", "(kv k)", "(kv v)"] if grouped else ["(head q)", "(head k)", "(head v)"]
        for name, key in role.items():
            turns = key == "qkv" and "query_key_value" in name
            note = "q, k, v in turns, head by head" if turns else "first all of q, then k, then v"
            dims = {"qkv": "(head q|k|v)" if turns else "|".join(products), **dict(zip("qkv", products, strict=True))}
            self._linear(part, name, dims[key], "in", note if key == "qkv" else "")
            part.taps |= dict.fromkeys(key, name)
        if out:
            self._linear(part, out, "attn", "(kv group v)" if grouped else "(head v)")
            part.taps["attn"] = out
        part.more.append("circuits: {qk: [q, k]}")
        classes = {type(module).__name__.lower() for module in self.model.modules()}
        if hasattr(self.config, "rope_parameters") or any(re.search("rotary|rope", name) for name in classes):
            kind = "signs" if gains else "pairs"
            part.more.append(f"maps: {{q: {kind}, k: {kind}}}  # guess: rotary, unit i with unit i + half")
            rotated = self._count("rotary_ndims", "rotary_dim")
            self.sizes |= {} if rotated == "MISSING" else {"rotated": rotated}

    def _norm(
        self, part: _Part, name: str, seen: dict[str, Seen], ends: tuple[str | None, str | None],
        readers: Sequence[str], middle: str,
    ) -> None:  # fmt: skip
        own, (out, down) = seen[name], ends
        vectors = self._vectors(f"{self.block}.{name}")
        behind_out, behind_down = (end is not None and own.rank > seen[end].rank for end in ends)
        branch = "mlp" if behind_down else "attn"
        if gain := _GAIN.search(name):
            return self._add(part, name, f"{gain[1][0].lower()}_gain", "one gain for each unit of a head")
        if max(vectors.values()) != self.width:
            return self._add(part, name, "ffn", "it stands inside the MLP")
        kind = type(self.model.get_submodule(f"{self.block}.{name}")).__name__.lower()
        if "norm" not in kind and "norm" not in name:
            part.more.append(f"scales: {{{name}: [{down if behind_down else out}]}}")
            return self._add(part, name, branch, "a scale of a branch")
        self.rms = self.rms or "rms" in kind or kind == "t5layernorm"
        if any(end and own.reads(seen[end]) for end in ends):
            part.norms[name] = []
            part.taps[branch] = name
            return self._add(part, name, branch, "a norm at the end of a branch")
        if self.post:
            axis = "out" if behind_down else "mid"
            part.taps[axis] = name
        else:
            axis = middle if behind_out and own.source != self.trace.entry else "in"
            part.taps.setdefault(axis, f"input({name})")
            part.norms[name] = [reader for reader in readers if seen[reader].reads(own)]
        return self._add(part, name, axis, self._plain(part, name, f"{self.block}."))

    def _mlp(self, part: _Part, ups: Sequence[str], down: str | None, reads: str) -> None:
        gate = next((name for name in ups if _GATE.search(name)), ups[0]) if len(ups) > 1 else None
        for name in ups:
            axis, rows = "ffn" if gate in (None, name) else "up", self._flow(f"{self.block}.{name}")[0]
            packed = down is not None and rows == 2 * self._flow(f"{self.block}.{down}")[1]
            note = "a gate, packed with what it multiplies" if packed else "the gate" if name == gate else ""
            self._linear(part, name, axis + "*" * packed, reads, note)
            part.taps[axis] = name
        if down:
            self._linear(part, down, "mlp", "up" if gate else "ffn")
            part.taps.setdefault("mlp", down)
        part.more += ["gates: {up: ffn}"] * (gate is not None)

    def _plain(self, part: _Part, name: str, prefix: str) -> str:
        """Lets a norm alone whose gain can't be folded into what reads it."""
        if name not in part.norms:
            return ""
        offset = offset_of(self.model.get_submodule(prefix + name), self.width)
        if offset is not None and self.offset in (None, offset):
            self.offset = offset
            return ""
        part.norms[name] = []
        return "its gain is no plain factor, so it stays where it is, and the stream is not rotated"

    # what stands before it and behind it

    def _stem(self) -> _Part:
        part = _Part()
        modules = [name for name in self._modules() if self._section(name) == STEM]
        added: list[str] = []  # the axes of what is added into the stream
        axes: dict[str, str] = {}
        tensors = [name for name in self.parameters if self._section(name.rpartition(".")[0], name) == STEM]
        tables = [name for name in tensors if self.parameters[name].ndim > 1]
        projected = any(self._is_linear(name) for name in modules)
        last = max(modules, key=lambda name: self.trace.of(name).rank if name in self.trace.modules else 0, default="")
        normed = last in self.trace.modules and set(map(len, self._vectors_of(last))) == {1} and len(tables) > 1
        alone = normed or projected or len(tables) == 1
        for name in tensors:
            tensor, (module, _, leaf) = self.parameters[name], name.rpartition(".")
            narrow = projected and tensor.shape[-1] != self.width
            if module in axes and leaf == "bias":
                part.add(name, axes[module])
            elif tensor.ndim == 1:
                before = [
                    axes[other]
                    for other in axes
                    if other in modules and self.trace.of(module).reads(self.trace.of(other))
                ]
                axis = "emb" if narrow else before[0] if before and not alone else "out"
                part.add(name, axis)
                part.taps |= {axis: module} if alone and (axis == "emb" or not projected) else {}
                part.norms |= {} if self.post else {module: []}
            elif self._is_linear(module) and leaf == "weight":
                embedded = any(
                    self.parameters[table].shape[-1] == self._flow(module)[1] for table in tables if table != name
                )
                dims = f"out <- {'emb' if embedded else 'features'}"
                part.add(name, dims)
                axes[module] = "out"
                part.taps["out"] = module
            else:
                kind, dims = self._table(name)
                axis = ("emb" if narrow else "out") if alone else kind
                axes[module if leaf == "weight" else name] = axis
                part.add(name, dims.format(axis), "embeddings of their own width" * narrow)
                place = name if leaf != "weight" or kind == "pos" else module
                if not alone:
                    part.taps[axis] = place
                    added.append(axis)
                part.taps |= {"out": place} if len(tables) == 1 else {}
                if rooted(self.model.get_submodule(module), tensor.shape[-1]):
                    part.more.append(f"rooted: [{module}]")
        if added:
            order = {"pos": 0, "tok": 1, "patch": 1}
            part.joins = {"out": sorted(added, key=lambda axis: order.get(axis, 2))}
        return part

    def _table(self, name: str) -> tuple[str, str]:
        """The name of the axis that an embedding, a token or the patches write, and their dimensions."""
        tensor, leaf = self.parameters[name], name.rpartition(".")[2]
        if tensor.ndim == 4:
            return "patch", "{} <- channels kernel_h kernel_w"
        own = re.sub(r"\W|_?(token|embed\w*)", "", leaf)
        kind = "pos" if _POSITION.search(name) else "type" if "type" in name else "tok" if leaf == "weight" else own
        rows = {"pos": "positions", "type": "types", "tok": VOCABULARY}.get(kind, "registers")
        ones = ["1"] * (tensor.ndim - 2)
        kind += "_" * (kind in _FIXED)
        return kind, " ".join([*ones, "1" if tensor.shape[-2] == 1 and leaf != "weight" else rows, "{}"])

    def _tail(self) -> _Part:
        part, current, hidden, last = _Part(), "in", 0, ""
        heads: list[str] = []  # what reads the stream
        names = [name for name in self._modules() if self._section(name) == TAIL]
        names.sort(key=lambda name: self.trace.of(name).rank)
        linear = [name for name in names if self._is_linear(name)]
        embedding = {
            id(tensor)
            for name, tensor in self.parameters.items()
            if self._section(name.rpartition(".")[0], name) == STEM
        }
        tied = next((name for name in linear if id(self.parameters[f"{name}.weight"]) in embedding), None)
        for name in names:
            if name in linear:
                rows, columns = self._flow(name)
                reads = current
                if current == "in" and columns % self.width == 0:
                    reads = "|".join(["in"] * (columns // self.width))
                heads += [name] * (current == "in")
                later = linear[linear.index(name) + 1 :]
                if rows == self.vocabulary or rows not in {self._flow(other)[1] for other in later}:
                    scores = VOCABULARY if rows == self.vocabulary else "classes"
                    self._linear(part, name, scores, reads, "its outputs are classes" * (scores == "classes"), "")
                    continue
                hidden += 1
                current = f"hidden{hidden}"
                if tied and rows == self._flow(tied)[1]:
                    current = f"{STEM}.{'out' if rows == self.width else 'emb'}"
                    self._linear(part, name, current, reads, "the decoder behind it is tied to the embedding", "")
                else:
                    self._linear(part, name, current, reads, "", "")
                    part.taps[current] = name
                continue
            size = max(self._vectors(name).values())
            if linear and size in (self.vocabulary, self._flow(tied or linear[-1])[0]) and size != self.width:
                self._add(part, name, VOCABULARY if size == self.vocabulary else "classes", prefix="")
                continue
            self._add(part, name, current, prefix="")
            if current == "in" and not self.post:
                part.taps.setdefault("in", f"input({name})")
                last = name
        if last:
            part.norms[last] = heads
            self._plain(part, last, "")
        return part

    # the tree

    def _modules(self, prefix: str = "") -> list[str]:
        owners = dict.fromkeys(name.rpartition(".")[0] for name in self.parameters if name.startswith(prefix))
        return [name.removeprefix(prefix) for name in owners]

    def _section(self, module: str, parameter: str = "") -> str:
        if f"{module}.".startswith(f"{self.stack}."):
            return "block"
        if module in self.trace.modules:
            return STEM if self.trace.of(module).rank < self.trace.start else TAIL
        first, *_ = (name for name in self.parameters if name == parameter or name.rpartition(".")[0] == module)
        names = list(self.parameters)
        inside = next(index for index, name in enumerate(names) if name.startswith(f"{self.stack}."))
        return STEM if names.index(first) < inside and self.parameters[first].ndim > 1 else TAIL

    def _count(self, *keys: str) -> str:
        """The path of a number on the model's configuration, or on a module of its block."""
        inside = [name for name, _ in self.model.get_submodule(self.block).named_modules() if name]
        owners = ["config", *(f"{self.block}.{name}" for name in inside)]
        paths = [f"{owner}.{key}" for owner in owners for key in keys]
        return next((path for path in paths if isinstance(self._at(path), int)), "MISSING")

    def _at(self, path: str) -> Any:
        return attribute(self.model, path) if hasattr(self.model, path.partition(".")[0]) else None

    def _flow(self, module: str) -> tuple[int, int]:
        """How many units a linear module writes and reads."""
        rows, columns = self.parameters[f"{module}.weight"].shape
        return (columns, rows) if self._transposed(module) else (rows, columns)

    def _transposed(self, module: str) -> bool:
        return type(self.model.get_submodule(module)).__name__ == "Conv1D"

    def _is_linear(self, module: str) -> bool:
        weight = self.parameters.get(f"{module}.weight")
        kind = type(self.model.get_submodule(module)).__name__.lower()
        return weight is not None and weight.ndim == 2 and "embedding" not in kind

    def _vectors(self, module: str) -> dict[str, int]:
        own = self.model.get_submodule(module).named_parameters(recurse=False)
        return {name: tensor.numel() for name, tensor in own}

    def _vectors_of(self, module: str) -> list[tuple[int, ...]]:
        return [tuple(tensor.shape) for tensor in self.model.get_submodule(module).parameters(recurse=False)]

    def _linear(
        self, part: _Part, name: str, writes: str, reads: str, guess: str = "", prefix: str | None = None
    ) -> None:
        whole = (f"{self.block}." if prefix is None else prefix) + name
        part.add(f"{name}.weight", f"{reads} -> {writes}" if self._transposed(whole) else f"{writes} <- {reads}", guess)
        if f"{whole}.bias" in self.parameters:
            part.add(f"{name}.bias", writes)

    def _add(self, part: _Part, name: str, axis: str, guess: str = "", prefix: str | None = None) -> None:
        for key in self._vectors((f"{self.block}." if prefix is None else prefix) + name):
            part.add(f"{name}.{key}", axis, guess)
