"""How much code an executor needs of us: lines that do something, without blank ones, comments and docstrings."""

import ast
from pathlib import Path


def code_lines(path: Path) -> int:
    """Lines of a Python file that a statement lies on."""
    text = path.read_text()
    lines = {number for number, line in enumerate(text.splitlines(), 1) if line.strip() and line.strip()[0] != "#"}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            first = node.body[0]
            lines -= set(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    return len(lines)
