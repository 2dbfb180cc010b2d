"""How other people's methods are called: their signatures, whatever wraps them, and how often one calls another."""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
import types
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from typing import Any


def signature_of(method: Callable[..., Any]) -> inspect.Signature:
    """The signature by which a method is called, without what it is bound to.

    Follows functools.wraps to the innermost function, as inspect does, but takes a bound method for
    what it is at every layer: where one wraps another, as FSDP2's register_fsdp_forward_method does,
    inspect would drop an argument too many.
    """
    if "__signature__" in getattr(method, "__dict__", {}):
        return method.__signature__
    bound = isinstance(method, types.MethodType)
    function = method.__func__ if bound else method
    wrapped = getattr(function, "__wrapped__", None)
    if wrapped is None:
        return inspect.signature(method)
    signature = signature_of(wrapped)
    if bound and not isinstance(wrapped, types.MethodType):
        return signature.replace(parameters=list(signature.parameters.values())[1:])
    return signature


def with_signature(method: Callable[..., Any], signature: inspect.Signature) -> Callable[..., Any]:
    """`method` as a callable that says it has this signature, and like the method can be copied and pickled."""
    callable_: Any = functools.partial(method)
    callable_.__signature__ = signature
    return callable_


def required(signature: inspect.Signature) -> list[str]:
    """Names of the parameters that a call must give."""
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p.name for p in signature.parameters.values() if p.default is p.empty and p.kind not in variable]


def is_default_of(parameter: inspect.Parameter, value: object) -> bool:
    """Whether a parameter's value is what it would be if it were not given."""
    if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
        return not value
    plain = isinstance(value, bool | int | float | str) and type(value) is type(parameter.default)
    return value is parameter.default or (plain and value == parameter.default)


def arguments_of(signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name, defaults included, those of **kwargs among them. Raises TypeError
    for a call that the method itself would refuse."""
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    by_name = dict(bound.arguments)
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            by_name.update(by_name.pop(parameter.name, {}))
    return by_name


@dataclass
class Loop:
    """A loop of `K` autoregressive steps, or of None if it does not say how many, of which `k` are over."""

    K: int | None
    k: int = 0


class Loops:
    """The loops that are running, each thread's own, the innermost last: a loop may call itself."""

    def __init__(self) -> None:
        self._local = threading.local()

    def _stack(self) -> list[Loop]:
        if not hasattr(self._local, "stack"):
            self._local.stack = []
        return self._local.stack

    def innermost(self) -> Loop | None:
        stack = self._stack()
        return stack[-1] if stack else None

    @contextlib.contextmanager
    def inside(self, loop: Loop) -> Iterator[None]:
        stack = self._stack()
        stack.append(loop)
        try:
            yield
        finally:
            stack.pop()

    def run(self, loop: Loop, method: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """method(*args, **kwargs) inside `loop`; where that is a generator, each of its turns."""
        with self.inside(loop):
            result = method(*args, **kwargs)
        return self._turns(loop, result) if inspect.isgenerator(result) else result

    def _turns(self, loop: Loop, generator: Generator[Any, Any, Any]) -> Generator[Any, Any, Any]:
        resume, argument = generator.send, None
        try:
            while True:
                with self.inside(loop):
                    try:
                        item = resume(argument)
                    except StopIteration as stop:
                        return stop.value
                try:
                    resume, argument = generator.send, (yield item)
                except Exception as error:
                    resume, argument = generator.throw, error
        finally:
            generator.close()
