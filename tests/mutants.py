"""Kernels that are not quite right, for tests of the tests."""

from collections.abc import Callable


def mutant(kernel: object, moved: dict[int, int] | None = None, change: Callable | None = None, **constants: object) -> object:
    """`kernel` launched with other constants than it is asked for, or other arguments: moved, {position: the one whose argument it
    gets}; change: called with the list of arguments, which it may change."""

    class Mutant:
        def __getitem__(self, grid):
            def launch(*arguments, **keywords):
                given = [arguments[(moved or {}).get(i, i)] for i in range(len(arguments))]
                if change:
                    change(given)
                kernel[grid](*given, **keywords | constants)

            return launch

    return Mutant()
