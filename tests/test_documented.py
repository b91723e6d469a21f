"Every exported symbol says what it is, and every tensor or array that goes in or out its shape."

import ast
import builtins
import io
import json
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


def opening(notebook):
    "The indented lines of the first text of a page, as code."
    cells = json.loads(notebook.read_text())["cells"][:3]
    text = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    return "\n".join(line[4:] for line in text.split("\n") if line.startswith("    "))


def called(code):
    "Names that code calls, with the names of the arguments; nothing where it is no Python, such as a drawing."
    try:
        tree = ast.parse(code)
    except SyntaxError:
        return []
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    made_here = {node.id for node in names if isinstance(node.ctx, ast.Store)}
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [
        (node.func.id, [k.arg for k in node.keywords], len(node.args))
        for node in calls
        if isinstance(node.func, ast.Name) and node.func.id not in made_here
    ]


def parameters():
    "Name of each function and class of the package -> names of what it takes; None: anything."
    found = {}
    for path in MODULES:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef):
                found.setdefault(node.name, []).append(taken(node))
            if isinstance(node, ast.ClassDef):
                makers = [f for f in node.body if getattr(f, "name", "") in ("__init__", "__new__")]
                fields = [f.target.id for f in node.body if isinstance(f, ast.AnnAssign)]
                inherits = not makers and not fields
                way = taken(makers[0]) if makers else None if inherits else fields
                found.setdefault(node.name, []).append(way)
    return found


def taken(function):
    args = function.args
    settings = any("with_settings" in ast.dump(d) for d in function.decorator_list)
    if args.kwarg or settings:
        return None
    return [a.arg for a in args.args + args.kwonlyargs] + (["*"] if args.vararg else [])


def test_pages_open_with_calls_that_exist():
    known, wrong, seen = parameters(), [], 0
    for page in sorted((ROOT / "nbs/api").glob("*/*.ipynb")):
        for name, keywords, count in called(opening(page)):
            seen += 1
            if name in vars(builtins) or name in known and None in known[name]:
                continue
            ways = known.get(name)
            fits = ways and any(
                way is None
                or (set(keywords) <= set(way) and (len(keywords) + count <= len(way) or "*" in way))
                for way in ways
            )
            if not fits:
                wrong.append(f"{page.parent.name}/{page.stem}: {name}({', '.join(keywords)})")
    assert not wrong, wrong
    assert seen > 60
