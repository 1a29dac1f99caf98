"""The embedded corpus: what is read, what is held out, and the labelled task."""

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.python_docs import (
    MIN_CHARACTERS,
    TASK_PACKAGES,
    TASK_PERCENT,
    Document,
    Partition,
    clean_text,
    fingerprint,
    is_task_document,
    is_task_module,
    list_partitions,
    list_task_partitions,
    read_partition,
)
from data_pipeline.python_docs_task import MAX_WORDS, ROWS_PER_CLASS, mask_give_aways, split_of, task_rows, write_task

PROSE = "The quick function jumps over the lazy class, and it returns whatever the caller deserves to get from it. " * 2


def partition_of(tmp_path: Path, source: str, module: str = "numpy.made_up", limit: int | None = None) -> Partition:
    path = tmp_path / "made_up.py"
    path.write_text(source)
    return Partition(module.partition(".")[0], (str(path),), (module,), limit)


def texts_of(package: str, count: int) -> list[Document]:
    """Held-out documents of many modules of one package."""
    modules = (module for module in (f"{package}.m{number}" for number in range(100 * count)) if is_task_module(module))
    words = [f"{chr(97 + n % 26)}{chr(97 + n // 26 % 26)}{chr(97 + n // 676)}" for n in range(count)]
    topic = package[::-1]
    return [Document(f"Unlike {topic} {word} this {PROSE}", f"{module}:f") for word, module in zip(words, modules, strict=False)]


def test_reads_docstrings_of_modules_classes_functions_in_file_order_without_running(tmp_path: Path) -> None:
    source = f'''"""M {PROSE}"""
raise SystemExit("executed")
if True:
    class A:
        """A {PROSE}"""
        async def b(self):
            """B {PROSE}"""
            def c(): "C {PROSE}"
def short(): "Too short to be a document."
'''
    documents = list(read_partition(partition_of(tmp_path, source)))
    assert [d.source for d in documents] == [f"numpy.made_up{name}" for name in ("", ":A", ":A.b", ":A.b.c")]
    assert [d.text[0] for d in documents] == ["M", "A", "B", "C"]


def test_a_file_that_does_not_parse_is_passed_over(tmp_path: Path) -> None:
    assert list(read_partition(partition_of(tmp_path, "def broken(:"))) == []


def test_clean_text_reflows_and_drops_doctests_and_rules() -> None:
    docstring = """Sums the parts
    of a whole.

    Parameters
    ----------
    x : int
        The first,
        and the last.
    y : int

    >>> f(1)
    output
    >>> f(2)

    * one
    * two
    """
    assert clean_text(docstring).splitlines() == [
        "Sums the parts of a whole.", "Parameters", "x : int The first, and the last.", "y : int", "* one", "* two",
    ]  # fmt: skip


def test_partitions_are_picklable_deterministic_and_cover_each_file_once() -> None:
    partitions = list_partitions(packages=["networkx", "stdlib"])
    assert partitions == list_partitions(packages=["stdlib", "networkx"]) == pickle.loads(pickle.dumps(partitions))
    paths = [path for partition in partitions for path in partition.paths]
    assert len(paths) == len(set(paths)) > 500
    assert not any("site-packages" in path for part in partitions if part.package == "stdlib" for path in part.paths)


def test_max_documents_bounds_the_sum_and_takes_a_prefix() -> None:
    bounded = list_partitions(60, ["networkx", "rich"])
    assert sum(partition.max_documents or 0 for partition in bounded) == 60
    whole = {partition.paths: partition for partition in list_partitions(None, ["networkx", "rich"])}
    for partition in bounded:
        documents = list(read_partition(partition))
        assert 0 < len(documents) <= (partition.max_documents or 0)
        assert documents == list(read_partition(whole[partition.paths]))[: len(documents)]
        assert all(len(document.text) >= MIN_CHARACTERS for document in documents)


def test_selection_that_cannot_be_honoured_is_an_error() -> None:
    with pytest.raises(ValueError, match="not found: no_such_package"):
        list_partitions(packages=["no_such_package", "rich"])
    with pytest.raises(ValueError, match="at least 1, found 0"):
        list_partitions(0)


def test_fingerprint_is_stable_and_depends_on_the_selection() -> None:
    assert fingerprint(10, ["rich", "networkx"]) == fingerprint(10, ["networkx", "rich"])
    assert len({fingerprint(10, ["rich"]), fingerprint(11, ["rich"]), fingerprint(None, ["rich"]), fingerprint(10, ["networkx"])}) == 4


def test_topics_of_pydoc_are_read() -> None:
    (partition,) = [p for p in list_partitions(packages=["stdlib"]) if "stdlib.pydoc_data.topics" in p.modules]
    index = partition.modules.index("stdlib.pydoc_data.topics")
    documents = list(read_partition(Partition("stdlib", (partition.paths[index],), (partition.modules[index],), None)))
    assert "stdlib.pydoc_data.topics:assert" in {document.source for document in documents}


def test_pretraining_and_task_share_no_module_and_cover_everything(tmp_path: Path) -> None:
    (partition,) = list_partitions(packages=["networkx"])
    kept, held = list(read_partition(partition)), list(read_partition(partition, held_out=True))
    assert kept
    assert held
    assert not any(map(is_task_document, kept))
    assert all(map(is_task_document, held))
    assert {d.module for d in kept} | {d.module for d in held} <= set(partition.modules)
    task_modules = {module for part in list_task_partitions() for module in part.modules if part.package == "networkx"}
    assert {d.module for d in held} <= task_modules
    assert task_modules.isdisjoint({d.module for d in kept})


def test_held_out_share_is_as_stated() -> None:
    share = sum(is_task_module(f"torch.module{number}") for number in range(4000)) / 4000
    assert share == pytest.approx(TASK_PERCENT / 100, abs=0.03)
    assert not any(is_task_module(f"rich.module{number}") for number in range(1000))


def test_give_aways_are_masked() -> None:
    text = "See torch.nn.Linear, np.array() or `pd.Series` of PyTorch and scikit-learn; SymPy uses my_helper, Conv2d, DataFrame."
    text += " Docs: https://pandas.pydata.org/docs and :class:`~ray.data.Dataset`. A word stays."
    masked = mask_give_aways(text).lower()
    for word in ("torch", "linear", "np", "pd", "scikit", "sympy", "my_helper", "conv2d", "dataframe", "pandas", "http", "ray"):
        assert word not in masked.replace("array", ""), masked
    assert masked.endswith("a word stays.")


@given(st.sampled_from(sorted(TASK_PACKAGES)), st.sampled_from(["{}", "a{}b", "x {} y", "({})", "{}.core", "the {}'s"]))
def test_a_package_name_never_survives_as_a_word(package: str, frame: str) -> None:
    words = mask_give_aways(frame.format(package) if frame != "a{}b" else f"a {package} b").split()
    assert package not in {word.strip("().'s") for word in words}


def test_task_is_balanced_split_by_module_and_free_of_leaks() -> None:
    documents = [document for package in ("torch", "ray", "pandas") for document in texts_of(package, 500)]
    known = documents[7].text
    rows = task_rows(documents, pretraining_texts=[known])
    assert rows == task_rows(reversed(documents), pretraining_texts=iter([known]))
    texts = [row.text for split in rows.values() for row in split]
    assert len(texts) == len(set(texts))
    assert mask_give_aways(known) not in texts
    split_by_text = {mask_give_aways(document.text): split_of(document.module) for document in documents}
    for split, split_rows in rows.items():
        assert all(split_by_text[row.text] == split and len(row.text.split()) <= MAX_WORDS for row in split_rows)
        counts = {label: sum(row.label == label for row in split_rows) for label in ("torch", "ray", "pandas")}
        assert all(0 < count <= ROWS_PER_CLASS[split] for count in counts.values())
    assert len({row.label for row in rows["test"]}) == 3


def test_one_class_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        task_rows(texts_of("torch", 50))


def test_write_task_is_deterministic_and_leaves_no_partial_file(tmp_path: Path) -> None:
    documents = texts_of("torch", 80) + texts_of("ray", 80)
    for name in ("a", "b"):
        write_task(tmp_path / name, documents)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == ["dev.jsonl", "test.jsonl", "train.jsonl"]
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
        rows = [json.loads(line) for line in (tmp_path / "a" / name).read_text().splitlines()]
        assert rows
        assert all(set(row) == {"text", "label"} and row["label"] in TASK_PACKAGES for row in rows)


def test_importing_loads_no_heavy_library() -> None:
    code = "import sys, data_pipeline.python_docs_task; print({'torch', 'ray', 'numpy', 'transformers'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout.strip() == "set()"
