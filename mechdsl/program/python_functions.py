"""Functions of the user's Python files: found by reading, run only with permission.

Finding a function neither imports nor runs its file. A later run executes the bytes read at that
time, so that the SHA-256 in the results is that of the code that produced them.
"""

from __future__ import annotations

import ast as python
import os
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from hashlib import sha256
from inspect import Parameter, signature, unwrap
from pathlib import Path
from traceback import walk_tb
from types import ModuleType
from typing import Any, Literal
from uuid import uuid4

from mechdsl.base.files import RELATIVE_PATH_HINT
from mechdsl.base.text import HintedError, Source, Span, name_list
from mechdsl.diagnostics.core import Diagnostic, did_you_mean
from mechdsl.diagnostics.syntax import PythonFailed, PythonNotAllowed, PythonNotFound, PythonNotRun
from mechdsl.program import spec
from mechdsl.program.code_hashes import CodeHashError, hash_callable, hash_imported_code
from mechdsl.program.paths import PYTHON_PATH, path_to_read
from mechdsl.syntax import ast
from mechdsl.syntax.traversal import walk

PYTHON_CALL = "python"
"""The call `python("file.py:name")`."""

FIT_CALL = "fit"
"""The call `fit(python("own.py:Trainer"), …)`."""

PythonMode = Literal["refuse", "look", "run"]
"""Treatment of Python in a file: rejected, only inspected (`validate`), or run."""


def python_mode(allow_python: bool) -> PythonMode:
    """Return the treatment of Python files by commands and functions that can run them."""
    return "run" if allow_python else "refuse"


FunctionUse = Literal["metric", "reply", "value", "fill", "model", "basis", "trainer"]
"""Purpose of a function, which determines its arguments. A trainer is a class."""

NESTED_CALL_REASON = "it can't be used inside a text or another metric"

NESTED_CALL_HINT = (
    "give it a name (`x = python(…)`, `metric refused = python(…)`) and use that name"
)

FUNCTION_PARAMETERS: dict[FunctionUse, tuple[str, ...]] = {
    "metric": ("logits", "rows"),
    "reply": ("replies", "rows"),
    "value": ("row",),
    "fill": ("vectors",),
    "model": (),
    "basis": (),
    "trainer": (),
}

TOKENIZER_PARAMETER = "tokenizer"
"""Name of the parameter through which a metric receives the tokenizer; a third required
parameter of any name has the same effect."""

REPLIES_PARAMETER = "replies"
"""Name of a callable's first parameter through which it receives generated texts, not logits."""

REPLY_WORD = "reply"
"""Second argument of a function that receives generated texts: `python("judge.py:f", reply)`."""

TokenizerArgument = Literal["nothing", "third", "named"]


class PythonFailure(Exception):
    """A function failed; caught where its rows are known."""

    def __init__(self, diagnostic: PythonFailed, row: int | None = None) -> None:
        """Store the failure; `row` is the index of the failing row among those passed, if known."""
        super().__init__(diagnostic.message)
        self.diagnostic = diagnostic
        self.row = row


class PythonNotLoaded(PythonFailure):
    """The file doesn't run or doesn't define the function; no row is at fault."""


@dataclass(frozen=True)
class PythonFunction:
    """A function that was found but not yet run."""

    path: Path
    file: str
    """The path as written in the source."""
    name: str
    digest: str
    """SHA-256 of the file."""
    line: int = field(compare=False)
    """Line of the definition."""
    span: Span = field(compare=False, repr=False)
    tokenizer: TokenizerArgument = "nothing"
    """How a metric receives the model's tokenizer."""

    @property
    def content_hash(self) -> str | None:
        """SHA-256 of its code; None if it can't be hashed."""
        return self.digest

    @property
    def is_stable(self) -> bool:
        """Whether its values don't depend on the order of its calls, as far as is known."""
        return True

    @property
    def identity(self) -> str:
        """The hash of its code, for conventions."""
        return f"SHA-256 {self.digest[:12]}…"

    def read_code(self) -> bytes:
        """Return the bytes whose imports run with the function.

        Raises:
            CodeHashError: If the code has changed since it was checked, or can't be hashed.
        """
        content = self.path.read_bytes()
        if sha256(content).hexdigest() != self.digest:
            raise CodeHashError(f"`{self.file}` has changed since it was checked")
        return content

    @property
    def allowing(self) -> str:
        """The option that allows it to run. An untrusted file has none."""
        untrusted = self.span.source.reach.reads is not None
        leave = " remove `--untrusted` and" if untrusted else ""
        allow = "`--allow-python` (`allow_python=True` from Python)"
        return f"review `{self.file}`, then{leave} add {allow}"

    def call(self, *arguments: Any, **named: Any) -> Any:
        """Call the function; every exception becomes a PythonFailure."""
        function = self.load()
        try:
            return function(*arguments, **named)
        except (Exception, SystemExit) as error:
            raise self.failure(_told(error), *self._hint(error), error=error) from error

    def failure(
        self,
        reason: str,
        hint: str,
        *,
        error: BaseException | None = None,
        row: int | None = None,
    ) -> PythonFailure:
        """Return the failure for a reason. `row`: as in PythonFailure."""
        where = self.where(error)
        said = PythonFailed(
            span=self.span, function=self.name, reason=reason, where=where, hint=hint
        )
        return PythonFailure(said, row)

    def where(self, error: BaseException | None = None) -> str:
        """Describe the line of the file that raised, or that defines the function."""
        line = self._line(error)
        return f"defined at {self.file}:{self.line}" if line is None else f"at {self.file}:{line}"

    def _hint(self, error: BaseException) -> tuple[str]:
        if isinstance(error, ImportError):
            return (
                "import installed packages only, not modules next to the file: the file's hash "
                "must cover all of its code",
            )
        return (f"correct `{self.name}`, or exclude rows that it can't process",)

    def _code_file(self) -> str:
        """Return the file of the code, as tracebacks name it."""
        return str(self.path)

    def _line(self, error: BaseException | None) -> int | None:
        """Return the innermost line of the file in an exception's traceback."""
        if error is None:
            return None
        lines = [
            line
            for frame, line in walk_tb(error.__traceback__)
            if frame.f_code.co_filename == self._code_file()
        ]
        return lines[-1] if lines else None

    def load(self) -> Callable[..., Any]:
        """Run the file, and return the function. Raises PythonNotLoaded."""
        try:
            module = _module(self.path, self.digest)
            function = getattr(module, self.name, None)
        except (Exception, SystemExit) as error:
            failed = self.failure(_told(error), *self._hint(error), error=error)
            raise PythonNotLoaded(failed.diagnostic) from error
        if not callable(function):
            gone = "the file defines no function with that name"
            raise PythonNotLoaded(self.failure(gone, "define it with `def`").diagnostic)
        return function


CallableKind = Literal["metrics", "rules"]
"""The argument of the Python interface through which a callable is passed."""


@dataclass(frozen=True)
class CallableSource(Source):
    """The source of a function that the caller passes; compared by identity."""

    kind: CallableKind = "metrics"
    key: str = ""
    """Its name in the file."""
    function: Callable[..., Any] = field(default=id, repr=False)
    digest: str = ""
    """SHA-256 of its code and of what it reads; if that can't be hashed, a unique text."""
    imports: bytes = b""
    unhashed: str = ""
    """Why the code can't be hashed; empty if it can."""
    watch: CallableWatch = field(default_factory=lambda: CallableWatch(), repr=False)

    __eq__ = object.__eq__
    __hash__ = object.__hash__

    @property
    def name(self) -> str:
        return f'{self.kind}["{self.key}"]'

    def describe_line(self, line: int) -> str:
        return f"passed as `{self.name}`"


@dataclass
class CallableWatch:
    """Whether what a callable reads has changed since it was hashed, so that its values depend on
    the order of its calls."""

    changed: bool = False


@dataclass(frozen=True)
class CallableFunction(PythonFunction):
    """A function that the caller passes as a callable."""

    source: CallableSource = field(kw_only=True, compare=False, repr=False)

    @property
    def content_hash(self) -> str | None:
        return None if self.source.unhashed else self.digest

    @property
    def identity(self) -> str:
        reason = self.source.unhashed
        return f"never stored: {reason}" if reason else super().identity

    @property
    def is_stable(self) -> bool:
        return not self.source.watch.changed

    def read_code(self) -> bytes:
        if self.source.unhashed:
            raise CodeHashError(f"`{self.file}` can't be hashed: {self.source.unhashed}")
        self._compare()
        if self.source.watch.changed:
            raise CodeHashError(f"what `{self.file}` reads has changed since the run began")
        return self.source.imports

    def call(self, *arguments: Any, **named: Any) -> Any:
        """Call the function, then check that it hasn't changed what it reads."""
        output = super().call(*arguments, **named)
        if not self.source.unhashed:
            self._compare()
        return output

    def _compare(self) -> None:
        try:
            unchanged = hash_callable(self.source.function)[0] == self.digest
        except CodeHashError:
            unchanged = False
        self.source.watch.changed |= not unchanged

    def where(self, error: BaseException | None = None) -> str:
        line = self._line(error)
        passed = f"passed as `{self.file}`"
        return passed if line is None else f"{passed}, at {Path(self._code_file()).name}:{line}"

    def _code_file(self) -> str:
        code = getattr(unwrap(self.source.function), "__code__", None)
        return "" if code is None else code.co_filename

    def load(self) -> Callable[..., Any]:
        function = self.source.function
        if self.source.kind == "rules" or len(_required_parameters(function)) > 1:
            return function
        return lambda values, rows, **named: function(values, **named)


def callable_definition(kind: CallableKind, name: str, function: Callable[..., Any]) -> ast.Call:
    """Return the definition of a metric or a rule that calls a Python callable.

    Args:
        kind: The argument that it was passed through.
        name: Its name in the file.
        function: A metric is called as `function(logits)` with logits [row, vocab], as
            `function(logits, rows)` if it requires two arguments, and with `tokenizer=` if it has a
            parameter of that name. If its first parameter is called `replies`, it receives the
            generated texts. It returns [row]. A rule is called as `function(vectors)` with vectors
            [row, position, width], and returns the same shape.
    """
    try:
        (digest, imports), unhashed = hash_callable(function), ""
    except CodeHashError as unknown:  # unique, so that no cached value is taken for its own
        digest, imports, unhashed = uuid4().hex, b"", str(unknown)
    source = CallableSource(
        name,
        kind=kind,
        key=name,
        function=function,
        digest=digest,
        imports=imports,
        unhashed=unhashed,
    )
    span = Span(source, 0, len(name))
    arguments: tuple[ast.Argument, ...] = ()
    if kind == "metrics" and next(iter(_parameters(function)), "") == REPLIES_PARAMETER:
        words = (name, REPLY_WORD)
        arguments = tuple(
            ast.Argument(None, ast.Name(word, span=span), span=span) for word in words
        )
    return ast.Call(PYTHON_CALL, arguments, span=span)


def _callable_function(
    node: ast.Call, source: CallableSource, use: FunctionUse
) -> CallableFunction:
    parameters = _parameters(source.function)
    named = TOKENIZER_PARAMETER in parameters and use in ("metric", "reply")
    _check_callable(source, use)
    return CallableFunction(
        Path(source.name),
        source.name,
        source.key,
        source.digest,
        1,
        node.span,
        "named" if named else "nothing",
        source=source,
    )


def _check_callable(source: CallableSource, use: FunctionUse) -> None:
    """Check that a callable accepts its arguments."""
    try:
        accepted = signature(source.function)
    except (TypeError, ValueError):  # a builtin
        return
    wanted = FUNCTION_PARAMETERS[use]
    required = _required_parameters(source.function)
    given = wanted if use == "fill" or len(required) > 1 else wanted[:1]
    named = (
        [TOKENIZER_PARAMETER]
        if use != "fill" and TOKENIZER_PARAMETER in accepted.parameters
        else []
    )
    try:
        accepted.bind(*given, **dict.fromkeys(named))
    except TypeError as error:
        fitting = f"`def {source.key}({', '.join(wanted)}):`"
        if len(wanted) > 1:
            fitting = f"`def {source.key}({wanted[0]}):` or {fitting}"
        raise _Missing(
            f"it is called with {name_list(given)}, and Python reports: {error}",
            f"write {fitting}",
        ) from None


def _parameters(function: Callable[..., Any]) -> dict[str, Parameter]:
    try:
        return dict(signature(function).parameters)
    except (TypeError, ValueError):  # a builtin
        return {}


def _required_parameters(function: Callable[..., Any]) -> list[str]:
    positional = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
    return [
        name
        for name, parameter in _parameters(function).items()
        if parameter.kind in positional and parameter.default is Parameter.empty
        if name != TOKENIZER_PARAMETER
    ]


def _told(error: BaseException) -> str:
    """Format an exception on one line."""
    said = " ".join(str(error).split())
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


@cache
def _module(path: Path, digest: str) -> ModuleType:
    """Run the file once as a module that others can't import by its name."""
    content = path.read_bytes()
    if sha256(content).hexdigest() != digest:
        raise RuntimeError("the file has changed since it was checked")
    name = f"mechdsl_python_{digest[:16]}"
    module = ModuleType(name)
    module.__file__ = str(path)
    sys.modules[name] = module  # dataclasses and pickle look it up there
    try:
        exec(compile(content, str(path), "exec"), module.__dict__)
    except BaseException:
        del sys.modules[name]
        raise
    return module


# --- finding --------------------------------------------------------------------------------------


def is_python_call(node: object) -> bool:
    """Whether an expression is `python(…)`."""
    return isinstance(node, ast.Call) and node.name == PYTHON_CALL


def metric_use(node: ast.Call) -> FunctionUse:
    """Return the purpose of a measure's function: `python("judge.py:refused", reply)` receives the
    generated text, other functions receive logits."""
    second = node.arguments[1] if len(node.arguments) == 2 else None
    if second is None or second.name is not None or not isinstance(second.value, ast.Name):
        return "metric"
    return "reply" if second.value.id == REPLY_WORD else "metric"


def find_function(
    node: ast.Call, use: FunctionUse
) -> tuple[PythonFunction | None, list[Diagnostic]]:
    """Find the function that `python("file.py:name")` refers to, without running any of it.

    Codes: E0222, E0532, E0535.
    """
    source = node.span.source
    try:
        if isinstance(source, CallableSource):
            return _callable_function(node, source, use), []
        return _found(node, use), []
    except _Refused as refused:
        return None, refused.diagnostics
    except _Missing as missing:
        written = node.span.written
        problem = PythonNotFound(
            span=node.span, written=written, reason=missing.reason, hint=missing.hint
        )
        return None, [problem]


class _Missing(HintedError):
    """A file without the function that a call names."""


class _Refused(Exception):
    def __init__(self, diagnostics: list[Diagnostic]) -> None:
        super().__init__()
        self.diagnostics = diagnostics


def _found(node: ast.Call, use: FunctionUse) -> PythonFunction:
    shown = {"model": "toy.py:build", "basis": "mp.py:MPSAE", "trainer": "own.py:Trainer"}
    what = "class" if use == "trainer" else "function"
    example = f'write the file and the {what}: `python("{shown.get(use, "metrics.py:refused")}")`'
    arguments = node.arguments[:1] if use in ("reply", "basis", "trainer") else node.arguments
    value = arguments[0].value if len(arguments) == 1 else None
    if not isinstance(value, ast.String) or node.arguments[0].name is not None:
        raise _Missing("it takes one text in quotes", example)
    file, colon, name = value.value.rpartition(":")
    if not colon or not name.isidentifier():
        raise _Missing(f"it names no {what}", example)
    if not file.endswith(".py"):
        raise _Missing(f"`{file}` is not a Python file", "its name must end in `.py`")
    path, problems = path_to_read(PYTHON_PATH, file, node.span)
    if path is None:
        raise _Refused(problems)
    content = _content(path, file)
    functions = _functions(content, file, use)
    if name not in functions:
        known = name_list(functions)
        keyword = "class" if use == "trainer" else "def"
        hint = f"it defines {known}" if known else f"define it with `{keyword}`"
        hint = did_you_mean(name, functions, hint)
        raise _Missing(f"`{file}` defines no {what} `{name}`", hint)
    tokenizer = "nothing"
    if use in ("metric", "reply"):
        tokenizer = _tokenizer_as(functions[name], name, FUNCTION_PARAMETERS[use])
    if use != "trainer":
        _check_parameters(functions[name], name, use, tokenizer)
    digest, line = sha256(content).hexdigest(), functions[name].lineno
    return PythonFunction(path.resolve(), file, name, digest, line, node.span, tokenizer)


def _content(path: Path, file: str) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        there = os.path.isdir(path.parent)
        names = sorted(p.name for p in path.parent.glob("*.py")) if there else []
        hint = did_you_mean(path.name, names, RELATIVE_PATH_HINT)
        raise _Missing(f"there is no file `{file}`", hint) from None
    except (OSError, ValueError) as error:
        reason = (getattr(error, "strerror", None) or str(error)).lower()
        raise _Missing(f"`{file}`: {reason}", "name a file that can be read") from None


def _functions(content: bytes, file: str, use: FunctionUse) -> dict[str, python.FunctionDef]:
    """Return the top-level functions of a file that have a purpose; of equal names the last one.
    Classes are functions with the arguments of `__init__`."""
    try:
        tree = python.parse(content, filename=file)
    except SyntaxError as error:
        where = f"line {error.lineno}" if error.lineno else "it"
        raise _Missing(
            f"{where} of `{file}` is not Python: {error.msg}", "correct the file"
        ) from None
    except (ValueError, RecursionError, MemoryError) as error:
        raise _Missing(f"`{file}` is not Python: {error}", "correct the file") from None
    functions: dict[str, python.FunctionDef] = {}
    for statement in top_level_definitions(tree):
        if isinstance(statement, python.ClassDef):
            if use in ("basis", "trainer"):
                functions[statement.name] = _creation(statement)
        elif use != "trainer":
            functions[statement.name] = statement
    return functions


def top_level_definitions(
    tree: python.Module | python.If | python.Try,
) -> Iterator[python.FunctionDef | python.ClassDef]:
    """Yield the functions and classes of a file that aren't inside of others."""
    rest = [] if isinstance(tree, python.Module) else tree.orelse
    for statement in (*tree.body, *rest):
        match statement:
            case python.FunctionDef() | python.ClassDef():
                yield statement
            case python.If() | python.Try():
                yield from top_level_definitions(statement)
            case _:
                pass


def _creation(statement: python.ClassDef) -> python.FunctionDef:
    """Return the function that creates an object of a class."""
    for each in statement.body:
        if isinstance(each, python.FunctionDef) and each.name == "__init__":
            each.args.args[:1] = []
            each.lineno = statement.lineno
            return each
    (made,) = python.parse(f"def {statement.name}(): ...").body
    assert isinstance(made, python.FunctionDef)
    made.lineno = statement.lineno
    return made


def _tokenizer_as(
    function: python.FunctionDef, name: str, first: tuple[str, ...]
) -> TokenizerArgument:
    """Return how a metric receives the tokenizer: by its name, as a third required argument, or,
    with two arguments, not at all."""
    args = function.args
    places = [each.arg for each in (*args.posonlyargs, *args.args)]
    if TOKENIZER_PARAMETER in places[:2]:
        told = f"`{name}` takes `{TOKENIZER_PARAMETER}` as the {first[0]} or the rows"
        raise _Missing(told, f"write `def {name}({', '.join(first)}, {TOKENIZER_PARAMETER}):`")
    by_name = (each.arg for each in (*args.args, *args.kwonlyargs))
    if TOKENIZER_PARAMETER in by_name:
        return "named"
    required = places[: len(places) - len(args.defaults)]
    return "third" if len(required) == 3 or places[2:3] == [TOKENIZER_PARAMETER] else "nothing"


def _check_parameters(
    function: python.FunctionDef, name: str, use: FunctionUse, tokenizer: TokenizerArgument
) -> None:
    """Check that the function accepts its arguments."""
    args = function.args
    by_name = tokenizer == "named"
    most = len(args.posonlyargs) + len(args.args)
    least = most - len(args.defaults)
    wanted = FUNCTION_PARAMETERS[use]
    if tokenizer == "third":
        wanted = (*wanted, TOKENIZER_PARAMETER)
    required = [each.arg for each in (*args.posonlyargs, *args.args)][:least]
    least -= by_name and TOKENIZER_PARAMETER in required
    forced = any(
        default is None and not (by_name and each.arg == TOKENIZER_PARAMETER)
        for each, default in zip(args.kwonlyargs, args.kw_defaults, strict=True)
    )
    fits = least <= len(wanted) and (most >= len(wanted) or args.vararg is not None)
    if fits and not forced:
        return
    plural = "argument" if most == 1 else "arguments"
    reason = f"`{name}` takes {most} {plural}, but is called with {len(wanted)}"
    if fits:
        reason = f"`{name}` has required keyword-only arguments"
    raise _Missing(reason, f"write `def {name}({', '.join(wanted)}):`")


# --- functions of a file --------------------------------------------------------------------------


def prompt_functions(prompts: spec.Prompts) -> list[ast.Call]:
    """Return all `python(…)` calls that create rows of a block."""
    parts: list[Any] = [value.value for value in prompts.values]
    parts += [text.value for text in prompts.texts]
    parts += list(prompts.where)
    parts += [corruption.changes for corruption in prompts.corruptions]
    return [node for part in parts for node in _calls(part)]


def check_functions(
    program: spec.Program, mode: PythonMode, given: Collection[str] = ()
) -> list[Diagnostic]:
    """Check the Python functions of a program.

    Codes: E0221 for Python that isn't allowed, E0222 for invalid functions, W0740 for rows that
    can't be checked because of them.

    Args:
        given: Models passed by the caller, whose functions aren't called.
    """
    if mode == "run":
        _module.cache_clear()  # a function may keep state, which every run resets
        with suppress(CodeHashError, OSError):  # imported modules are hashed before they run
            hash_imported_code(
                program_function.read_code() for program_function in program_functions(program)
            )
    diagnostics: list[Diagnostic] = []
    seen: set[Span] = set()
    for node, use in _uses(program, given):
        if node.span in seen:
            continue
        seen.add(node.span)
        if use is None:
            diagnostics.append(
                PythonNotFound(
                    span=node.span,
                    written=node.span.written,
                    reason=NESTED_CALL_REASON,
                    hint=NESTED_CALL_HINT,
                )
            )
            continue
        function, problems = find_function(node, use)
        diagnostics += problems
        allowed = mode != "refuse" or isinstance(function, CallableFunction)
        if function is not None and not allowed:
            diagnostics.append(
                PythonNotAllowed(
                    span=node.span,
                    function=function.name,
                    file=function.file,
                    hint=function.allowing,
                )
            )
    if mode == "look":
        for name, prompts in program.prompts.items():
            for node in prompt_functions(prompts)[:1]:
                diagnostics.append(PythonNotRun(span=node.span, prompts=name))
    return diagnostics


def program_functions(program: spec.Program) -> Iterator[PythonFunction]:
    """Yield all Python functions that a file refers to and that can be found."""
    for node, use in _uses(program):
        function = None if use is None else find_function(node, use)[0]
        if function is not None:
            yield function


def block_functions(prompts: spec.Prompts) -> Iterator[PythonFunction]:
    """Yield the Python functions that create rows of a block and that can be found."""
    for node in prompt_functions(prompts):
        function, _ = find_function(node, "value")
        if function is not None:
            yield function


def _uses(
    program: spec.Program, given: Collection[str] = ()
) -> Iterator[tuple[ast.Call, FunctionUse | None]]:
    """Yield every `python(…)` of a file with its purpose; None if it is invalid there. Functions of
    `given` models are omitted."""
    for model in program.models.values():
        if model.function is not None and model.name not in given:
            yield model.function, "model"
    for basis in program.bases.values():
        if basis.method.name == PYTHON_CALL:
            yield basis.method, "basis"
    for call in _trainings(program):
        for argument in call.arguments:
            if argument.name is None and is_python_call(argument.value):
                assert isinstance(argument.value, ast.Call)
                yield argument.value, "trainer"
    for prompts in program.prompts.values():
        for node in prompt_functions(prompts):
            yield node, "value"
    for expression in program.metrics.values():
        yield from _in_metric(expression)
    for experiment in program.experiments:
        for measure in experiment.measures:
            yield from _in_metric(measure.metric)
        for condition in experiment.keep:
            yield from _in_metric(condition)
        for rule in experiment.every_rule:
            for node in _calls(rule.fill):
                yield node, "fill"


def _trainings(program: spec.Program) -> Iterator[ast.Call]:
    """Yield the calls `fit(…)` of a file."""
    for basis in (*program.bases.values(), *program.masks.values()):
        if basis.method.name == FIT_CALL:
            yield basis.method
    for direction in program.directions.values():
        if isinstance(direction.value, ast.Call) and direction.value.name == FIT_CALL:
            yield direction.value


def _in_metric(expression: ast.Expr) -> Iterator[tuple[ast.Call, FunctionUse | None]]:
    inner = {
        id(node)
        for call in walk(expression)
        if isinstance(call, ast.Call)
        for node in _calls(call.arguments)
    }
    for node in _calls(expression):
        yield node, None if id(node) in inner else metric_use(node)


def _calls(part: Any) -> list[ast.Call]:
    return [node for node in walk(part) if isinstance(node, ast.Call) and node.name == PYTHON_CALL]
