"""A faster `forward` for single modules of any model, by rules, and the way back.

An accelerated module stays the same object, with the same parameters, buffers, hooks and
attributes; only its class becomes a subclass of what it was, with the `forward` of the rule. So
Python binds `self` as always: copies, pickles, replicas and compiled code use what is theirs, which
a function hung on the instance does not guarantee. To revert is to give the old class back.
"""

import copy
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache, wraps
from inspect import signature
from re import sub
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

from equiseg_fast.nn._plain import hooked
from equiseg_fast.ops import use_backend
from equiseg_fast.ops._checks import check_callable, check_flags, check_sequence, check_strings

Around = tuple[tuple[tuple[str, ...], type[nn.Module]], ...]
"""The descendants of a module that a rule does not call: the names on the way, and their class."""

_MARK = "_equiseg_fast_rule"
# The wrong approximation of GELU differs by 1e-4, softmax in fp32, which some models insist on, by
# less than 1e-7.
_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Rule:
    """How to recognise a kind of module, and the `forward` it gets.

    name: for the report.
    matches: takes a module and says from its structure (attributes, types of its children, shapes)
        whether this is the kind: False if not, True if so, or a sentence, if it is but must keep
        its own `forward`, that says why.
    forward: takes the module and the arguments of its own `forward` (those given by keyword at
        their place, so that names need not agree), and returns what that returns. It looks
        parameters up when it is called, and returns NotImplemented, before it computes anything,
        for a call that it cannot serve: the module's own `forward` serves that one.
    examples: takes the module and returns a few tuples of positional arguments for `forward`.
    calls: the names of the children that `forward` calls, whatever they are ("norm", "body.norm").
        It goes around all others. So while one of them has hooks (see `hooked`) or is of another
        class than when it was examined, an adapter for example, the module's own `forward` runs.

    Structure cannot tell what a module computes. So before a module is replaced, a copy of it with
    random parameters computes every example with both, the first one in training, too, on the CPU
    in float64, with dropout made deterministic. Whatever does not agree is skipped.

        def halve(module, x):
            return x * 0.5

        Rule(
            name="halving",
            matches=lambda module: getattr(module, "factor", None) == 0.5,
            forward=halve,
            examples=lambda module: [(torch.randn(3, 4),)],
        )

    Functions of a module (no lambdas) let the accelerated model be pickled.
    """

    name: str
    matches: Callable[[Any], bool | str]
    forward: Callable[..., Any]
    examples: Callable[[Any], Iterable[tuple[Any, ...]]]
    calls: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_strings(name=self.name)
        check_callable(matches=self.matches, forward=self.forward, examples=self.examples)
        check_sequence("calls", self.calls, str, "paths of children")


@dataclass(frozen=True)
class Change:
    """What happened to one module.

    path: its name in the model ("" is the model itself); module: its class; rule: the rule's name;
    status: "replaced", "already replaced", "skipped" or "restored"; remark: why it was skipped, or
    when the `forward` of its own still runs.
    """

    path: str
    module: str
    rule: str
    status: str
    remark: str = ""


@dataclass(frozen=True)
class Report:
    """What was done to a model, module by module; `str` of it is for reading."""

    model: str
    changes: tuple[Change, ...]

    def paths(self, status: str) -> list[str]:
        """The names of the modules with this status."""
        return [change.path for change in self.changes if change.status == status]

    def __str__(self) -> str:
        counts = Counter(change.status for change in self.changes)
        total = ", ".join(f"{count} {status}" for status, count in counts.items())
        return "\n".join([f"{self.model}: {total or 'nothing to revert'}", *self._lines()])

    def _lines(self) -> list[str]:
        # Modules that differ in nothing but numbers, and went the same way, share a line.
        groups: dict[str, set[Change]] = {}
        for change in self.changes:
            groups.setdefault(_pattern(change.path), set()).add(replace(change, path=""))
        patterns = Counter(_pattern(change.path) for change in self.changes)
        lines: dict[str, None] = {}
        for change in self.changes:
            pattern = _pattern(change.path)
            path = change.path or "the model itself"
            if patterns[pattern] > 1 and len(groups[pattern]) == 1:
                path = f"{patterns[pattern]} x {pattern}"
            remark = f"; {change.remark}" if change.remark else ""
            lines[f"  {change.status} {path} ({change.module}): {change.rule}{remark}"] = None
        return list(lines)


def _pattern(path: str) -> str:
    return sub(r"\b\d+\b", "*", path)


def accelerate_module(model: nn.Module, rules: Sequence[Rule], *, verbose: bool = True) -> Report:
    """Replace the `forward` of every module of the model (itself among them) that a rule matches.

    rules: tried in order for each module, e.g. `MIT_RULES`, or your own (see `Rule`).
    verbose: print the report.

    Works in place, on any device (`meta` too) and dtype, in any mode; does not touch parameters,
    the state dict, or what other threads share (random number generators, the default device, the
    backend); a second call finds everything already replaced.
    Sharding and compiling come after it. A module is skipped, with the reason in the report, if its
    rule says so, if it computes something else than the rule, or if something else replaced its
    `forward` before. While accelerated its class is `Fast<its class>`, a subclass of it, and
    its sizes must not change; a saved whole model needs `equiseg_fast` to be loaded. Calls that
    `torch.fx` or `torch.jit.trace` record run its own `forward`.

    Raises TypeError if the model is no `nn.Module` or the rules are none, ValueError if no rule
    matches anything in it.
    """
    _check(model)
    check_flags(verbose=verbose)
    check_sequence("rules", rules, Rule, "Rule")
    if not rules:
        raise ValueError(f"rules must be at least one; got {rules!r}")
    name, modules = type(model).__name__, list(model.named_modules())
    changes = [c for path, module in modules for c in _accelerate(path, module, rules)]
    if not changes:
        raise ValueError(
            "model must contain a module that a rule matches; none of the "
            f"{len(modules)} modules of {name} is {' or '.join(rule.name for rule in rules)}"
        )
    return _reported(name, changes, verbose)


def revert(model: nn.Module, *, verbose: bool = True) -> Report:
    """Give every accelerated module of the model its own `forward` back; nothing else remains.

    verbose: print the report. A model that was never accelerated stays as it is, and the report
    says so. A module whose class something else (e.g. `fully_shard`) has changed since is skipped.
    Raises TypeError if the model is no `nn.Module`.
    """
    _check(model)
    check_flags(verbose=verbose)
    changes = []
    for path, module in model.named_modules():
        cls = type(module)
        rule = getattr(cls, _MARK, None)
        if rule is None:
            continue
        if _MARK in vars(cls):
            module.__class__ = cls.__base__
            changes.append(Change(path, type(module).__name__, rule.name, "restored"))
        else:
            remark = f"its class was changed to {cls.__name__} since; undo that first"
            changes.append(Change(path, cls.__name__, rule.name, "skipped", remark))
    return _reported(type(model).__name__, changes, verbose)


def _hooks(module: nn.Module) -> tuple[dict[int, Any], ...]:
    return (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )


def _check(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")


def _reported(model: str, changes: list[Change], verbose: bool) -> Report:
    report = Report(model, tuple(changes))
    if verbose:
        print(report)
    return report


def _accelerate(path: str, module: nn.Module, rules: Sequence[Rule]) -> list[Change]:
    """One change, or none if no rule matches; one for each rule if several match and all fail."""
    cls: Any = type(module)
    name, before = cls.__name__, getattr(cls, _MARK, None)
    if before is not None:
        return [Change(path, name, before.name, "already replaced")]
    skipped = []
    for rule in rules:
        verdict = rule.matches(module)
        if not verdict:
            continue
        if isinstance(verdict, str):
            status, remark = "skipped", " ".join(verdict.split())
        else:
            status, remark = _examine(module, rule)
        if status == "replaced":
            module.__class__ = _subclass(cls, rule, _around(module, rule))
            return [Change(path, name, rule.name, status, remark)]
        skipped.append(Change(path, name, rule.name, status, remark))
    return skipped


def _around(module: nn.Module, rule: Rule) -> Around:
    called = tuple(f"{name}." for name in rule.calls)
    return tuple(
        (tuple(path.split(".")), type(child))
        for path, child in module.named_modules(remove_duplicate=False)
        if path and not f"{path}.".startswith(called)
    )


def _is_as_found(module: Any, around: Around) -> bool:
    """Whether what a rule goes around still does what its class says, and that is what it was."""
    children = []
    for names, kind in around:  # what contains others comes before them
        child = module
        for name in names:
            child = child._modules.get(name)
        if type(child) is not kind:
            return False
        children.append(child)
    return not hooked(*children)


def _is_recorded(args: tuple[Any, ...]) -> bool:
    """Whether `torch.fx` or `torch.jit.trace` records the call; neither knows the sizes in it."""
    for arg in args:
        if isinstance(arg, Proxy):
            return True
    return torch.jit.is_tracing()


@cache  # one class per kind of module: the compiler guards on types
def _subclass(cls: Any, rule: Rule, around: Around) -> Any:
    parameters = list(signature(cls.forward).parameters.values())[1:]
    names = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]

    @wraps(cls.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        for name in names[len(args) :]:
            if name not in kwargs:
                break
            args = (*args, kwargs.pop(name))
        if not _is_recorded(args) and _is_as_found(self, around):
            out = rule.forward(self, *args, **kwargs)
            if out is not NotImplemented:
                return out
        return cls.forward(self, *args, **kwargs)

    def reduce_ex(self: Any, protocol: Any) -> tuple[Any, ...]:
        _, _, *state = super(fast, self).__reduce_ex__(protocol)
        return (_blank, (cls, rule, around), *state)

    body = {"forward": forward, "__reduce_ex__": reduce_ex, "__module__": __name__, _MARK: rule}
    fast = type(cls)(f"Fast{cls.__name__}", (cls,), body)
    return fast


def _blank(cls: Any, rule: Rule, around: Around) -> Any:
    """An accelerated module before its state, for `pickle` and `copy`."""
    fast = _subclass(cls, rule, around)
    return fast.__new__(fast)


def _examine(module: nn.Module, rule: Rule) -> tuple[str, str]:
    """What should become of a module that matches, "replaced" or "skipped", and a remark."""
    if "forward" in vars(module):
        return "skipped", "something else has replaced the forward of this instance; undo it first"
    for names, _ in _around(module, rule):
        path = ".".join(names)
        if hooked(module.get_submodule(path)):
            return "skipped", f"the rule goes around its {path}, which has hooks or another forward"
    try:
        with _Aside() as aside, torch.no_grad(), use_backend("torch"):
            return _compare(module, rule, aside)
    except Exception as error:
        first, *_ = str(error).splitlines() or [""]
        return "skipped", f"a copy could not be tried: {type(error).__name__}: {first}"


def _compare(module: nn.Module, rule: Rule, aside: "_Aside") -> tuple[str, str]:
    own_class: Any = type(module)
    twin = _random_twin(module)
    unserved = []
    examples = list(rule.examples(module))
    for mode, example in (("training", examples[0]), *(("evaluation", e) for e in examples)):
        twin.train(mode == "training")
        args = [_double(x) for x in example]
        aside.restart()
        fast = rule.forward(twin, *args)
        if fast is NotImplemented:
            unserved.append(mode)
            continue
        aside.restart()
        own = own_class.forward(twin, *args)
        if type(own) is not type(fast):
            return "skipped", f"it returns {type(own).__name__}, the rule {type(fast).__name__}"
        # Of several results only the first is always there.
        a, b = (out[0] if isinstance(out, tuple) else out for out in (own, fast))
        if a.shape != b.shape:
            return "skipped", f"it returns a tensor {list(a.shape)}, the rule {list(b.shape)}"
        error = float((a - b).abs().max() / a.abs().max())
        if not error <= _TOLERANCE:  # so that NaN counts
            return "skipped", f"it computes something else (by {error:.0e} in {mode})"
    if "evaluation" in unserved:
        return "skipped", "the rule serves no call of it as it is"
    return "replaced", "its own forward runs in training" if unserved else ""


def _double(x: Any) -> Any:
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def _random_twin(module: nn.Module) -> nn.Module:
    """A copy on the CPU with random values in float64, and with hooks that do nothing.

    Random, because zero biases and unit weights, as in a fresh model, would hide differences.
    """
    memo: dict[int, Any] = {}
    for p in module.parameters():
        bound = (3 / p[0].numel()) ** 0.5 if p.dim() > 1 else 1.0
        memo[id(p)] = nn.Parameter(
            torch.empty(p.shape, dtype=torch.float64).uniform_(-bound, bound)
        )
    for b in module.buffers():
        if b.is_floating_point():
            memo[id(b)] = torch.rand(b.shape, dtype=torch.float64)
    for child in module.modules():
        for hooks in _hooks(child):
            memo[id(hooks)] = OrderedDict.fromkeys(hooks, _do_nothing)
    return copy.deepcopy(module, memo)


def _do_nothing(*args: Any, **kwargs: Any) -> None:
    pass


class _Aside(TorchFunctionMode):
    """What is made inside is on the CPU, random numbers come from a generator of its own, and
    dropout shows where it is applied, without chance. Other threads notice nothing: contexts of
    PyTorch for these change the default device and generator of the process.
    """

    _DROPOUTS = (
        F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout,
    )  # fmt: skip
    _RANDOM = (
        torch.rand, torch.randn, torch.randint, torch.randperm, torch.normal, torch.bernoulli,
        torch.multinomial, Tensor.normal_, Tensor.uniform_, Tensor.bernoulli_, Tensor.random_,
    )  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self._generator = torch.Generator()

    def restart(self) -> None:
        """Random numbers from the beginning."""
        self._generator.manual_seed(0)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in self._DROPOUTS:
            return _visible_dropout(*args, **kwargs)
        if func in _device_constructors() and kwargs.get("device") is None:
            kwargs["device"] = "cpu"
        if func in self._RANDOM:
            kwargs.setdefault("generator", self._generator)
        return func(*args, **kwargs)


def _visible_dropout(
    x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Tensor:
    return x.tanh() if training and p > 0 else x
