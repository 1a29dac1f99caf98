"""Puts the fault that `MASKWRIGHT_TEST_FAULT` names into any process that imports the trainer (see tests/support/faults.py)."""

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Sequence
from types import ModuleType


class _AfterTrainer(importlib.abc.MetaPathFinder):
    """Finds `trainer.pretrain` as ever, and installs the fault when it has been loaded."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> importlib.machinery.ModuleSpec | None:
        if fullname != "trainer.pretrain":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        load = spec.loader.exec_module

        def load_and_install(module: ModuleType) -> None:
            load(module)
            sys.modules[fullname] = module
            from tests.support.faults import install_from_environment

            install_from_environment()

        spec.loader.exec_module = load_and_install
        return spec


if "MASKWRIGHT_TEST_FAULT" in os.environ:
    sys.meta_path.insert(0, _AfterTrainer())
