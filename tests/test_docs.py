"""The API reference: what is public says all that it must, and is on a page.

Public is what `adamprox.__all__` names, and the classes of ours that these return or hold, such as
handles. Of these classes each method, property and attribute of ours without underscore is, too.

Each has a docstring. That must say:

- each argument, under `Args:`. An only argument may be named in a sentence instead, as ``name``.
- under `Returns:` what a function returns, if anything.
- under `Raises:` each exception that its source raises, or that of functions of ours it calls.
- of a tensor that can be read, the dtype and the shape.
- of what computes maths (`MATHS`), a formula, and its source: the paper, or a link.
"""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from itertools import zip_longest
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest

import adamprox

ROOT = Path(__file__).parents[1]

OPTIMIZERS = ("Adam", "AdamW", "AdamProx", "AdamProxL1", "AdamProxL2")
MATHS = (*OPTIMIZERS, "SparsityTarget", "UpdateStats", "UpdateStats.quantile")
FORMULA = r":math:`|^\.\. math::\n"
SOURCE = r"\bpaper's (equation|section|figures?|Adam-l2, Algorithm) [(\d]?|https://"


@dataclass
class Public:
    name: str
    doc: str
    arguments: tuple[str, ...] = ()
    type: str = ""
    """Of what is returned, or read."""
    is_read: bool = False
    """An attribute, or a property."""
    function: FunctionType | None = None
    """Whose source raises; of a class, ``__init__``."""
    of: type | None = None

    def section(self, title: str) -> str:
        found = re.search(rf"^{title}:\n((?: +.*\n?|\n)+)", self.doc, re.MULTILINE)
        return textwrap.dedent(found[1]) if found else ""

    def entries(self, title: str) -> set[str]:
        heads = re.findall(r"^(\w[\w, ]*):", self.section(title), re.MULTILINE)
        return {name for head in heads for name in head.split(", ")}


def is_ours(thing: Any) -> bool:
    return (getattr(thing, "__module__", None) or "").startswith("adamprox.")


def our_bases(cls: type) -> list[type]:
    return [base for base in cls.__mro__ if is_ours(base)]


@cache
def body_of(thing: Any) -> list[ast.stmt]:
    """The statements of a class, of a function, or of a module."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(thing)))
    return tree.body if inspect.ismodule(thing) else tree.body[0].body  # type: ignore[attr-defined]


def values(body: list[ast.stmt], of: str = "") -> Iterator[Public]:
    """What is assigned there, to names or to attributes ``of`` one, and the string that follows."""
    for node, after in zip_longest(body, body[1:]):
        if not isinstance(node, ast.Assign | ast.AnnAssign):
            continue
        target = ast.unparse(node.targets[0] if isinstance(node, ast.Assign) else node.target)
        name = target.removeprefix(of)
        if name.isidentifier() and target.startswith(of) and not name.startswith("_"):
            annotation = ast.unparse(node.annotation) if isinstance(node, ast.AnnAssign) else ""
            text = getattr(getattr(after, "value", None), "value", None)
            doc = inspect.cleandoc(text) if isinstance(text, str) else ""
            yield Public(name, doc, type=annotation, is_read=True)


def function(name: str, thing: Any, of: type | None = None, is_read: bool = False) -> Public:
    signature = inspect.signature(thing)
    arguments = tuple(argument for argument in signature.parameters if argument != "self")
    doc = inspect.cleandoc(thing.__doc__ or "")
    own = inspect.unwrap(thing)
    return Public(name, doc, arguments, signature.return_annotation, is_read, own, of)


def class_(name: str, cls: type) -> Public:
    """Its arguments are those of a call by users, and fields say themselves what they are."""
    is_called = name in adamprox.__all__ and not hasattr(cls, "__match_args__")
    arguments = tuple(inspect.signature(cls).parameters) if is_called else ()
    init = cls.__init__ if is_called else None  # type: ignore[misc]
    return Public(name, inspect.cleandoc(cls.__doc__ or ""), arguments, "", False, init, cls)


def members(cls: type) -> dict[str, Public]:
    found: dict[str, Public] = {}
    for base in our_bases(cls):
        init = vars(base).get("__init__")
        attributes = [*values(body_of(base))]
        if is_ours(init) and not hasattr(cls, "__match_args__"):
            attributes += values(body_of(init), "self.")
        for attribute in attributes:
            if not found.get(attribute.name, attribute).doc or attribute.name not in found:
                found[attribute.name] = attribute
        for key, value in vars(base).items():
            thing = value.fget if isinstance(value, property) else value
            is_function = inspect.isfunction(thing) and is_ours(thing)
            if is_function and not key.startswith("_") and key not in found:
                found[key] = function(key, thing, cls, isinstance(value, property))
    for key, public in found.items():
        public.name = f"{cls.__name__}.{key}"
    return {public.name: public for public in found.values()}


def all_public() -> dict[str, Public]:
    found: dict[str, Public] = {}
    waiting = [(name, getattr(adamprox, name)) for name in adamprox.__all__]
    for name, thing in waiting:  # which grows
        if name in found:
            continue
        if inspect.isclass(thing):
            new = {name: class_(name, thing), **members(thing)}
        elif inspect.isfunction(thing):
            new = {name: function(name, thing)}
        else:
            new = {v.name: v for v in values(body_of(adamprox.grouping)) if v.name == name}
        found |= new
        module = sys.modules[getattr(thing, "__module__", "adamprox")]
        for word in re.findall(r"\b[A-Z]\w+", " ".join(public.type for public in new.values())):
            other = vars(module).get(word)
            if inspect.isclass(other) and is_ours(other) and word != "Tracker":
                waiting.append((word, other))
    return found


class Raised(ast.NodeVisitor):
    """The exceptions that a function raises, and what it calls."""

    def __init__(self, function: FunctionType, of: type | None) -> None:
        self.function, self.of = function, of
        self.exceptions: set[str] = set()
        self.called: list[tuple[Any, type | None]] = []
        for statement in body_of(function):
            self.visit(statement)

    def visit_Try(self, node: ast.Try) -> None:
        guarded = [] if node.handlers else node.body
        for child in (*guarded, *node.handlers, *node.orelse, *node.finalbody):
            self.visit(child)

    def visit_Raise(self, node: ast.Raise) -> None:
        if isinstance(node.exc, ast.Call):
            self.exceptions.add(ast.unparse(node.exc.func))
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        names, called = self.function.__globals__, None
        match ast.unparse(node.func).split("."):
            case [name]:
                called = names.get(name)
            case ["self", name] if name.startswith("_"):  # the others say for themselves
                called = inspect.getattr_static(self.of, name, None)
            case ["super()", name] if self.of is not None:
                bases = our_bases(self.of)
                own = next(i for i, b in enumerate(bases) if vars(b).get(name) is self.function)
                called = next((vars(b)[name] for b in bases[own + 1 :] if name in vars(b)), None)
            case [module, name]:
                called = getattr(names.get(module), name, None)
        if inspect.isclass(called):
            self.called.append((called.__init__, called))  # type: ignore[misc]
        elif inspect.isfunction(called):
            self.called.append((inspect.unwrap(called), self.of))
        self.generic_visit(node)


def raised_by(function: Any, of: type | None, seen: set[Any]) -> set[str]:
    generated = getattr(getattr(function, "__code__", None), "co_filename", "<")[0] == "<"
    if not inspect.isfunction(function) or not is_ours(function) or generated or function in seen:
        return set()
    seen.add(function)
    found = Raised(function, of)
    return found.exceptions.union(*(raised_by(*called, seen) for called in found.called))


PUBLIC = all_public()
each = pytest.mark.parametrize("public", [pytest.param(p, id=name) for name, p in PUBLIC.items()])


def test_names_of_every_kind_are_public() -> None:
    names = "WITHOUT_DECAY AdamW.step AdamProxL2.decay SparsityTarget.held FrozenZeros.remove"
    names += " StepInBackward.remove Sparsity.share TensorSparsity.rows UpdateStats.bins"
    assert {*adamprox.__all__, *MATHS, *names.split()} <= PUBLIC.keys()


@each
def test_it_has_a_docstring(public: Public) -> None:
    assert public.doc


@each
def test_its_arguments_are_documented(public: Public) -> None:
    sentences = public.doc.split("\nRaises:")[0]
    if len(public.arguments) == 1 and f"``{public.arguments[0]}``" in sentences:
        return
    assert set(public.arguments) == public.entries("Args")


@each
def test_what_it_returns_is_documented(public: Public) -> None:
    if public.function and not public.is_read and public.type not in ("", "None"):
        assert public.section("Returns"), public.type


@each
def test_its_exceptions_are_documented(public: Public) -> None:
    assert raised_by(public.function, public.of, set()) <= public.entries("Raises")


@each
def test_a_tensor_has_its_dtype_and_shape(public: Public) -> None:
    if public.is_read and public.type == "Tensor":
        assert re.search(r"\b(float|int)\d\d\b.*\bshape \(", public.doc)


@pytest.mark.parametrize("name", MATHS)
def test_maths_has_a_formula_and_its_source(name: str) -> None:
    assert re.search(FORMULA, PUBLIC[name].doc, re.MULTILINE)
    assert re.search(SOURCE, " ".join(PUBLIC[name].doc.split()))


@each
def test_its_formulas_survive_markdown(public: Public) -> None:
    formulas = re.findall(r":math:`([^`]+)`", public.doc)
    formulas += re.findall(r"^\.\. math::\n((?: +.*\n?|\n)+)", public.doc, re.MULTILINE)
    # A backslash before these is eaten, and `*` is emphasis.
    assert not [formula for formula in formulas if re.search(r"\\[\\{}_#]|[&*<]", formula)]


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What the command of README.md writes."""
    if find_spec("pdoc") is None:
        pytest.skip("pdoc is missing: pip install '.[docs]'")
    if not (ROOT / ".ci/docs").is_dir():
        pytest.skip("this is no checkout: .ci/docs is missing")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    [command] = re.findall(r"<!-- docs -->\n```sh\npdoc (.*)\n```", readme)
    folder = tmp_path_factory.mktemp("docs")
    arguments = [str(folder) if a == "adamprox-docs" else a for a in command.split()]
    command = [sys.executable, "-m", "pdoc", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not re.search("warn|error", done.stderr, re.IGNORECASE), done.stderr
    return "".join(page.read_text(encoding="utf-8") for page in folder.rglob("*.html"))


@each
def test_it_is_on_a_page(pages: str, public: Public) -> None:
    [place] = {*re.findall(rf'<(?:section|div) id="{re.escape(public.name)}".*', pages)}
    text = pages[pages.index(place) :]
    text = text[: text.index("</div>", text.index('<div class="docstring">'))]
    for argument in public.arguments:
        if argument in public.entries("Args"):
            assert re.search(rf"<strong>(\w+, )*{argument}(, \w+)*:</strong>", text), argument


def test_links_within_a_page_lead_somewhere(pages: str) -> None:
    texts = re.findall(r'<div class="docstring">.*?</div>', pages, re.DOTALL)
    targets = {*re.findall(r'href="#([\w.]+)"', "".join(texts))}
    assert "UpdateStats" in targets
    assert targets <= {*re.findall(r'\bid="([\w.]+)"', pages)}


def test_nothing_of_docstrings_is_left_as_it_was(pages: str) -> None:
    texts = re.findall(r'<div class="docstring">.*?</div>', pages, re.DOTALL)
    assert len(texts) >= len(PUBLIC)
    for text in texts:
        assert not re.search(
            r":(class|meth|func|math):|\.\. math|(?<!>)(Args|Raises):|``|<pre>", text
        )
