"""Owns the corpus `python-docs`: the documentation already on this machine, read from source files with `ast`, never imported."""

import ast
import hashlib
import importlib.metadata
import importlib.util
import inspect
import json
import os
import platform
import re
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path

STANDARD_LIBRARY = "stdlib"
DEFAULT_PACKAGES = (
    STANDARD_LIBRARY, "accelerate", "deepspeed", "fsspec", "huggingface_hub", "matplotlib", "networkx", "numpy",
    "pandas", "pyarrow", "pydantic", "ray", "rich", "scipy", "sklearn", "sympy", "tokenizers", "torch",
    "transformers", "webdataset",
)  # fmt: skip
"""Well-documented packages of our own dependency stack; those that are not installed are passed over."""

TASK_PACKAGES = frozenset({STANDARD_LIBRARY, "networkx", "pandas", "ray", "scipy", "sklearn", "sympy", "torch"})
"""The packages that the labelled task tells apart. Not transformers, whose modules are copies of each other, and no
package with fewer than a thousand docstrings."""

MIN_CHARACTERS = 120
TASK_PERCENT = 25
"""Share of the modules of a task package that are held out of pretraining, in per cent."""

_READER_VERSION = 1  # part of the fingerprint: raise it with every change of what is read or how it is cleaned
_PARTITION_BYTES = 4_000_000  # of source: about one second of parsing
_SKIPPED_FOLDERS = frozenset(
    {"__pycache__", "_vendor", "dist-packages", "idlelib", "lib2to3", "site-packages", "test", "tests",
     "third_party", "thirdparty", "thirdparty_files"}
)  # fmt: skip
_TOPICS_MODULE = "pydoc_data.topics"
_NEW_LINE_STARTS = re.compile(r"([-*+•]|\d+[.)]|:\w+|\.\.) ?")
_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
_LETTER = re.compile(r"[^\W\d_]")


@dataclass(frozen=True)
class Document:
    """One piece of documentation."""

    text: str
    """Cleaned text, one paragraph a line."""
    source: str
    """`module:qualified.name`, or `module` for a module's own docstring."""

    @property
    def module(self) -> str:
        return self.source.partition(":")[0]


@dataclass(frozen=True)
class Partition:
    """Source files of one package, in the order they are read: small, picklable, a second or so of work."""

    package: str
    paths: tuple[str, ...]
    """Absolute paths."""
    modules: tuple[str, ...]
    """Dotted module name of each path."""
    max_documents: int | None
    """Reading stops after this many documents; None is no limit."""


@dataclass(frozen=True)
class _SourceFile:
    path: str
    module: str
    num_bytes: int


def list_partitions(max_documents: int | None = None, packages: Sequence[str] | None = None) -> list[Partition]:
    """The parts of the corpus, in a fixed order; without `packages`, those of DEFAULT_PACKAGES that are installed.

    `max_documents` bounds the sum over partitions; each gets a share in proportion to its bytes, and because a
    package's files are ordered by a hash, reading a part of them is a fair sample. Raises ValueError for a named
    package that is not installed.
    """
    if max_documents is not None and max_documents < 1:
        raise ValueError(f"python-docs: expected max_documents of at least 1, found {max_documents}")
    groups = [(package, group) for package in _selected(packages) for group in _groups_of(_source_files(package))]
    if max_documents is None:
        return [_partition(package, group, None) for package, group in groups]
    ends = list(accumulate(sum(file.num_bytes for file in group) for _, group in groups))
    quota_ends = [max_documents * end // max(ends[-1], 1) for end in ends]  # of a running total: no rounding loss
    quotas = [end - start for start, end in pairwise([0, *quota_ends])]
    return [_partition(package, group, quota) for (package, group), quota in zip(groups, quotas, strict=True) if quota]


def list_task_partitions() -> list[Partition]:
    """The modules held out for the labelled task, a partition or more per installed package of TASK_PACKAGES."""
    partitions: list[Partition] = []
    for package in _selected(sorted(package for package in TASK_PACKAGES if _roots(package))):
        files = [file for file in _source_files(package) if is_task_module(file.module)]
        partitions += [_partition(package, group, None) for group in _groups_of(files)]
    return partitions


def read_partition(partition: Partition, *, held_out: bool = False) -> Iterator[Document]:
    """The documents of a partition for pretraining, or with `held_out` those of the labelled task.

    Same files, same documents in the same order. A file that is not valid Python is passed over.
    """
    num_read = 0
    for path, module in zip(partition.paths, partition.modules, strict=True):
        if is_task_module(module) is not held_out:
            continue
        for document in _documents_of(path, module):
            if partition.max_documents is not None and num_read >= partition.max_documents:
                return
            num_read += 1
            yield document


def fingerprint(max_documents: int | None = None, packages: Sequence[str] | None = None) -> str:
    """Digest of what would be read: Python, packages, versions, names and sizes of files, selection; parses nothing."""
    owners = importlib.metadata.packages_distributions()
    selected = [
        [
            package,
            sorted({importlib.metadata.version(owner) for owner in owners.get(package, [])}),
            [[file.module, file.num_bytes] for file in _source_files(package)],
        ]
        for package in _selected(packages)
    ]
    content = [_READER_VERSION, platform.python_version(), max_documents, selected]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def is_task_document(document: Document) -> bool:
    """Whether a document belongs to the labelled task and is kept out of pretraining; pure."""
    return is_task_module(document.module)


def is_task_module(module: str) -> bool:
    """Whole modules are held out, so that near-identical docstrings of one module stay on one side; pure."""
    return package_of(module) in TASK_PACKAGES and hash_percent("held out", module) < TASK_PERCENT


def package_of(module: str) -> str:
    """The top-level package of a dotted module; modules of the standard library carry the prefix `stdlib`."""
    return module.partition(".")[0]


def hash_percent(purpose: str, key: str) -> int:
    """A number in 0..99 that depends on the two strings only; pure."""
    return int.from_bytes(hashlib.sha256(f"{purpose}\0{key}".encode()).digest()[:8], "big") % 100


def clean_text(docstring: str) -> str:
    """Dedented prose, one paragraph a line, without doctests, underlines and rules; pure."""
    paragraphs: list[str] = []
    previous_indent: int | None = None  # None: the next line starts a paragraph
    in_doctest = False
    for line in inspect.cleandoc(docstring).splitlines():
        words = line.strip()
        in_doctest = bool(words) and (in_doctest or words.startswith(">>>"))
        if in_doctest or not _LETTER.search(words):
            previous_indent = None
            continue
        indent = len(line) - len(line.lstrip())
        if previous_indent is None or indent < previous_indent or _NEW_LINE_STARTS.match(words):
            paragraphs.append(words)
        else:
            paragraphs[-1] += " " + words
        previous_indent = indent
    return "\n".join(paragraphs)


def _selected(packages: Sequence[str] | None) -> list[str]:
    names = sorted(set(DEFAULT_PACKAGES if packages is None else packages))
    missing = [name for name in names if not _roots(name)]
    if packages is not None and missing:
        raise ValueError(f"python-docs: expected installed packages, not found: {', '.join(missing)}; install or drop them")
    return [name for name in names if name not in missing]


def _roots(package: str) -> list[Path]:
    if package == STANDARD_LIBRARY:
        return [Path(sysconfig.get_path("stdlib"))]
    spec = importlib.util.find_spec(package) if package.isidentifier() else None  # of a top-level name: no import
    return [Path(place) for place in (spec.submodule_search_locations or [])] if spec else []


def _source_files(package: str) -> list[_SourceFile]:
    """The package's files in the order of a hash of their module: any prefix is a fair sample of the package."""
    files: dict[str, _SourceFile] = {}
    for root in _roots(package):
        for folder, subfolders, names in os.walk(root):
            subfolders[:] = [name for name in subfolders if name not in _SKIPPED_FOLDERS]
            parents = [package, *Path(folder).relative_to(root).parts]
            for name in (name for name in names if name.endswith(".py")):
                module = ".".join(parents if name == "__init__.py" else [*parents, name.removesuffix(".py")])
                path = os.path.join(folder, name)
                files.setdefault(module, _SourceFile(path, module, os.path.getsize(path)))
    return sorted(files.values(), key=lambda file: hashlib.sha256(file.module.encode()).digest())


def _partition(package: str, files: Sequence[_SourceFile], max_documents: int | None) -> Partition:
    paths, modules = tuple(file.path for file in files), tuple(file.module for file in files)
    return Partition(package, paths, modules, max_documents)


def _groups_of(files: Sequence[_SourceFile]) -> list[list[_SourceFile]]:
    groups: list[list[_SourceFile]] = []
    filled_bytes = _PARTITION_BYTES
    for file in files:
        if filled_bytes >= _PARTITION_BYTES:
            groups.append([])
            filled_bytes = 0
        groups[-1].append(file)
        filled_bytes += file.num_bytes
    return groups


def _documents_of(path: str, module: str) -> Iterator[Document]:
    try:
        tree = ast.parse(Path(path).read_bytes())
    except (SyntaxError, ValueError):  # templates, files of another Python version
        return
    is_topics = module == f"{STANDARD_LIBRARY}.{_TOPICS_MODULE}"
    for name, docstring in _topics(tree) if is_topics else _docstrings(tree):
        text = clean_text(docstring)
        if len(text) >= MIN_CHARACTERS:
            yield Document(text, f"{module}:{name}" if name else module)


def _docstrings(node: ast.AST, name: str = "") -> Iterator[tuple[str, str]]:
    """(qualified name, docstring) of a module and all that is defined in it, in the order of the file."""
    if isinstance(node, _Documented):
        docstring = ast.get_docstring(node, clean=False)
        if docstring:
            yield name, docstring
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _docstrings(child, f"{name}.{child.name}" if name else child.name)
        elif isinstance(child, ast.stmt | ast.ExceptHandler):
            yield from _docstrings(child, name)


def _topics(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """(topic, text) of the dictionary that `pydoc_data.topics` is."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and isinstance(value, ast.Constant) and isinstance(value.value, str):
                    yield str(key.value), value.value
