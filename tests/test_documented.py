"Every exported symbol says what it is, and every tensor or array that goes in or out its shape."

import ast
import io
import re
import tokenize
from pathlib import Path

ROOT = Path(__file__).parents[1]
MODULES = [p for p in sorted((ROOT / "dinolab").rglob("*.py")) if p.name not in ("__init__.py", "_modidx.py")]
PLAIN = ("__init__", "__call__", "forward")  # methods whose meaning the class tells
ARRAY = re.compile(r"\b(Tensor|ndarray)\b")
LETTER = r"(?:\d*(?!a\b)[a-zA-Z][\d']?|\*\w+|\.\.\.|\d+)(?:[-+/·*]\w+)?"  # an axis: one letter (not the article), all of them (*s), a number, or arithmetic on these
NAME = r"(?:patch|parts|kinds|targets|materials|size|column|point|sample|skip|out|dim|rank|count|cells|visible|tissue)"  # axes that go by a word
AXES = re.compile(rf"(?:{LETTER}|{NAME})(?: \+ \d+)?(?: (?:{LETTER}|{NAME})\b)+|{LETTER}$|\w+ [x×] \w+")
WORDS = re.compile(r"\b(scalar|any shape|of (that|this|the same|any) shape|likewise|as in|one per)\b")


def comments(source):
    "Line number -> text of the comment on it."
    return {
        t.start[0]: t.string.lstrip("# ")
        for t in tokenize.generate_tokens(io.StringIO(source).readline)
        if t.type == tokenize.COMMENT
    }


def states_shape(comment):
    return bool(
        WORDS.search(comment)
        or any(AXES.match(part.strip()) for part in re.split(r"[,;:()=]| or |->", comment))
    )


def exported(tree):
    "Names and nodes of the functions and classes in `__all__`, and of the public methods of the latter."
    names = {
        n
        for node in tree.body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__"
        for n in ast.literal_eval(node.value)
    }
    for node in tree.body:
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.name not in names:
            continue
        yield node.name, node
        if isinstance(node, ast.ClassDef):
            yield from (
                (f"{node.name}.{f.name}", f)
                for f in node.body
                if isinstance(f, ast.FunctionDef) and (f.name in PLAIN or f.name[0] != "_")
            )


def places(node):
    "Parameters and result of a function, or fields of a class: (name, annotation, line of its end)."
    if isinstance(node, ast.ClassDef):
        return [(f.target.id, f.annotation, f.end_lineno) for f in node.body if isinstance(f, ast.AnnAssign)]
    return [(a.arg, a.annotation, a.end_lineno) for a in ast.walk(node.args) if isinstance(a, ast.arg)] + (
        [("->", node.returns, node.returns.end_lineno)] if node.returns else []
    )


def arrays(node):
    "Those that are annotated as arrays: (name, line)."
    return [
        (name, line)
        for name, kind, line in places(node)
        if kind is not None and ARRAY.search(ast.unparse(kind))
    ]


def array_faults(name, node, said):
    "One line per array; on the line of a method `shapes -> shape` may stand for all."
    found = arrays(node)
    folded = (
        isinstance(node, ast.FunctionDef) and "." in name and node.returns
    )  # shapes stand at the end of a long head
    end = node.returns.end_lineno if folded else 0
    shared = {line for _, line in found if sum(line == other for _, other in found) > 1}
    for array, line in found:
        text = said.get(line, "") or said.get(end, "")
        if line in shared and "." not in name:
            yield f"{name}({array}): shares a line with another array; put one parameter on a line"
        elif (
            line in shared
            and (sides := text.split("->"))
            and not (len(sides) == 2 and all(map(states_shape, sides)))
        ):
            yield f"{name}({array}): {text!r} for several arrays: expected shapes -> shape"
        elif not states_shape(text):
            yield f"{name}({array}): {text!r} states no shape, such as b c z y x"


def faults(source):
    "What is missing in a module, and how many symbols and arrays it has."
    found, said, symbols, count = [], comments(source), 0, 0
    for name, node in exported(ast.parse(source)):
        symbols, count = symbols + 1, count + len(arrays(node))
        if not ast.get_docstring(node) and node.name not in PLAIN:
            found.append(f"{name}: no docstring")
        found += array_faults(name, node, said)
        if isinstance(node, ast.FunctionDef):
            found += [
                f"{name}: backticks in {said[n]!r}, which is plain text in the help of commands"
                for n in dict.fromkeys(n for *_, n in places(node))
                if "`" in said.get(n, "")
            ]
    return found, symbols, count


def test_everything_is_documented():
    seen = {str(p.relative_to(ROOT)): faults(p.read_text(encoding="utf-8")) for p in MODULES}
    assert not [f"{p}: {fault}" for p, (found, *_) in seen.items() for fault in found]
    assert (
        len(seen) > 40
        and sum(s for _, s, _ in seen.values()) > 900
        and sum(n for *_, n in seen.values()) > 600
    )


BAD = """
__all__ = ["f", "g", "A"]
a, b = 1, 2
def f(
    x:Tensor,       # volumes
    y:np.ndarray,   # b c z y x, as `x`
    *,
    z:Tensor=None,  # a mask of some volumes
    text:str="# n", # no array
)->Tensor:
    return x
def g(x:Tensor, y:Tensor)->tuple:  # n, n
    "Two at once."
def _hidden(x:Tensor)->Tensor: return x
class A:
    field:Tensor  # of each
    def __init__(self, x): pass
    def forward(self, x:Tensor)->Tensor: return x  # b n -> logits
    def of(self): pass
    @property
    def p(self)->np.ndarray: return self.x
"""


def test_faults_are_found():
    found, symbols, count = faults(BAD)
    assert [f.split(":")[0] for f in found] == [
        "f",
        "f(x)",
        "f(z)",
        "f(->)",
        "f",
        "g(x)",
        "g(y)",
        "A",
        "A(field)",
        "A.forward(x)",
        "A.forward(->)",
        "A.of",
        "A.p",
        "A.p(->)",
    ]
    assert symbols == 7 and count == 10


def test_what_states_a_shape():
    for text in (
        "b c z y x",
        "x y z v, float32",
        "n 3, unit vectors",
        "*s",
        "b *s or None",
        "scalar in 0..1",
        "nm, z y x",
        "m + 1, r",
        "one per class",
        "likewise, float32",
        "image (b c h w)",
        "... k k",
        "patch n",
        "rows x columns",
        "of the same shape",
    ):
        assert states_shape(text), text
    for text in (
        "",
        "volumes",
        "boolean",
        "nm, distance to the nucleus",
        "of each",
        "a mask",
        "in 0..1",
        "what is there",
        "from fractal",
        "of a batch",
        "count of voxels",
        "a number",
    ):
        assert not states_shape(text), text
