"""Whether two answers state the same value, as plain arithmetic or as LaTeX.

(design: evaluation.md 15) VLMEvalKit evaluates both as Python code; here only numbers, operators,
comparisons, conditions and a few functions of numbers are evaluated, since predictions are texts of
a model.
"""

from __future__ import annotations

import ast
import logging
import warnings
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from internvlx_jax.core.extras import require

CLOSE = 1e-6
_LONGEST = 500  # characters of a text that is parsed
_LARGEST_POWER = 1000  # of an exponent; the reference stops after 30 seconds
_STEEP = (ast.Pow, ast.LShift)  # powers of powers would take all memory
# Functions of numbers that neither take long nor reach anything else.
_FUNCTIONS: Mapping[str, Any] = MappingProxyType(
    {each.__name__: each for each in (abs, bool, complex, float, int, max, min, round)}
)
_NODES = (
    ast.Expression,
    ast.IfExp,
    ast.BinOp,
    ast.UnaryOp,
    ast.BoolOp,
    ast.Compare,
    ast.Constant,
    ast.Name,
    ast.Load,
    ast.operator,
    ast.unaryop,
    ast.boolop,
    ast.cmpop,
)


def latex_reader() -> Any:
    """Returns the function that reads LaTeX.

    Raises:
        ConfigError: latex2sympy2_extended is not installed.
    """
    module = require("latex2sympy2_extended", extra="eval", purpose="comparing LaTeX expressions")
    return module.latex2sympy


def same_value(answer: str, key: str, *, names: bool = False) -> bool:
    """Whether two texts are equal in any case, or state values that differ by less than 1e-6.

    Args:
        answer: what the model or the judge states.
        key: the reference.
        names: whether "a" in the answer stands for the value of the key, as in the reference, whose
            variables have such names (`--compat mathvision_names`).
    """
    answer, key = answer.lower().strip(), key.lower().strip()
    if answer == key:
        return True
    value = arithmetic(key)
    if _close(value, arithmetic(answer, {"a": value} if names else {})):
        return True
    a, b = _latex(key), _latex(answer)
    if a is None or b is None:
        return False
    known = {"a": a, "b": b} if names else {}
    return _close(arithmetic(str(a), known), arithmetic(str(b), known))


def arithmetic(text: str, names: Mapping[str, Any] = MappingProxyType({})) -> Any:
    """Returns the value of an arithmetic expression in Python's notation; None for other texts.

    Args:
        text: the expression.
        names: values of names that it may use.
    """
    if len(text) > _LONGEST:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            tree = ast.parse(text.lstrip(" \t"), mode="eval")
            if not all(_allowed(node) for node in ast.walk(tree)):
                return None
            known = {"__builtins__": {}} | _FUNCTIONS
            return eval(compile(tree, "<answer>", "eval"), known, dict(names))
    except _NO_VALUE:
        return None


_NO_VALUE = (
    SyntaxError,
    ValueError,
    ArithmeticError,
    TypeError,
    NameError,
    MemoryError,
    RecursionError,
)


def _allowed(node: ast.AST) -> bool:
    if isinstance(node, ast.Constant):
        return isinstance(node.value, (int, float, complex))
    if isinstance(node, ast.BinOp) and isinstance(node.op, _STEEP):
        small = isinstance(node.right, ast.Constant) and isinstance(node.right.value, (int, float))
        nested = any(isinstance(each, _STEEP) for each in ast.walk(node.left))
        return small and not nested and abs(node.right.value) <= _LARGEST_POWER  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS and not node.keywords
    return isinstance(node, _NODES)


def _latex(text: str) -> Any:
    """Returns a LaTeX expression as sympy reads it; None for other texts."""
    if len(text) > _LONGEST:
        return None
    latex = latex_reader()
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        return latex(text)
    except Exception:  # the parser raises many kinds of errors, all of which mean "not LaTeX"
        return None
    finally:
        logging.disable(level)


def _close(a: Any, b: Any) -> bool:
    """Whether two numbers, of Python or of sympy, are close; anything else is not."""
    if a is None or b is None:
        return False
    try:
        return bool(abs(a - b) < CLOSE)
    except (OverflowError, TypeError):
        return False
