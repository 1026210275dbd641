"""Whether two answers state the same value, as plain arithmetic or as LaTeX.

(design: evaluation.md 6: MathVision) VLMEvalKit evaluates both as Python code; here only numbers,
operators and comparisons are evaluated, since predictions are texts of a model.
"""

from __future__ import annotations

import ast
import logging
import warnings
from typing import Any

from internvlx_jax.core.extras import require

CLOSE = 1e-6
_LONGEST = 500  # characters of a text that is parsed
_LARGEST_POWER = 1000  # of an exponent; the reference stops after 30 seconds
_STEEP = (ast.Pow, ast.LShift)  # powers of powers would take all memory
_NODES = (
    ast.Expression,
    ast.BinOp,
    ast.UnaryOp,
    ast.BoolOp,
    ast.Compare,
    ast.Constant,
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


def same_value(a: str, b: str) -> bool:
    """Whether two texts are equal in any case, or state values that differ by less than 1e-6."""
    a, b = a.lower().strip(), b.lower().strip()
    if a == b:
        return True
    return _close(arithmetic(a), arithmetic(b)) or _close(latex_value(a), latex_value(b))


def arithmetic(text: str) -> int | float | complex | None:
    """Returns the value of an arithmetic expression in Python's notation; None for other texts."""
    if len(text) > _LONGEST:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            tree = ast.parse(text.lstrip(" \t"), mode="eval")
            if not all(_allowed(node) for node in ast.walk(tree)):
                return None
            return eval(compile(tree, "<answer>", "eval"), {"__builtins__": {}}, {})
    except (SyntaxError, ValueError, ArithmeticError, TypeError, MemoryError, RecursionError):
        return None


def _allowed(node: ast.AST) -> bool:
    if isinstance(node, ast.Constant):
        return isinstance(node.value, (int, float, complex))
    if isinstance(node, ast.BinOp) and isinstance(node.op, _STEEP):
        small = isinstance(node.right, ast.Constant) and isinstance(node.right.value, (int, float))
        nested = any(isinstance(each, _STEEP) for each in ast.walk(node.left))
        return small and not nested and abs(node.right.value) <= _LARGEST_POWER  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
    return isinstance(node, _NODES)


def latex_value(text: str) -> int | float | complex | None:
    """Returns the value of a LaTeX expression that has only numbers; None for other texts."""
    if len(text) > _LONGEST:
        return None
    latex = latex_reader()
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        return arithmetic(str(latex(text)))
    except Exception:  # the parser raises many kinds of errors, all of which mean "not LaTeX"
        return None
    finally:
        logging.disable(level)


def _close(a: int | float | complex | None, b: int | float | complex | None) -> bool:
    if a is None or b is None:
        return False
    try:
        return abs(a - b) < CLOSE
    except OverflowError:
        return False
