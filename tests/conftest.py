"""Options and hooks shared by all tests."""

from __future__ import annotations

import gc
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from mechdsl.base.records import REGISTRIES
from mechdsl.syntax import parser as grammar

# Imports and collection leave little to collect; `pytest_collection_finish` turns it on again.
gc.disable()
# Several workers share the cores; values must not depend on the number of threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Tests that need a store name one; none may be created next to the examples.
os.environ["MECHDSL_STORE"] = "none"
WORKER = "PYTEST_XDIST_WORKER" in os.environ
MEMORY = Path("/dev/shm")
"""A folder in memory, where a sync takes no time: a store syncs each transaction several times."""
NEEDED = 4 << 30
"""Bytes that must be free there; files of passed tests are removed."""
if not WORKER:
    if os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free >= NEEDED:
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))  # parent of every `tmp_path`
    # A model in a folder is checked once per session, by the first worker that loads it.
    os.environ["MECHDSL_CACHE"] = tempfile.mkdtemp(
        prefix="mechdsl-tests-", dir=os.environ.get("PYTEST_DEBUG_TEMPROOT")
    )


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-goldens",
        action="store_true",
        default=False,
        help="Rewrite expected texts; read the diff before you commit it.",
    )
    parser.addoption(
        "--on-device",
        default="cpu",
        metavar="DEVICE",
        help="Run files on this device; references stay on the CPU.",
    )


def pytest_configure(config: pytest.Config) -> None:
    grammar.load_parser()  # a fresh checkout builds its tables here, not within a timed test
    if config.getoption("--update-goldens") and config.getoption("numprocesses", None):
        raise pytest.UsageError("--update-goldens writes files that cases share: leave -n out")
    if not WORKER and config.getoption("numprocesses", None):
        return  # this process runs no test
    # Both import torch, which reads the environment.
    from .one_by_one import raise_at_once
    from .shared_models import share_models

    raise_at_once()
    share_models(str(config.getoption("--on-device")))


@pytest.fixture(autouse=True)
def _outside() -> Iterator[None]:
    """Forget external modules that a test registers: the code of a removed module can't be hashed,
    and then nothing in this process could be stored."""
    before = [(registry, set(registry.external_modules)) for registry in REGISTRIES]
    yield
    for registry, modules in before:
        registry.external_modules.intersection_update(modules)
    for registry in REGISTRIES[len(before) :]:
        registry.external_modules.clear()


def pytest_unconfigure() -> None:
    if not WORKER:
        shutil.rmtree(os.environ["MECHDSL_CACHE"], ignore_errors=True)


LONG = (
    "cli/test_guides.py",
    "plugin_package/test_plugins.py",
    "test_error_pages.py",
    "test_examples.py",
    "execute/test_encoder_decoders.py",
    "execute/test_value_keys.py",
    "pipeline/test_trained_coordinate_masks.py",
    "models/test_identity.py",
    "pipeline/test_trained_dictionaries.py",
    "messages/test_messages.py",
    "rules/test_weights.py",
    "images/test_rules.py",
    "cli/test_rerun.py",
    "language/test_language.py",
    "rules/test_in_replies.py",
    "pipeline/test_trained_decoders.py",
    "execute/test_properties.py",
    "pipeline/test_batches_and_precision.py",
    "models/test_offload.py",
    "compiler/test_training_cost.py",
)
"""The slowest test files."""


@pytest.hookimpl(tryfirst=True)  # before tests are deselected by their markers
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark tests slow that repeat others, and schedule long files first, so that workers end at
    about the same time."""
    from .execute.encoder_decoders import CONFIGS as ENCODER_DECODERS
    from .models.families import CONFIGS
    from .quick import read_seconds, thin_out
    from .rules.models import FAMILIES

    measured = {} if config.pluginmanager.has_plugin("tests.seconds") else read_seconds()
    thin_out(items, {*CONFIGS, *FAMILIES, *ENCODER_DECODERS}, measured)
    tests = Path(__file__).parent
    order = {tests / name: number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path, len(LONG)))


def pytest_collection_finish() -> None:
    """Exempt imported modules and collected tests from garbage collection, as they stay alive.

    Collect less often than every 700 allocations, as files cache models, results and references.
    Present garbage stays too: finding it would take two seconds in each process.
    """
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)
    gc.enable()


@pytest.fixture(scope="session")
def update(request: pytest.FixtureRequest) -> bool:
    """Whether golden files are rewritten instead of compared."""
    return bool(request.config.getoption("--update-goldens"))
