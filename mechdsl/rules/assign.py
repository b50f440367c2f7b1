"""`set SITE at POSITIONS to …`: a number, or what a Python function makes of what is there."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import TYPE_CHECKING

from mechdsl.program import spec
from mechdsl.program.python_files import find_function, is_python
from mechdsl.resolve.amounts import resolve_amounts
from mechdsl.resolve.in_progress import Work
from mechdsl.resolve.resolved_rule import Amounts, Convention, Intervention, ResolvedRule, Vectors
from mechdsl.rules.kind import RuleKind, places, rule_kind
from mechdsl.rules.readings import ReadValue, resolve_reading
from mechdsl.rules.steer import SET_TO_DIRECTION
from mechdsl.syntax import ast

if TYPE_CHECKING:
    from torch import Tensor


class GivenNumber(Intervention):
    """`to 0.5`: the number, everywhere in the vector."""

    name = "number"

    def values(self, rule: ResolvedRule, vectors: Vectors) -> Tensor:
        return vectors.amounts[:, None].expand(-1, vectors.width)


class FromPython(Intervention):
    """`to python("file.py:function")`: what the function makes of the base run's vectors."""

    name = "python"
    reads = "cell"

    def key(self, rule: ResolvedRule) -> Hashable:
        return rule.run, rule.python

    def detail(self, rule: ResolvedRule) -> str | None:
        assert rule.python is not None
        return f"{rule.python.name} of {rule.python.file}"

    def conventions(self, rule: ResolvedRule, n_layers: int) -> Iterator[Convention]:
        assert rule.python is not None
        yield Convention(
            "set",
            f"`{rule.python.name}` is given the {rule.run} run of all rows of a cell at once, "
            "[rows, positions, width], in the order of the data",
        )

    def of_cell(self, rule: ResolvedRule, given: Tensor) -> Tensor:
        """[row, position, width]: E0223 as PythonFailure where the function doesn't give that."""
        import torch

        function = rule.python
        assert function is not None
        # A copy, so that a function that writes into it changes nothing that is looked at here.
        own = given.clone()
        with torch.no_grad():
            made = function.call(own)
        hint = "it takes `vectors`, [rows, positions, width], and gives the same shape"
        try:
            found = torch.as_tensor(made).detach()
        except (TypeError, ValueError, RuntimeError, OverflowError):
            kind = "nothing" if made is None else f"a `{type(made).__name__}`"
            raise function.failure(f"it gave {kind}, not numbers", hint) from None
        if found.shape != given.shape:
            shapes = f"it gave the shape {list(found.shape)}, not {list(given.shape)}"
            raise function.failure(shapes, hint)
        if found.is_complex():
            raise function.failure("it gave complex numbers", hint)
        found, lacking = found.to(given), given.isnan()
        if not (found.isfinite() | lacking).all():
            if lacking.any():
                hint = "rows with fewer positions than others are filled up with NaN: leave it out"
            raise function.failure("it gave NaN or infinity", hint)
        return found.masked_fill(lacking, 0.0)


NUMBER, PYTHON, VALUE = GivenNumber(), FromPython(), ReadValue()


@rule_kind("set")
class SetRule(RuleKind):
    """Vectors of the base run are replaced."""

    def resolve(self, rule: spec.Rule, work: Work) -> ResolvedRule | None:
        if rule.reading is not None:
            return resolve_reading(rule, VALUE, work)
        if rule.direction is not None:
            return SET_TO_DIRECTION.resolve(rule, work)
        base = work.experiment.base
        sites, positions = places(rule, base, work)
        does, python = NUMBER, None
        amounts: Amounts | None = None
        if is_python(rule.fill):
            assert isinstance(rule.fill, ast.Call)
            does = PYTHON
            python, problems = find_function(rule.fill, "fill")
            work.diagnostics.extend(problems)
        else:
            amounts = resolve_amounts(rule.fill, work)
        if sites is None or positions is None or (python is None and amounts is None):
            return None
        return ResolvedRule(
            spec=rule,
            does=does,
            run=base,
            sites=sites,
            positions=positions,
            amounts=amounts,
            python=python,
        )
